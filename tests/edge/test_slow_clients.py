"""Clients that hold their connections and send little or nothing, many at once."""

import asyncio
import math
import socket
import time
from collections.abc import Sequence
from contextlib import ExitStack, suppress
from typing import Any, NamedTuple

import psutil

from tests.edge.raw import Connection
from tests.edge.requests import charge, get
from tests.machine import Machine, bound, within
from tests.process import ServiceProcess
from tests.support import eventually

SLOW = 300  # half of them with their heads, half with their bodies
SILENT = 300
PAUSE_S = 0.47  # between two bytes of a slow one; none comes just when 5 s are over
CUT_AFTER_S = 8  # the limit is 5 s; they all come at once


class Cut(NamedTuple):
    """What a connection brought until the service closed it, and when that was."""

    received: bytes
    after_s: float


async def hold(port: int, at_once: bytes, slowly: bytes) -> Cut:
    started = time.monotonic()
    reader, writer = await asyncio.open_connection("127.0.0.1", port)
    writer.write(at_once)
    dripping = asyncio.create_task(drip(writer, slowly))
    received = b""
    try:
        async with asyncio.timeout(CUT_AFTER_S + 3):
            while some := await reader.read(1024):
                received += some
    except ConnectionResetError:  # a byte came after the end
        pass
    finally:
        dripping.cancel()
        writer.close()
    return Cut(received, time.monotonic() - started)


async def drip(writer: asyncio.StreamWriter, data: bytes) -> None:
    for byte in data:
        await asyncio.sleep(PAUSE_S)
        writer.write(bytes([byte]))


class Client:
    """Sends one request after another; the status and the seconds of each answer."""

    def __init__(self, port: int) -> None:
        self._port = port
        self.answers: list[tuple[int, float]] = []

    async def run(self, request: Any, pause_s: float) -> None:
        reader, writer = await asyncio.open_connection("127.0.0.1", self._port)
        try:
            while True:
                started = time.monotonic()
                writer.write(request())
                head = (await reader.readuntil(b"\r\n\r\n")).decode().lower()
                length = int(head.partition("content-length: ")[2].partition("\r\n")[0])
                await reader.readexactly(length)
                self.answers.append((int(head[9:12]), time.monotonic() - started))
                await asyncio.sleep(pause_s)
        finally:
            writer.close()


def p99(seconds: Sequence[float]) -> float:
    return sorted(seconds)[math.ceil(len(seconds) * 0.99) - 1]


async def besiege(port: int) -> tuple[list[Cut], list[Cut], list[Cut], Client, list[Client]]:
    """Slow heads, slow bodies and silent connections; and the clients that went on meanwhile."""
    health, charging = Client(port), [Client(port) for _ in range(4)]
    going_on = [asyncio.create_task(health.run(lambda: get(b"/health"), 0.01))]
    going_on += [asyncio.create_task(client.run(charge, 0.02)) for client in charging]
    request = charge()
    body_at = request.index(b"\r\n\r\n") + 4
    cuts = await asyncio.gather(
        *(hold(port, b"", request) for _ in range(SLOW // 2)),
        *(hold(port, request[:body_at], request[body_at:]) for _ in range(SLOW // 2)),
        *(hold(port, b"", b"") for _ in range(SILENT)),
    )
    for task in going_on:
        assert not task.done()
        task.cancel()
    await asyncio.gather(*going_on, return_exceptions=True)
    heads, bodies, silent = cuts[: SLOW // 2], cuts[SLOW // 2 : SLOW], cuts[SLOW:]
    return heads, bodies, silent, health, charging


def test_slow_and_silent_clients_are_cut_and_hold_up_nobody(edge: ServiceProcess) -> None:
    process = psutil.Process(edge.process.pid)
    assert edge.is_healthy()
    files, memory = process.num_fds(), process.memory_info().rss
    machine = Machine()
    heads, bodies, silent, health, charging = asyncio.run(besiege(edge.port))
    assert {cut.received for cut in (*heads, *silent)} == {b""}
    assert {cut.received[:12] for cut in bodies} == {b"HTTP/1.1 408"}
    cuts = [cut.after_s for cut in (*heads, *bodies, *silent)]
    assert min(cuts) > 4.5
    bound(max(cuts), CUT_AFTER_S, machine)
    assert {status for status, _ in health.answers} == {200}
    bound(p99([seconds for _, seconds in health.answers]), 1, machine)
    charges = [answer for client in charging for answer in client.answers]
    assert len(charges) > 100
    assert {status for status, _ in charges} == {201}
    bound(p99([seconds for _, seconds in charges]), 2, machine)
    with within(5):  # its pool of database connections may have grown
        eventually(lambda: process.num_fds() <= files + 8)
    assert process.memory_info().rss - memory < 30_000_000


DEAF = 20
LISTS = 200  # about 60 KB each: more than the sockets' buffers hold


def test_clients_that_never_read_are_cut(edge: ServiceProcess) -> None:
    """They ask for lists until the answers are stuck, and stay; others notice nothing."""
    process = psutil.Process(edge.process.pid)
    with Connection(edge.port) as connection:
        for _ in range(200):
            connection.send(charge())
            assert connection.answer() is not None
    files, memory = process.num_fds(), process.memory_info().rss
    with ExitStack() as stack:
        deaf = [stack.enter_context(socket.socket()) for _ in range(DEAF)]
        for client in deaf:
            client.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 2048)
            client.connect(("127.0.0.1", edge.port))
        for _ in range(LISTS // 8):
            for client in deaf:
                with suppress(OSError):
                    client.sendall(get(b"/v1/payments?limit=200") * 8)
            time.sleep(0.05)
        assert process.num_fds() >= files + DEAF

        def are_cut() -> bool:
            with within(1):
                assert edge.is_healthy()
            return process.num_fds() <= files + 8

        with within(9):
            eventually(are_cut)
    assert process.memory_info().rss - memory < 30_000_000
