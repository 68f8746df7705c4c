"""Background tasks end when they are told to."""

import asyncio
import sys

import pytest

from payments.tasks import end
from tests.machine import within

pytestmark = pytest.mark.anyio


async def forgetful(came: asyncio.Event) -> None:
    """As a loop that asks the database, in which the answer and the end come together."""
    while True:
        await asyncio.wait_for(came.wait(), 10)
        came.clear()


@pytest.mark.skipif(sys.version_info >= (3, 12), reason="wait_for is right from 3.12 on")
async def test_wait_for_forgets_a_cancellation() -> None:
    """Why one is not enough."""
    came = asyncio.Event()
    task = asyncio.create_task(forgetful(came))
    await asyncio.sleep(0.01)
    came.set()
    await asyncio.sleep(0)
    await asyncio.sleep(0)
    task.cancel()
    done, _ = await asyncio.wait({task}, timeout=0.1)
    assert not done
    task.cancel()
    await asyncio.wait({task})


@pytest.mark.parametrize("steps", range(5))
async def test_the_end_comes_whenever_it_is_told(steps: int) -> None:
    came = asyncio.Event()
    task = asyncio.create_task(forgetful(came))
    await asyncio.sleep(0.01)
    came.set()
    for _ in range(steps):
        await asyncio.sleep(0)
    with within(2):
        await end({task}, 10)
    assert task.cancelled()


async def test_what_does_not_end_is_left() -> None:
    async def deaf() -> None:
        while not over.is_set():
            try:
                await over.wait()
            except asyncio.CancelledError:
                continue

    over = asyncio.Event()
    task = asyncio.create_task(deaf())
    await asyncio.sleep(0)
    with within(2):
        await end({task}, 0.3)
    assert not task.done()
    over.set()
    await task
    await end([], 1)
