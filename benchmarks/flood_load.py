"""The processes of a flood: `python -m benchmarks.flood_load KIND …`. Each prints one JSON object.

listen                          a bare listener: every request is answered with 404. It prints its
                                port at once, and ends with its stdin
flood PORT SECONDS TARGET N [KEY]   N keep-alive connections that each ask again when they are
                                answered; with an API key or without
forge PORT SECONDS TARGET N BYTES   the same with POST, and a body of so many bytes
charge PORT SECONDS RATE KEY    charges with an API key at a fixed rate, in an open loop: a latency
                                runs from when the request was due
bombs PORT SECONDS KIND N       N connections that send large heads (see HEADS) and hold them
"""

import asyncio
import json
import socket
import sys
import time
import uuid
from collections import Counter
from collections.abc import Awaitable, Callable
from typing import Any, cast

import uvloop

from benchmarks.load import BODY

PATIENCE_S = 10.0

_NOT_FOUND = b'{"code":"not_found"}'
_ANSWER = b"HTTP/1.1 404 Not Found\r\ncontent-length: %d\r\n\r\n%s" % (len(_NOT_FOUND), _NOT_FOUND)


class Listener(asyncio.Protocol):
    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self._transport = cast(asyncio.Transport, transport)

    def data_received(self, data: bytes) -> None:
        self._transport.write(_ANSWER * data.count(b"\r\n\r\n"))


async def listen() -> dict[str, Any]:
    loop = asyncio.get_running_loop()
    server = await loop.create_server(Listener, "127.0.0.1", 0, backlog=2048)
    print(server.sockets[0].getsockname()[1], flush=True)
    await loop.run_in_executor(None, sys.stdin.read)
    return {}


class Caller(asyncio.Protocol):
    """One connection; `answered` is told of every answer's status, or 0 at the end."""

    def __init__(self, answered: Callable[["Caller", int], None]) -> None:
        self._answered = answered
        self._received = b""
        self.due = 0.0

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self.transport = cast(asyncio.Transport, transport)

    def data_received(self, data: bytes) -> None:
        self._received += data
        head, separator, body = self._received.partition(b"\r\n\r\n")
        if not separator:
            return
        at = head.lower().index(b"content-length: ") + 16
        if len(body) >= int(head[at:].partition(b"\r")[0]):
            self._received = b""
            self._answered(self, int(head[9:12]))

    def connection_lost(self, exc: Exception | None) -> None:
        self._answered(self, 0)


async def flood(
    port: str, seconds: str, target: str, connections: str, key: str = ""
) -> dict[str, Any]:
    loop, statuses = asyncio.get_running_loop(), Counter[int]()
    until = loop.time() + float(seconds)
    sent = f"Authorization: Bearer {key}\r\n" if key else ""
    request = f"GET {target} HTTP/1.1\r\nHost: localhost\r\n{sent}\r\n".encode()

    def answered(caller: Caller, status: int) -> None:
        statuses[status] += 1
        if status and loop.time() < until:
            caller.transport.write(request)

    for _ in range(int(connections)):
        _, caller = await loop.create_connection(lambda: Caller(answered), "127.0.0.1", int(port))
        caller.transport.write(request)
    await asyncio.sleep(until - loop.time())
    return {"statuses": statuses, "per_s": statuses.total() / float(seconds)}


async def forge(
    port: str, seconds: str, target: str, connections: str, size: str
) -> dict[str, Any]:
    """A connection that is closed is opened again: the rest of a body may not be read."""
    loop, statuses = asyncio.get_running_loop(), Counter[int]()
    until = loop.time() + float(seconds)
    head = f"POST {target} HTTP/1.1\r\nHost: localhost\r\nContent-Length: {size}\r\n\r\n"
    request = head.encode() + b"x" * int(size)

    async def one() -> None:
        closed = asyncio.Event()

        def answered(caller: Caller, status: int) -> None:
            if status:
                statuses[status] += 1
                if loop.time() < until:
                    caller.transport.write(request)
            else:
                closed.set()

        while loop.time() < until:
            closed.clear()
            _, caller = await loop.create_connection(
                lambda: Caller(answered), "127.0.0.1", int(port)
            )
            caller.transport.write(request)
            await closed.wait()

    forging = [asyncio.create_task(one()) for _ in range(int(connections))]
    await asyncio.wait(forging, timeout=float(seconds))
    return {"statuses": statuses, "per_s": statuses.total() / float(seconds)}


async def charge(port: str, seconds: str, rate: str, key: str) -> dict[str, Any]:
    loop, statuses = asyncio.get_running_loop(), Counter[int]()
    prefix, latencies = uuid.uuid4().hex, list[float]()
    idle: list[Caller] = []
    count = int(float(seconds) * float(rate))
    all_answered = loop.create_future()

    def answered(caller: Caller, status: int) -> None:
        if caller.due:
            statuses[status] += 1
            latencies.append(time.perf_counter() - caller.due)
            if statuses.total() == count:
                all_answered.set_result(None)
        caller.due = 0.0
        if status:
            idle.append(caller)
        elif caller in idle:
            idle.remove(caller)

    began = time.perf_counter()
    for number in range(count):
        due = began + number / float(rate)
        await asyncio.sleep(due - time.perf_counter())
        if not idle:
            _, new = await loop.create_connection(lambda: Caller(answered), "127.0.0.1", int(port))
            idle.append(new)
        caller = idle.pop()
        caller.due = due
        head = (
            "POST /v1/charge HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\n"
            f"Authorization: Bearer {key}\r\nIdempotency-Key: {prefix}-{number}\r\n"
            f"Content-Length: {len(BODY)}\r\n\r\n"
        )
        caller.transport.write((head + BODY).encode())
    await asyncio.wait({all_answered}, timeout=PATIENCE_S)
    return {"statuses": statuses, "latencies_s": latencies, "unanswered": count - len(latencies)}


def head(target: str, headers: int, size: int) -> bytes:
    """Of a charge, or of what is asked for; the body never comes."""
    line = f"POST {target} HTTP/1.1\r\nHost: localhost\r\nContent-Length: 9\r\n"
    return (line + f"a:{'b' * size}\r\n" * headers).encode()


# What a connection sends. The answer in `behind` is larger than what the kernel keeps of it, and is
# never read.
HEADS = {
    "many_headers": head("/v1/charge", 15_500, 0) + b"\r\n",
    "large_headers": head("/v1/charge", 97, 600) + b"\r\n",
    "half_heads": head("/v1/charge", 97, 600),
    "behind": b"GET /schema/swagger-ui-bundle.js HTTP/1.1\r\nHost: localhost\r\n\r\n"
    + b"GET /v1/payments HTTP/1.1\r\nHost: localhost\r\nX: %s\r\n\r\n" % (b"y" * 60_000) * 16,
}


async def bombs(port: str, seconds: str, kind: str, connections: str) -> dict[str, Any]:
    sent = 0
    clients = []
    for _ in range(int(connections)):
        client = socket.socket()
        client.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
        client.connect(("127.0.0.1", int(port)))
        client.setblocking(False)
        clients.append(client)
    left = dict.fromkeys(clients, HEADS[kind])
    until = time.monotonic() + float(seconds)
    while time.monotonic() < until:
        for client, data in list(left.items()):
            try:
                count = client.send(data)
            except BlockingIOError:
                continue
            except OSError:
                count = len(data)
            sent += count
            left[client] = data[count:]
            if not left[client]:
                del left[client]
        await asyncio.sleep(0.01)
    return {"sent": sent}


KINDS: dict[str, Callable[..., Awaitable[dict[str, Any]]]] = {
    "listen": listen,
    "flood": flood,
    "forge": forge,
    "charge": charge,
    "bombs": bombs,
}


async def main(kind: str, *arguments: str) -> None:
    print(json.dumps(await KINDS[kind](*arguments)))


if __name__ == "__main__":
    uvloop.run(main(*sys.argv[1:]))
