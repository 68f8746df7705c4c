"""Limits how much the service gives back by itself: the tables giving_back_stopped and
giving_back_begun, and all of their SQL.

If very many orders seem to have failed, ORDER_STATUS_URL is probably wrong. Then giving back stops
until an operator resumes it.
"""

from datetime import datetime
from typing import Literal, NamedTuple
from uuid import UUID

from payments.database.connections import Database

# The limit within an hour: FEWEST, or one in ONE_IN of the payments captured in it if that is more.
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

# Payments that were given back before no longer count.
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
    """Since when and why the service gives nothing back by itself."""

    stopped_at: datetime
    reason: str


async def begin(database: Database, payment_id: UUID) -> Literal["begun", "stops", "stopped"]:
    """Must be called before the service gives this payment back. `begun`: it may, and it counts.
    `stops`: the limit is reached, and giving back stops. `stopped`: it had stopped before. Raises
    DatabaseUnavailable."""
    params = {"payment_id": payment_id, "fewest": FEWEST, "one_in": ONE_IN}
    ((outcome,),) = await database.fetch(BEGIN, params)
    return outcome  # type: ignore[no-any-return]


async def stopped(database: Database) -> Stop | None:
    """None while giving back is not stopped. Raises DatabaseUnavailable."""
    rows = await database.fetch(STOPPED)
    return Stop(*rows[0]) if rows else None


async def begun(database: Database) -> int:
    """How many payments count in the last hour. Raises DatabaseUnavailable."""
    ((count,),) = await database.fetch(BEGUN)
    return int(count)


async def lift(database: Database, by: str, reason: str) -> Stop | None:
    """Resumes giving back; returns the stop that it ended, if any. Raises DatabaseUnavailable."""
    rows = await database.fetch(LIFT, {"by": by, "reason": reason})
    return Stop(*rows[0]) if rows else None
