"""Reads requests from a connection and starts tasks for those that are admitted.

The limits here apply before there is a request; the guard limits bodies. Rejected requests get
their response here: that takes a quarter of the time that it would take in the framework, and in a
flood most requests are rejected.
"""

import asyncio
import time
from contextvars import Context
from functools import partial
from typing import Any

import httptools
from uvicorn.protocols.http.httptools_impl import RequestResponseCycle

from payments.commands.runs import Caller
from web.problems import HeadTooLarge, MalformedRequest, TargetTooLong
from web.serving.answers import TOO_BUSY, PreparedAnswer, Refused, lines_of
from web.serving.arrivals import CALLER, WAITED_S
from web.serving.connection import Connection
from web.serving.door import Door, OpenPath, Place
from web.serving.guard import BODY_ARRIVED, BODY_MAX, PLACE
from web.serving.heads import (
    HEAD_DETAIL,
    HEAD_MAX,
    HEADERS_DETAIL,
    HEADERS_MAX,
    TARGET_DETAIL,
    TARGET_MAX,
    Headers,
    objection_to,
    request_id_of,
)

PIPELINE_MAX = 16  # requests of one connection that wait behind the running one


class Protocol(Connection):
    def __init__(self, door: Door, *args: Any, **kwargs: Any) -> None:
        super().__init__(door, *args, **kwargs)
        self._head_size = 0  # bytes of the headers read so far
        self._came_in: float | None = None  # when the request that is being read arrived, if known
        self._is_upgrade = False  # the request that is being read asks for another protocol
        self._is_admitted = False  # the request that is about to start
        self._objection: bytes | None = None  # the response to send when the parser stops
        # A request that waits until its response can be written.
        self._held_back: tuple[Any, Any] | None = None

    def data_received(self, data: bytes) -> None:
        if self._last_words is not None:
            return
        self._unset_keepalive_if_required()
        self._head.read_more()
        rest = data
        while rest:
            try:
                self.parser.feed_data(rest)
                rest = b""
            except httptools.HttpParserUpgrade as upgrade:
                rest = self._without_upgrade(rest[upgrade.args[0] :])
            except httptools.HttpParserError:
                self._end(self._objection or self._unreadable(MalformedRequest(_NOT_HTTP)))
                return
        if self._head.is_open:
            if self._came_in is None:
                self._came_in = self.flow.came_in()
            self._head.add(len(data))
            if self._head.size > HEAD_MAX:
                self._end(self._unreadable(HeadTooLarge(HEAD_DETAIL)))
            elif not self._memory.hold_head(len(data), len(self.headers or ())):
                self._end(self._door.refusal(None, b"").written(closes=True))
        elif self._is_idle() and self.timeout_keep_alive_task is None:
            # Empty lines between requests stopped uvicorn's timer, but no request has begun.
            self._head.is_open = True
        elif isinstance(self.cycle, Refused) and self.cycle.more_body:
            self._end_unread(self.cycle)
        self._head.set_timer()

    def resume_writing(self) -> None:
        super().resume_writing()
        if self._held_back is not None:
            held_back, self._held_back = self._held_back, None
            self._start_asgi_task(*held_back)

    def on_message_begin(self) -> None:
        self._head.begin()
        self._head_size, self._is_upgrade, self._came_in = 0, False, None
        super().on_message_begin()

    def on_url(self, url: bytes) -> None:
        self.url += url
        if len(self.url) > TARGET_MAX:
            self._object(self._unreadable(TargetTooLong(TARGET_DETAIL)))

    def on_header(self, name: bytes, value: bytes) -> None:
        # After the header section it is a trailer, not a header (RFC 9110 section 6.5.1).
        if self._head.is_open:
            if len(self.headers) == HEADERS_MAX:
                self._object(self._unreadable(HeadTooLarge(HEADERS_DETAIL)))
            self._head_size += len(name) + len(value) + 4
            # As uvicorn does, without the call: a request has eight of them.
            name = name.lower()
            if name == b"expect" and value.lower() == b"100-continue":
                self.expect_100_continue = True
            self.headers.append((name, value))

    def on_headers_complete(self) -> None:
        method, size = self.parser.get_method(), len(self.url) + self._head_size
        self._check_head(method, size)
        self._is_upgrade = self.parser.should_upgrade()
        if self._is_upgrade:
            return  # the parser stops here; data_received continues
        self._head.is_open = False
        self._memory.let_go_of_head()
        place = self._door.look(method, self.url, self.headers)
        if isinstance(place, PreparedAnswer):
            self._refuse(place, method)
            return
        is_idle = self._is_idle()
        share = place.memory or self._memory.own
        body_max = place.body_max if isinstance(place, OpenPath) else BODY_MAX
        if (is_idle and not place.admit()) or not self._memory.hold_request(
            share, size, len(self.headers), body_max
        ):
            self._refuse(self._door.refusal(place, method), method)
            return
        state = self.scope["state"]
        state[PLACE] = place
        if place.name is not None:
            state["client"] = place.name
        if self._came_in is None:
            self._came_in = self.flow.came_in()
        state[WAITED_S] = time.monotonic() - self._came_in
        self._is_admitted = is_idle
        super().on_headers_complete()

    def on_body(self, body: bytes) -> None:
        if isinstance(self.cycle, Refused) or self.cycle.response_complete:
            return
        if not self._memory.hold_body(len(body)):
            place = self.scope["state"][PLACE]
            answer = self._door.refusal(place, self.parser.get_method())
            self._object(answer.written(closes=True))
        super().on_body(body)

    def on_message_complete(self) -> None:
        if self._is_upgrade:
            return
        cycle = self.cycle
        # A trailer can end keep-alive too; the parser then reads nothing more.
        cycle.keep_alive = cycle.keep_alive and self.parser.should_keep_alive()
        if isinstance(cycle, Refused):
            cycle.more_body = False
            if cycle is self._running:
                self._start_asgi_task(cycle, None)
        else:
            self.scope["state"][BODY_ARRIVED] = True
            super().on_message_complete()
            cycle.more_body = False  # uvicorn does not set it if the response came before the body
            self._forget_answered()

    def on_response_complete(self) -> None:
        if isinstance(self._running, RequestResponseCycle):
            _leave(self._running.scope["state"])  # its place may go to the next request
        super().on_response_complete()

    def _start_asgi_task(self, cycle: Any, app: Any) -> None:
        self._running, is_admitted = cycle, self._is_admitted
        self._is_admitted = False
        if self.flow.write_paused:
            # Started now, it would hold a place while it waits for its client.
            self._held_back = (cycle, app)
        elif isinstance(cycle, Refused):
            self._answer(cycle)
        elif is_admitted or cycle.scope["state"][PLACE].admit():
            self._start(cycle, app)
        else:
            self._refuse_late(cycle)

    def _start(self, cycle: RequestResponseCycle, app: Any) -> None:
        """Starts the request's task; it holds its place until its response or the end of its task.

        The time that it waited behind other requests of its connection does not count.
        """
        state = cycle.scope["state"]
        state[CALLER] = Caller(time.monotonic() - state[WAITED_S])
        state[PLACE].enter()
        task = self.loop.create_task(cycle.run_asgi(app), context=Context())
        self.tasks.add(task)
        task.add_done_callback(partial(self._ended, state))

    def _ended(self, state: dict[str, Any], task: asyncio.Task[None]) -> None:
        self.tasks.discard(task)
        _leave(state)

    def _refuse(self, answer: PreparedAnswer, method: bytes) -> None:
        """Rejects the request whose header section was read. The response is sent in the order of
        the requests, once the request is complete or the received data is read."""
        refused = self._refused(answer, method, self.headers)
        refused.keep_alive = self.parser.get_http_version() != "1.0"
        is_idle = self._is_idle()
        self.cycle = refused  # type: ignore[assignment]
        self._memory.hold_none()
        self._forget_head()
        if is_idle:
            self._running = refused
        else:
            self.flow.pause_reading()
            self.pipeline.appendleft((refused, None))  # type: ignore[arg-type]

    def _refuse_late(self, cycle: RequestResponseCycle) -> None:
        """Rejects a request that waited behind another one and now gets no place."""
        scope, method = cycle.scope, cycle.scope["method"].encode()
        answer = self._door.refusal(scope["state"][PLACE], method)
        refused = self._refused(answer, method, list(scope["headers"]))
        refused.keep_alive, refused.more_body = cycle.keep_alive, cycle.more_body
        self._running = refused
        if self.cycle is cycle:
            self.cycle = refused  # type: ignore[assignment]
        if refused.more_body:
            self._end_unread(refused)
        else:
            self._answer(refused)

    def _answer(self, refused: Refused) -> None:
        if self._may_answer(refused):
            self._write_refusal(refused)

    def _end_unread(self, refused: Refused) -> None:
        """Closes the connection after the response, since the rest of the body is not read."""
        refused.keep_alive = False
        self._end(refused.written())

    def _refused(self, answer: PreparedAnswer, method: bytes, headers: Headers) -> Refused:
        more = b""
        if answer.waits:  # the others are kept as cheap as possible
            named = (b"x-request-id", request_id_of(headers).encode())
            more = lines_of([named, *self.server_state.default_headers])
        return Refused(answer, more, is_to_head=method == b"HEAD")

    def _without_upgrade(self, rest: bytes) -> bytes:
        """Ignores an Upgrade (RFC 9110 section 7.8), which Java's HTTP client sends by default.

        The parser takes the bytes after the header section for the other protocol. So a new parser
        reads the header section without Upgrade, then the rest.
        """
        version = self.parser.get_http_version().encode()
        lines = [b"%s %s HTTP/%s" % (self.parser.get_method(), self.url, version)]
        lines += [b"%s: %s" % header for header in self.headers if header[0] != b"upgrade"]
        self.parser = httptools.HttpRequestParser(self)
        self.parser.set_dangerous_leniencies(lenient_data_after_close=True)
        self._head.begin_again()
        return b"\r\n".join([*lines, b"", rest])

    def _check_head(self, method: bytes, size: int) -> None:
        """Stops the parser at a header section that it accepts and we do not."""
        version = self.parser.get_http_version()
        if version == "1.0":
            self.expect_100_continue = False  # RFC 9110 section 10.1.1
        objection = objection_to(method, self.url, version, self.headers, size)
        if objection is not None:
            self._object(self._unreadable(objection))
        if len(self.pipeline) >= PIPELINE_MAX:
            self._object(TOO_BUSY.written(closes=True))

    def _object(self, answer: bytes) -> None:
        self._objection = answer
        raise ValueError  # stops the parser; data_received then sends the objection


def _leave(state: dict[str, Any]) -> None:
    place: Place | None = state.pop(PLACE, None)
    if place is not None:
        place.leave()


_NOT_HTTP = "This is not an HTTP/1.1 request."
