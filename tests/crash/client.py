"""A caller of the service that is quick enough to race: raw HTTP on asyncio streams."""

import asyncio
import json
from collections.abc import Awaitable, Callable, Sequence
from typing import Any, NamedTuple, TypeVar
from uuid import UUID

from tests.support import ORDER_ID

ANSWER_TIMEOUT_S = 15
# Of each caller between its requests. What a kill meets counts, not how many requests there are,
# and the tests beside this one need the processors.
PAUSE_S = 0.02
T = TypeVar("T")


class Answer(NamedTuple):
    status: int
    body: dict[str, Any]
    raw: bytes


class Caller:
    """One keep-alive connection; a broken one is opened again."""

    def __init__(self, port: int) -> None:
        self._port = port
        self._streams: tuple[asyncio.StreamReader, asyncio.StreamWriter] | None = None

    async def charge(
        self, key: str, amount_cents: int = 1000, payment_method: str | None = None
    ) -> Answer | None:
        body: dict[str, Any] = {"merchant_order_id": str(ORDER_ID), "amount_cents": amount_cents}
        if payment_method is not None:
            body["payment_method"] = payment_method
        return await self.post("/v1/charge", body, key)

    async def refund(
        self, payment_id: UUID, amount_cents: int | None = None, key: str | None = None
    ) -> Answer | None:
        body: dict[str, Any] = {"payment_id": str(payment_id)}
        if amount_cents is not None:
            body["amount_cents"] = amount_cents
        return await self.post("/v1/refund", body, key)

    async def post(self, path: str, body: dict[str, Any], key: str | None) -> Answer | None:
        """None if the connection broke before the answer was complete."""
        content = json.dumps(body).encode()
        head = f"POST {path} HTTP/1.1\r\nHost: x\r\nContent-Type: application/json\r\n"
        head += f"Idempotency-Key: {key}\r\n" if key else ""
        head += f"Content-Length: {len(content)}\r\n\r\n"
        try:
            async with asyncio.timeout(ANSWER_TIMEOUT_S):
                reader, writer = await self._connection()
                writer.write(head.encode() + content)
                return await _read(reader)
        except (OSError, EOFError):
            await self.close()
            return None

    async def _connection(self) -> tuple[asyncio.StreamReader, asyncio.StreamWriter]:
        if self._streams is None:
            self._streams = await asyncio.open_connection("127.0.0.1", self._port)
        return self._streams

    async def close(self) -> None:
        if self._streams is not None:
            self._streams[1].close()
            self._streams = None


async def _read(reader: asyncio.StreamReader) -> Answer:
    head = (await reader.readuntil(b"\r\n\r\n")).decode().lower()
    length = int(head.partition("content-length: ")[2].partition("\r\n")[0])
    raw = await reader.readexactly(length)
    return Answer(int(head[9:12]), json.loads(raw), raw)


def race(ports: Sequence[int], callers: int, race_one: Callable[[list[Caller]], Awaitable[T]]) -> T:
    """Runs the coroutine with so many callers, spread over the ports."""

    async def main() -> T:
        all_callers = [Caller(ports[number % len(ports)]) for number in range(callers)]
        try:
            return await race_one(all_callers)
        finally:
            for caller in all_callers:
                await caller.close()

    return asyncio.run(main())
