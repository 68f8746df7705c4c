"""The bounds on what one process takes on for API clients, and who is told to come back later.

A request holds a place from when it has arrived until its intent is durable, or its answer is sent;
with all places taken, the next one is refused before anything is done for it
(web/serving/protocol.py).
Requests that wait for somebody else hold none: for the rest of their body, for the provider, for
another request with the same key. Those are bounded by slots, one for each charge or refund that
may be with the provider, and by runs. A slot is taken before the intent is written, so nothing is
stored for a request that would not get one. And every request counts by the bytes that it holds.

A burst may take all places. Once one was refused there are fewer of them, until nobody was refused
for a while: a long queue costs everyone in it time and gets nobody through sooner. Of several
clients none can take everything, and while it is crowded each has an equal share of the places.
Requests that need no API key are bounded apart (web/serving/door.py).
Why, and what was measured: docs/decisions/admission.md.
"""

import math
import time
from collections.abc import Callable
from functools import partial

from payments.errors import TooBusy

CROWDED_PART = 4  # of the places, one in so many is there while requests are being refused
CALM_S = 1.0  # without a refusal for so long, all places are there again
CLIENT_TIMES = 7  # of several clients, each may have so many times what is left for the others

# Memory: a request counts by the bytes that came of it, and by these for the objects around them, a
# small body included.
REQUEST_BYTES = 6 * 1024
MEMORY_MIN = 14 * 1024 * 1024
MEMORY_OF_A_RUN = 9 * 1024  # enough for each that may have a place or a slot
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
        self.places = admission.places.share()
        self.slots = admission.slots.share()
        self.runs = admission.runs.share()
        self.memory = admission.memory.share()
        # Whether to take on one more request; if so, it is to `enter`.
        self.admit: Callable[[], bool] = partial(admission.admits, self.places)

    def enter(self) -> None:
        """A request takes a place: a new one, or one that waited for somebody else."""
        self.places.add(1)

    def leave(self, requests: int = 1) -> None:
        """They are answered, or wait for somebody else."""
        self.places.add(-requests)

    def take_slot(self) -> None:
        """Raises TooBusy."""
        if not self.slots.take():
            raise TooBusy("As many requests as may be are with the payment provider.")

    def release_slot(self) -> None:
        self.slots.add(-1)


class Admission:
    """One per process; used from its event loop alone."""

    def __init__(
        self,
        places: int,
        slots: int,
        clients: int = 1,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        """`clients` is how many there are: a single one may have everything."""
        times = CLIENT_TIMES if clients > 1 else math.inf
        self.places = Bound(places, times)
        self.slots = Bound(slots, times)
        self.runs = Bound(places + slots, times)
        self.memory = Bound(max(MEMORY_MIN, (places + slots) * MEMORY_OF_A_RUN), times)
        self.anonymous_memory = Bound(ANONYMOUS_MEMORY, ANONYMOUS_TIMES)
        self._places_when_crowded = places // CROWDED_PART
        self._least_share = max(1, self._places_when_crowded // max(1, clients))
        self._crowded_until = 0.0
        self._clock = clock
        self._clients: dict[str, Client] = {}

    def client(self, name: str) -> Client:
        found = self._clients.get(name)
        if found is None:
            found = self._clients[name] = Client(name, self)
        return found

    def admits(self, places: Share) -> bool:
        """Whether whoever has these places may take one more; if not, it is crowded from now on."""
        bound = self.places
        left = bound.total - bound.taken
        if left > 0 and places.held < bound.times * left:
            if places.held < self._least_share or self._clock() >= self._crowded_until:
                return True
            if places.held < self._share_of(places):
                return True
        self._crowded_until = self._clock() + CALM_S
        return False

    def _share_of(self, places: Share) -> int:
        """While it is crowded: an equal one for each that has any places, and for this one."""
        holders = sum(client.places.held > 0 for client in self._clients.values())
        return self._places_when_crowded // (holders + (places.held <= 0))
