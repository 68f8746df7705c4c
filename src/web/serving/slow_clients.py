"""Time limits for clients: to send a header section, and to read responses."""

import asyncio
from collections.abc import Callable

HEAD_TIMEOUT_S = 5.0  # also for a connection that sends nothing
WRITE_TIMEOUT_S = 5.0  # for a client that does not read its responses, or does not close
WRITE_MIN = 16 * 1024  # bytes that a client must read in this time, if that many are left


class HeadWatch:
    """Size and timeout of the header section that a connection reads or waits for."""

    __slots__ = ("_begun", "_loop", "_on_timeout", "_timer", "_was_open", "is_open", "size")

    def __init__(self, loop: asyncio.AbstractEventLoop, on_timeout: Callable[[], None]) -> None:
        self._loop = loop
        self._on_timeout: Callable[[], None] | None = on_timeout
        self._timer: asyncio.TimerHandle | None = None
        self._begun = 0  # header sections that began in the data that is being read
        self._was_open = True  # is_open before that data
        self.is_open = True  # a header section is read or waited for, not a body or a response
        self.size = 0  # bytes of it that were received

    def read_more(self) -> None:
        """The parser is about to read new data."""
        self._was_open, self._begun = self.is_open, 0

    def begin(self) -> None:
        self.is_open, self.size = True, 0
        self._begun += 1

    def begin_again(self) -> None:
        """The open header section is parsed again from its beginning."""
        self._begun -= 1

    def add(self, size: int) -> None:
        """The parser has read data of `size` bytes, and the header section is not complete."""
        # Behind other requests the header section began at an unknown place in the data.
        self.size += size if self._was_open and self._begun <= 1 else 1

    def set_timer(self) -> None:
        """Keeps one timer running while a header section is waited for or incomplete."""
        if self.is_open is (self._timer is not None) or self._on_timeout is None:
            return
        if self._timer is None:
            self._timer = self._loop.call_later(HEAD_TIMEOUT_S, self._on_timeout)
        else:
            self._timer.cancel()
            self._timer = None

    def stop(self) -> None:
        """Nothing more is read. Drops the reference to the connection, so that it can be freed."""
        self.is_open = False
        self.set_timer()
        self._on_timeout = None


class WriteWatch:
    """Aborts the connection of a client that reads too little of what is written to it."""

    __slots__ = ("_loop", "_timer", "_transport", "_unwritten")

    def __init__(self, loop: asyncio.AbstractEventLoop, transport: asyncio.Transport) -> None:
        self._loop = loop
        self._transport = transport
        self._timer: asyncio.TimerHandle | None = None
        self._unwritten = 0  # bytes, when the timer was set

    def start(self) -> None:
        """From now on the client must read, until `stop` or the end of the connection."""
        self.stop()
        self._unwritten = self._transport.get_write_buffer_size()
        self._timer = self._loop.call_later(WRITE_TIMEOUT_S, self._check)

    def stop(self) -> None:
        if self._timer is not None:
            self._timer.cancel()

    def _check(self) -> None:
        if self._transport.get_write_buffer_size() + WRITE_MIN <= self._unwritten:
            self.start()  # slow, but it reads
        else:
            self._transport.abort()
