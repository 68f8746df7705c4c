"""Answers that the protocol writes by itself, for a request that never becomes a task."""

import asyncio
from collections.abc import Iterable
from http import HTTPStatus

from payments.errors import PaymentsError, TooBusy, Unauthorized
from web.auth import SEND_A_KEY
from web.problems import MEDIA_TYPE, NotFound, refused


class PreparedAnswer:
    """One of a few, made in advance. `waits`: in a flood it is given late (see throttle.py). `code`
    is the problem's that it tells, if any."""

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
        """`more` are header lines; the answer to a HEAD request has no body."""
        body = b"" if to_head else self.body
        return self._head + more + (_CLOSE if closes else _END) + body


_END = b"\r\n"
_CLOSE = b"connection: close\r\n\r\n"


class Refused:
    """A request that is answered so; for uvicorn it is a cycle like any other."""

    __slots__ = (
        *("answer", "disconnected", "is_to_head", "keep_alive", "more", "more_body"),
        *("response_complete", "waiting_for_100_continue"),
    )
    message_event = asyncio.Event()  # nobody waits for it

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
    """As `more` of an answer."""
    return b"".join([b"%s: %s\r\n" % header for header in headers])


def of_error(error: PaymentsError, *, waits: bool = True) -> PreparedAnswer:
    status, body, headers = refused(error)
    return PreparedAnswer(status, body, headers=headers, waits=waits, code=error.code)


NOT_FOUND = of_error(NotFound())
UNAUTHORIZED = of_error(Unauthorized(SEND_A_KEY))
_BUSY = "More requests are under way than this service can take on. Send it again."
# To a client with an API key: at once, so that it may go on.
TOO_BUSY = of_error(TooBusy(_BUSY), waits=False)
TOO_BUSY_OPEN = of_error(TooBusy(_BUSY))
