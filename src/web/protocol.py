"""uvicorn's HTTP/1.1 protocol with the limits that it lacks, and our form of refusal.

Every limit on a body is the guard's; these are for what comes before there is a request. Requests
beyond what the process can take on are refused here too: it takes a tenth of what it would behind
the framework, and at several times the capacity nearly every request is refused.
"""

import asyncio
from typing import Any

from uvicorn.protocols.http.httptools_impl import HttpToolsProtocol

from payments.admission import Admission
from payments.errors import TooBusy
from payments.telemetry import Telemetry
from web.problems import MEDIA_TYPE, problem, refused

HEAD_MAX = 64 * 1024  # bytes of one request's line and headers, checked after each read
HEAD_TIMEOUT_S = 5.0  # also for a connection on which nothing comes at all


MALFORMED_REQUEST = (400, "malformed_request")
UPGRADE_NOT_SUPPORTED = (400, "upgrade_not_supported")
HEAD_TOO_LARGE = (431, "head_too_large")
PROTOCOL_PROBLEMS = (MALFORMED_REQUEST, UPGRADE_NOT_SUPPORTED, HEAD_TOO_LARGE)

# Never refused for load: whoever runs the service must see what is going on.
OPEN_PATHS = frozenset((b"/health", b"/health/live", b"/metrics"))


class Protocol(HttpToolsProtocol):
    def __init__(
        self, admission: Admission, telemetry: Telemetry, *args: Any, **kwargs: Any
    ) -> None:
        super().__init__(*args, **kwargs)
        self._admission = admission
        self._refusals = telemetry.refusals
        self._is_refusing = False  # the request that is being read was not admitted
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
                self._refuse(HEAD_TOO_LARGE, f"Send at most {HEAD_MAX} bytes of headers.")
        if self._in_head is (self._head_timer is None):
            self._watch_head()
        if self._is_refusing:
            # Its body is still to come, and nobody will read it.
            self._answer_too_busy(keep_alive=False)

    def on_message_begin(self) -> None:
        self._in_head, self._head_bytes = True, 0
        super().on_message_begin()

    def on_headers_complete(self) -> None:
        self._in_head = False
        if self._admission.admits_another(len(self.tasks)) or not self._may_be_refused():
            super().on_headers_complete()
        else:
            self._is_refusing = True

    def on_body(self, body: bytes) -> None:
        if not self._is_refusing:
            super().on_body(body)

    def on_message_complete(self) -> None:
        if self._is_refusing:
            self._answer_too_busy(keep_alive=self.parser.should_keep_alive())
        else:
            super().on_message_complete()

    def send_400_response(self, msg: str) -> None:
        self._refuse(MALFORMED_REQUEST, "This is not an HTTP/1.1 request.")

    def _unsupported_upgrade_warning(self) -> None:
        # The parser takes what follows for another protocol, so the body is lost; left alone,
        # uvicorn would read it as the next request.
        self._refuse(UPGRADE_NOT_SUPPORTED, "Send the request without an Upgrade header.")

    def _may_be_refused(self) -> bool:
        # Answers have the order of their requests: behind one that is under way it has to wait.
        under_way = self.cycle is not None and not self.cycle.response_complete
        return not under_way and self.url.partition(b"?")[0] not in OPEN_PATHS

    def _answer_too_busy(self, *, keep_alive: bool) -> None:
        self._is_refusing = False
        self._refusals.inc()
        if self.transport.is_closing():
            return
        answer = _TOO_BUSY if keep_alive else _TOO_BUSY_AND_CLOSE
        if self.parser.get_method() == b"HEAD":
            answer = answer[: answer.index(b"\r\n\r\n") + 4]
        self.transport.write(answer)
        if keep_alive:
            self.on_response_complete()
        else:
            self.transport.close()

    def _watch_head(self) -> None:
        """One timer from where a head is waited for until it is complete."""
        if self._head_timer is not None:
            self._head_timer.cancel()
        self._head_timer = (
            self.loop.call_later(HEAD_TIMEOUT_S, self.transport.close) if self._in_head else None
        )

    def _refuse(self, refusal: tuple[int, str], detail: str) -> None:
        if self.transport.is_closing():
            return
        status, code = refusal
        body = problem(status, code, "The request cannot be read", detail)
        head = (
            f"HTTP/1.1 {status} Refused\r\ncontent-type: {MEDIA_TYPE}\r\n"
            f"content-length: {len(body)}\r\nconnection: close\r\n\r\n"
        )
        self.transport.write(head.encode() + body)
        self.transport.close()


def _too_busy(connection: str) -> bytes:
    error = TooBusy("More requests are under way than this service can take on. Send it again.")
    status, body, extra = refused(error)
    head = [f"HTTP/1.1 {status} Service Unavailable", f"content-type: {MEDIA_TYPE}"]
    head += [f"{name.lower()}: {value}" for name, value in extra.items()]
    head += [f"content-length: {len(body)}", f"connection: {connection}", "", ""]
    return "\r\n".join(head).encode() + body


_TOO_BUSY, _TOO_BUSY_AND_CLOSE = _too_busy("keep-alive"), _too_busy("close")
