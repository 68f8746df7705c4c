"""The receiving side of HTTP/1.1 with keep-alive, as far as callbacks need it."""

import asyncio
import re
import socket
import struct
from collections.abc import Callable
from typing import Any, NamedTuple, cast

HEAD_MAX = 64 * 1024
HEAD_END = b"\r\n\r\n"


class Received(NamedTuple):
    method: str
    path: str
    headers: dict[str, str]  # names in lower case, values of the same name joined by ", "
    body: bytes


class Connection(asyncio.Protocol):
    """Takes its client's requests one after another: `came(self, request)` is called with each, and
    the next is taken after `go_on()`. `ended(self)` is called when it is gone, whoever closed it.
    """

    def __init__(
        self,
        made: Callable[["Connection"], None],
        came: Callable[["Connection", Received], None],
        ended: Callable[["Connection"], None],
    ) -> None:
        self.number = -1
        self.is_open = False
        self.is_idle = True
        self.is_last = False  # closed after the next answer
        self._made = made
        self._came = came
        self._ended = ended
        self._buffer = bytearray()
        self._moved = asyncio.Event()  # the other side takes more, or is gone
        self._gone = asyncio.Event()

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self._transport = cast(asyncio.Transport, transport)
        self.is_open = True
        self._moved.set()
        self._made(self)

    def data_received(self, data: bytes) -> None:
        self._buffer += data
        if self.is_idle:
            self._take()

    def eof_received(self) -> None:
        """The client is gone: half-closed connections are not kept."""
        self.is_open = False

    def go_on(self) -> None:
        """The request is answered."""
        self.is_idle = True
        if self.is_last:
            self.close()
        else:
            self._take()

    def _take(self) -> None:
        end = self._buffer.find(HEAD_END)
        if not self.is_open or (end < 0 and len(self._buffer) < HEAD_MAX):
            return
        try:
            received, length = self._parse(end)
        except ValueError:  # or a head without end: no request of ours
            self.reset()
            return
        if received is not None:
            del self._buffer[:length]
            self.is_idle = False
            self._came(self, received)

    def _parse(self, end: int) -> tuple[Received | None, int]:
        """The first request and its length; none as long as its body is not there."""
        first, *lines = str(self._buffer[:end], "latin-1").split("\r\n")
        headers: dict[str, str] = {}
        for line in lines:
            name, _, value = line.partition(":")
            name, value = name.lower(), value.strip()
            headers[name] = f"{headers[name]}, {value}" if name in headers else value
        if "transfer-encoding" in headers:
            raise ValueError("a callback's body has a length")
        start = end + len(HEAD_END)
        length = start + int(headers.get("content-length", 0))
        if len(self._buffer) < length:
            return None, 0
        method, path, _ = first.split(" ")
        self.is_last |= headers.get("connection", "").lower() == "close"
        return Received(method, path, headers, bytes(self._buffer[start:length])), length

    def write(self, data: bytes) -> None:
        if self.is_open:
            self._transport.write(data)

    async def drain(self) -> None:
        """Until the other side takes more, or is gone. Others get a turn."""
        await asyncio.sleep(0)
        await self._moved.wait()

    async def gone(self) -> None:
        await self._gone.wait()

    def close(self) -> None:
        self.is_open = False
        self._transport.close()

    def abort(self) -> None:
        """At once, whatever was still to be sent."""
        self.is_open = False
        self._transport.abort()

    def reset(self) -> None:
        """RST instead of FIN."""
        linger = struct.pack("ii", 1, 0)
        plain: Any = self._transport.get_extra_info("socket")
        plain.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, linger)
        self.abort()

    def pause_writing(self) -> None:
        self._moved.clear()

    def resume_writing(self) -> None:
        self._moved.set()

    def connection_lost(self, error: Exception | None) -> None:
        self.is_open = False
        self._moved.set()
        self._gone.set()
        self._ended(self)


class Sink(Connection):
    """Answers whatever comes, and looks at no more of it than where it ends."""

    LENGTH = re.compile(rb"\r\ncontent-length: *(\d+)", re.IGNORECASE)
    ANSWER = b"HTTP/1.1 200 OK\r\nContent-Length: 0\r\n\r\n"

    def _take(self) -> None:
        while (end := self._buffer.find(HEAD_END)) >= 0:
            found = self.LENGTH.search(self._buffer, 0, end)
            length = end + len(HEAD_END) + (int(found[1]) if found else 0)
            if len(self._buffer) < length:
                return
            del self._buffer[:length]
            self.write(self.ANSWER)
            self._came(self, NOTHING)


NOTHING = Received("", "", {}, b"")
