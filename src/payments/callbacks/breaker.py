"""The circuit breaker of the endpoint: while Order Service is down, next to nothing is sent to it.

    closed --orders_min orders fail, no success between--> open: probes, ever farther apart
       ^                                                            |
       +-----------------------------------------------one succeeds-+

An outage is told from orders in trouble of their own by the orders: several distinct ones fail, and
none succeeds since the first of them, however long that takes.

Time is handed in, as seconds of a monotonic clock. One per process, used from its event loop alone.
"""

from typing import Literal, NamedTuple
from uuid import UUID

from payments.backoff import Backoff

State = Literal["closed", "open", "half_open"]

ORDERS_MIN = 3
OPEN_MIN_S = 0.1  # orders of a part that is down make an outage of it now and then: a short one
OPEN_MAX_S = 10.0  # for so long it may go unnoticed that the endpoint is back
PROBES_MAX = 4  # at once


class Permit(NamedTuple):
    """For exchanges that begin together, each of whose results is told."""

    period: int
    probe: bool


class Breaker:
    """A result counts only if nothing opened or closed the breaker since its exchange began.

    What was under way when it opened says how the endpoint was, not how it is: such a success, come
    between failures, would let everything loose on an endpoint that is going down. The next probe
    is at most `open_max_s` away, and it is certain.
    """

    def __init__(
        self,
        orders_min: int = ORDERS_MIN,
        open_min_s: float = OPEN_MIN_S,
        open_max_s: float = OPEN_MAX_S,
    ) -> None:
        self._orders_min = orders_min
        self._period = 0  # how often it has opened or closed
        self._failed: set[UUID] = set()  # orders, since the last success
        self._since = 0.0  # when the first of them failed
        self._pauses = Backoff(open_min_s, open_max_s)  # between probes
        self._probe_at: float | None = None  # the next one's time; None: closed

    @property
    def since(self) -> float:
        """When the outage began that there is, or was last: with the first order that failed."""
        return self._since

    def state(self, now: float) -> State:
        """half_open: the next probes may begin."""
        if self._probe_at is None:
            return "closed"
        return "open" if now < self._probe_at else "half_open"

    def allowance(self, now: float, wanted: int) -> int:
        """How many of the wanted exchanges may begin now."""
        if self._probe_at is None:
            return wanted
        return 0 if now < self._probe_at else min(wanted, PROBES_MAX)

    def admits_in(self, now: float) -> float:
        """Seconds until an exchange may begin."""
        return 0.0 if self._probe_at is None else max(0.0, self._probe_at - now)

    def begin(self, now: float) -> Permit | None:
        """For as many as were allowed; None if none may begin: it may have opened meanwhile."""
        if self.allowance(now, 1) == 0:
            return None
        if self._probe_at is not None:
            # The next ones do not wait for these: they may hang.
            self._probe_at = now + self._pauses.next_s()
        return Permit(self._period, probe=self._probe_at is not None)

    def succeeded(self, permit: Permit) -> bool:
        """A callback was taken. Whether that closed the breaker."""
        if permit.period == self._period and not permit.probe:
            self._failed.clear()
        return self.answered(permit)

    def answered(self, permit: Permit) -> bool:
        """Order Service itself refused one order: no failure of the endpoint, and no success. But a
        probe's proves it alive. Whether that closed the breaker."""
        if permit.period != self._period or not permit.probe:
            return False
        self._period += 1
        self._failed.clear()
        self._probe_at = None
        return True

    def failed(self, permit: Permit, order_id: UUID, now: float) -> None:
        """The endpoint seems to be down."""
        if permit.period != self._period or permit.probe:
            return
        if not self._failed:
            self._since = now
        self._failed.add(order_id)
        if len(self._failed) >= self._orders_min:
            self._period += 1
            self._pauses.reset()
            self._probe_at = now + self._pauses.next_s()
