"""Progress of a long command on stderr: a bar on a terminal, else a line every few seconds."""

import sys
import time
from types import TracebackType
from typing import TYPE_CHECKING, Self

import click

if TYPE_CHECKING:
    from rich.progress import Progress as Bars
    from rich.progress import TaskID

LINE_EVERY_S = 5.0


class Progress:
    """Called with a step's name, the amount done, and the total, None if unknown."""

    def __init__(self) -> None:
        self._bars: Bars | None = None
        self._tasks: dict[str, TaskID] = {}
        self._step = ""
        self._began = self._told = time.monotonic()
        if sys.stderr.isatty():
            self._bars = _bars()

    def __enter__(self) -> Self:
        if self._bars is not None:
            self._bars.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, _: TracebackType | None
    ) -> None:
        if self._bars is not None:
            self._bars.stop()

    def __call__(self, step: str, done: int, total: int | None) -> None:
        now = time.monotonic()
        if step != self._step:
            self._step, self._began = step, now
        rate = done / (now - self._began) if now > self._began else 0.0
        if self._bars is not None:
            if step not in self._tasks:
                self._tasks[step] = self._bars.add_task(step, total=total, rate="")
            text = f"{rate:,.0f}/s" if rate else ""
            self._bars.update(self._tasks[step], completed=done, total=total, rate=text)
        elif now - self._told >= LINE_EVERY_S:
            self._told = now
            click.echo(_line(step, done, total, rate), err=True)


def _bars() -> "Bars":
    from rich.console import Console
    from rich.progress import (
        BarColumn,
        MofNCompleteColumn,
        Progress,
        TextColumn,
        TimeRemainingColumn,
    )

    return Progress(
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TextColumn("{task.fields[rate]}"),
        TimeRemainingColumn(),
        console=Console(stderr=True),
        transient=True,
    )


def _line(step: str, done: int, total: int | None, rate: float) -> str:
    line = f"{step}: {done:,}" + (f" of {total:,}" if total is not None else "")
    if rate:
        line += f", {rate:,.0f}/s"
        if total is not None:
            line += f", {max(0.0, (total - done) / rate):.0f} s left"
    return line
