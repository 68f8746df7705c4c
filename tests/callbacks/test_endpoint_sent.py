"""What an exchange says of whether Order Service may be at it, and whether it spoke itself."""

import asyncio
import socket
import time
from types import SimpleNamespace
from typing import Any

import pytest

from payments.order_service import endpoint as endpoints
from payments.order_service.endpoint import Exchange
from tests.callbacks.raw_server import (
    BODY,
    MESSAGE_ID,
    OK,
    WAIT_S,
    Server,
    Writing,
    anyio_backend,  # noqa: F401 - a fixture
    endpoint_of,
    exchange,
    listening,
    post,
    serving,
)
from tests.machine import Machine, bound
from tests.process import free_port

pytestmark = pytest.mark.anyio
TIMEOUT_S = 0.3
LATE_S = 1.0


async def cut(server: Server, writer: asyncio.StreamWriter) -> None:
    writer.transport.abort()


async def refused() -> Exchange:
    async with endpoint_of(f"http://127.0.0.1:{free_port()}", timeout_s=TIMEOUT_S) as endpoint:
        return await post(endpoint)


async def test_a_connection_that_is_refused_sends_nothing() -> None:
    done = await refused()
    assert (done.error, done.sent) == ("unreachable", False)


async def test_a_name_that_means_nothing_sends_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    def unknown(*_: Any, **__: Any) -> Any:
        raise socket.gaierror

    monkeypatch.setattr(socket, "getaddrinfo", unknown)
    async with endpoint_of("http://order.service.example:1") as endpoint:
        done = await post(endpoint)
    assert (done.error, done.sent) == ("unreachable", False)


async def test_a_handshake_that_fails_sends_nothing() -> None:

    async def serve(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        writer.write(OK)  # that is no TLS
        await reader.read()
        writer.close()

    async with listening(serve) as port, endpoint_of(f"https://127.0.0.1:{port}") as endpoint:
        done = await post(endpoint)
    assert (done.error, done.sent) == ("unreachable", False)


async def test_connecting_has_a_limit_of_its_own(
    monkeypatch: pytest.MonkeyPatch, machine: Machine
) -> None:
    monkeypatch.setattr(endpoints, "CONNECT_TIMEOUT_S", TIMEOUT_S)

    async def serve(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await reader.read()
        writer.close()

    async with (
        listening(serve) as port,
        endpoint_of(f"https://127.0.0.1:{port}", timeout_s=WAIT_S) as endpoint,
    ):
        began = time.monotonic()
        done = await post(endpoint)
    assert (done.error, done.sent) == ("timeout", False)
    bound(time.monotonic() - began, TIMEOUT_S + LATE_S, machine)


@pytest.mark.parametrize(
    ("answer", "error"),
    [(None, "timeout"), (cut, "unreachable"), (b"no HTTP\r\n\r\n", "protocol")],
    ids=["timeout", "cut", "garbage"],
)
async def test_whatever_ends_after_the_request_was_sent_says_so(
    answer: Writing | bytes | None, error: str
) -> None:
    done = await exchange(answer, TIMEOUT_S)
    assert (done.status, done.error, done.sent) == (None, error, True)


async def test_each_exchange_speaks_for_itself() -> None:
    """On one connection, and beside others."""
    answers = iter([OK, None, OK, None])

    async def answer(server: Server, writer: asyncio.StreamWriter) -> None:
        if (this := next(answers, None)) is None:
            writer.transport.abort()
        else:
            await server.write(writer, this)

    async with serving(answer) as server, endpoint_of(server.url) as endpoint:
        assert (await post(endpoint)).status == 200
        done = await post(endpoint)
        assert (done.error, done.sent) == ("unreachable", True)
        assert (await post(endpoint)).status == 200
        both = await asyncio.gather(post(endpoint), refused())
    assert [each.sent for each in both] == [True, False]


async def test_who_was_frozen_while_it_connected_sends_nothing_any_more(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    times = iter([0.0])
    frozen = SimpleNamespace(monotonic=lambda: next(times, WAIT_S + 1))
    async with serving(OK) as server, endpoint_of(server.url) as endpoint:
        monkeypatch.setattr(endpoints, "time", frozen)
        done = await endpoint.post(MESSAGE_ID, BODY, 1)
        assert (done.status, done.sent) == (None, False)
        monkeypatch.undo()
        assert (await post(endpoint)).status == 200
    assert len(server.requests) == 1


@pytest.mark.parametrize(
    "content_type", [None, "application/json; charset=utf-8", "text/html", "\xe4"]
)
async def test_the_content_type_is_as_it_was_sent(content_type: str | None) -> None:
    line = f"Content-Type: {content_type}\r\n".encode("latin-1") if content_type else b""
    done = await exchange(b"HTTP/1.1 502 Bad\r\n" + line + b"Content-Length: 2\r\n\r\n{}")
    assert done.status == 502
    assert done.content_type == (content_type if content_type != "\xe4" else None)
