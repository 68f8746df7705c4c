"""Order Service inside an event loop: it keeps orders, records every request, knows what was wrong
with them, and answers as badly as it is told to.

It answers POST /v1/payments/callback:

    200 {"ok":true}
    400 if order_id or payment_id is no UUID of version 4, or something is missing
    401 if it is not naive, has secrets, and the signature is missing or invalid
    404 for another path or method

and GET /v1/orders/{order_id}: 200 {"order_id":…,"status":…}, or 404. These are no requests of its
records: `lookups` has the order ids that were asked for.

What it does with orders: order_states.py; with a `seating`, the responses as well:
order_bookings.py. What it does as a client: order_sales.py. How it can fail: order_faults.py. What
it finds wrong: order_requests.py.
"""

import asyncio
import os
import shutil
import ssl
import time
from collections.abc import Coroutine
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, Self

import msgspec

from tests.doubles.order_bookings import Booking, Bookings, Purchase
from tests.doubles.order_connection import Connection, Received, Sink
from tests.doubles.order_faults import DONE, Fault, Script, answer, play
from tests.doubles.order_requests import CALLBACK_PATH, ORDERS_PATH, Request, findings, read_log
from tests.doubles.order_seats import Seating
from tests.doubles.order_states import (
    ACCEPTED,
    Callback,
    Orders,
    OrderState,
    Rejected,
    Verifier,
    check,
)

if TYPE_CHECKING:
    from tests.doubles.order_sales import Sales

PORT_WAIT_S = 5.0  # a client's own port may stand where ours was
WAIT_MAX_S = 10.0

UNKNOWN = 404, b'{"statusCode":404,"message":"there is no such order"}'
CERTIFICATE, KEY = "certificate.pem", "key.pem"

Stage = Literal["arrived", "finished", "accepted"]


class Options(msgspec.Struct, frozen=True, omit_defaults=True):
    naive: bool = True
    secrets: tuple[str, ...] = ()  # "whsec_" and base64; any of them will do
    issue_takes_s: float = 0.005  # between the look at an order and the issuing of its tickets
    log: Path | None = None  # of all requests: orders and requests outlive a restart, or a kill
    tls: Path | None = None  # a directory for a certificate that nobody trusts: then it is https
    # With seats, as the real one was measured: naive, and with no log to remember them.
    seating: Seating | None = None
    # Answers 200 to everything and only counts: a sink for measurements. Otherwise some 3 KB of
    # memory are kept of each request.
    bare: bool = False


TODAY = Options()


class OrderService:
    """In the event loop of the test:

    async with OrderService(Options(naive=False)) as orders:
        ... orders.url ...
        assert orders.findings() == []
    """

    def __init__(self, options: Options = TODAY, port: int = 0) -> None:
        self.port = port
        self.requests: list[Request] = []
        self.counts: dict[Stage, int] = {"arrived": 0, "finished": 0, "accepted": 0}
        self.connections = 0  # opened so far
        self.lookups: list[str] = []
        self._options = options
        self._orders: Orders | Bookings = Orders(
            naive=options.naive, issue_takes_s=options.issue_takes_s
        )
        if options.seating is not None:
            if options.log or not options.naive:
                raise ValueError("orders with seats are not remembered, and not careful")
            self._orders = Bookings(options.seating)
        self._sales: Sales | None = None
        self._verifier = Verifier(options.secrets)
        self._script = Script([])
        self._server: asyncio.Server | None = None
        self._tls = tls_context(options.tls) if options.tls else None
        self._open: dict[Connection, Request | None] = {}  # with what is under way
        self._answering: set[asyncio.Task[None]] = set()
        self._waiting: list[tuple[Stage, int, asyncio.Future[None]]] = []
        self._log = -1
        if options.log:
            self._remember(options.log)

    @property
    def url(self) -> str:
        return url_of(self._options, self.port)

    @property
    def orders(self) -> dict[str, OrderState]:
        """By order_id in lower case."""
        return self._orders.states

    @property
    def bookings(self) -> Bookings:
        assert isinstance(self._orders, Bookings), "it has no `seating`"
        return self._orders

    @property
    def book(self) -> dict[str, Booking]:
        """The orders with seats as they are now, by order_id in lower case."""
        return self.bookings.book()

    def seat(self, seating: Seating) -> None:
        """Seats are sold so from now on."""
        self.bookings.seats.seating = seating

    @property
    def sales(self) -> "Sales":
        """The client half, with an HTTP client that most tests need not load."""
        if self._sales is None:
            from tests.doubles.order_sales import Sales

            self._sales = Sales(self.bookings)
        return self._sales

    def sell(self, purchase: Purchase) -> bool:
        """Holds the seats and begins to charge; False if they are not for sale."""
        return self.sales.sell(purchase)

    async def __aenter__(self) -> Self:
        await self.listen()
        return self

    async def __aexit__(self, *_: object) -> None:
        await self.close()

    async def listen(self) -> int:
        """Listens, on the same port each time; returns it."""
        loop = asyncio.get_running_loop()
        deadline = loop.time() + PORT_WAIT_S
        while self._server is None:
            try:
                self._server = await loop.create_server(
                    self._connection, "127.0.0.1", self.port, backlog=1024, ssl=self._tls
                )
            except OSError:
                if loop.time() > deadline:
                    raise
                await asyncio.sleep(0.05)
        self.port = self._server.sockets[0].getsockname()[1]
        return self.port

    def refuse(self) -> None:
        """Stops listening, and closes connections: idle ones now, others after their answer."""
        if self._server is not None:
            self._server.close()
            self._server = None
        for connection in self._open:
            connection.is_last = True
        self.close_idle()

    def close_idle(self) -> None:
        """Closes the connections that are idle, as a server does after its keep-alive time."""
        for connection in list(self._open):
            if connection.is_idle:
                connection.close()

    def script(self, *faults: Fault) -> None:
        """These, instead of whatever was scripted before; none: no more faults.

        It does not listen again: that is `listen()`.
        """
        self._script = Script(faults)
        if self._script.refuses:
            self.refuse()

    def findings(self) -> list[str]:
        return findings(self.requests)

    async def wait_for(
        self, count: int, stage: Stage = "finished", timeout_s: float = WAIT_MAX_S
    ) -> None:
        """Until so many requests have come so far; TimeoutError."""
        if self.counts[stage] >= count:
            return
        entry = stage, count, asyncio.get_running_loop().create_future()
        self._waiting.append(entry)
        try:
            async with asyncio.timeout(timeout_s):
                await entry[-1]
        finally:
            self._waiting.remove(entry)

    async def close(self) -> None:
        """Ends what is under way, without an answer."""
        self.refuse()
        if self._sales is not None:
            await self._sales.close()
        open_, answering = list(self._open), list(self._answering)
        for connection in open_:
            connection.abort()
        for task in answering:
            task.cancel()
        await asyncio.gather(*answering, return_exceptions=True)
        for connection in open_:
            await connection.gone()
        if self._log >= 0:
            os.close(self._log)
            self._log = -1

    def _connection(self) -> Connection:
        kind = Sink if self._options.bare else Connection
        return kind(self._made, self._came, self._ended)

    def _made(self, connection: Connection) -> None:
        connection.number = self.connections
        connection.is_last = self._server is None
        self.connections += 1
        self._open[connection] = None

    def _came(self, connection: Connection, received: Received) -> None:
        if received.method == "GET" and received.path.startswith(ORDERS_PATH):
            self._begin(self._look_up(connection, received.path.removeprefix(ORDERS_PATH).lower()))
            return
        self.counts["arrived"] += 1
        if self._options.bare:
            return
        request = Request(
            number=len(self.requests),
            connection=connection.number,
            arrived=time.monotonic(),
            method=received.method,
            path=received.path,
            headers=received.headers,
            body=received.body,
            signature=self._verifier.check(received.headers, received.body),
        )
        met = self._script.take(request.order_id)
        if met is not None:
            request.fault = met[1]
        self.requests.append(request)
        self._open[connection] = request
        self._keep(request)
        self._begin(self._answer(request, connection, met))

    def _begin(self, answering: Coroutine[Any, Any, None]) -> None:
        task = asyncio.create_task(answering)
        self._answering.add(task)
        task.add_done_callback(self._answering.discard)

    async def _look_up(self, connection: Connection, order_id: str) -> None:
        def head_sent(status: int) -> None:
            pass

        self.lookups.append(order_id)
        shown = self._orders.shown(order_id)
        usual = UNKNOWN if shown is None else (200, msgspec.json.encode(shown))
        is_kept = True
        if (met := self._script.take(order_id, "lookups")) is None:
            answer(connection, head_sent, *usual)
        else:
            is_kept = await play(met[1], met[0], connection, head_sent, usual)
        connection.is_last |= not is_kept
        connection.go_on()

    def _ended(self, connection: Connection) -> None:
        request = self._open.pop(connection)
        if request is not None:
            self._finish(request)

    async def _answer(self, request: Request, connection: Connection, met: Any) -> None:
        def head_sent(status: int) -> None:
            request.status = status
            request.accepted = 200 <= status < 300

        usual = ACCEPTED
        if met is None or request.fault in DONE:
            usual = await self._do(request)
            self._keep(request)
        is_kept = True
        if met is None:
            answer(connection, head_sent, *usual)
        else:
            fault, kind = met
            is_kept = await play(kind, fault, connection, head_sent, usual)
        if self._open.get(connection) is request:
            self._open[connection] = None
            self._finish(request)
            connection.is_last |= not is_kept
            connection.go_on()

    async def _do(self, request: Request) -> tuple[int, bytes]:
        """The status and body of the answer."""
        try:
            callback = self._checked(request)
        except Rejected as rejected:
            request.effect, request.problem = "rejected", str(rejected)
            return rejected.status, msgspec.json.encode({"error": request.problem})
        request.effect = await self._orders.receive(callback)
        request.done = time.monotonic()
        return self._orders.response(callback.order_id, request.effect)

    def _checked(self, request: Request) -> Callback:
        if request.method != "POST" or request.path.partition("?")[0] != CALLBACK_PATH:
            raise Rejected(404, "there is no such route")
        if not self._options.naive and request.signature in ("missing", "invalid"):
            raise Rejected(401, f"the signature is {request.signature}")
        return check(request.content, naive=self._options.naive)

    def _finish(self, request: Request) -> None:
        request.finished = time.monotonic()
        self.counts["finished"] += 1
        self.counts["accepted"] += request.accepted
        self._keep(request)

    def _keep(self, request: Request) -> None:
        """Writes what became of a request to the log, and wakes who waits for it."""
        if self._log >= 0:
            line = msgspec.json.encode(request) + b"\n"
            assert os.write(self._log, line) == len(line)
        for stage, count, future in self._waiting:
            if self.counts[stage] >= count and not future.done():
                future.set_result(None)

    def _remember(self, path: Path) -> None:
        self._log = os.open(path, os.O_WRONLY | os.O_APPEND | os.O_CREAT, 0o600)
        self.requests = read_log(path)
        assert isinstance(self._orders, Orders)
        for request in sorted(self.requests, key=lambda request: request.done):
            if request.effect is not None and request.effect != "rejected":
                self._orders.apply(check(request.content, naive=True), request.effect)
            if request.finished is None:  # it ended with the process
                self._finish(request)
        self.counts = {
            "arrived": len(self.requests),
            "finished": len(self.requests),
            "accepted": sum(request.accepted for request in self.requests),
        }


def tls_context(directory: Path) -> ssl.SSLContext:
    """With the certificate for localhost and 127.0.0.1 in tests/doubles/tls, which nobody trusts:
    it is signed with its own key, and that is public. The directory gets a copy of both."""
    for name in (CERTIFICATE, KEY):
        shutil.copy(Path(__file__).with_name("tls") / name, directory / name)
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.load_cert_chain(directory / CERTIFICATE, directory / KEY)
    return context


def url_of(options: Options, port: int) -> str:
    return f"{'https' if options.tls else 'http'}://127.0.0.1:{port}{CALLBACK_PATH}"
