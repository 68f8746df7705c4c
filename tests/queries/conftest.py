"""Databases that can be watched, held up and frozen."""

import asyncio
import struct
from collections.abc import AsyncIterator, Mapping, Sequence
from contextlib import suppress
from typing import Any

import pytest

from payments.database.connections import READ_TIMEOUT_S, Database, DatabaseAddress
from payments.queries.lookups import PaymentLookups
from tests.proxy import ServerProxy


class Statement:
    """One statement that was asked for."""

    def __init__(self, query: str, params: Any, timeout_s: float) -> None:
        self.query = query
        self.params = params
        self.timeout_s = timeout_s

    @property
    def ids(self) -> int:
        """How many elements its first parameter has, which is an array in binary form."""
        return int(struct.unpack(">i", self.params[0][12:16])[0])


class WatchedDatabase(Database):
    """Notes every statement; while it is held, answers that have been read are kept back."""

    def __init__(self, address: DatabaseAddress, pool_max: int) -> None:
        super().__init__(address, pool_max)
        self.statements: list[Statement] = []
        self.failures: list[Exception] = []  # each fails one statement
        self.read = asyncio.Event()  # an answer has been read and is held
        self._let_go = asyncio.Event()
        self._let_go.set()

    def hold(self) -> None:
        self._let_go.clear()
        self.read.clear()

    def let_go(self) -> None:
        self._let_go.set()

    async def fetch(
        self,
        query: str,
        params: Sequence[Any] | Mapping[str, Any] = (),
        *,
        timeout_s: float = READ_TIMEOUT_S,
        prepare: bool | None = None,
    ) -> list[tuple[Any, ...]]:
        self.statements.append(Statement(query, params, timeout_s))
        rows = await super().fetch(query, params, timeout_s=timeout_s, prepare=prepare)
        self.read.set()
        await self._let_go.wait()
        if self.failures:
            raise self.failures.pop()
        return rows


class FreezingProxy(ServerProxy):
    """Between us and a server that stops answering without closing anything."""

    def __init__(self, server: DatabaseAddress) -> None:
        super().__init__(server)
        self.running = asyncio.Event()
        self.running.set()

    async def _answer(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        with suppress(ConnectionError):
            while data := await reader.read(65536):
                await self.running.wait()
                writer.write(data)
                await writer.drain()


@pytest.fixture(params=[1, 4], ids=["one connection", "four connections"])
async def watched(
    address: DatabaseAddress, request: pytest.FixtureRequest
) -> AsyncIterator[WatchedDatabase]:
    opened = WatchedDatabase(address, request.param)
    await opened.open()
    yield opened
    opened.let_go()
    await opened.close()


@pytest.fixture
def lookups(watched: WatchedDatabase) -> PaymentLookups:
    return PaymentLookups(watched)
