"""Responses of the endpoints under /v1: JSON that is written as it is.

A Litestar Response is built twice, once by the handler and once for ASGI, and its headers are
encoded in between, for every charge.
"""

import math
from collections.abc import Sequence
from typing import Any
from uuid import UUID

import msgspec
from litestar.types import Receive, Scope, Send

from web.requests import AnyRequest, log_with, service_of

_JSON = (b"content-type", b"application/json")


class JsonAnswer:
    """An ASGI application that sends this response. Names of headers are in lower case."""

    __slots__ = ("_body", "_headers", "_status")

    def __init__(
        self, body: bytes, *, status: int = 200, headers: Sequence[tuple[bytes, bytes]] = ()
    ) -> None:
        self._body = body
        self._status = status
        self._headers = headers

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        length = (b"content-length", b"%d" % len(self._body))
        await send(
            {
                "type": "http.response.start",
                "status": self._status,
                "headers": [*self._headers, _JSON, length],
            }
        )
        await send({"type": "http.response.body", "body": self._body, "more_body": False})


def json_of(answer: Any) -> JsonAnswer:
    return JsonAnswer(msgspec.json.encode(answer))


def command_answer(
    request: AnyRequest, answer: msgspec.Struct, payment_id: UUID, *, pending: bool, replayed: bool
) -> JsonAnswer:
    """201 with an outcome, 202 without; a header marks a replayed outcome."""
    log_with(request, payment_id=payment_id)
    headers = [(b"location", b"/v1/payments/%b" % str(payment_id).encode())]
    if pending:
        # An earlier retry would only wait for the deadline of this request.
        after_s = math.ceil(service_of(request).settings.charge_deadline_s)
        headers.append((b"retry-after", b"%d" % after_s))
    elif replayed:
        headers.append((b"idempotent-replayed", b"true"))
    return JsonAnswer(msgspec.json.encode(answer), status=202 if pending else 201, headers=headers)
