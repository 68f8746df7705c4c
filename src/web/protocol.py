"""uvicorn's HTTP/1.1 protocol with the limits that it lacks, and our form of refusal.

Every limit on a body is the guard's; these are for what comes before there is a request.
"""

import asyncio
from typing import Any

from uvicorn.protocols.http.httptools_impl import HttpToolsProtocol

from web.problems import MEDIA_TYPE, problem

HEAD_MAX = 64 * 1024  # bytes of one request's line and headers, checked after each read
HEAD_TIMEOUT_S = 5.0  # also for a connection on which nothing comes at all


class Protocol(HttpToolsProtocol):
    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self._in_head = True
        self._head_bytes = 0
        self._head_timer: asyncio.TimerHandle | None = None

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        super().connection_made(transport)
        self._watch_head()

    def connection_lost(self, exc: Exception | None) -> None:
        self._in_head = False
        self._watch_head()
        super().connection_lost(exc)

    def data_received(self, data: bytes) -> None:
        super().data_received(data)
        if self._in_head:
            self._head_bytes += len(data)
            if self._head_bytes > HEAD_MAX:
                self._refuse(431, "head_too_large", f"Send at most {HEAD_MAX} bytes of headers.")
        if self._in_head is (self._head_timer is None):
            self._watch_head()

    def on_message_begin(self) -> None:
        self._in_head, self._head_bytes = True, 0
        super().on_message_begin()

    def on_headers_complete(self) -> None:
        self._in_head = False
        super().on_headers_complete()

    def send_400_response(self, msg: str) -> None:
        self._refuse(400, "malformed_request", "This is not an HTTP/1.1 request.")

    def _unsupported_upgrade_warning(self) -> None:
        # The parser takes what follows for another protocol, so the body is lost; left alone,
        # uvicorn would read it as the next request.
        self._refuse(400, "upgrade_not_supported", "Send the request without an Upgrade header.")

    def _watch_head(self) -> None:
        """One timer from where a head is waited for until it is complete."""
        if self._head_timer is not None:
            self._head_timer.cancel()
        self._head_timer = (
            self.loop.call_later(HEAD_TIMEOUT_S, self.transport.close) if self._in_head else None
        )

    def _refuse(self, status: int, code: str, detail: str) -> None:
        if self.transport.is_closing():
            return
        body = problem(status, code, "The request cannot be read", detail)
        head = (
            f"HTTP/1.1 {status} Refused\r\ncontent-type: {MEDIA_TYPE}\r\n"
            f"content-length: {len(body)}\r\nconnection: close\r\n\r\n"
        )
        self.transport.write(head.encode() + body)
        self.transport.close()
