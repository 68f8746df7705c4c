"""When a request came in, on real connections of this process: the loop stands still as if the
process was stopped, while bytes wait in the kernel."""

import asyncio
import socket
import time
from collections.abc import AsyncIterator
from typing import Any

import pytest

from payments.commands.runs import Caller
from tests.callbacks.raw_server import (
    anyio_backend,  # noqa: F401 - a fixture
)
from tests.machine import Machine, bound
from tests.support import until
from tests.web.doors import Listening, answer_client, door, listening, received, request
from web.serving.arrivals import CALLER

pytestmark = pytest.mark.anyio

STOPPED_S = 0.5
SOON_S = 0.25  # to start a task, or to read what came, on a busy machine


class Asked:
    """An application that keeps who asked, and answers once it may."""

    def __init__(self) -> None:
        self.callers: list[Caller] = []
        self.ages_s: list[float] = []
        self.may_answer = asyncio.Event()

    async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
        caller = scope["state"][CALLER]
        self.callers.append(caller)
        self.ages_s.append(time.monotonic() - caller.since)
        await self.may_answer.wait()
        await answer_client(scope, receive, send)

    async def age_s(self, number: int) -> float:
        await until(lambda: len(self.ages_s) > number)
        return self.ages_s[number]


@pytest.fixture
def asked() -> Asked:
    return Asked()


@pytest.fixture
async def server(asked: Asked) -> AsyncIterator[Listening]:
    async with listening(door(), asked) as opened:
        yield opened


async def send(client: socket.socket, data: bytes) -> None:
    await asyncio.get_running_loop().sock_sendall(client, data)


def stop(seconds: float = STOPPED_S) -> None:
    """As if the process was stopped: nothing is read."""
    ends_at = time.monotonic() + seconds
    while time.monotonic() < ends_at:
        pass


async def test_what_is_read_at_once_came_in_now(
    server: Listening, asked: Asked, machine: Machine
) -> None:
    await send(await server.connect(), request(b"/open"))
    bound(await asked.age_s(0), SOON_S, machine)


async def test_what_waited_to_be_read_came_in_before(
    server: Listening, asked: Asked, machine: Machine
) -> None:
    """Also the first of a connection that was not accepted yet, and of a client that is gone."""
    client, gone = await server.connect(), await server.connect()
    await asyncio.sleep(0.05)
    new = socket.create_connection(("127.0.0.1", server.port))
    for each in (client, gone, new):
        each.send(request(b"/open"))
    gone.close()
    new.close()
    stop()
    for number in range(3):
        assert await asked.age_s(number) + 0.01 >= STOPPED_S
        bound(await asked.age_s(number), STOPPED_S + SOON_S, machine)


async def test_a_head_in_two_parts_came_in_with_the_first(
    server: Listening, asked: Asked, machine: Machine
) -> None:
    client = await server.connect()
    await send(client, request(b"/open")[:10])
    await asyncio.sleep(STOPPED_S)
    await send(client, request(b"/open")[10:])
    assert await asked.age_s(0) > STOPPED_S - 0.05
    bound(await asked.age_s(0), STOPPED_S + SOON_S, machine)


async def test_waiting_behind_another_request_does_not_count(
    server: Listening, asked: Asked, machine: Machine
) -> None:
    """The second is read with the first, the third only once reading goes on."""
    client = await server.connect()
    await send(client, request(b"/open") * 2)
    await asked.age_s(0)
    await send(client, request(b"/open"))
    await asyncio.sleep(STOPPED_S)
    asked.may_answer.set()
    for number in (1, 2):
        bound(await asked.age_s(number), SOON_S, machine)


async def test_what_was_read_late_and_then_waits_behind_another(
    server: Listening, asked: Asked, machine: Machine
) -> None:
    client = await server.connect()
    await asyncio.sleep(0.05)
    client.send(request(b"/open") * 2)
    stop()
    await asked.age_s(0)
    await asyncio.sleep(STOPPED_S)
    asked.may_answer.set()
    assert await asked.age_s(1) + 0.01 >= STOPPED_S
    bound(await asked.age_s(1), STOPPED_S + SOON_S, machine)


async def test_a_client_that_will_send_no_more_is_there(server: Listening, asked: Asked) -> None:
    client = await server.connect()
    await send(client, request(b"/open"))
    client.shutdown(socket.SHUT_WR)
    await asked.age_s(0)
    await asyncio.sleep(0.1)
    assert not asked.callers[0].is_gone
    asked.may_answer.set()
    assert (await received(client)).startswith(b"HTTP/1.1 200")


async def test_a_connection_that_is_lost_takes_its_client_along(
    server: Listening, asked: Asked
) -> None:
    client = await server.connect()
    await send(client, request(b"/open"))
    await asked.age_s(0)
    client.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, bytes([1, 0, 0, 0, 0, 0, 0, 0]))
    client.close()
    await until(lambda: asked.callers[0].is_gone)
