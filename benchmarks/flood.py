"""What floods from those without an API key do to charges, and large heads to memory."""

import hashlib
import statistics
import subprocess
import sys
import threading
import time
from typing import Any, ClassVar, NamedTuple, Self

import msgspec

from benchmarks.child import ROOT, ChildError
from benchmarks.load import Figures
from benchmarks.parts import HttpPart
from benchmarks.process import ServerProcess

KEY = "flood"
CONNECTIONS = 600
RATE = 50  # charges per second
LEAD_S = 1.0  # the flood begins earlier
TARGETS = ("/metrics", "/health", "/v1/payments")
BOMBS = 400  # connections
KINDS = ("many_headers", "large_headers", "half_heads", "behind")
PATIENCE_S = 60


def start(*arguments: object) -> "subprocess.Popen[str]":
    command = [sys.executable, "-m", "benchmarks.flood_load", *map(str, arguments)]
    pipe = subprocess.PIPE
    return subprocess.Popen(command, cwd=ROOT, stdin=pipe, stdout=pipe, stderr=pipe, text=True)


def result(process: "subprocess.Popen[str]") -> Any:
    printed, said = process.communicate(timeout=PATIENCE_S)
    if process.returncode:
        raise ChildError("a load failed", said)
    return msgspec.json.decode(printed)


class Charged(NamedTuple):
    """Charges during one flood; latencies run from when they were due."""

    answered: int
    refused: int
    p50_ms: float
    p99_ms: float
    flood_per_s: float


class Flood(HttpPart):
    """Charges with an API key, 50/s in an open loop, while 600 connections without one ask for a
    path in a closed loop; and the same charges while the same flood goes to a bare listener, so
    that the load takes as much of the machine.

    The part's own figures are of the charges during all floods. p99_ratio is the median over the
    rounds.
    """

    name = "flood"
    settings: ClassVar[dict[str, str]] = {
        "PAYMENTS_API_KEYS": f"bench:{hashlib.sha256(KEY.encode()).hexdigest()}"
    }

    def __enter__(self) -> Self:
        super().__enter__()
        self._bare = start("listen")
        assert self._bare.stdout is not None
        self._bare_port = int(self._bare.stdout.readline())
        self._pairs: dict[str, list[tuple[Charged, Charged]]] = {path: [] for path in TARGETS}
        return self

    def __exit__(self, *details: object) -> None:
        result(self._bare)
        super().__exit__(*details)

    def run(self, seconds: float) -> Figures:
        pairs = {
            path: (
                self._charge(seconds, path, self._server.port),
                self._charge(seconds, path, self._bare_port),
            )
            for path in TARGETS
        }
        if seconds > 1:  # not the warm-up
            for path, pair in pairs.items():
                self._pairs[path].append(pair)
        flooded = [pair[0] for pair in pairs.values()]
        return Figures(
            sum(each.answered for each in flooded) / (len(flooded) * seconds),
            statistics.median(each.p50_ms for each in flooded),
            statistics.median(each.p99_ms for each in flooded),
            sum(each.answered for each in flooded),
            sum(each.refused for each in flooded),
        )

    def _charge(self, seconds: float, path: str, flooded_port: int) -> Charged:
        flood = start("flood", flooded_port, seconds + LEAD_S + 0.5, path, CONNECTIONS)
        try:
            time.sleep(LEAD_S)
            found = result(start("charge", self._server.port, seconds, RATE, KEY))
            flood_per_s = result(flood)["per_s"]
        finally:
            flood.kill()
            flood.communicate()
        figures = Figures.of(found["latencies_s"], seconds)
        answered = found["statuses"].get("201", 0)
        refused = found["unanswered"] + figures.answers - answered
        return Charged(answered, refused, figures.p50_ms, figures.p99_ms, flood_per_s)

    def rows(self) -> dict[str, dict[str, float]]:
        return {path: self._row(pairs) for path, pairs in self._pairs.items()}

    def _row(self, pairs: list[tuple[Charged, Charged]]) -> dict[str, float]:
        def median(of: Any) -> float:
            return round(float(statistics.median(of(*pair) for pair in pairs)), 2)

        return {
            "refused": sum(flooded.refused for flooded, _ in pairs),
            "p99_ms": median(lambda flooded, _: flooded.p99_ms),
            "p99_ms_bare": median(lambda _, bare: bare.p99_ms),
            "p99_ratio": median(lambda flooded, bare: flooded.p99_ms / bare.p99_ms),
            "p50_ratio": median(lambda flooded, bare: flooded.p50_ms / bare.p50_ms),
            "flood_per_s": median(lambda flooded, _: flooded.flood_per_s),
            "flood_per_s_bare": median(lambda _, bare: bare.flood_per_s),
        }


class Bombs(HttpPart):
    """400 connections that send 25 MB of request heads, and more behind an answer that they do not
    read; without API keys, so that everybody is a client.

    Each kind has a process of its own. A latency is how much memory it took, in MB.
    """

    name = "bombs"

    def __enter__(self) -> Self:
        super().__enter__()
        self._grown: dict[str, list[float]] = {kind: [] for kind in KINDS}
        return self

    def run(self, seconds: float) -> Figures:
        for kind in KINDS:
            server = ServerProcess(self.name, self.address, self.settings)
            server.start()
            try:
                self._grown[kind].append(grown_mb(server, kind, seconds))
            finally:
                server.stop()
        grown = [figures[-1] for figures in self._grown.values()]
        connections = len(KINDS) * BOMBS
        return Figures(connections / seconds, statistics.median(grown), max(grown), connections)

    def rows(self) -> dict[str, dict[str, float]]:
        return {kind: {"grown_mb_max": max(grown)} for kind, grown in self._grown.items()}


def grown_mb(server: ServerProcess, kind: str, seconds: float) -> float:
    """At the most, while they are sent and held."""
    before, most, is_over = server.resident_mb(), 0.0, threading.Event()

    def watch() -> None:
        nonlocal most
        while not is_over.wait(0.01):
            most = max(most, server.resident_mb() - before)

    watching = threading.Thread(target=watch)
    watching.start()
    try:
        result(start("bombs", server.port, seconds, kind, BOMBS))
    finally:
        is_over.set()
        watching.join()
    return round(most, 1)


FLOOD_PARTS = (Flood, Bombs)
