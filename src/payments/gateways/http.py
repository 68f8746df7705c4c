"""HTTP to a payment provider: one bounded exchange, and whether it may have reached the provider.

A gateway decides about money on the difference between NeverSent and OutcomeUnknown, and only httpx
on its own transport draws it (callbacks have another): it raises ConnectError and ConnectTimeout
before a byte of the request is written (no address for the name, refused,
unreachable, TLS handshake failed or too slow) and PoolTimeout before there is a connection.
Whatever else goes wrong may have gone wrong after the provider acted.
"""

import asyncio
import ssl
from collections.abc import AsyncIterator, Iterator, Mapping, Sequence
from contextlib import asynccontextmanager
from functools import cache
from types import MappingProxyType
from typing import NamedTuple, NoReturn, TypeVar
from urllib.parse import urlencode
from uuid import UUID

import httpx
import msgspec

from payments.gateways import NeverSent, OutcomeUnknown
from payments.http_url import HttpUrl, parse_http_url

ANSWER_BYTES_MAX = 64 * 1024  # a provider's answer is about 1 KiB
CONNECTIONS_MAX = 100  # at 200 ms an answer, 500 exchanges a second

# A server that closes an idle connection just as it is used again makes an outcome unknown. Servers
# wait at least 2 s (gunicorn), most 5 s (Node, uvicorn) or longer: here it is given up before.
KEEPALIVE_EXPIRY_S = 1.0

# Of the deadline, for each of three waits: for a free connection, for TCP, for TLS. Together they
# end before the deadline, so it never hits a request that is not on its way.
CONNECT_SHARE = 0.3

_NEVER_SENT = (httpx.ConnectError, httpx.ConnectTimeout, httpx.PoolTimeout)

# Reset, closed, or no HTTP. What cannot be sent (LocalProtocolError) is a mistake made here.
_OUTAGES = (httpx.NetworkError, httpx.TimeoutException, httpx.RemoteProtocolError, OSError)

JSON_TYPE = "application/json"
FORM_TYPE = "application/x-www-form-urlencoded"

T = TypeVar("T")


class ProviderResponse(NamedTuple):
    """HTTP status and body, as received; of the headers those that were asked for, by these
    names, as far as they were there."""

    status: int
    body: bytes
    headers: Mapping[str, str] = MappingProxyType({})

    @property
    def is_outage(self) -> bool:
        """Whether the provider says that it is down or overloaded, or rejects the credentials: no
        charge succeeds before they are put right, so none should be begun."""
        return self.status in (401, 429) or self.status >= 500

    def unexpected(self) -> NoReturn:
        """Raises OutcomeUnknown: the provider's documentation gives this response no meaning."""
        raise OutcomeUnknown(f"the provider responded with {self.status}", is_outage=self.is_outage)

    def read(self, decoder: msgspec.json.Decoder[T]) -> T:
        """The body as what the decoder expects; OutcomeUnknown if it is anything else."""
        found = decoded(self.body, decoder)
        if found is None:
            reason = f"invalid response with status {self.status}"
            raise OutcomeUnknown(reason, is_outage=self.is_outage)
        return found


def decoded(body: bytes, decoder: msgspec.json.Decoder[T]) -> T | None:
    """None for whatever the decoder does not expect, also if it is nested too deeply."""
    try:
        return decoder.decode(body)
    except (msgspec.MsgspecError, UnicodeDecodeError, RecursionError):
        return None


class ProviderHttp:
    """Exchanges with one provider, on at most `connections_max` connections.

    `base_url` is http(s)://host[:port][/path]. `headers` go with every request and may hold
    secrets. `tls` replaces the default context, for a client certificate or a CA of one's own.
    Without `keep_alive` each exchange gets its own connection: on a kept one, an answer that the
    provider sent too many would be taken for the next request's.

    Each connection is a transport of its own. A shared httpx pool looks at all its connections for
    every request: with 100 of them 6.5 ms of CPU, against 0.5 ms. And there is no httpx client
    around it: proxies from the environment, redirects, cookies and logged addresses are the
    client's doing.
    """

    def __init__(
        self,
        base_url: str,
        headers: Mapping[str, str] | None = None,
        *,
        connections_max: int = CONNECTIONS_MAX,
        keep_alive: bool = True,
        tls: ssl.SSLContext | None = None,
    ) -> None:
        """Raises ValueError for an unusable address, without repeating it."""
        self._origin = _parsed(base_url).origin
        self._base_url = base_url.rstrip("/")
        self._headers = httpx.Headers({"user-agent": "payment-service"} | dict(headers or {}))
        self._headers["accept-encoding"] = "identity"
        self._tls = tls or _public_authorities()
        self._keep_alive = keep_alive
        self._free = asyncio.Semaphore(connections_max)
        self._idle: list[httpx.AsyncHTTPTransport] = []
        self._closed = False

    def __repr__(self) -> str:
        return f"ProviderHttp({self._origin!r})"

    async def exchange(
        self,
        method: str,
        path: str,
        *,
        timeout_s: float,
        headers: Mapping[str, str] | None = None,
        body: object = None,
        form: Mapping[str, object] | None = None,
        response_headers: Sequence[str] = (),
        response_bytes_max: int = ANSWER_BYTES_MAX,
    ) -> ProviderResponse:
        """Sends one request, and returns the response, any status, with these of its headers.

        `body` is sent as JSON, or `form` as encode_form makes it. Takes at most `timeout_s` in all.
        Raises NeverSent or OutcomeUnknown, whose messages hold neither headers nor path nor bodies;
        `is_outage` says whether that is for the breaker to count. ValueError or TypeError for what
        cannot be sent.
        """
        if timeout_s <= 0 or self._closed:
            reason = "closed" if self._closed else "no time left"
            raise NeverSent(f"{self._origin}: {reason}", is_outage=False)
        if body is not None and form is not None:
            raise ValueError("either body or form")
        content_type = FORM_TYPE if form is not None else JSON_TYPE
        content = msgspec.json.encode(body) if body is not None else None
        content = encode_form(form) if form is not None else content
        request = self._request(method, path, timeout_s, headers or {}, content, content_type)
        try:
            async with (
                asyncio.timeout(timeout_s),
                self._connection(timeout_s * CONNECT_SHARE) as connection,
            ):
                return await _exchange(connection, request, response_headers, response_bytes_max)
        except (NeverSent, OutcomeUnknown):
            raise
        except _NEVER_SENT as error:
            raise NeverSent(f"{self._origin}: {type(error).__name__}") from None
        except TimeoutError:
            reason = f"no response within {timeout_s:g} s"
            raise OutcomeUnknown(f"{self._origin}: {reason}", is_outage=True) from None
        except Exception as error:  # noqa: BLE001 - not only httpx's own: no library is complete
            reason, is_outage = type(error).__name__, isinstance(error, _OUTAGES)
            raise OutcomeUnknown(f"{self._origin}: {reason}", is_outage=is_outage) from None

    async def close(self) -> None:
        """Closes the idle connections; those in use are closed when their exchange is over."""
        self._closed = True
        while self._idle:
            await self._idle.pop().aclose()

    def _request(
        self,
        method: str,
        path: str,
        timeout_s: float,
        headers: Mapping[str, str],
        content: bytes | None,
        content_type: str,
    ) -> httpx.Request:
        if not path.startswith("/"):
            raise ValueError("path must begin with /")
        every_wait = httpx.Timeout(None, connect=timeout_s * CONNECT_SHARE, pool=0)
        return httpx.Request(
            method,
            self._base_url + path,
            headers=_merged(self._headers, headers, None if content is None else content_type),
            content=content,
            extensions={"timeout": every_wait.as_dict()},
        )

    @asynccontextmanager
    async def _connection(self, wait_s: float) -> AsyncIterator[httpx.AsyncHTTPTransport]:
        """A connection for one exchange; one whose exchange failed is not used again."""
        try:
            async with asyncio.timeout(wait_s):
                await self._free.acquire()
        except TimeoutError:
            reason = "all connections are in use"
            raise NeverSent(f"{self._origin}: {reason}", is_outage=False) from None
        try:
            connection = self._idle.pop() if self._idle else self._new_connection()
            sound = False
            try:
                yield connection
                sound = not self._closed
            finally:
                if sound:
                    self._idle.append(connection)
                else:
                    await connection.aclose()
        finally:
            self._free.release()

    def _new_connection(self) -> httpx.AsyncHTTPTransport:
        kept = 1 if self._keep_alive else 0
        return httpx.AsyncHTTPTransport(
            verify=self._tls,
            trust_env=False,
            limits=httpx.Limits(
                max_connections=1,
                max_keepalive_connections=kept,
                keepalive_expiry=KEEPALIVE_EXPIRY_S,
            ),
        )


def encode_form(form: Mapping[str, object]) -> bytes:
    """As application/x-www-form-urlencoded. Equal forms give equal bytes, in the order of their
    keys: a provider may take other bytes under the same idempotency key for another request.

    Values are text, whole numbers, booleans or UUIDs; mappings become `metadata[payment_id]`,
    sequences `expand[]`; what is None is left out. TypeError for anything else.
    """
    return urlencode(list(_pairs("", form))).encode()


def _pairs(name: str, value: object) -> Iterator[tuple[str, str]]:
    match value:
        case None:
            return
        case bool():
            yield name, "true" if value else "false"
        case str() | int() | UUID():
            yield name, str(value)
        case Mapping():
            for key in sorted(value):
                yield from _pairs(f"{name}[{key}]" if name else key, value[key])
        case list() | tuple():
            for each in value:
                yield from _pairs(f"{name}[]", each)
        case _:
            raise TypeError(f"a form cannot hold {type(value).__name__}")


async def _exchange(
    connection: httpx.AsyncHTTPTransport,
    request: httpx.Request,
    headers: Sequence[str],
    bytes_max: int,
) -> ProviderResponse:
    response = await connection.handle_async_request(request)
    try:
        body = bytearray()
        async for part in response.aiter_raw():  # undecoded: a compressed answer stays small
            body += part
            if len(body) > bytes_max:
                raise OutcomeUnknown(f"response of more than {bytes_max} bytes")
        found = {name: response.headers[name] for name in headers if name in response.headers}
        return ProviderResponse(response.status_code, bytes(body), found)
    finally:
        await response.aclose()


def _merged(
    common: httpx.Headers, own: Mapping[str, str], content_type: str | None
) -> httpx.Headers:
    merged = common.copy()
    merged.update(own)
    if content_type is not None:
        merged["content-type"] = content_type
    return merged


@cache
def _public_authorities() -> ssl.SSLContext:
    """The default context, shared by all providers: reading the certificates takes 30 ms."""
    return httpx.create_ssl_context(trust_env=False)


def _parsed(base_url: str) -> HttpUrl:
    """Raises ValueError, which does not repeat it."""
    try:
        url = parse_http_url(base_url)
    except ValueError as error:
        raise ValueError(f"the provider's address {error}") from None
    if "?" in url.path_qs:
        raise ValueError("the provider's address must hold no query")
    return url
