"""HTTP to Order Service: one bounded exchange and its result.

Every error means "not delivered", so aiohttp is good enough here. It tells only whether a request
had a connection, and then the request counts as sent. Gateways, which decide about money, use plain
httpx (gateways/http.py). With 64 concurrent exchanges aiohttp takes a third of httpx's CPU time.
"""

import asyncio
import functools
import socket
import ssl
import time
from collections.abc import Awaitable, Callable, Iterator
from contextvars import ContextVar
from typing import Any, NamedTuple
from urllib.parse import quote

import aiohttp
import httpx
from aiohttp.abc import AbstractResolver, ResolveResult
from aiohttp.client_proto import ResponseHandler
from yarl import URL

from payments.database.resolving import addresses_of
from payments.http_url import HttpUrl
from payments.order_service import TIMEOUT_S
from payments.order_service.addresses import is_near
from payments.order_service.heads import find_head_end, is_http, plain
from payments.order_service.signing import signature_headers
from payments.order_service.target import Target

# For a name server or host that is unavailable: nothing was sent, and the retry comes soon.
CONNECT_TIMEOUT_S = 5.0
ANSWER_BYTES_MAX = 64 * 1024  # as received: header section, body and everything between them
ANSWER_BYTES_KEPT = 2048  # of the body, for diagnosis

# A server that closes an idle connection just when it is reused costs a callback one attempt.
# Servers close after 2 s (gunicorn), most after 5 s (Node, uvicorn) or later; we close earlier.
KEEPALIVE_EXPIRY_S = 1.0


class Exchange(NamedTuple):
    """The result of one request.

    `status` is set once the header section is complete, even if the body is not. Without one it is
    None, and `error` is "timeout", "unreachable" (no connection, or it ended), "forbidden_address"
    or "protocol". `reason` is for people and contains no secret. `retry_after` is the header's text
    as sent, `answer` the beginning of the body as received, `seconds` the duration. `sent`: some of
    the request may have been sent; False only if certainly not. `content_type` is the header's
    text; of responses to callbacks only from status 500 on.
    """

    status: int | None
    error: str | None
    reason: str
    retry_after: str | None
    answer: bytes
    seconds: float
    sent: bool = True
    content_type: str | None = None


_BASIC_HEADERS = {"user-agent": "payment-service", "accept-encoding": "identity"}


class ForbiddenAddress(OSError):
    """Plain http would have gone to an address that is not near."""


class AnswerTooLong(aiohttp.ClientError):
    """The response is longer than ANSWER_BYTES_MAX."""


class Endpoint:
    """Exchanges with one target, on at most `connections_max` connections: callbacks to its URL,
    and with `get` status requests to its origin. `tls` replaces the default context.

    For plain http each address is checked (is_near) when it is connected to, so that the name
    cannot resolve to another address after the check.
    """

    def __init__(
        self,
        target: Target,
        *,
        timeout_s: float = TIMEOUT_S,
        connections_max: int = 64,
        tls: ssl.SSLContext | None = None,
    ) -> None:
        self._target = target
        self._url = target.url
        self._address = _address(self._url, self._url.path_qs)
        self.timeout_s = timeout_s
        self._connect_timeout_s = min(CONNECT_TIMEOUT_S, timeout_s)
        self._connections_max = connections_max
        self._tls = tls or (_default_tls() if self._url.scheme == "https" else None)
        self._session: aiohttp.ClientSession | None = None

    def __repr__(self) -> str:
        return f"Endpoint({self._url.origin!r})"

    async def open(self) -> None:
        """Must be called in the event loop of `post`."""
        connector = aiohttp.TCPConnector(
            limit=self._connections_max,
            keepalive_timeout=KEEPALIVE_EXPIRY_S,
            resolver=_Resolver(self._connect_timeout_s),
            socket_factory=self._new_socket,
            ssl=self._tls or True,
        )
        loop = asyncio.get_running_loop()
        connector._factory = functools.partial(_EndpointConnection, loop=loop)  # type: ignore[assignment]
        self._session = aiohttp.ClientSession(
            connector=connector,
            cookie_jar=aiohttp.DummyCookieJar(),
            auto_decompress=False,  # a compressed response stays small
            trust_env=False,
            # The whole exchange has its own timeout.
            timeout=aiohttp.ClientTimeout(sock_connect=self._connect_timeout_s),
            # We bound all received bytes; aiohttp's own limits are 8,190 bytes and 128 fields.
            max_line_size=ANSWER_BYTES_MAX,
            max_field_size=ANSWER_BYTES_MAX,
            max_headers=ANSWER_BYTES_MAX,
        )

    async def post(
        self, message_id: str, body: bytes, timestamp: int, traceparent: str | None = None
    ) -> Exchange:
        """Sends one callback within the timeout; raises only CancelledError.

        `message_id` and `timestamp` (Unix time, seconds) are for the signature. The timeout
        includes the wait for a free connection.
        """

        async def send(answer: _Answer) -> None:
            headers = self._headers(message_id, body, timestamp, traceparent)
            await self._exchange("POST", self._address, headers, body, answer)

        return await self._bounded(send, ANSWER_BYTES_KEPT)

    async def get(self, path_qs: str) -> Exchange:
        """Requests a path and query of the target's origin; as `post`, but without signature, and
        the whole received body is kept."""

        async def send(answer: _Answer) -> None:
            headers = _BASIC_HEADERS | {"accept": "application/json"}
            await self._exchange("GET", _address(self._url, path_qs), headers, None, answer)

        return await self._bounded(send, ANSWER_BYTES_MAX)

    async def _bounded(
        self, send: Callable[["_Answer"], Awaitable[None]], bytes_kept: int
    ) -> Exchange:
        began = time.monotonic()
        answer = _Answer(began + self.timeout_s)
        _current.set(answer)
        error, reason = None, ""
        try:
            async with asyncio.timeout(self.timeout_s):
                await send(answer)
        except Exception as failure:  # noqa: BLE001 - not only aiohttp's documented errors
            error, reason = _explain(failure)
        if answer.status is not None:
            error = None
        kept, seconds = bytes(answer.body[:bytes_kept]), time.monotonic() - began
        return Exchange(
            *(answer.status, error, reason, answer.retry_after, kept, seconds),
            sent=answer.sent,
            content_type=answer.content_type,
        )

    async def close(self) -> None:
        """Closes all connections; running exchanges fail."""
        if self._session is not None:
            session, self._session = self._session, None
            await session.close()

    def _headers(
        self, message_id: str, body: bytes, timestamp: int, traceparent: str | None
    ) -> dict[str, str]:
        headers = _BASIC_HEADERS | {"content-type": "application/json"}
        if traceparent is not None:
            headers["traceparent"] = traceparent
        if self._target.keys:
            headers |= signature_headers(self._target.keys, message_id, timestamp, body)
        return headers

    async def _exchange(
        self,
        method: str,
        address: URL,
        headers: dict[str, str],
        body: bytes | None,
        answer: "_Answer",
    ) -> None:
        if self._session is None:
            raise aiohttp.ClientConnectionError("not open")
        async with self._session.request(
            method, address, data=body, headers=headers, allow_redirects=False
        ) as response:
            answer.status = response.status
            answer.retry_after = response.headers.get("retry-after")
            if answer.status >= 500 or method == "GET":
                answer.content_type = response.headers.get("content-type")
            async for part in response.content.iter_any():
                answer.body += part

    def _new_socket(self, address: tuple[Any, ...]) -> socket.socket:
        """A socket for one address of the name, the last place to reject that address."""
        family, kind, protocol, _, socket_address = address
        if self._url.scheme == "http" and not is_near(socket_address[0], self._target.networks):
            raise ForbiddenAddress
        return socket.socket(family, kind, protocol)


class _Answer:
    """The part of a response that was received so far."""

    def __init__(self, send_until: float) -> None:
        self.send_until = send_until  # by the monotonic clock
        self.status: int | None = None
        self.retry_after: str | None = None
        self.content_type: str | None = None
        self.body = bytearray()
        self.sent = False


# The response of the exchange in the current task.
_current: ContextVar[_Answer] = ContextVar("exchange")


class _EndpointConnection(ResponseHandler):
    """aiohttp's side of one connection, changed in five points.

    - aiohttp counts only the body. Here all received bytes count: interim responses, chunk
      extensions and empty lines before the header section can be endless too.
    - It drops a response if the bytes after the header section, in the same packet, are not HTTP:
      the body of a 204, or a bad chunk. Here header sections are parsed alone, so that the status
      counts.
    - It rejects header sections that HTTP allows. Here they are normalised first (heads.py).
    - It raises for a body that is cut off, or is late. Here the body ends there.
    - It takes bytes after a response for the next one. Here they end the connection.
    """

    _bytes_left = ANSWER_BYTES_MAX
    _head = b""  # the received part of a header section
    _has_head = False

    def set_response_params(self, **params: Any) -> None:
        """aiohttp calls this before each request on this connection, in the task of the exchange.

        A process that was frozen while it connected sends nothing, since another process may have
        claimed the delivery.
        """
        answer = _current.get()
        if time.monotonic() > answer.send_until:
            self.abort()
        else:
            answer.sent = True
        self._bytes_left = ANSWER_BYTES_MAX
        self._head = b""
        self._has_head = False
        super().set_response_params(**params)

    def feed_data(self, data: Any, size: int = 0) -> None:
        """A header section was parsed: the final or an interim one (RFC 9110 section 15.2)."""
        status = data[0].code
        self._has_head = status >= 200 or status == 101
        super().feed_data(data, size)

    def data_received(self, data: bytes) -> None:
        self._bytes_left -= len(data)
        if self._bytes_left >= 0:
            self._receive(data)
            return
        self._receive(data[: self._bytes_left])  # up to the limit
        if self.is_connected():
            self.set_exception(AnswerTooLong())

    def _receive(self, data: bytes) -> None:
        if not self._has_head:
            data = self._feed_heads(data)
            if not data:
                return
        if data and self._payload is not None and self._payload.is_eof():
            self.abort()
        else:
            self._feed(data)  # may be empty: then the parser continues with its buffer

    def _feed_heads(self, data: bytes) -> bytes:
        """Parses each header section alone; returns the bytes after the final one."""
        looked_at = len(self._head)
        self._head += data
        while (end := find_head_end(self._head, looked_at)) is not None:
            head, self._head = self._head[:end], self._head[end:]
            looked_at = 0
            self._feed(plain(head))
            if self._has_head or not self.is_connected():
                return self._head
        if not is_http(self._head):
            self._feed(self._head)  # the parser rejects it
        return b""

    def _feed(self, data: bytes) -> None:
        if self.is_connected():
            super().data_received(data)

    def set_exception(self, exc: BaseException, *cause: BaseException) -> None:
        super().set_exception(exc, *cause)
        if self.transport is not None:
            self.transport.abort()

    def connection_lost(self, exc: BaseException | None) -> None:
        body, self._payload = self._payload, None
        super().connection_lost(exc)
        if body is not None and not body.is_eof():
            body.feed_eof()

    def close(self) -> None:
        """Closes at once, without waiting for unsent or unread bytes."""
        self.abort()


class _Resolver(AbstractResolver):
    def __init__(self, timeout_s: float) -> None:
        self._timeout_s = timeout_s

    async def resolve(
        self, host: str, port: int = 0, family: socket.AddressFamily = socket.AF_UNSPEC
    ) -> list[ResolveResult]:
        return [
            ResolveResult(hostname=host, host=address, port=port, family=family, proto=0, flags=0)
            for address in await addresses_of(host, self._timeout_s)
        ]

    async def close(self) -> None:
        pass


def _explain(failure: Exception) -> tuple[str, str]:
    """The error and the reason of an Exchange; never an exception's own text, which may contain the
    URL or headers."""
    causes = list(_causes(failure))
    name = type(causes[-1]).__name__
    if any(isinstance(cause, ForbiddenAddress) for cause in causes):
        return (
            "forbidden_address",
            "plain http to a metadata service, or to an address that is not loopback or private",
        )
    if any(isinstance(cause, TimeoutError) for cause in causes):
        return "timeout", "TimeoutError"
    if isinstance(causes[-1], ssl.SSLError):
        detail = getattr(causes[-1], "verify_message", None) or causes[-1].reason
        return "unreachable", f"{name}: {detail}"
    if any(isinstance(cause, aiohttp.ClientConnectionError) for cause in causes):
        return "unreachable", name
    return "protocol", name


def _causes(failure: BaseException) -> Iterator[BaseException]:
    """The exception and its chain of causes."""
    cause: BaseException | None = failure
    while cause is not None and not isinstance(cause, asyncio.CancelledError):
        yield cause
        cause = cause.__cause__


def _address(url: HttpUrl, path_qs: str) -> URL:
    """The URL for aiohttp, with path and query unchanged: yarl would decode needless escapes, like
    %2F in a query, and drop an empty query. So both are passed as the path. Characters that no URL
    may contain (RFC 3986 section 2) are encoded."""
    path = quote(path_qs, safe="%/?:@!$&'()*+,;=[]")
    return URL.build(scheme=url.scheme, authority=url.authority, path=path, encoded=True)


def _default_tls() -> ssl.SSLContext:
    """Trusts the public authorities, and those of this machine or SSL_CERT_FILE: the certificate
    may come from a private authority."""
    context = httpx.create_ssl_context(trust_env=False)
    context.load_default_certs()
    return context
