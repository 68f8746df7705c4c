"""Callbacks: how many a second, and how soon after the charge's answer."""

import asyncio
import re
import time
import uuid
from contextlib import suppress
from datetime import UTC, datetime
from typing import Any, Self

import httpx
import msgspec
import psycopg
import uvloop
from eventsourcing.persistence import StoredEvent

from benchmarks.client_limit import SECRETS, SinkProcess
from benchmarks.load import Figures
from benchmarks.parts import Part
from benchmarks.process import ServerProcess
from payments.database.connections import Database
from payments.events.store import APPEND, append_params, to_stored_event
from payments.http_url import parse_http_url
from payments.observability.metrics import Telemetry
from payments.order_service.target import Target
from payments.payment.decisions import Cause, charge_outcome, initiate
from payments.payment.identity import ChargeRequest
from payments.payment.state import Approved, evolve
from payments.projections.callbacks import begin_at_the_end
from payments.service import build_dispatcher, build_followers
from payments.settings import Settings

APPENDS = 500  # in one statement
PER_S = 1500  # outcomes to be delivered for each second that a round is to take
LOW_RATE = 20  # charges a second

UNFINISHED = """
SELECT (SELECT count(*) FROM callback_deliveries WHERE state = 'due')
     + (SELECT max(notification_id) FROM payment_events)
     - (SELECT position FROM followers WHERE name = 'callbacks')
"""


class Callbacks(Part):
    """Outcomes of orders of their own that stand in the log: from there through the outbox and the
    dispatcher to a sink in another process, until all are recorded as delivered."""

    name = "callbacks"

    def __enter__(self) -> Self:
        super().__enter__()
        self._sink = SinkProcess()
        self._sink.start()
        self._delivered = 0
        return self

    def __exit__(self, *_: object) -> None:
        self._sink.stop()

    def run(self, seconds: float) -> Figures:
        outcomes = round(PER_S * seconds)
        uvloop.run(self._begin())
        self._append(outcomes)
        took_s = uvloop.run(self._deliver())
        self._delivered += outcomes
        durations = "SELECT seconds FROM callback_attempts ORDER BY claim DESC LIMIT %s"
        with psycopg.connect(self.address.conninfo("benchmarks")) as connection:
            rows = connection.execute(durations, [outcomes]).fetchall()
        return Figures.of([duration_s for (duration_s,) in rows], took_s)

    def remarks(self) -> list[str]:
        once = self.count("SELECT count(*) FROM callback_attempts WHERE outcome = 'delivered'")
        assert once == self._delivered, (once, self._delivered)
        return [f"{once:,} outcomes delivered, each once; p50 and p99 are those of the exchanges"]

    async def _begin(self) -> None:
        async with Database(self.address, 1) as database:
            await begin_at_the_end(database)

    def _append(self, outcomes: int) -> None:
        with psycopg.connect(self.address.conninfo("benchmarks"), autocommit=True) as connection:
            connection.execute("SET statement_timeout = 0")
            for start in range(0, outcomes, APPENDS):
                charges = [_charge() for _ in range(min(APPENDS, outcomes - start))]
                connection.execute(APPEND, append_params(charges))

    async def _deliver(self) -> float:
        """Seconds until nothing is due."""
        settings = Settings(
            order_callback_url=parse_http_url(self._sink.url), order_callback_secret=SECRETS
        )
        async with Database(self.address, 1) as database:
            dispatcher = build_dispatcher(
                settings, Target.of_callbacks(settings), database, Telemetry()
            )
            assert dispatcher is not None
            *_, follower = build_followers(settings, database, Telemetry(), dispatcher.wake)
            started = time.perf_counter()
            await dispatcher.start()
            follower.start()
            while (await database.fetch(UNFINISHED))[0][0]:
                await asyncio.sleep(0.02)
            took_s = time.perf_counter() - started
            await follower.stop()
            await dispatcher.stop(1)
        return took_s


def _charge() -> list[StoredEvent]:
    """A charge's two events, of an order of its own."""
    cause = Cause(
        event_id=uuid.uuid4(),
        occurred_at=datetime.now(UTC),
        client="default",
        request_id="benchmark",
    )
    request = ChargeRequest(
        idempotency_key=uuid.uuid4().hex,
        merchant_order_id=uuid.uuid4(),
        amount_cents=1500,
        currency="INR",
        client="default",
    )
    begun = initiate(request, "simulated", cause)
    payment = evolve(None, begun)
    outcome = Approved(
        id=payment.id, amount_cents=1500, currency="INR", provider_txn_id=f"sim_{payment.id.hex}"
    )
    charged = charge_outcome(payment, outcome, cause)
    assert charged is not None
    return [to_stored_event(begun), to_stored_event(charged)]


class CallbackDelay(Part):
    """From a charge's answer to its callback's arrival, few charges at a time; `per_s` is how many
    a second there were."""

    name = "callback_delay"

    def __enter__(self) -> Self:
        super().__enter__()
        self._arrived: dict[str, float] = {}
        self._runner = asyncio.Runner()  # one for all rounds: connections outlast them
        sink = self._runner.run(asyncio.start_server(_taking(self._arrived), "127.0.0.1", 0))
        url = "http://{}:{}/v1/payments/callback".format(*sink.sockets[0].getsockname())
        self._server = ServerProcess("charge", self.address, {"ORDER_CALLBACK_URL": url})
        self._server.start()
        return self

    def __exit__(self, *_: object) -> None:
        try:
            self._server.stop()
        finally:
            self._runner.close()

    def said(self) -> str:
        return self._server.said()

    def run(self, seconds: float) -> Figures:
        return self._runner.run(self._run(seconds))

    async def _run(self, seconds: float) -> Figures:
        arrived = self._arrived
        answered: dict[str, float] = {}
        url = f"http://127.0.0.1:{self._server.port}/v1/charge"
        began = time.monotonic()
        async with httpx.AsyncClient() as client:
            for number in range(max(2, round(LOW_RATE * seconds))):
                await asyncio.sleep(began + number / LOW_RATE - time.monotonic())
                order = {"merchant_order_id": str(uuid.uuid4()), "amount_cents": 1500}
                key = {"Idempotency-Key": uuid.uuid4().hex}
                response = await client.post(url, json=order, headers=key)
                answered[response.raise_for_status().json()["id"]] = time.monotonic()
        took_s = time.monotonic() - began
        while answered.keys() - arrived.keys():
            assert time.monotonic() < began + took_s + 30, "callbacks do not arrive"
            await asyncio.sleep(0.01)
        # A callback may come before the charge's answer does.
        delays = [max(0.0, arrived[payment] - at) for payment, at in answered.items()]
        return Figures.of(delays, took_s)


def _taking(arrived: dict[str, float]) -> Any:
    """Answers every request, and notes when each payment came first."""

    async def take(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        with suppress(asyncio.IncompleteReadError, ConnectionError, asyncio.CancelledError):
            while True:
                head = await reader.readuntil(b"\r\n\r\n")
                (length,) = re.findall(rb"(?i)content-length: *([0-9]+)", head)
                body = msgspec.json.decode(await reader.readexactly(int(length)))
                arrived.setdefault(body["payment_id"], time.monotonic())
                writer.write(b"HTTP/1.1 200 OK\r\nContent-Length: 0\r\n\r\n")

    return take
