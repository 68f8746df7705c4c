"""The SQL of the table `fulfilments`, except the statement that records a delivery together with
its suspect: that is in callbacks/outbox.py.

Any number of processes share the work. A claim sets a new number in its row; a process whose number
does not match any more is too late, and changes nothing.
"""

from collections.abc import Sequence
from typing import Any, Literal, NamedTuple
from uuid import UUID

from payments.database.arrays import uuids
from payments.database.connections import Database
from payments.events.store import CAPTURE_POSITIONS

State = Literal["suspect", "unfulfilled", "paid_twice"]

CONFIRMED_AFTER_S = 900.0  # between the first reading that showed an order as failed and the next
AGAIN_S = 3600.0  # between readings of rows that are known to be unfulfilled or paid twice
UNKNOWN_MIN_S, UNKNOWN_MAX_S = 2.0, 3600.0  # doubling, while the status is not known

OF_ORDER_MAX = 1000  # payments of one order that are read

# Adds suspects: other payments of a checked order, or those found by `payments reconcile orders`.
# Existing rows are not changed.
ADD = """
INSERT INTO fulfilments (payment_id, order_id, state, said)
SELECT payment_id, order_id, 'suspect', 'not_asked'
  FROM unnest(%(payments)b::uuid[], %(orders)b::uuid[]) AS new (payment_id, order_id)
 WHERE %(claim)b::bigint IS NULL
    OR EXISTS (SELECT FROM fulfilments f
                WHERE f.payment_id = %(payment_id)b::uuid AND f.claim = %(claim)b::bigint)
 ORDER BY payment_id
    ON CONFLICT (payment_id) DO NOTHING
RETURNING payment_id
"""

# Claims due rows, oldest first, until the lease expires. Rows that are due later than the longest
# pause are claimed too: they were written while the clock was ahead. now() instead of
# clock_timestamp(), which is volatile: with that the index could not be used.
CLAIM = """
WITH due AS (
    SELECT payment_id FROM fulfilments
     WHERE state <> 'given_back' AND next_at <= now()
     ORDER BY next_at LIMIT %(most)b
       FOR UPDATE SKIP LOCKED
), too_late AS (
    SELECT payment_id FROM fulfilments
     WHERE state <> 'given_back' AND next_at > now() + make_interval(secs => 2 * %(again_s)b)
     ORDER BY next_at LIMIT %(most)b
       FOR UPDATE SKIP LOCKED
)
UPDATE fulfilments f
   SET claim = nextval('fulfilment_claims'),
       next_at = clock_timestamp() + make_interval(secs => %(lease_s)b)
  FROM (SELECT payment_id FROM due UNION ALL SELECT payment_id FROM too_late
         LIMIT %(most)b) AS claimed
 WHERE f.payment_id = claimed.payment_id
RETURNING f.payment_id, f.order_id, f.state, f.claim
"""

# The captured payments of an order, and whether they are not refunded: the first ones, and the one
# that is checked. Both the outbox and `payments` are read, as in paid_orders (migrations/0010):
# either of their followers may be behind, and the outbox is pruned.
CAPTURED_FOR = """
SELECT known.payment_id, bool_and(known.status = 'SUCCESS')
  FROM ((SELECT d.payment_id, d.status FROM callback_deliveries d
          WHERE d.order_id = %(order_id)b AND d.status <> 'FAILED'
          ORDER BY d.position LIMIT %(most)b)
         UNION ALL
        (SELECT p.id, p.status FROM payments p
          WHERE p.merchant_order_id = %(order_id)b AND p.status IN ('SUCCESS', 'REFUNDED')
          ORDER BY p.created_at, p.id LIMIT %(most)b)
         UNION ALL
        SELECT d.payment_id, d.status FROM callback_deliveries d
         WHERE d.payment_id = %(payment_id)b AND d.status <> 'FAILED'
         UNION ALL
        SELECT p.id, p.status FROM payments p
         WHERE p.id = %(payment_id)b AND p.status IN ('SUCCESS', 'REFUNDED')
       ) AS known (payment_id, status)
 GROUP BY known.payment_id
"""

# The status is not known. A response with another status makes the payment a suspect again; one
# without a status leaves the state.
RECORD_UNKNOWN = """
UPDATE fulfilments
   SET state = CASE WHEN %(problem)b::text IS NULL THEN 'suspect' ELSE state END,
       order_status = coalesce(%(order_status)b::text, order_status), problem = %(problem)b,
       checked_at = clock_timestamp(), failed_since = NULL, attempts = attempts + 1, claim = NULL,
       next_at = clock_timestamp() + make_interval(
           secs => least(%(max_s)b::float8, %(min_s)b::float8 * 2 ^ least(attempts, 20)))
 WHERE payment_id = %(payment_id)b AND claim = %(claim)b
RETURNING payment_id
"""

# A time in the future was written while the clock was ahead: the series restarts. The second
# reading comes CONFIRMED_AFTER_S after the first. A process that may give the money back keeps the
# claim.
RECORD_FAILED = """
UPDATE fulfilments f
   SET state = 'unfulfilled', order_status = %(order_status)b, problem = NULL,
       checked_at = clock_timestamp(), failed_since = series.began, attempts = attempts + 1,
       claim = CASE WHEN %(may_give_back)b AND series.is_over THEN f.claim END,
       next_at = CASE WHEN series.is_over
                      THEN clock_timestamp() + make_interval(secs => %(again_s)b)
                      ELSE series.began + make_interval(secs => %(confirmed_after_s)b) END
  FROM (SELECT payment_id, began,
               began <= clock_timestamp() - make_interval(secs => %(confirmed_after_s)b) AS is_over
          FROM (SELECT payment_id, least(failed_since, clock_timestamp()) AS began
                  FROM fulfilments WHERE payment_id = %(payment_id)b) AS read) AS series
 WHERE f.payment_id = series.payment_id AND f.claim = %(claim)b
RETURNING series.is_over
"""

RECORD_PAID_TWICE = """
UPDATE fulfilments
   SET state = 'paid_twice', order_status = %(order_status)b, problem = NULL,
       checked_at = clock_timestamp(), failed_since = NULL, attempts = attempts + 1, claim = NULL,
       next_at = clock_timestamp() + make_interval(secs => %(again_s)b)
 WHERE payment_id = %(payment_id)b AND claim = %(claim)b
RETURNING payment_id
"""

# The order is fulfilled, or the payment refunded.
REMOVE = """
DELETE FROM fulfilments WHERE payment_id = %(payment_id)b AND claim = %(claim)b
RETURNING payment_id
"""

GIVEN_BACK = """
UPDATE fulfilments SET state = 'given_back', given_back_at = clock_timestamp(), claim = NULL
 WHERE payment_id = %(payment_id)b AND claim = %(claim)b
RETURNING payment_id
"""

RELEASE = """
UPDATE fulfilments SET claim = NULL
 WHERE payment_id = %(payment_id)b AND claim = %(claim)b
RETURNING payment_id
"""

# Pages through all rows. Deletes those whose payment is refunded, except claimed ones: that process
# may be giving the money back. A row that was given back becomes unfulfilled again if the provider
# refused the refund. `payments` may be behind for a while.
SWEEP = """
WITH looked_at AS (
    SELECT payment_id FROM fulfilments WHERE payment_id > %(after)b
     ORDER BY payment_id LIMIT %(most)b
), gone AS (
    DELETE FROM fulfilments f USING looked_at l, payments p
     WHERE f.payment_id = l.payment_id AND p.id = l.payment_id AND p.status = 'REFUNDED'
       AND f.state <> 'given_back' AND (f.claim IS NULL OR f.next_at <= now())
), refused AS (
    UPDATE fulfilments f SET state = 'unfulfilled', given_back_at = NULL, next_at = now()
      FROM looked_at l, payments p
     WHERE f.payment_id = l.payment_id AND p.id = l.payment_id AND p.status = 'SUCCESS'
       AND f.state = 'given_back' AND f.given_back_at < now() - make_interval(secs => %(behind_s)b)
       AND NOT EXISTS (SELECT FROM refunds r
                        WHERE r.payment_id = f.payment_id AND r.status = 'PENDING')
)
SELECT payment_id FROM looked_at ORDER BY payment_id OFFSET %(most)b - 1
"""

# Old rows: those given back, and those never checked because ORDER_STATUS_URL was not set. They are
# kept as long as the callbacks.
PRUNE = """
WITH given_back AS (
    SELECT payment_id FROM fulfilments
     WHERE state = 'given_back' AND given_back_at < now() - make_interval(days => %(days)b)
     ORDER BY given_back_at LIMIT %(most)b
       FOR UPDATE SKIP LOCKED
), never_asked AS (
    SELECT payment_id FROM fulfilments
     WHERE found_at < now() - make_interval(days => %(days)b)
       AND state = 'suspect' AND said = 'nothing' AND checked_at IS NULL
     ORDER BY found_at LIMIT %(most)b
       FOR UPDATE SKIP LOCKED
)
DELETE FROM fulfilments WHERE payment_id IN (
    SELECT payment_id FROM given_back UNION ALL SELECT payment_id FROM never_asked)
RETURNING payment_id
"""

BEHIND_S = 60.0  # the read models may lag so far, and then lack the refund
FIRST = UUID(int=0)


class ClaimedFulfilment(NamedTuple):
    """A payment that this process may check until its lease expires."""

    payment_id: UUID
    order_id: UUID
    state: State
    claim: int


class Captured(NamedTuple):
    """The captured payments of an order: those not refunded, in the order of their captures, and
    those refunded."""

    standing: list[UUID]
    refunded: list[UUID]

    def paid_for_nothing(self, verdict: Literal["confirmed", "failed"]) -> list[UUID]:
        """The payments for which the order was not fulfilled: of a confirmed order all but the
        first, of a failed one all."""
        return self.standing[1:] if verdict == "confirmed" else self.standing


async def add(database: Database, payments: Sequence[tuple[UUID, UUID]]) -> int:
    """Adds suspects, as (payment, order); returns how many are new."""
    return len(await _add(database, payments, None))


async def add_beside(
    database: Database, claimed: ClaimedFulfilment, payment_ids: Sequence[UUID]
) -> None:
    """Adds other payments of the same order as suspects, if the claim is still held."""
    await _add(database, [(each, claimed.order_id) for each in payment_ids], claimed)


async def _add(
    database: Database, payments: Sequence[tuple[UUID, UUID]], claimed: ClaimedFulfilment | None
) -> list[tuple[Any, ...]]:
    params = {
        "payments": uuids([payment_id for payment_id, _ in payments]),
        "orders": uuids([order_id for _, order_id in payments]),
        "payment_id": claimed and claimed.payment_id,
        "claim": claimed and claimed.claim,
    }
    return await database.fetch(ADD, params)


async def claim(database: Database, most: int, lease_s: float) -> list[ClaimedFulfilment]:
    """Claims at most `most` due rows."""
    params = {"most": most, "lease_s": lease_s, "again_s": AGAIN_S}
    return [ClaimedFulfilment(*row) for row in await database.fetch(CLAIM, params)]


async def captured_for(
    database: Database, order_id: UUID, payment_id: UUID | None = None
) -> Captured:
    """At most OF_ORDER_MAX payments of the order, the first ones, and `payment_id`."""
    params = {"order_id": order_id, "payment_id": payment_id, "most": OF_ORDER_MAX}
    rows = await database.fetch(CAPTURED_FOR, params)
    standing = [payment_id for payment_id, stands in rows if stands]
    if len(standing) > 1:
        found = await database.fetch(CAPTURE_POSITIONS, {"payment_ids": uuids(standing)})
        positions = dict(found)
        standing.sort(key=lambda payment_id: (positions.get(payment_id) or 2**63, payment_id))
    return Captured(standing, [payment_id for payment_id, stands in rows if not stands])


async def record_unknown(
    database: Database, claimed: ClaimedFulfilment, order_status: str | None, problem: str | None
) -> bool:
    """False, here and below: the claim is no longer held, and nothing was changed."""
    return await _change(
        *(database, RECORD_UNKNOWN, claimed),
        order_status=order_status,
        problem=problem,
        min_s=UNKNOWN_MIN_S,
        max_s=UNKNOWN_MAX_S,
    )


async def record_failed(
    database: Database, claimed: ClaimedFulfilment, order_status: str, *, may_give_back: bool
) -> bool | None:
    """Whether an unbroken series of readings that show the order as failed has lasted for
    CONFIRMED_AFTER_S; then, with `may_give_back`, the claim is kept. None: the claim is no longer
    held."""
    params = {
        **_key(claimed),
        "order_status": order_status,
        "may_give_back": may_give_back,
        "again_s": AGAIN_S,
        "confirmed_after_s": CONFIRMED_AFTER_S,
    }
    rows = await database.fetch(RECORD_FAILED, params)
    return bool(rows[0][0]) if rows else None


async def record_paid_twice(
    database: Database, claimed: ClaimedFulfilment, order_status: str
) -> bool:
    change = RECORD_PAID_TWICE
    return await _change(database, change, claimed, order_status=order_status, again_s=AGAIN_S)


async def remove(database: Database, claimed: ClaimedFulfilment) -> bool:
    return await _change(database, REMOVE, claimed)


async def note_given_back(database: Database, claimed: ClaimedFulfilment) -> bool:
    return await _change(database, GIVEN_BACK, claimed)


async def release(database: Database, claimed: ClaimedFulfilment) -> bool:
    """Ends the claim; the row is checked again when it is due."""
    return await _change(database, RELEASE, claimed)


async def _change(
    database: Database, change: str, claimed: ClaimedFulfilment, **values: Any
) -> bool:
    return bool(await database.fetch(change, {**_key(claimed), **values}))


def _key(claimed: ClaimedFulfilment) -> dict[str, Any]:
    return {"payment_id": claimed.payment_id, "claim": claimed.claim}


async def sweep(database: Database, after: UUID, most: int) -> UUID:
    """Removes refunded payments among the next `most` rows after `after`, and reopens those that
    the provider refused to give back. Returns the last row read, or FIRST at the end."""
    params = {"after": after, "most": most, "behind_s": BEHIND_S}
    rows = await database.fetch(SWEEP, params)
    return rows[0][0] if rows else FIRST


async def prune(database: Database, older_than_days: int, most: int) -> int:
    """Deletes up to `most` rows of each kind that were given back, or found and never checked,
    `older_than_days` ago; returns how many."""
    return len(await database.fetch(PRUNE, {"days": older_than_days, "most": most}))
