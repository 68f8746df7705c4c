"""The bounds on what one process takes on, and who is told to come back later.

A request holds a place from when it has arrived until its intent is durable, or its answer is sent;
with all places taken, the next one is refused before anything is done for it (web/protocol.py).
Requests that wait for somebody else hold none: for the rest of their body, for the provider, for
another request with the same key. Those are bounded by slots, one for each charge or refund that
may be with the provider. A slot is taken before the intent is written, so nothing is stored for a
request that would not get one.

A burst may take all places. Once one was refused there are fewer of them, until nobody was refused
for a while: a long queue costs everyone in it time and gets nobody through sooner. Why, and what
was measured: docs/decisions/admission.md.
"""

import time
from collections.abc import Callable

from payments.errors import TooBusy

REQUESTS_MAX = 10_000  # of all kinds; each takes about 20 KB
CROWDED_PART = 4  # of the places, one in so many is there while requests are being refused
CALM_S = 1.0  # without a refusal for so long, all places are there again


class Admission:
    """One per process; used from its event loop alone."""

    def __init__(
        self, places: int, slots: int, clock: Callable[[], float] = time.monotonic
    ) -> None:
        self._places = places
        self._places_when_crowded = max(1, places // CROWDED_PART)
        self._crowded_until = 0.0
        self._slots = slots
        self._clock = clock
        self.waiting = 0  # requests under way that hold no place
        self.slots_taken = 0

    def admits_another(self, requests: int) -> bool:
        """Whether to take on one more while so many are under way, those that wait included."""
        holding = requests - self.waiting
        if holding < self._places_when_crowded and requests < REQUESTS_MAX:
            return True
        now = self._clock()
        if holding < self._places and requests < REQUESTS_MAX and now >= self._crowded_until:
            return True
        self._crowded_until = now + CALM_S
        return False

    def take_slot(self) -> None:
        """Raises TooBusy."""
        if self.slots_taken >= self._slots:
            raise TooBusy("As many requests as may be are with the payment provider.")
        self.slots_taken += 1

    def release_slot(self) -> None:
        self.slots_taken -= 1
