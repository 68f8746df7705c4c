"""Closing connections: uvicorn's HTTP/1.1 protocol with the limits that it lacks.

A client that sends nothing or an incomplete header section, or does not read its responses, is
disconnected. The error for an unreadable request is sent after the responses to those before it.
"""

import asyncio
from typing import Any

from uvicorn.protocols.http.httptools_impl import HttpToolsProtocol, RequestResponseCycle

from web.problems import MalformedRequest, UnreadableRequest
from web.serving.answers import Refused, lines_of, of_error
from web.serving.arrivals import CALLER, Flow
from web.serving.door import Door
from web.serving.memory import Memory
from web.serving.slow_clients import HeadWatch, WriteWatch

Cycle = RequestResponseCycle | Refused


class Connection(HttpToolsProtocol):
    def __init__(self, door: Door, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self._door = door
        self._memory = Memory(door.anonymous_memory())
        self._head = HeadWatch(self.loop, self._end)
        self._is_over = False  # nothing more is written
        self._running: Cycle | None = None  # in progress; self.cycle is the one read last
        self._last_words: bytes | None = None  # sent before closing, after the running response

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        super().connection_made(transport)
        self.flow: Flow = Flow(transport)
        self._writing = WriteWatch(self.loop, transport)
        self._head.set_timer()

    def connection_lost(self, exc: Exception | None) -> None:
        self._head.stop()
        self._writing.stop()
        self._door.forget(self)
        if isinstance(self._running, RequestResponseCycle):
            caller = self._running.scope["state"].get(CALLER)
            if caller is not None:
                caller.is_gone = True
        self._give_up_running()
        self._memory.let_go()
        super().connection_lost(exc)
        self._unset_keepalive_if_required()  # uvicorn does so only after an orderly close

    def eof_received(self) -> bool:  # type: ignore[override]
        """The client sends no more; its requests still get responses."""
        if self._is_over:
            return False
        is_cut_short = self._head.size > 0 if self._head.is_open else self._is_reading_body()
        error = MalformedRequest("The request ended before it was complete.")
        self._end(self._unreadable(error) if is_cut_short else b"")
        return not self.transport.is_closing()

    def pause_writing(self) -> None:
        super().pause_writing()
        self._writing.start()

    def resume_writing(self) -> None:
        super().resume_writing()
        if not self._is_over:
            self._writing.stop()

    def on_response_complete(self) -> None:
        self._memory.let_go_of_request()
        super().on_response_complete()
        self._forget_answered()
        if self.transport.is_closing():
            self._close()
        elif self._last_words is not None and self._is_idle() and not self._is_over:
            self._say_last_words()

    def on_turn(self) -> None:
        """The delayed response may be sent (throttle.py)."""
        assert isinstance(self._running, Refused)
        self.flow.resume_reading()
        if self._running.more_body:
            self._say_last_words()
        else:
            self._write_refusal(self._running)

    def timeout_keep_alive_handler(self) -> None:
        self._close()

    def _may_answer(self, refused: Refused) -> bool:
        """Whether the response may be sent now; if not, nothing is read until `on_turn`."""
        if self._door.may_answer(refused.answer, self):
            return True
        self.flow.pause_reading()
        return False

    def _write_refusal(self, refused: Refused) -> None:
        refused.response_complete = True
        if self.transport.is_closing():
            return
        self.transport.write(refused.written())
        if not refused.keep_alive:
            self.transport.close()
        self.on_response_complete()

    def _is_idle(self) -> bool:
        return self._running is None or self._running.response_complete

    def _is_reading_body(self) -> bool:
        return self.cycle is not None and self.cycle.more_body and not self.cycle.response_complete

    def _give_up_running(self) -> None:
        """Tells the running request that the client has disconnected; uvicorn tells only the last
        one read."""
        self.pipeline.clear()
        if self._running is not None:
            self._running.disconnected = True
            self._running.waiting_for_100_continue = False
            self._running.message_event.set()

    def _unreadable(self, error: UnreadableRequest) -> bytes:
        self._door.log.unreadable.add()
        more = lines_of(self.server_state.default_headers)
        return of_error(error).written(more, closes=True)

    def _forget_answered(self) -> None:
        """Frees a finished request: its memory is not counted any more, and a connection may be
        idle for long."""
        if self.cycle is None or not self._is_idle() or self.cycle.more_body:
            return
        self._running = None
        self.cycle = None  # type: ignore[assignment]
        if not self._head.is_open:  # of the next request
            self._forget_head()

    def _forget_head(self) -> None:
        """Frees the header section, which may be large and is not needed any more."""
        self.url, self.headers, self.scope = b"", [], {}  # type: ignore[typeddict-item]

    def _end(self, last_words: bytes = b"") -> None:
        """Stops reading, and closes the connection after the response in progress."""
        if self.transport.is_closing() or self._last_words is not None:
            return
        self._last_words = last_words
        self._head.stop()
        self._memory.let_go_of_head()
        self._forget_head()
        self.parser = None  # type: ignore[assignment] # it holds a part of the header section too
        if self._is_reading_body():
            if not self.pipeline:
                if not isinstance(self._running, Refused) or self._may_answer(self._running):
                    self._say_last_words()
                return
            self.pipeline.popleft()
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
            # Closing with unread bytes would reset the connection, and the client might not see the
            # response. So the client is to close first (RFC 9112 section 9.6).
            self._give_up_running()
            self.transport.write(self._last_words)
            self.transport.write_eof()
            self._is_over = True
            self._writing.start()

    def _close(self) -> None:
        """Closes once everything is written; WriteWatch cuts a client that does not read."""
        self.transport.close()
        self._is_over = True
        self._writing.start()
