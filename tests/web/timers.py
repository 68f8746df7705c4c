"""Timers in the hands of a test."""

from collections.abc import Callable


class Timer:
    def __init__(self, due_at: float, callback: Callable[[], object]) -> None:
        self.due_at = due_at
        self.callback = callback
        self.is_cancelled = False

    def cancel(self) -> None:
        self.is_cancelled = True


class Loop:
    """What an event loop knows of time, which passes when the test says so."""

    def __init__(self) -> None:
        self.now = 1000.0
        self._timers: list[Timer] = []

    def call_later(self, delay_s: float, callback: Callable[[], object]) -> Timer:
        self._timers.append(Timer(self.now + delay_s, callback))
        return self._timers[-1]

    def run(self, seconds: float) -> None:
        ends = self.now + seconds
        while due := [timer for timer in self._pending() if timer.due_at <= ends]:
            first = min(due, key=lambda timer: timer.due_at)
            self._timers.remove(first)
            self.now = first.due_at
            first.callback()
        self.now = ends

    @property
    def is_quiet(self) -> bool:
        return not self._pending()

    def _pending(self) -> list[Timer]:
        return [timer for timer in self._timers if not timer.is_cancelled]
