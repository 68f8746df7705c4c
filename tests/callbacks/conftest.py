"""A log, its outbox, and a dispatcher whose endpoint the test plays itself."""

import asyncio
import time
from collections.abc import AsyncIterator, Callable, Iterator
from contextlib import asynccontextmanager
from typing import Any
from uuid import UUID, uuid4

import msgspec
import psycopg
import pytest
from loguru import logger

from payments.callbacks import dispatcher as dispatching
from payments.callbacks.breaker import Breaker
from payments.callbacks.dispatcher import Dispatcher
from payments.database.connections import Database
from payments.http_url import parse_http_url
from payments.observability.metrics import Telemetry
from payments.order_service import TIMEOUT_S
from payments.order_service.endpoint import Endpoint, Exchange
from payments.order_service.target import Target
from payments.projections.callbacks import begin_at_the_end
from tests.callbacks.outbox import Outbox


def answered(
    status: int,
    retry_after: str | None = None,
    answer: bytes = b"",
    content_type: str | None = None,
) -> Exchange:
    return Exchange(
        status=status,
        error=None,
        reason="",
        retry_after=retry_after,
        answer=answer,
        seconds=0.01,
        content_type=content_type,
    )


def failed(error: str = "unreachable", *, sent: bool = False) -> Exchange:
    return Exchange(
        status=None,
        error=error,
        reason="ConnectError",
        retry_after=None,
        answer=b"",
        seconds=0.01,
        sent=sent,
    )


class PlayedEndpoint(Endpoint):
    """Answers as the test says: `answer` is called with the decoded body of each request."""

    def __init__(self, timeout_s: float = TIMEOUT_S) -> None:
        super().__init__(Target(url=parse_http_url("http://127.0.0.1:1/")), timeout_s=timeout_s)
        self.answer: Callable[[dict[str, Any]], Exchange] = lambda body: answered(200)
        self.bodies: list[dict[str, Any]] = []
        self.held: asyncio.Event | None = None  # what begins meanwhile waits for it
        self.under_way: list[str] = []  # orders

    async def open(self) -> None:
        pass

    async def post(
        self, message_id: str, body: bytes, timestamp: int, traceparent: str | None = None
    ) -> Exchange:
        told = msgspec.json.decode(body)
        assert message_id == told["event_id"]
        assert told["order_id"] not in self.under_way, "two at once for one order"
        self.bodies.append(told)
        self.under_way.append(told["order_id"])
        try:
            await (self.held.wait() if self.held else asyncio.sleep(0))
            return self.answer(told)
        finally:
            self.under_way.remove(told["order_id"])

    async def close(self) -> None:
        pass

    @property
    def orders(self) -> list[str]:
        """Of each request, first to last."""
        return [body["order_id"] for body in self.bodies]

    def told(self, order_id: UUID | None = None) -> list[str]:
        """The statuses that were sent, of one order or of all."""
        return [b["status"] for b in self.bodies if order_id in (None, UUID(b["order_id"]))]


@pytest.fixture
async def outbox(database: Database, connection: psycopg.Connection[Any]) -> Outbox:
    await begin_at_the_end(database)
    return Outbox(database, connection)


@pytest.fixture
def endpoint() -> PlayedEndpoint:
    return PlayedEndpoint()


@pytest.fixture
def looks_often(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(dispatching, "POLL_S", 0.02)


@asynccontextmanager
async def dispatching_to(
    endpoint: PlayedEndpoint, outbox: Outbox, **options: Any
) -> AsyncIterator[Dispatcher]:
    """Without pauses between attempts, unless `rng` says otherwise."""
    defaults: dict[str, Any] = {
        "telemetry": Telemetry(),
        "retention_days": 90,
        "rng": lambda: 0.0,
    }
    dispatcher = Dispatcher(outbox.database.connect, endpoint, **defaults | options)
    await dispatcher.start()
    try:
        yield dispatcher
    finally:
        await dispatcher.stop(2)


def opened(open_s: float = 0.01) -> Breaker:
    """Open for so long, and then half open."""
    breaker = Breaker(orders_min=1, open_min_s=open_s, open_max_s=open_s)
    permit = breaker.begin(time.monotonic())
    assert permit is not None
    breaker.failed(permit, uuid4(), time.monotonic())
    return breaker


Line = tuple[str, str, dict[str, Any]]


@pytest.fixture
def lines() -> Iterator[list[Line]]:
    """What dispatchers logged from INFO on: level, message, fields."""
    logged: list[Line] = []

    def keep(message: Any) -> None:
        record = message.record
        logged.append((record["level"].name, record["message"], record["extra"]))

    handler = logger.add(keep, level="INFO", filter="payments.callbacks")
    yield logged
    logger.remove(handler)
