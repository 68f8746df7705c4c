"""A projection that shows by itself whether an event was applied twice, never, or out of order."""

from collections.abc import Awaitable, Callable, Sequence
from typing import Any, Literal
from uuid import UUID

import psycopg

from payments.events.store import LogEntry

# `counted` says how often each event was applied, `applied` in which order.
SCHEMA = """
CREATE TABLE counted (position bigint PRIMARY KEY, n integer NOT NULL DEFAULT 1);
CREATE TABLE applied (seq bigserial PRIMARY KEY, position bigint, payment_id uuid, version bigint);
"""

COUNT = """
INSERT INTO counted (position) SELECT unnest(%s::bigint[])
    ON CONFLICT (position) DO UPDATE SET n = counted.n + 1
"""

LOG = """
INSERT INTO applied (position, payment_id, version)
SELECT * FROM unnest(%s::bigint[], %s::uuid[], %s::bigint[])
"""

Connection = psycopg.AsyncConnection[Any]
Place = Literal["before", "between", "after"]


class Counting:
    """`poison` looks at each event first and may raise; `step` is called around the two writes."""

    name = "payments"

    def __init__(
        self,
        *,
        poison: Callable[[LogEntry], None] | None = None,
        step: Callable[[Connection, Place], Awaitable[None]] | None = None,
    ) -> None:
        self.poison = poison
        self.step = step

    async def apply(self, connection: Connection, events: Sequence[LogEntry]) -> None:
        if self.poison is not None:
            for event in events:
                self.poison(event)
        positions = [event.position for event in events]
        await self._at("before", connection)
        await connection.execute(COUNT, [positions])
        await self._at("between", connection)
        streams = [event.payment_id for event in events]
        await connection.execute(LOG, [positions, streams, [event.version for event in events]])
        await self._at("after", connection)

    async def _at(self, place: Place, connection: Connection) -> None:
        if self.step is not None:
            await self.step(connection, place)


def applied(connection: psycopg.Connection[Any], stream: UUID | None = None) -> list[int]:
    """The positions that were applied, in the order in which that happened."""
    query = "SELECT position FROM applied WHERE payment_id = %s OR %s::uuid IS NULL ORDER BY seq"
    return [position for (position,) in connection.execute(query, [stream, stream])]


def position(connection: psycopg.Connection[Any]) -> int:
    row = connection.execute("SELECT position FROM followers WHERE name = 'payments'").fetchone()
    assert row is not None
    found: int = row[0]
    return found
