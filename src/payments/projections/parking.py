"""Parking: a stream that a projection cannot apply is set aside, and the others go on.

Everything here runs within the follower's transaction, with its row in `followers` locked.
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

# To be read once the position is taken: the follower before may just have parked one.
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
    """What a follower keeps up to date. Its name is that of its row in `followers`."""

    name: str

    async def apply(
        self, connection: psycopg.AsyncConnection[Any], events: Sequence[LogEntry]
    ) -> None:
        """Writes what these events mean, within the follower's transaction.

        The events are in order, and of each stream nothing is left out between what was applied
        before and these. Raises for the whole batch if one of them cannot be applied.
        """
        ...


class Parked(NamedTuple):
    """A stream that is parked; `position` is its first event that was not applied."""

    payment_id: UUID
    position: int
    reason: str
    parked_at: Any


class Parking:
    """Applies events to one projection, without the streams that are parked."""

    def __init__(self, projection: Projection) -> None:
        self._projection = projection
        self._follower = projection.name

    async def apply(self, connection: psycopg.AsyncConnection[Any], events: list[LogEntry]) -> None:
        """All but those of parked streams; parks the streams that cannot be applied."""
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
        """Applies what a parked stream has missed, up to the follower's position."""
        # Another process may have retried it since, and parked it again further on.
        first = await fetch_one(connection, PARKED_POSITION, [self._follower, payment_id])
        if first is None:
            return
        events = await read_events(connection, READ_STREAM_PART, [payment_id, first, position])
        # Without any it was parked by hand, and there is nothing to apply.
        if not events or await self._apply_or_park(connection, events):
            await connection.execute(UNPARK, [self._follower, payment_id])

    async def _apply_or_park(
        self, connection: psycopg.AsyncConnection[Any], events: list[LogEntry]
    ) -> bool:
        """Applies the events, but parks the streams that cannot be; returns whether there is none.

        A batch that fails is halved until the culprits are alone, each part in a savepoint: stream
        by stream, one of them would make a large batch take longer than it may.
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
            "a stream is parked: `payments parked list`"
        )
        await connection.execute(PARK, [self._follower, first.payment_id, first.position, reason])


async def fetch_one(connection: psycopg.AsyncConnection[Any], query: str, params: list[Any]) -> Any:
    """The first column of the first row; None without one."""
    cursor = await connection.execute(query.encode(), params)
    row = await cursor.fetchone()
    return row[0] if row else None


def _is_the_events_fault(error: Exception) -> bool:
    """Whether it would fail again: not for a lost connection, a lock, or a full disk."""
    if isinstance(error, psycopg.Error):
        # SQLSTATE classes 22 and 23, and what psycopg itself refuses to send.
        return isinstance(error, psycopg.DataError | psycopg.IntegrityError)
    return not isinstance(error, OSError | MemoryError)


def _reason(error: Exception) -> str:
    """For people. Other messages than our own may quote what is in a row."""
    kind = type(error).__name__
    if isinstance(error, UndecodableEvent | UnexpectedEvent):
        return f"{kind}: {error}"[:500]
    if isinstance(error, psycopg.Error):
        names = (error.diag.table_name, error.diag.column_name, error.diag.constraint_name)
        return " ".join(part for part in (error.sqlstate, kind, *names) if part)
    *_, (frame, line) = traceback.walk_tb(error.__traceback__)
    return f"{kind} in {frame.f_code.co_qualname}, line {line}"
