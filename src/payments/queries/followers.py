"""The lag of followers, and parked and unsettled payments: for operators."""

from collections.abc import Sequence
from datetime import datetime
from typing import NamedTuple
from uuid import UUID

from payments.database.connections import Database

# Ages are never negative, even if a clock was set back.
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
  FROM parked_streams WHERE follower = coalesce(%b, follower)
 ORDER BY parked_at, "position" LIMIT %b
"""

NEXT_PAYMENTS = """
SELECT notification_id, originator_id FROM payment_events
 WHERE notification_id > %b ORDER BY notification_id LIMIT %b
"""

# All roles may read the application_name of sessions.
AT_WORK = """
SELECT DISTINCT substr(application_name, length('payments follower ') + 1)
  FROM pg_stat_activity
 WHERE datname = current_database() AND application_name LIKE 'payments follower %%'
 ORDER BY 1
"""

# A level of 50 and more: settling has logged, as CRITICAL and every day, that the provider's
# response contradicts the events, or that the payment belongs to another provider. Such a payment
# is counted apart: it stays unsettled until manual intervention.
UNSETTLED = """
SELECT kind, count(*),
       coalesce(greatest(0, extract(epoch FROM clock_timestamp()
           - min(since) FILTER (WHERE coalesce(told_level, 0) < 50)))::float8, 0)
  FROM unsettled_payments GROUP BY kind
"""

OLDEST_UNSETTLED = """
SELECT payment_id FROM unsettled_payments
 WHERE kind = ANY (%(kinds)b::text[]) AND coalesce(told_level, 0) < 50
 ORDER BY since LIMIT %(most)b
"""

# Without those that OPEN_GATEWAYS finds to be of a provider that is not configured.
CONTRADICTED = """
SELECT count(*), coalesce((array_agg(u.payment_id ORDER BY u.since))[:%(most)b], '{}')
  FROM unsettled_payments u
  LEFT JOIN payment_events e ON e.originator_id = u.payment_id AND e.originator_version = 1
 WHERE u.told_level >= 50
   AND (u.kind IN ('abandoned', 'declined') OR e.state IS NULL
        OR initiated_gateway(e.state) = ANY (%(gateways)b::text[]))
"""

# The providers of open payments, without the kinds that are only watched.
OPEN_GATEWAYS = """
SELECT initiated_gateway(e.state), count(*), (array_agg(u.payment_id ORDER BY u.since))[:%b]
  FROM unsettled_payments u
  JOIN payment_events e ON e.originator_id = u.payment_id AND e.originator_version = 1
 WHERE u.kind IN ('charge', 'refund', 'late_capture') GROUP BY 1
"""

# The same of those of a level of 50 and more, for each scrape: those of a provider that is not
# configured are among them, and while a provider is down nearly none are.
TOLD_GATEWAYS = """
SELECT initiated_gateway(e.state), count(*)
  FROM (SELECT payment_id FROM unsettled_payments
         WHERE told_level >= 50 AND kind IN ('charge', 'refund', 'late_capture')
         LIMIT 10000) AS u
  JOIN payment_events e ON e.originator_id = u.payment_id AND e.originator_version = 1
 GROUP BY 1
"""


class FollowerState(NamedTuple):
    """`lag_events` is how many events it has not read yet, `lag_s` the age of the oldest."""

    name: str
    position: int
    lag_events: int
    lag_s: float
    parked_streams: int


class ParkedStream(NamedTuple):
    """A stream that a follower skips; `position` is its first event that was not applied."""

    follower: str
    payment_id: UUID
    position: int
    reason: str
    parked_at: datetime


class UnsettledPayments(NamedTuple):
    """How many payments are unsettled for one kind of reason, and the age of the oldest without a
    contradiction; 0 if there is none."""

    kind: str
    payments: int
    oldest_age_s: float


async def follower_states(database: Database) -> list[FollowerState]:
    return [FollowerState(*row) for row in await database.fetch(FOLLOWERS)]


async def followers_at_work(database: Database) -> list[str]:
    """The names of the followers that a process runs now."""
    return [name for (name,) in await database.fetch(AT_WORK)]


async def next_payments(database: Database, position: int, most: int) -> tuple[int, list[UUID]]:
    """The first position after this one, and the payments of the next `most` events."""
    rows = await database.fetch(NEXT_PAYMENTS, [position, most])
    first = rows[0][0] if rows else position + 1
    return first, list(dict.fromkeys(payment_id for _, payment_id in rows))


async def parked_streams(
    database: Database, follower: str | None = None, most: int | None = None
) -> list[ParkedStream]:
    """Of one follower or of all, the first parked first."""
    rows = await database.fetch(PARKED_STREAMS, [follower, most])
    return [ParkedStream(*row) for row in rows]


async def unsettled_payments(database: Database) -> list[UnsettledPayments]:
    return [UnsettledPayments(*row) for row in await database.fetch(UNSETTLED)]


async def oldest_unsettled(database: Database, kinds: Sequence[str], most: int) -> list[UUID]:
    """The payments of the oldest unsettled rows without a contradiction."""
    params = {"kinds": list(kinds), "most": most}
    return [payment_id for (payment_id,) in await database.fetch(OLDEST_UNSETTLED, params)]


async def contradicted_payments(
    database: Database, gateways: Sequence[str], most: int
) -> tuple[int, list[UUID]]:
    """How many unsettled payments of these providers must be compared manually with the provider's
    records, and the oldest."""
    params = {"gateways": list(gateways), "most": most}
    ((count, ids),) = await database.fetch(CONTRADICTED, params)
    return count, ids


async def open_gateways(database: Database, most: int) -> dict[str, tuple[int, list[UUID]]]:
    """How many open payments each provider has, by its name, and the oldest of them."""
    rows = await database.fetch(OPEN_GATEWAYS, [most])
    return {name: (count, ids) for name, count, ids in rows}


async def told_gateways(database: Database) -> dict[str, int]:
    """Of the open payments that somebody was told of: how many were begun with each provider, by
    its name. Of at most 10,000."""
    return dict(await database.fetch(TOLD_GATEWAYS))
