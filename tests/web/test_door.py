"""What is answered when a head was read, on real connections in this process."""

import asyncio
import itertools
import re
import time
from collections.abc import AsyncIterator
from typing import Any

import pytest
from prometheus_client import CollectorRegistry

from payments.admission import ANONYMOUS_MEMORY, MEMORY_MIN, Admission
from payments.observability.metrics import Telemetry
from tests.machine import within
from tests.support import until
from tests.web.doors import (
    KEY,
    Listening,
    answer_client,
    door,
    listening,
    nothing_comes,
    received,
    request,
)
from web.serving import throttle
from web.serving.answers import PreparedAnswer
from web.serving.door import OPEN_PER_S

pytestmark = pytest.mark.anyio

TURN_S = 0.3  # made long, so that what waits can be looked at


@pytest.fixture
def telemetry() -> Telemetry:
    return Telemetry()


@pytest.fixture
def admission() -> Admission:
    return Admission(100, 100)


@pytest.fixture
async def server(telemetry: Telemetry, admission: Admission) -> AsyncIterator[Listening]:
    async with listening(door(telemetry, admission)) as opened:
        yield opened


@pytest.fixture
async def flooded(monkeypatch: pytest.MonkeyPatch) -> AsyncIterator[Listening]:
    """Nothing that waits for its turn is answered at once, and one thing in TURN_S."""
    monkeypatch.setattr(throttle, "AT_ONCE_PER_S", 0)
    monkeypatch.setattr(throttle, "TURN_S", TURN_S)
    monkeypatch.setattr(throttle, "HELD_S", 1000)
    monkeypatch.setattr(throttle, "GIVEN_MIN", 1)
    async with listening(door()) as opened:
        yield opened


async def send(client: Any, data: bytes) -> None:
    await asyncio.get_running_loop().sock_sendall(client, data)


async def ask(client: Any, data: bytes) -> bytes:
    await send(client, data)
    return await received(client, (b"nobody", b"}"))


def value(telemetry: Telemetry, name: str, **labels: str) -> float:
    registry: CollectorRegistry = telemetry.registry
    return registry.get_sample_value(name, labels) or 0.0


def statuses(data: bytes) -> list[int]:
    return [int(status) for status in re.findall(rb"HTTP/1\.1 ([0-9]{3}) ", data)]


async def test_a_client_is_told_to_the_application(server: Listening) -> None:
    with await server.connect() as client:
        await send(client, request(key=KEY))
        assert (await received(client, b"shop")).startswith(b"HTTP/1.1 200 OK")
        await send(client, request(b"/open", key=KEY))
        assert (await received(client, b"nobody")).startswith(b"HTTP/1.1 200 OK")


async def test_without_a_key_nothing_becomes_a_task(
    admission: Admission, telemetry: Telemetry
) -> None:
    tasks = itertools.count()

    async def app(scope: Any, receive: Any, send: Any) -> None:
        next(tasks)
        await answer_client(scope, receive, send)

    async with listening(door(telemetry, admission), app) as server:
        with await server.connect() as client:
            for method in (b"GET", b"POST", b"PROPFIND", b"OPTIONS"):
                await send(client, request(method=method))
                answer = await received(client, b'"code":"unauthorized"}')
                assert answer.startswith(b"HTTP/1.1 401 Unauthorized\r\n")
                assert b"\r\nwww-authenticate: Bearer" in answer
                assert b"\r\ncontent-type: application/problem+json\r\n" in answer
                assert b"\r\nx-request-id: " in answer
            await send(client, request(method=b"HEAD", more=b"X-Request-ID: r-1\r\n"))
            answer = await received(client, b"\r\n\r\n")
            assert b"\r\nx-request-id: r-1\r\n" in answer
            await send(client, request(b"/nowhere"))
            assert statuses(await received(client, b'"code":"not_found"}')) == [404]
        assert next(tasks) == 0
        counted = {"method": "GET", "route": "/keyed", "status": "401"}
        assert value(telemetry, "http_requests_total", **counted) == 2
        counted = {"method": "other", "route": "/keyed", "status": "401"}
        assert value(telemetry, "http_requests_total", **counted) == 1
        assert value(telemetry, "http_problems_total", code="unauthorized") == 5
        assert value(telemetry, "http_problems_total", code="not_found") == 1
    assert (admission.requests.taken, admission.memory.taken) == (0, 0)


async def test_a_body_of_a_request_without_a_key_is_not_read(server: Listening) -> None:
    """Slow, large or both: the answer comes at once, and the client sees it."""
    for length, sent in ((100, b"x"), (10_000_000, bytes(3_000_000)), (5, b"")):
        with await server.connect() as client:
            more = b"Content-Length: %d\r\n" % length
            with within(1):
                await send(client, request(method=b"POST", more=more) + sent)
                answer = await received(client)
            assert statuses(answer) == [401]
            assert b"\r\nconnection: close\r\n" in answer
    with await server.connect() as client:  # one that is there already costs nothing
        await send(client, request(method=b"POST", more=b"Content-Length: 3\r\n") + b"abc")
        await received(client, b'"}')
        await send(client, request(key=KEY))
        assert (await received(client, b"shop")).startswith(b"HTTP/1.1 200 OK")


async def test_an_open_path_has_a_rate_of_its_own(server: Listening, telemetry: Telemetry) -> None:
    with await server.connect() as client:
        began = time.monotonic()
        answers = 0
        while statuses(refused := await ask(client, request(b"/open"))) == [200]:
            answers += 1
        assert OPEN_PER_S <= answers <= OPEN_PER_S * (1 + time.monotonic() - began)
        assert refused.startswith(b"HTTP/1.1 503 Service Unavailable\r\n")
        assert b"\r\nretry-after: 1\r\n" in refused
        for target, key, end in ((b"/alive", b"", b"alive"), (b"/keyed", KEY, b"shop")):
            await send(client, request(target, key))
            assert statuses(await received(client, end)) == [200]
    assert value(telemetry, "http_requests_refused_open_total") == 1
    assert value(telemetry, "http_requests_refused_total") == 0
    assert value(telemetry, "http_problems_total", code="too_busy") == 1


async def test_what_is_known_is_told_to_those_that_are_beyond_the_bound(
    telemetry: Telemetry, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("web.serving.door.OPEN_PER_S", 0)
    known = iter([None, PreparedAnswer(200, b"{known}", "text/plain"), None])
    async with listening(door(telemetry, known=lambda: next(known))) as server:
        with await server.connect() as client:
            for status, end in ((503, b'"too_busy"}'), (200, b"{known}"), (503, b'"too_busy"}')):
                answer = await ask(client, request(b"/open"))
                assert statuses(answer) == [status]
                assert answer.endswith(end)
            # It is an answer to GET alone.
            assert statuses(await ask(client, request(b"/open", method=b"POST"))) == [503]
    labels = {"method": "GET", "route": "/open", "status": "200"}
    assert value(telemetry, "http_requests_total", **labels) == 1
    assert value(telemetry, "http_requests_refused_open_total") == 3


async def test_an_open_path_has_so_many_under_way_and_no_place(
    telemetry: Telemetry, admission: Admission, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("web.serving.door.OPEN_MAX", 2)
    going_on = asyncio.Event()

    async def app(scope: Any, receive: Any, send: Any) -> None:
        await going_on.wait()
        await answer_client(scope, receive, send)

    async with listening(door(telemetry, admission), app) as server:
        clients = [await server.connect() for _ in range(3)]
        for client in clients:
            await send(client, request(b"/open"))
        assert statuses(await received(clients[2], b'"too_busy"}')) == [503]
        assert admission.requests.taken == 0
        going_on.set()
        for client in clients[:2]:
            assert statuses(await received(client, b"nobody")) == [200]
        await send(clients[2], request(b"/open"))
        assert statuses(await received(clients[2], b"nobody")) == [200]


async def test_what_waits_keeps_the_order_of_a_connection(flooded: Listening) -> None:
    with await flooded.connect() as client:
        started = time.monotonic()
        with within(4 * TURN_S):
            await send(client, request() + request(key=KEY) + request(b"/x") + request(key=KEY))
            assert await nothing_comes(client, TURN_S / 2)
            answers = await received(client, b"shop")
            answers += await received(client, b"shop")
        assert statuses(answers) == [401, 200, 404, 200]
        assert time.monotonic() - started >= 2 * TURN_S


async def test_a_request_hands_its_place_to_the_one_behind_it() -> None:
    admission = Admission(1, 1)
    async with listening(door(admission=admission)) as server:
        with await server.connect() as client:
            await send(client, request(key=KEY) * 5)
            client.shutdown(1)
            assert statuses(await received(client)) == [200] * 5
    assert admission.requests.taken == 0


async def test_who_has_a_key_does_not_wait(flooded: Listening) -> None:
    crowd = [await flooded.connect() for _ in range(20)]
    for one in crowd:
        await send(one, request())
    with await flooded.connect() as client:
        for _ in range(10):
            with within(TURN_S / 2):
                await send(client, request(key=KEY))
                await received(client, b"shop")
                await send(client, request(b"/alive"))  # nor does who asks whether it lives
                await received(client, b"alive")


async def test_a_client_that_is_refused_does_not_wait(flooded: Listening) -> None:
    flooded.admission.requests.share().add(flooded.admission.requests.total)
    crowd = await flooded.connect()
    await send(crowd, request())
    with await flooded.connect() as client:
        for _ in range(3):
            with within(TURN_S / 2):
                assert statuses(await ask(client, request(key=KEY))) == [503]


async def test_an_answer_that_ends_the_connection_waits_as_well(flooded: Listening) -> None:
    with await flooded.connect() as client:
        await send(client, request(method=b"POST", more=b"Content-Length: 9\r\n") + b"x")
        assert await nothing_comes(client, TURN_S / 2)
        assert statuses(await received(client)) == [401]


async def test_while_it_waits_a_connection_is_not_read(flooded: Listening) -> None:
    with await flooded.connect() as client:
        await send(client, request())
        await asyncio.sleep(TURN_S / 3)
        (connection,) = flooded.connections
        assert connection.flow.read_paused
        await send(client, request(key=KEY))
        assert statuses(await received(client, b"shop")) == [401, 200]


@pytest.mark.parametrize(
    ("sent", "expected"),
    [
        (request(), [401]),
        (request() + request(), [401, 401]),
        (request(method=b"POST", more=b"Content-Length: 9\r\n") + b"x", [401]),
        (request() + request(method=b"POST", more=b"Content-Length: 9\r\n") + b"x", [401, 401]),
        (request() + b"nonsense\r\n\r\n", [401, 400]),
        (request() + request()[:20], [401, 400]),
        (request() + request(key=KEY), [401, 200]),
    ],
)
async def test_a_client_that_sends_no_more_gets_its_answers(
    flooded: Listening, sent: bytes, expected: list[int]
) -> None:
    with await flooded.connect() as client:
        await send(client, sent)
        client.shutdown(1)
        assert statuses(await received(client)) == expected


async def test_who_goes_away_meanwhile_leaves_nothing(flooded: Listening) -> None:
    """That it has gone shows when it is read again, or written to."""
    for number in range(4):
        with await flooded.connect() as client:
            await send(client, request() * (1 + number % 2))
    with await flooded.connect() as client:
        await send(client, request())
        assert statuses(await received(client, b'"unauthorized"}')) == [401]
        await until(lambda: len(flooded.connections) == 1)
        (connection,) = flooded.connections
        await send(client, request())
        await asyncio.sleep(TURN_S / 3)
        connection.transport.abort()
        await asyncio.sleep(0)
        assert not flooded.door._throttle._waiting


async def test_the_server_that_stops_answers_what_waits(flooded: Listening) -> None:
    with await flooded.connect() as client:
        await send(client, request())
        await asyncio.sleep(TURN_S / 3)
        (connection,) = flooded.connections
        connection.shutdown()
        answer = await received(client)
        assert statuses(answer) == [401]
        assert b"\r\nconnection: close\r\n" in answer


HEADER = b"X: %s\r\n"


def bomb(headers: int, size: int, key: bytes = KEY, method: bytes = b"POST") -> bytes:
    """A head whose body never comes."""
    more = b"Content-Length: 9\r\n" + HEADER % (b"y" * size) * headers
    return request(key=key, method=method, more=more)


async def test_heads_count_by_their_bytes(server: Listening, admission: Admission) -> None:
    """Of requests under way, and of those behind another; and all is free again in the end."""
    clients = []
    for number in range(40):
        client = await server.connect()
        clients.append(client)
        await send(client, bomb(90, 600) if number % 2 else request(key=KEY) + bomb(90, 600))
    await until(lambda: admission.memory.taken > 40 * 54_000)
    await asyncio.sleep(0.2)
    assert 40 * 54_000 < admission.memory.taken < 40 * 80_000
    for client in clients:
        client.close()
    await until(lambda: admission.memory.taken == admission.requests.taken == 0)
    assert admission.anonymous_memory.taken == 0


@pytest.mark.parametrize("early", [False, True])
async def test_an_idle_connection_holds_nothing_of_what_was_answered(early: bool) -> None:
    """Also if it was before its body came."""

    async def answer_early(scope: Any, receive: Any, send: Any) -> None:
        headers = [(b"content-length", b"4")]
        await send({"type": "http.response.start", "status": 200, "headers": headers})
        await send({"type": "http.response.body", "body": b"shop"})

    async with listening(door(), answer_early if early else answer_client) as server:
        with await server.connect() as client:
            for _ in range(2):
                await send(client, bomb(90, 600))
                if early:
                    assert await received(client, b"shop")
                    await asyncio.sleep(0.05)
                await send(client, b"y" * 9)
                assert early or await received(client, b"shop")
                (connection,) = server.connections
                await until(lambda c=connection: not any((c.url, c.headers, c.scope, c.cycle)))


async def test_what_memory_has_no_room_for_is_refused(
    server: Listening, admission: Admission
) -> None:
    admission.memory.share().add(MEMORY_MIN - 30_000)
    with await server.connect() as client:
        await send(client, request(key=KEY))
        assert statuses(await received(client, b"shop")) == [200]
        await send(client, bomb(90, 600))
        assert statuses(await received(client)) == [503]
    with await server.connect() as client:  # by its body
        more = b"Content-Length: 60000\r\n"
        await send(client, request(key=KEY, method=b"POST", more=more) + bytes(30_000))
        assert statuses(await received(client)) == [503]


async def test_half_heads_count_by_their_bytes(server: Listening, admission: Admission) -> None:
    """Behind other requests as well; so many leave little for the next, but something."""
    half = bomb(90, 600)[:-2]
    clients = [await server.connect() for _ in range(250)]
    for number, client in enumerate(clients):
        await send(client, half if number % 2 else request(key=KEY) + half)
    await until(lambda: admission.anonymous_memory.taken > ANONYMOUS_MEMORY / 2)
    await asyncio.sleep(0.3)
    assert ANONYMOUS_MEMORY / 2 < admission.anonymous_memory.taken < ANONYMOUS_MEMORY
    with await server.connect() as client:
        await send(client, request(key=KEY)[:-2])
        await asyncio.sleep(0.1)
        await send(client, b"\r\n")
        assert statuses(await received(client, b"shop")) == [200]
    for client in clients:
        client.close()
    await until(lambda: admission.anonymous_memory.taken == admission.memory.taken == 0)


async def test_of_too_many_headers_none_is_kept(server: Listening) -> None:
    with await server.connect() as client:
        await send(client, bomb(99, 5))
        assert statuses(await received(client, b'"head_too_large"}')) == [431]
        (connection,) = server.connections
        assert not any((connection.headers, connection.scope, connection.parser))
