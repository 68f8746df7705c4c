"""The seals of the log: one per event, each over its event and the previous seal (events/chain.py).

Written after the commit, so that no append waits for it. Undecodable events are sealed too: this
projection parks nothing.
"""

import asyncio
from collections.abc import Sequence
from typing import Any

import psycopg

from payments.database.arrays import bigints, byteas
from payments.events.chain import GENESIS, seal
from payments.events.store import LogEntry

BATCH_MAX = 1000  # events; a larger batch would block the event loop for too long
YIELD_EVERY = 200  # events; then the event loop can serve requests

# After a position that is missing from the log the chain continues from the previous seal. Seals
# that were inserted after the follower's position are ignored.
SEAL_BEFORE = """
SELECT hash FROM log_seals WHERE position < %b ORDER BY position DESC LIMIT 1
"""

# See add_log_seals in migrations/0007_append.sql.
ADD_SEALS = """
SELECT add_log_seals(%b::bigint[], %b::bytea[])
"""


class SealsProjection:
    name = "seals"

    async def apply(
        self, connection: psycopg.AsyncConnection[Any], events: Sequence[LogEntry]
    ) -> None:
        """Seals these events, which follow the last sealed one."""
        async with connection.cursor(binary=True) as cursor:
            await cursor.execute(SEAL_BEFORE.encode(), [events[0].position])
            row = await cursor.fetchone()
            previous = GENESIS if row is None else bytes(row[0])
            hashes = []
            for number, event in enumerate(events, 1):
                previous = seal(previous, event)
                hashes.append(previous)
                if number % YIELD_EVERY == 0:
                    await asyncio.sleep(0)
            positions = bigints([event.position for event in events])
            await cursor.execute(ADD_SEALS.encode(), [positions, byteas(hashes)])
