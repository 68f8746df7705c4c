"""Money against a provider that keeps its own ledger in another process, and processes that die.

Each scenario ends in the one checker of tests/invariants.
"""

import asyncio
import signal
import time
from pathlib import Path
from typing import Any

import psycopg
import pytest

from payments.database.connections import DatabaseAddress
from payments.payment.identity import payment_id_for
from tests.crash.client import Answer, Caller, race
from tests.crash.money import (
    Answers,
    Traffic,
    count,
    kill_loop,
    nothing_open,
    records,
    settings,
    settled,
)
from tests.doubles.provider import ProviderProcess
from tests.doubles.stand_in import Fault, FaultKind
from tests.invariants.checker import check
from tests.machine import within
from tests.outside_postgres import OutsidePostgres
from tests.process import ServiceProcess, working
from tests.support import eventually

LANES = 4  # so many payments at a time


@pytest.mark.timeout(3600)
def test_kill_9_loop(
    address: DatabaseAddress,
    connection: psycopg.Connection[Any],
    provider: ProviderProcess,
    tmp_path: Path,
    request: pytest.FixtureRequest,
) -> None:
    """The service dies again and again; in the end each payment and refund is settled by itself."""
    given = settings(address, provider)
    services = [ServiceProcess(tmp_path, **given), ServiceProcess(tmp_path, **given)]
    kills = max(1, request.config.getoption("--kills") // 3)
    kill_loop(services, connection, provider, lambda: records(provider), kills, seed=1)


def test_keys_that_come_32_times_at_once_over_two_processes(
    address: DatabaseAddress,
    connection: psycopg.Connection[Any],
    provider: ProviderProcess,
    tmp_path: Path,
    long_run: bool,
) -> None:
    keys = 200 if long_run else 60
    more = settings(address, provider, CHARGE_DEADLINE_S=7, GATEWAY_TIMEOUT_S=6)
    more["PENDING_ABANDON_AFTER_S"] = 900
    answers = Answers()

    async def charge_all(callers: list[Caller]) -> None:
        groups = [callers[part::LANES] for part in range(LANES)]
        await asyncio.gather(*(charge_some(part, group) for part, group in enumerate(groups)))

    async def charge_some(part: int, callers: list[Caller]) -> None:
        for number in range(part, keys, LANES):
            key = f"key-{number}"
            told = await asyncio.gather(*(caller.charge(key) for caller in callers))
            assert len({answer and (answer.status, answer.raw) for answer in told}) == 1, told
            for answer in told:
                answers.charged(key, answer)

    with ServiceProcess(tmp_path, **more) as one, ServiceProcess(tmp_path, **more) as two:
        # In every group half of the callers speak to either process.
        race([one.port] * LANES + [two.port] * LANES, 32 * LANES, charge_all)
        eventually(lambda: nothing_open(connection))
    assert len(answers.charges) == keys * 32
    assert {(answer.status_code, answer.status) for answer in answers.charges} == {(201, "SUCCESS")}
    assert len(provider.captures()) == keys
    check(connection, records(provider), answers.charges, settled=True)


def test_payments_with_6_refunds_at_once_each(
    address: DatabaseAddress,
    connection: psycopg.Connection[Any],
    provider: ProviderProcess,
    tmp_path: Path,
    long_run: bool,
) -> None:
    """300 each on 1000, over two processes: three go through, three are too much."""
    payments = 500 if long_run else 150
    more = settings(address, provider, CHARGE_DEADLINE_S=7, GATEWAY_TIMEOUT_S=6)
    more["PENDING_ABANDON_AFTER_S"] = 900
    answers = Answers()
    codes: list[str] = []

    async def refund_all(callers: list[Caller]) -> None:
        groups = [callers[part::LANES] for part in range(LANES)]
        await asyncio.gather(*(refund_some(part, group) for part, group in enumerate(groups)))

    async def refund_some(part: int, callers: list[Caller]) -> None:
        for number in range(part, payments, LANES):
            key = f"key-{number}"
            answers.charged(key, await callers[0].charge(key))
            payment_id = payment_id_for(key)
            told = await asyncio.gather(
                *(caller.refund(payment_id, 300, f"r-{n}") for n, caller in enumerate(callers))
            )
            for answer in told:
                assert answer is not None
                answers.refunded(answer)
                codes.append(answer.body.get("code", "refunded"))

    with ServiceProcess(tmp_path, **more) as one, ServiceProcess(tmp_path, **more) as two:
        race([one.port] * LANES + [two.port] * LANES, 6 * LANES, refund_all)
        eventually(lambda: nothing_open(connection))
    assert codes.count("refunded") == codes.count("refund_exceeds_capture") == 3 * payments
    assert {answer.status_code for answer in answers.refunds} == {201}
    check(connection, records(provider), answers.charges, answers.refunds, settled=True)


@pytest.mark.parametrize("frozen", [True, False], ids=["frozen", "killed"])
def test_the_database_goes_away_between_the_providers_answer_and_the_append(
    provider: ProviderProcess, data_dir: Path, frozen: bool
) -> None:
    """202 in time, not an error: the money is captured. Then it is recorded by itself."""
    # Time enough to notice the capture and to take the database away, also on a busy machine.
    provider.script(Fault("slow", operation="charge", seconds=2))
    with OutsidePostgres(data_dir / "outside") as server:
        answers = Answers()
        more = settings(server.address, provider, CHARGE_DEADLINE_S=5, PENDING_ABANDON_AFTER_S=9)
        with ServiceProcess(data_dir, **(more | server.settings)) as one:

            async def charge(callers: list[Caller]) -> Answer | None:
                task = asyncio.create_task(callers[0].charge("k"))
                while not provider.captures():
                    await asyncio.sleep(0.01)
                (server.freeze if frozen else server.kill)()
                return await task

            try:
                with within(5):  # 2 s of it are the provider's
                    answer = race([one.port], 1, charge)
            finally:
                (server.thaw if frozen else server.start)()
            assert answer is not None
            assert (answer.status, answer.body["status"]) == (202, "PENDING")
            answers.charged("k", answer)
            with server.connect() as connection:
                eventually(lambda: count(connection) == 2 and nothing_open(connection))
                assert one.terminate() == 0
                check(connection, records(provider), answers.charges, settled=True)


def test_a_frozen_process_wakes_up_after_another_has_settled(
    address: DatabaseAddress,
    connection: psycopg.Connection[Any],
    provider: ProviderProcess,
    tmp_path: Path,
    long_run: bool,
) -> None:
    """Frozen at any moment for longer than its deadline and than the abandonment."""
    answers = Answers()
    common = settings(address, provider, PENDING_ABANDON_AFTER_S=1.5)
    provider.script(Fault("slow", count=None, probability=0.5, seconds=0.1))
    with working(**common), ServiceProcess(tmp_path, "--api-only", **common) as service:
        for _ in range(3 if long_run else 1):
            with Traffic([service.port], answers) as traffic:
                eventually(lambda: traffic.captured >= 20)
                service.process.send_signal(signal.SIGSTOP)
                time.sleep(2)
                eventually(lambda: nothing_open(connection))
                service.process.send_signal(signal.SIGCONT)
                before = traffic.captured
                eventually(lambda: traffic.captured > before + 5)  # noqa: B023
        assert service.terminate() == 0
        settled(connection)
    check(connection, records(provider), answers.charges, answers.refunds, settled=True)


def test_a_provider_that_forgets_keys_is_only_asked(
    address: DatabaseAddress,
    connection: psycopg.Connection[Any],
    provider: ProviderProcess,
    tmp_path: Path,
) -> None:
    """Neither a charge that it made and whose answer is lost, nor one that it never got, is sent
    again."""
    provider.script(
        Fault("forgets_keys", count=None),
        Fault("answer_lost", operation="charge", count=2),
        Fault("reset", operation="charge", count=2),  # with one more the breaker would open
    )
    more = settings(address, provider, TEST_PROVIDER_RETRY_S=0, PENDING_ABANDON_AFTER_S=900)
    answers = Answers()

    async def charge(callers: list[Caller]) -> None:
        for pause_s in (0, 1.2, 0):
            await asyncio.sleep(pause_s)
            for number, caller in enumerate(callers):
                answers.charged(f"k{number}", await caller.charge(f"k{number}"))

    with ServiceProcess(tmp_path, **more) as service:
        race([service.port], 4, charge)
    once, again, once_more = (answers.charges[part : part + 4] for part in (0, 4, 8))
    assert [answer.status_code for answer in once] == [202] * 4
    for told in (again, once_more):
        assert sorted(answer.status_code for answer in told) == [201] * 2 + [202] * 2
    assert provider.counts()["charge"] == 4
    assert len(provider.captures()) == 2
    check(connection, records(provider), answers.charges, caught_up=False)


def test_a_provider_that_answers_about_something_else(
    address: DatabaseAddress,
    connection: psycopg.Connection[Any],
    provider: ProviderProcess,
    tmp_path: Path,
) -> None:
    """Never SUCCESS, whatever is wrong; once it answers soundly, all is settled by itself."""
    kinds: tuple[FaultKind, ...] = ("wrong_amount", "wrong_currency", "wrong_id")
    provider.script(
        *(Fault(kind, operation="charge") for kind in kinds),
        *(Fault(kind, operation="find_charge", count=2) for kind in kinds[:2]),
        Fault(kinds[2], operation="find_charge", count=None),
    )
    answers = Answers()

    async def charge(callers: list[Caller]) -> None:
        for key in kinds:
            answers.charged(key, await callers[0].charge(key))

    with ServiceProcess(tmp_path, **settings(address, provider)) as service:
        race([service.port], 1, charge)
        assert [(a.status_code, a.status) for a in answers.charges] == [(202, "PENDING")] * 3
        eventually(lambda: provider.counts()["find_charge"] >= 2 * 3)
        assert count(connection) == 3
        provider.script()
        eventually(lambda: count(connection) == 2 * 3 and nothing_open(connection))
    assert service.log.read_text().count("contradicts the recorded events") >= 3
    check(connection, records(provider), answers.charges, settled=True)
