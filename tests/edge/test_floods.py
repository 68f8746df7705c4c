"""Floods from those without an API key, and from a client: who is answered meanwhile, and how much
memory it takes.

The loads run in processes of their own. Nothing here looks at how fast the machine is, only at who
is refused: python -m benchmarks flood bombs measures.
"""

import hashlib
import re
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import psutil
import pytest

from payments.database.connections import DatabaseAddress
from tests.edge.load import Load
from tests.process import ServiceProcess, at, free_port
from web.serving.door import OPEN_PER_S
from web.serving.throttle import AT_ONCE_PER_S, GIVEN_MAX, TURN_S

CONNECTIONS = 600
FLOOD_S = 2.0
ANSWERS_MAX = AT_ONCE_PER_S * 2 + FLOOD_S * GIVEN_MAX / TURN_S
KEYS = {name: f"{name}-key" for name in ("shop", "other")}
GROWTH_MAX_MB = 40  # of what is promised to be 30; without bounds it is hundreds


@pytest.fixture(scope="module")
def service(
    module_database: DatabaseAddress, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[ServiceProcess]:
    keys = [f"{name}:{hashlib.sha256(key.encode()).hexdigest()}" for name, key in KEYS.items()]
    settings: dict[str, Any] = at(module_database) | {
        "PAYMENTS_API_KEYS": ",".join(keys),
        "METRICS_PORT": free_port(),
        "SIMULATED_LEDGER": "",
        "LOG_FORMAT": "json",
    }
    with ServiceProcess(tmp_path_factory.mktemp("floods"), **settings) as running:
        running.metrics_port = settings["METRICS_PORT"]  # type: ignore[attr-defined]
        yield running
        assert '"ERROR"' not in running.log.read_text()


def operators(service: ServiceProcess, path: str) -> httpx.Response:
    return httpx.get(f"http://127.0.0.1:{service.metrics_port}{path}", timeout=15)  # type: ignore[attr-defined]


def counter(service: ServiceProcess, name: str) -> float:
    time.sleep(1.1)  # it may be as of a second ago
    found = re.search(rf"^{name} (\S+)$", operators(service, "/metrics").text, re.MULTILINE)
    assert found, name
    return float(found[1])


@pytest.mark.parametrize(
    ("target", "statuses"),
    [
        ("/metrics", {"200", "503"}),
        ("/health", {"200", "503"}),
        ("/health/live", {"200"}),
        ("/v1/payments", {"401"}),
        ("/v1/payments?" + "x" * 1000, {"401"}),
        ("/nothing", {"404"}),
    ],
)
def test_a_flood_without_a_key_is_slowed_down_and_no_client_is_refused(
    service: ServiceProcess, target: str, statuses: set[str]
) -> None:
    before, lives = len(service.log.read_text().splitlines()), []
    with (
        Load("flood", service.port, FLOOD_S, target, CONNECTIONS) as flood,
        Load("charge", service.port, FLOOD_S, 20, KEYS["shop"]) as charges,
    ):
        while flood.goes_on:
            lives.append(httpx.get(f"{service.url}/health/live", timeout=15).status_code)
            assert operators(service, "/health").status_code == 200
            assert operators(service, "/metrics").status_code == 200
            time.sleep(0.1)
        flooded, charged = flood.result(), charges.result()
    assert set(flooded["statuses"]) - {"0"} <= statuses
    answers = sum(flooded["statuses"].values())
    assert CONNECTIONS <= answers <= ANSWERS_MAX
    if target in ("/metrics", "/health"):
        assert flooded["statuses"]["200"] >= OPEN_PER_S
    assert charged["statuses"] == {"201": int(FLOOD_S * 20)}
    assert set(lives) == {200}
    assert counter(service, "http_requests_refused_total") == 0
    # A line for each charge and its event, and a few that count.
    written = service.log.read_text().splitlines()[before:]
    assert len(written) < 2 * FLOOD_S * 20 + 40


def test_a_flood_of_one_client_leaves_the_others_their_places(service: ServiceProcess) -> None:
    headers = {"Authorization": f"Bearer {KEYS['other']}"}
    with httpx.Client(headers=headers, timeout=15) as client:
        target = service.charge(client, "read").headers["location"]
    with Load("flood", service.port, FLOOD_S, target, CONNECTIONS, KEYS["other"]) as flood:
        time.sleep(0.5)
        seconds = FLOOD_S - 0.5
        with Load("charge", service.port, seconds, 20, KEYS["shop"]) as charges:
            assert charges.result()["statuses"] == {"201": int(seconds * 20)}
        assert flood.result()["statuses"]["503"] > 0
    assert counter(service, "http_requests_refused_total") > 0


def test_large_heads_take_little_memory(address: DatabaseAddress, tmp_path: Path) -> None:
    """400 connections send 25 MB of heads, and more behind an answer that they do not read."""
    with ServiceProcess(tmp_path, SIMULATED_LEDGER="", **at(address)) as service:
        process = psutil.Process(service.process.pid)
        before = process.memory_info().rss
        for kind in ("many_headers", "half_heads", "large_headers", "behind"):
            growth = 0
            with Load("bombs", service.port, 1, kind, 400) as bombs:
                while bombs.goes_on:
                    growth = max(growth, process.memory_info().rss - before)
                    time.sleep(0.02)
                assert bombs.result()["sent"] > 20_000_000
            assert growth < GROWTH_MAX_MB * 1_000_000, kind
        assert service.is_healthy()
