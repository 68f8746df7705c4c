"""What the endpoints under /v1 return: a JSON response that is written as it is.

A Litestar Response is built twice, once by the handler and once for ASGI, and its headers are
encoded in between, for every charge.
"""

from collections.abc import Sequence

from litestar.types import Receive, Scope, Send

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
