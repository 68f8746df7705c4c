"""One run for all who ask at the same time, or shortly afterwards."""

import asyncio
from collections.abc import Iterator

import pytest

from payments.single_flight import Recent, SingleFlight

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
    shared = SingleFlight(work)
    asked = [asyncio.create_task(shared()) for _ in range(3)]
    await asyncio.sleep(0)
    work.go_on.set()
    assert await asyncio.gather(*asked) == [1, 1, 1]
    assert await shared() == 2


async def test_who_goes_away_takes_nobody_with_it() -> None:
    work = Work()
    shared = SingleFlight(work)
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

    shared = SingleFlight(work)
    asked = await asyncio.gather(shared(), shared(), return_exceptions=True)
    assert [str(error) for error in asked] == ["once", "once"]
    await shared()


async def test_a_result_is_kept_for_whoever_is_content_with_it() -> None:
    work = Work()
    work.go_on.set()
    recent = Recent(work)
    assert await recent.recent(10) == 1
    assert await recent.recent(10) == 1
    assert await recent.recent(0) == 2
    assert await recent() == 3
    assert await recent.recent(10) == 3


async def test_its_age_counts_from_when_it_began() -> None:
    """As of then it is true: what happened while it was made may not be in it."""
    work = Work()
    recent = Recent(work)
    first = asyncio.create_task(recent())
    await asyncio.sleep(0.1)
    work.go_on.set()
    assert await first == 1
    assert await recent.recent(0.05) == 2


async def test_the_last_result_is_there_at_once_and_is_renewed() -> None:
    work = Work()
    recent = Recent(work)
    assert recent.last(10) is None  # and it begins
    await asyncio.sleep(0)
    assert work.runs == 1
    work.go_on.set()
    assert await recent() == 1
    assert recent.last(10) == 1
    assert recent.last(0) == 1
    await asyncio.sleep(0.01)
    assert recent.last(10) == 2


async def test_a_run_that_fails_leaves_the_last_result() -> None:
    outcomes: Iterator[int | Exception] = iter([1, ValueError("once"), 2])

    async def work() -> int:
        outcome = next(outcomes)
        if isinstance(outcome, Exception):
            raise outcome
        return outcome

    recent = Recent(work)
    assert await recent() == 1
    with pytest.raises(ValueError, match="once"):
        await recent.recent(0)
    assert recent.last(10) == 1
    assert await recent() == 2
