"""The circuit breaker, with the time handed in: examples, and any sequence of what can happen."""

import uuid
from collections.abc import Callable

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import Bundle, RuleBasedStateMachine, consumes, invariant, rule

from payments.callbacks.breaker import PROBES_MAX, Breaker, Permit

T0 = 1000.0
ORDERS_MIN, OPEN_MIN_S, OPEN_MAX_S = 3, 0.1, 10.0
ORDERS = [uuid.uuid4() for _ in range(4)]


def begun(breaker: Breaker, now: float) -> Permit:
    permit = breaker.begin(now)
    assert permit is not None
    return permit


def opened(late: int = 0) -> tuple[Breaker, list[Permit]]:
    """Opened at T0 by failures; and so many exchanges that are still under way from before."""
    breaker = Breaker()
    permits = [begun(breaker, T0) for _ in range(late)]
    for order_id in ORDERS[:ORDERS_MIN]:
        breaker.failed(begun(breaker, T0), order_id, T0)
    return breaker, permits


def seen(breaker: Breaker, now: float) -> tuple[str, int, float]:
    return breaker.state(now), breaker.allowance(now, 64), round(breaker.admits_in(now), 6)


def test_closed_it_admits_all_that_is_wanted() -> None:
    breaker = Breaker()
    assert seen(breaker, T0) == ("closed", 64, 0)
    assert not any(begun(breaker, T0).probe for _ in range(64))
    assert seen(breaker, T0) == ("closed", 64, 0)


@pytest.mark.parametrize("apart_s", [0.0, 60.0, 86_400.0])
def test_it_opens_when_three_orders_failed_however_long_that_takes(apart_s: float) -> None:
    breaker = Breaker()
    for number, order_id in enumerate(ORDERS[:ORDERS_MIN]):
        assert breaker.state(T0 + number * apart_s) == "closed"
        breaker.failed(begun(breaker, T0), order_id, T0 + number * apart_s)
    now = T0 + (ORDERS_MIN - 1) * apart_s
    assert seen(breaker, now) == ("open", 0, OPEN_MIN_S)
    assert breaker.begin(now) is None
    assert breaker.since == T0


def test_one_order_that_fails_for_ever_is_no_outage() -> None:
    breaker = Breaker()
    for _ in range(100):
        breaker.failed(begun(breaker, T0), ORDERS[0], T0)
        breaker.failed(begun(breaker, T0), ORDERS[1], T0)
    assert breaker.state(T0) == "closed"


def test_a_success_starts_the_count_anew_and_a_refusal_does_not() -> None:
    breaker = Breaker()
    for again in range(2):
        for order_id in ORDERS[: ORDERS_MIN - 1]:
            breaker.failed(begun(breaker, T0), order_id, T0 + again)
        assert not breaker.succeeded(begun(breaker, T0))
    for order_id in ORDERS[: ORDERS_MIN - 1]:
        breaker.failed(begun(breaker, T0), order_id, T0 + 2)
        assert not breaker.answered(begun(breaker, T0))
    assert breaker.state(T0) == "closed"
    breaker.failed(begun(breaker, T0), ORDERS[-1], T0 + 3)
    assert breaker.state(T0 + 3) == "open"
    assert breaker.since == T0 + 2, "the outage begins with the first failure after a success"


def test_open_it_admits_a_few_probes_ever_more_rarely() -> None:
    breaker, _ = opened()
    now, pauses = T0, [breaker.admits_in(T0)]
    for _ in range(10):
        assert seen(breaker, now + 0.9 * pauses[-1])[:2] == ("open", 0)
        assert breaker.begin(now + 0.9 * pauses[-1]) is None
        now += pauses[-1]
        assert seen(breaker, now) == ("half_open", PROBES_MAX, 0)
        assert breaker.allowance(now, 2) == 2
        assert begun(breaker, now).probe
        assert breaker.begin(now) is None, "however long these take, and whatever becomes of them"
        pauses.append(breaker.admits_in(now))
    assert pauses == pytest.approx([0.1, 0.2, 0.4, 0.8, 1.6, 3.2, 6.4, 10, 10, 10, 10])


@pytest.mark.parametrize("answer", ["succeeded", "answered"])
def test_a_probe_that_is_answered_closes_it(answer: str) -> None:
    breaker, _ = opened()
    permit = begun(breaker, T0 + 1)
    assert getattr(breaker, answer)(permit)
    assert seen(breaker, T0 + 1) == ("closed", 64, 0)
    assert breaker.since == T0
    # Of probes that began together, the first one did.
    assert not getattr(breaker, answer)(permit)
    # The next outage counts from the beginning, and opens it for as short a time again.
    for order_id in ORDERS[:ORDERS_MIN]:
        assert breaker.state(T0 + 2) == "closed"
        breaker.failed(begun(breaker, T0 + 2), order_id, T0 + 2)
    assert seen(breaker, T0 + 2) == ("open", 0, OPEN_MIN_S)


def test_a_probe_that_fails_changes_nothing() -> None:
    breaker, _ = opened()
    permit = begun(breaker, T0 + 1)
    before = seen(breaker, T0 + 5)
    for order_id in ORDERS:
        breaker.failed(permit, order_id, T0 + 5)
    assert seen(breaker, T0 + 5) == before


LATE: dict[str, Callable[[Breaker, Permit], object]] = {
    "succeeded": lambda breaker, permit: breaker.succeeded(permit),
    "answered": lambda breaker, permit: breaker.answered(permit),
    "failed": lambda breaker, permit: breaker.failed(permit, uuid.uuid4(), T0 + 0.5),
}


@pytest.mark.parametrize("end", LATE)
def test_what_was_under_way_when_it_opened_or_closed_changes_nothing(end: str) -> None:
    breaker, late = opened(late=59)
    before = seen(breaker, T0 + 0.05)
    for permit in late[:20]:
        assert not LATE[end](breaker, permit)
    assert seen(breaker, T0 + 0.05) == before
    probe = begun(breaker, T0 + 1)
    for permit in late[20:40]:
        assert not LATE[end](breaker, permit)
    assert breaker.succeeded(probe)
    for permit in (*late[40:], *[probe] * 5):
        assert not LATE[end](breaker, permit)
    assert seen(breaker, T0 + 1) == ("closed", 64, 0)


class Breaking(RuleBasedStateMachine):
    """Any sequence of beginnings, ends and pauses, beside the rule in its own words."""

    under_way: Bundle[Permit | None] = Bundle("under_way")

    def __init__(self) -> None:
        super().__init__()
        self.breaker = Breaker(ORDERS_MIN, OPEN_MIN_S, OPEN_MAX_S)
        self.now = T0
        self.epoch = 0  # of openings and closings
        self.failed: list[tuple[uuid.UUID, float]] = []  # since the last success
        self.is_open = False
        self.began: list[float] = []  # probes, since it opened

    @rule(seconds=st.floats(0, 30))
    def pass_time(self, seconds: float) -> None:
        self.now += seconds

    @rule(target=under_way)
    def begin(self) -> Permit | None:
        permit = self.breaker.begin(self.now)
        if permit is None:
            assert self.is_open
            return None
        assert permit.probe == self.is_open
        if self.is_open:
            if self.began:
                assert self.now - self.began[-1] >= min(
                    OPEN_MIN_S * 2 ** len(self.began), OPEN_MAX_S
                ) * (1 - 1e-9)
            self.began.append(self.now)
        return permit

    @rule(permit=consumes(under_way), order_id=st.sampled_from(ORDERS))
    def fail(self, permit: Permit | None, order_id: uuid.UUID) -> None:
        if permit is None:
            return
        self.breaker.failed(permit, order_id, self.now)
        if permit.period == self.epoch and not self.is_open:
            self.failed.append((order_id, self.now))
            if len({order_id for order_id, _ in self.failed}) == ORDERS_MIN:
                self.is_open, self.epoch, self.began = True, self.epoch + 1, []
                assert self.breaker.since == self.failed[0][1]

    @rule(permit=consumes(under_way), taken=st.booleans())
    def answer(self, permit: Permit | None, taken: bool) -> None:
        if permit is None:
            return
        end = self.breaker.succeeded if taken else self.breaker.answered
        is_current = permit.period == self.epoch
        assert end(permit) is (is_current and self.is_open)
        if is_current and self.is_open:
            self.is_open, self.epoch, self.failed = False, self.epoch + 1, []
        elif is_current and taken:
            self.failed = []

    @invariant()
    def it_is_open_if_and_only_if_the_rule_says_so(self) -> None:
        assert (self.breaker.state(self.now) != "closed") is self.is_open
        assert self.breaker.allowance(self.now, 64) <= (PROBES_MAX if self.is_open else 64)
        assert 0 <= self.breaker.admits_in(self.now) <= (OPEN_MAX_S if self.is_open else 0)


TestBreaking = Breaking.TestCase
TestBreaking.settings = settings(max_examples=150, stateful_step_count=60)
