"""The pauses between attempts at what may be away for long."""


class Backoff:
    """Each pause is twice the one before: the first is `least_s`, none is longer than `most_s`."""

    def __init__(self, least_s: float, most_s: float) -> None:
        self._least_s, self._most_s = least_s, most_s
        self._next_s = least_s

    def next_s(self) -> float:
        """How long to wait before the next attempt, in seconds."""
        pause_s, self._next_s = self._next_s, min(self._next_s * 2, self._most_s)
        return pause_s

    def reset(self) -> None:
        """An attempt succeeded."""
        self._next_s = self._least_s
