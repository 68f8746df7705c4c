"""The table of unsettled payments, about which the provider must be asked again, and all of its
SQL.

The projector adds and removes rows in the transaction of its position; settling claims due rows.
Both set a new unique `change` in the row. If a process finds another value than it claimed, it is
too late, or there is a new reason to ask, and it does not change the row.
"""

from typing import Any, NamedTuple
from uuid import UUID

from payments.database.connections import Database

# A lease and every pause end within this (commands/settling_loop.py).
DUE_WITHIN_S = 3600.0

# When a declined payment is due whose provider is not configured here, if its declines may turn.
ELSEWHERE_S = 900.0

# One row per payment. A new reason to ask makes it due soon, even after long pauses.
#
# A hint may have come before: when the payment was not known yet, or not projected. For a declined
# one, due in days, it counts now; all others are due soon by themselves, and not while their
# request may be running. (A hint that is recorded in this very moment is not seen: then it is as
# without webhooks.)
ADD = """
INSERT INTO unsettled_payments AS u (payment_id, kind, since, due_at, hinted)
SELECT payment_id, kind, since,
       clock_timestamp() + make_interval(secs => CASE WHEN hinted THEN 0 ELSE due_in_s END), hinted
  FROM (SELECT new.*, kind = 'declined' AND (
                   EXISTS (SELECT FROM provider_hints h WHERE h.payment_id = new.payment_id)
                OR EXISTS (SELECT FROM provider_hints h
                            WHERE h.gateway = new.gateway AND h.reference = new.reference))
               AS hinted
          FROM unnest(%b::uuid[], %b::text[], %b::timestamptz[], %b::float8[], %b::text[],
                      %b::text[])
            AS new (payment_id, kind, since, due_in_s, gateway, reference)) AS new
    ON CONFLICT (payment_id) DO UPDATE
   SET kind = excluded.kind, since = excluded.since,
       due_at = least(u.due_at, excluded.due_at), attempts = 0, change = excluded.change,
       hinted = u.hinted OR excluded.hinted
"""

REMOVE = """
DELETE FROM unsettled_payments WHERE payment_id = ANY(%b::uuid[])
"""

# Used by projections/rebuild.py: for rows that are missing or have another reason than the log.
ADD_REBUILT = """
INSERT INTO unsettled_payments AS u (payment_id, kind, since, due_at)
SELECT payment_id, kind, since, clock_timestamp() + make_interval(secs => %b)
  FROM rebuilt_unsettled_payments
    ON CONFLICT (payment_id) DO UPDATE
   SET kind = excluded.kind, since = excluded.since,
       due_at = least(u.due_at, excluded.due_at), attempts = 0, change = excluded.change
"""

# Claims due rows, oldest first, either of watched payments (abandoned or declined) or of all
# others, until the lease expires. Rows that are due later than the longest pause are claimed too:
# they were written while the clock was ahead. now() instead of clock_timestamp(), which is
# volatile: with that the index could not be used.
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
RETURNING u.payment_id, u.attempts, u.change, u.hinted
"""

POSTPONE = """
UPDATE unsettled_payments
   SET due_at = clock_timestamp() + make_interval(secs => %(pause_s)s),
       hinted = hinted AND NOT %(answered)s
 WHERE payment_id = %(payment_id)s AND change = %(change)s
RETURNING payment_id
"""

# Only rows that the projector has marked as watched: while it lags, the row has another kind.
FORGET = """
DELETE FROM unsettled_payments
 WHERE payment_id = %(payment_id)s AND change = %(change)s AND abandoned
RETURNING payment_id
"""

# Whether to log a message of this level about a payment: none of this or a higher level was logged
# within `again_s`. A time in the future was written while the clock was ahead. A payment without a
# row is always logged.
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

# What was logged as CRITICAL does not hold any more.
FITS_AGAIN = """
UPDATE unsettled_payments SET told_at = NULL, told_level = NULL
 WHERE payment_id = %(payment_id)s AND told_level >= 50
RETURNING payment_id
"""


class Claim(NamedTuple):
    """A payment about which this process may ask the provider; `attempts` counts this time too.
    `hinted`: a webhook says that there is something new."""

    payment_id: UUID
    attempts: int
    change: int
    hinted: bool


def claim_params(
    limit: int, lease_s: float, *, abandoned: bool = False, declines_may_turn_s: float = 0.0
) -> dict[str, Any]:
    """`abandoned`: claims watched payments instead of all others. `declines_may_turn_s`: how far in
    the future a declined payment may be due."""
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
    """Claims at most `limit` due payments; parameters as of claim_params."""
    params = claim_params(
        limit, lease_s, abandoned=abandoned, declines_may_turn_s=declines_may_turn_s
    )
    rows = await database.fetch(CLAIM, params)
    return [Claim(*row) for row in rows]


async def postpone(
    database: Database, claimed: Claim, pause_s: float, *, answered: bool = True
) -> None:
    """`answered`: the provider said what became of the payment, so a hint is used up."""
    await database.fetch(POSTPONE, {**claimed._asdict(), "pause_s": pause_s, "answered": answered})


async def forget(database: Database, claimed: Claim) -> bool:
    """Removes the row of a watched payment whose outcome cannot change any more; no event says so.

    False: the row stays, since its payment is not watched, or it changed after the claim.
    """
    return bool(await database.fetch(FORGET, claimed._asdict()))


async def may_tell(database: Database, payment_id: UUID, level: int, again_s: float) -> bool:
    """Whether to log a message of this level: see TELL. Only one process gets True."""
    params = {"payment_id": payment_id, "level": level, "again_s": again_s}
    ((due,),) = await database.fetch(TELL, params)
    return bool(due)


async def fits_again(database: Database, payment_id: UUID) -> None:
    """The provider's response fits the events: the payment counts like any other again."""
    await database.fetch(FITS_AGAIN, {"payment_id": payment_id})
