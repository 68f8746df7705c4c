"""Ending background tasks."""

import asyncio
import time
from collections.abc import Collection
from typing import Any

AGAIN_S = 0.2  # longer than a task takes to clean up


async def end(tasks: Collection[asyncio.Task[Any]], within_s: float) -> None:
    """Cancels the tasks, and again until they have ended or the time is over.

    Once may not be enough: in Python 3.11 `asyncio.wait_for`, by which psycopg waits, forgets a
    cancellation that comes together with what it waits for (bpo-42130).
    """
    left, until = set(tasks), time.monotonic() + within_s
    while left and (left_s := until - time.monotonic()) > 0:
        for task in left:
            task.cancel()
        _, left = await asyncio.wait(left, timeout=min(AGAIN_S, left_s))


async def finish(tasks: Collection[asyncio.Task[Any]], timeout_s: float, end_s: float = 0.5) -> int:
    """Waits so long for the tasks, not at all if that is 0, and ends those that are left, within
    `end_s`. Returns how many were left."""
    if tasks and timeout_s > 0:
        await asyncio.wait(tasks, timeout=timeout_s)
    left = [task for task in tasks if not task.done()]
    await end(left, end_s)
    return len(left)
