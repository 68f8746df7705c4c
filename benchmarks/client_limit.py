"""How many callbacks a process could send at the most: its client, and nothing else.

python -m benchmarks.client_limit       the sink alone; prints its port
"""

import asyncio
import subprocess
import sys
import time
import uuid
from datetime import UTC, datetime
from typing import Self, cast

import msgspec
import uvloop

from benchmarks.load import Figures
from benchmarks.parts import Part
from payments.callbacks.dispatcher import CONCURRENCY_MAX, CallbackBody
from payments.database.connections import DatabaseAddress
from payments.http_url import parse_http_url
from payments.order_service.endpoint import Endpoint
from payments.order_service.target import Target
from payments.webhook_secrets import parse_secrets

ANSWER = (
    b"HTTP/1.1 200 OK\r\nContent-Type: application/json\r\nContent-Length: 22\r\n\r\n"
    b'{"status":"CONFIRMED"}'
)
SECRETS = parse_secrets("whsec_MfKQ9r8GKYqrTwjUPD8ILPZIo2LaLaSw")


class SinkProcess:
    """Answers 200 to every request, in a process of its own."""

    def start(self) -> None:
        command = [sys.executable, "-m", "benchmarks.client_limit"]
        # Its stdin is a pipe that ends with this process, however that ends; Ctrl-C is for us.
        self._process = subprocess.Popen(
            command,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            start_new_session=True,
        )
        assert self._process.stdout is not None
        port = self._process.stdout.readline().strip()
        assert port, "the sink does not start"
        self.url = f"http://127.0.0.1:{port}/v1/payments/callback"

    def stop(self) -> None:
        self._process.kill()  # it has nothing to finish
        self._process.communicate(timeout=15)


class ClientLimit(Part):
    """64 tasks that post signed callbacks one after another, without database or dispatcher."""

    name = "client_limit"

    def __init__(self, server: DatabaseAddress) -> None:
        super().__init__(server)
        self._sink = SinkProcess()

    def __enter__(self) -> Self:
        self._sink.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._sink.stop()

    def run(self, seconds: float) -> Figures:
        return uvloop.run(self._run(seconds))

    async def _run(self, seconds: float) -> Figures:
        endpoint = Endpoint(
            Target(url=parse_http_url(self._sink.url), keys=SECRETS),
            connections_max=CONCURRENCY_MAX,
        )
        await endpoint.open()
        event_id = uuid.uuid4()
        body = msgspec.json.encode(
            CallbackBody(
                order_id=uuid.uuid4(),
                payment_id=uuid.uuid4(),
                status="SUCCESS",
                event_id=event_id,
                sequence=2,
                occurred_at=datetime.now(UTC),
                amount_cents=1500,
                currency="INR",
            )
        )
        latencies: list[float] = []
        errors = 0
        started = time.perf_counter()

        async def caller() -> None:
            nonlocal errors
            while time.perf_counter() - started < seconds:
                exchange = await endpoint.post(str(event_id), body, int(time.time()))
                latencies.append(exchange.seconds)
                errors += exchange.status != 200

        await asyncio.gather(*(caller() for _ in range(CONCURRENCY_MAX)))
        took = time.perf_counter() - started
        await endpoint.close()
        assert not errors, f"{errors} of {len(latencies)} were not delivered"
        return Figures.of(latencies, took)


class _Sink(asyncio.Protocol):
    """Reads a request as far as it must to find its end."""

    def __init__(self) -> None:
        self._received = b""

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self._transport = cast(asyncio.Transport, transport)

    def data_received(self, data: bytes) -> None:
        self._received += data
        while (end := self._received.find(b"\r\n\r\n")) > 0:
            head = self._received[:end].lower() + b"\r\n"
            length = int(head.partition(b"content-length: ")[2].partition(b"\r\n")[0])
            if len(self._received) < end + 4 + length:
                return
            self._received = self._received[end + 4 + length :]
            self._transport.write(ANSWER)


async def _serve() -> None:
    loop = asyncio.get_running_loop()
    server = await loop.create_server(_Sink, "127.0.0.1", 0)
    sys.stdout.write(f"{server.sockets[0].getsockname()[1]}\n")
    sys.stdout.flush()
    await loop.run_in_executor(None, sys.stdin.read)


if __name__ == "__main__":
    uvloop.run(_serve())
