"""One exchange with a server that can do anything: what is sent, how much is read and for how long,
and what is known afterwards. Where it may go: test_endpoint_addresses.py; how connections are kept:
test_endpoint_connections.py."""

import asyncio
import gzip
import logging
import random
import re
import socket
import threading
import zlib
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import psutil
import pytest
from loguru import logger
from standardwebhooks import Webhook

from payments.http_url import parse_http_url
from payments.order_service.endpoint import ANSWER_BYTES_KEPT, Endpoint, Exchange
from payments.order_service.target import Target
from payments.webhook_secrets import parse_secrets
from tests.callbacks.raw_server import (
    BODY,
    MESSAGE_ID,
    OK,
    WAIT_S,
    Server,
    Writing,
    anyio_backend,  # noqa: F401 - a fixture
    endless,
    endpoint_of,
    exchange,
    listening,
    many,
    post,
    serving,
    then_close,
)
from tests.machine import Machine, bound, within
from tests.process import free_port
from tests.support import until

pytestmark = pytest.mark.anyio

TIMEOUT_S = 0.3
LATE_S = 0.3
CANARY = "canary5ecretcanary5ecret"
SECRET = f"whsec_{CANARY}"
HEAD = b"HTTP/1.1 200 OK\r\n"
CHUNKED = HEAD + b"Transfer-Encoding: chunked\r\n\r\n"
CONTINUE = b"HTTP/1.1 100 Continue\r\n\r\n"
NAME = "order-service.test"


def resident_bytes() -> int:
    return int(psutil.Process().memory_info().rss)


class TestSending:
    async def test_the_request(self) -> None:
        async with (
            serving(OK) as server,
            endpoint_of(f"{server.url}/v1/payments/callback", SECRET) as endpoint,
        ):
            done = await post(endpoint)
        assert done._replace(seconds=0) == Exchange(
            status=200, error=None, reason="", retry_after=None, answer=b"OK", seconds=0
        )
        head, _, body = server.requests[0].partition(b"\r\n\r\n")
        first, *lines = head.decode().split("\r\n")
        assert first == "POST /v1/payments/callback HTTP/1.1"
        headers = {name.lower(): value for name, value in (line.split(": ", 1) for line in lines)}
        Webhook(SECRET).verify(body.decode(), headers)
        del headers["webhook-timestamp"], headers["webhook-signature"]
        assert headers == {
            "host": f"127.0.0.1:{server.port}",
            "user-agent": "payment-service",
            "accept": "*/*",
            "accept-encoding": "identity",
            "content-type": "application/json",
            "content-length": str(len(BODY)),
            "webhook-id": MESSAGE_ID,
        }
        assert body == BODY

    async def test_without_a_secret_nothing_is_signed(self) -> None:
        async with serving(OK) as server, endpoint_of(server.url) as endpoint:
            await post(endpoint)
        assert b"webhook" not in server.requests[0].lower()

    @pytest.mark.parametrize(
        ("given", "sent"),
        [
            ("", "/"),
            ("?", "/?"),
            ("/a/../b", "/a/../b"),
            ("/callback?token=a%2Bb%3D&next=/c", "/callback?token=a%2Bb%3D&next=/c"),
            ("/ä", "/%C3%A4"),
        ],
    )
    async def test_path_and_query(self, given: str, sent: str) -> None:
        async with serving(OK) as server, endpoint_of(server.url + given) as endpoint:
            await post(endpoint)
        assert server.requests[0].split(b" ")[1] == sent.encode()

    async def test_cookies_are_not_sent_back(self) -> None:
        """Of a name: jars leave out addresses anyway."""
        answer = OK.replace(b"\r\n\r\n", b"\r\nSet-Cookie: a=b; Path=/\r\n\r\n")
        async with (
            serving(answer) as server,
            endpoint_of(f"http://localhost:{server.port}") as endpoint,
        ):
            assert [(await post(endpoint)).status for _ in range(2)] == [200, 200]
        assert not [request for request in server.requests if b"cookie" in request.lower()]

    @pytest.mark.parametrize("status", [301, 302, 303, 307, 308])
    async def test_a_redirect_is_not_followed(self, status: int) -> None:
        async with serving(OK) as other:
            answer = b"HTTP/1.1 %d X\r\nLocation: %s\r\nContent-Length: 0\r\n\r\n"
            done = await exchange(answer % (status, other.url.encode()))
        assert done.status == status
        assert other.connections == 0

    async def test_proxies_of_the_environment_are_not_used(
        self, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
    ) -> None:
        netrc = tmp_path / "netrc"
        netrc.write_text(f"machine 127.0.0.1 login orders password {CANARY}\n")
        monkeypatch.setenv("NETRC", str(netrc))
        async with serving(OK) as proxy, serving(OK) as server:
            for name in ("HTTP_PROXY", "HTTPS_PROXY", "ALL_PROXY"):
                monkeypatch.setenv(name, proxy.url)
                monkeypatch.setenv(name.lower(), proxy.url)
            monkeypatch.delenv("NO_PROXY", raising=False)
            monkeypatch.delenv("no_proxy", raising=False)
            async with endpoint_of(server.url) as endpoint:
                assert (await post(endpoint)).status == 200
        assert (proxy.connections, server.connections) == (0, 1)
        assert b"authorization" not in server.requests[0].lower()


class TestAnswers:
    @pytest.mark.parametrize("status", [200, 202, 204, 299, 304, 400, 404, 410, 429, 500, 503, 999])
    async def test_any_status_is_an_answer(self, status: int) -> None:
        done = await exchange(b"HTTP/1.1 %d X\r\nContent-Length: 0\r\n\r\n" % status)
        assert done[:2] == (status, None)

    @pytest.mark.parametrize(
        ("head", "text"),
        [
            (b"", None),
            (b"Retry-After: 120\r\n", "120"),
            (b"retry-after:  Fri, 31 Dec 1999 23:59:59 GMT \r\n", "Fri, 31 Dec 1999 23:59:59 GMT"),
            (b"Retry-After: soon, please\r\n", "soon, please"),
        ],
    )
    async def test_retry_after_is_handed_on_as_it_is(self, head: bytes, text: str | None) -> None:
        done = await exchange(b"HTTP/1.1 503 X\r\nContent-Length: 0\r\n%s\r\n" % head)
        assert (done.status, done.retry_after) == (503, text)

    async def test_the_beginning_of_the_body_is_kept(self) -> None:
        body = random.Random(1).randbytes(10_000)
        done = await exchange(HEAD + b"Content-Length: 10000\r\n\r\n" + body)
        assert (done.status, done.answer) == (200, body[:ANSWER_BYTES_KEPT])

    async def test_interim_answers_are_not_the_answer(self) -> None:
        hints = b"HTTP/1.1 103 Early Hints\r\nLink: </a>\r\n\r\n"
        assert (await exchange(CONTINUE + hints + CONTINUE + OK))[:2] == (200, None)
        assert (await exchange(then_close(CONTINUE, hints, OK)))[:2] == (200, None)

    @pytest.mark.parametrize(
        ("parts", "body"),
        [
            ([HEAD + b"Content-Length: 9\r\n\r\n", b"half"], b"half"),
            ([HEAD + b"Content-Length: 9\r\n\r\nhalf"], b"half"),
            ([CHUNKED + b"4\r\nhalf\r\n"], b"half"),
            ([CHUNKED, b"no chunk\r\n"], b""),
            ([CHUNKED + b"no chunk\r\n"], b""),
            ([CHUNKED + b"4\r\nhalf\r\nno chunk\r\n"], b"half"),
            ([CHUNKED[:-3], CHUNKED[-3:] + b"no chunk\r\n"], b""),
            ([CHUNKED[:-1], CHUNKED[-1:] + b"no chunk\r\n"], b""),
            ([b"HTTP/1.1 200 OK\n\n\x00"], b"\x00"),
            ([HEAD + b"Content-Length: 4\r\n\r\nmore than that"], b"more"),
            ([HEAD + b"Content-Length: 4\r\n\r\nmore", b" than that"], b"more"),
            ([HEAD + b"Content-Encoding: gzip\r\nContent-Length: 4\r\n\r\nnone"], b"none"),
        ],
    )
    async def test_a_head_is_an_answer_whatever_becomes_of_the_body(
        self, parts: list[bytes], body: bytes, machine: Machine
    ) -> None:
        done = await exchange(then_close(*parts))
        assert done[:2] == (200, None)
        assert done.answer == body
        bound(done.seconds, WAIT_S / 2, machine)

    async def test_no_content_with_a_content(self) -> None:
        """A common mistake of servers; what they mean is plain."""
        done = await exchange(b"HTTP/1.1 204 No Content\r\nContent-Length: 2\r\n\r\nOK")
        assert done[:2] == (204, None)

    async def test_a_body_that_drips_beyond_the_deadline(self, machine: Machine) -> None:
        done = await exchange(endless(HEAD + b"\r\n", b"x", 0.01), TIMEOUT_S)
        assert done[:2] == (200, None)
        assert done.answer.startswith(b"xx")
        assert done.seconds > TIMEOUT_S - 0.02
        bound(done.seconds, TIMEOUT_S + LATE_S, machine)

    async def test_a_server_that_switches_protocols(self, machine: Machine) -> None:
        """101 is what it says, and nobody listens to what it says then."""
        switched = b"HTTP/1.1 101 X\r\nUpgrade: x\r\nConnection: upgrade\r\n\r\n"
        done = await exchange(endless(switched, b"x" * 65536))
        assert done[:2] == (101, None)
        bound(done.seconds, WAIT_S / 2, machine)


class TestFailures:
    async def test_refused(self) -> None:
        async with endpoint_of(f"http://127.0.0.1:{free_port()}") as endpoint:
            assert (await post(endpoint))[:3] == (None, "unreachable", "ConnectionRefusedError")

    @pytest.mark.parametrize("parts", [(), (b"HTTP/1.1 200",), (HEAD,), (CONTINUE,)])
    async def test_closed_before_an_answer(self, parts: tuple[bytes, ...]) -> None:
        done = await exchange(then_close(*parts))
        assert done[:3] == (None, "unreachable", "ServerDisconnectedError")

    async def test_reset(self) -> None:
        async def reset(_: Server, writer: asyncio.StreamWriter) -> None:
            connected = writer.get_extra_info("socket")
            connected.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, b"\1\0\0\0\0\0\0\0")
            writer.transport.abort()

        assert (await exchange(reset))[:3] == (None, "unreachable", "ConnectionResetError")

    @pytest.mark.parametrize(
        "answer",
        [
            b"\x16\x03\x01 not HTTP\r\n\r\n",
            b"220 mail ready\r\n",
            b"<html>\r\n\r\n",
            b"HTTP/1.1 two hundred\r\n\r\n",
            HEAD + b"no header\r\n\r\n",
            HEAD + b"Content-Length: 1\r\nContent-Length: 2\r\n\r\nab",
            HEAD + b"Content-Length: -1\r\n\r\n",
            HEAD + b"X-Header: " + b"y" * 70_000 + b"\r\n\r\n",
        ],
    )
    async def test_what_is_no_answer(self, answer: bytes, machine: Machine) -> None:
        done = await exchange(answer)
        assert done[:2] == (None, "protocol")
        assert done.reason
        bound(done.seconds, WAIT_S / 2, machine)

    async def test_what_cannot_be_sent(self) -> None:
        async with serving(OK) as server, endpoint_of(server.url, SECRET) as endpoint:
            done = await endpoint.post(f"{CANARY}\n", BODY, 1)
            assert done[:2] == (None, "protocol")
            assert CANARY not in repr(done)
            assert (await post(endpoint)).status == 200
        assert len(server.requests) == 1

    async def test_nothing_is_sent_before_open_or_after_close(self) -> None:
        async with serving(OK) as server:
            endpoint = Endpoint(Target(url=parse_http_url(server.url)))
            assert (await post(endpoint))[:2] == (None, "unreachable")
            await endpoint.open()
            await endpoint.close()
            assert (await post(endpoint))[:2] == (None, "unreachable")
            await endpoint.close()
        assert server.connections == 0


class TestDeadline:
    @pytest.mark.parametrize(
        "answer",
        [
            None,
            endless(b"HTTP/1.1 200 O", b"O", 0.01),
            endless(HEAD, b"X: y\r\n", 0.01),
            endless(b"", CONTINUE, 0.01),
            endless(b"", b"\r\n", 0.01),
        ],
        ids=["silent", "status line", "header lines", "continue", "empty lines"],
    )
    async def test_a_head_in_drops(self, answer: Writing | None, machine: Machine) -> None:
        done = await exchange(answer, TIMEOUT_S)
        assert done[:3] == (None, "timeout", "TimeoutError")
        assert done.seconds > TIMEOUT_S - 0.02
        bound(done.seconds, TIMEOUT_S + LATE_S, machine)

    @pytest.mark.filterwarnings("ignore:Sending a large body:ResourceWarning")
    async def test_a_server_that_takes_nothing(self, machine: Machine) -> None:
        """The body of a callback fits into the kernel's buffers; this one does not."""

        async def serve(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
            writer.transport.pause_reading()  # type: ignore[attr-defined]
            await asyncio.sleep(WAIT_S)

        async with (
            listening(serve) as port,
            endpoint_of(f"http://127.0.0.1:{port}", timeout_s=TIMEOUT_S) as endpoint,
        ):
            done = await post(endpoint, b"x" * 50_000_000)
        assert done[:2] == (None, "timeout")
        bound(done.seconds, TIMEOUT_S + LATE_S, machine)

    async def test_a_tls_handshake_that_hangs(self, machine: Machine) -> None:
        ended = asyncio.Event()

        async def serve(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
            await reader.read()
            ended.set()
            writer.close()

        async with (
            listening(serve) as port,
            endpoint_of(f"https://127.0.0.1:{port}", timeout_s=TIMEOUT_S) as endpoint,
        ):
            done = await post(endpoint)
            assert done[:2] == (None, "timeout")
            bound(done.seconds, TIMEOUT_S + LATE_S, machine)
            await asyncio.wait_for(ended.wait(), WAIT_S)

    async def test_the_wait_for_a_connection(self, machine: Machine) -> None:
        async with (
            serving(None) as server,
            endpoint_of(server.url, timeout_s=TIMEOUT_S, connections_max=1) as endpoint,
        ):
            exchanges = await many(endpoint, 8)
        for done in exchanges:
            assert done[:2] == (None, "timeout")
            bound(done.seconds, TIMEOUT_S + LATE_S, machine)
        assert server.connections < 8

    async def test_a_name_server_that_hangs(
        self, monkeypatch: pytest.MonkeyPatch, machine: Machine
    ) -> None:
        """Nor does it stop the event loop, or the end of the process."""
        answering = threading.Event()

        def hang(*_: Any, **__: Any) -> Any:
            answering.wait(WAIT_S)
            raise socket.gaierror

        monkeypatch.setattr(socket, "getaddrinfo", hang)
        async with endpoint_of(f"http://{NAME}:1", timeout_s=TIMEOUT_S) as endpoint:
            try:
                asked = asyncio.create_task(many(endpoint, 8))
                ticks = 0
                while not asked.done():
                    await asyncio.sleep(0.01)
                    ticks += 1
                for done in await asked:
                    assert done[:2] == (None, "timeout")
                    bound(done.seconds, TIMEOUT_S + LATE_S, machine)
                assert ticks > TIMEOUT_S / 0.01 / 4
                looking = [each for each in threading.enumerate() if each.name == "resolve"]
                assert 1 <= len(looking) <= 2
                assert all(thread.daemon for thread in looking)
            finally:
                answering.set()
        for thread in looking:
            thread.join(WAIT_S)


class TestLimits:
    @pytest.mark.parametrize(
        ("beginning", "rest", "status"),
        [
            (HEAD + b"\r\n", b"x" * 65536, 200),
            (CHUNKED, b"1000\r\n" + b"x" * 4096 + b"\r\n", 200),
            (CHUNKED + b"1;", b"x" * 65536, 200),
            (CHUNKED + b"0\r\n", b"X: y\r\n" * 10_000, 200),
            (b"", CONTINUE * 2_000, None),
            (b"", b"\r\n" * 30_000, None),
            (HEAD, b"X: y\r\n" * 10_000, None),
            (HEAD + b"X: ", b"y" * 65536, None),
            (HEAD, b"X" * 65536, None),
            (b"HTTP/1.1 200 ", b"O" * 65536, None),
        ],
        ids=[
            *("body", "chunks", "chunk extension", "trailers", "continue", "empty lines"),
            *("headers", "header", "header name", "status line"),
        ],
    )
    async def test_whatever_is_endless_is_cut(
        self, beginning: bytes, rest: bytes, status: int | None
    ) -> None:
        before = resident_bytes()
        async with (
            serving(endless(beginning, rest)) as server,
            endpoint_of(server.url) as endpoint,
        ):
            with within(1):
                done = await post(endpoint)
            await until(lambda: not server.open)
        assert (done.status, done.error) == (status, None if status else "protocol")
        assert server.written < 10_000_000  # what the kernel's buffers hold
        assert resident_bytes() - before < 10_000_000

    async def test_a_bomb_does_not_go_off(self) -> None:
        """200 MB of zeros in 194 KB; and what fits into the limit is not unpacked either."""
        packer = zlib.compressobj(9, wbits=31)
        zeros = bytes(1_000_000)
        bomb = b"".join(packer.compress(zeros) for _ in range(200)) + packer.flush()
        assert len(bomb) < 200_000
        small = gzip.compress(zeros * 10)
        before = resident_bytes()
        for body in (bomb, small):
            head = HEAD + b"Content-Encoding: gzip\r\nContent-Length: %d\r\n\r\n" % len(body)
            done = await exchange(head + body)
            assert done[:2] == (200, None)
            assert done.answer == body[:ANSWER_BYTES_KEPT]
        assert resident_bytes() - before < 10_000_000

    async def test_64_kib_are_read_and_the_connection_is_kept(self) -> None:
        answer = HEAD + b"Content-Length: %d\r\n\r\n"
        for size, connections in ((65_000, 1), (66_000, 2)):
            async with (
                serving(answer % size + b"x" * size) as server,
                endpoint_of(server.url) as endpoint,
            ):
                assert [(await post(endpoint)).status for _ in range(2)] == [200, 200]
            assert server.connections == connections


@pytest.fixture
def told(caplog: pytest.LogCaptureFixture) -> Iterator[Callable[[], str]]:
    """Everything that was logged, at any level, by anybody."""
    lines: list[str] = []
    caplog.set_level(logging.DEBUG)
    sink = logger.add(lines.append, level=0, format="{message} {extra}")
    yield lambda: caplog.text + "".join(lines)
    logger.remove(sink)


class TestSecrets:
    @pytest.mark.parametrize(
        "answer",
        [
            OK.replace(b"\r\n\r\n", b"\r\nX-Echo: " + CANARY.encode() + b"\r\n\r\n"),
            b"HTTP/1.1 200 " + CANARY.encode() + b"\x00\r\n\r\n",
            CANARY.encode() + b"\r\n\r\n",
            HEAD + b"X-Echo: " + CANARY.encode() * 1000 + b"\r\n\r\n",
            then_close(HEAD + CANARY.encode()),
            endless(b"", b"x", 0.01),
        ],
        ids=["answered", "reason", "garbage", "too long", "half", "drip"],
    )
    async def test_neither_logs_nor_results_show_one(
        self, answer: Writing | bytes, told: Callable[[], str]
    ) -> None:
        async with (
            serving(answer) as server,
            endpoint_of(
                f"{server.url}/{CANARY}?t={CANARY}", SECRET, timeout_s=TIMEOUT_S
            ) as endpoint,
        ):
            done = await post(endpoint, f'"{CANARY}"'.encode())
        assert CANARY.encode() in server.requests[0]
        assert CANARY not in repr(done)
        assert CANARY not in told()
        signature = re.search(rb"webhook-signature: (\S+)", server.requests[0])
        assert signature is not None
        assert signature[1].decode() not in repr(done) + told()

    async def test_a_host_that_fails_is_not_shown_with_its_path(
        self, told: Callable[[], str]
    ) -> None:
        for scheme in ("http", "https"):
            url = f"{scheme}://127.0.0.1:{free_port()}/{CANARY}?t={CANARY}"
            async with endpoint_of(url, SECRET) as endpoint:
                assert CANARY not in repr(await post(endpoint))
        assert CANARY not in told()

    def test_repr_shows_the_origin_only(self) -> None:
        url = parse_http_url(f"https://{NAME}:8443/{CANARY}?t={CANARY}")
        target = Target(url=url, keys=parse_secrets(SECRET))
        for shown in (url, target, Endpoint(target)):
            assert repr(shown) == f"{type(shown).__name__}('https://{NAME}:8443')"
