"""One exchange with a server that can do anything: what is sent, what is read, and what is known
when it fails. Where the failures of a provider are concerned, see conformance.py."""

import asyncio
import gzip
import random
import socket
import ssl
import struct
import time
import traceback
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager, suppress
from typing import Any, cast
from urllib.parse import parse_qsl
from uuid import UUID

import msgspec
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from payments.gateways import NeverSent, OutcomeUnknown, http
from payments.gateways.http import ANSWER_BYTES_MAX, ProviderHttp, ProviderResponse, encode_form
from tests.machine import within
from tests.process import free_port

pytestmark = pytest.mark.anyio

WAIT_S = 10.0
TIMEOUT_S = 0.3
LATE_S = 1.0
SECRET = "canary-5ecret"
OK = b"HTTP/1.1 200 OK\r\nContent-Length: 2\r\n\r\nOK"
ANSWERED = ProviderResponse(200, b"OK")

Writing = Callable[["Server", asyncio.StreamWriter], Awaitable[None]]


class Server:
    """Answers each request by `answer`, which writes what it likes."""

    def __init__(self, answer: Writing) -> None:
        self.requests: list[bytes] = []
        self.connections = 0
        self.url = ""
        self._answer = answer

    async def _serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self.connections += 1
        with suppress(asyncio.IncompleteReadError, ConnectionError, asyncio.CancelledError):
            while not writer.is_closing():
                head = await reader.readuntil(b"\r\n\r\n")
                length = head.lower().partition(b"content-length: ")[2].partition(b"\r")[0]
                self.requests.append(head + await reader.readexactly(int(length or 0)))
                await self._answer(self, writer)
        writer.close()


@asynccontextmanager
async def serving(answer: Writing | bytes) -> AsyncIterator[Server]:
    async def fixed(_: Server, writer: asyncio.StreamWriter) -> None:
        assert isinstance(answer, bytes)
        writer.write(answer)
        await writer.drain()

    server = Server(fixed if isinstance(answer, bytes) else answer)
    listening = await asyncio.start_server(server._serve, "127.0.0.1", 0)
    server.url = f"http://127.0.0.1:{listening.sockets[0].getsockname()[1]}"
    async with listening:
        yield server


@asynccontextmanager
async def client_of(url: str, **options: object) -> AsyncIterator[ProviderHttp]:
    client = ProviderHttp(url, **options)  # type: ignore[arg-type]
    yield client
    await client.close()


def turned_round(form: object) -> object:
    """With its mappings in the other order."""
    match form:
        case dict():
            return {key: turned_round(form[key]) for key in reversed(form)}
        case list():
            return [turned_round(each) for each in form]
        case _:
            return form


async def get(client: ProviderHttp, timeout_s: float = WAIT_S) -> ProviderResponse:
    return await client.exchange("GET", "/", timeout_s=timeout_s)


def body_of(size: int, headers: bytes = b"") -> bytes:
    return b"HTTP/1.1 200 OK\r\nContent-Length: %d\r\n%s\r\n" % (size, headers) + b"x" * size


class TestSending:
    async def test_the_request(self) -> None:
        async with (
            serving(OK) as server,
            client_of(f"{server.url}/v2/", headers={"Authorization": "Bearer t"}) as client,
        ):
            answer = await client.exchange(
                "POST",
                "/charges",
                timeout_s=WAIT_S,
                headers={"Idempotency-Key": "k"},
                body={"amount_cents": 1500},
            )
        assert answer == ANSWERED
        head, _, body = server.requests[0].partition(b"\r\n\r\n")
        first, *lines = head.decode().lower().split("\r\n")
        assert first == "post /v2/charges http/1.1"
        headers = dict(line.split(": ", 1) for line in lines)
        assert headers == {
            "host": server.url.removeprefix("http://"),
            "user-agent": "payment-service",
            "authorization": "bearer t",
            "idempotency-key": "k",
            "accept-encoding": "identity",
            "content-type": "application/json",
            "content-length": "21",
        }
        assert body == b'{"amount_cents":1500}'

    async def test_a_form(self) -> None:
        payment_id = UUID("0b7ce3a5-8d0e-4b0c-9a55-5f9c1f0a9f11")
        form = {
            "metadata": {"payment_id": payment_id, "a": {"b": "&=?"}},
            "amount": 1500,
            "confirm": False,
            "return_url": None,
            "expand": ["data.source", "charge"],
            "description": "é +",
        }
        async with serving(OK) as server, client_of(server.url) as client:
            await client.exchange("POST", "/charges", timeout_s=WAIT_S, form=form)
        head, _, body = server.requests[0].partition(b"\r\n\r\n")
        assert b"content-type: application/x-www-form-urlencoded\r\n" in head.lower()
        assert body == (
            b"amount=1500&confirm=false&description=%C3%A9+%2B"
            b"&expand%5B%5D=data.source&expand%5B%5D=charge"
            b"&metadata%5Ba%5D%5Bb%5D=%26%3D%3F"
            b"&metadata%5Bpayment_id%5D=0b7ce3a5-8d0e-4b0c-9a55-5f9c1f0a9f11"
        )
        assert dict(parse_qsl(body.decode()))["metadata[payment_id]"] == str(payment_id)

    @settings(max_examples=30)
    @given(
        st.recursive(
            st.text() | st.integers() | st.booleans() | st.none(),
            lambda inner: st.dictionaries(st.text(), inner) | st.lists(inner),
        ).map(lambda value: {"key": value})
    )
    def test_equal_forms_are_equal_bytes(self, form: dict[str, object]) -> None:
        """A key that is sent again with other bytes may be taken for another request's."""
        assert encode_form(cast(dict[str, object], turned_round(form))) == encode_form(form)

    async def test_a_request_without_a_body(self) -> None:
        async with serving(OK) as server, client_of(server.url) as client:
            await get(client)
        assert b"content-" not in server.requests[0].lower()

    async def test_cookies_are_not_sent_back(self) -> None:
        answer = OK.replace(b"\r\n\r\n", b"\r\nSet-Cookie: a=b; Path=/\r\n\r\n")
        async with serving(answer) as server, client_of(server.url) as client:
            await get(client)
            await get(client)
        assert not [request for request in server.requests if b"cookie" in request.lower()]

    @pytest.mark.parametrize(
        ("path", "content", "error"),
        [
            ("charges", {}, ValueError),
            ("/", {"body": object()}, TypeError),
            ("/", {"form": {"amount": 15.0}}, TypeError),
            ("/", {"body": {}, "form": {}}, ValueError),
        ],
    )
    async def test_what_cannot_be_sent_is_a_mistake_of_the_caller(
        self, path: str, content: dict[str, Any], error: type[Exception]
    ) -> None:
        async with serving(OK) as server, client_of(server.url) as client:
            with pytest.raises(error):
                await client.exchange("POST", path, timeout_s=WAIT_S, **content)
        assert server.connections == 0

    @pytest.mark.parametrize("timeout_s", [0, -1.0])
    async def test_without_time_nothing_is_sent(self, timeout_s: float) -> None:
        async with serving(OK) as server, client_of(server.url) as client:
            with pytest.raises(NeverSent):
                await get(client, timeout_s)
        assert server.connections == 0

    async def test_after_close_nothing_is_sent(self) -> None:
        async with serving(OK) as server, client_of(server.url) as client:
            await client.close()
            with pytest.raises(NeverSent):
                await get(client)
        assert server.connections == 0


class TestConnecting:
    async def test_refused(self) -> None:
        async with client_of(f"http://127.0.0.1:{free_port()}") as client:
            with pytest.raises(NeverSent):
                await get(client)

    async def test_no_such_name(self) -> None:
        async with client_of("http://no-such-provider.invalid") as client:
            with pytest.raises(NeverSent):
                await get(client, 5)

    @pytest.mark.parametrize("answer", [b"", b"HTTP/1.1 400 Bad Request\r\n\r\n"])
    async def test_a_tls_handshake_that_fails(self, answer: bytes) -> None:
        async with tls_less(answer) as url, client_of(url) as client:
            with pytest.raises(NeverSent):
                await get(client)

    async def test_a_tls_handshake_that_hangs(self) -> None:
        async with tls_less(None) as url, client_of(url) as client:
            with within(TIMEOUT_S), pytest.raises(NeverSent):
                await get(client, TIMEOUT_S)

    async def test_no_certificate_is_trusted_but_by_the_context(
        self, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        """SSL_CERT_FILE would stop the start if it were read."""
        monkeypatch.setenv("SSL_CERT_FILE", "/nonexistent/ca.pem")
        ProviderHttp("https://provider.invalid")
        own = ssl.create_default_context()
        assert ProviderHttp("https://provider.invalid", tls=own)


@asynccontextmanager
async def tls_less(answer: bytes | None) -> AsyncIterator[str]:
    """An https address where nobody speaks TLS; None: nor anything else."""

    async def serve(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        with suppress(asyncio.CancelledError):
            await reader.read(1)
            if answer is None:
                await reader.read()
            writer.write(answer or b"")
        writer.close()

    listening = await asyncio.start_server(serve, "127.0.0.1", 0)
    async with listening:
        yield f"https://127.0.0.1:{listening.sockets[0].getsockname()[1]}"


class TestAnswers:
    @pytest.mark.parametrize("status", [200, 201, 204, 307, 404, 422, 500, 503])
    async def test_any_status_is_an_answer(self, status: int) -> None:
        answer = b"HTTP/1.1 %d X\r\nContent-Length: 0\r\n\r\n" % status
        async with serving(answer) as server, client_of(server.url) as client:
            assert await get(client) == ProviderResponse(status, b"")

    @pytest.mark.parametrize("chunked", [False, True])
    async def test_64_kib_are_read_and_no_more(self, chunked: bool) -> None:
        def answer(size: int) -> bytes:
            if not chunked:
                return body_of(size)
            head = b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n"
            return (
                head
                + (b"400\r\n" + b"x" * 1024 + b"\r\n") * (size // 1024)
                + (
                    b"%x\r\n" % (size % 1024) + b"x" * (size % 1024) + b"\r\n"
                    if size % 1024
                    else b""
                )
                + b"0\r\n\r\n"
            )

        async with serving(answer(ANSWER_BYTES_MAX)) as server, client_of(server.url) as client:
            assert len((await get(client)).body) == ANSWER_BYTES_MAX
        async with (
            serving(answer(ANSWER_BYTES_MAX + 1)) as server,
            client_of(server.url) as client,
        ):
            with pytest.raises(OutcomeUnknown):
                await get(client)

    @pytest.mark.parametrize("bytes_max", [10, 200_000])
    async def test_a_call_can_have_a_limit_of_its_own(self, bytes_max: int) -> None:
        async def get_limited(url: str) -> ProviderResponse:
            async with client_of(url) as client:
                return await client.exchange(
                    "GET", "/", timeout_s=WAIT_S, response_bytes_max=bytes_max
                )

        async with serving(body_of(bytes_max)) as server:
            assert len((await get_limited(server.url)).body) == bytes_max
        async with serving(body_of(bytes_max + 1)) as server:
            with pytest.raises(OutcomeUnknown):
                await get_limited(server.url)

    async def test_the_headers_that_are_asked_for(self) -> None:
        answer = body_of(0, b"Request-Id: req_1\r\nRetry-After: 2\r\nX-Other: o\r\n")
        names = ("request-id", "Retry-After", "Idempotent-Replayed")
        async with serving(answer) as server, client_of(server.url) as client:
            asked = await client.exchange("GET", "/", timeout_s=WAIT_S, response_headers=names)
            assert asked.headers == {"request-id": "req_1", "Retry-After": "2"}
            assert (await get(client)).headers == {}

    async def test_an_endless_answer_is_cut(self) -> None:
        written = 0

        async def endless(_: Server, writer: asyncio.StreamWriter) -> None:
            nonlocal written
            writer.write(b"HTTP/1.1 200 OK\r\n\r\n")
            while True:
                writer.write(b"x" * 65536)
                await writer.drain()
                written += 65536

        async with serving(endless) as server, client_of(server.url) as client:
            with pytest.raises(OutcomeUnknown):
                await get(client)
        assert written < 10_000_000  # what the kernel's buffers hold

    async def test_a_compressed_answer_stays_compressed(self) -> None:
        small = gzip.compress(b"0" * 10_000_000)
        headers = b"Content-Encoding: gzip\r\n"
        answer = body_of(len(small), headers)[: -len(small)] + small
        async with serving(answer) as server, client_of(server.url) as client:
            assert (await get(client)).body == small

    @pytest.mark.parametrize(
        "answer",
        [
            b"",
            b"HTTP/1.1 200",
            b"HTTP/1.1 200 OK\r\nContent-Length: 5\r\n\r\nfour",
            b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n5\r\nfour",
            b"\x16\x03\x01 not HTTP\r\n\r\n",
            b"HTTP/1.1 200 OK\r\n" + b"X-Header: y\r\n" * 20_000,
            b"HTTP/1.1 200 OK\r\nContent-Length: 1\r\nContent-Length: 2\r\n\r\nab",
        ],
    )
    async def test_half_an_answer_or_none_leaves_the_outcome_unknown(self, answer: bytes) -> None:
        async def write(_: Server, writer: asyncio.StreamWriter) -> None:
            writer.write(answer)
            writer.close()

        async with serving(write) as server, client_of(server.url) as client:
            with pytest.raises(OutcomeUnknown):
                await get(client)

    @pytest.mark.parametrize(
        "drop", [b"x", b"HTTP/1.1 100 Continue\r\n\r\n"], ids=["body", "continue"]
    )
    async def test_one_deadline_for_all_of_an_answer_in_drops(self, drop: bytes) -> None:
        async def write(_: Server, writer: asyncio.StreamWriter) -> None:
            if len(drop) == 1:
                writer.write(b"HTTP/1.1 200 OK\r\nContent-Length: 1000\r\n\r\n")
            while True:
                writer.write(drop)
                await writer.drain()
                await asyncio.sleep(0.01)

        async with serving(write) as server, client_of(server.url) as client:
            started = time.monotonic()
            with within(TIMEOUT_S + LATE_S), pytest.raises(OutcomeUnknown):
                await get(client, TIMEOUT_S)
            assert time.monotonic() - started >= TIMEOUT_S

    @pytest.mark.parametrize("body", [b"", b"{", b'{"n": "1"}', b"\xff", b'{"a":' + b"[" * 60_000])
    def test_a_body_without_sense_leaves_the_outcome_unknown(self, body: bytes) -> None:
        class Expected(msgspec.Struct):
            n: int

        decoder = msgspec.json.Decoder(Expected)
        assert ProviderResponse(200, b'{"n": 1, "more": []}').read(decoder) == Expected(1)
        with pytest.raises(OutcomeUnknown):
            ProviderResponse(200, body).read(decoder)


class TestOutages:
    """What the breaker has to count: the provider is down or overloaded, or out of reach."""

    @pytest.mark.parametrize(
        ("status", "is_outage"),
        [
            *((200, False), (302, False), (400, False), (401, True), (403, False)),
            *((404, False), (409, False), (422, False), (429, True)),
            *((500, True), (502, True), (503, True), (504, True), (529, True)),
        ],
    )
    async def test_of_a_status(self, status: int, is_outage: bool) -> None:
        answer = b"HTTP/1.1 %d X\r\nContent-Length: 0\r\n\r\n" % status
        async with serving(answer) as server, client_of(server.url) as client:
            answered = await get(client)
        assert answered.is_outage is is_outage
        with pytest.raises(OutcomeUnknown, match=str(status)) as raised:
            answered.unexpected()
        assert raised.value.is_outage is is_outage
        with pytest.raises(OutcomeUnknown) as unread:
            answered.read(msgspec.json.Decoder(int))
        assert unread.value.is_outage is is_outage

    @pytest.mark.parametrize(
        ("what", "is_outage"),
        [
            ("reset", True),
            ("closed", True),
            ("half", True),
            ("silent", True),
            ("no HTTP", True),
            ("too long", False),
        ],
    )
    async def test_of_a_response_that_fails(self, what: str, is_outage: bool) -> None:
        async def write(_: Server, writer: asyncio.StreamWriter) -> None:
            match what:
                case "reset":
                    linger = struct.pack("ii", 1, 0)
                    plain = writer.get_extra_info("socket")
                    plain.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, linger)
                    writer.transport.abort()
                case "silent":
                    await asyncio.sleep(WAIT_S)
                case "half":
                    writer.write(OK[:-1])
                case "no HTTP":
                    writer.write(b"\x16\x03\x01 not HTTP\r\n\r\n")
                case "too long":
                    writer.write(body_of(ANSWER_BYTES_MAX + 1))
            writer.close()

        async with serving(write) as server, client_of(server.url) as client:
            with pytest.raises(OutcomeUnknown) as raised:
                await get(client, TIMEOUT_S if what == "silent" else WAIT_S)
        assert raised.value.is_outage is is_outage

    async def test_of_a_connection_that_is_refused(self) -> None:
        async with client_of(f"http://127.0.0.1:{free_port()}") as client:
            with pytest.raises(NeverSent) as raised:
                await get(client)
        assert raised.value.is_outage

    async def test_what_went_wrong_here_is_none(self) -> None:
        async with serving(OK) as server:
            async with client_of(server.url, headers={"Authorization": "a\nb"}) as client:
                with pytest.raises(OutcomeUnknown) as no_header:
                    await get(client)
            async with client_of(server.url, connections_max=0) as client:
                with pytest.raises(NeverSent) as all_in_use:
                    await get(client, TIMEOUT_S)
            with pytest.raises(NeverSent) as closed:
                await get(client)
        assert not [each for each in (no_header, all_in_use, closed) if each.value.is_outage]


class TestConnections:
    async def test_one_is_kept_and_used_again(self) -> None:
        async with serving(OK) as server, client_of(server.url) as client:
            for _ in range(5):
                await get(client)
        assert (server.connections, len(server.requests)) == (1, 5)

    async def test_one_that_was_idle_too_long_is_not_used_again(
        self, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setattr(http, "KEEPALIVE_EXPIRY_S", 0.02)
        async with serving(OK) as server, client_of(server.url) as client:
            await get(client)
            await asyncio.sleep(0.05)
            await get(client)
        assert server.connections == 2

    async def test_none_is_kept_where_a_stray_answer_must_not_be_taken_for_the_next(self) -> None:
        """httpx cannot tell: the second answer is already in its buffer."""
        stray = body_of(5) + b"HTTP/1.1 404 Not Found\r\nContent-Length: 0\r\n\r\n"
        async with serving(stray) as server, client_of(server.url, keep_alive=False) as client:
            assert [(await get(client)).status for _ in range(3)] == [200, 200, 200]
        assert server.connections == 3

    async def test_a_request_is_never_sent_twice(self) -> None:
        """A kept connection that ends as it is used again: the server may have acted."""

        async def close_at_the_second(server: Server, writer: asyncio.StreamWriter) -> None:
            if len(server.requests) == 2:
                writer.close()
            else:
                writer.write(OK)

        async with serving(close_at_the_second) as server, client_of(server.url) as client:
            await get(client)
            with pytest.raises(OutcomeUnknown):
                await get(client)
            assert len(server.requests) == 2
            assert await get(client) == ANSWERED

    async def test_no_more_than_allowed(self) -> None:
        now, most = 0, 0

        async def count(_: Server, writer: asyncio.StreamWriter) -> None:
            nonlocal now, most
            now += 1
            most = max(now, most)
            await asyncio.sleep(0.002)
            now -= 1
            writer.write(OK)

        async with serving(count) as server, client_of(server.url, connections_max=4) as client:
            answers = await asyncio.gather(*(get(client) for _ in range(40)))
        assert (len(answers), most, server.connections) == (40, 4, 4)

    async def test_whoever_waits_for_a_connection_in_vain_was_never_sent(self) -> None:
        free = asyncio.Event()

        async def when_free(_: Server, writer: asyncio.StreamWriter) -> None:
            await free.wait()
            writer.write(OK)

        async with serving(when_free) as server, client_of(server.url, connections_max=1) as client:
            first = asyncio.create_task(get(client))
            await asyncio.sleep(0.02)
            with pytest.raises(NeverSent):
                await get(client, TIMEOUT_S)
            free.set()
            assert await first == ANSWERED
            assert await get(client) == ANSWERED
            assert len(server.requests) == 2

    async def test_close_lets_an_exchange_under_way_end(self) -> None:
        free = asyncio.Event()

        async def when_free(_: Server, writer: asyncio.StreamWriter) -> None:
            await free.wait()
            writer.write(OK)

        async with serving(when_free) as server, client_of(server.url) as client:
            running = asyncio.create_task(get(client))
            await asyncio.sleep(0.02)
            await client.close()
            free.set()
            assert await running == ANSWERED

    @pytest.mark.parametrize("steps", range(12))
    async def test_a_cancellation_at_any_step_leaves_the_connection_usable(
        self, steps: int
    ) -> None:
        """Also while httpx closes the kept connection that the server has closed."""

        async def once(_: Server, writer: asyncio.StreamWriter) -> None:
            writer.write(OK)
            writer.close()

        async with serving(once) as server, client_of(server.url, connections_max=1) as client:
            await get(client)
            running = asyncio.create_task(get(client))
            for _ in range(steps):
                await asyncio.sleep(0)
            running.cancel()
            with suppress(asyncio.CancelledError):
                await running
            assert await get(client) == ANSWERED

    async def test_a_storm_of_failures_and_cancellations_uses_no_connection_up(self) -> None:
        dice = random.Random(1)

        async def anything(_: Server, writer: asyncio.StreamWriter) -> None:
            await asyncio.sleep(dice.random() / 50)
            if dice.random() < 0.3:
                writer.transport.abort()
            else:
                writer.write(OK)

        async with serving(anything) as server, client_of(server.url, connections_max=4) as client:
            times = [0.001 + dice.random() / 10 for _ in range(300)]
            times[::10] = [WAIT_S] * 30  # some are answered, however slow the machine is
            running = [asyncio.create_task(get(client, time_s)) for time_s in times]
            for each in running:
                await asyncio.sleep(0)
                if dice.random() < 0.3:
                    asyncio.get_running_loop().call_later(dice.random() / 10, each.cancel)
            results = await asyncio.gather(*running, return_exceptions=True)
            kinds = {type(result) for result in results}
            assert kinds == {ProviderResponse, NeverSent, OutcomeUnknown, asyncio.CancelledError}
            assert client._free._value == 4
            assert len(client._idle) <= 4
        async with serving(OK) as server, client_of(server.url, connections_max=4) as client:
            assert await asyncio.gather(*(get(client) for _ in range(8))) == [ANSWERED] * 8


class TestSecrets:
    @pytest.mark.parametrize(
        "answer",
        [
            b"HTTP/1.1 200 " + SECRET.encode() + b"\x00\r\n\r\n",
            SECRET.encode() + b"\r\n\r\n",
            body_of(100_000).replace(b"xxx", SECRET.encode()),
        ],
    )
    @pytest.mark.parametrize(
        "content", [{"body": {"card": SECRET}}, {"form": {"card": {SECRET: SECRET}}}]
    )
    async def test_no_error_shows_one(self, answer: bytes, content: dict[str, object]) -> None:
        async with (
            serving(answer) as server,
            client_of(server.url, headers={"Authorization": SECRET}) as client,
        ):
            with pytest.raises(OutcomeUnknown) as raised:
                await client.exchange(
                    "POST",
                    f"/{SECRET}?key={SECRET}",
                    timeout_s=WAIT_S,
                    headers={"X-Key": SECRET},
                    **content,  # type: ignore[arg-type]
                )
        assert SECRET not in "".join(traceback.format_exception(raised.value))

    async def test_a_header_that_is_none_is_not_shown(self) -> None:
        async with (
            serving(OK) as server,
            client_of(server.url, headers={"Authorization": f"{SECRET}\n"}) as client,
        ):
            with pytest.raises(OutcomeUnknown) as raised:
                await get(client)
        assert SECRET not in "".join(traceback.format_exception(raised.value))

    def test_repr_shows_the_origin_only(self) -> None:
        client = ProviderHttp(f"https://provider.invalid:8443/{SECRET}", {"Authorization": SECRET})
        assert repr(client) == "ProviderHttp('https://provider.invalid:8443')"

    @pytest.mark.parametrize(
        "url",
        [
            SECRET,
            f"ftp://{SECRET}/",
            f"http://user:{SECRET}@provider.invalid",
            f"http://provider.invalid:{SECRET}",
            f"http://provider.invalid/?key={SECRET}",
            f"http://provider.invalid/#{SECRET}",
            f"http://provider.invalid/{SECRET}\n",
            "http://",
        ],
    )
    def test_an_unusable_address_is_refused_and_not_repeated(self, url: str) -> None:
        with pytest.raises(ValueError, match="provider's address") as raised:
            ProviderHttp(url)
        assert SECRET not in "".join(traceback.format_exception(raised.value))
