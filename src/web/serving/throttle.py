"""Slows down a flood of requests that are cheap to reject.

They need no task, but a client that sends the next one upon each response would take the whole
event loop. AT_ONCE_PER_S of these responses a second are sent at once. Further ones are queued, and
their connections are not read meanwhile: a closed loop of N connections gets N responses in HELD_S,
and never more than GIVEN_MAX in TURN_S.
"""

import asyncio
import time
from collections import OrderedDict
from collections.abc import Callable
from typing import Protocol

AT_ONCE_PER_S = 500
HELD_S = 0.5
TURN_S = 0.01
GIVEN_MIN, GIVEN_MAX = 5, 20  # responses in one turn


class Bucket:
    """A token bucket: `per_s` tokens a second, and at most `per_s` saved."""

    def __init__(self, per_s: float, clock: Callable[[], float] = time.monotonic) -> None:
        self._per_s = self._left = per_s
        self._clock = clock
        self._looked_at = clock()

    def take(self) -> bool:
        now = self._clock()
        self._left = min(self._per_s, self._left + (now - self._looked_at) * self._per_s)
        self._looked_at = now
        if self._left < 1:
            return False
        self._left -= 1
        return True

    def pay(self, count: float) -> None:
        """Takes more afterwards, up to those of the next second."""
        self._left = max(-self._per_s, self._left - count)


class Waiting(Protocol):
    """A connection whose response is delayed."""

    def on_turn(self) -> None:
        """The response may be sent."""


class Throttle:
    """One per port."""

    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        self._at_once = Bucket(AT_ONCE_PER_S, clock)
        self._waiting: OrderedDict[Waiting, None] = OrderedDict()
        self._timer: asyncio.TimerHandle | None = None

    def is_next(self, who: Waiting) -> bool:
        """Whether it may respond now; if not, `on_turn` is called later."""
        if not self._waiting and self._at_once.take():
            return True
        self._waiting[who] = None
        if self._timer is None:
            self._timer = asyncio.get_running_loop().call_later(TURN_S, self._give)
        return False

    def forget(self, who: Waiting) -> None:
        """Its connection was closed."""
        self._waiting.pop(who, None)

    def _give(self) -> None:
        due = int(len(self._waiting) * TURN_S / HELD_S)
        for _ in range(min(GIVEN_MAX, max(GIVEN_MIN, due), len(self._waiting))):
            who, _ = self._waiting.popitem(last=False)
            who.on_turn()
        loop = asyncio.get_running_loop()
        self._timer = loop.call_later(TURN_S, self._give) if self._waiting else None
