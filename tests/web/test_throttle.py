"""A flood is slowed down: how many answers, to whom, and when, with the time handed in."""

import asyncio

import pytest

from tests.web.timers import Loop
from web.serving.throttle import (
    AT_ONCE_PER_S,
    GIVEN_MAX,
    GIVEN_MIN,
    HELD_S,
    TURN_S,
    Bucket,
    Throttle,
)


class Caller:
    """Asks again as soon as it is answered."""

    def __init__(self, throttle: Throttle, loop: Loop) -> None:
        self.answers = 0
        self.waited_s = 0.0
        self._throttle, self._loop = throttle, loop
        self._asked_at = loop.now

    def ask(self) -> None:
        """Once; the loop of a real one would not come back before all others had their turn."""
        self._asked_at = self._loop.now
        if self._throttle.is_next(self):
            self.answers += 1

    def on_turn(self) -> None:
        self.answers += 1
        self.waited_s = max(self.waited_s, self._loop.now - self._asked_at)
        self.ask()


@pytest.fixture
def loop(monkeypatch: pytest.MonkeyPatch) -> Loop:
    loop = Loop()
    monkeypatch.setattr(asyncio, "get_running_loop", lambda: loop)
    return loop


@pytest.fixture
def throttle(loop: Loop) -> Throttle:
    return Throttle(lambda: loop.now)


def use_up(throttle: Throttle, loop: Loop) -> None:
    """What may be answered at once."""
    while throttle.is_next(last := Caller(throttle, loop)):
        pass
    throttle.forget(last)


def flood(throttle: Throttle, loop: Loop, callers: int) -> list[Caller]:
    """It has gone on for a while."""
    use_up(throttle, loop)
    found = [Caller(throttle, loop) for _ in range(callers)]
    for caller in found:
        caller.ask()
    loop.run(2)
    for caller in found:
        caller.answers, caller.waited_s = 0, 0
    return found


def test_a_bucket_lets_so_many_through_in_a_second(loop: Loop) -> None:
    bucket = Bucket(10, lambda: loop.now)
    assert [bucket.take() for _ in range(12)].count(True) == 10
    loop.now += 0.35
    assert [bucket.take() for _ in range(12)].count(True) == 3
    loop.now += 60
    assert [bucket.take() for _ in range(12)].count(True) == 10


def test_so_many_are_answered_at_once(throttle: Throttle, loop: Loop) -> None:
    callers = [Caller(throttle, loop) for _ in range(AT_ONCE_PER_S + 3)]
    for caller in callers:
        caller.ask()
    assert [caller.answers for caller in callers] == [1] * AT_ONCE_PER_S + [0] * 3


def test_who_waits_is_answered_in_order_then_nobody_is_timed(
    throttle: Throttle, loop: Loop
) -> None:
    use_up(throttle, loop)
    order: list[int] = []

    class Number:
        def __init__(self, number: int) -> None:
            self.number = number

        def on_turn(self) -> None:
            order.append(self.number)

    for number in range(3 * GIVEN_MIN):
        assert not throttle.is_next(Number(number))
    loop.run(TURN_S)
    assert order == list(range(GIVEN_MIN))
    loop.run(1)
    assert order == list(range(3 * GIVEN_MIN))
    assert loop.is_quiet


@pytest.mark.parametrize(
    ("callers", "per_s", "wait_s"),
    [
        (64, GIVEN_MIN / TURN_S, 64 * TURN_S / GIVEN_MIN),
        (600, 600 / HELD_S, HELD_S),
        (5000, GIVEN_MAX / TURN_S, 5000 * TURN_S / GIVEN_MAX),
    ],
)
def test_a_closed_loop_gets_its_rate(
    throttle: Throttle, loop: Loop, callers: int, per_s: float, wait_s: float
) -> None:
    found = flood(throttle, loop, callers)
    loop.run(10)
    answers = [caller.answers for caller in found]
    assert sum(answers) == pytest.approx(10 * per_s, rel=0.15)
    assert max(answers) - min(answers) <= 1
    assert max(caller.waited_s for caller in found) == pytest.approx(wait_s, rel=0.15)


def test_who_has_gone_takes_no_turn(throttle: Throttle, loop: Loop) -> None:
    use_up(throttle, loop)
    gone = [Caller(throttle, loop) for _ in range(1000)]
    for caller in gone:
        caller.ask()
        throttle.forget(caller)
    left = Caller(throttle, loop)
    throttle.is_next(left)
    loop.run(TURN_S)
    assert left.answers >= 1
    assert not any(caller.answers for caller in gone)
