"""Callbacks, their attempts and responses: reads the tables of the callback outbox."""

from collections import defaultdict
from collections.abc import Sequence
from datetime import datetime
from typing import Annotated, Any, Literal, NamedTuple
from uuid import UUID

import msgspec
import psycopg

from payments.database.connections import Database
from payments.queries.fulfilments import FulfilmentView, fulfilment_of
from payments.queries.lookups import PaymentLookups
from payments.queries.payments import get_payment

# With the lane's next_at for due deliveries, and the last attempt.
_DELIVERIES = """
SELECT d.event_id, d.order_id, d.payment_id, coalesce(d.status, 'ACTION_REQUIRED'), d.sequence,
       d.state, d.attempts, d.enqueued_at, d.finished_at,
       CASE WHEN d.state = 'due' THEN (
            SELECT l.next_at FROM callback_lanes l WHERE l.order_id = d.order_id) END,
       (SELECT concat_ws(' ', a.outcome, a.status, a.reason) FROM callback_attempts a
         WHERE a.event_id = d.event_id ORDER BY a.claim DESC LIMIT 1)
  FROM callback_deliveries d
"""

NEWEST = _DELIVERIES + " ORDER BY d.position DESC LIMIT %(limit)b"
DUE = _DELIVERIES + " WHERE d.state = 'due' ORDER BY d.due_since LIMIT %(limit)b"
DEAD = _DELIVERIES + " WHERE d.state = 'dead' ORDER BY d.position LIMIT %(limit)b"
OF_ORDER = _DELIVERIES + " WHERE d.order_id = %(id)b ORDER BY d.position DESC LIMIT %(limit)b"
OF_PAYMENT = _DELIVERIES + " WHERE d.payment_id = %(id)b ORDER BY d.sequence LIMIT %(limit)b"
BY_EVENT = _DELIVERIES + " WHERE d.event_id = %(id)b LIMIT %(limit)b"

ATTEMPTS = """
SELECT event_id, started_at, seconds, outcome, status, reason, answer
  FROM callback_attempts WHERE event_id = ANY (%b::uuid[]) ORDER BY event_id, claim
"""

IDS_IN_STATE = """
SELECT event_id FROM callback_deliveries WHERE state = %b ORDER BY position
"""

IDS_SINCE = """
SELECT event_id FROM callback_deliveries
 WHERE state IN ('due', 'delivered', 'dead') AND occurred_at >= %b
   AND (status IN ('SUCCESS', 'REFUNDED') OR status = 'FAILED' AND %b) ORDER BY position
"""

BACKLOG = """
SELECT (SELECT count(*) FROM callback_deliveries WHERE state = 'due'),
       (SELECT count(*) FROM callback_deliveries WHERE state = 'dead'),
       (SELECT greatest(0, extract(epoch FROM clock_timestamp() - due_since))::float8
          FROM callback_deliveries WHERE state = 'due' ORDER BY due_since LIMIT 1)
"""

OLDEST_AGE = """
SELECT greatest(0, extract(epoch FROM clock_timestamp() - due_since))::float8
  FROM callback_deliveries WHERE state = 'due' ORDER BY due_since LIMIT 1
"""

CallbackStatus = Literal["SUCCESS", "FAILED", "REFUNDED", "ACTION_REQUIRED"]


class Delivery(NamedTuple):
    """One callback. `state`: due, delivered, dead, superseded or excluded: see migrations/0003.

    `attempts` are those that count towards the maximum. `next_at` is when its order's lane may be
    claimed next; None if it is not due. `last_attempt` is for people.
    """

    event_id: UUID
    order_id: UUID
    payment_id: UUID
    status: CallbackStatus
    sequence: int
    state: Literal["due", "delivered", "dead", "superseded", "excluded"]
    attempts: int
    enqueued_at: datetime
    finished_at: datetime | None
    next_at: datetime | None
    last_attempt: str | None


class Attempt(NamedTuple):
    """One exchange with Order Service; `answer` is the beginning of its response body."""

    event_id: UUID
    started_at: datetime
    seconds: float | None
    outcome: str
    status: int | None
    reason: str | None
    answer: bytes | None


class Backlog(NamedTuple):
    """`oldest_age_s` is 0 if nothing is due."""

    due: int
    dead: int
    oldest_age_s: float


Time = Annotated[datetime, msgspec.Meta(tz=True)]


class AttemptView(msgspec.Struct, frozen=True, kw_only=True):
    """One exchange with Order Service. `outcome`: delivered, gone (410), http_error, unreachable
    (nothing was sent), timeout, end_unknown (sent, but the connection broke), or interrupted (the
    process stopped first). `status` is the HTTP status."""

    started_at: Time
    seconds: float | None
    outcome: str
    status: int | None
    reason: str | None
    answer: str | None


class CallbackView(msgspec.Struct, frozen=True, kw_only=True):
    """An outcome for Order Service. `next_at` is the time of the next attempt for its order."""

    event_id: UUID
    order_id: UUID
    status: CallbackStatus
    sequence: int
    state: Literal["due", "delivered", "dead", "superseded", "excluded"]
    enqueued_at: Time
    finished_at: Time | None
    next_at: Time | None
    attempts: list[AttemptView]


class PaymentCallbacks(msgspec.Struct, frozen=True):
    """The callbacks of a payment, in order. `fulfilment` says why its order may not have been
    fulfilled; null if nothing indicates that."""

    callbacks: list[CallbackView]
    fulfilment: FulfilmentView | None


async def get_callbacks(
    database: Database, lookups: PaymentLookups, payment_id: UUID, client: str | None
) -> PaymentCallbacks:
    """The callbacks of the payment. `client` and errors are those of get_payment."""
    payment = await get_payment(database, lookups, payment_id, client)
    deliveries = await deliveries_of_payment(database, payment.id)
    made: dict[UUID, list[AttemptView]] = defaultdict(list)
    for attempt in await attempts(database, [each.event_id for each in deliveries]):
        made[attempt.event_id].append(
            AttemptView(
                started_at=attempt.started_at,
                seconds=attempt.seconds,
                outcome=attempt.outcome,
                status=attempt.status,
                reason=attempt.reason,
                answer=text_of(attempt.answer),
            )
        )
    return PaymentCallbacks(
        [
            CallbackView(
                event_id=each.event_id,
                order_id=each.order_id,
                status=each.status,
                sequence=each.sequence,
                state=each.state,
                enqueued_at=each.enqueued_at,
                finished_at=each.finished_at,
                next_at=each.next_at,
                attempts=made[each.event_id],
            )
            for each in deliveries
        ],
        await fulfilment_of(database, payment_id),
    )


def text_of(answer: bytes | None) -> str | None:
    """A response body as text, with replacement characters for invalid UTF-8."""
    return answer.decode(errors="replace") if answer else None


async def newest_deliveries(database: Database, limit: int) -> list[Delivery]:
    return await _deliveries(database, NEWEST, limit)


async def due_deliveries(database: Database, limit: int) -> list[Delivery]:
    """The longest waiting first."""
    return await _deliveries(database, DUE, limit)


async def dead_deliveries(database: Database, limit: int) -> list[Delivery]:
    """In the order of the log."""
    return await _deliveries(database, DEAD, limit)


async def deliveries_of_order(database: Database, order_id: UUID, limit: int) -> list[Delivery]:
    return await _deliveries(database, OF_ORDER, limit, order_id)


async def deliveries_of_payment(database: Database, payment_id: UUID) -> list[Delivery]:
    """Ordered by sequence; a payment has at most three outcomes, and one action."""
    return await _deliveries(database, OF_PAYMENT, 100, payment_id)


async def delivery(database: Database, event_id: UUID) -> Delivery | None:
    return next(iter(await _deliveries(database, BY_EVENT, 1, event_id)), None)


async def attempts(database: Database, event_ids: Sequence[UUID]) -> list[Attempt]:
    """All recorded attempts, grouped by delivery and in order."""
    return [Attempt(*row) for row in await database.fetch(ATTEMPTS, [list(event_ids)])]


async def ids_in_state(
    connection: psycopg.AsyncConnection[Any], state: Literal["due", "dead"]
) -> list[UUID]:
    """In the order of the log."""
    cursor = await connection.execute(IDS_IN_STATE.encode(), [state])
    return [event_id for (event_id,) in await cursor.fetchall()]


async def ids_since(
    connection: psycopg.AsyncConnection[Any], since: datetime, *, failed: bool
) -> list[UUID]:
    """Deliveries that may be sent again, of events since then, in the order of the log. `failed`:
    includes FAILED ones."""
    cursor = await connection.execute(IDS_SINCE.encode(), [since, failed])
    return [event_id for (event_id,) in await cursor.fetchall()]


async def backlog(database: Database) -> Backlog:
    ((due, dead, oldest_age_s),) = await database.fetch(BACKLOG)
    return Backlog(due=due, dead=dead, oldest_age_s=oldest_age_s or 0.0)


async def oldest_age_s(database: Database, timeout_s: float) -> float:
    """For how long the oldest due callback has been due; 0 if none is."""
    rows = await database.fetch(OLDEST_AGE, timeout_s=timeout_s)
    return float(rows[0][0]) if rows else 0.0


async def _deliveries(
    database: Database, query: str, limit: int, id: UUID | None = None
) -> list[Delivery]:
    params = {"limit": limit} if id is None else {"limit": limit, "id": id}
    return [Delivery(*row) for row in await database.fetch(query, params)]
