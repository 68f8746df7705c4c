"""Background tasks end when they are told to."""

import asyncio
import sys

import pytest

from payments.tasks import end, finish
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


async def test_what_ends_in_time_is_not_cut_off() -> None:
    may_end = asyncio.Event()
    tasks = {asyncio.create_task(may_end.wait()) for _ in range(2)}
    asyncio.get_running_loop().call_later(0.05, may_end.set)
    with within(2):
        assert await finish(tasks, 10) == 0
    assert all(task.result() for task in tasks)


async def test_what_is_late_is_ended_and_counted() -> None:
    quick = asyncio.create_task(asyncio.sleep(0))
    late = {asyncio.create_task(asyncio.Event().wait()) for _ in range(2)}
    with within(2):
        assert await finish({quick, *late}, 0.05) == 2
    assert [task.cancelled() for task in late] == [True, True]
    assert not quick.cancelled()


async def test_without_time_to_finish_it_is_ended_at_once() -> None:
    begun = asyncio.Event()

    async def begin() -> None:
        begun.set()

    task = asyncio.create_task(begin())
    assert await finish({task}, 0) == 1
    assert task.cancelled()
    assert not begun.is_set()


async def test_what_began_meanwhile_is_ended_too() -> None:
    """The set is one to which tasks are added: who stops begins nothing, but may be asked to."""
    tasks: set[asyncio.Task[None]] = set()

    async def begin_another() -> None:
        tasks.add(asyncio.create_task(asyncio.sleep(60)))

    tasks.add(asyncio.create_task(begin_another()))
    with within(2):
        assert await finish(tasks, 1) == 1
    assert all(task.done() for task in tasks)


async def test_nothing_is_finished_at_once() -> None:
    with within(1):
        assert await finish(set(), 10) == 0
