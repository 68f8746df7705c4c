"""Requests of every kind at once, each timed from its sending to its complete answer.

load = MixedLoad(port, dice)
async with load.running():
    ...
load.samples, load.charges, load.refunds
"""

import asyncio
import json
import random
import time
import uuid
from collections.abc import AsyncIterator, Awaitable, Callable, Collection
from contextlib import asynccontextmanager
from typing import Any, NamedTuple
from uuid import UUID

from payments.payment.identity import payment_id_for
from tests.crash.client import Caller
from tests.invariants.checker import ChargeAnswer, RefundAnswer
from tests.support import ORDER_ID

PAUSE_S = 0.04  # of each connection, between its requests: the machine must not be the limit
PROBE = "GET /health/live"
PROBE_PAUSE_S = 0.02
PROBE_NORMAL_S = 0.05  # what a probe may take before it counts as a stall
ANSWER_TIMEOUT_S = 15
AMOUNT_CENTS = 1000
UNAVAILABLE = ("database_unavailable", "too_busy")
REFUND_REFUSED = ("refund_exceeds_capture", "payment_already_refunded", "payment_not_refundable")


class Reply(NamedTuple):
    status: int
    headers: dict[str, str]
    body: bytes

    def json(self) -> Any:
        return json.loads(self.body)


class Sample(NamedTuple):
    """A request and what came of it. Times are of time.monotonic()."""

    label: str
    sent_at: float
    took_s: float
    outcome: str  # the status, and the problem's code if it has one
    fault: str  # why this is no answer to give at any time; empty if it may be given
    is_normal: bool  # whether it may be given while nothing is wrong

    @property
    def answered_at(self) -> float:
        return self.sent_at + self.took_s


class HttpCaller(Caller):
    """Any request, with the answer's headers."""

    async def send(
        self, method: str, path: str, body: Any = None, key: str | None = None
    ) -> Reply | None:
        """None if the connection broke before the answer was complete."""
        content = b"" if body is None else json.dumps(body).encode()
        head = [f"{method} {path} HTTP/1.1", "Host: x", f"Content-Length: {len(content)}"]
        head += ["Content-Type: application/json"] if content else []
        head += [f"Idempotency-Key: {key}"] if key else []
        try:
            async with asyncio.timeout(ANSWER_TIMEOUT_S):
                reader, writer = await self._connection()
                writer.write("\r\n".join([*head, "", ""]).encode() + content)
                return await _read(reader)
        except (OSError, EOFError):
            await self.close()
            return None


async def _read(reader: asyncio.StreamReader) -> Reply:
    lines = (await reader.readuntil(b"\r\n\r\n")).decode().split("\r\n")
    pairs = (line.partition(": ") for line in lines[1:] if line)
    headers = {name.lower(): value for name, _, value in pairs}
    body = await reader.readexactly(int(headers["content-length"]))
    return Reply(int(lines[0].split()[1]), headers, body)


class MixedLoad:
    """Some two dozen connections, each of which does one kind of thing again and again."""

    def __init__(self, port: int, dice: random.Random) -> None:
        self.samples: list[Sample] = []
        self.charges: list[ChargeAnswer] = []
        self.refunds: list[RefundAnswer] = []
        self.stalls: dict[str, list[tuple[float, float]]] = {"client": [], "service": []}
        self._port = port
        self._dice = dice
        self._stopped = False
        self._captured: list[str] = []  # keys
        self._charges_to_repeat: list[str] = []  # keys of charges that were refused with 503
        self._refunded: list[tuple[UUID, str]] = []  # payment and key
        self._refunds_to_repeat: list[tuple[UUID, str]] = []  # as for charges
        self._connections: tuple[tuple[Callable[[HttpCaller], Awaitable[None]], int], ...] = (
            (self._charge, 5),
            (self._charge_again, 3),
            (self._charge_after_503, 1),
            (self._refund, 4),
            (self._refund_again, 1),
            (self._refund_after_503, 1),
            (self._get, 2),
            (self._get_unknown, 1),
            (self._list, 2),
            (self._events, 2),
            (self._health, 2),
            (self._metrics, 2),
        )

    @asynccontextmanager
    async def running(self) -> AsyncIterator[None]:
        """All of it until the block ends; then the requests under way are waited for."""
        callers = [
            (what, HttpCaller(self._port)) for what, many in self._connections for _ in range(many)
        ]
        tasks = [asyncio.create_task(self._repeat(what, caller)) for what, caller in callers]
        probe = HttpCaller(self._port)
        tasks += [
            asyncio.create_task(self._watch_service(probe)),
            asyncio.create_task(self._watch_client()),
        ]
        try:
            yield
        finally:
            self._stopped = True
            await asyncio.gather(*tasks)
            for caller in (probe, *(caller for _, caller in callers)):
                await caller.close()

    def stalled_s(self, begin: float, end: float) -> float:
        """For how long of it this process or the service's did nothing at all: the machine is busy
        with others, and that is nobody's waiting."""
        return max(
            sum(max(0.0, min(stop, end) - max(start, begin)) for start, stop in stalls)
            for stalls in self.stalls.values()
        )

    async def _repeat(
        self, what: Callable[[HttpCaller], Awaitable[None]], caller: HttpCaller
    ) -> None:
        await asyncio.sleep(self._dice.random() * PAUSE_S)
        while not self._stopped:
            await what(caller)
            await asyncio.sleep(PAUSE_S * (0.5 + self._dice.random()))

    async def _watch_client(self) -> None:
        while not self._stopped:
            began_at = time.monotonic()
            await asyncio.sleep(PROBE_PAUSE_S)
            self._watched("client", began_at + PROBE_PAUSE_S)

    async def _watch_service(self, caller: HttpCaller) -> None:
        """/health/live looks at nothing: it takes as long as the service's event loop is busy."""
        while not self._stopped:
            sent_at = time.monotonic()
            reply = await caller.send("GET", "/health/live")
            self._watched("service", sent_at)
            self._sample(PROBE, sent_at, reply, {200}, {200})
            await asyncio.sleep(PROBE_PAUSE_S)

    def _watched(self, whose: str, began_at: float) -> None:
        ended_at = time.monotonic()
        if ended_at - began_at > PROBE_NORMAL_S:
            self.stalls[whose].append((began_at, ended_at))

    def _sample(
        self,
        label: str,
        sent_at: float,
        reply: Reply | None,
        normal: Collection[int],
        possible: Collection[int],
        codes: Collection[str] = (),
    ) -> None:
        """`codes` are those that a refusal other than 503 may have."""
        took_s = time.monotonic() - sent_at
        outcome, fault = _judged(reply, possible, codes)
        is_normal = not fault and reply is not None and reply.status in normal
        self.samples.append(Sample(label, sent_at, took_s, outcome, fault, is_normal))

    async def _charge(self, caller: HttpCaller) -> None:
        await self._charge_with("charge", caller, str(uuid.uuid4()))

    async def _charge_again(self, caller: HttpCaller) -> None:
        if self._captured:
            await self._charge_with("charge again", caller, self._dice.choice(self._captured))

    async def _charge_after_503(self, caller: HttpCaller) -> None:
        if self._charges_to_repeat:
            key = self._charges_to_repeat.pop()
            await self._charge_with("charge again after 503", caller, key)

    async def _charge_with(self, label: str, caller: HttpCaller, key: str) -> None:
        body = {"merchant_order_id": str(ORDER_ID), "amount_cents": AMOUNT_CENTS}
        sent_at = time.monotonic()
        reply = await caller.send("POST", "/v1/charge", body, key)
        self._sample(label, sent_at, reply, {201, 202}, {201, 202, 503})
        if reply is None or reply.status >= 300:
            self._charges_to_repeat.append(key)
            return
        told = reply.json()
        self.charges.append(ChargeAnswer(UUID(told["id"]), reply.status, told["status"]))
        if label == "charge" and reply.status == 201:
            self._captured.append(key)

    async def _refund(self, caller: HttpCaller) -> None:
        if self._captured:
            payment_id = payment_id_for(self._dice.choice(self._captured))
            await self._refund_with("refund", caller, payment_id, str(uuid.uuid4()))

    async def _refund_again(self, caller: HttpCaller) -> None:
        if self._refunded:
            await self._refund_with("refund again", caller, *self._dice.choice(self._refunded))

    async def _refund_after_503(self, caller: HttpCaller) -> None:
        if self._refunds_to_repeat:
            payment_id, key = self._refunds_to_repeat.pop()
            await self._refund_with("refund again after 503", caller, payment_id, key)

    async def _refund_with(
        self, label: str, caller: HttpCaller, payment_id: UUID, key: str
    ) -> None:
        body = {"payment_id": str(payment_id), "amount_cents": AMOUNT_CENTS // 10}
        sent_at = time.monotonic()
        reply = await caller.send("POST", "/v1/refund", body, key)
        normal = {201, 202, 409}
        self._sample(label, sent_at, reply, normal, {*normal, 503}, REFUND_REFUSED)
        if reply is None or reply.status == 503:
            self._refunds_to_repeat.append((payment_id, key))
        elif reply.status < 300:
            told = reply.json()
            refund_id, amount = UUID(told["refund_id"]), told["amount_cents"]
            self.refunds.append(RefundAnswer(payment_id, refund_id, reply.status, amount))
            if label == "refund" and reply.status == 201:
                self._refunded.append((payment_id, key))

    async def _get(self, caller: HttpCaller) -> None:
        if self._captured:
            payment_id = payment_id_for(self._dice.choice(self._captured))
            await self._read(caller, f"/v1/payments/{payment_id}", "GET payment")

    async def _events(self, caller: HttpCaller) -> None:
        if self._captured:
            payment_id = payment_id_for(self._dice.choice(self._captured))
            await self._read(caller, f"/v1/payments/{payment_id}/events", "GET events")

    async def _list(self, caller: HttpCaller) -> None:
        await self._read(caller, "/v1/payments?limit=5", "GET list")

    async def _get_unknown(self, caller: HttpCaller) -> None:
        """The order has payments: after the payment its order is looked for."""
        path = f"/v1/payments/{self._dice.choice([ORDER_ID, uuid.uuid4()])}"
        sent_at = time.monotonic()
        reply = await caller.send("GET", path)
        codes = ("payment_not_found",)
        self._sample("GET unknown payment", sent_at, reply, {404}, {404, 503}, codes)

    async def _health(self, caller: HttpCaller) -> None:
        sent_at = time.monotonic()
        reply = await caller.send("GET", "/health")
        self._sample("GET /health", sent_at, reply, {200}, {200, 503})

    async def _metrics(self, caller: HttpCaller) -> None:
        sent_at = time.monotonic()
        reply = await caller.send("GET", "/metrics")
        self._sample("GET /metrics", sent_at, reply, {200}, {200})

    async def _read(self, caller: HttpCaller, path: str, label: str) -> None:
        sent_at = time.monotonic()
        reply = await caller.send("GET", path)
        self._sample(label, sent_at, reply, {200}, {200, 503})


def _judged(
    reply: Reply | None, possible: Collection[int], codes: Collection[str]
) -> tuple[str, str]:
    """What was answered, and why that may not be; empty if it may."""
    if reply is None:
        return "nothing", "the connection broke"
    is_problem = reply.headers["content-type"].startswith("application/problem+json")
    code = reply.json()["code"] if is_problem else ""
    outcome = f"{reply.status} {code}".strip()
    if reply.status not in possible:
        return outcome, f"not a status to answer: {reply.body[:200]!r}"
    if reply.status >= 400 and is_problem:
        if reply.status == 503 and "retry-after" not in reply.headers:
            return outcome, "503 without Retry-After"
        if code not in (UNAVAILABLE if reply.status == 503 else codes):
            return outcome, f"not a code to answer: {reply.body[:200]!r}"
    elif reply.status >= 400 and b'"event_store"' not in reply.body:  # but for /health
        return outcome, f"not a problem+json: {reply.body[:200]!r}"
    return outcome, ""
