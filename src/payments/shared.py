"""Doing something once for all who ask for it at the same time."""

import asyncio
from collections.abc import Awaitable, Callable
from typing import Generic, TypeVar

T = TypeVar("T")


class Shared(Generic[T]):
    """Whoever calls it while it runs gets the result of that run, or its error.

    It may have begun before they asked. A caller that goes away takes nobody with it.
    """

    def __init__(self, work: Callable[[], Awaitable[T]]) -> None:
        self._work = work
        self._running: asyncio.Task[T] | None = None

    async def __call__(self) -> T:
        if self._running is None:
            self._running = asyncio.create_task(self._run(), name="shared")
        return await asyncio.shield(self._running)

    async def _run(self) -> T:
        try:
            return await self._work()
        finally:
            self._running = None
