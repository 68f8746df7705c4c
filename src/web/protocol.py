"""uvicorn's HTTP/1.1 protocol with the limits that it lacks, and our form of refusal.

Every limit on a body is the guard's; these are for what comes before there is a request. Requests
beyond what the process can take on are refused here too: it takes a quarter of what it would behind
the framework, and at several times the capacity most requests are refused.
"""

import asyncio
from typing import Any

import httptools
from uvicorn.protocols.http.httptools_impl import HttpToolsProtocol, RequestResponseCycle

from payments.admission import Admission
from payments.errors import TooBusy
from payments.telemetry import Telemetry
from web.access_log import PROBES, RefusalLog
from web.guard import BODY_ARRIVED
from web.heads import (
    HEAD_DETAIL,
    HEAD_MAX,
    HEAD_TOO_LARGE,
    MALFORMED_REQUEST,
    TARGET_DETAIL,
    TARGET_MAX,
    TARGET_TOO_LONG,
    Refusal,
    objection_to,
)
from web.problems import MEDIA_TYPE, problem, refused

HEAD_TIMEOUT_S = 5.0  # also for a connection on which nothing comes at all
WRITE_TIMEOUT_S = 5.0  # for a client that does not take its answers, or does not go away
WRITE_MIN = 16 * 1024  # bytes that it has to take in this time, if so many are left
PIPELINE_MAX = 16  # requests of one connection that wait behind the one under way

# Never refused for load: whoever runs the service must see what is going on.
OPEN_PATHS = frozenset(path.encode() for path in PROBES)


class Protocol(HttpToolsProtocol):
    def __init__(
        self,
        admission: Admission,
        telemetry: Telemetry,
        refusal_log: RefusalLog,
        *args: Any,
        **kwargs: Any,
    ) -> None:
        super().__init__(*args, **kwargs)
        self._admission = admission
        self._refusals = telemetry.refusals
        self._refusal_log = refusal_log
        self._is_refusing = False  # the request that is being read was not admitted
        self._in_head = True
        self._head_bytes = 0
        self._heads_begun = 0  # in the data that is being read
        self._head_timer: asyncio.TimerHandle | None = None
        self._write_timer: asyncio.TimerHandle | None = None
        self._unwritten = 0  # bytes, when that timer was set
        self._is_over = False  # nothing more is written
        self._running: RequestResponseCycle | None = None  # self.cycle is the one read last
        self._is_upgrade = False  # the request that is being read asks for another protocol
        # A request whose answer could not be written yet: it is begun once it can.
        self._held_back: tuple[RequestResponseCycle, Any] | None = None
        self._objection: bytes | None = None  # what to answer when the parser stops
        self._last_words: bytes | None = None  # what ends the connection, after what is under way

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        super().connection_made(transport)
        self._watch_head()

    def connection_lost(self, exc: Exception | None) -> None:
        self._in_head = False
        self._watch_head()
        if self._write_timer is not None:
            self._write_timer.cancel()
        self._give_up_running()
        super().connection_lost(exc)

    def data_received(self, data: bytes) -> None:
        if self._last_words is not None:
            return
        self._unset_keepalive_if_required()
        was_in_head, self._heads_begun = self._in_head, 0
        rest = data
        while rest:
            try:
                self.parser.feed_data(rest)
                rest = b""
            except httptools.HttpParserUpgrade as upgrade:
                rest = self._without_upgrade(rest[upgrade.args[0] :])
            except httptools.HttpParserError:
                self._end(self._objection or self._refusal(MALFORMED_REQUEST, _NOT_HTTP))
                return
        if self._in_head:
            # Of a head behind other requests it is not known where in the data it began.
            is_all_head = was_in_head and self._heads_begun <= 1
            self._head_bytes += len(data) if is_all_head else 1
            if self._head_bytes > HEAD_MAX:
                self._end(self._refusal(HEAD_TOO_LARGE, HEAD_DETAIL))
        elif self._is_idle() and self.timeout_keep_alive_task is None:
            # Empty lines between requests: uvicorn stopped its clock, and no request has begun.
            self._in_head = True
        if self._in_head is (self._head_timer is None):
            self._watch_head()
        if self._is_refusing:
            # Its body is still to come, and nobody will read it.
            self._answer_too_busy(keep_alive=False)

    def eof_received(self) -> bool:  # type: ignore[override]
        """The client will send no more; what it asked for is answered still."""
        if self._is_over:
            return False
        is_cut_short = self._head_bytes > 0 if self._in_head else self._is_reading_body()
        detail = "The request ended before it was complete."
        self._end(self._refusal(MALFORMED_REQUEST, detail) if is_cut_short else b"")
        return not self.transport.is_closing()

    def pause_writing(self) -> None:
        super().pause_writing()
        self._watch_writing()

    def resume_writing(self) -> None:
        super().resume_writing()
        if self._write_timer is not None and not self._is_over:
            self._write_timer.cancel()
        if self._held_back is not None:
            held_back, self._held_back = self._held_back, None
            self._start_asgi_task(*held_back)

    def on_message_begin(self) -> None:
        self._in_head, self._head_bytes, self._is_upgrade = True, 0, False
        self._heads_begun += 1
        super().on_message_begin()

    def on_url(self, url: bytes) -> None:
        self.url += url
        if len(self.url) > TARGET_MAX:
            self._object(TARGET_TOO_LONG, TARGET_DETAIL)

    def on_header(self, name: bytes, value: bytes) -> None:
        # What comes later is a trailer, not to be taken for a header (RFC 9110 section 6.5.1).
        if self._in_head:
            super().on_header(name, value)

    def on_headers_complete(self) -> None:
        self._check_head()
        self._is_upgrade = self.parser.should_upgrade()
        if self._is_upgrade:
            return  # the parser stops here; data_received goes on
        self._in_head = False
        if self._admission.admits_another(len(self.tasks)) or not self._may_be_refused():
            super().on_headers_complete()
        else:
            self._is_refusing = True

    def on_body(self, body: bytes) -> None:
        if not self._is_refusing:
            super().on_body(body)

    def on_message_complete(self) -> None:
        if self._is_upgrade:
            return
        if self._is_refusing:
            self._answer_too_busy(keep_alive=self.parser.should_keep_alive())
        else:
            # A trailer can say it too, and the parser then reads nothing more.
            self.cycle.keep_alive = self.cycle.keep_alive and self.parser.should_keep_alive()
            self.scope["state"][BODY_ARRIVED] = True
            super().on_message_complete()

    def on_response_complete(self) -> None:
        super().on_response_complete()
        if self.transport.is_closing():
            self._close()
        elif self._last_words is not None and self._is_idle():
            self._say_last_words()

    def timeout_keep_alive_handler(self) -> None:
        self._close()

    def _start_asgi_task(self, cycle: RequestResponseCycle, app: Any) -> None:
        self._running = cycle
        if self.flow.write_paused:
            # It would wait for its client with a place that is meant for work.
            self._held_back = (cycle, app)
        else:
            super()._start_asgi_task(cycle, app)

    def _without_upgrade(self, rest: bytes) -> bytes:
        """Ignores the wish (RFC 9110 section 7.8), which Java's HTTP client sends unasked.

        The parser takes what follows the head for the other protocol: a new one gets the head
        without the wish, and then the rest.
        """
        version = self.parser.get_http_version().encode()
        lines = [b"%s %s HTTP/%s" % (self.parser.get_method(), self.url, version)]
        lines += [b"%s: %s" % header for header in self.headers if header[0] != b"upgrade"]
        self.parser = httptools.HttpRequestParser(self)
        self.parser.set_dangerous_leniencies(lenient_data_after_close=True)
        self._heads_begun -= 1  # the same one begins again
        return b"\r\n".join([*lines, b"", rest])

    def _check_head(self) -> None:
        """Stops the parser at a head that it lets through and we do not."""
        version = self.parser.get_http_version()
        if version == "1.0":
            self.expect_100_continue = False  # RFC 9110 section 10.1.1
        objection = objection_to(self.parser.get_method(), self.url, version, self.headers)
        if objection is not None:
            self._object(*objection)
        if len(self.pipeline) >= PIPELINE_MAX:
            self._objection = _TOO_BUSY_AND_CLOSE
            raise ValueError

    def _object(self, refusal: Refusal, detail: str) -> None:
        self._objection = self._refusal(refusal, detail)
        raise ValueError  # stops the parser; data_received then refuses

    def _is_idle(self) -> bool:
        return self._running is None or self._running.response_complete

    def _give_up_running(self) -> None:
        """Of several requests uvicorn itself tells only the last."""
        self.pipeline.clear()
        if self._running is not None:
            self._running.disconnected = True
            self._running.waiting_for_100_continue = False
            self._running.message_event.set()

    def _is_reading_body(self) -> bool:
        return self.cycle is not None and self.cycle.more_body and not self.cycle.response_complete

    def _may_be_refused(self) -> bool:
        # Answers have the order of their requests: behind one that is under way it has to wait.
        return self._is_idle() and self.url.partition(b"?")[0] not in OPEN_PATHS

    def _answer_too_busy(self, *, keep_alive: bool) -> None:
        self._is_refusing = False
        self._refusals.inc()
        self._refusal_log.too_busy.add()
        if self.transport.is_closing():
            return
        keep_alive = keep_alive and not self.flow.write_paused  # it does not even read the answers
        answer = _TOO_BUSY if keep_alive else _TOO_BUSY_AND_CLOSE
        if self.parser.get_method() == b"HEAD":
            answer = answer[: answer.index(b"\r\n\r\n") + 4]
        self.transport.write(answer)
        if keep_alive:
            self.on_response_complete()
        else:
            self._close()

    def _watch_head(self) -> None:
        """One timer from where a head is waited for until it is complete."""
        if self._head_timer is not None:
            self._head_timer.cancel()
        self._head_timer = (
            self.loop.call_later(HEAD_TIMEOUT_S, self._end, b"") if self._in_head else None
        )

    def _watch_writing(self) -> None:
        if self._write_timer is not None:
            self._write_timer.cancel()
        self._unwritten = self.transport.get_write_buffer_size()
        self._write_timer = self.loop.call_later(WRITE_TIMEOUT_S, self._check_writing)

    def _check_writing(self) -> None:
        if self.transport.get_write_buffer_size() + WRITE_MIN <= self._unwritten:
            self._watch_writing()  # slow, but it takes it
        else:
            self.transport.abort()

    def _refusal(self, refusal: Refusal, detail: str) -> bytes:
        status, code = refusal
        self._refusal_log.unreadable.add()
        body = problem(status, code, "The request cannot be read", detail)
        head = (
            f"HTTP/1.1 {status} Refused\r\ncontent-type: {MEDIA_TYPE}\r\n"
            f"content-length: {len(body)}\r\nconnection: close\r\n"
        )
        date = b"".join(b"%s: %s\r\n" % header for header in self.server_state.default_headers)
        return head.encode() + date + b"\r\n" + body

    def _end(self, last_words: bytes) -> None:
        """Reads nothing more, and closes the connection once what is under way was answered."""
        if self.transport.is_closing() or self._last_words is not None:
            return
        self._last_words = last_words
        self._in_head = False
        self._watch_head()
        if self._is_reading_body():
            if self.pipeline:
                self.pipeline.popleft()
            else:
                self._say_last_words()
                return
        if self._is_idle():
            self._say_last_words()
        elif not last_words:
            latest = self.pipeline[0][0] if self.pipeline else self._running
            assert latest is not None
            latest.keep_alive = False

    def _say_last_words(self) -> None:
        if not self._last_words:
            self._close()
        elif not self.transport.is_closing():
            # Closed with bytes unread, the connection would be reset, and the client might never
            # see the answer: it is to close first (RFC 9112 section 9.6).
            self._give_up_running()
            self.transport.write(self._last_words)
            self.transport.write_eof()
            self._is_over = True
            self._watch_writing()

    def _close(self) -> None:
        """Once everything was written, which a client that does not read may not hold up."""
        self.transport.close()
        self._is_over = True
        self._watch_writing()


def _too_busy(connection: str) -> bytes:
    error = TooBusy("More requests are under way than this service can take on. Send it again.")
    status, body, extra = refused(error)
    head = [f"HTTP/1.1 {status} Service Unavailable", f"content-type: {MEDIA_TYPE}"]
    head += [f"{name.lower()}: {value}" for name, value in extra.items()]
    head += [f"content-length: {len(body)}", f"connection: {connection}", "", ""]
    return "\r\n".join(head).encode() + body


_TOO_BUSY, _TOO_BUSY_AND_CLOSE = _too_busy("keep-alive"), _too_busy("close")
_NOT_HTTP = "This is not an HTTP/1.1 request."
