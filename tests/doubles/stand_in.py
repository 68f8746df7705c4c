"""What stand-ins of payment providers share: a process that speaks HTTP, its faults, its controls.

A stand-in listens on 127.0.0.1 and prints its port as one line. It ends on SIGTERM, when its stdin
is closed (its parent is gone) and after LIFE_MAX_S. It derives from StandIn and says what it does;
tests use a StandInProcess.
"""

import argparse
import asyncio
import random
import signal
import socket
import struct
import sys
from collections.abc import Callable, Mapping
from contextlib import suppress
from http import HTTPStatus
from pathlib import Path
from typing import Any, Literal, NamedTuple

import msgspec

from tests.doubles.controlled import ControlledProcess

LIFE_MAX_S = 7200.0  # longer than any test
HOLD_MAX_S = 60.0
PORT_WAIT_S = 5.0  # a client's own port may stand where ours was

FaultKind = Literal[
    # nothing is done
    "500",  # answers 500
    "429",
    "timeout",  # never answers
    "reset",  # RST
    "closed",  # an orderly close without an answer, as of a kept connection that was idle too long
    "redirect",  # 307 to `location`
    "not_found_page",  # 404 with a page, as of a misconfigured front server
    # it is done
    "500_after",
    "answer_lost",  # closes without an answer
    "reset_after",
    "slow",  # answers `seconds` later; another fault may come with it
    "drip",  # answers a byte every `seconds`
    "half_answer",
    "huge",  # sound, and 100 KB long
    "garbage",  # 200 without JSON
    "wrong_amount",  # in the answer only, as the next two
    "wrong_currency",
    "wrong_id",
    # another decision
    "decline",
    "forgets_keys",  # a repeated key is done again; another fault may come with it
]
NOTHING_DONE = {"500", "429", "timeout", "reset", "closed", "redirect", "not_found_page"}


class Fault(msgspec.Struct, omit_defaults=True):
    """What goes wrong with the next `count` matching calls (None: with all), each with this
    probability."""

    kind: FaultKind
    operation: str = "any"
    count: int | None = 1
    probability: float = 1.0
    seed: int = 0
    seconds: float = 1.0
    location: str = ""


class Script:
    """The faults still to come, in order."""

    def __init__(self, faults: list[Fault]) -> None:
        self._faults = [(fault, random.Random(fault.seed)) for fault in faults]

    def take(self, operation: str, *kinds: str) -> Fault | None:
        """The first that applies to this call and is one of `kinds` (any but the two that come
        with others, if none is named)."""
        for fault, dice in self._faults:
            wanted = fault.kind in kinds if kinds else fault.kind not in ("slow", "forgets_keys")
            if not wanted or fault.operation not in ("any", operation) or fault.count == 0:
                continue
            if fault.probability < 1 and dice.random() >= fault.probability:
                continue
            if fault.count is not None:
                fault.count -= 1
            return fault
        return None


class Call(NamedTuple):
    """A request. `target` is path and query; the names of `headers` are in lower case."""

    method: str
    target: str
    headers: dict[str, str]
    body: bytes

    @property
    def path(self) -> str:
        return self.target.partition("?")[0]


class Response(NamedTuple):
    """`body` is sent as JSON, bytes as they are."""

    status: int
    body: Any
    headers: Mapping[str, str] = {}


class StandIn:
    """What a stand-in is: its operations, and what each does."""

    def __init__(self, port: int) -> None:
        self._port = port
        self._server: asyncio.Server | None = None
        self._script = Script([])
        self._counts: dict[str, int] = {}
        self._idle: set[asyncio.StreamWriter] = set()

    def operation_of(self, call: Call) -> str | None:
        """The operation, as a Fault names it; None if there is no such route."""
        raise NotImplementedError

    def do(self, operation: str, call: Call, *, forgotten: bool, declined: bool) -> Response:
        """Does it, in one go. `forgotten`: as if its idempotency key were new. `declined`: declines
        it, if it is a charge or refund."""
        raise NotImplementedError

    def misstated(self, kind: str, body: Any) -> Any:
        """The body of a response for wrong_id, wrong_amount and wrong_currency."""
        raise NotImplementedError

    def not_found(self, call: Call) -> Response:
        """The response to a request that is no operation."""
        return Response(404, {"error": "no_such_route"})

    def command(self, command: dict[str, Any]) -> Any:
        """A command of the test that only this stand-in has; the result is sent back as JSON."""
        raise NotImplementedError

    async def listen(self) -> int:
        """Listens, on the same port each time; returns it."""
        deadline = asyncio.get_running_loop().time() + PORT_WAIT_S
        while self._server is None:
            try:
                self._server = await asyncio.start_server(
                    self._serve, "127.0.0.1", self._port, backlog=1024
                )
            except OSError:
                if asyncio.get_running_loop().time() > deadline:
                    raise
                await asyncio.sleep(0.05)
        self._port = self._server.sockets[0].getsockname()[1]
        return self._port

    async def control(self, command: dict[str, Any]) -> Any:
        """One command of StandInProcess."""
        match command["do"]:
            case "script":
                self._script = Script(msgspec.convert(command["faults"], list[Fault]))
            case "listen":
                await self.listen()
            case "refuse":
                if self._server is not None:
                    self._server.close()
                    self._server = None
                    await self._close_idle()
            case "close_idle":
                await self._close_idle()
            case "counts":
                return self._counts
            case _:
                return self.command(command)
        return None

    async def _close_idle(self) -> None:
        for writer in list(self._idle):
            writer.close()
            with suppress(ConnectionError):
                await writer.wait_closed()

    async def _serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        try:
            while self._server is not None:
                self._idle.add(writer)
                head = await reader.readuntil(b"\r\n\r\n")
                self._idle.discard(writer)
                if not await self._respond(await _call(head, reader), reader, writer):
                    break
        except (asyncio.IncompleteReadError, ConnectionError, asyncio.CancelledError):
            pass
        finally:
            self._idle.discard(writer)
            writer.close()

    async def _respond(
        self, call: Call, reader: asyncio.StreamReader, writer: asyncio.StreamWriter
    ) -> bool:
        """Whether the connection is kept."""
        operation = self.operation_of(call)
        if operation is None:
            return await _send(writer, self.not_found(call))
        self._counts[operation] = self._counts.get(operation, 0) + 1
        slow = self._script.take(operation, "slow")
        fault = self._script.take(operation) or Fault("slow", seconds=0)
        if fault.kind in NOTHING_DONE:
            return await _do_nothing(fault, reader, writer)
        response = self.do(
            operation,
            call,
            forgotten=self._script.take(operation, "forgets_keys") is not None,
            declined=fault.kind == "decline",
        )
        if slow is not None:
            await asyncio.sleep(slow.seconds)
        if fault.kind in ("wrong_amount", "wrong_currency", "wrong_id"):
            response = response._replace(body=self.misstated(fault.kind, response.body))
        return await _send_faulty(fault, response, writer)


async def _call(head: bytes, reader: asyncio.StreamReader) -> Call:
    first, *rest = head.decode("latin-1").split("\r\n")
    method, target, _ = first.split(" ", 2)
    headers = {name.lower(): value.strip() for name, _, value in (h.partition(":") for h in rest)}
    body = await reader.readexactly(int(headers.get("content-length", 0)))
    return Call(method, target, headers, body)


async def _do_nothing(
    fault: Fault, reader: asyncio.StreamReader, writer: asyncio.StreamWriter
) -> bool:
    match fault.kind:
        case "500" | "429":
            return await _send(writer, Response(int(fault.kind), {"error": "scripted"}))
        case "redirect":
            return await _send(writer, Response(307, {}, {"Location": fault.location}))
        case "not_found_page":
            return await _send(writer, Response(404, b"<html>nothing here</html>"))
        case "timeout":
            with suppress(TimeoutError):
                await asyncio.wait_for(reader.read(), HOLD_MAX_S)
        case "reset":
            _reset(writer)
    return False


async def _send_faulty(fault: Fault, response: Response, writer: asyncio.StreamWriter) -> bool:
    """Responds to something that is done."""
    match fault.kind:
        case "500_after":
            return await _send(writer, Response(500, {"error": "scripted"}))
        case "answer_lost":
            return False
        case "reset_after":
            _reset(writer)
            return False
        case "half_answer":
            writer.write(_encoded(response)[:-20])
            await writer.drain()
            return False
        case "drip":
            for byte in _encoded(response):
                writer.write(bytes((byte,)))
                await writer.drain()
                await asyncio.sleep(fault.seconds)
            return True
        case "garbage":
            return await _send(writer, Response(200, b"OK, got it"))
        case "huge":
            return await _send(
                writer, response._replace(body=response.body | {"note": "x" * 1_000_000})
            )
    return await _send(writer, response)


def _reset(writer: asyncio.StreamWriter) -> None:
    """RST instead of FIN."""
    linger = struct.pack("ii", 1, 0)
    writer.get_extra_info("socket").setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, linger)
    writer.transport.abort()


async def _send(writer: asyncio.StreamWriter, response: Response) -> bool:
    writer.write(_encoded(response))
    await writer.drain()
    return True


def _encoded(response: Response) -> bytes:
    body = response.body
    content = body if isinstance(body, bytes) else msgspec.json.encode(body)
    # A 204 has no body, and no length of one.
    headers = dict(response.headers)
    if response.status != HTTPStatus.NO_CONTENT:
        headers = {"Content-Length": str(len(content)), **headers}
    else:
        content = b""
    lines = "".join(f"{name}: {value}\r\n" for name, value in headers.items())
    reason = HTTPStatus(response.status).phrase
    return f"HTTP/1.1 {response.status} {reason}\r\n{lines}\r\n".encode("latin-1") + content


def _say(line: str) -> None:
    sys.stdout.write(f"{line}\n")
    sys.stdout.flush()


async def _run(stand_in: StandIn) -> None:
    loop = asyncio.get_running_loop()
    stop = asyncio.Event()
    loop.add_signal_handler(signal.SIGTERM, stop.set)
    commands = asyncio.StreamReader()
    await loop.connect_read_pipe(lambda: asyncio.StreamReaderProtocol(commands), sys.stdin)
    _say(str(await stand_in.listen()))

    async def obey() -> None:
        while command := await commands.readline():
            answer = await stand_in.control(msgspec.json.decode(command))
            _say(msgspec.json.encode(answer).decode())
        stop.set()

    obeying = asyncio.create_task(obey())
    with suppress(TimeoutError):
        await asyncio.wait_for(stop.wait(), LIFE_MAX_S)
    obeying.cancel()


def run(module: str, make: Callable[[Path, int], StandIn]) -> None:
    """`python -m MODULE --ledger FILE [--port N]`; the file is kept over restarts."""
    parser = argparse.ArgumentParser(prog=f"python -m {module}")
    parser.add_argument("--ledger", type=Path, required=True)
    parser.add_argument("--port", type=int, default=0)
    arguments = parser.parse_args()
    asyncio.run(_run(make(arguments.ledger, arguments.port)))


class StandInProcess(ControlledProcess):
    """A stand-in for a test. Its port and its ledger stay the same over restarts."""

    module: str

    def __init__(self, ledger: Path, port: int = 0) -> None:
        self.path = ledger
        super().__init__(self.module, ["--ledger", str(ledger)], port)

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.port}"

    def script(self, *faults: Fault) -> None:
        """These, instead of whatever was scripted before; none: no more faults."""
        self._ask(Any, do="script", faults=faults)

    def refuse(self) -> None:
        """Stops listening, and closes the connections that are idle."""
        self._ask(Any, do="refuse")

    def listen(self) -> None:
        self._ask(Any, do="listen")

    def close_idle(self) -> None:
        """Closes the connections that are idle, as a server does after its keep-alive time."""
        self._ask(Any, do="close_idle")

    def counts(self) -> dict[str, int]:
        """Calls received since the process began, by operation, also those that met a fault."""
        return self._ask(dict[str, int], do="counts")
