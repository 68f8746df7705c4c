"""Small helpers that several test modules share."""

import asyncio
import sqlite3
import time
import uuid
from collections.abc import Awaitable, Callable, Iterable, Iterator
from contextlib import closing
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any, NamedTuple, Self

import psycopg
from eventsourcing.persistence import StoredEvent

from payments.commands.charge import ChargePayment
from payments.database.connections import Database, DatabaseAddress
from payments.errors import PaymentsError
from payments.events.facts import Fact
from payments.events.store import APPEND, append_params, to_stored_event
from payments.observability.metrics import Telemetry
from payments.payment.decisions import (
    Cause,
    abandon,
    charge_outcome,
    initiate,
    initiate_refund,
    referenced,
    refund_outcome,
    require_action,
    return_outcome,
)
from payments.payment.identity import ChargeRequest, RefundRequest
from payments.payment.state import Approved, Declined, Payment, Refund, evolve, fold
from payments.projections.follower import Follower
from payments.projections.payments import PaymentsProjection
from payments.projections.seals import SealsProjection

Connection = psycopg.Connection[Any]

PATIENCE_S = 30  # with what must happen, and may take its time on a busy machine

ORDER_ID = uuid.UUID("f50d9fa2-5d3e-4e49-9a02-218ad32ef4a9")


def charge_of(
    key: str,
    amount_cents: int = 1500,
    *,
    order_id: uuid.UUID = ORDER_ID,
    currency: str = "INR",
    client: str = "default",
    payment_method: str | None = None,
) -> ChargePayment:
    request = ChargeRequest(
        idempotency_key=key,
        merchant_order_id=order_id,
        amount_cents=amount_cents,
        currency=currency,
        client=client,
        payment_method=payment_method,
    )
    return ChargePayment(request=request, request_id="test")


def stored_event(
    stream: uuid.UUID | str | None = None,
    version: int = 1,
    state: bytes | None = None,
    topic: str = "PaymentInitiated",
) -> StoredEvent:
    """An event for the store alone; its state need not decode."""
    state = b'{"n": "%s"}' % uuid.uuid4().bytes.hex().encode() if state is None else state
    return StoredEvent(stream or uuid.uuid4(), version, topic, state)


async def until(
    holds: Callable[[], Any] | Callable[[], Awaitable[Any]], timeout_s: float = PATIENCE_S
) -> Any:
    """Polls a condition until it holds and returns what it returned; fails after `timeout_s`.

    How soon it has to hold is for `within` of tests.machine.
    """
    deadline = time.monotonic() + timeout_s
    while True:
        found = holds()
        if asyncio.iscoroutine(found):
            found = await found
        if found:
            return found
        assert time.monotonic() < deadline, "the condition did not come to hold"
        await asyncio.sleep(0.01)


def eventually(holds: Callable[[], Any], timeout_s: float = PATIENCE_S) -> Any:
    """The same where there is no event loop."""
    deadline = time.monotonic() + timeout_s
    while not (found := holds()):
        assert time.monotonic() < deadline, "the condition did not come to hold"
        time.sleep(0.02)
    return found


def at_once(connection: Connection, *hold: Callable[[Connection], Any]) -> bool:
    """Whether all of these hold in one snapshot. Of conditions that are looked at one after the
    other, the first may hold no longer by the time the last one does."""
    with connection.transaction():
        connection.execute("SET TRANSACTION ISOLATION LEVEL REPEATABLE READ")
        return all(each(connection) for each in hold)


async def elapse(seconds: float, *, frozen: bool) -> None:
    """Lets time pass. `frozen`: as if the process had been stopped, so nothing else goes on, and
    whoever called is the first to go on."""
    ends_at = time.monotonic() + seconds
    while time.monotonic() < ends_at:
        if not frozen:
            await asyncio.sleep(0.01)


class History:
    """A payment's facts, one decision after another: `History("k1").charged().refunded().facts`.

    It begins PENDING. The facts happen one second apart, from `began_at` on.
    """

    def __init__(
        self,
        key: str,
        amount_cents: int = 1500,
        *,
        order_id: uuid.UUID = ORDER_ID,
        currency: str = "INR",
        client: str = "default",
        gateway: str = "simulated",
        began_at: datetime = datetime(2026, 1, 2, 3, 4, 5, 6, tzinfo=UTC),
    ) -> None:
        self.facts: list[Fact] = []
        self._began_at = began_at
        self._client = client
        request = ChargeRequest(
            idempotency_key=key,
            merchant_order_id=order_id,
            amount_cents=amount_cents,
            currency=currency,
            client=client,
        )
        self._add(initiate(request, gateway, self._cause()))

    @property
    def payment(self) -> Payment:
        payment = fold(self.facts)
        assert payment is not None
        return payment

    @property
    def id(self) -> uuid.UUID:
        return self.facts[0].payment_id

    def referenced(self, reference: str) -> Self:
        return self._add(referenced(self.payment, reference, self._cause()))

    def told_to_act(self, kind: str) -> Self:
        return self._add(require_action(self.payment, kind, self._cause()))

    def charged(self) -> Self:
        return self._add(charge_outcome(self.payment, self._captured(), self._cause()))

    def declined(self, code: str = "insufficient_funds") -> Self:
        return self._add(charge_outcome(self.payment, Declined(code), self._cause()))

    def abandoned(self) -> Self:
        return self._add(abandon(self.payment, self._cause()))

    def action_required(self, kind: str = "redirect") -> Self:
        return self._add(require_action(self.payment, kind, self._cause()))

    def refund_begun(self, key: str | None = None, amount_cents: int | None = None) -> Self:
        """A refund under way: of the whole rest, if no amount is given."""
        request = RefundRequest(
            payment_id=self.id, amount_cents=amount_cents, idempotency_key=key, client=self._client
        )
        return self._add(initiate_refund(self.payment, request, self._cause()))

    def give_back_begun(self) -> Self:
        """The service gives back by itself what is left."""
        request = RefundRequest(
            payment_id=self.id,
            amount_cents=None,
            idempotency_key=None,
            client="fulfilment",
            unfulfilled=True,
        )
        return self._add(initiate_refund(self.payment, request, self._cause()))

    def refund_succeeded(self) -> Self:
        """The oldest refund under way goes through."""
        refund = self._under_way()
        back = self._returned(refund.id, refund.amount_cents)
        return self._add(refund_outcome(self.payment, refund, back, self._cause()))

    def refund_failed(self, code: str = "account_closed") -> Self:
        """The oldest refund under way is refused."""
        outcome = Declined(code)
        return self._add(refund_outcome(self.payment, self._under_way(), outcome, self._cause()))

    def refunded(self, key: str | None = None, amount_cents: int | None = None) -> Self:
        return self.refund_begun(key, amount_cents).refund_succeeded()

    def late_capture_found(self) -> Self:
        """The provider turns out to have captured a FAILED payment."""
        return self.charged()

    def late_capture_returned(self) -> Self:
        found = self.payment.late_capture
        assert found is not None
        back = self._returned(found.refund_id, self.payment.amount_cents)
        return self._add(return_outcome(self.payment, found, back, self._cause()))

    def _captured(self) -> Approved:
        payment = self.payment
        return Approved(
            id=payment.id,
            amount_cents=payment.amount_cents,
            currency=payment.currency,
            provider_txn_id=f"txn-{payment.id}",
        )

    def _returned(self, refund_id: uuid.UUID, amount_cents: int) -> Approved:
        return Approved(
            id=refund_id,
            amount_cents=amount_cents,
            currency=self.payment.currency,
            provider_txn_id=f"re-{refund_id}",
        )

    def _under_way(self) -> Refund:
        return next(each for each in self.payment.refunds if each.status == "PENDING")

    def _cause(self) -> Cause:
        occurred_at = self._began_at + timedelta(seconds=len(self.facts))
        return Cause(
            event_id=uuid.uuid4(), occurred_at=occurred_at, client=self._client, request_id="test"
        )

    def _add(self, fact: Fact | None) -> Self:
        assert fact is not None
        evolve(self.payment if self.facts else None, fact)
        self.facts.append(fact)
        return self


def histories(prefix: str = "key", **options: Any) -> dict[str, History]:
    """A payment of every kind; their keys begin with `prefix`."""

    def begun(kind: str) -> History:
        return History(f"{prefix} {kind}", **options)

    return {
        "pending": begun("pending"),
        "charged": begun("charged").charged(),
        "declined": begun("declined").declined(),
        "abandoned": begun("abandoned").abandoned(),
        "refund under way": begun("refund under way").charged().refund_begun("r1", 500),
        "partly refunded": begun("partly refunded").charged().refunded("r1", 500),
        "refunded in parts": begun("refunded in parts").charged().refunded("r1", 500).refunded(),
        "refunded": begun("refunded").charged().refunded(),
        "refund failed": begun("refund failed").charged().refund_begun().refund_failed(),
        "refunded at last": (
            begun("refunded at last").charged().refund_begun().refund_failed().refunded("r2")
        ),
        "two refunds at once": (
            begun("two refunds at once")
            .charged()
            .refund_begun("r1", 500)
            .refund_begun("r2", 600)
            .refund_succeeded()
        ),
        "late capture found": begun("late capture found").abandoned().late_capture_found(),
        "late capture returned": (
            begun("late capture returned").abandoned().late_capture_found().late_capture_returned()
        ),
        "declined, yet captured": (
            begun("declined, yet captured").declined().late_capture_found().late_capture_returned()
        ),
    }


def append(connection: psycopg.Connection[Any], facts: Iterable[Fact]) -> int:
    """Appends facts of any payments, in this order; returns the last position."""
    return append_stored(connection, [to_stored_event(fact) for fact in facts])


def append_stored(connection: psycopg.Connection[Any], events: Iterable[StoredEvent]) -> int:
    """The same for events whose bytes may be damaged."""
    rows = connection.execute(APPEND, append_params([[event] for event in events])).fetchall()
    assert {outcome for outcome, _, _ in rows} == {"appended"}
    position: int = rows[-1][1]
    return position


async def follow(database: Database, batch_max: int = 1000) -> None:
    """Brings the payments read model up to the log's end."""
    projection = PaymentsProjection(settle_after_s=7)
    follower = Follower(database.connect, projection, Telemetry(), batch_max)
    try:
        while await follower.run_once():
            pass
    finally:
        await follower.close()


async def seal_log(database: Database, batch_max: int = 1000) -> None:
    """Seals all events."""
    follower = Follower(database.connect, SealsProjection(), Telemetry(), batch_max)
    try:
        while await follower.run_once():
            pass
    finally:
        await follower.close()


class LedgerRow(NamedTuple):
    """`payment_id` is a refund's; a charge has None."""

    id: uuid.UUID
    amount_cents: int
    currency: str
    outcome: str
    payment_id: uuid.UUID | None


LEDGER_ROWS = """
SELECT id, amount_cents, currency, outcome, NULL FROM charges
 UNION ALL SELECT id, amount_cents, currency, outcome, payment_id FROM refunds
"""


def ledger_rows(ledger: Path) -> list[LedgerRow]:
    """All that the simulated provider has decided: charges, then refunds."""
    with closing(sqlite3.connect(ledger)) as connection:
        rows = connection.execute(LEDGER_ROWS).fetchall()
    return [
        LedgerRow(
            uuid.UUID(id), cents, currency, outcome, uuid.UUID(payment_id) if payment_id else None
        )
        for id, cents, currency, outcome, payment_id in rows
    ]


def subclasses(kind: type[PaymentsError]) -> Iterator[type[PaymentsError]]:
    for subclass in kind.__subclasses__():
        yield subclass
        yield from subclasses(subclass)


def catch_up(address: DatabaseAddress, *, seal: bool = True) -> None:
    """The read model is up to date, and with `seal` all events are sealed."""

    async def run() -> None:
        async with Database(address, 2) as database:
            await follow(database)
            if seal:
                await seal_log(database)

    asyncio.run(run())


def log_id(connection: Connection) -> str:
    row = connection.execute("SELECT id::text FROM log_identity").fetchone()
    assert row is not None
    return str(row[0])


def spread(connection: Connection, *seconds: int) -> list[datetime]:
    """Has the events recorded so many seconds after a certain moment; their times."""
    connection.execute("ALTER TABLE payment_events DISABLE TRIGGER ALL")
    times = [datetime(2026, 1, 31, 23, tzinfo=UTC) + timedelta(seconds=each) for each in seconds]
    for position, time_ in enumerate(times, 1):
        connection.execute(
            "UPDATE payment_events SET recorded_at = %s WHERE notification_id = %s",
            [time_, position],
        )
    return times
