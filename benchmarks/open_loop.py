"""An open load of charges: they are sent when they are due, whatever the answers do.

python -m benchmarks.open_loop --port 4004 --rate 8000 --seconds 3 --probes

Prints one JSON object, see Report. A latency runs from when the request was due, so a server that
makes its clients wait is not spared the requests that would have come meanwhile (coordinated
omission).

A load that begins at its full rate is at first a storm of new connections: each request opens one
while none is idle. --ramp lets the rate rise over some seconds, which count in the numbers of
requests and answers, and not in the figures.

One thread works in slices of SLICE_S on plain sockets, so figures are exact to that, and a rate of
20,000/s takes about half a core. lag_p99_ms is how late requests were sent: much more than some
slices means that this process did not get its turn, and the figures are its fault.
"""

import functools
import gc
import json
import math
import random
import resource
import select
import socket
import sys
import time
import uuid
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Self

import click
import msgspec

from benchmarks.child import output_of
from benchmarks.load import BODY

SLICE_S = 0.001
SENDS_MAX = 256  # in one slice, so that answers are read in between when the process is behind
PROBE_EVERY_S = 0.1
PROBED = ("/health", "/metrics")
PATIENCE_S = 10.0  # for answers after the last request; longer than a charge may take
FILES_SPARE = 100


class Latency(msgspec.Struct, frozen=True):
    count: int = 0
    p50_ms: float = 0
    p99_ms: float = 0
    max_ms: float = 0

    @classmethod
    def of(cls, seconds: Sequence[float]) -> Self:
        if not seconds:
            return cls()
        ordered = sorted(seconds)
        return cls(len(ordered), *(_ms(ordered, share) for share in (0.5, 0.99, 1)))


class Probe(msgspec.Struct, frozen=True):
    """What became of the requests for one path that is never refused."""

    statuses: dict[str, int]
    codes: dict[str, int]  # as in Report
    latency: Latency
    unanswered: int


class Report(msgspec.Struct, frozen=True):
    """One run. Requests: offered = sent + unsent, sent = answers + dropped + unanswered.

    They count from the first one; goodput and latencies from when the full rate was reached.
    """

    rate: float
    seconds: float  # at the full rate
    offered: int
    sent: int
    unsent: int  # no connection was left for them
    dropped: int  # the connection was refused or ended before the answer
    unanswered: int  # after PATIENCE_S
    statuses: dict[str, int]
    codes: dict[str, int]  # of problems: every answer but 2xx
    goodput_per_s: float  # 2xx that came before the last request was due
    accepted: Latency  # 2xx
    refused: Latency  # 503
    without_retry_after: int  # of the refused
    connections: int  # opened
    lag_p99_ms: float
    took_s: float  # until the last answer
    cpu_s: float  # of this process, in that time
    probes: dict[str, Probe]

    @property
    def answered_2xx(self) -> int:
        return sum(count for status, count in self.statuses.items() if status[0] == "2")


def drive(
    port: int,
    rate: float,
    seconds: float,
    *,
    ramp_s: float = 0,
    probes: bool = True,
    keys: Path | None = None,
) -> Report:
    """Runs the load in a process of its own, so that the caller's work does not disturb it.

    With `keys` the Idempotency-Key of every 2xx is written to that file, one a line.
    """
    command = [sys.executable, "-m", "benchmarks.open_loop", "--port", str(port)]
    command += ["--rate", str(rate), "--seconds", str(seconds), "--ramp", str(ramp_s)]
    command += ["--probes"] * probes
    command += ["--keys", str(keys)] if keys else []
    told = output_of(command, timeout_s=ramp_s + seconds + PATIENCE_S + 30)
    return msgspec.json.decode(told, type=Report)


class _Requests:
    """Requests of one kind: when they are due, and what became of them."""

    def __init__(self, due: Sequence[float], head: bytes, tail: bytes) -> None:
        self.due = due  # seconds from when the full rate is reached, ascending
        self.head, self.tail = head, tail  # the number of the request comes between
        self.next = 0
        self.idle: list[_Connection] = []
        self.unsent = self.dropped = self.open = 0
        self.statuses: Counter[str] = Counter()
        self.codes: Counter[str] = Counter()
        self.latencies: dict[str, list[float]] = {}  # by status
        self.without_retry_after = 0
        self.in_time = 0  # 2xx before the end
        self.accepted: list[int] = []

    @property
    def answered(self) -> int:
        return self.statuses.total()

    @property
    def is_over(self) -> bool:
        over = self.answered + self.dropped + self.unsent
        return self.next == len(self.due) == over

    def answer(self, number: int, latency_s: float, status: str, head: bytes, body: bytes) -> None:
        self.statuses[status] += 1
        if self.due[number] >= 0:
            self.latencies.setdefault(status, []).append(latency_s)
        if status[0] == "2":
            self.accepted.append(number)
            return
        self.codes[_code(body)] += 1
        if status == "503" and b"\r\nretry-after: " not in head:
            self.without_retry_after += 1


class _Connection:
    __slots__ = ("due", "fileno", "number", "received", "requests", "socket", "waiting")

    def __init__(self, requests: _Requests, port: int) -> None:
        self.requests = requests
        self.socket = socket.socket()
        self.socket.setblocking(False)
        self.socket.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        self.socket.connect_ex(("127.0.0.1", port))
        self.fileno = self.socket.fileno()
        self.received = b""
        self.waiting = b""  # what is sent once it is connected
        self.number = -1  # of the request under way; none: -1
        self.due = 0.0


class OpenLoop:
    def __init__(self, port: int, connections_max: int) -> None:
        self._port = port
        self._connections_max = connections_max
        self._epoll = select.epoll()
        self._connections: dict[int, _Connection] = {}
        self._began = 0.0  # the full rate, by time.perf_counter()
        self._ends_s = 0.0
        self.lags: list[float] = []
        self.opened = 0

    def run(self, kinds: Sequence[_Requests], ramp_s: float, seconds: float) -> None:
        """Until all are answered, or for PATIENCE_S after the last one was due."""
        self._ends_s = seconds
        self._began = time.perf_counter() + ramp_s
        while not all(requests.is_over for requests in kinds):
            time.sleep(SLICE_S)
            if time.perf_counter() - self._began > seconds + PATIENCE_S:
                return
            for requests in kinds:
                self._send_due(requests)
            for fileno, events in self._epoll.poll(0, 1024):
                self._look_at(self._connections[fileno], events)

    def _send_due(self, requests: _Requests) -> None:
        now = time.perf_counter() - self._began
        for number in range(requests.next, min(requests.next + SENDS_MAX, len(requests.due))):
            due = requests.due[number]
            if due > now:
                break
            requests.next = number + 1
            self.lags.append(now - due)
            if requests.idle:
                connection = requests.idle.pop()
            elif requests.open < self._connections_max:
                connection = self._connect(requests)
            else:
                requests.unsent += 1
                continue
            connection.number, connection.due = number, due
            self._send(connection, b"%b%d%b" % (requests.head, number, requests.tail))

    def _connect(self, requests: _Requests) -> _Connection:
        connection = _Connection(requests, self._port)
        self._connections[connection.fileno] = connection
        self._epoll.register(connection.fileno, select.EPOLLIN)
        requests.open += 1
        self.opened += 1
        return connection

    def _send(self, connection: _Connection, request: bytes) -> None:
        try:
            sent = connection.socket.send(request)
        except BlockingIOError:  # not connected yet
            sent = 0
        except OSError:
            self._close(connection)
            return
        connection.waiting = request[sent:]
        if connection.waiting:
            self._epoll.modify(connection.fileno, select.EPOLLIN | select.EPOLLOUT)

    def _look_at(self, connection: _Connection, events: int) -> None:
        if events & select.EPOLLOUT and connection.waiting:
            self._epoll.modify(connection.fileno, select.EPOLLIN)
            self._send(connection, connection.waiting)
        if not events & ~select.EPOLLOUT:
            return
        try:
            data = connection.socket.recv(262_144)
        except BlockingIOError:
            return
        except OSError:
            data = b""
        if not data:
            self._close(connection)
            return
        self._read(connection, connection.received + data)

    def _read(self, connection: _Connection, data: bytes) -> None:
        """Takes an answer that is complete; there is one at a time."""
        connection.received = data
        head_ends = data.find(b"\r\n\r\n")
        if head_ends < 0:
            return
        head = data[: head_ends + 2].lower()
        at = head.find(b"\r\ncontent-length: ")
        if at < 0:  # none of the answers that are expected: what follows cannot be read
            self._close(connection)
            return
        ends = head_ends + 4 + int(head[at + 18 : head.index(b"\r", at + 18)])
        if len(data) < ends:
            return
        requests, number = connection.requests, connection.number
        connection.received, connection.number = b"", -1
        if number < 0:  # before it was asked anything, say 408
            self._close(connection)
            return
        now_s = time.perf_counter() - self._began
        status = head[9:12].decode()
        requests.in_time += status[0] == "2" and 0 <= now_s <= self._ends_s
        requests.answer(number, now_s - connection.due, status, head, data[head_ends + 4 : ends])
        if b"\r\nconnection: close\r\n" in head:
            self._close(connection)
        else:
            requests.idle.append(connection)

    def _close(self, connection: _Connection) -> None:
        if self._connections.pop(connection.fileno, None) is None:
            return
        requests = connection.requests
        self._epoll.unregister(connection.fileno)
        connection.socket.close()
        requests.open -= 1
        if connection.number >= 0:
            requests.dropped += 1
        elif connection in requests.idle:
            requests.idle.remove(connection)


def arrivals(rate: float, ramp_s: float, seconds: float) -> list[float]:
    """When requests are due: as they come from many independent clients (a Poisson process, given
    how many there are), with a rate that rises from 0 to `rate` until the time is 0."""
    rising = (math.sqrt(random.random()) - 1 for _ in range(round(rate * ramp_s / 2)))
    full = (random.random() for _ in range(round(rate * seconds)))
    return sorted(ramp_s * at for at in rising) + sorted(seconds * at for at in full)


def charges(due: Sequence[float], prefix: str) -> _Requests:
    head = (
        "POST /v1/charge HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\n"
        f"Content-Length: {len(BODY)}\r\nIdempotency-Key: {prefix}-"
    )
    return _Requests(due, head.encode(), f"\r\n\r\n{BODY}".encode())


def probes(path: str, seconds: float) -> _Requests:
    due = [number * PROBE_EVERY_S for number in range(int(seconds / PROBE_EVERY_S))]
    head = f"GET {path} HTTP/1.1\r\nHost: localhost\r\nX-Request-ID: probe-"
    return _Requests(due, head.encode(), b"\r\n\r\n")


def measure(
    port: int,
    rate: float,
    seconds: float,
    *,
    ramp_s: float,
    probed: Sequence[str],
    connections_max: int,
    keys: Path | None,
) -> Report:
    prefix = uuid.uuid4().hex
    load = charges(arrivals(rate, ramp_s, seconds), prefix)
    looks = {path: probes(path, seconds) for path in probed}
    loop = OpenLoop(port, connections_max)
    gc.disable()  # nothing here makes cycles, and its pauses would be the server's
    cpu_s, started = time.process_time(), time.perf_counter()
    loop.run([load, *looks.values()], ramp_s, seconds)
    cpu_s, took_s = time.process_time() - cpu_s, time.perf_counter() - started
    if keys is not None:
        keys.write_text("".join(f"{prefix}-{number}\n" for number in load.accepted))
    sent = load.next - load.unsent
    accepted = [
        latency
        for status, latencies in load.latencies.items()
        if status[0] == "2"
        for latency in latencies
    ]
    return Report(
        rate=rate,
        seconds=seconds,
        offered=len(load.due),
        sent=sent,
        unsent=len(load.due) - sent,
        dropped=load.dropped,
        unanswered=sent - load.answered - load.dropped,
        statuses=dict(load.statuses),
        codes=dict(load.codes),
        goodput_per_s=round(load.in_time / seconds, 1),
        accepted=Latency.of(accepted),
        refused=Latency.of(load.latencies.get("503", ())),
        without_retry_after=load.without_retry_after,
        connections=loop.opened,
        lag_p99_ms=_ms(sorted(loop.lags), 0.99) if loop.lags else 0,
        took_s=round(took_s, 3),
        cpu_s=round(cpu_s, 3),
        probes={
            path: Probe(
                dict(look.statuses),
                dict(look.codes),
                Latency.of([s for latencies in look.latencies.values() for s in latencies]),
                len(look.due) - look.answered,
            )
            for path, look in looks.items()
        },
    )


def _ms(ordered: Sequence[float], share: float) -> float:
    return round(ordered[round(share * (len(ordered) - 1))] * 1000, 2)


@functools.lru_cache(1024)
def _code(body: bytes) -> str:
    """A problem's code."""
    try:
        return str(json.loads(body)["code"])
    except (ValueError, KeyError, TypeError):
        return "none"


@click.command()
@click.option("--port", required=True, type=int)
@click.option("--rate", required=True, type=float, help="Charges per second.")
@click.option("--seconds", default=3.0, show_default=True)
@click.option("--ramp", default=0.0, show_default=True, help="Seconds until the full rate.")
@click.option("--probes", is_flag=True, help="Also ask for /health and /metrics all the time.")
@click.option("--connections-max", default=4000, show_default=True)
@click.option("--keys", type=click.Path(path_type=Path), help="Write the keys of all 2xx there.")
def main(
    port: int,
    rate: float,
    seconds: float,
    ramp: float,
    probes: bool,
    connections_max: int,
    keys: Path | None,
) -> None:
    """Charges at a fixed rate on 127.0.0.1, and what became of them as JSON."""
    _, files_max = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (files_max, files_max))
    if files_max != resource.RLIM_INFINITY:
        connections_max = min(connections_max, files_max - FILES_SPARE)
    report = measure(
        port,
        rate,
        seconds,
        ramp_s=ramp,
        probed=PROBED if probes else (),
        connections_max=connections_max,
        keys=keys,
    )
    sys.stdout.write(msgspec.json.encode(report).decode() + "\n")


if __name__ == "__main__":
    main()
