"""The outbox for the dispatcher: claims due deliveries, records results, redrives, prunes.

Claiming and recording are functions of the database, claim_deliveries (migrations/0022) and
record_attempts (migrations/0015), called on a connection in autocommit mode, so each is one
transaction.
"""

from collections.abc import Sequence
from datetime import UTC, datetime
from typing import Any, Literal, NamedTuple
from uuid import UUID

import psycopg

from payments.database.arrays import bigints, byteas, doubles, integers, texts, uuids
from payments.order_service.responses import Said

CLAIM = """
SELECT * FROM claim_deliveries(%b, %b, %b, %b)
"""

RECORD = """
SELECT * FROM record_attempts(%b, %b, %b, %b, %b, %b, %b, %b, %b, %b, %b, %b, %b, %b)
"""

# The same, and what the response to each delivered SUCCESS said of its order. Orders that are not
# "confirmed" become suspects (fulfilments) in the same statement, so that a crash cannot separate
# the two. "already_processed" becomes "repeated" if an earlier attempt may have arrived. An order
# that is now confirmed is no suspect any more.
RECORD_AND_SUSPECT = """
WITH recorded AS MATERIALIZED (
    SELECT claim
      FROM record_attempts(%b, %b, %b, %b, %b, %b, %b, %b, %b, %b, %b, %b, %b, %b) AS held (claim)
), told AS MATERIALIZED (
    SELECT t.*
      FROM unnest(%b, %b, %b, %b, %b) AS t (claim, event_id, payment_id, order_id, said)
      JOIN recorded r ON r.claim = t.claim
), fulfilled AS (
    DELETE FROM fulfilments
     WHERE payment_id = ANY (ARRAY(SELECT t.payment_id FROM told t WHERE t.said = 'confirmed'))
       AND state = 'suspect'
), suspected AS (
    INSERT INTO fulfilments (payment_id, order_id, state, said)
    SELECT t.payment_id, t.order_id, 'suspect',
           CASE WHEN t.said = 'already_processed' AND EXISTS (
                     SELECT FROM callback_attempts a
                      WHERE a.event_id = t.event_id AND a.claim <> t.claim
                        AND a.outcome <> 'unreachable')
                THEN 'repeated' ELSE t.said END
      FROM told t WHERE t.said <> 'confirmed'
        ON CONFLICT (payment_id) DO NOTHING
)
SELECT claim FROM recorded
"""

# At the end of an outage its failures are due at once, the longest waiting first: once per lane and
# outage, however many processes notice the end. A Retry-After still applies, and so does the wait
# for an exchange that may be running.
MAKE_DUE = """
UPDATE callback_lanes l
   SET excused = true, excused_at = now(),
       next_at = greatest(l.busy_until, least(l.next_at, now(), (
           SELECT d.due_since FROM callback_deliveries d
            WHERE d.order_id = l.order_id AND d.state = 'due' ORDER BY d.position LIMIT 1)))
 WHERE l.order_id = ANY (ARRAY(
       SELECT waiting.order_id
         FROM callback_lanes waiting, make_interval(secs => %(outage_s)b) AS outage
        WHERE waiting.failing AND waiting.next_at > now() AND waiting.in_flight IS NULL
          AND waiting.away_at >= now() - outage - make_interval(secs => %(late_s)b)
          AND (waiting.excused_at IS NULL OR waiting.excused_at < now() - outage)
          AND (waiting.not_before IS NULL OR waiting.not_before <= now())
        ORDER BY waiting.next_at LIMIT %(most)b FOR UPDATE OF waiting SKIP LOCKED))
"""

# The lanes first, in the order of their ids, to avoid deadlocks. A callback that is being sent or
# may be running is not sent again at once. New lanes count as failing, so that many redriven
# callbacks do not delay new ones.
REOPEN_LANES = """
INSERT INTO callback_lanes AS l (order_id, failing)
SELECT DISTINCT order_id, true FROM callback_deliveries
 WHERE event_id = ANY (%b::uuid[]) AND state IN ('due', 'delivered', 'dead') ORDER BY order_id
    ON CONFLICT (order_id) DO UPDATE
   SET not_before = NULL,
       next_at = CASE WHEN l.in_flight IS NULL THEN greatest(clock_timestamp(), l.busy_until)
                      ELSE l.next_at END
RETURNING order_id
"""

# Except a FAILED or REFUNDED whose order is paid.
REDRIVE = """
UPDATE callback_deliveries
   SET state = 'due', attempts = 0, finished_at = NULL,
       due_since = CASE WHEN state = 'due' THEN due_since ELSE clock_timestamp() END
 WHERE event_id = ANY (%(events)b::uuid[]) AND state IN ('due', 'delivered', 'dead')
   AND (status = 'SUCCESS' OR order_id <> ALL (paid_orders(%(orders)b::uuid[])))
RETURNING event_id
"""

CLOSE_LANES = """
SELECT close_callback_lanes(%b::uuid[])
"""

# At most `most` at a time, with their attempts. A delivery that was finished while the clock was
# ahead has a time in the future; it is pruned when a later one in the log is. Not
# clock_timestamp(), which is volatile: the index could not be used, and all finished rows would be
# read.
PRUNE = """
WITH old AS (
    SELECT event_id, position FROM callback_deliveries
     WHERE state IN ('delivered', 'superseded', 'excluded')
       AND finished_at < now() - make_interval(days => %(days)b)
     ORDER BY finished_at LIMIT %(most)b
       FOR UPDATE SKIP LOCKED -- it may be redriven this moment
), ahead AS (
    SELECT event_id, position FROM callback_deliveries
     WHERE state IN ('delivered', 'superseded', 'excluded')
       AND finished_at > now() + interval '1 minute'
     ORDER BY finished_at LIMIT %(most)b
       FOR UPDATE SKIP LOCKED
), pruned AS (
    DELETE FROM callback_deliveries WHERE event_id IN (
        SELECT event_id FROM old
         UNION ALL
        SELECT event_id FROM ahead WHERE position < (SELECT max(position) FROM old))
    RETURNING event_id
), attempts AS (
    DELETE FROM callback_attempts USING pruned WHERE callback_attempts.event_id = pruned.event_id
)
SELECT count(*) FROM pruned
"""


TOLD_AT_ONCE_S = 60.0  # later than this after the capture, an earlier response may have differed
RELEASED = "released"  # the outcome of a claim that was not sent; no attempt is recorded


class ClaimedDelivery(NamedTuple):
    """A delivery that this process may send until its lease expires.

    `attempt` counts from 1. `failing`: the last attempt in its lane failed. `excused`: the end of
    an outage made it due. `due_in_s` above 0: it was claimed early, as a probe. `due_for_s`:
    seconds since it was enqueued or redriven.
    """

    claim: int
    event_id: UUID
    order_id: UUID
    payment_id: UUID
    sequence: int
    status: str
    amount_cents: int
    currency: str
    occurred_at: datetime
    attempt: int
    failing: bool
    excused: bool
    due_in_s: float
    due_for_s: float
    traceparent: str | None


class Result(NamedTuple):
    """The result of a claimed delivery. `due`: it is retried after `delay_s`, but not before
    `busy_s` and `asked_s` have passed.

    `counts`: whether it counts towards the maximum of attempts. `status` is the HTTP status, or
    None with a `reason`; `answer` the first bytes of the response body. `busy_s`: how long Order
    Service may still work on it; `asked_s`: its Retry-After. `away`: the endpoint seems to be down.
    `said`: what the response to a delivered SUCCESS says of its order.
    """

    claimed: ClaimedDelivery
    state: Literal["due", "delivered", "dead"]
    delay_s: float
    counts: bool
    seconds: float
    outcome: str
    status: int | None
    reason: str
    answer: bytes
    busy_s: float = 0.0
    asked_s: float = 0.0
    away: bool = False
    said: Said | None = None


async def claim(
    connection: psycopg.AsyncConnection[Any],
    *,
    most: int,
    failing_max: int,
    lease_s: float,
    probing: bool = False,
) -> list[ClaimedDelivery]:
    """Claims due deliveries: one of each of at most `most` orders, of which `failing_max` are
    failing. `probing`: also before they are due."""
    async with connection.cursor(binary=True) as cursor:
        await cursor.execute(CLAIM.encode(), [most, failing_max, probing, lease_s])
        return [ClaimedDelivery(*row) for row in await cursor.fetchall()]


async def record(connection: psycopg.AsyncConnection[Any], results: Sequence[Result]) -> set[int]:
    """Records the results; returns the claims that were still held.

    The leases of the others have expired: the process with the next claim records those. Recording
    twice is harmless.
    """
    claimed = [result.claimed for result in results]
    params = (
        bigints([each.claim for each in claimed]),
        uuids([each.order_id for each in claimed]),
        uuids([each.event_id for each in claimed]),
        texts([result.state for result in results]),
        doubles([result.delay_s for result in results]),
        integers([int(result.counts) for result in results]),
        doubles([result.seconds for result in results]),
        texts([result.outcome for result in results]),
        integers([result.status or 0 for result in results]),
        texts([result.reason or None for result in results]),
        byteas([result.answer for result in results]),
        doubles([result.busy_s for result in results]),
        doubles([result.asked_s for result in results]),
        integers([int(result.away) for result in results]),
    )
    told = [result for result in results if _may_change_suspects(result)]
    async with connection.cursor(binary=True) as cursor:
        if told:
            await cursor.execute(RECORD_AND_SUSPECT.encode(), (*params, *_said(told)))
        else:
            await cursor.execute(RECORD.encode(), params)
        return {held for (held,) in await cursor.fetchall()}


def _may_change_suspects(result: Result) -> bool:
    """Most orders confirm at once and cannot change suspects; RECORD costs less for them."""
    if result.said in (None, "confirmed"):
        age_s = (datetime.now(UTC) - result.claimed.occurred_at).total_seconds()
        return result.said is not None and age_s > TOLD_AT_ONCE_S
    return True


def _said(told: Sequence[Result]) -> tuple[Any, ...]:
    return (
        bigints([result.claimed.claim for result in told]),
        uuids([result.claimed.event_id for result in told]),
        uuids([result.claimed.payment_id for result in told]),
        uuids([result.claimed.order_id for result in told]),
        texts([result.said for result in told]),
    )


async def make_due(
    connection: psycopg.AsyncConnection[Any], outage_s: float, most: int, *, late_s: float = 0.0
) -> int:
    """Makes orders due that failed in an outage which began `outage_s` ago: at most `most`, those
    with the earliest retry first; returns how many. Their next attempts do not count.

    Orders with a running exchange are not changed. The database counts back `outage_s` from when
    it begins this statement. Up to `late_s` may have passed by then: failures that are so much
    older belong to the outage too.
    """
    params = {"outage_s": outage_s, "late_s": late_s, "most": most}
    cursor = await connection.execute(MAKE_DUE.encode(), params)
    return cursor.rowcount


async def redrive(
    connection: psycopg.AsyncConnection[Any], event_ids: Sequence[UUID]
) -> list[UUID]:
    """Makes deliveries due now, with their attempts reset; returns which.

    Superseded and excluded ones stay so, and a FAILED or REFUNDED whose order is paid is not sent.
    Each still waits for earlier ones in its lane, and for an exchange that may be running.
    """
    events = uuids(event_ids)
    async with connection.transaction():
        cursor = await connection.execute(REOPEN_LANES.encode(), [events])
        orders = uuids([order_id for (order_id,) in await cursor.fetchall()])
        cursor = await connection.execute(REDRIVE.encode(), {"events": events, "orders": orders})
        redriven = [event_id for (event_id,) in await cursor.fetchall()]
        await connection.execute(CLOSE_LANES.encode(), [orders])
        return redriven


async def prune(connection: psycopg.AsyncConnection[Any], older_than_days: int, most: int) -> int:
    """Deletes up to `most` deliveries that were finished `older_than_days` ago, except dead ones;
    returns how many."""
    params = {"days": older_than_days, "most": most}
    cursor = await connection.execute(PRUNE.encode(), params)
    row = await cursor.fetchone()
    assert row is not None
    return int(row[0])
