"""Servers for one endpoint: they write what a test likes, packet by packet."""

import asyncio
import ssl
import time
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager, suppress
from typing import Any

import pytest

from payments.http_url import parse_http_url
from payments.order_service.endpoint import Endpoint, Exchange
from payments.order_service.target import Target
from payments.setting_values import Network
from payments.webhook_secrets import parse_secrets

WAIT_S = 10.0
MESSAGE_ID = "058c9593-e150-402f-ab5b-37dd4c9816f0"
BODY = b'{"status":"SUCCESS"}'
OK = b"HTTP/1.1 200 OK\r\nContent-Length: 2\r\n\r\nOK"

Serving = Callable[[asyncio.StreamReader, asyncio.StreamWriter], Awaitable[None]]
Writing = Callable[["Server", asyncio.StreamWriter], Awaitable[None]]


@pytest.fixture(
    scope="module",
    params=[
        pytest.param(("asyncio", {}), id="asyncio"),
        pytest.param(("asyncio", {"use_uvloop": True}), id="uvloop"),
    ],
)
def anyio_backend(request: pytest.FixtureRequest) -> Any:
    """Both event loops: each hands over data, and ends connections, in its own way."""
    return request.param


@asynccontextmanager
async def listening(
    serve: Serving, *, host: str = "127.0.0.1", tls: ssl.SSLContext | None = None
) -> AsyncIterator[int]:
    """The port of a server whose connections are cut at the end."""
    handlers: set[asyncio.Task[None]] = set()

    async def handle(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        with suppress(asyncio.IncompleteReadError, OSError):  # the other side has gone
            await serve(reader, writer)

    def accept(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        handler = asyncio.create_task(handle(reader, writer))
        handlers.add(handler)
        # Not in the handler itself, which may be cancelled before it begins.
        handler.add_done_callback(lambda _: writer.transport.abort())

    server = await asyncio.start_server(accept, host, 0, ssl=tls)
    try:
        yield server.sockets[0].getsockname()[1]
    finally:
        server.close()
        for handler in handlers:
            handler.cancel()
        for ended in await asyncio.gather(*handlers, return_exceptions=True):
            if isinstance(ended, Exception):
                raise ended


class Server:
    """Takes requests, and answers each by `answer`; None: not at all."""

    def __init__(self, answer: Writing | bytes | None) -> None:
        self.answer = answer
        self.requests: list[bytes] = []
        self.connections = 0  # ever
        self.open = 0  # now
        self.written = 0  # bytes
        self.port = 0
        self.url = ""

    async def serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self.connections += 1
        self.open += 1
        try:
            while not writer.is_closing():
                head = await reader.readuntil(b"\r\n\r\n")
                length = head.lower().partition(b"content-length: ")[2].partition(b"\r")[0]
                self.requests.append(head + await reader.readexactly(int(length or 0)))
                if self.answer is None:
                    await reader.read()
                elif isinstance(self.answer, bytes):
                    await self.write(writer, self.answer)
                else:
                    await self.answer(self, writer)
        finally:
            self.open -= 1

    async def write(self, writer: asyncio.StreamWriter, data: bytes) -> None:
        writer.write(data)
        await writer.drain()
        self.written += len(data)


@asynccontextmanager
async def serving(
    answer: Writing | bytes | None, *, host: str = "127.0.0.1", tls: ssl.SSLContext | None = None
) -> AsyncIterator[Server]:
    server = Server(answer)
    async with listening(server.serve, host=host, tls=tls) as server.port:
        server.url = f"{'https' if tls else 'http'}://{host}:{server.port}"
        yield server


def then_close(*parts: bytes) -> Writing:
    """Writes the parts, in packets of their own, and closes the connection."""

    async def write(server: Server, writer: asyncio.StreamWriter) -> None:
        for part in parts:
            await server.write(writer, part)
            await asyncio.sleep(0.01)
        writer.close()

    return write


def endless(beginning: bytes, rest: bytes, pause_s: float = 0) -> Writing:
    async def write(server: Server, writer: asyncio.StreamWriter) -> None:
        await server.write(writer, beginning)
        while True:
            await server.write(writer, rest)
            await asyncio.sleep(pause_s)

    return write


@asynccontextmanager
async def endpoint_of(
    url: str, secrets: str | None = None, *, networks: tuple[Network, ...] = (), **options: Any
) -> AsyncIterator[Endpoint]:
    keys = parse_secrets(secrets) if secrets else ()
    target = Target(url=parse_http_url(url), keys=keys, networks=networks)
    endpoint = Endpoint(target, **({"timeout_s": WAIT_S} | options))
    await endpoint.open()
    try:
        yield endpoint
    finally:
        await endpoint.close()


async def post(endpoint: Endpoint, body: bytes = BODY) -> Exchange:
    return await endpoint.post(MESSAGE_ID, body, int(time.time()))


async def many(endpoint: Endpoint, count: int) -> list[Exchange]:
    """So many at once."""
    return await asyncio.gather(*(post(endpoint) for _ in range(count)))


async def exchange(answer: Writing | bytes | None, timeout_s: float = WAIT_S) -> Exchange:
    """One exchange with a server that answers so."""
    async with serving(answer) as server, endpoint_of(server.url, timeout_s=timeout_s) as endpoint:
        return await post(endpoint)
