"""Responses that the protocol writes itself, to requests that never become a task."""

import asyncio
from collections.abc import Iterable
from http import HTTPStatus

from payments.errors import PaymentsError, TooBusy, Unauthorized
from web.auth import SEND_A_KEY
from web.problems import MEDIA_TYPE, NotFound, refused


class PreparedAnswer:
    """A response that is built in advance. `waits`: it is delayed in a flood (see throttle.py).
    `code` is the code of its problem, None if it is none."""

    __slots__ = ("_head", "body", "code", "status", "waits")

    def __init__(
        self,
        status: int,
        body: bytes,
        media_type: str = MEDIA_TYPE,
        headers: dict[str, str] | None = None,
        *,
        waits: bool = True,
        code: str | None = None,
    ) -> None:
        self.status = status
        self.code = code
        self.waits = waits
        lines = [f"HTTP/1.1 {status} {HTTPStatus(status).phrase}", f"content-type: {media_type}"]
        lines += [f"{name.lower()}: {value}" for name, value in (headers or {}).items()]
        lines += [f"content-length: {len(body)}", ""]
        self._head = "\r\n".join(lines).encode()
        self.body = body

    def written(self, more: bytes = b"", *, closes: bool, to_head: bool = False) -> bytes:
        """The bytes of the response. `more` are header lines; a HEAD request gets no body."""
        body = b"" if to_head else self.body
        return self._head + more + (_CLOSE if closes else _END) + body


_END = b"\r\n"
_CLOSE = b"connection: close\r\n\r\n"


class Refused:
    """A rejected request, in the place of uvicorn's request-response cycle."""

    __slots__ = (
        *("answer", "disconnected", "is_to_head", "keep_alive", "more", "more_body"),
        *("response_complete", "waiting_for_100_continue"),
    )
    message_event = asyncio.Event()  # uvicorn sets it; no task waits for it

    def __init__(self, answer: PreparedAnswer, more: bytes, *, is_to_head: bool) -> None:
        self.answer = answer
        self.more = more
        self.is_to_head = is_to_head
        self.keep_alive = self.more_body = True
        self.response_complete = self.disconnected = self.waiting_for_100_continue = False

    def written(self) -> bytes:
        closes = not self.keep_alive
        return self.answer.written(self.more, closes=closes, to_head=self.is_to_head)


def lines_of(headers: Iterable[tuple[bytes, bytes]]) -> bytes:
    """These headers as `more` of a response."""
    return b"".join([b"%s: %s\r\n" % header for header in headers])


def of_error(error: PaymentsError, *, waits: bool = True) -> PreparedAnswer:
    status, body, headers = refused(error)
    return PreparedAnswer(status, body, headers=headers, waits=waits, code=error.code)


NOT_FOUND = of_error(NotFound())
UNAUTHORIZED = of_error(Unauthorized(SEND_A_KEY))
_BUSY = "The limit of concurrent requests is reached. Retry."
# To a client with an API key: sent at once, so that it can continue.
TOO_BUSY = of_error(TooBusy(_BUSY), waits=False)
TOO_BUSY_OPEN = of_error(TooBusy(_BUSY))
