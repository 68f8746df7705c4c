"""Growing pauses between attempts to reach what may be unavailable for long."""


class Backoff:
    """Pauses that double, from `least_s` up to `most_s`."""

    def __init__(self, least_s: float, most_s: float) -> None:
        self._least_s, self._most_s = least_s, most_s
        self._next_s = least_s

    def next_s(self) -> float:
        """The pause before the next attempt, in seconds."""
        pause_s, self._next_s = self._next_s, min(self._next_s * 2, self._most_s)
        return pause_s

    def reset(self) -> None:
        """An attempt succeeded."""
        self._next_s = self._least_s
