"""The servers under test, each in a process of its own: `python -m benchmarks.process KIND …`."""

import asyncio
import os
import signal
import socket
import subprocess
import sys
import tempfile
import threading
import time
import uuid
from concurrent.futures import ThreadPoolExecutor
from contextlib import nullcontext
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import httpx
import msgspec
import psutil
import uvloop
from eventsourcing.application import Application
from eventsourcing.domain import Aggregate, event
from litestar.types import ASGIApp, Receive, Send
from loguru import logger
from prometheus_client import Counter, Gauge, Histogram
from uvicorn.protocols.http.httptools_impl import HttpToolsProtocol

from benchmarks.child import ROOT, ChildError
from payments.admission import Admission
from payments.commands import outcomes as recording
from payments.commands.charge import Charged, ChargePayment
from payments.commands.hints import Hints
from payments.commands.runs import Caller
from payments.database.connections import DatabaseAddress
from payments.gateways.building import build_gateways
from payments.observability.logs import set_up_logs
from payments.observability.metrics import Telemetry
from payments.payment.identity import ChargeRequest, fingerprint, payment_id_for
from payments.payment.state import Payment, Status
from payments.service import Service
from payments.setting_sources import read_settings
from payments.settings import Settings
from web import app
from web.serving import listening, server
from web.serving.guard import Guard

START_TIMEOUT_S = 60
STOP_TIMEOUT_S = 15
LOG_LINES = 10


class ServerProcess:
    def __init__(self, kind: str, address: DatabaseAddress, settings: dict[str, str]) -> None:
        self._kind = kind
        self._address = address
        self._settings = settings
        self._data_dir = tempfile.TemporaryDirectory(prefix="payments-benchmark-")

    def start(self) -> None:
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            self.port = int(probe.getsockname()[1])
        environment = os.environ | self._settings
        environment |= {"PORT": str(self.port), "PAYMENTS_DATA_DIR": self._data_dir.name}
        target = msgspec.json.encode(self._address).decode()
        self._log = Path(self._data_dir.name) / "log"
        with self._log.open("ab") as log:
            # Its stdin is a pipe that ends with this process, however that ends; Ctrl-C is for us.
            self._process = subprocess.Popen(
                [sys.executable, "-m", "benchmarks.process", self._kind, target],
                cwd=ROOT,
                env=environment,
                stdin=subprocess.PIPE,
                stderr=log,
                start_new_session=True,
            )
        try:
            self._wait_until_it_answers()
        except BaseException:
            self._end(signal.SIGKILL)
            raise

    def _wait_until_it_answers(self) -> None:
        deadline = time.monotonic() + START_TIMEOUT_S
        while True:
            if self._process.poll() is not None or time.monotonic() > deadline:
                raise ChildError(f"the server of {self._kind} does not start", self.said())
            try:
                httpx.get(f"http://127.0.0.1:{self.port}/health/live")
            except httpx.TransportError:
                time.sleep(0.05)
            else:
                return

    def stop(self) -> None:
        """ChildError if it has ended by itself, or not well."""
        try:
            self._end(signal.SIGTERM)
            if self._process.returncode:
                what = f"the server of {self._kind} ended with {self._process.returncode}"
                raise ChildError(what, self.said())
        finally:
            self._data_dir.cleanup()

    def _end(self, number: signal.Signals) -> None:
        self._process.send_signal(number)
        try:
            self._process.communicate(timeout=STOP_TIMEOUT_S)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.communicate()

    def said(self) -> str:
        """The last lines of its log."""
        return "\n".join(self._log.read_text(errors="replace").splitlines()[-LOG_LINES:])

    def cpu_s(self) -> float:
        """What it has used since its start."""
        times = psutil.Process(self._process.pid).cpu_times()
        return float(times.user + times.system)

    def resident_mb(self) -> float:
        return float(psutil.Process(self._process.pid).memory_info().rss) / 1e6


_COMMAND = ChargePayment(
    request=ChargeRequest(
        idempotency_key="k",
        merchant_order_id=uuid.uuid4(),
        amount_cents=1500,
        currency="INR",
        client="default",
    )
)


_NOWHERE = DatabaseAddress(host="127.0.0.1", port=1, user="-", password=None, dbname="-")


class _WithoutStore(Service):
    """The part of a Service that the routes of a charge and of a read need."""

    def __init__(self, settings: Settings) -> None:
        self.settings = settings
        self.telemetry = Telemetry()
        self.admission = Admission(settings.intent_queue_max, settings.gateway_concurrency_max)
        self.charging = self.runs = self.lookups = self  # type: ignore[assignment]
        self.database = None  # type: ignore[assignment]
        self.hints = Hints((), _NOWHERE, self.telemetry, settings)  # it opens no connection
        self._found = captured(_COMMAND)

    async def start(self, *, work: bool = True) -> None:
        pass

    async def find(self, payment_id: uuid.UUID, client: str | None = None) -> Payment:
        return msgspec.structs.replace(self._found, id=payment_id)

    async def stop(self, timeout_s: float) -> None:
        pass

    async def charge(self, command: ChargePayment, caller: Caller | None = None) -> Charged:
        return Charged(captured(command))

    def answer_all_within(self, within_s: float) -> None:
        pass

    def finish(self) -> None:
        pass


def captured(command: ChargePayment) -> Payment:
    """The payment of a captured charge, made the cheapest way."""
    request, now = command.request, datetime.now(UTC)
    payment_id = payment_id_for(request.idempotency_key)
    return Payment(
        id=payment_id,
        version=2,
        merchant_order_id=request.merchant_order_id,
        idempotency_key=request.idempotency_key,
        fingerprint=fingerprint(request),
        client=request.client,
        amount_cents=request.amount_cents,
        currency=request.currency,
        gateway="none",
        status=Status.SUCCESS,
        provider_txn_id=f"sim_{payment_id.hex}",
        created_at=now,
        updated_at=now,
    )


class LibraryPayment(Aggregate):
    @event("Initiated")
    def __init__(self, merchant_order_id: uuid.UUID, amount_cents: int, currency: str) -> None:
        self.merchant_order_id = merchant_order_id
        self.amount_cents = amount_cents
        self.currency = currency
        self.provider_txn_id = ""

    @event("Charged")
    def charged(self, provider_txn_id: str) -> None:
        self.provider_txn_id = provider_txn_id


class LibraryPayments(Application[uuid.UUID]):
    """Two durable saves per charge, as the service does, the way the library's documents show."""

    def charge(self, command: ChargePayment) -> Charged:
        request = command.request
        payment = LibraryPayment(request.merchant_order_id, request.amount_cents, request.currency)
        self.save(payment)
        payment.charged(f"sim_{payment.id.hex}")
        self.save(payment)
        return Charged(captured(command))


class _Library(_WithoutStore):
    def __init__(self, settings: Settings, address: DatabaseAddress) -> None:
        super().__init__(settings)
        self._application = LibraryPayments(
            env={
                "PERSISTENCE_MODULE": "eventsourcing.postgres",
                "POSTGRES_HOST": address.host,
                "POSTGRES_PORT": str(address.port),
                "POSTGRES_USER": address.user,
                "POSTGRES_PASSWORD": "",
                "POSTGRES_DBNAME": address.dbname,
            }
        )
        self._threads = ThreadPoolExecutor(32)

    async def charge(self, command: ChargePayment, caller: Caller | None = None) -> Charged:
        loop = asyncio.get_running_loop()
        return await loop.run_in_executor(self._threads, self._application.charge, command)


class _OnlyReads:
    """In the place of the guard: just what the routes need of it."""

    def __init__(self, app: ASGIApp, *_: object) -> None:
        self._app = app

    async def __call__(self, scope: Any, receive: Receive, send: Send) -> None:
        message: Any = {"more_body": True}
        body = b""
        while message.get("more_body"):
            message = await receive()
            body += message.get("body", b"")
        scope["state"] |= {"request_id": uuid.uuid4().hex, "traceparent": None, "body": body}
        await self._app(scope, receive, send)


def _unguarded_protocol(_: object, *args: Any, **kwargs: Any) -> Any:
    return HttpToolsProtocol(*args, **kwargs)


def strip() -> None:
    """Takes the guard, and our part of the protocol with its admission, out of this process."""
    app.Guard = _OnlyReads  # type: ignore[assignment, attr-defined]
    server.Protocol = _unguarded_protocol  # type: ignore[assignment, attr-defined]


def blind() -> None:
    """Takes metrics, logs and what they cost out of this process."""

    def nothing(*_: object, **__: object) -> None:
        pass

    Counter.inc = Histogram.observe = Gauge.set = nothing  # type: ignore[method-assign]
    Guard._count = nothing  # type: ignore[method-assign]
    without_context: Any = lambda *_, **__: nullcontext()  # noqa: E731
    type(logger).contextualize = without_context  # type: ignore[method-assign]
    recording.log_money = nothing  # type: ignore[attr-defined]
    logger.remove()


def build(kind: str, settings: Settings, address: DatabaseAddress) -> Any:
    if kind in ("floor_post", "floor_get"):
        return _WithoutStore(settings)
    if kind == "library":
        return _Library(settings, address)
    return Service(settings, address, gateways=build_gateways(settings))


def end_with_parent() -> None:
    """Stops this process as soon as whoever started it is gone."""

    def watch() -> None:
        os.read(sys.stdin.fileno(), 1)  # nothing is ever written
        os.kill(os.getpid(), signal.SIGTERM)

    threading.Thread(target=watch, name="watch of the parent", daemon=True).start()


def main(kind: str, target: str) -> None:
    end_with_parent()
    settings = read_settings(os.environ)
    set_up_logs(settings.log_format, settings.log_level)  # type: ignore[arg-type]
    listener = listening.bind(settings)
    if kind == "charge_bare":
        strip()
    if kind == "charge_blind":
        blind()

    async def run() -> None:
        address = msgspec.json.decode(target, type=DatabaseAddress)
        await server.serve(build(kind, settings, address), listener)

    uvloop.run(run())


if __name__ == "__main__":
    main(*sys.argv[1:])
