"""The circuit breaker of a provider: while it is down, nothing new is begun there.

    closed --many of the last calls fail--> open: after a pause one probe, then a longer pause
       ^                                                            |
       +---------------------------------------------it succeeds---+

Only outages count: refused connections, timeouts, 401, 429 and 5xx. A decline is a success.

Time is handed in, as seconds of a monotonic clock. One per provider and process, used from its
event loop alone.
"""

from collections import deque
from typing import NamedTuple

# It opens when at least so many of the calls that ended lately failed, and at least half of them.
FAILURES_MIN = 5
CALLS_MAX = 20
LATELY_S = 60.0

PAUSE_MIN_S = 1.0
PAUSE_MAX_S = 30.0  # for so long it may go unnoticed that the provider is back

# When nobody has called for so long after a probe was due, whether it is still down is not known.
UNASKED_S = 120.0


class ProviderPermit(NamedTuple):
    """For one call, whose end is told."""

    period: int
    probe: bool


class ProviderBreaker:
    """A result counts only if nothing opened or closed the breaker since its call began: what was
    under way when it opened says how the provider was, not how it is."""

    def __init__(self) -> None:
        self._period = 0  # how often it has opened or closed
        self._ended: deque[tuple[float, bool]] = deque(
            maxlen=CALLS_MAX
        )  # when, and whether it failed
        self._pause_s = 0.0  # between the last probe and the next
        self._probe_at: float | None = None  # the next one's time; None: closed
        self._probing = False

    @property
    def is_open(self) -> bool:
        """Or half open."""
        return self._probe_at is not None

    def is_known_down(self, now: float) -> bool:
        """For operators. Open, and somebody calls now and then, who would notice if it was back."""
        return self._probe_at is not None and (self._probing or now < self._probe_at + UNASKED_S)

    def wait_s(self, now: float) -> float:
        """How long no call may begin, as far as that is known; 0: one may begin now."""
        if self._probe_at is None:
            return 0.0
        return max(self._probe_at - now, PAUSE_MIN_S if self._probing else 0.0)

    def begin(self, now: float) -> ProviderPermit | None:
        """None if no call may begin: it is open, or its probe is under way."""
        if self._probe_at is None:
            return ProviderPermit(self._period, probe=False)
        if self._probing or now < self._probe_at:
            return None
        self._probing = True
        return ProviderPermit(self._period, probe=True)

    def cancelled(self, permit: ProviderPermit) -> None:
        """Nobody waited for the call's end: it says nothing."""
        if permit.period == self._period and permit.probe:
            self._probing = False

    def ended(self, permit: ProviderPermit, now: float, *, failed: bool) -> bool:
        """Whether that opened or closed it."""
        if permit.period != self._period:
            return False
        if permit.probe:
            self._probing = False
            if failed:
                self._pause_s = min(2 * self._pause_s, PAUSE_MAX_S)
                self._probe_at = now + self._pause_s
                return False
            return self._turn(None)
        self._ended.append((now, failed))
        if not failed:  # nearly every call
            return False
        while self._ended[0][0] < now - LATELY_S:
            self._ended.popleft()
        failures = sum(each for _, each in self._ended)
        if failures >= FAILURES_MIN and 2 * failures >= len(self._ended):
            self._pause_s = PAUSE_MIN_S
            return self._turn(now + self._pause_s)
        return False

    def _turn(self, probe_at: float | None) -> bool:
        self._period += 1
        self._ended.clear()
        self._probe_at = probe_at
        return True
