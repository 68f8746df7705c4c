"""The circuit breaker of the endpoint: while Order Service is down, next to nothing is sent to it.

    closed --failures_max failures in a row--> open --open_s later--> half open: one probe at a time
       ^                                        ^                          |
       |                                        +---- it fails: open_s * 2 +
       +---------------------------------------------------- it succeeds --+

Time is handed in, as seconds of a monotonic clock. One per process, used from its event loop alone.
"""

from typing import Literal

State = Literal["closed", "open", "half_open"]

FAILURES_MAX = 5  # in a row; while only some instances of Order Service are down, others answer
OPEN_MIN_S = 1.0
OPEN_MAX_S = 10.0  # for so long it may go unnoticed that the endpoint is back


class Permit:
    """For one exchange, whose result is told once: succeeded or failed; or it is released."""

    __slots__ = ("period", "probe")

    def __init__(self, period: int, probe: bool) -> None:
        self.period = period
        self.probe = probe


class Breaker:
    """A result counts only if nothing opened the breaker since its exchange began.

    What was under way when it opened says how the endpoint was, not how it is: such a failure is
    part of the outage that is known already and does not prolong it, and such a success, come
    between failures, would let everything loose on an endpoint that is going down. The next probe
    is at most `open_max_s` away, and it is certain.
    """

    def __init__(
        self,
        failures_max: int = FAILURES_MAX,
        open_min_s: float = OPEN_MIN_S,
        open_max_s: float = OPEN_MAX_S,
    ) -> None:
        self._failures_max = failures_max
        self._open_min_s = open_min_s
        self._open_max_s = open_max_s
        self._failures = 0  # in a row, of exchanges of this period
        self._period = 0  # how often it has opened
        self._open_s = 0.0  # for how long it opened last
        self._opened_until: float | None = None  # None: closed
        self._probe: Permit | None = None

    def state(self, now: float) -> State:
        if self._opened_until is None:
            return "closed"
        return "open" if now < self._opened_until else "half_open"

    def allowance(self, now: float, wanted: int) -> int:
        """How many of the wanted exchanges may begin now."""
        if self._opened_until is None:
            return wanted
        if now < self._opened_until or self._probe is not None:
            return 0
        return min(wanted, 1)

    def admits_in(self, now: float) -> float | None:
        """Seconds until an exchange may begin; None while that is for the probe to say."""
        if self._opened_until is None:
            return 0.0
        return None if self._probe is not None else max(0.0, self._opened_until - now)

    def begin(self, now: float) -> Permit | None:
        """None if none may begin: the allowance may be gone since it was asked for."""
        if self.allowance(now, 1) == 0:
            return None
        permit = Permit(self._period, probe=self._opened_until is not None)
        if permit.probe:
            self._probe = permit
        return permit

    def succeeded(self, permit: Permit) -> bool:
        """The endpoint gave an answer that proves it alive. Whether that closed the breaker."""
        if permit is self._probe:
            self._probe = self._opened_until = None
            self._failures = 0
            return True
        if self._counts(permit):
            self._failures = 0
        return False

    def failed(self, permit: Permit, now: float) -> None:
        """The endpoint seems to be down."""
        if permit is self._probe:
            self._open(now, min(2 * self._open_s, self._open_max_s))
        elif self._counts(permit):
            self._failures += 1
            if self._failures >= self._failures_max:
                self._open(now, self._open_min_s)

    def released(self, permit: Permit) -> None:
        """It has no result: cancelled, or never begun. After a result this does nothing."""
        if permit is self._probe:
            self._probe = None

    def _counts(self, permit: Permit) -> bool:
        return permit.period == self._period and not permit.probe

    def _open(self, now: float, open_s: float) -> None:
        self._period += 1
        self._open_s = open_s
        self._opened_until = now + open_s
        self._probe = None
