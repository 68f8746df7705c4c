"""Runs the parts in turn. One that fails is shown and takes no further turn; the others go on."""

import signal
import traceback
from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import click

from benchmarks.load import Figures
from benchmarks.parts import Part

WARM_UP_S = 1.0


class TookTooLong(KeyboardInterrupt):
    """No Exception: a task or a retry loop of the part must not take it for its own."""


@contextmanager
def bounded(seconds: float) -> Iterator[None]:
    """Raises TookTooLong inside, whatever the main thread waits for."""

    def ring(*_: object) -> None:
        raise TookTooLong(f"took more than {seconds:g} s")

    before = signal.signal(signal.SIGALRM, ring)
    signal.setitimer(signal.ITIMER_REAL, seconds)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)


class Harness:
    """`figures` and `details` are those of the parts that did not fail, figures one per round.

    A step of a part is given up after `patience_s`, a round after 10 times its seconds more.
    """

    def __init__(self, parts: Sequence[Part], patience_s: float) -> None:
        self._parts = parts
        self._patience_s = patience_s
        self._going: list[Part] = []
        self.figures: dict[str, list[Figures]] = {part.name: [] for part in parts}
        self.details: dict[str, dict[str, dict[str, float]]] = {}
        self.failed: list[str] = []

    def run(self, rounds: int, seconds: float) -> None:
        try:
            for part in self._parts:
                with self._step(part, "the start"):
                    part.__enter__()
                    self._going.append(part)
            for number in range(rounds + 1):
                for part in list(self._going):
                    self._turn(part, number, seconds)
            for part in list(self._going):
                with self._step(part, "the last look"):
                    self._look_at(part)
        finally:
            while self._going:
                self._leave(self._going[-1])

    def _turn(self, part: Part, number: int, seconds: float) -> None:
        turn = f"round {number}" if number else "warm-up"
        click.echo(f"  {turn}: {part.name}", err=True)
        with self._step(part, turn, 10 * seconds):
            figures = part.run(seconds if number else WARM_UP_S)
            assert figures.per_s > 0, f"nothing was done: {figures}"
            if number:
                self.figures[part.name].append(figures)

    def _look_at(self, part: Part) -> None:
        for line in part.remarks():
            click.echo(f"  {part.name}: {line}", err=True)
        if rows := part.rows():
            self.details[part.name] = rows

    def _leave(self, part: Part) -> None:
        self._going.remove(part)
        with self._step(part, "the end"):
            part.__exit__(None, None, None)

    @contextmanager
    def _step(self, part: Part, step: str, more_s: float = 0) -> Iterator[None]:
        """Bounds what is inside. If it fails, the part is shown and left."""
        try:
            with bounded(self._patience_s + more_s):
                yield
        except (Exception, TookTooLong) as error:  # noqa: BLE001 - whatever it is, the others go on
            self._show(part, step, error)
            if part in self._going:
                self._leave(part)

    def _show(self, part: Part, step: str, error: BaseException) -> None:
        if part.name not in self.failed:
            self.failed.append(part.name)
            self.figures.pop(part.name, None)
            self.details.pop(part.name, None)
        click.echo(f"  {part.name} FAILED in {step}:", err=True)
        text = "".join(traceback.format_exception(error)) + part.said()
        for line in text.splitlines():
            click.echo(f"    {line}", err=True)
