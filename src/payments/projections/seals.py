"""The seals of the log: one per event, each over its event and the seal before (events/chain.py).

Written after the commit, so that no append waits for it. What cannot be decoded is sealed like
anything else: nothing is parked here.
"""

import asyncio
from collections.abc import Sequence
from typing import Any

import psycopg

from payments.database.arrays import bigints, byteas
from payments.events.chain import GENESIS, seal
from payments.events.store import LogEntry

BATCH_MAX = 1000  # events; a larger one keeps the event loop for longer than a request should wait
YIELD_EVERY = 200  # events; in between the event loop serves requests

# After a position that is missing from the log the chain goes on from the seal before it. What
# somebody put behind the follower's position is not part of it.
SEAL_BEFORE = """
SELECT hash FROM log_seals WHERE position < %b ORDER BY position DESC LIMIT 1
"""

# The function is in migrations/0007_append.sql.
ADD_SEALS = """
SELECT add_log_seals(%b::bigint[], %b::bytea[])
"""


class SealsProjection:
    name = "seals"

    async def apply(
        self, connection: psycopg.AsyncConnection[Any], events: Sequence[LogEntry]
    ) -> None:
        """Seals these events; they follow what was sealed before."""
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
