"""The outbox as the dispatcher uses it: claim what is due, record what came of it, and the rest.

The two statements that matter are functions of the database, claim_deliveries and
record_attempts in migrations/0015, called on a connection in autocommit mode, a transaction each.
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

# The same, and what the responses to each SUCCESS said of its order, if it was delivered: what does
# not say "confirmed" is watched from now on (fulfilments), in one statement, so that no crash comes
# between. "Already processed" says more in response to the first attempt that may have arrived. An
# order that is told again, and confirmed, is no suspect any more.
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

# At the end of an outage nobody sits out a pause that was made for it; who has waited longest is
# first. Once per lane and outage, whichever processes notice its end. What was asked for is waited
# for, and what may be running is not repeated.
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
          AND waiting.away_at >= now() - outage
          AND (waiting.excused_at IS NULL OR waiting.excused_at < now() - outage)
          AND (waiting.not_before IS NULL OR waiting.not_before <= now())
        ORDER BY waiting.next_at LIMIT %(most)b FOR UPDATE OF waiting SKIP LOCKED))
"""

# The lanes first, in the order of their ids: what is being sent, or may be running, is left alone.
# New ones count as failing: much that is sent again does not keep new callbacks waiting.
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

# But for a FAILED or REFUNDED whose order is paid.
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

# Some at a time. The attempts of what is kept are kept as well. What was finished while the clock
# was ahead has a time that is yet to come, and nobody knows the right one: it goes with what comes
# behind it in the log. Not clock_timestamp(): the index cannot be searched for what changes
# meanwhile, and all that is finished would be read.
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


TOLD_AT_ONCE_S = 60.0  # who confirms later than this after the capture may have been told before
RELEASED = "released"  # the outcome of what was claimed and not sent; no attempt is noted


class ClaimedDelivery(NamedTuple):
    """A delivery that this process may send until its lease is over.

    `attempt` is counted from 1. `failing`: it, or what stood before it, was tried in vain.
    `excused`: the end of an outage made it due. `due_in_s` above 0: it was claimed before its time,
    as a probe. `due_for_s`: since it was enqueued or redriven.
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
    """What came of a claimed delivery. For `due`: it is tried again after `delay_s`, but not before
    `busy_s` and `asked_s` are over.

    `counts`: whether it is one of the attempts after which a delivery is given up. `status` is that
    of HTTP, or None and a `reason`; `answer` the first bytes of the answer. For `busy_s` more
    seconds it may be running at Order Service, which asked to be left alone for `asked_s`. `away`:
    it spoke against the endpoint as a whole. `said`: what the response to a delivered SUCCESS says
    of its order.
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
    """What may be sent now: one delivery each of at most so many orders."""
    async with connection.cursor(binary=True) as cursor:
        await cursor.execute(CLAIM.encode(), [most, failing_max, probing, lease_s])
        return [ClaimedDelivery(*row) for row in await cursor.fetchall()]


async def record(connection: psycopg.AsyncConnection[Any], results: Sequence[Result]) -> set[int]:
    """Records the results; returns the claims that were still held.

    Of the others the lease was over: whoever claimed them next decides. Doing it twice is harmless.
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
    """All others are recorded by the statement that takes less: most orders confirm at once."""
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


async def make_due(connection: psycopg.AsyncConnection[Any], outage_s: float, most: int) -> int:
    """Ends the pauses of so many orders that failed in an outage which began `outage_s` ago, those
    that end first; returns of how many. Their next attempts do not count.

    What is being sent is left alone.
    """
    params = {"outage_s": outage_s, "most": most}
    cursor = await connection.execute(MAKE_DUE.encode(), params)
    return cursor.rowcount


async def redrive(
    connection: psycopg.AsyncConnection[Any], event_ids: Sequence[UUID]
) -> list[UUID]:
    """Makes deliveries due, now and with all their attempts before them; returns which.

    What is superseded or excluded stays so, and a FAILED or REFUNDED whose order is paid is not
    sent. In its order's lane each waits for what is due before it, and for what may be running.
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
    """Forgets what was finished so long ago, but for what is dead; returns how many."""
    params = {"days": older_than_days, "most": most}
    cursor = await connection.execute(PRUNE.encode(), params)
    row = await cursor.fetchone()
    assert row is not None
    return int(row[0])
