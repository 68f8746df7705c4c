"""Doing something once for all who ask for it at the same time, or shortly afterwards."""

import asyncio
import math
import time
from collections.abc import Awaitable, Callable
from typing import Generic, TypeVar

T = TypeVar("T")


class SingleFlight(Generic[T]):
    """Whoever calls it while it runs gets the result of that run, or its error.

    It may have begun before they asked. A caller that goes away takes nobody with it.
    """

    def __init__(self, work: Callable[[], Awaitable[T]]) -> None:
        self._work = work
        self._running: asyncio.Task[T] | None = None

    async def __call__(self) -> T:
        return await asyncio.shield(self._begin())

    def _begin(self) -> "asyncio.Task[T]":
        if self._running is None:
            self._running = asyncio.create_task(self._run(), name="single-flight")
        return self._running

    async def _run(self) -> T:
        try:
            return await self._work()
        finally:
            self._running = None


class Recent(SingleFlight[T]):
    """Keeps the last result as well, for whoever is content with one that is not from now."""

    def __init__(self, work: Callable[[], Awaitable[T]]) -> None:
        super().__init__(work)
        self._last: T | None = None
        self._began_at = -math.inf  # the run that it is from

    async def recent(self, age_s: float) -> T:
        """The last result if its run began no longer ago than that, else the next one."""
        if self._last is not None and time.monotonic() - self._began_at <= age_s:
            return self._last
        return await self()

    def last(self, age_s: float) -> T | None:
        """The last result, at once; None if there is none. If it is older than that, another run
        begins, whose result the next one gets."""
        if time.monotonic() - self._began_at > age_s:
            self._begin()
        return self._last

    async def _run(self) -> T:
        began_at = time.monotonic()
        result = await super()._run()
        self._last, self._began_at = result, began_at
        return result
