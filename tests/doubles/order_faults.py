"""What goes wrong between Order Service and its caller, and how that looks on the wire."""

import asyncio
import functools
import random
import zlib
from collections.abc import Callable, Sequence
from http import HTTPStatus
from typing import Any, Literal
from uuid import UUID

import msgspec

from tests.doubles.order_connection import Connection

FaultKind = Literal[
    # nothing is done with the order
    "refused",  # from the moment it is scripted: nothing listens, idle connections are closed
    "reset",  # RST
    "closed",  # an orderly close without an answer
    "hang",  # never answers
    "500",
    "503",  # with `retry_after`, if there is one
    "429",  # as 503
    "502",  # the application's own, about one order
    "404",  # with a page, as of a misconfigured front server
    "410",
    "redirect",  # 307 to `location`
    "continues",  # "100 Continue" without end
    "big_head",  # header lines without end
    "garbage",  # not HTTP, then closed
    # it is done, and answered as usual (200, or 400 and 401 for what is rejected) but for this:
    "slow",  # the answer comes `seconds` later
    "answer_lost",  # closed without an answer
    "drip",  # the answer comes a byte every `seconds`, its head included
    "drip_body",  # the head comes at once, then a body of 1,000 bytes, a byte every `seconds`
    "bomb",  # with a body in gzip, 200 KB that inflate to 200 MB
    "endless",  # with a body without end
]
DONE = {"slow", "answer_lost", "drip", "drip_body", "bomb", "endless"}
STATUSES = {"500": 500, "502": 502, "503": 503, "429": 429, "404": 404, "410": 410, "redirect": 307}

FILLER = b"x" * 4096
BOMB_MB = 200


class Fault(msgspec.Struct, omit_defaults=True, forbid_unknown_fields=True):
    """What goes wrong with the next `count` requests (None: with all) of this order, or of any.

    With `shards` only those of the orders in one of so many, by their ids. With a `share` only that
    share of them; of several kinds each is met as often. Both are drawn from `seed`. "refused"
    stands by itself and takes none of these: it lasts until `listen()`.
    """

    kind: FaultKind | tuple[FaultKind, ...]
    count: int | None = 1
    order_id: str = ""
    of: Literal["callbacks", "lookups"] = "callbacks"
    shards: int = 1
    shard: int = 0
    share: float = 1.0
    seed: int = 0
    seconds: float = 1.0
    retry_after: str = ""  # as it is sent: "2", or a date
    location: str = ""
    proxy: bool = False  # a 500, 502, 503 or 429 comes with the page of a proxy, not with JSON

    @property
    def kinds(self) -> tuple[FaultKind, ...]:
        return (self.kind,) if isinstance(self.kind, str) else self.kind


class Script:
    """The faults still to come, in order."""

    def __init__(self, faults: Sequence[Fault]) -> None:
        for fault in faults:
            if "refused" in fault.kinds and fault != Fault("refused"):
                raise ValueError('"refused" stands by itself')
        self.refuses = Fault("refused") in faults
        if any("bomb" in fault.kinds for fault in faults):
            bomb()  # now, so that no request has to wait for it
        # Copies: what is left of a count is this script's alone.
        self._faults = [
            (msgspec.structs.replace(fault, order_id=fault.order_id.lower()), fault.kinds, dice)
            for fault in faults
            for dice in [random.Random(fault.seed)]
            if "refused" not in fault.kinds
        ]

    def take(
        self, order_id: str, of: Literal["callbacks", "lookups"] = "callbacks"
    ) -> tuple[Fault, FaultKind] | None:
        """The first that this order's request meets, with its `order_id`."""
        for fault, kinds, dice in self._faults:
            if fault.order_id not in ("", order_id) or fault.count == 0 or fault.of != of:
                continue
            if fault.shards > 1 and shard_of(order_id, fault.shards) != fault.shard:
                continue
            if fault.share < 1 and dice.random() >= fault.share:
                continue
            if fault.count is not None:
                fault.count -= 1
            met = msgspec.structs.replace(fault, order_id=order_id)
            return met, dice.choice(kinds) if len(kinds) > 1 else kinds[0]
        return None


def shard_of(order_id: str, shards: int) -> int | None:
    """From 0; None for what is no UUID."""
    try:
        return UUID(order_id).int % shards
    except ValueError:
        return None


def head(status: int, length: int | None, *headers: str) -> bytes:
    """With a cookie, to see who sends it back. Without a length the body is chunked."""
    framing = "Transfer-Encoding: chunked" if length is None else f"Content-Length: {length}"
    first = f"HTTP/1.1 {status} {HTTPStatus(status).phrase}"
    lines = (first, framing, "Set-Cookie: seen=1; Path=/", *headers, "", "")
    return "\r\n".join(lines).encode("latin-1")


JSON, HTML = "Content-Type: application/json", "Content-Type: text/html"
APPLICATION_ERROR = {"statusCode": 502, "message": "Seat allocation failed after payment"}

HeadSent = Callable[[int], None]  # to be told the status once a whole head was sent


def answer(
    connection: Connection, head_sent: HeadSent, status: int, body: bytes, *headers: str
) -> None:
    whole = head(status, len(body), *(headers or (JSON,))) + body
    _begin(connection, head_sent, status, whole)


def _begin(connection: Connection, head_sent: HeadSent, status: int, start: bytes) -> None:
    """Sends what includes the whole head."""
    if connection.is_open:
        connection.write(start)
        head_sent(status)


async def play(
    kind: FaultKind,
    fault: Fault,
    connection: Connection,
    head_sent: HeadSent,
    usual: tuple[int, bytes],
) -> bool:
    """Whether the connection is kept. `usual` is the answer's status and body."""
    status, body = usual
    match kind:
        case "slow":
            await asyncio.sleep(fault.seconds)
            answer(connection, head_sent, status, body)
            return True
        case "drip":
            *start, last = head(status, len(body), JSON)
            await _drip(connection, bytes(start), fault.seconds)
            _begin(connection, head_sent, status, bytes((last,)))
            await asyncio.sleep(fault.seconds)
            await _drip(connection, body, fault.seconds)
            return True
        case "drip_body":
            body = body.ljust(1000)
            _begin(connection, head_sent, status, head(status, len(body), JSON))
            await _drip(connection, body, fault.seconds)
            return True
        case "bomb":
            answer(connection, head_sent, status, bomb(), JSON, "Content-Encoding: gzip")
            await connection.drain()
            return True
        case "endless":
            _begin(connection, head_sent, status, head(status, None, JSON))
            await _repeat(connection, b"%x\r\n%b\r\n" % (len(FILLER), FILLER))
        case "continues":
            await _repeat(connection, b"HTTP/1.1 100 Continue\r\n\r\n")
        case "big_head":
            connection.write(b"HTTP/1.1 200 OK\r\n")
            await _repeat(connection, b"X-Filler: %b\r\n" % FILLER[:1000])
        case "garbage":
            connection.write(b"\x00\xff this is no HTTP\r\n\r\n")
        case "reset":
            connection.reset()
        case "hang":
            await connection.gone()
        case "closed" | "answer_lost":
            pass
        case _:
            answer(connection, head_sent, STATUSES[kind], *_refusal(kind, fault))
            return True
    return False


def _refusal(kind: FaultKind, fault: Fault) -> tuple[Any, ...]:
    """Body and headers."""
    if kind == "redirect":
        return b"", f"Location: {fault.location}"
    if kind == "404":
        return b"<html>nothing here</html>", HTML
    retry_after = [f"Retry-After: {fault.retry_after}"] if fault.retry_after else []
    if fault.proxy:
        return b"<html>the upstream is away</html>", HTML, *retry_after
    if kind == "502":
        return msgspec.json.encode(APPLICATION_ERROR | {"order_id": fault.order_id}), JSON
    return b'{"error":"scripted"}', JSON, *retry_after


async def _drip(connection: Connection, data: bytes, seconds: float) -> None:
    for byte in data:
        if not connection.is_open:
            return
        connection.write(bytes((byte,)))
        await asyncio.sleep(seconds)


async def _repeat(connection: Connection, data: bytes) -> None:
    """As fast as the other side takes it, until it is gone."""
    while connection.is_open:
        connection.write(data)
        await connection.drain()


@functools.cache
def bomb() -> bytes:
    packing = zlib.compressobj(9, wbits=31)
    megabyte = bytes(1 << 20)
    return b"".join(packing.compress(megabyte) for _ in range(BOMB_MB)) + packing.flush()
