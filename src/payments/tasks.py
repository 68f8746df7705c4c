"""Ending background tasks."""

import asyncio
import time
from collections.abc import Collection
from typing import Any

AGAIN_S = 0.2  # longer than the clean-up of a task


async def end(tasks: Collection[asyncio.Task[Any]], within_s: float) -> None:
    """Cancels the tasks, repeatedly, until they have ended or `within_s` is over.

    Once may not be enough: in Python 3.11 `asyncio.wait_for`, which psycopg uses, loses a
    cancellation that arrives together with its result (bpo-42130).
    """
    left, until = set(tasks), time.monotonic() + within_s
    while left and (left_s := until - time.monotonic()) > 0:
        for task in left:
            task.cancel()
        _, left = await asyncio.wait(left, timeout=min(AGAIN_S, left_s))


async def finish(tasks: Collection[asyncio.Task[Any]], timeout_s: float, end_s: float = 0.5) -> int:
    """Waits up to `timeout_s` for the tasks, then cancels the rest, within `end_s`. Returns how
    many were cancelled."""
    if tasks and timeout_s > 0:
        await asyncio.wait(tasks, timeout=timeout_s)
    left = [task for task in tasks if not task.done()]
    await end(left, end_s)
    return len(left)
