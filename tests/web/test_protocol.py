"""Timers of a connection, made short: on a real one, in this process."""

import asyncio
import gc
import socket
import struct
import time
import weakref
from collections.abc import AsyncIterator
from typing import Any

import pytest

from tests.web.doors import door, listening, request
from tests.web.doors import received as all_received
from web.serving import slow_clients

pytestmark = pytest.mark.anyio

ANSWER = bytes(3_000_000)  # as large as the largest file that the service has
TIMEOUT_S = 0.3


async def app(scope: Any, receive: Any, send: Any) -> None:
    length = str(len(ANSWER)).encode()
    await send(
        {"type": "http.response.start", "status": 200, "headers": [(b"content-length", length)]}
    )
    await send({"type": "http.response.body", "body": ANSWER})


@pytest.fixture
async def client(monkeypatch: pytest.MonkeyPatch) -> AsyncIterator[socket.socket]:
    """It has asked; what it does not read stays in the server, but for the kernel's buffers."""
    monkeypatch.setattr(slow_clients, "WRITE_TIMEOUT_S", TIMEOUT_S)
    async with listening(door(), app) as server:
        with await server.connect(received_max=100_000) as opened:
            await asyncio.get_running_loop().sock_sendall(opened, request(b"/open"))
            yield opened


async def received(client: socket.socket, pause_s: float) -> int:
    """How many bytes come until the end of the connection, or of the answer."""
    loop, count = asyncio.get_running_loop(), 0
    try:
        while count < len(ANSWER) and (part := await loop.sock_recv(client, 100_000)):
            count += len(part)
            await asyncio.sleep(pause_s)
    except ConnectionResetError:
        pass
    return count


async def test_who_takes_an_answer_slowly_gets_all_of_it(client: socket.socket) -> None:
    started = time.monotonic()
    assert await received(client, pause_s=0.03) >= len(ANSWER)
    assert time.monotonic() - started > 3 * TIMEOUT_S


async def test_who_does_not_take_it_is_cut(client: socket.socket) -> None:
    await asyncio.sleep(3 * TIMEOUT_S)
    assert await received(client, pause_s=0) < len(ANSWER)


@pytest.mark.parametrize("is_reset", [False, True])
async def test_a_connection_that_is_over_is_kept_by_nobody(is_reset: bool) -> None:
    """It may hold much, and the collector comes seldom."""
    async with listening(door()) as server:
        client = await server.connect()
        gc.disable()
        try:
            await asyncio.get_running_loop().sock_sendall(client, request(b"/open"))
            await all_received(client, b"nobody")
            (kept,) = (weakref.ref(each) for each in server.connections)
            client.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", is_reset, 0))
            client.close()
            async with asyncio.timeout(3):
                while kept() is not None:
                    await asyncio.sleep(0.01)
        finally:
            gc.enable()
