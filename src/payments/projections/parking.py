"""Parking: a stream that a projection cannot apply is skipped, and the others continue.

All of this runs in the follower's transaction, with its row in `followers` locked.
"""

import traceback
from collections.abc import Sequence
from typing import Any, NamedTuple, Protocol
from uuid import UUID

import psycopg
from loguru import logger

from payments.events.facts import UndecodableEvent
from payments.events.store import READ_STREAM_PART, LogEntry, read_events
from payments.payment.state import UnexpectedEvent

# Must be read after the position is locked: the previous follower may just have parked a stream.
PARKED_IDS = """
SELECT payment_id FROM parked_streams WHERE follower = %s
"""

PARKED_POSITION = """
SELECT position FROM parked_streams WHERE follower = %s AND payment_id = %s
"""

PARK = """
INSERT INTO parked_streams (follower, payment_id, position, reason) VALUES (%s, %s, %s, %s)
    ON CONFLICT (follower, payment_id) DO UPDATE SET reason = excluded.reason
"""

LIST_PARKED = """
SELECT payment_id, position, reason, parked_at
  FROM parked_streams WHERE follower = %s ORDER BY position
"""

UNPARK = """
DELETE FROM parked_streams WHERE follower = %s AND payment_id = %s
"""


class Projection(Protocol):
    """Applies events for a follower. `name` is that of its row in `followers`."""

    name: str

    async def apply(
        self, connection: psycopg.AsyncConnection[Any], events: Sequence[LogEntry]
    ) -> None:
        """Writes the rows of these events, in the follower's transaction.

        The events are in order, and each stream's continue without a gap after those applied
        before. Raises for the whole batch if one of them cannot be applied.
        """
        ...


class Parked(NamedTuple):
    """A parked stream; `position` is its first event that was not applied."""

    payment_id: UUID
    position: int
    reason: str
    parked_at: Any


class Parking:
    """Applies events to one projection, except those of parked streams."""

    def __init__(self, projection: Projection) -> None:
        self._projection = projection
        self._follower = projection.name

    async def apply(self, connection: psycopg.AsyncConnection[Any], events: list[LogEntry]) -> None:
        """Applies all events except those of parked streams; parks streams that fail."""
        cursor = await connection.execute(PARKED_IDS, [self._follower])
        parked = {payment_id for (payment_id,) in await cursor.fetchall()}
        events = [event for event in events if event.payment_id not in parked]
        if events:
            await self._apply_or_park(connection, events)

    async def parked(self, connection: psycopg.AsyncConnection[Any]) -> list[Parked]:
        """The parked streams, oldest first."""
        cursor = await connection.execute(LIST_PARKED, [self._follower])
        return [Parked(*row) for row in await cursor.fetchall()]

    async def retry(
        self, connection: psycopg.AsyncConnection[Any], payment_id: UUID, position: int
    ) -> None:
        """Applies the missed events of a parked stream, up to the follower's position."""
        # Another process may have retried it since, and parked it again at a later position.
        first = await fetch_one(connection, PARKED_POSITION, [self._follower, payment_id])
        if first is None:
            return
        events = await read_events(connection, READ_STREAM_PART, [payment_id, first, position])
        # No events: it was parked manually, and there is nothing to apply.
        if not events or await self._apply_or_park(connection, events):
            await connection.execute(UNPARK, [self._follower, payment_id])

    async def _apply_or_park(
        self, connection: psycopg.AsyncConnection[Any], events: list[LogEntry]
    ) -> bool:
        """Applies the events, but parks streams that fail; returns whether none failed.

        A failing batch is halved until the failing streams are isolated, each part in a savepoint:
        stream by stream, a large batch would exceed its timeout.
        """
        try:
            async with connection.transaction():
                await self._projection.apply(connection, events)
        except Exception as error:
            if not _is_the_events_fault(error):
                raise
            reason = _reason(error)
        else:
            return True
        streams = list(dict.fromkeys(event.payment_id for event in events))
        if len(streams) == 1:
            await self._park(connection, events[0], reason)
            return False
        half = set(streams[: len(streams) // 2])
        for part in (True, False):
            of_part = [event for event in events if (event.payment_id in half) is part]
            await self._apply_or_park(connection, of_part)
        return False

    async def _park(
        self, connection: psycopg.AsyncConnection[Any], first: LogEntry, reason: str
    ) -> None:
        logger.bind(follower=self._follower, payment_id=first.payment_id, reason=reason).error(
            "a payment is parked: `payments parked list`"
        )
        await connection.execute(PARK, [self._follower, first.payment_id, first.position, reason])


async def fetch_one(connection: psycopg.AsyncConnection[Any], query: str, params: list[Any]) -> Any:
    """The first column of the first row; None without one."""
    cursor = await connection.execute(query.encode(), params)
    row = await cursor.fetchone()
    return row[0] if row else None


def _is_the_events_fault(error: Exception) -> bool:
    """Whether the events cause the error, so that a retry would fail too; not for a lost
    connection, a lock or a full disk."""
    if isinstance(error, psycopg.Error):
        # SQLSTATE classes 22 and 23, and values that psycopg cannot send.
        return isinstance(error, psycopg.DataError | psycopg.IntegrityError)
    return not isinstance(error, OSError | MemoryError)


def _reason(error: Exception) -> str:
    """The reason, for people. Foreign messages are left out: they may quote values of a row."""
    kind = type(error).__name__
    if isinstance(error, UndecodableEvent | UnexpectedEvent):
        return f"{kind}: {error}"[:500]
    if isinstance(error, psycopg.Error):
        names = (error.diag.table_name, error.diag.column_name, error.diag.constraint_name)
        return " ".join(part for part in (error.sqlstate, kind, *names) if part)
    *_, (frame, line) = traceback.walk_tb(error.__traceback__)
    return f"{kind} in {frame.f_code.co_qualname}, line {line}"
