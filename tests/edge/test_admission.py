"""What is refused while the places are taken, how, and what needs none.

Two places only, and the store held by somebody: two charges wait for it and take both places.
"""

import re
import resource
import socket
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import Any, NamedTuple

import psutil
import psycopg
import pytest

from payments.database.connections import DatabaseAddress
from tests.edge.raw import Answer, Connection
from tests.edge.requests import BODY
from tests.events.commits import lock_held
from tests.machine import within
from tests.process import ServiceProcess, at
from tests.support import eventually


def charge(
    key: str, *, method: bytes = b"POST", version: bytes = b"1.1", more: bytes = b""
) -> bytes:
    return (
        b"%s /v1/charge HTTP/%s\r\nHost: x\r\nContent-Type: application/json\r\n"
        % (method, version)
        + b"Idempotency-Key: %s\r\n%s" % (key.encode(), more)
        + b"Content-Length: %d\r\n\r\n" % len(BODY)
    )


@pytest.fixture
def service(address: DatabaseAddress, tmp_path: Path) -> Iterator[ServiceProcess]:
    settings: dict[str, Any] = at(address) | {"INTENT_QUEUE_MAX": 2}
    with ServiceProcess(tmp_path, SIMULATED_LEDGER="", **settings) as running:
        yield running


class Full(NamedTuple):
    one: Connection
    release: Callable[[], None]


@pytest.fixture
def full(service: ServiceProcess, connection: psycopg.Connection[Any]) -> Iterator[Full]:
    """The connection of one of the two charges that wait, for at most 2 s, and what ends that."""
    with (
        Connection(service.port) as one,
        Connection(service.port) as other,
        ExitStack() as store,
    ):
        store.enter_context(lock_held(connection))
        one.send(charge("one") + BODY)
        other.send(charge("other") + BODY)
        probe_until(service, refused=True)
        yield Full(one, store.close)


def is_refused(answer: Answer | None) -> bool:
    assert answer is not None
    return answer.status == 503 and answer.json()["code"] == "too_busy"


def probe_until(service: ServiceProcess, *, refused: bool) -> None:
    with Connection(service.port) as probe:

        def is_as_wanted() -> bool:
            probe.send(b"GET /v1/payments HTTP/1.1\r\nHost: x\r\n\r\n")
            return is_refused(probe.answer()) is refused

        eventually(is_as_wanted)


def test_the_next_request_is_refused_at_once(service: ServiceProcess, full: Full) -> None:
    with Connection(service.port) as client:
        with within(0.5):  # a place is free in 2 s
            client.send(charge("next") + BODY)
            answer = client.answer()
        assert answer is not None
        assert is_refused(answer)
        assert answer.headers["content-type"] == "application/problem+json"
        assert answer.headers["retry-after"] == "1"
        full.release()
        probe_until(service, refused=False)
        time.sleep(0.1)  # there is one place as yet, and the probe may still be leaving it
        client.send(charge("next") + BODY)  # the same connection and key
        answer = client.answer()
        assert answer is not None
        assert (answer.status, answer.json()["status"]) == (201, "SUCCESS")
        client.send(b"GET /metrics HTTP/1.1\r\nHost: x\r\n\r\n")
        metrics = client.answer()
        assert metrics is not None
        counted = re.search(rb"\nhttp_requests_refused_total ([0-9.]+)", metrics.body)
        assert counted is not None
        assert float(counted[1]) >= 2  # the probe's and this one


@pytest.mark.usefixtures("full")
def test_what_needs_no_key_needs_no_place(service: ServiceProcess) -> None:
    with Connection(service.port) as client:
        for path in ("/health", "/health?x=1", "/health/live", "/metrics"):
            for method in ("GET", "HEAD"):
                client.send(f"{method} {path} HTTP/1.1\r\nHost: x\r\n\r\n".encode())
                answer = client.answer(to_head=method == "HEAD")
                assert answer is not None
                assert answer.status == 200, path


@pytest.mark.usefixtures("full")
def test_the_connection_of_a_refused_request(service: ServiceProcess) -> None:
    """It is closed if the rest of a body would come on it, and if the client wants it so."""
    for request in (
        charge("without-body"),
        charge("half-a-body") + BODY[:20],
        charge("asks-first", more=b"Expect: 100-continue\r\n"),
        charge("last", more=b"Connection: close\r\n") + BODY,
        charge("old", version=b"1.0") + BODY,
    ):
        with Connection(service.port) as client:
            client.send(request)
            answer, *others = client.answers()
            assert is_refused(answer)
            assert answer.is_last
            assert others == []
    with Connection(service.port) as client:
        client.send(charge("head", method=b"HEAD") + BODY)
        answer_to_head = client.answer(to_head=True)
        assert answer_to_head is not None
        assert answer_to_head.status == 503
        client.send((charge("a") + BODY) * 3)  # the bytes of the next answer follow directly
        assert [is_refused(client.answer()) for _ in range(3)] == [True] * 3


def test_a_request_behind_one_that_is_under_way_is_answered_after_it(full: Full) -> None:
    full.one.send(b"GET /nothing HTTP/1.1\r\nHost: x\r\n\r\n")
    full.release()
    answers = [full.one.answer() for _ in range(2)]
    assert [answer and answer.status for answer in answers] == [201, 404]


@pytest.mark.parametrize("body", [BODY, BODY[:20]])
def test_a_request_behind_another_needs_a_place_of_its_own(
    service: ServiceProcess, connection: psycopg.Connection[Any], body: bytes
) -> None:
    """The first one came in before that, and waited for its body without a place."""
    with Connection(service.port) as client, ExitStack() as stack:
        client.send(charge("first") + b"x")
        time.sleep(0.2)
        stack.enter_context(lock_held(connection))
        for key in ("one", "other"):
            stack.enter_context(Connection(service.port)).send(charge(key) + BODY)
        probe_until(service, refused=True)
        client.send(BODY[1:] + charge("behind") + body)
        first, behind = client.answer(), client.answer()
        assert first is not None
        assert first.json()["code"] == "invalid_request"
        assert is_refused(behind)
        assert behind is not None
        assert behind.is_last is (body is not BODY)


def test_who_waits_for_somebody_else_holds_no_place(
    address: DatabaseAddress, tmp_path: Path
) -> None:
    """For the provider, for another request with the same key, for the rest of its own body."""
    settings: dict[str, Any] = at(address) | {"INTENT_QUEUE_MAX": 5, "SIMULATED_LEDGER": ""}
    with (
        ServiceProcess(tmp_path, SIMULATED_FAULTS="delay=2", **settings) as service,
        ExitStack() as stack,
    ):
        clients = [stack.enter_context(Connection(service.port)) for _ in range(16)]
        slow, others = clients[:8], clients[8:]
        for number, client in enumerate(slow):
            client.send(charge(f"slow-{number}") + BODY[:20])
            time.sleep(0.05)
        for number, client in enumerate(others):
            client.send(charge(f"provider-{number // 4}") + BODY)
            time.sleep(0.05)
        for client in slow:
            client.send(BODY[20:])
            time.sleep(0.05)
        answers = [client.answer() for client in clients]
        assert [answer and answer.status for answer in answers] == [201] * 16


def test_connections_are_not_bounded_by_the_shells_limit_on_files(
    address: DatabaseAddress, tmp_path: Path
) -> None:
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (hard // 2, hard))  # what the service inherits
    try:
        with ServiceProcess(tmp_path, SIMULATED_LEDGER="", **at(address)) as service:
            limits = psutil.Process(service.process.pid).rlimit(psutil.RLIMIT_NOFILE)
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))
    assert limits == (hard, hard)


def test_who_does_not_read_its_answers_holds_no_place(service: ServiceProcess) -> None:
    large = b"GET /schema/swagger-ui-bundle.js HTTP/1.1\r\nHost: x\r\n\r\n"
    with ExitStack() as stack:
        for _ in range(6):
            silent = stack.enter_context(socket.socket())
            silent.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
            silent.connect(("127.0.0.1", service.port))
            silent.sendall(large * 4)
            time.sleep(0.1)
        for number in range(5):
            with Connection(service.port) as client:
                client.send(charge(f"beside-{number}") + BODY)
                answer = client.answer()
                assert answer is not None
                assert answer.status == 201
