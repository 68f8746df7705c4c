"""The bounds on what one process takes on for API clients, and who is told to come back later.

A request counts against `requests_max` (INTENT_QUEUE_MAX) from when it has arrived until its intent
is durable, or its answer is sent; once so many are under way, the next one is refused before
anything is done for it (web/serving/protocol.py).
Requests that wait for somebody else do not count: for the rest of their body, for the provider, for
another request with the same key. Those are bounded by `provider_calls_max`
(GATEWAY_CONCURRENCY_MAX), the charges and refunds that may be with the provider, and by runs. A
provider call is taken before the intent is written, so nothing is stored for a request that would
not get one. And every request counts by the bytes that it holds.

A burst may reach `requests_max`. Once one was refused fewer are let in, until nobody was refused
for a while: a long queue costs everyone in it time and gets nobody through sooner. Of several
clients none can take everything, and while it is crowded each may have an equal share of requests.
Requests that need no API key are bounded apart (web/serving/door.py).
Why, and what was measured: docs/decisions/admission.md.
"""

import math
import time
from collections.abc import Callable
from functools import partial

from payments.errors import TooBusy

CROWDED_PART = 4  # while requests are being refused, so many times fewer are let in
CALM_S = 1.0  # without a refusal for so long, `requests_max` are let in again
CLIENT_TIMES = 7  # of several clients, each may have so many times what is left for the others

# Memory: a request counts by the bytes that came of it, and by these for the objects around them, a
# small body included.
REQUEST_BYTES = 6 * 1024
MEMORY_MIN = 14 * 1024 * 1024
MEMORY_OF_A_RUN = 9 * 1024  # enough for each request and each provider call
# For heads of which only a part came yet, and requests without a client; of a connection each.
ANONYMOUS_MEMORY = 8 * 1024 * 1024
ANONYMOUS_TIMES = 1 / 16


class Bound:
    """So many units; each holder may have up to `times` as many as are left for the others."""

    def __init__(self, total: int, times: float = math.inf) -> None:
        self.total = total
        self.times = times
        self.taken = 0

    def share(self) -> "Share":
        """A new holder, which has nothing yet."""
        return Share(self)


class Share:
    """What one holder has of a bound."""

    __slots__ = ("bound", "held")

    def __init__(self, bound: Bound) -> None:
        self.bound = bound
        self.held = 0

    def take(self, count: int = 1) -> bool:
        """Takes so many more, or nothing: then it is False."""
        bound = self.bound
        left = bound.total - bound.taken
        if count > left or self.held + count > bound.times * left:
            return False
        self.held += count
        bound.taken += count
        return True

    def add(self, count: int) -> None:
        """Without a look at the bound; negative to give back."""
        self.held += count
        self.bound.taken += count


class Client:
    """One API client, and what it has of the bounds."""

    def __init__(self, name: str, admission: "Admission") -> None:
        self.name = name
        self.requests = admission.requests.share()
        self.provider_calls = admission.provider_calls.share()
        self.runs = admission.runs.share()
        self.memory = admission.memory.share()
        # Whether to take on one more request; if so, it is to `enter`.
        self.admit: Callable[[], bool] = partial(admission.admits, self.requests)

    def enter(self) -> None:
        """One more request counts: a new one, or one that waited for somebody else."""
        self.requests.add(1)

    def leave(self, requests: int = 1) -> None:
        """So many count no more: they are answered, or wait for somebody else."""
        self.requests.add(-requests)

    def take_provider_call(self) -> None:
        """Raises TooBusy."""
        if not self.provider_calls.take():
            raise TooBusy("As many requests as may be are with the payment provider.")

    def release_provider_call(self) -> None:
        self.provider_calls.add(-1)


class Admission:
    """One per process; used from its event loop alone."""

    def __init__(
        self,
        requests_max: int,
        provider_calls_max: int,
        clients: int = 1,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        """`clients` is how many there are: a single one may have everything."""
        times = CLIENT_TIMES if clients > 1 else math.inf
        self.requests = Bound(requests_max, times)
        self.provider_calls = Bound(provider_calls_max, times)
        runs_max = requests_max + provider_calls_max
        self.runs = Bound(runs_max, times)
        self.memory = Bound(max(MEMORY_MIN, runs_max * MEMORY_OF_A_RUN), times)
        self.anonymous_memory = Bound(ANONYMOUS_MEMORY, ANONYMOUS_TIMES)
        self._crowded_max = requests_max // CROWDED_PART
        self._least_share = max(1, self._crowded_max // max(1, clients))
        self._crowded_until = 0.0
        self._clock = clock
        self._clients: dict[str, Client] = {}

    def client(self, name: str) -> Client:
        found = self._clients.get(name)
        if found is None:
            found = self._clients[name] = Client(name, self)
        return found

    def admits(self, requests: Share) -> bool:
        """Whether a client with so many requests may have one more; if not, it is now crowded."""
        bound = self.requests
        left = bound.total - bound.taken
        if left > 0 and requests.held < bound.times * left:
            if requests.held < self._least_share or self._clock() >= self._crowded_until:
                return True
            if requests.held < self._share_of(requests):
                return True
        self._crowded_until = self._clock() + CALM_S
        return False

    def _share_of(self, requests: Share) -> int:
        """While it is crowded: an equal one for each client with any requests, and this one."""
        holders = sum(client.requests.held > 0 for client in self._clients.values())
        return self._crowded_max // (holders + (requests.held <= 0))
