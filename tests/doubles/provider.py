"""A payment provider as an HTTP process of its own, with a ledger that outlives it.

    python -m tests.doubles.provider --ledger FILE [--port N]

listens on 127.0.0.1 and prints its port as one line. It ends on SIGTERM, when its stdin is closed
(its parent is gone) and after LIFE_MAX_S. Tests use ProviderProcess.

    POST /charges          Idempotency-Key: our payment id; {"amount_cents", "currency", ...}
    GET  /charges/ID
    POST /refunds          Idempotency-Key: our refund id; {"charge_txn_id", "amount_cents", ...}
    GET  /refunds/ID

A charge is captured, or declined if its amount ends in 7; a refund is declined beyond the capture.
The answer is 200 with `status` captured, refunded or declined; 404 for an unknown id; 422 for a key
that was used with another body. A repeated key gets the first answer again.

The same provider can also charge in steps, by a reference of its own: provider_intents.py.

Each capture, money-out and decline is a Line of the ledger, written before its answer is.
"""

import argparse
import asyncio
import hashlib
import random
import signal
import socket
import struct
import sys
from contextlib import suppress
from pathlib import Path
from typing import Any, Literal

import msgspec

from tests.doubles.controlled import ControlledProcess
from tests.doubles.provider_intents import Intents
from tests.doubles.provider_ledger import Ledger, Line, Order, read_ledger

LIFE_MAX_S = 900.0
HOLD_MAX_S = 60.0
PORT_WAIT_S = 5.0  # a client's own port may stand where ours was

REASONS = {200: "OK", 307: "Temporary Redirect", 404: "Not Found", 422: "Unprocessable Content"}

Operation = Literal[
    "charge", "find_charge", "refund", "find_refund", "prepare", "cancel", "account"
]
ROUTES: dict[tuple[str, ...], Operation] = {
    ("POST", "charges"): "charge",
    ("GET", "charges", "ID"): "find_charge",
    ("POST", "refunds"): "refund",
    ("GET", "refunds", "ID"): "find_refund",
    ("POST", "intents"): "prepare",
    ("POST", "intents", "ID", "confirm"): "charge",
    ("GET", "intents", "ID"): "find_charge",
    ("POST", "intents", "ID", "cancel"): "cancel",
    ("GET", "account"): "account",
}

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
    operation: Operation | Literal["any"] = "any"
    count: int | None = 1
    probability: float = 1.0
    seed: int = 0
    seconds: float = 1.0
    location: str = ""


class Script:
    """The faults still to come, in order."""

    def __init__(self, faults: list[Fault]) -> None:
        self._faults = [(fault, random.Random(fault.seed)) for fault in faults]

    def take(self, operation: Operation, *kinds: str) -> Fault | None:
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


class Call(msgspec.Struct):
    """`id` is the idempotency key, or what the path names; `place` the path's first part."""

    operation: Operation
    place: str
    id: str
    body: bytes


class Provider:
    def __init__(self, ledger: Ledger, port: int) -> None:
        self._ledger = ledger
        self._intents = Intents(ledger)
        self._port = port
        self._server: asyncio.Server | None = None
        self._script = Script([])
        self._counts: dict[Operation, int] = dict.fromkeys(ROUTES.values(), 0)
        self._idle: set[asyncio.StreamWriter] = set()

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
        """One command of ProviderProcess."""
        match command["do"]:
            case "script":
                self._script = Script(msgspec.convert(command["faults"], list[Fault]))
            case "listen":
                await self.listen()
            case "refuse" if self._server is not None:
                self._server.close()
                self._server = None
                await self._close_idle()
            case "close_idle":
                await self._close_idle()
            case "made_by_customer":
                return self._intents.made_by_customer(command["amount_cents"], command["currency"])
            case "customer_acts":
                self._intents.customer_acts(command["payment_id"], declined=command["declined"])
            case "finish":
                self._intents.finish(command["payment_id"], declined=command["declined"])
        return self._counts

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
                if not await self._answer(await _call(head, reader), reader, writer):
                    break
        except (asyncio.IncompleteReadError, ConnectionError, asyncio.CancelledError):
            pass
        finally:
            self._idle.discard(writer)
            writer.close()

    async def _answer(
        self, call: Call | None, reader: asyncio.StreamReader, writer: asyncio.StreamWriter
    ) -> bool:
        """Whether the connection is kept."""
        if call is None:
            return await _send(writer, 404, {"error": "no_such_route"})
        self._counts[call.operation] += 1
        slow = self._script.take(call.operation, "slow")
        fault = self._script.take(call.operation) or Fault("slow", seconds=0)
        if fault.kind in NOTHING_DONE:
            return await _do_nothing(fault, reader, writer)
        forgotten = self._script.take(call.operation, "forgets_keys") is not None
        code = "declined_on_request" if fault.kind == "decline" else ""
        status, answer = self._do(call, forgotten, code)
        if slow is not None:
            await asyncio.sleep(slow.seconds)
        return await _send_faulty(fault, status, answer, writer)

    def _do(self, call: Call, forgotten: bool, code: str) -> tuple[int, dict[str, Any]]:
        if call.place == "account":
            return 200, {"id": self._ledger.account}
        if call.place == "intents":
            return self._intents.do(call.operation, call.id, call.body, forgotten, code)
        charging = call.place == "charges"
        known = self._ledger.charges if charging else self._ledger.refunds
        line = known.get(call.id)
        if call.operation in ("find_charge", "find_refund"):
            return (200, line.answer()) if line else (404, {"error": "not_found", "id": call.id})
        sha256 = hashlib.sha256(call.body).hexdigest()
        if line is None or forgotten:
            order = msgspec.json.decode(call.body, type=Order)
            decide = self._ledger.charge if charging else self._ledger.refund
            line = decide(call.id, order, sha256, code)
        elif line.body_sha256 != sha256:
            return 422, {"error": "key_used_with_another_body", "id": call.id}
        return 200, line.answer()


async def _call(head: bytes, reader: asyncio.StreamReader) -> Call | None:
    """The call, with its body read; None if there is no such route, or no key."""
    first, *rest = head.decode("latin-1").split("\r\n")
    method, path, _ = first.split(" ", 2)
    headers = {name.lower(): value.strip() for name, _, value in (h.partition(":") for h in rest)}
    body = await reader.readexactly(int(headers.get("content-length", 0)))
    _, place, *more = path.split("/")
    named, key = "".join(more[:1]), headers.get("idempotency-key", "")
    operation = ROUTES.get((method, place, *("ID" for _ in more[:1]), *more[1:]))
    if operation is None or (method == "POST" and not (named or key)):
        return None
    return Call(operation, place, named or key, body)


async def _do_nothing(
    fault: Fault, reader: asyncio.StreamReader, writer: asyncio.StreamWriter
) -> bool:
    match fault.kind:
        case "500" | "429":
            return await _send(writer, int(fault.kind), {"error": "scripted"})
        case "redirect":
            return await _send(writer, 307, {}, f"Location: {fault.location}\r\n")
        case "not_found_page":
            return await _send(writer, 404, b"<html>nothing here</html>")
        case "timeout":
            with suppress(TimeoutError):
                await asyncio.wait_for(reader.read(), HOLD_MAX_S)
        case "reset":
            _reset(writer)
    return False


async def _send_faulty(
    fault: Fault, status: int, answer: dict[str, Any], writer: asyncio.StreamWriter
) -> bool:
    """Answers for something that is done."""
    match fault.kind:
        case "500_after":
            return await _send(writer, 500, {"error": "scripted"})
        case "answer_lost":
            return False
        case "reset_after":
            _reset(writer)
            return False
        case "half_answer":
            whole = _response(status, msgspec.json.encode(answer))
            writer.write(whole[:-20])
            await writer.drain()
            return False
        case "drip":
            for byte in _response(status, msgspec.json.encode(answer)):
                writer.write(bytes((byte,)))
                await writer.drain()
                await asyncio.sleep(fault.seconds)
        case "garbage":
            return await _send(writer, 200, b"OK, got it")
        case "huge":
            return await _send(writer, status, answer | {"note": "x" * 100_000})
        case "wrong_amount":
            answer = answer | {"amount_cents": answer.get("amount_cents", 0) + 1}
        case "wrong_currency":
            answer = answer | {"currency": "JPY"}
        case "wrong_id":
            answer = answer | {"id": "00000000-0000-4000-8000-000000000000"}
    return await _send(writer, status, answer)


def _reset(writer: asyncio.StreamWriter) -> None:
    """RST instead of FIN."""
    linger = struct.pack("ii", 1, 0)
    writer.get_extra_info("socket").setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, linger)
    writer.transport.abort()


async def _send(
    writer: asyncio.StreamWriter, status: int, answer: dict[str, Any] | bytes, headers: str = ""
) -> bool:
    body = answer if isinstance(answer, bytes) else msgspec.json.encode(answer)
    writer.write(_response(status, body, headers))
    await writer.drain()
    return True


def _response(status: int, body: bytes, headers: str = "") -> bytes:
    reason = REASONS.get(status, "Internal Server Error")
    head = f"HTTP/1.1 {status} {reason}\r\nContent-Length: {len(body)}\r\n{headers}\r\n"
    return head.encode("latin-1") + body


def _say(line: str) -> None:
    sys.stdout.write(f"{line}\n")
    sys.stdout.flush()


async def _run(ledger: Path, port: int) -> None:
    provider = Provider(Ledger(ledger), port)
    loop = asyncio.get_running_loop()
    stop = asyncio.Event()
    loop.add_signal_handler(signal.SIGTERM, stop.set)
    commands = asyncio.StreamReader()
    await loop.connect_read_pipe(lambda: asyncio.StreamReaderProtocol(commands), sys.stdin)
    _say(str(await provider.listen()))

    async def obey() -> None:
        while command := await commands.readline():
            answer = await provider.control(msgspec.json.decode(command))
            _say(msgspec.json.encode(answer).decode())
        stop.set()

    obeying = asyncio.create_task(obey())
    with suppress(TimeoutError):
        await asyncio.wait_for(stop.wait(), LIFE_MAX_S)
    obeying.cancel()


class ProviderProcess(ControlledProcess):
    """The provider for a test. Its port and its ledger stay the same over restarts."""

    def __init__(self, ledger: Path, port: int = 0) -> None:
        self.path = ledger
        super().__init__("tests.doubles.provider", ["--ledger", str(ledger)], port)

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

    def made_by_customer(self, amount_cents: int, currency: str) -> str:
        """An intent that was made without us, as by a page of the provider; its reference."""
        return self._ask(str, do="made_by_customer", amount_cents=amount_cents, currency=currency)

    def customer_acts(self, payment_id: object, *, declined: bool = False) -> None:
        """What `action` asks for is done: the charge is ready, authorized or declined."""
        self._ask(Any, do="customer_acts", payment_id=str(payment_id), declined=declined)

    def finish(self, payment_id: object, *, declined: bool = False) -> None:
        """What is processing is captured, or declined."""
        self._ask(Any, do="finish", payment_id=str(payment_id), declined=declined)

    def counts(self) -> dict[Operation, int]:
        """Calls received since the process began, also those that met a fault."""
        return self._ask(dict[Operation, int], do="counts")

    def ledger(self, client_id: object = None) -> list[Line]:
        """All lines, or those with this id of ours."""
        lines = read_ledger(self.path)
        return [line for line in lines if client_id is None or line.id == str(client_id)]

    def captures(self, payment_id: object = None) -> list[Line]:
        return [line for line in self.ledger(payment_id) if line.kind == "capture"]

    def refunds(self, refund_id: object = None) -> list[Line]:
        return [line for line in self.ledger(refund_id) if line.kind == "refund"]


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m tests.doubles.provider")
    parser.add_argument("--ledger", type=Path, required=True)
    parser.add_argument("--port", type=int, default=0)
    arguments = parser.parse_args()
    asyncio.run(_run(arguments.ledger, arguments.port))


if __name__ == "__main__":
    main()
