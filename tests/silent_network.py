"""A network between the service and its database that can swallow everything, without a word."""

import asyncio
import contextlib
from typing import Self

import msgspec

from payments.database.connections import DatabaseAddress


class SilentNetwork:
    """Listens on a port of 127.0.0.1; `address` leads through it to the server.

    While it is `silent`, whatever is sent is lost, and so is whatever comes later on a connection
    that was open then: as behind a firewall that has forgotten it. No end is told that the other
    one is gone.
    """

    def __init__(self, server: DatabaseAddress) -> None:
        self._target = server
        self.address = server
        self._links: set[asyncio.Task[None]] = set()
        self._is_silent = False
        self._open: list[_Link] = []

    async def __aenter__(self) -> Self:
        self._server = await asyncio.start_server(self._serve, "127.0.0.1", 0)
        port = self._server.sockets[0].getsockname()[1]
        self.address = msgspec.structs.replace(self._target, host="127.0.0.1", port=port)
        return self

    async def __aexit__(self, *_: object) -> None:
        self._server.close()
        for task in self._links:
            task.cancel()
        await asyncio.gather(*self._links, return_exceptions=True)

    def fall_silent(self) -> None:
        self._is_silent = True
        for link in self._open:
            link.is_dead = True

    def speak(self) -> None:
        """New connections work again."""
        self._is_silent = False

    async def _serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        task = asyncio.current_task()
        assert task is not None
        self._links.add(task)
        task.add_done_callback(self._links.discard)
        link = _Link(is_dead=self._is_silent)
        self._open.append(link)
        up_reader, up_writer = await asyncio.open_connection(self._target.host, self._target.port)
        try:
            await asyncio.gather(link.carry(reader, up_writer), link.carry(up_reader, writer))
        except asyncio.CancelledError:
            pass  # of a stream's own task asyncio would complain
        finally:
            self._open.remove(link)
            for end in (writer, up_writer):
                end.close()


class _Link:
    def __init__(self, *, is_dead: bool) -> None:
        self.is_dead = is_dead

    async def carry(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        with contextlib.suppress(ConnectionError):
            while data := await reader.read(65536):
                if not self.is_dead:
                    writer.write(data)
                    await writer.drain()
        if not self.is_dead:
            writer.close()
