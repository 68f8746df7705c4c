"""The bounds on what one process takes on, and who is told to come back later.

A request holds a place from when it has arrived until its intent is durable, or its answer is sent;
with all places taken, the next one is refused before anything is done for it (web/protocol.py).
Requests that wait for somebody else hold none: for the rest of their body, for the provider, for
another request with the same key. Those are bounded by slots, one for each charge or refund that
may be with the provider. A slot is taken before the intent is written, so nothing is stored for a
request that would not get one.
"""

from payments.errors import TooBusy

REQUESTS_MAX = 10_000  # of all kinds; each takes about 20 KB


class Admission:
    """One per process; used from its event loop alone."""

    def __init__(self, places: int, slots: int) -> None:
        self._places = places
        self._slots = slots
        self.waiting = 0  # requests under way that hold no place
        self.slots_taken = 0

    def is_full(self, requests: int) -> bool:
        """Whether to refuse the next request while so many are under way."""
        return requests - self.waiting >= self._places or requests >= REQUESTS_MAX

    def take_slot(self) -> None:
        """Raises TooBusy."""
        if self.slots_taken >= self._slots:
            raise TooBusy("As many requests as may be are with the payment provider.")
        self.slots_taken += 1

    def release_slot(self) -> None:
        self.slots_taken -= 1
