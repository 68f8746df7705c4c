"""One run for all who ask at the same time."""

import asyncio

import pytest

from payments.shared import Shared

pytestmark = pytest.mark.anyio


class Work:
    def __init__(self) -> None:
        self.runs = 0
        self.go_on = asyncio.Event()

    async def __call__(self) -> int:
        self.runs += 1
        await self.go_on.wait()
        return self.runs


async def test_who_asks_meanwhile_gets_the_same_and_who_asks_later_a_new_one() -> None:
    work = Work()
    shared = Shared(work)
    asked = [asyncio.create_task(shared()) for _ in range(3)]
    await asyncio.sleep(0)
    work.go_on.set()
    assert await asyncio.gather(*asked) == [1, 1, 1]
    assert await shared() == 2


async def test_who_goes_away_takes_nobody_with_it() -> None:
    work = Work()
    shared = Shared(work)
    first, second = (asyncio.create_task(shared()) for _ in range(2))
    await asyncio.sleep(0)
    first.cancel()
    work.go_on.set()
    assert await second == 1


async def test_an_error_is_everyones_and_over() -> None:
    outcomes = iter([ValueError("once"), None])

    async def work() -> None:
        await asyncio.sleep(0)
        if error := next(outcomes):
            raise error

    shared = Shared(work)
    asked = await asyncio.gather(shared(), shared(), return_exceptions=True)
    assert [str(error) for error in asked] == ["once", "once"]
    await shared()
