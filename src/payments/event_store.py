"""The log as the rest of the service uses it: streams as payments, and facts to append."""

import math
from collections.abc import Callable, Iterable, Sequence
from contextlib import suppress
from datetime import datetime
from itertools import groupby
from operator import itemgetter
from typing import TYPE_CHECKING, Any, NamedTuple
from uuid import UUID

from eventsourcing.persistence import StoredEvent

from payments import legacy_ids, unsettled
from payments.database.arrays import uuids
from payments.database.connections import Database
from payments.errors import PaymentUnreadable
from payments.events import facts
from payments.events.facts import Fact, UndecodableEvent
from payments.events.store import (
    LOAD_STREAM,
    LOAD_STREAMS,
    PERHAPS_PAID,
    belongs_to,
    fact_at,
    to_fact,
    to_stored_event,
)
from payments.observability.tracing import span
from payments.payment.state import Payment, Status, UnexpectedEvent, evolve, fold

if TYPE_CHECKING:  # who only reads needs no metrics
    from payments.events.appender import Appender


class EventStore:
    """The one entry point of commands: loads payments from their streams, and appends facts."""

    def __init__(self, database: Database, appender: "Appender") -> None:
        self._database = database
        self._appender = appender

    async def load(self, payment_id: UUID, client: str | None = None) -> "LoadedPayment | None":
        """As load_payment."""
        return await load_payment(self._database, payment_id, client)

    async def load_charge(self, payment_id: UUID) -> "LoadedPayment | None":
        """As load_charge."""
        return await load_charge(self._database, payment_id)

    async def load_imported(
        self, legacy_id: UUID, client: str | None = None
    ) -> "LoadedPayment | None":
        """The same, of the payment that had this id in the Node service."""
        payment_id = await legacy_ids.find(self._database, legacy_id)
        return None if payment_id is None else await self.load(payment_id, client)

    async def perhaps_paid(self, order_id: UUID, *, but: UUID) -> list[Payment]:
        """The payments that may have captured something for an order, as far as their events can
        be read; none if `but` is a payment that has begun. Raises DatabaseUnavailable."""
        asked = {"payment_id": but, "order_id": order_id, "order": str(order_id).encode()}
        found = [id for (id,) in await self._database.fetch(PERHAPS_PAID, asked)]
        rows = await self._database.fetch(LOAD_STREAMS, [uuids(found)]) if found else []
        payments = (
            fold_readable(UUID(bytes=id_bytes), [event[1:] for event in events])
            for id_bytes, events in groupby(rows, itemgetter(0))
        )
        return [payment for payment in payments if payment is not None]

    async def may_tell(self, payment_id: UUID, level: int, again_s: float) -> bool:
        """As unsettled.may_tell."""
        return await unsettled.may_tell(self._database, payment_id, level, again_s)

    async def fits_again(self, payment_id: UUID) -> None:
        """As unsettled.fits_again."""
        await unsettled.fits_again(self._database, payment_id)

    async def append_intent(
        self,
        fact: Fact,
        *,
        after: StoredEvent | None = None,
        wanted: Callable[[], bool] | None = None,
    ) -> StoredEvent:
        """Appends what has to be durable before a provider is asked; returns it as it was stored.

        Raises as Appender.append_intent.
        """
        event = to_stored_event(fact)
        with span("append", event=fact.TOPIC):
            await self._appender.append_intent(event, after=after, wanted=wanted)
        return event

    async def append(self, fact: Fact, *, after: StoredEvent) -> StoredEvent:
        """Appends what a provider did, however long that takes; returns it as it was stored.

        Raises as Appender.append.
        """
        event = to_stored_event(fact)
        with span("append", event=fact.TOPIC):
            await self._appender.append([event], after=after)
        return event

    async def append_again(
        self, events: Sequence[StoredEvent], *, after: StoredEvent | None
    ) -> None:
        """Appends events that the log has lost, byte for byte. Raises as Appender.append."""
        await self._appender.append(events, after=after)


class LoadedPayment(NamedTuple):
    """A payment folded from its stream, which was read at `read_at` by the database's clock.

    `events` are what it was folded from, as stored; `recorded_at` holds the time of each of them,
    by the same clock; `traceparent` is that of the request that began it.
    """

    payment: Payment
    events: tuple[StoredEvent, ...]
    recorded_at: list[datetime]
    read_at: datetime
    traceparent: str | None

    def age_s(self, version: int = 1) -> float:
        """How old the event with this version was, in seconds, never below 0.

        One that was recorded in the future, by a clock that was ahead, is as old as the application
        that decided it says.
        """
        return max(0.0, self._age_s(version))

    def age_at_most_s(self, version: int) -> float:
        """The same, but infinite if it lies in the future by both clocks: one of them was set back,
        and nobody knows how old it is."""
        age_s = self._age_s(version)
        return age_s if age_s >= 0 else math.inf

    def _age_s(self, version: int) -> float:
        began = self.recorded_at[version - 1]
        if began > self.read_at:
            began = to_fact(self.events[version - 1]).occurred_at
        return (self.read_at - began).total_seconds()


async def load_payment(
    database: Database, payment_id: UUID, client: str | None = None
) -> LoadedPayment | None:
    """Reads and folds one stream; None if it has no events, or `client` may not read them.

    Raises DatabaseUnavailable, or PaymentUnreadable if its events cannot be decoded or folded.
    """
    rows = await database.fetch(LOAD_STREAM, [payment_id])
    if not rows or not belongs_to(client, payment_id, rows[0][:3]):
        return None
    return _loaded(payment_id, rows)


async def load_charge(database: Database, payment_id: UUID) -> LoadedPayment | None:
    """The same, but once its charge has an outcome, whatever follows need not be readable: a newer
    version of the service may have written it, and the first outcome stays the answer."""
    rows = await database.fetch(LOAD_STREAM, [payment_id])
    if not rows:
        return None
    try:
        return _loaded(payment_id, rows)
    except PaymentUnreadable:
        readable = fold_readable(payment_id, (row[:3] for row in rows))
        if readable is None or readable.outcome is Status.PENDING:
            raise
        return _loaded(payment_id, rows[: readable.version])


def _loaded(payment_id: UUID, rows: Sequence[tuple[Any, ...]]) -> LoadedPayment:
    payment = fold_stored(payment_id, (row[:3] for row in rows))
    events = tuple(StoredEvent(payment_id, *row[:3]) for row in rows)
    traceparent = facts.traceparent_of(rows[0][2])
    return LoadedPayment(payment, events, [row[3] for row in rows], rows[0][4], traceparent)


def fold_stored(payment_id: UUID, rows: Iterable[tuple[int, str, bytes]]) -> Payment:
    """The payment that a stream's events (version, topic, state) make; PaymentUnreadable."""
    try:
        payment = fold(fact_at(payment_id, *row) for row in rows)
    except (UndecodableEvent, UnexpectedEvent) as error:
        raise PaymentUnreadable(
            f"Payment {payment_id} has an event that this version of the service cannot read."
        ) from error
    assert payment is not None
    return payment


def fold_readable(payment_id: UUID, rows: Iterable[tuple[int, str, bytes]]) -> Payment | None:
    """The same up to the first event that cannot be read; None if that is the first of all."""
    payment: Payment | None = None
    with suppress(UndecodableEvent, UnexpectedEvent):
        for row in rows:
            payment = evolve(payment, fact_at(payment_id, *row))
    return payment
