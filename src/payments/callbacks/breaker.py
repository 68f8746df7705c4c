"""The circuit breaker of the endpoint: while Order Service is down, only probes are sent to it.

    closed --orders_min orders fail, no success between--> open: probes, at growing intervals
       ^                                                            |
       +-----------------------------------------------one succeeds-+

An outage differs from the failures of single orders: several distinct orders fail, and none has
succeeded since the first failure, however long that takes.

Callers pass the time, as seconds of a monotonic clock. One per process, used only from its event
loop.
"""

from typing import Literal, NamedTuple
from uuid import UUID

from payments.backoff import Backoff

State = Literal["closed", "open", "half_open"]

ORDERS_MIN = 3
OPEN_MIN_S = 0.1  # short, since a partial failure can also open the breaker
OPEN_MAX_S = 10.0  # the longest time until a recovery is noticed
PROBES_MAX = 4  # concurrent


class Permit(NamedTuple):
    """For exchanges that begin together; the result of each must be reported."""

    period: int
    probe: bool


class Breaker:
    """A result counts only if the breaker has neither opened nor closed since its exchange began.

    An exchange from before it opened shows a past state of the endpoint. If its success closed the
    breaker, all callbacks would be sent to an endpoint that is going down. The next probe is
    certain, after at most `open_max_s`.
    """

    def __init__(
        self,
        orders_min: int = ORDERS_MIN,
        open_min_s: float = OPEN_MIN_S,
        open_max_s: float = OPEN_MAX_S,
    ) -> None:
        self._orders_min = orders_min
        self._period = 0  # how often it has opened or closed
        self._failed: set[UUID] = set()  # orders that failed since the last success
        self._since = 0.0  # the time of the first of these failures
        self._pauses = Backoff(open_min_s, open_max_s)  # between probes
        self._probe_at: float | None = None  # time of the next probe; None: closed

    @property
    def since(self) -> float:
        """When the current or latest outage began: the time of its first failure."""
        return self._since

    def state(self, now: float) -> State:
        """half_open: the next probes may be sent."""
        if self._probe_at is None:
            return "closed"
        return "open" if now < self._probe_at else "half_open"

    def allowance(self, now: float, wanted: int) -> int:
        """How many of the `wanted` exchanges may begin now."""
        if self._probe_at is None:
            return wanted
        return 0 if now < self._probe_at else min(wanted, PROBES_MAX)

    def admits_in(self, now: float) -> float:
        """Seconds until an exchange may begin."""
        return 0.0 if self._probe_at is None else max(0.0, self._probe_at - now)

    def begin(self, now: float) -> Permit | None:
        """The permit for the exchanges that `allowance` allowed; None if it has opened since."""
        if self.allowance(now, 1) == 0:
            return None
        if self._probe_at is not None:
            # The next probes do not wait for these, which may hang.
            self._probe_at = now + self._pauses.next_s()
        return Permit(self._period, probe=self._probe_at is not None)

    def succeeded(self, permit: Permit) -> bool:
        """A callback was accepted. Returns whether that closed the breaker."""
        if permit.period == self._period and not permit.probe:
            self._failed.clear()
        return self.answered(permit)

    def answered(self, permit: Permit) -> bool:
        """Order Service rejected one order: neither a failure nor a success of the endpoint. As the
        result of a probe it proves the endpoint alive. Returns whether that closed the breaker."""
        if permit.period != self._period or not permit.probe:
            return False
        self._period += 1
        self._failed.clear()
        self._probe_at = None
        return True

    def failed(self, permit: Permit, order_id: UUID, now: float) -> None:
        """The result suggests that the endpoint is down."""
        if permit.period != self._period or permit.probe:
            return
        if not self._failed:
            self._since = now
        self._failed.add(order_id)
        if len(self._failed) >= self._orders_min:
            self._period += 1
            self._pauses.reset()
            self._probe_at = now + self._pauses.next_s()
