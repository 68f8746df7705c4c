"""Limits the concurrent work of one process for API clients; further requests are rejected.

A request counts against `requests_max` (INTENT_QUEUE_MAX) from its arrival until its intent is
durable, or its response is sent; at the limit the next one is rejected before any work is done for
it (web/serving/protocol.py). Requests that wait for the rest of their body, for the provider, or
for another request with the same key do not count. These are limited by `provider_calls_max`
(GATEWAY_CONCURRENCY_MAX), the concurrent charges and refunds at the provider, and by runs. A
provider call is reserved before the intent is written, so nothing is stored for a request that
would not get one. Every request also counts by the bytes that it holds.

A burst may reach `requests_max`. After a rejection fewer are admitted, until none was rejected for
CALM_S: a long queue only adds waiting time. No client of several can take all capacity, and while
requests are rejected each client gets an equal share. Requests without an API key have separate
limits (web/serving/door.py). Reasons and measurements: docs/decisions/admission.md.
"""

import math
import time
from collections.abc import Callable
from functools import partial

from payments.errors import TooBusy

CROWDED_PART = 4  # while requests are rejected, the limit is divided by this
CALM_S = 1.0  # after this time without a rejection, the limit is `requests_max` again
CLIENT_TIMES = 7  # one of several clients may hold this multiple of what is left for the others

# Memory: a request counts its received bytes, and these for its objects, including a small body.
REQUEST_BYTES = 6 * 1024
MEMORY_MIN = 14 * 1024 * 1024
MEMORY_OF_A_RUN = 9 * 1024  # enough for each request and each provider call
# For incomplete header sections and requests without a client; each connection is a holder.
ANONYMOUS_MEMORY = 8 * 1024 * 1024
ANONYMOUS_TIMES = 1 / 16
WEBHOOK_MEMORY = 8 * 1024 * 1024  # for all webhooks of providers together


class Bound:
    """`total` units; each holder may have up to `times` the units that are left for the others."""

    def __init__(self, total: int, times: float = math.inf) -> None:
        self.total = total
        self.times = times
        self.taken = 0

    def share(self) -> "Share":
        """A new holder without units."""
        return Share(self)


class Share:
    """The units of one holder."""

    __slots__ = ("bound", "held")

    def __init__(self, bound: Bound) -> None:
        self.bound = bound
        self.held = 0

    def take(self, count: int = 1) -> bool:
        """Takes `count` more units, or none and returns False."""
        bound = self.bound
        left = bound.total - bound.taken
        if count > left or self.held + count > bound.times * left:
            return False
        self.held += count
        bound.taken += count
        return True

    def add(self, count: int) -> None:
        """Adds units without checking the bound; negative to release them."""
        self.held += count
        self.bound.taken += count


class Client:
    """One API client, with its shares of the bounds."""

    def __init__(self, name: str, admission: "Admission") -> None:
        self.name = name
        self.requests = admission.requests.share()
        self.provider_calls = admission.provider_calls.share()
        self.runs = admission.runs.share()
        self.memory = admission.memory.share()
        # Whether one more request may be admitted; if so, the caller must `enter`.
        self.admit: Callable[[], bool] = partial(admission.admits, self.requests)

    def enter(self) -> None:
        """One more request counts: a new one, or one that continues after a wait."""
        self.requests.add(1)

    def leave(self, requests: int = 1) -> None:
        """These requests no longer count: they got their response, or wait."""
        self.requests.add(-requests)

    def take_provider_call(self) -> None:
        """Raises TooBusy."""
        if not self.provider_calls.take():
            raise TooBusy("The limit of concurrent provider requests is reached.")

    def release_provider_call(self) -> None:
        self.provider_calls.add(-1)


class Admission:
    """One per process; used only from its event loop."""

    def __init__(
        self,
        requests_max: int,
        provider_calls_max: int,
        clients: int = 1,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        """`clients` is their number: a single one may take all capacity."""
        times = CLIENT_TIMES if clients > 1 else math.inf
        self.requests = Bound(requests_max, times)
        self.provider_calls = Bound(provider_calls_max, times)
        runs_max = requests_max + provider_calls_max
        self.runs = Bound(runs_max, times)
        self.memory = Bound(max(MEMORY_MIN, runs_max * MEMORY_OF_A_RUN), times)
        self.anonymous_memory = Bound(ANONYMOUS_MEMORY, ANONYMOUS_TIMES)
        self.webhook_memory = Bound(WEBHOOK_MEMORY)
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
        """Whether a client with these requests may have one more; if not, fewer are admitted for
        CALM_S."""
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
        """The reduced limit in equal shares for this client and all others with requests."""
        holders = sum(client.requests.held > 0 for client in self._clients.values())
        return self._crowded_max // (holders + (requests.held <= 0))
