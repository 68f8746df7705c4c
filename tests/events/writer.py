"""Appends events as fast as it can: `python -m tests.events.writer ADDRESS_JSON COUNT`."""

import asyncio
import sys

import msgspec

from payments.database.connections import Database, DatabaseAddress
from payments.events.appender import Appender
from payments.observability.metrics import Telemetry
from tests.support import stored_event

IN_FLIGHT = 50


async def write(address: DatabaseAddress, count: int) -> None:
    appender = Appender(Database(address, 1).connect, Telemetry(), intent_queue_max=1)
    appender.start()
    slots = asyncio.Semaphore(IN_FLIGHT)

    async def one() -> None:
        async with slots:
            await appender.append([stored_event()])

    await asyncio.gather(*(one() for _ in range(count)))
    await appender.stop(5)


if __name__ == "__main__":
    asyncio.run(write(msgspec.json.decode(sys.argv[1], type=DatabaseAddress), int(sys.argv[2])))
