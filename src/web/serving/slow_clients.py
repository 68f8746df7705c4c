"""How long a client may take: to send a head, and to take what is written to it."""

import asyncio
from collections.abc import Callable

HEAD_TIMEOUT_S = 5.0  # also for a connection on which nothing comes at all
WRITE_TIMEOUT_S = 5.0  # for a client that does not take its answers, or does not go away
WRITE_MIN = 16 * 1024  # bytes that it has to take in this time, if so many are left


class HeadWatch:
    """The head that a connection reads or waits for: how much of it came, and how long it takes."""

    __slots__ = ("_begun", "_loop", "_on_timeout", "_timer", "_was_open", "is_open", "size")

    def __init__(self, loop: asyncio.AbstractEventLoop, on_timeout: Callable[[], None]) -> None:
        self._loop = loop
        self._on_timeout: Callable[[], None] | None = on_timeout
        self._timer: asyncio.TimerHandle | None = None
        self._begun = 0  # heads, in the data that is being read
        self._was_open = True  # before that data
        self.is_open = True  # one is read or waited for; else a body, or the next request
        self.size = 0  # bytes that came of it

    def read_more(self) -> None:
        """Data has come that the parser is about to read."""
        self._was_open, self._begun = self.is_open, 0

    def begin(self) -> None:
        self.is_open, self.size = True, 0
        self._begun += 1

    def begin_again(self) -> None:
        """The one that is open is read once more from its beginning."""
        self._begun -= 1

    def add(self, size: int) -> None:
        """The parser has read the data, of so many bytes, and this head is not complete."""
        # Of a head behind other requests it is not known where in the data it began.
        self.size += size if self._was_open and self._begun <= 1 else 1

    def set_timer(self) -> None:
        """One timer from where a head is waited for until it is complete."""
        if self.is_open is (self._timer is not None) or self._on_timeout is None:
            return
        if self._timer is None:
            self._timer = self._loop.call_later(HEAD_TIMEOUT_S, self._on_timeout)
        else:
            self._timer.cancel()
            self._timer = None

    def stop(self) -> None:
        """Nothing more is read; the connection is forgotten, or it would keep itself alive."""
        self.is_open = False
        self.set_timer()
        self._on_timeout = None


class WriteWatch:
    """What a client has still to take: if it takes too little of it, the connection is cut."""

    __slots__ = ("_loop", "_timer", "_transport", "_unwritten")

    def __init__(self, loop: asyncio.AbstractEventLoop, transport: asyncio.Transport) -> None:
        self._loop = loop
        self._transport = transport
        self._timer: asyncio.TimerHandle | None = None
        self._unwritten = 0  # bytes, when that timer was set

    def start(self) -> None:
        """From now on it has to take something, until `stop` or the end of the connection."""
        self.stop()
        self._unwritten = self._transport.get_write_buffer_size()
        self._timer = self._loop.call_later(WRITE_TIMEOUT_S, self._check)

    def stop(self) -> None:
        if self._timer is not None:
            self._timer.cancel()

    def _check(self) -> None:
        if self._transport.get_write_buffer_size() + WRITE_MIN <= self._unwritten:
            self.start()  # slow, but it takes it
        else:
            self._transport.abort()
