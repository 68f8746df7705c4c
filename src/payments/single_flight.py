"""One run of an operation for all concurrent callers, or also for those shortly afterwards."""

import asyncio
import math
import time
from collections.abc import Awaitable, Callable
from typing import Generic, TypeVar

T = TypeVar("T")


class SingleFlight(Generic[T]):
    """Callers during a run get its result or its error, though it may have begun before their call.

    A cancelled caller does not cancel the run.
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
    """Also keeps the last result, for callers that accept an older one."""

    def __init__(self, work: Callable[[], Awaitable[T]]) -> None:
        super().__init__(work)
        self._last: T | None = None
        self._began_at = -math.inf  # the beginning of the run of `_last`

    async def recent(self, age_s: float) -> T:
        """The last result if its run began at most `age_s` ago, else the next one."""
        if self._last is not None and time.monotonic() - self._began_at <= age_s:
            return self._last
        return await self()

    def last(self, age_s: float) -> T | None:
        """The last result, without waiting; None if there is none. If it is older than `age_s`, a
        run is started, for later calls."""
        if time.monotonic() - self._began_at > age_s:
            self._begin()
        return self._last

    async def _run(self) -> T:
        began_at = time.monotonic()
        result = await super()._run()
        self._last, self._began_at = result, began_at
        return result
