"""A provider that gives each charge an id of its own, and processes that die around it.

Nothing is lost, doubled or stuck, wherever that is: before the id is stored, behind it, and behind
the capture.
"""

import asyncio
import random
import time
from collections.abc import Callable
from pathlib import Path
from uuid import UUID

import psycopg
import pytest

from payments.database.connections import DatabaseAddress
from payments.payment.identity import payment_id_for
from tests.commands.settling import age
from tests.crash.client import Caller, race
from tests.crash.money import Answers, Customers, kill_loop, nothing_open, records, settings
from tests.doubles.provider import ProviderProcess
from tests.doubles.stand_in import Fault
from tests.invariants.checker import check
from tests.process import ServiceProcess
from tests.support import PATIENCE_S, eventually

HELD_S = 60.0  # far longer than the process lives

# Most customers need not act; a charge that is processing is captured when it is finished.
METHODS = (*[None] * 6, "pm_action", "pm_authorized", "pm_processing")

# Where the process dies: what the provider does, and how to see that it has come so far.
POINTS: dict[str, tuple[Fault, Callable[[ProviderProcess], int]]] = {
    "prepared": (
        Fault("slow", operation="prepare", count=None, seconds=HELD_S),
        lambda provider: sum(line.kind == "prepare" for line in provider.ledger()),
    ),
    "referenced": (
        Fault("timeout", operation="charge", count=None),
        lambda provider: provider.counts()["charge"],
    ),
    "captured": (
        Fault("slow", operation="charge", count=None, seconds=HELD_S),
        lambda provider: len(provider.captures()),
    ),
}


def topics(connection: psycopg.Connection[tuple[str]], key: str) -> list[str]:
    rows = connection.execute(
        "SELECT topic FROM payment_events WHERE originator_id = %s ORDER BY originator_version",
        [payment_id_for(key)],
    ).fetchall()
    return [topic.removeprefix("Payment") for (topic,) in rows]


def due(connection: psycopg.Connection[tuple[str]]) -> bool:
    """As if the deadline of the requests were over: what is open is asked about now."""
    connection.execute(
        "UPDATE unsettled_payments SET due_at = now(), attempts = 0,"
        " change = nextval('unsettled_payments_change_seq') WHERE due_at > now() + interval '2 s'"
    )
    return True


def test_killed_at_each_point(
    address: DatabaseAddress,
    connection: psycopg.Connection[tuple[str]],
    provider: ProviderProcess,
    tmp_path: Path,
) -> None:
    """At each of them, one payment whose request comes again and one that is left to settling."""
    slow = settings(
        address,
        provider,
        CHARGE_DEADLINE_S=30,
        GATEWAY_TIMEOUT_S=29,
        PENDING_ABANDON_AFTER_S=900,
        TEST_PROVIDER_PREPARES=1,
    )
    answers = Answers()

    async def die(callers: list[Caller]) -> None:
        requests: list[asyncio.Task[None]] = []

        async def charge(caller: Caller, key: str) -> None:
            answers.charged(key, await caller.charge(key))

        for point, (fault, reached) in POINTS.items():
            provider.script(fault)
            come = reached(provider) + 2
            for end in ("again", "alone"):
                caller = callers[len(requests)]
                requests.append(asyncio.create_task(charge(caller, f"{point}, {end}")))
            deadline = time.monotonic() + PATIENCE_S
            while reached(provider) < come:
                assert time.monotonic() < deadline, point
                await asyncio.sleep(0.01)
        await asyncio.to_thread(service.kill)
        await asyncio.gather(*requests)

    async def repeat(callers: list[Caller]) -> None:
        for point in POINTS:
            answers.charged(point, await callers[0].charge(f"{point}, again"))

    with ServiceProcess(tmp_path, **slow) as service:
        race([service.port], 2 * len(POINTS), die)
    assert answers.charges == []
    for end in ("again", "alone"):
        assert topics(connection, f"prepared, {end}") == ["Initiated"]
        assert topics(connection, f"referenced, {end}") == ["Initiated", "Referenced"]
        assert topics(connection, f"captured, {end}") == ["Initiated", "Referenced"]
    provider.script()
    quick = slow | {"CHARGE_DEADLINE_S": 1, "GATEWAY_TIMEOUT_S": 0.8}
    with ServiceProcess(tmp_path, **quick) as service:
        race([service.port], 1, repeat)
        eventually(
            lambda: due(connection) and topics(connection, "captured, alone")[-1] == "Charged"
        )
        assert [(a.status_code, a.status) for a in answers.charges] == [(201, "SUCCESS")] * 3
        asyncio.run(age(connection, quick["PENDING_ABANDON_AFTER_S"]))
        eventually(lambda: due(connection) and nothing_open(connection))
    for point in POINTS:
        assert topics(connection, f"{point}, again") == ["Initiated", "Referenced", "Charged"]
    for point in ("prepared", "referenced"):
        assert topics(connection, f"{point}, alone") == ["Initiated", "Referenced", "Failed"]
    assert len(provider.captures()) == 4
    # Whoever is asked twice to cancel a charge has cancelled it once.
    cancelled = sorted(line.id for line in provider.ledger() if line.code == "cancelled")
    given_up = (payment_id_for(f"{point}, alone") for point in ("prepared", "referenced"))
    assert cancelled == sorted(map(str, given_up))
    assert sum(line.kind == "prepare" for line in provider.ledger()) == 6  # one for each payment
    check(connection, records(provider), answers.charges, settled=True)


@pytest.mark.timeout(3600)
def test_kill_9_loop(
    address: DatabaseAddress,
    connection: psycopg.Connection[tuple[str]],
    provider: ProviderProcess,
    tmp_path: Path,
    request: pytest.FixtureRequest,
) -> None:
    """Again and again, at an unreliable provider: with customers who act or never do, and with
    charges that the provider finishes late, or never."""
    given = settings(address, provider, TEST_PROVIDER_PREPARES=1)
    services = [ServiceProcess(tmp_path, **given), ServiceProcess(tmp_path, **given)]
    dice = random.Random(3)

    def act(payment_id: UUID, method: str | None) -> None:
        if not provider.finish(payment_id):
            provider.customer_acts(payment_id)

    kill_loop(
        services,
        connection,
        provider,
        lambda: records(provider),
        request.config.getoption("--kills"),
        seed=2,
        points=[fault for fault, _ in POINTS.values()],
        customers=Customers(lambda: dice.choice(METHODS), act),
    )
