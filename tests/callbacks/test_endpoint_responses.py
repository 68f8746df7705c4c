"""Every response that HTTP allows is understood, and the URL is sent as it was configured."""

import asyncio
import gzip

import pytest

from tests.callbacks.raw_server import (
    OK,
    WAIT_S,
    anyio_backend,  # noqa: F401 - a fixture
    endpoint_of,
    exchange,
    post,
    serving,
    then_close,
)
from tests.machine import Machine, bound

pytestmark = pytest.mark.anyio

HEAD = b"HTTP/1.1 200 OK\r\n"
END = b"Content-Length: 2\r\n\r\nOK"
CHUNKED = HEAD + b"Transfer-Encoding: chunked\r\n\r\n"
LARGE = b"y" * 60_000
CONTINUE = b"HTTP/1.1 100 Continue\r\n\r\n"
HINTS = b"HTTP/1.1 103 Early Hints\r\n" + b"Link: </a>; rel=preload\r\n" * 500 + b"\r\n"

# By what a client might not understand of it; all are 200 with the body OK.
ALLOWED = {
    # aiohttp's defaults: max_line_size and max_field_size are 8,190 bytes, max_headers is 128.
    "a value of 8,190 bytes": HEAD + b"X-Header: " + b"y" * 8190 + b"\r\n" + END,
    "a value of 60,000 bytes": HEAD + b"X-Header: " + LARGE + b"\r\n" + END,
    "a name of 60,000 bytes": HEAD + LARGE + b": y\r\n" + END,
    "a reason phrase of 60,000 bytes": b"HTTP/1.1 200 " + LARGE + b"\r\n" + END,
    "2,000 headers": HEAD + b"X-Header: y\r\n" * 2000 + END,
    "1,000 cookies": HEAD + b"Set-Cookie: a=b; Path=/\r\n" * 1000 + END,
    # llhttp, under aiohttp, wants one Content-Length, although RFC 9110 section 8.6 allows equal.
    "the same length twice": HEAD + b"Content-Length: 2\r\n" + END,
    "the same length in a list": HEAD + b"Content-Length: 2, 2\r\n\r\nOK",
    # RFC 9112 section 5.2 has a user agent read what no server should send.
    "a folded value": HEAD + b"X-Header: a\r\n b\r\n\tc\r\n" + END,
    "a folded value, and the same length twice": (
        HEAD + b"X-Header: a\r\n b\r\nContent-Length: 2\r\n" + END
    ),
    "a folded length": HEAD + b"Content-Length:\r\n 2\r\n\r\nOK",
    # llhttp refuses them; RFC 9110 section 5.5 lets a recipient overlook them.
    "control characters": HEAD + b"X-Header: a\x00b\x01\x7f\r\n" + END,
    "an empty value": HEAD + b"X-Header:\r\n" + END,
    "bytes that are not ASCII": b"HTTP/1.1 200 \xc3\x9cber\xff\r\nX: \xff\xfe\r\n" + END,
    "no reason phrase": b"HTTP/1.1 200 \r\n" + END,
    "no reason phrase and no space": b"HTTP/1.1 200\r\n" + END,
    "a reason phrase with a tab": b"HTTP/1.1 200 all\tright\r\n" + END,
    "a length with white space": HEAD + b"Content-Length: \t2\t \r\n\r\nOK",
    "a minor version to come": b"HTTP/1.2 200 OK\r\n" + END,
    "HTTP/1.0": b"HTTP/1.0 200 OK\r\n" + END,
    "HTTP/1.0, kept": b"HTTP/1.0 200 OK\r\nConnection: keep-alive\r\n" + END,
    "chunks": CHUNKED + b"1\r\nO\r\n1\r\nK\r\n0\r\n\r\n",
    "chunks with extensions": CHUNKED + b'2;a=b;c="' + b"d" * 9000 + b'"\r\nOK\r\n0;e\r\n\r\n',
    "trailers": CHUNKED + b"2\r\nOK\r\n0\r\n" + b"X-Trailer: y\r\n" * 1000 + b"\r\n",
    "a large trailer": CHUNKED + b"2\r\nOK\r\n0\r\nX-Trailer: " + LARGE + b"\r\n\r\n",
    "chunks, and a length that they override": (
        HEAD + b"Content-Length: 9\r\nTransfer-Encoding: chunked\r\n\r\n2\r\nOK\r\n0\r\n\r\n"
    ),
    "empty lines before it": b"\r\n\r\n" + HEAD + END,
    "interim responses": CONTINUE + HINTS + b"HTTP/1.1 102 \r\n\r\n" + HEAD + END,
    "lines that end with a line feed alone": b"HTTP/1.1 200 OK\nContent-Length: 2\n\nOK",
    "a Retry-After that is long": HEAD + b"Retry-After: " + b"1" * 9000 + b"\r\n" + END,
}

# Without a length, or without a body that could have one; by name, with the status.
WITHOUT_LENGTH = {
    "neither a length nor chunks": (HEAD + b"\r\nOK", 200),
    "HTTP/1.0 without a length": (b"HTTP/1.0 200 OK\r\n\r\nOK", 200),
    "a transfer coding without chunks": (
        HEAD + b"Transfer-Encoding: gzip\r\n\r\n" + gzip.compress(b"OK"),
        200,
    ),
    "204": (b"HTTP/1.1 204 No Content\r\n\r\n", 204),
    "204 with a length": (b"HTTP/1.1 204 No Content\r\nContent-Length: 0\r\n\r\n", 204),
    "204 with chunks": (
        b"HTTP/1.1 204 No Content\r\nTransfer-Encoding: chunked\r\n\r\n0\r\n\r\n",
        204,
    ),
    "205": (b"HTTP/1.1 205 Reset Content\r\nContent-Length: 0\r\n\r\n", 205),
    "205 with chunks": (
        b"HTTP/1.1 205 Reset Content\r\nTransfer-Encoding: chunked\r\n\r\n0\r\n\r\n",
        205,
    ),
    "205 until the end": (b"HTTP/1.1 205 Reset Content\r\n\r\n", 205),
    "226": (b"HTTP/1.1 226 IM Used\r\nContent-Length: 0\r\n\r\n", 226),
    "299 without a reason": (b"HTTP/1.1 299\r\nContent-Length: 0\r\n\r\n", 299),
}


@pytest.mark.parametrize("answer", ALLOWED.values(), ids=ALLOWED)
async def test_what_http_allows(answer: bytes, machine: Machine) -> None:
    done = await exchange(answer)
    assert (*done[:3], done.answer) == (200, None, "", b"OK")
    bound(done.seconds, WAIT_S / 2, machine)


@pytest.mark.parametrize("answer", ALLOWED.values(), ids=ALLOWED)
async def test_in_whatever_packets(answer: bytes) -> None:
    """Cut within the lines, and within the end of the head."""
    end = answer.find(b"\r\n\r\n")
    for cut in (1, 9, 12, 15, 20, end + 1, end + 2, end + 3):
        done = await exchange(then_close(answer[:cut], answer[cut:]))
        assert (*done[:2], done.answer) == (200, None, b"OK"), cut


@pytest.mark.parametrize(("answer", "status"), WITHOUT_LENGTH.values(), ids=WITHOUT_LENGTH)
async def test_without_a_length(answer: bytes, status: int, machine: Machine) -> None:
    done = await exchange(then_close(answer))
    assert done[:2] == (status, None)
    bound(done.seconds, WAIT_S / 2, machine)


async def test_each_byte_for_itself() -> None:
    drops = [bytes([byte]) for byte in CONTINUE + HEAD + b"Content-Length: 2\r\n" + END]
    assert (await exchange(then_close(*drops)))[:2] == (200, None)


@pytest.mark.parametrize("name", ["2,000 headers", "the same length twice", "trailers", "chunks"])
async def test_and_the_connection_is_kept(name: str) -> None:
    async with serving(ALLOWED[name]) as server, endpoint_of(server.url) as endpoint:
        assert [(await post(endpoint)).status for _ in range(3)] == [200, 200, 200]
    assert server.connections == 1


async def test_with_a_length_that_chunks_override_it_is_not_kept() -> None:
    """Such a response may be two (RFC 9112 section 6.3)."""
    answer = ALLOWED["chunks, and a length that they override"]
    async with serving(answer) as server, endpoint_of(server.url) as endpoint:
        assert [(await post(endpoint)).status for _ in range(2)] == [200, 200]
    assert server.connections == 2


@pytest.mark.parametrize(
    "target",
    [
        "/a%2Fb?next=%2Fc%2F",
        "/%7Euser/%41?q=%41%7e",
        "/a/../b/./c//d",
        "/callback?token=a%2Bb%3D+c&next=/c?d&&x=%E4",
        "/a;b=c,d/!$&'()*+=:@?!$&'()*+,;=:@/?",
        "/%",
        "/?a=%zz",
        "/a[0]?b[]=c",
    ],
)
async def test_path_and_query_are_sent_as_they_are(target: str) -> None:
    """httpx resolves `..` and yarl, under aiohttp, decodes what need not be encoded."""
    async with serving(OK) as server, endpoint_of(server.url + target) as endpoint:
        assert (await post(endpoint)).status == 200
    assert server.requests[0].split(b" ")[1].decode() == target


@pytest.mark.parametrize(
    ("given", "sent"),
    [
        ("", "/"),
        ("?", "/?"),
        ("?a=b", "/?a=b"),
        ("/a?", "/a?"),
        ("/ä?ö=€", "/%C3%A4?%C3%B6=%E2%82%AC"),
        ('/{a}|^`"<>\\', "/%7Ba%7D%7C%5E%60%22%3C%3E%5C"),
    ],
)
async def test_what_a_url_cannot_hold_is_encoded(given: str, sent: str) -> None:
    async with serving(OK) as server, endpoint_of(server.url + given) as endpoint:
        assert (await post(endpoint)).status == 200
    assert server.requests[0].split(b" ")[1].decode() == sent


async def test_heads_in_drops_cost_no_more_than_they_are_long(machine: Machine) -> None:
    """60 KiB in packets of a few bytes."""
    pieces = [LARGE[at : at + 200] for at in range(0, len(LARGE), 200)]

    async def write(server: object, writer: asyncio.StreamWriter) -> None:
        for piece in (HEAD + b"X: ", *pieces, b"\r\n" + END):
            writer.write(piece)
            await asyncio.sleep(0)

    done = await exchange(write)
    assert done[:2] == (200, None)
    bound(done.seconds, 2, machine)
