"""`python -m tests.failing_parts`: the benchmark of parts that fail, each in its own way."""

import asyncio
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Self

import uvloop

from benchmarks import __main__ as benchmark
from benchmarks.child import output_of
from benchmarks.load import Figures
from benchmarks.parts import Part
from payments.database.connections import DatabaseAddress


class Sound(Part):
    name = "sound"

    def __enter__(self) -> Self:
        return self

    def run(self, seconds: float) -> Figures:
        return Figures.of([0.001] * 10, seconds)


class CannotStart(Sound):
    name = "cannot_start"

    def __enter__(self) -> Self:
        raise OSError("no room for a database")


class Hangs(Sound):
    name = "hangs"

    def __enter__(self) -> Self:
        uvloop.run(self._retry())
        return self

    async def _retry(self) -> None:
        while True:
            try:
                await asyncio.sleep(0.01)
            except Exception:  # noqa: BLE001 - as a loop does that must go on
                continue


class ChildFails(Sound):
    """Not in the warm-up."""

    name = "child_fails"
    rounds = 0

    def run(self, seconds: float) -> Figures:
        self.rounds += 1
        if self.rounds > 1:
            output_of([sys.executable, "-c", "exit('too many clients')"], timeout_s=30)
        return super().run(seconds)

    def said(self) -> str:
        return "the last line of its server"


class DoesNothing(Sound):
    name = "does_nothing"

    def run(self, seconds: float) -> Figures:
        return Figures.of([], seconds, errors=7)


class LostSomething(Sound):
    name = "lost_something"

    def remarks(self) -> list[str]:
        raise AssertionError("a charge is not stored")


class EndsBadly(Sound):
    name = "ends_badly"

    def __exit__(self, *_: object) -> None:
        raise OSError("ended with 139")


@contextmanager
def no_server() -> Iterator[DatabaseAddress]:
    yield DatabaseAddress(host="", port=0, user="", password=None, dbname="")


PARTS = (CannotStart, Hangs, ChildFails, Sound, DoesNothing, LostSomething, EndsBadly)

if __name__ == "__main__":
    benchmark.ALL = {part.name: part for part in PARTS}
    benchmark.server = no_server
    benchmark.main()
