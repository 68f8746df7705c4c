"""The table of payments that the provider must be asked about again, and all of its SQL.

The projector adds and removes rows in the transaction of its position; settling claims rows that
are due. Both give the row a new `change`, which no row had before: a process that finds another one
than it claimed came too late, or there is a new reason to ask, and it leaves the row alone.
"""

from typing import Any, NamedTuple
from uuid import UUID

from payments.database.connections import Database

# A lease and every pause end within this (commands/settling_loop.py).
DUE_WITHIN_S = 3600.0

# One row per payment. A new reason to ask makes it due soon, however patient it had become.
ADD = """
INSERT INTO unsettled_payments AS u (payment_id, kind, since, due_at)
SELECT payment_id, kind, since, clock_timestamp() + make_interval(secs => due_in_s)
  FROM unnest(%b::uuid[], %b::text[], %b::timestamptz[], %b::float8[])
    AS new (payment_id, kind, since, due_in_s)
    ON CONFLICT (payment_id) DO UPDATE
   SET kind = excluded.kind, since = excluded.since,
       due_at = least(u.due_at, excluded.due_at), attempts = 0, change = excluded.change
"""

REMOVE = """
DELETE FROM unsettled_payments WHERE payment_id = ANY(%b::uuid[])
"""

# From projections/rebuild.py: rows that are missing, or say another reason than the log.
ADD_REBUILT = """
INSERT INTO unsettled_payments AS u (payment_id, kind, since, due_at)
SELECT payment_id, kind, since, clock_timestamp() + make_interval(secs => %b)
  FROM rebuilt_unsettled_payments
    ON CONFLICT (payment_id) DO UPDATE
   SET kind = excluded.kind, since = excluded.since,
       due_at = least(u.due_at, excluded.due_at), attempts = 0, change = excluded.change
"""

# What is due, oldest first, of those that are only watched (abandoned or declined), or of all
# others; nobody else gets it until the lease is over. So is what is due later than any pause lasts:
# the clock was ahead when that was written. With clock_timestamp(), which changes from row to row,
# instead of now() the index could not be used.
CLAIM = """
WITH due AS (
    SELECT payment_id FROM unsettled_payments
     WHERE abandoned = %(abandoned)s AND due_at <= now()
     ORDER BY due_at LIMIT %(limit)s
       FOR UPDATE SKIP LOCKED
), too_late AS (
    SELECT payment_id FROM unsettled_payments
     WHERE abandoned = %(abandoned)s AND due_at > now() + make_interval(secs => %(pause_max_s)s)
       AND (kind <> 'declined' OR due_at > now() + make_interval(secs => %(declined_max_s)s))
     ORDER BY due_at LIMIT %(limit)s
       FOR UPDATE SKIP LOCKED
)
UPDATE unsettled_payments u
   SET due_at = clock_timestamp() + make_interval(secs => %(lease_s)s),
       attempts = u.attempts + 1,
       change = nextval('unsettled_payments_change_seq')
  FROM (SELECT payment_id FROM due UNION ALL SELECT payment_id FROM too_late
         LIMIT %(limit)s) AS claimed
 WHERE u.payment_id = claimed.payment_id
RETURNING u.payment_id, u.attempts, u.change
"""

POSTPONE = """
UPDATE unsettled_payments
   SET due_at = clock_timestamp() + make_interval(secs => %(pause_s)s)
 WHERE payment_id = %(payment_id)s AND change = %(change)s
RETURNING payment_id
"""

# Only what the projector has listed as watched: while it is behind, its row is still another one.
FORGET = """
DELETE FROM unsettled_payments
 WHERE payment_id = %(payment_id)s AND change = %(change)s AND abandoned
RETURNING payment_id
"""

# Whether something of this level is to be logged of a payment: nothing of it, or of a higher one,
# was in a while. A time in the future was written while the clock was ahead. What is not listed,
# or not yet, is always told.
TELL = """
WITH told AS (
    UPDATE unsettled_payments SET told_at = clock_timestamp(), told_level = %(level)s
     WHERE payment_id = %(payment_id)s
       AND (told_at IS NULL OR told_level < %(level)s OR told_at > clock_timestamp()
            OR told_at < clock_timestamp() - make_interval(secs => %(again_s)s))
    RETURNING payment_id
)
SELECT EXISTS (SELECT FROM told)
    OR NOT EXISTS (SELECT FROM unsettled_payments WHERE payment_id = %(payment_id)s)
"""


class Claim(NamedTuple):
    """A payment that this process may ask about, for the `attempts`th time."""

    payment_id: UUID
    attempts: int
    change: int


def claim_params(
    limit: int, lease_s: float, *, abandoned: bool = False, declines_may_turn_s: float = 0.0
) -> dict[str, Any]:
    """`abandoned`: of those that are only watched. `declines_may_turn_s`: so much later than now a
    declined payment may be due."""
    return {
        "limit": limit,
        "lease_s": lease_s,
        "abandoned": abandoned,
        "pause_max_s": DUE_WITHIN_S,
        "declined_max_s": declines_may_turn_s + DUE_WITHIN_S,
    }


async def claim(
    database: Database,
    limit: int,
    lease_s: float,
    *,
    abandoned: bool = False,
    declines_may_turn_s: float = 0.0,
) -> list[Claim]:
    """Parameters as of claim_params."""
    params = claim_params(
        limit, lease_s, abandoned=abandoned, declines_may_turn_s=declines_may_turn_s
    )
    rows = await database.fetch(CLAIM, params)
    return [Claim(*row) for row in rows]


async def postpone(database: Database, claimed: Claim, pause_s: float) -> None:
    await database.fetch(POSTPONE, {**claimed._asdict(), "pause_s": pause_s})


async def forget(database: Database, claimed: Claim) -> bool:
    """Nothing can become of a watched payment any more, and no event says so: it is long past.

    False: the row stays, since it is not one of a watched payment, or not the one that was claimed.
    """
    return bool(await database.fetch(FORGET, claimed._asdict()))


async def may_tell(database: Database, payment_id: UUID, level: int, again_s: float) -> bool:
    """Whether to log something of this level: see TELL. True is said once, to one process."""
    params = {"payment_id": payment_id, "level": level, "again_s": again_s}
    ((due,),) = await database.fetch(TELL, params)
    return bool(due)
