"""A proxy in front of the test server that can lose replies, as a network does."""

import asyncio
import contextlib
import shutil
import tempfile
from pathlib import Path
from typing import Self

import msgspec

from payments.database.connections import DatabaseAddress

_READY_FOR_QUERY = b"Z\x00\x00\x00\x05I"  # sent after the commit


class ServerProxy:
    """Listens on a socket of its own; `address` leads through it."""

    def __init__(self, server: DatabaseAddress) -> None:
        self._directory = Path(tempfile.mkdtemp(prefix="proxy-"))
        self._target = f"{server.host}/.s.PGSQL.{server.port}"
        self.address = msgspec.structs.replace(server, host=str(self._directory))
        self.lost = 0
        self._lose = False
        self._connections: set[asyncio.Task[None]] = set()

    def lose_next_reply(self) -> None:
        """The server will do what it is asked next, and its answer will never arrive."""
        self._lose = True

    async def __aenter__(self) -> Self:
        path = str(self._directory / f".s.PGSQL.{self.address.port}")
        self._server = await asyncio.start_unix_server(self._serve, path)
        return self

    async def __aexit__(self, *_: object) -> None:
        self._server.close()
        for task in self._connections:
            task.cancel()
        await asyncio.gather(*self._connections, return_exceptions=True)
        shutil.rmtree(self._directory)

    async def _serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        task = asyncio.current_task()
        assert task is not None
        self._connections.add(task)
        task.add_done_callback(self._connections.discard)
        up_reader, up_writer = await asyncio.open_unix_connection(self._target)
        forward = asyncio.create_task(self._forward(reader, up_writer))
        try:
            await self._answer(up_reader, writer)
        finally:
            forward.cancel()
            for end in (writer, up_writer):
                end.close()

    async def _forward(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        with contextlib.suppress(ConnectionError):
            while data := await reader.read(65536):
                writer.write(data)
                await writer.drain()
        writer.close()

    async def _answer(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        with contextlib.suppress(ConnectionError):
            while data := await reader.read(65536):
                if self._lose:
                    while _READY_FOR_QUERY not in data:
                        data += await reader.read(65536)
                    self._lose = False
                    self.lost += 1
                    return
                writer.write(data)
                await writer.drain()
