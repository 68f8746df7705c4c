"""A door and the protocol behind it on a socket of this process: three paths, one client."""

import asyncio
import hashlib
import socket
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from functools import partial
from typing import Any

import uvicorn
from litestar import Litestar, get
from uvicorn.server import ServerState

from payments.admission import Admission
from payments.clients import ApiKey
from payments.errors import Unauthorized
from payments.observability.metrics import Telemetry
from tests.support import PATIENCE_S
from web.paths import Paths
from web.schema.description import Operation, described
from web.serving.answers import PreparedAnswer
from web.serving.door import Door, Known
from web.serving.protocol import Protocol

ALIVE = PreparedAnswer(200, b"alive", "text/plain")
KEY = b"Authorization: Bearer shop-key\r\n"
KEYED = Operation(id="keyed", tag="", description="", answers={}, problems=(Unauthorized,))

App = Callable[[Any, Any, Any], Any]


def request(
    target: bytes = b"/keyed", key: bytes = b"", more: bytes = b"", method: bytes = b"GET"
) -> bytes:
    return b"%s %s HTTP/1.1\r\nHost: x\r\n%s%s\r\n" % (method, target, key, more)


def door(
    telemetry: Telemetry | None = None,
    admission: Admission | None = None,
    known: Known | None = None,
) -> Door:
    """`known` is of /open."""

    @get("/open", sync_to_thread=False)
    def opened() -> None: ...

    @get("/alive", sync_to_thread=False)
    def alive() -> None: ...

    @get("/keyed", opt=described(KEYED), sync_to_thread=False)
    def keyed() -> None: ...

    return Door(
        Paths(Litestar([opened, alive, keyed], openapi_config=None)),
        (ApiKey("shop", hashlib.sha256(b"shop-key").digest()),),
        admission or Admission(10, 10),
        telemetry or Telemetry(),
        alive={"/alive": ALIVE},
        known={"/open": known} if known else {},
    )


async def answer_client(scope: Any, receive: Any, send: Any) -> None:
    """As whom a request came in, once it has all of it."""
    while (await receive()).get("more_body"):
        pass
    body = scope["state"].get("client", "nobody").encode()
    headers = [(b"content-length", str(len(body)).encode())]
    await send({"type": "http.response.start", "status": 200, "headers": headers})
    await send({"type": "http.response.body", "body": body})


class Listening:
    def __init__(self, door: Door, port: int, state: ServerState) -> None:
        self.door, self.admission = door, door._admission
        self.port = port
        self.clients: list[socket.socket] = []
        self.connections: set[Protocol] = state.connections  # type: ignore[assignment]

    async def connect(self, received_max: int | None = None) -> socket.socket:
        """It is closed at the latest when the server is."""
        client = socket.socket()
        self.clients.append(client)
        if received_max is not None:
            client.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, received_max)
        client.setblocking(False)
        await asyncio.get_running_loop().sock_connect(client, ("127.0.0.1", self.port))
        return client


@asynccontextmanager
async def listening(door: Door, app: App = answer_client) -> AsyncIterator[Listening]:
    config = uvicorn.Config(
        app, log_config=None, access_log=False, lifespan="off", ws="none", interface="asgi3"
    )
    config.load()
    state = ServerState()
    server = await asyncio.get_running_loop().create_server(
        partial(Protocol, door, config, state, {}), "127.0.0.1", 0
    )
    for listener in server.sockets:
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, 100_000)
    opened = Listening(door, server.sockets[0].getsockname()[1], state)
    try:
        yield opened
    finally:
        server.close()
        for client in opened.clients:
            client.close()
        for connection in list(state.connections):
            connection.transport.abort()
        await asyncio.sleep(0)


async def received(
    client: socket.socket, until: bytes | tuple[bytes, ...] = b"", within_s: float = PATIENCE_S
) -> bytes:
    """What comes, until it ends so, or the connection does."""
    data = b""
    async with asyncio.timeout(within_s):
        while not until or not data.endswith(until):
            part = await asyncio.get_running_loop().sock_recv(client, 100_000)
            if not part:
                break
            data += part
    return data


async def nothing_comes(client: socket.socket, for_s: float) -> bool:
    try:
        await received(client, b"\n", for_s)
    except TimeoutError:
        return True
    return False
