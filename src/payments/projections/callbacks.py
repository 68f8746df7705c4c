"""The callback outbox: one row for each outcome of a payment and, if enabled, for an action that
the customer has to take.

Written in the transaction of the follower's position, so no outcome is skipped or repeated. An
order with due callbacks has a lane: see callback_lanes in migrations/0003. A paid order receives
neither a FAILED nor the REFUNDED of another payment: see paid_orders in migrations/0010.
"""

from collections.abc import Collection, Sequence
from typing import Any, NamedTuple
from uuid import UUID

import psycopg

from payments.database.arrays import bigints, integers, texts, timestamps, uuids, words
from payments.database.connections import Database
from payments.events.facts import (
    FACTS,
    PaymentActionRequired,
    PaymentCharged,
    PaymentFailed,
    PaymentRefunded,
    UndecodableEvent,
)
from payments.events.store import LOAD_STREAMS, READ_LOG, LogEntry, fact_of, read_events
from payments.payment.identity import is_of_unfulfilled, unfulfilled_refund_id
from payments.setting_values import ACTION_REQUIRED

BACKFILL_EVENTS = 1000  # events in one transaction

# The follower begins at the end of the log: no callbacks for events from before it existed.
BEGIN_AT_THE_END = """
INSERT INTO followers (name, position)
SELECT 'callbacks', coalesce(max(notification_id), 0) FROM payment_events
    ON CONFLICT (name) DO NOTHING
RETURNING position
"""

# Locks the lanes first, in the order of their ids, to avoid deadlocks; new turns are in log order.
# A SUCCESS does not wait for the retry of a FAILED or REFUNDED that it supersedes, but for an
# exchange that may be running; every other lane keeps its pause.
OPEN_LANES = """
INSERT INTO callback_lanes AS l (order_id, next_at, failing)
SELECT id, now() + place * interval '1 microsecond', %(late)b
  FROM unnest(%(orders)b::uuid[]) WITH ORDINALITY AS new (id, place) ORDER BY id
    ON CONFLICT (order_id) DO UPDATE
   SET (next_at, not_before, failing) = (
       SELECT CASE WHEN freed THEN greatest(least(l.next_at, clock_timestamp()), l.busy_until)
                   ELSE l.next_at END,
              CASE WHEN NOT freed THEN l.not_before END,
              l.failing AND NOT freed
         FROM (SELECT l.in_flight IS NULL AND l.order_id = ANY (%(paid)b::uuid[])
                  AND coalesce((SELECT d.status IS DISTINCT FROM 'SUCCESS'
                                  FROM callback_deliveries d
                                 WHERE d.order_id = l.order_id AND d.state = 'due'
                                 ORDER BY d.position LIMIT 1), false)) AS lane (freed))
"""

POSITION = """
SELECT position FROM followers WHERE name = 'callbacks'
"""

ENQUEUE = """
INSERT INTO callback_deliveries (event_id, position, order_id, payment_id, sequence, status,
                                 amount_cents, currency, occurred_at, state, traceparent,
                                 finished_at)
SELECT event_id, position, order_id, payment_id, sequence, nullif(status, 'ACTION_REQUIRED'),
       amount_cents, currency, occurred_at, state, traceparent,
       CASE WHEN state <> 'due' THEN clock_timestamp() END
  FROM unnest(%b::uuid[], %b::bigint[], %b::uuid[], %b::uuid[], %b::bigint[], %b::text[],
              %b::integer[], %b::text[], %b::timestamptz[], %b::text[], %b::text[])
    AS new (event_id, position, order_id, payment_id, sequence, status, amount_cents, currency,
            occurred_at, state, traceparent)
    ON CONFLICT (event_id) DO NOTHING
"""

# Orders without a due callback have no lane.
SUPERSEDE = """
SELECT supersede_callbacks(%(orders)b::uuid[]), close_callback_lanes(%(orders)b::uuid[])
"""

Outcome = PaymentActionRequired | PaymentCharged | PaymentFailed | PaymentRefunded


class _Owed(NamedTuple):
    position: int
    status: str
    outcome: Outcome


async def begin_at_the_end(database: Database) -> None:
    """Creates the follower's position if it has none; raises DatabaseUnavailable."""
    await database.fetch(BEGIN_AT_THE_END)


class CallbacksProjection:
    """`statuses`: the outcomes that are sent; others are `excluded`.

    Also excluded are imported outcomes, which the earlier service sent, and a REFUNDED that the
    service gave back by itself: its order has failed, and its seats may belong to another order
    now. An ACTION_REQUIRED that is not sent has no row.
    """

    name = "callbacks"

    def __init__(self, statuses: Collection[str]) -> None:
        self._statuses = frozenset(statuses)

    async def apply(
        self, connection: psycopg.AsyncConnection[Any], events: Sequence[LogEntry]
    ) -> None:
        """Raises UndecodableEvent for the whole batch: the event may be an outcome."""
        await self.enqueue(connection, events)

    async def enqueue(
        self,
        connection: psycopg.AsyncConnection[Any],
        events: Sequence[LogEntry],
        *,
        late: bool = False,
    ) -> int:
        """Adds the callbacks of these events that are missing; returns how many.

        `late`: they may be many, and must not delay new callbacks.
        """
        owed = [
            found
            for event in events
            if (found := _owed(event)) is not None
            and (found.status != ACTION_REQUIRED or ACTION_REQUIRED in self._statuses)
        ]
        if not owed:
            return 0
        # Also orders without a new row: the outcome may supersede callbacks that are due already.
        orders = uuids(list(dict.fromkeys(each.outcome.merchant_order_id for each in owed)))
        refunded = {each.outcome.payment_id for each in owed if each.status == "REFUNDED"}
        paid = {
            each.outcome.merchant_order_id
            for each in owed
            if each.status == "SUCCESS" and each.outcome.payment_id not in refunded
        }
        unfulfilled = await _unfulfilled(connection, owed)
        async with connection.cursor(binary=True) as cursor:
            lanes = {"orders": orders, "paid": uuids(list(paid)), "late": late}
            await cursor.execute(OPEN_LANES.encode(), lanes)
            await cursor.execute(ENQUEUE.encode(), self._params(owed, unfulfilled))
            enqueued = cursor.rowcount
            await cursor.execute(SUPERSEDE.encode(), {"orders": orders})
            return enqueued

    async def exclude(
        self, connection: psycopg.AsyncConnection[Any], events: Sequence[LogEntry]
    ) -> None:
        """Adds the outcomes of imported events as excluded. None is due, so they need no lane."""
        owed = [found for event in events if (found := _owed(event)) is not None]
        if owed:
            async with connection.cursor(binary=True) as cursor:
                await cursor.execute(ENQUEUE.encode(), self._params(owed, set()))

    def _params(self, owed: list[_Owed], unfulfilled: set[UUID]) -> tuple[Any, ...]:
        outcomes = [each.outcome for each in owed]
        return (
            uuids([outcome.event_id for outcome in outcomes]),
            bigints([each.position for each in owed]),
            uuids([outcome.merchant_order_id for outcome in outcomes]),
            uuids([outcome.payment_id for outcome in outcomes]),
            bigints([outcome.version for outcome in outcomes]),
            words([each.status for each in owed]),
            integers([_amount_cents(outcome) for outcome in outcomes]),
            words([outcome.currency for outcome in outcomes]),
            timestamps([outcome.occurred_at for outcome in outcomes]),
            words([self._state(each, unfulfilled) for each in owed]),
            texts([outcome.traceparent for outcome in outcomes]),
        )

    def _state(self, owed: _Owed, unfulfilled: set[UUID]) -> str:
        given_back = owed.status == "REFUNDED" and owed.outcome.payment_id in unfulfilled
        is_told = owed.outcome.imported is not True and not given_back
        return "due" if is_told and owed.status in self._statuses else "excluded"


class Backfilled(NamedTuple):
    """How many callbacks were enqueued, and the positions of unreadable events."""

    enqueued: int
    unreadable: list[int]


async def backfill(
    connection: psycopg.AsyncConnection[Any], projection: CallbacksProjection, first: int
) -> Backfilled:
    """Enqueues missing callbacks from the position `first` up to the follower's position.

    That position does not move; callbacks that the follower enqueues meanwhile are not repeated.
    """
    cursor = await connection.execute(POSITION)
    row = await cursor.fetchone()
    last = int(row[0]) if row else 0
    enqueued, unreadable = 0, []
    while first <= last:
        most = min(BACKFILL_EVENTS, last - first + 1)
        events = await read_events(connection, READ_LOG, [first - 1, most])
        if not events:
            break
        for event in events:
            try:
                _owed(event)
            except UndecodableEvent:
                unreadable.append(event.position)
        async with connection.transaction():
            sound = [event for event in events if event.position not in unreadable]
            enqueued += await projection.enqueue(connection, sound, late=True)
        first = events[-1].position + 1
    return Backfilled(enqueued, unreadable)


def _owed(event: LogEntry) -> _Owed | None:
    """The outcome to send for an event; most events have none."""
    match event.topic:
        case PaymentCharged.TOPIC:
            status = "SUCCESS"
        case PaymentFailed.TOPIC:
            status = "FAILED"
        case PaymentRefunded.TOPIC:
            status = "REFUNDED"
        case PaymentActionRequired.TOPIC:
            status = ACTION_REQUIRED
        case topic if topic in FACTS:
            return None
        case topic:
            raise UndecodableEvent(f"unknown topic {topic!r}")
    fact = fact_of(event)
    assert isinstance(fact, Outcome)
    if isinstance(fact, PaymentRefunded) and fact.refunded_cents < fact.captured_cents:
        return None  # a partial refund: the payment stays SUCCESS
    return _Owed(event.position, status, fact)


async def _unfulfilled(
    connection: psycopg.AsyncConnection[Any], owed: Sequence[_Owed]
) -> set[UUID]:
    """The REFUNDED payments that the service gave back by itself: its refund took the whole rest,
    and was the last, or was followed by a refund that a client had requested before."""
    found, others = set[UUID](), list[UUID]()
    for fact in (each.outcome for each in owed):
        if isinstance(fact, PaymentRefunded):
            if is_of_unfulfilled(fact.payment_id, fact.refund_id):
                found.add(fact.payment_id)
            elif fact.amount_cents < fact.captured_cents:
                others.append(fact.payment_id)
    if others:
        async with connection.cursor(binary=True) as cursor:
            await cursor.execute(LOAD_STREAMS.encode(), [uuids(others)])
            # Not decoded: unreadable events are reported when they are applied.
            for id, _, topic, state in await cursor.fetchall():
                payment_id = UUID(bytes=id)
                ours = str(unfulfilled_refund_id(payment_id)).encode()
                if topic == PaymentRefunded.TOPIC and ours in state:
                    found.add(payment_id)
    return found


def _amount_cents(outcome: Outcome) -> int:
    """The amount of the payment, not of the event."""
    return outcome.captured_cents if isinstance(outcome, PaymentRefunded) else outcome.amount_cents
