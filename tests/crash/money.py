"""Clients that charge and refund, and what must hold of the money afterwards."""

import asyncio
import random
import threading
import time
import uuid
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from typing import Any, NamedTuple, Protocol
from uuid import UUID

import psycopg

from payments.database.connections import DatabaseAddress
from payments.payment.identity import payment_id_for
from tests.crash.client import PAUSE_S, Answer, Caller, race
from tests.doubles.provider import ProviderProcess
from tests.doubles.stand_in import Fault
from tests.invariants.checker import ChargeAnswer, ProviderRecord, RefundAnswer, check
from tests.process import ServiceProcess, at
from tests.support import PATIENCE_S, at_once, eventually

CALLERS = 8  # at once

FAST = {"CHARGE_DEADLINE_S": 1, "GATEWAY_TIMEOUT_S": 0.8, "PENDING_ABANDON_AFTER_S": 3}


def settings(address: DatabaseAddress, provider: ProviderProcess, **more: object) -> dict[str, Any]:
    return {
        **at(address),
        **FAST,
        "GATEWAY": "tests.doubles.http_gateway:build",
        "TEST_PROVIDER_URL": provider.url,
        **more,
    }


def records(provider: ProviderProcess) -> list[ProviderRecord]:
    """The money that the provider moved."""
    captures = {line.txn_id: line for line in provider.captures()}
    return [
        *(
            ProviderRecord(
                "capture",
                uuid.UUID(line.id),
                uuid.UUID(line.id),
                line.amount_cents,
                line.currency,
                line.txn_id,
            )
            for line in captures.values()
        ),
        *(
            ProviderRecord(
                "refund",
                uuid.UUID(line.id),
                uuid.UUID(captures[line.charge_txn_id].id),
                line.amount_cents,
                line.currency,
                line.txn_id,
            )
            for line in provider.refunds()
        ),
    ]


def nothing_open(connection: psycopg.Connection[Any]) -> bool:
    """The projector has seen everything, and nothing waits for the provider."""
    row = connection.execute(
        "SELECT (SELECT position FROM followers WHERE name = 'payments')"
        "       = (SELECT coalesce(max(notification_id), 0) FROM payment_events)"
        "   AND NOT EXISTS (SELECT FROM unsettled_payments"
        "                    WHERE kind NOT IN ('abandoned', 'declined'))"
    ).fetchone()
    assert row is not None
    return bool(row[0])


def settled(connection: psycopg.Connection[Any], timeout_s: float = PATIENCE_S) -> None:
    """Waits until nothing can become of any payment any more.

    What was abandoned is watched with growing pauses: a request that was sent late, by a process
    that was frozen or on a busy machine, may have been captured since it was asked about last. So
    each is asked about once more.
    """
    eventually(lambda: nothing_open(connection), timeout_s)
    connection.execute(
        "UPDATE unsettled_payments SET due_at = now(), attempts = 0,"
        " change = nextval('unsettled_payments_change_seq') WHERE kind = 'abandoned'"
    )
    # The second attempt begins once the first is over.
    eventually(lambda: at_once(connection, nothing_open, asked_about), timeout_s)


def asked_about(connection: psycopg.Connection[Any]) -> bool:
    row = connection.execute(
        "SELECT count(*) FROM unsettled_payments WHERE kind = 'abandoned' AND attempts < 2"
    ).fetchone()
    assert row is not None
    return not row[0]


class ScriptedProvider(Protocol):
    """What a stand-in of a provider has in common with the others (tests/doubles/stand_in.py)."""

    def script(self, *faults: Fault) -> None: ...

    def counts(self) -> dict[str, int]: ...


class Customers(NamedTuple):
    """What the charges are made with, and what their customers do.

    `new_method` gives the payment method of the next charge. `act` is called for some charges that
    are PENDING, with payment id and payment method: the customer does what there is to do, if there
    is anything; it is called in a thread of its own.
    """

    new_method: Callable[[], str | None] = lambda: None
    act: Callable[[UUID, str | None], object] = lambda _id, _method: None


class Answers:
    """What callers were told, for the checker; and what may be sent again, key and method."""

    def __init__(self) -> None:
        self.charges: list[ChargeAnswer] = []
        self.refunds: list[RefundAnswer] = []
        self.again: list[tuple[str, str | None]] = []

    def charged(self, key: str, answer: Answer | None, method: str | None = None) -> None:
        if answer is None:
            self.again.append((key, method))
            return
        assert answer.status in (201, 202, 503), answer
        if answer.status < 300:
            payment_id = uuid.UUID(answer.body["id"])
            self.charges.append(ChargeAnswer(payment_id, answer.status, answer.body["status"]))

    def refunded(self, answer: Answer | None) -> None:
        if answer is None:
            return
        assert answer.status in (201, 202, 409, 503), answer
        if answer.status < 300:
            body = answer.body
            self.refunds.append(
                RefundAnswer(
                    uuid.UUID(body["id"]),
                    uuid.UUID(body["refund_id"]),
                    answer.status,
                    body["amount_cents"],
                )
            )


class Traffic:
    """Charges, refunds of some, and repetitions of what got no answer, in a thread of its own."""

    def __init__(
        self,
        ports: Sequence[int],
        answers: Answers,
        callers: int = CALLERS,
        customers: Customers | None = None,
    ) -> None:
        """The callers speak to the ports in turn."""
        self._ports = ports
        self._answers = answers
        self._callers = callers
        self._customers = customers or Customers()
        self._stopped = False
        self.captured = 0
        self._thread = threading.Thread(target=self._run)

    def __enter__(self) -> "Traffic":
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._stopped = True
        self._thread.join(timeout=30)
        assert not self._thread.is_alive()

    def _run(self) -> None:
        async def all_of_them(callers: list[Caller]) -> None:
            await asyncio.gather(*(self._call(caller) for caller in callers))

        race(self._ports, self._callers, all_of_them)

    async def _call(self, caller: Caller) -> None:
        while not self._stopped:
            if self._answers.again and random.random() < 0.3:
                key, method = self._answers.again.pop()
            else:
                key, method = str(uuid.uuid4()), self._customers.new_method()
            answer = await caller.charge(key, payment_method=method)
            self._answers.charged(key, answer, method)
            await asyncio.sleep(PAUSE_S)
            if answer is None or answer.status == 503:
                continue
            if answer.body["status"] == "SUCCESS":
                self.captured += 1
                await self._refund_some(caller, key)
            elif answer.status == 202:
                if random.random() < 0.5:
                    await asyncio.to_thread(self._customers.act, payment_id_for(key), method)
                if random.random() < 0.5:
                    self._answers.again.append((key, method))

    async def _refund_some(self, caller: Caller, key: str) -> None:
        if self.captured % 3 == 0:
            refund_key = f"{key}-refund" if self.captured % 2 else None
            amount = 300 if refund_key else None
            self._answers.refunded(await caller.refund(payment_id_for(key), amount, refund_key))


UNRELIABLE = (
    Fault("slow", count=None, probability=0.3, seconds=0.1),
    Fault("answer_lost", count=None, probability=0.05),
    Fault("500", count=None, probability=0.03),
    Fault("500_after", count=None, probability=0.03),
    Fault("reset_after", count=None, probability=0.03),
    Fault("reset", count=None, probability=0.03),
)


def count(connection: psycopg.Connection[Any]) -> int:
    row = connection.execute("SELECT count(*) FROM payment_events").fetchone()
    assert row is not None
    return int(row[0])


def kill_loop(
    services: Sequence[ServiceProcess],
    connection: psycopg.Connection[Any],
    provider: ScriptedProvider,
    records: Callable[[], list[ProviderRecord]],
    kills: int,
    seed: int,
    *,
    points: Sequence[Fault] = (),
    customers: Customers | None = None,
) -> None:
    """One of the services dies again and again, at an unreliable provider; in the end each payment
    and refund is settled by itself.

    Every second time it dies at one of the `points`: while the provider has a call of this
    operation and, by this fault, gives no response. `slow` has done what was asked, `timeout` has
    not. Otherwise it dies at any time. `records` gives the money that the provider moved.
    """
    dice, answers, ports = random.Random(seed), Answers(), [each.port for each in services]
    with ExitStack() as running:
        for service in services:
            running.enter_context(service)
        for number in range(kills):
            victim = dice.choice(services)
            provider.script(*UNRELIABLE)
            with Traffic(ports, answers, customers=customers) as traffic:
                eventually(lambda: traffic.captured >= 5)
                if points and number % 2:
                    others = CALLERS - CALLERS // len(services)
                    _reach(provider, points[number // 2 % len(points)], others + 1)
                else:
                    time.sleep(dice.random() * 0.3)
                victim.kill()
            victim.start()
        for service in services:
            service.kill()
        check(connection, records(), answers.charges, answers.refunds, caught_up=False)
        provider.script()
        for service in services:
            service.start()
        settled(connection, PATIENCE_S + 3 * kills)  # each leaves some to be asked about
        assert [service.terminate() for service in services] == [0] * len(services)
    check(connection, records(), answers.charges, answers.refunds, settled=True)
    assert len(answers.charges) > kills * 5
    assert answers.refunds


def _reach(provider: ScriptedProvider, point: Fault, calls: int) -> None:
    """Until the provider has so many calls there: with one more than the other services have
    callers, one is from the service at hand."""
    provider.script(point)
    begun = provider.counts().get(point.operation, 0)
    eventually(lambda: provider.counts().get(point.operation, 0) >= begun + calls)
