"""How far the followers are, and what is left open at the provider: for operators."""

from datetime import datetime
from typing import NamedTuple
from uuid import UUID

from payments.database import Database

# Ages are never below 0, whatever a clock did.
FOLLOWERS = """
SELECT f.name,
       f.position,
       coalesce((SELECT max(notification_id) FROM payment_events), 0) - f.position,
       coalesce((SELECT greatest(0, extract(epoch FROM clock_timestamp() - e.recorded_at))::float8
                   FROM payment_events e WHERE e.notification_id > f.position
                  ORDER BY e.notification_id LIMIT 1), 0),
       (SELECT count(*) FROM parked_streams p WHERE p.follower = f.name)
  FROM followers f ORDER BY f.name
"""

PARKED_STREAMS = """
SELECT follower, payment_id, "position", reason, parked_at
  FROM parked_streams ORDER BY parked_at, "position"
"""

UNSETTLED = """
SELECT kind, count(*), greatest(0, extract(epoch FROM clock_timestamp() - min(since)))::float8
  FROM unsettled_payments GROUP BY kind
"""


# Those of which somebody was told that the provider's answer does not fit, or that they belong to
# another provider: settling says so as CRITICAL, and again every day while it is so.
CONTRADICTED = """
SELECT count(*) FROM unsettled_payments WHERE told_level >= 50
"""

# The providers that open payments were begun with, not those that are only watched.
OPEN_GATEWAYS = """
SELECT initiated_gateway(e.state), count(*)
  FROM unsettled_payments u
  JOIN payment_events e ON e.originator_id = u.payment_id AND e.originator_version = 1
 WHERE u.kind IN ('charge', 'refund', 'late_capture') GROUP BY 1
"""


class FollowerState(NamedTuple):
    """`lag_events` is how many events its read model lacks, `lag_s` the oldest one's age."""

    name: str
    position: int
    lag_events: int
    lag_s: float
    parked_streams: int


class ParkedStream(NamedTuple):
    """A stream that a follower goes on without; `position` is its first event that is missing."""

    follower: str
    payment_id: UUID
    position: int
    reason: str
    parked_at: datetime


class UnsettledPayments(NamedTuple):
    """How many payments are open for one kind of reason, and for how long the oldest."""

    kind: str
    payments: int
    oldest_age_s: float


async def follower_states(database: Database) -> list[FollowerState]:
    return [FollowerState(*row) for row in await database.fetch(FOLLOWERS)]


async def parked_streams(database: Database) -> list[ParkedStream]:
    """All of them, the one that was parked first at the top."""
    return [ParkedStream(*row) for row in await database.fetch(PARKED_STREAMS)]


async def unsettled_payments(database: Database) -> list[UnsettledPayments]:
    return [UnsettledPayments(*row) for row in await database.fetch(UNSETTLED)]


async def contradicted_payments(database: Database) -> int:
    """How many open payments a person has to compare with the provider's records."""
    ((count,),) = await database.fetch(CONTRADICTED)
    return int(count)


async def open_gateways(database: Database) -> dict[str, int]:
    """How many open payments were begun with each provider, by its name."""
    return dict(await database.fetch(OPEN_GATEWAYS))
