from collections.abc import AsyncIterator, Awaitable, Callable, Iterator
from contextlib import AsyncExitStack
from typing import Any

import pytest
from loguru import logger

from payments.database.connections import DatabaseAddress
from payments.gateways import Gateway, counted
from payments.service import Service
from payments.settings import Settings

Make = Callable[..., Awaitable[Service]]


@pytest.fixture
async def make(address: DatabaseAddress, monkeypatch: pytest.MonkeyPatch) -> AsyncIterator[Make]:
    """Starts services on one database; several of them stand for several processes.

    They follow and settle only if told to: `work=True`. A scripted provider that waits is waited
    for, however long the machine takes.
    """
    monkeypatch.setattr(counted, "GRACE_S", 60.0)
    async with AsyncExitStack() as stack:

        async def start(*gateways: Gateway, work: bool = False, **changed: Any) -> Service:
            service = Service(Settings(database_pool_max=1, **changed), address, gateways=gateways)
            await service.start(work=work)
            stack.push_async_callback(service.stop, 2)
            return service

        yield start


@pytest.fixture
def critical() -> Iterator[list[str]]:
    """The reasons of the lines that need manual intervention."""
    lines: list[str] = []

    def note(message: Any) -> None:
        lines.append(message.record["extra"].get("reason", ""))

    sink = logger.add(note, level="CRITICAL")
    yield lines
    logger.remove(sink)
