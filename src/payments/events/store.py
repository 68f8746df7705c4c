"""The SQL of payment_events, and how rows become facts, and facts rows.

Whoever reads events as they are stored does it with the statements of this file; the rest look for
something of one event or of the end of the log, and have a statement of their own for it:
events/watch.py, events/losses.py, projections/callbacks.py, queries/followers.py and
queries/server.py. The table, and the view that people and the history read, are in
migrations/0001_event_store.sql; the function that writes it, append_payment_events, is in
migrations/0020_provider_references.sql. The one door to that function is the group-commit Appender
(appender.py). The log as the eventsourcing library's classes see it, to follow it from elsewhere,
is library.py.
"""

from collections.abc import Sequence
from datetime import UTC, datetime
from typing import Any, NamedTuple
from uuid import UUID

import psycopg
from eventsourcing.persistence import StoredEvent

from payments.database.arrays import BinaryArray, bigints, byteas, integers, uuids, words
from payments.events import facts
from payments.events.facts import Fact, PaymentInitiated, UndecodableEvent

# Its commit waits for the disk whatever its session was set to since it was set up: a pooler whose
# mode is changed meanwhile gives it the session of a follower, which does not wait.
APPEND = """
SELECT outcome, "position", first_state
  FROM set_config('synchronous_commit', 'on', true),
       append_payment_events(%b::uuid[], %b::bigint[], %b::integer[],
                             %b::integer[], %b::text[], %b::bytea[],
                             %b::bytea[], %b::timestamptz, true)
"""

# A whole stream, oldest first, with the database's clock as of the reading.
LOAD_STREAM = """
SELECT originator_version, topic, state, recorded_at, clock_timestamp()
  FROM payment_events WHERE originator_id = %s ORDER BY originator_version
"""

# A whole stream as rows of the log. A time that Python does not have is told as the epoch.
LOAD_ENTRIES = """
SELECT notification_id, originator_id, originator_version, topic, state,
       coalesce(readable_time(recorded_at), 'epoch')
  FROM payment_events WHERE originator_id = %s ORDER BY originator_version
"""

# Several whole streams, each oldest first; their ids as bytes, which are cheap to compare.
LOAD_STREAMS = """
SELECT uuid_send(originator_id), originator_version, topic, state
  FROM payment_events WHERE originator_id = ANY(%b::uuid[])
 ORDER BY originator_id, originator_version
"""

# Payments by which an order may be paid, unless the payment that is to be charged has begun: what
# the read model does not show as ended, and what the log holds behind it. Of a read model that is
# far behind only the newest events are looked at, so that a charge takes milliseconds.
PERHAPS_PAID = """
WITH newest AS MATERIALIZED (
    SELECT originator_id, topic, state FROM payment_events
     WHERE notification_id > (SELECT "position" FROM followers WHERE name = 'payments')
     ORDER BY notification_id DESC LIMIT 2000
), found AS (
    SELECT id, status = 'PENDING' AS open FROM payments
     WHERE merchant_order_id = %(order_id)s AND status IN ('PENDING', 'SUCCESS')
     UNION
    SELECT originator_id, false FROM newest
     WHERE topic = 'PaymentCharged' AND position(%(order)s::bytea in state) > 0
)
SELECT id FROM found
 WHERE NOT EXISTS (SELECT FROM payment_events WHERE originator_id = %(payment_id)s)
 ORDER BY open LIMIT 100
"""

# The log after a position, in order.
READ_LOG = """
SELECT notification_id, originator_id, originator_version, topic, state, recorded_at
  FROM payment_events WHERE notification_id > %s ORDER BY notification_id LIMIT %s
"""

# Of one stream the part between two positions, both included.
READ_STREAM_PART = """
SELECT notification_id, originator_id, originator_version, topic, state, recorded_at
  FROM payment_events
 WHERE originator_id = %s AND notification_id BETWEEN %s AND %s ORDER BY originator_version
"""

# Whole streams, or their beginnings up to a position, one after the other: those with ids from one
# up to another, or some of them. Here and below: a NULL that somebody forced upon the table is as
# wrong as any other value.
READ_STREAMS_UNTIL = """
SELECT notification_id, originator_id, originator_version, coalesce(topic, ''), coalesce(state, '')
  FROM payment_events
 WHERE notification_id <= %(until)s
   AND originator_id >= %(first_id)s AND originator_id <= %(last_id)s
   AND (%(ids)s::uuid[] IS NULL OR originator_id = ANY (%(ids)s::uuid[]))
 ORDER BY originator_id, originator_version
"""

# The last of so many payments with ids from one on that no table has many more than 10,000 rows of
# them; NULL: there are not so many.
SLICE_END = """
SELECT least((SELECT originator_id FROM payment_events WHERE originator_id >= %(first_id)s
               ORDER BY originator_id OFFSET 9999 LIMIT 1),
             (SELECT id FROM payments WHERE id >= %(first_id)s ORDER BY id OFFSET 9999 LIMIT 1),
             (SELECT payment_id FROM refunds WHERE payment_id >= %(first_id)s
               ORDER BY payment_id OFFSET 9999 LIMIT 1),
             (SELECT payment_id FROM payment_clients WHERE payment_id >= %(first_id)s
               ORDER BY payment_id OFFSET 9999 LIMIT 1),
             (SELECT payment_id FROM unsettled_payments WHERE payment_id >= %(first_id)s
               ORDER BY payment_id OFFSET 9999 LIMIT 1))
"""

# Which streams have an event between two positions, the first excluded.
CHANGED_STREAMS = """
SELECT DISTINCT originator_id
  FROM payment_events WHERE notification_id > %(after)s AND notification_id <= %(until)s
"""

# Behind one position and up to another, in order and with the seals: so many, and what has the same
# position as the last of them. A time that Python does not have is left out.
READ_PART_EVENTS = 200
READ_PART = """
SELECT e.notification_id, e.originator_id, e.originator_version, coalesce(e.topic, ''),
       coalesce(e.state, ''), readable_time(e.recorded_at), s.hash
  FROM payment_events e
  LEFT JOIN log_seals s ON s.position = e.notification_id
   AND s.position > %(after)s AND s.position <= %(last)s
 WHERE e.notification_id > %(after)s AND e.notification_id <= %(last)s
 ORDER BY e.notification_id FETCH FIRST 200 ROWS WITH TIES
"""

# The same of a part of them; NULL stands for everything. A topic is one of several; `holding` are
# bytes that the state has somewhere.
READ_MATCHING_EVENTS = 100
READ_MATCHING = """
SELECT e.notification_id, e.originator_id, e.originator_version, coalesce(e.topic, ''),
       coalesce(e.state, ''), readable_time(e.recorded_at), s.hash
  FROM payment_events e
  LEFT JOIN log_seals s ON s.position = e.notification_id
   AND s.position > %(after)s AND s.position <= %(last)s
 WHERE e.notification_id > %(after)s AND e.notification_id <= %(last)s
   AND (%(payment_id)s::uuid IS NULL OR e.originator_id = %(payment_id)s)
   AND (%(types)s::text[] IS NULL OR e.topic = ANY (%(types)s::text[]))
   AND (%(holding)s::bytea IS NULL OR position(%(holding)s::bytea in e.state) > 0)
 ORDER BY e.notification_id FETCH FIRST 100 ROWS WITH TIES
"""

# What was asked for, of these payments: the charge of each, and its refunds.
READ_ASKED_FOR = """
SELECT originator_id, originator_version, coalesce(topic, ''), coalesce(state, '')
  FROM payment_events
 WHERE originator_id = ANY (%(payment_ids)s::uuid[])
   AND topic IN ('PaymentInitiated', 'RefundInitiated')
"""

# The first event at a position or behind it, and when it was recorded.
READ_NEXT_TIME = """
SELECT notification_id, recorded_at
  FROM payment_events WHERE notification_id >= %(position)s ORDER BY notification_id LIMIT 1
"""

HEAD_POSITION = """
SELECT coalesce(max(notification_id), 0) FROM payment_events
"""

# A stream up to a position or a moment, one of which is NULL; the rest of it is not looked at. An
# event that was recorded in the future, by a clock that was ahead, counts from the time on that the
# application told.
LOAD_STREAM_AS_OF = """
WITH events AS (
    SELECT originator_version AS version, topic, state,
           CASE WHEN %(time)s::timestamptz IS NULL THEN notification_id <= %(position)s::bigint
                WHEN recorded_at > clock_timestamp()
                THEN coalesce(payment_event_occurred_at(state), recorded_at) <= %(time)s
                ELSE recorded_at <= %(time)s END AS by_then
      FROM payment_events WHERE originator_id = %(payment_id)s
)
SELECT version, topic, state FROM events
 WHERE version < coalesce((SELECT min(version) FROM events WHERE NOT by_then), 9223372036854775807)
 ORDER BY version
"""

# Where the log and its seals end, and up to where the sealing follower says that it sealed.
READ_ENDS = """
SELECT (SELECT max(notification_id) FROM payment_events), (SELECT max(position) FROM log_seals),
       (SELECT position FROM followers WHERE name = 'seals')
"""

# From one position up to another, in order: whether there is an event, the event, and its seal. A
# time that Python does not have is no time that was ever sealed.
READ_PLACES = """
SELECT coalesce(e.notification_id, s.position), e.notification_id IS NOT NULL, e.originator_id,
       e.originator_version, e.topic, e.state, e.recorded_at, s.hash
  FROM (SELECT notification_id, originator_id, originator_version, topic, state,
               readable_time(recorded_at) AS recorded_at
          FROM payment_events
         WHERE notification_id >= %(first)s AND notification_id <= %(last_event)s) e
  FULL JOIN (SELECT position, hash FROM log_seals
              WHERE position >= %(first)s AND position <= %(last_seal)s) s
    ON s.position = e.notification_id
 ORDER BY 1
"""

# What comes first at a position or behind it.
READ_NEXT_PLACE = """
SELECT least((SELECT notification_id FROM payment_events WHERE notification_id >= %(first)s
               ORDER BY notification_id LIMIT 1),
             (SELECT position FROM log_seals WHERE position >= %(first)s
               ORDER BY position LIMIT 1))
"""

# Events that have no position.
READ_PLACELESS = """
SELECT 0, originator_id, originator_version, topic, state,
       readable_time(recorded_at)
  FROM payment_events WHERE notification_id IS NULL
"""

# Captures from one position up to another that an earlier one of another payment names as well,
# with the payment that named them first. One look into the index payment_events_capture for each:
# a join could be planned to read them all.
SHARED_CAPTURES = """
WITH part AS MATERIALIZED (
    SELECT originator_id, notification_id, captured_transaction(state) AS transaction
      FROM payment_events
     WHERE notification_id >= %(first)s AND notification_id <= %(last)s
       AND topic IN ('PaymentCharged', 'LateCaptureFound')
), shared AS (
    SELECT DISTINCT p.transaction
      FROM part p
     WHERE p.transaction <> ''
       AND (SELECT true FROM payment_events o
             WHERE captured_transaction(o.state) = p.transaction
               AND o.topic IN ('PaymentCharged', 'LateCaptureFound')
               AND o.originator_id <> p.originator_id AND o.notification_id < p.notification_id
             LIMIT 1)
), named AS (
    SELECT c.originator_id AS payment_id, c.notification_id, s.transaction,
           (SELECT initiated_gateway(b.state) FROM payment_events b
             WHERE b.originator_id = c.originator_id AND b.originator_version = 1) AS gateway
      FROM shared s
      JOIN payment_events c ON captured_transaction(c.state) = s.transaction
       AND c.topic IN ('PaymentCharged', 'LateCaptureFound')
), numbered AS (
    SELECT payment_id, notification_id, gateway, transaction,
           first_value(payment_id) OVER (
               PARTITION BY gateway, transaction ORDER BY notification_id) AS first_id
      FROM named
)
SELECT payment_id, first_id, gateway, transaction
  FROM numbered
 WHERE payment_id <> first_id AND notification_id >= %(first)s AND notification_id <= %(last)s
 ORDER BY notification_id
"""

# Where the captures of payments stand. The topic is no condition: else the index of all captures
# might be read for it.
CAPTURE_POSITIONS = """
SELECT originator_id, min(notification_id) FILTER (WHERE topic = 'PaymentCharged')
  FROM payment_events WHERE originator_id = ANY(%(payment_ids)b::uuid[])
 GROUP BY originator_id
"""

# The outcomes of an append.
APPENDED, REPEATED, CONFLICT = "appended", "repeated", "conflict"
CAPTURED, CLAIMED = "captured", "claimed"


class LogEntry(NamedTuple):
    """A row of the log, all of it: an event with its place; `state` as it was stored."""

    position: int
    payment_id: UUID
    version: int
    topic: str
    state: bytes
    recorded_at: datetime


def append_params(
    appends: Sequence[Sequence[StoredEvent]], predecessors: Sequence[bytes | None] | None = None
) -> tuple[BinaryArray | datetime, ...]:
    """The parameters of APPEND for some appends, each some consecutive events of one stream.

    `predecessors`: for each the bytes of the event before it, None if they need not be compared.
    The parameters hold the time of this process, so they are made anew whenever a batch is sent.
    """
    streams: list[UUID | str] = []
    first_versions: list[int] = []
    sizes: list[int] = []
    append_nos: list[int] = []
    topics: list[str] = []
    states: list[bytes] = []
    for number, events in enumerate(appends, 1):
        streams.append(events[0].originator_id)
        first_versions.append(events[0].originator_version)
        sizes.append(len(events))
        for event in events:
            append_nos.append(number)
            topics.append(event.topic)
            states.append(event.state)
    return (
        uuids(streams),
        bigints(first_versions),
        integers(sizes),
        integers(append_nos),
        words(topics),
        byteas(states),
        byteas(predecessors or [None] * len(appends)),
        datetime.now(UTC),
    )


def to_stored_event(fact: Fact) -> StoredEvent:
    return StoredEvent(fact.payment_id, fact.version, fact.TOPIC, facts.encode(fact))


def to_fact(stored: StoredEvent) -> Fact:
    stream = stored.originator_id
    assert isinstance(stream, UUID)
    return fact_at(stream, stored.originator_version, stored.topic, stored.state)


def fact_of(entry: LogEntry) -> Fact:
    """The fact of a row of the log; UndecodableEvent."""
    return fact_at(entry.payment_id, entry.version, entry.topic, entry.state)


def fact_at(stream: UUID, version: int, topic: str, state: bytes) -> Fact:
    """The fact of a row; UndecodableEvent, also for bytes that say that they are of another row."""
    fact = facts.decode(topic, state)
    if fact.version != version or fact.payment_id != stream:
        raise UndecodableEvent("the event belongs to another stream or version")
    return fact


async def read_events(
    connection: psycopg.AsyncConnection[Any], query: str, params: list[Any]
) -> list[LogEntry]:
    """What one of the queries for whole rows finds."""
    async with connection.cursor(binary=True) as cursor:
        await cursor.execute(query.encode(), params)
        return [LogEntry(*row) for row in await cursor.fetchall()]


def belongs_to(client: str | None, payment_id: UUID, first: tuple[int, str, bytes]) -> bool:
    """Whether a stream's first event (version, topic, state) says that its payment is the client's.

    None stands for whoever may read all. Nobody else is told of a stream whose beginning cannot be
    read. Asked before anything is folded: an error would tell others that there is a payment.
    """
    if client is None:
        return True
    try:
        fact = fact_at(payment_id, *first)
    except UndecodableEvent:
        return False
    return isinstance(fact, PaymentInitiated) and fact.version == 1 and fact.client == client
