"""A load on keep-alive connections, by wrk if on PATH, else our own: charges with unique keys, or
reads of given paths."""

import asyncio
import re
import shutil
import statistics
import tempfile
import time
import uuid
from collections.abc import Sequence
from typing import Self, cast

import msgspec
import uvloop

from benchmarks.child import output_of

BODY = (
    '{"merchant_order_id": "f50d9fa2-5d3e-4e49-9a02-218ad32ef4a9", '
    '"amount_cents": 1500, "currency": "INR"}'
)

# wrk calls these; the key is unique by the run's prefix and a counter.
_WRK_CHARGES = """
local count = 0
wrk.method = "POST"
wrk.body = '%s'
wrk.headers["Content-Type"] = "application/json"
function request()
  count = count + 1
  wrk.headers["Idempotency-Key"] = "%s-" .. count
  return wrk.format()
end
"""

# The paths, one a line, are read from a file, in turn.
_WRK_READS = """
local paths, count = {}, 0
for path in io.lines("%s") do paths[#paths + 1] = path end
function request()
  count = count %% #paths + 1
  return wrk.format("GET", paths[count])
end
"""

_WRK_DONE = """
function done(summary, latency)
  io.write(string.format("RESULT %d %d %d %.3f %.3f\\n", summary.requests, summary.duration,
    summary.errors.status + summary.errors.connect + summary.errors.read + summary.errors.write
    + summary.errors.timeout, latency:percentile(50) / 1000, latency:percentile(99) / 1000))
end
"""


class Figures(msgspec.Struct, frozen=True):
    """One run: rate, latencies, how many 2xx answers, and how many others."""

    per_s: float
    p50_ms: float
    p99_ms: float
    answers: int
    errors: int = 0

    @classmethod
    def of(cls, latencies_s: list[float], took_s: float, errors: int = 0) -> Self:
        if len(latencies_s) < 2:
            raise ValueError(f"{len(latencies_s)} answers and {errors} errors give no figures")
        cuts = statistics.quantiles(latencies_s, n=100)
        count = len(latencies_s)
        return cls(count / took_s, cuts[49] * 1000, cuts[98] * 1000, count, errors)


class Load:
    def __init__(self, port: int, connections: int, paths: Sequence[str] = ()) -> None:
        """Reads `paths` in turn; without any it charges."""
        self._port = port
        self._connections = connections
        self._paths = paths
        self._prefix = uuid.uuid4().hex

    def run(self, seconds: float) -> Figures:
        if shutil.which("wrk"):
            return self._wrk(seconds)
        return uvloop.run(self._own(seconds))

    def _wrk(self, seconds: float) -> Figures:
        with (
            tempfile.NamedTemporaryFile("w", suffix=".lua") as script,
            tempfile.NamedTemporaryFile("w", suffix=".txt") as paths,
        ):
            paths.write("\n".join(self._paths))
            paths.flush()
            if self._paths:
                script.write(_WRK_READS % paths.name + _WRK_DONE)
            else:
                script.write(_WRK_CHARGES % (BODY, self._prefix) + _WRK_DONE)
            script.flush()
            told = output_of(
                [
                    *("wrk", "--threads=1", "--timeout=10s"),
                    *("--connections", str(self._connections)),
                    *("--duration", f"{max(1, round(seconds))}s"),
                    *("--script", script.name),
                    f"http://127.0.0.1:{self._port}/v1/charge",
                ],
                timeout_s=seconds + 60,
            )
        match = re.search(r"RESULT (\d+) (\d+) (\d+) ([0-9.]+) ([0-9.]+)", told)
        assert match, told
        requests, microseconds, errors = (int(match[number]) for number in (1, 2, 3))
        answers = requests - errors
        return Figures(
            answers / microseconds * 1e6, float(match[4]), float(match[5]), answers, errors
        )

    async def _own(self, seconds: float) -> Figures:
        loop = asyncio.get_running_loop()
        until = time.perf_counter() + seconds
        clients = [
            _Client(f"{self._prefix}-{n}", until, self._paths[n:] or self._paths)
            for n in range(self._connections)
        ]
        started = time.perf_counter()
        for client in clients:
            await loop.create_connection(client.itself, "127.0.0.1", self._port)
        async with asyncio.timeout(seconds + 60):  # as wrk has: a client that fails ends nothing
            await asyncio.gather(*(client.ended for client in clients))
        took = time.perf_counter() - started
        latencies = [latency for client in clients for latency in client.latencies]
        return Figures.of(latencies, took, sum(client.errors for client in clients))


class _Client(asyncio.Protocol):
    """One connection that sends the next request when the last one is answered."""

    def __init__(self, prefix: str, until: float, paths: Sequence[str]) -> None:
        self.latencies: list[float] = []
        self.errors = 0
        self.ended: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        self._prefix, self._until, self._paths = prefix, until, paths
        self._received = b""
        self._waits = False  # for an answer

    def itself(self) -> Self:
        """A protocol factory."""
        return self

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self._transport = cast(asyncio.Transport, transport)  # uvloop's own is no subclass
        self._send()

    def _send(self) -> None:
        self._sent_at = time.perf_counter()
        self._waits = True
        number = len(self.latencies) + self.errors
        if self._paths:
            path = self._paths[number % len(self._paths)]
            self._transport.write(f"GET {path} HTTP/1.1\r\nHost: localhost\r\n\r\n".encode())
            return
        head = (
            "POST /v1/charge HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\n"
            f"Idempotency-Key: {self._prefix}-{number}\r\n"
            f"Content-Length: {len(BODY)}\r\n\r\n"
        )
        self._transport.write((head + BODY).encode())

    def data_received(self, data: bytes) -> None:
        self._received += data
        head, separator, body = self._received.partition(b"\r\n\r\n")
        match = re.search(rb"content-length: (\d+)", head)
        if not separator or match is None or len(body) < int(match[1]):
            return
        self._waits = False
        if head.startswith(b"HTTP/1.1 2"):
            self.latencies.append(time.perf_counter() - self._sent_at)
        else:
            self.errors += 1
        self._received = b""
        if time.perf_counter() < self._until:
            self._send()
        else:
            self._transport.close()

    def connection_lost(self, exc: Exception | None) -> None:
        self.errors += self._waits
        if not self.ended.done():
            self.ended.set_result(None)
