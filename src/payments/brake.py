"""How much the service gives back by itself, and that it stops: giving_back_stopped and
giving_back_begun, and all of their SQL.

If very many orders seem to have failed, it is more likely that whoever says so is wrong. Then a
person has to look, and lets it go on.
"""

from datetime import datetime
from typing import Literal, NamedTuple
from uuid import UUID

from payments.database.connections import Database

# Within an hour; if that is more, one in so many of the payments that were captured in it.
FEWEST = 20
ONE_IN = 20

BEGIN = """
SELECT begin_giving_back(%(payment_id)s, %(fewest)s, %(one_in)s)
"""

STOPPED = """
SELECT stopped_at, reason FROM giving_back_stopped WHERE lifted_at IS NULL
"""

BEGUN = """
SELECT count(*) FROM giving_back_begun WHERE begun_at > clock_timestamp() - interval '1 hour'
"""

# What was given back before counts no more.
LIFT = """
WITH lifted AS (
    UPDATE giving_back_stopped
       SET lifted_at = clock_timestamp(), lifted_by = %(by)s, lifted_reason = %(reason)s
     WHERE lifted_at IS NULL
    RETURNING stopped_at, reason
), counted AS (
    DELETE FROM giving_back_begun WHERE EXISTS (SELECT FROM lifted)
)
SELECT stopped_at, reason FROM lifted
"""


class Stop(NamedTuple):
    """Since when the service gives nothing back by itself, and why."""

    stopped_at: datetime
    reason: str


async def begin(database: Database, payment_id: UUID) -> Literal["begun", "stops", "stopped"]:
    """To be called before the service gives this payment back. `begun`: it may, and it counts.
    `stops`: that would be too much, and from now on none may; then it is `stopped`.
    DatabaseUnavailable."""
    params = {"payment_id": payment_id, "fewest": FEWEST, "one_in": ONE_IN}
    ((outcome,),) = await database.fetch(BEGIN, params)
    return outcome  # type: ignore[no-any-return]


async def stopped(database: Database) -> Stop | None:
    """None while it gives back; DatabaseUnavailable."""
    rows = await database.fetch(STOPPED)
    return Stop(*rows[0]) if rows else None


async def begun(database: Database) -> int:
    """How many payments the last hour counts; DatabaseUnavailable."""
    ((count,),) = await database.fetch(BEGUN)
    return int(count)


async def lift(database: Database, by: str, reason: str) -> Stop | None:
    """Lets it go on; what had stopped it, None if nothing had. DatabaseUnavailable."""
    rows = await database.fetch(LIFT, {"by": by, "reason": reason})
    return Stop(*rows[0]) if rows else None
