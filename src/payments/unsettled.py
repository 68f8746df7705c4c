"""The table of payments that the provider must be asked about again, and all of its SQL.

The projector adds and removes rows in the transaction of its position; settling claims rows that
are due. Both give the row a new `change`, which no row had before: a process that finds another one
than it claimed came too late, or there is a new reason to ask, and it leaves the row alone.
"""

from typing import NamedTuple
from uuid import UUID

from payments.database import Database

# One row per payment. A new reason to ask makes it due soon, however patient it had become.
ADD = """
INSERT INTO unsettled_payments AS u (payment_id, kind, since, due_at)
SELECT payment_id, kind, since, clock_timestamp() + make_interval(secs => %b)
  FROM unnest(%b::uuid[], %b::text[], %b::timestamptz[]) AS new (payment_id, kind, since)
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

# What is due, oldest first, of the abandoned payments or of all others; nobody else gets it until
# the lease is over. With clock_timestamp(), which changes from row to row, instead of now() the
# index could not be used.
CLAIM = """
UPDATE unsettled_payments u
   SET due_at = clock_timestamp() + make_interval(secs => %(lease_s)s),
       attempts = u.attempts + 1,
       change = nextval('unsettled_payments_change_seq')
  FROM (SELECT payment_id FROM unsettled_payments
         WHERE abandoned = %(abandoned)s AND due_at <= now()
         ORDER BY due_at LIMIT %(limit)s
           FOR UPDATE SKIP LOCKED) AS due
 WHERE u.payment_id = due.payment_id
RETURNING u.payment_id, u.attempts, u.change
"""

POSTPONE = """
UPDATE unsettled_payments
   SET due_at = clock_timestamp() + make_interval(secs => %(pause_s)s)
 WHERE payment_id = %(payment_id)s AND change = %(change)s
RETURNING payment_id
"""

FORGET = """
DELETE FROM unsettled_payments WHERE payment_id = %(payment_id)s AND change = %(change)s
RETURNING payment_id
"""


class Claim(NamedTuple):
    """A payment that this process may ask about, for the `attempts`th time."""

    payment_id: UUID
    attempts: int
    change: int


async def claim(
    database: Database, limit: int, lease_s: float, *, abandoned: bool = False
) -> list[Claim]:
    params = {"limit": limit, "lease_s": lease_s, "abandoned": abandoned}
    rows = await database.fetch(CLAIM, params)
    return [Claim(*row) for row in rows]


async def postpone(database: Database, claimed: Claim, pause_s: float) -> None:
    await database.fetch(POSTPONE, {**claimed._asdict(), "pause_s": pause_s})


async def forget(database: Database, claimed: Claim) -> None:
    """Nothing is left to ask about it, and the projector will not say so: it is long past."""
    await database.fetch(FORGET, claimed._asdict())
