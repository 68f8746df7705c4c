"""ASGI middleware that every request passes before the framework.

The guard reads the whole body, within limits, into the scope's state, so that no handler waits for
a body; it sets the request id; and it counts, times and logs every response.
"""

import asyncio
import time
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext, suppress
from typing import Any

from litestar.types import ASGIApp, Receive, Send
from prometheus_client import Counter, Histogram

from payments.errors import PaymentsError
from payments.observability.logs import LogFields, trace_field
from payments.observability.metrics import Telemetry
from payments.observability.tracing import current_traceparent, mark_failed, span
from web.paths import WEBHOOK
from web.problems import MEDIA_TYPE, BodyTooLarge, BodyTooSlow, refused
from web.serving.access_log import PROBES, AccessLog
from web.serving.heads import METHODS, request_id_of, traceparent_of

BODY_MAX = 16 * 1024  # bytes; a charge has about 150
WEBHOOK_BODY_MAX = 64 * 1024  # of a provider's webhook, which may hold a whole order
BODY_TIMEOUT_S = 5.0
LINGER_S = 1.0  # for a client that still sends its body to read the error

# Set in the scope's state if the server has the whole body already: then no timeout is needed, and
# setting one would take longer than reading.
BODY_ARRIVED = "body_arrived"
# Set there by our protocol: the request's door.Place.
PLACE = "place"

_PROVIDERS = WEBHOOK.partition("{")[0]


class ClientLeft(Exception):
    """The connection ended before the request was complete."""


class Guard:
    def __init__(self, app: ASGIApp, telemetry: Telemetry, access_log_per_s: int) -> None:
        self._app = app
        self._telemetry = telemetry
        self._access_log = AccessLog(access_log_per_s)
        # Cached by method, route and status: looking up labels takes longer than counting.
        self._children: dict[tuple[str, str, int], tuple[Counter, Histogram]] = {}
        self._problems: dict[str, Counter] = {}  # by code

    async def __call__(self, scope: Any, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        started = time.perf_counter()
        if scope["method"] == "HEAD":
            # The same response as for GET; the server omits the body.
            scope = scope | {"method": "GET"}
        state = scope.setdefault("state", {})
        headers = scope["headers"]
        state["request_id"] = request_id = request_id_of(headers)
        traceparent = traceparent_of(headers)
        status = 0

        async def send_counted(message: Any) -> None:
            nonlocal status
            if message["type"] == "http.response.start":
                status = message["status"]
                message["headers"] = [*message["headers"], (b"x-request-id", request_id.encode())]
            await send(message)

        is_probe = scope["path"] in PROBES
        tracing = span("HTTP", kind="server", parent=traceparent) if not is_probe else nullcontext()
        with tracing as opened:
            state["traceparent"] = traceparent = current_traceparent(traceparent)
            with LogFields(request_id=request_id, **trace_field(traceparent)):
                try:
                    await self._answer(scope, receive, send_counted)
                finally:
                    if status:
                        self._count(scope, status, time.perf_counter() - started)
            if opened is not None:
                _describe(opened, scope, status)

    async def _answer(self, scope: Any, receive: Receive, send: Send) -> None:
        state = scope["state"]
        try:
            state["body"] = await self._read_body(state, receive, _body_max(scope["path"]))
        except PaymentsError as error:
            await self._refuse(error, state, receive, send)
        except ClientLeft:
            pass
        else:
            await self._app(scope, receive, send)

    async def _read_body(self, state: dict[str, Any], receive: Receive, most: int) -> bytes:
        """The body, within limits; the request holds no place while its client sends it."""
        if BODY_ARRIVED in state:
            return await _read_body(receive, most)
        with _without_place(state):
            try:
                async with asyncio.timeout(BODY_TIMEOUT_S):
                    return await _read_body(receive, most)
            except TimeoutError:
                detail = f"Send the whole body within {BODY_TIMEOUT_S:g} seconds."
                raise BodyTooSlow(detail) from None

    async def _refuse(
        self, error: PaymentsError, state: dict[str, Any], receive: Receive, send: Send
    ) -> None:
        """Sends the error and closes the connection, since the rest of the body may be unread.

        First it discards that rest for up to LINGER_S. Closing with unread bytes resets a
        connection, and a client that still sends would not see the response.
        """
        status, body, extra = refused(error)
        state["problem"] = error.code
        headers = [(b"content-type", MEDIA_TYPE.encode()), (b"connection", b"close")]
        headers += [(name.lower().encode(), value.encode()) for name, value in extra.items()]
        headers.append((b"content-length", str(len(body)).encode()))
        await send({"type": "http.response.start", "status": status, "headers": headers})
        await send({"type": "http.response.body", "body": body, "more_body": True})
        with _without_place(state), suppress(TimeoutError):
            async with asyncio.timeout(LINGER_S):
                while BODY_ARRIVED not in state and (await receive()).get("more_body"):
                    pass
        await send({"type": "http.response.body", "body": b"", "more_body": False})

    def _count(self, scope: Any, status: int, seconds: float) -> None:
        method, route = _method_and_route(scope)
        children = self._children.get((method, route, status))
        if children is None:
            children = self._children[method, route, status] = (
                self._telemetry.requests.labels(method, route, status),
                self._telemetry.request_seconds.labels(method, route),
            )
        children[0].inc()
        children[1].observe(seconds)
        if (code := scope["state"].get("problem")) is not None:
            problem = self._problems.get(code)
            if problem is None:
                problem = self._problems[code] = self._telemetry.problems.labels(code)
            problem.inc()
        self._access_log.write(method, route, status, seconds, scope["state"])


@contextmanager
def _without_place(state: dict[str, Any]) -> Iterator[None]:
    """Releases the request's place while it waits for its client. Without our protocol it has no
    place."""
    place = state.get(PLACE)
    if place is None:
        yield
        return
    place.leave()
    try:
        yield
    finally:
        place.enter()


def _body_max(path: str) -> int:
    """How many bytes a body may have; known before any of it is read."""
    return WEBHOOK_BODY_MAX if path.startswith(_PROVIDERS) else BODY_MAX


async def _read_body(receive: Receive, most: int) -> bytes:
    body: bytes = b""
    while True:
        message: Any = await receive()
        if message["type"] == "http.disconnect":
            raise ClientLeft
        body += message.get("body", b"")
        if len(body) > most:
            raise BodyTooLarge(f"Send at most {most} bytes.")
        if not message.get("more_body"):
            return body


def _method_and_route(scope: Any) -> tuple[str, str]:
    """Labels of bounded number: a known method or `other`, and the template of the path."""
    method = scope["method"] if scope["method"] in METHODS else "other"
    return method, scope.get("path_template") or "unmatched"


def _describe(opened: Any, scope: Any, status: int) -> None:
    """Names and describes the span by OpenTelemetry's conventions for HTTP."""
    method, route = _method_and_route(scope)
    opened.update_name(f"{method} {route}")
    attributes = {
        "http.request.method": method,
        "http.route": route,
        "http.response.status_code": status,
    }
    for name in ("payment_id", "order_id", "request_id"):
        if name in scope["state"]:
            attributes[name.replace("_", ".")] = str(scope["state"][name])
    opened.set_attributes(attributes)
    if status >= 500:
        mark_failed(opened, str(status))
