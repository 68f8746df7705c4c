"""The circuit breaker, with the time handed in: examples, and any sequence of what can happen."""

from collections.abc import Callable
from itertools import pairwise

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import (
    Bundle,
    RuleBasedStateMachine,
    consumes,
    invariant,
    multiple,
    precondition,
    rule,
)

from payments.callbacks.breaker import Breaker, Permit

T0 = 1000.0
FAILURES_MAX, OPEN_MIN_S, OPEN_MAX_S = 5, 1.0, 10.0


def begun(breaker: Breaker, now: float) -> Permit:
    permit = breaker.begin(now)
    assert permit is not None
    return permit


def opened(late: int = 0) -> tuple[Breaker, list[Permit]]:
    """Opened at T0 by failures; and so many exchanges that are still under way from before."""
    breaker = Breaker()
    permits = [begun(breaker, T0) for _ in range(FAILURES_MAX + late)]
    for permit in permits[:FAILURES_MAX]:
        breaker.failed(permit, T0)
    return breaker, permits[FAILURES_MAX:]


def seen(breaker: Breaker, now: float) -> tuple[str, int, float | None]:
    return breaker.state(now), breaker.allowance(now, 64), breaker.admits_in(now)


def test_closed_it_admits_all_that_is_wanted() -> None:
    breaker = Breaker()
    assert seen(breaker, T0) == ("closed", 64, 0)
    permits = [begun(breaker, T0) for _ in range(64)]
    assert not any(permit.probe for permit in permits)
    assert seen(breaker, T0) == ("closed", 64, 0)


def test_it_opens_after_five_failures_in_a_row() -> None:
    breaker = Breaker()
    for _ in range(FAILURES_MAX - 1):
        breaker.failed(begun(breaker, T0), T0)
    assert breaker.state(T0) == "closed"
    breaker.failed(begun(breaker, T0), T0)
    assert seen(breaker, T0) == ("open", 0, 1)
    assert breaker.begin(T0) is None


def test_an_answer_starts_the_count_anew() -> None:
    breaker = Breaker()
    for _ in range(3):
        for _ in range(FAILURES_MAX - 1):
            breaker.failed(begun(breaker, T0), T0)
        assert not breaker.succeeded(begun(breaker, T0))
    assert breaker.state(T0) == "closed"


def test_a_cancellation_is_neither_failure_nor_success() -> None:
    breaker = Breaker()
    for _ in range(2 * FAILURES_MAX):
        breaker.released(begun(breaker, T0))
    assert breaker.state(T0) == "closed"
    for _ in range(FAILURES_MAX):
        breaker.released(begun(breaker, T0))
        breaker.failed(begun(breaker, T0), T0)
    assert breaker.state(T0) == "open"


def test_half_open_it_admits_one_probe_at_a_time() -> None:
    breaker, _ = opened()
    assert seen(breaker, T0 + 0.75) == ("open", 0, 0.25)
    assert breaker.begin(T0 + 0.75) is None
    assert seen(breaker, T0 + 1) == ("half_open", 1, 0)
    assert breaker.allowance(T0 + 1, 0) == 0
    assert begun(breaker, T0 + 1).probe
    assert seen(breaker, T0 + 1) == ("half_open", 0, None)
    # However long it takes.
    assert breaker.begin(T0 + 1) is None
    assert breaker.begin(T0 + 999) is None


def test_a_probe_that_succeeds_closes_it() -> None:
    breaker, _ = opened()
    assert breaker.succeeded(begun(breaker, T0 + 1))
    assert seen(breaker, T0 + 1) == ("closed", 64, 0)
    # The next one counts from the beginning, and opens it for a second again.
    for _ in range(FAILURES_MAX):
        assert breaker.state(T0 + 2) == "closed"
        breaker.failed(begun(breaker, T0 + 2), T0 + 2)
    assert seen(breaker, T0 + 2) == ("open", 0, 1)


def test_each_probe_that_fails_doubles_the_time_up_to_ten_seconds() -> None:
    breaker, _ = opened()
    now, times = T0, [OPEN_MIN_S]
    for _ in range(7):
        now += times[-1]
        breaker.failed(begun(breaker, now), now)
        until_probe_s = breaker.admits_in(now)
        assert until_probe_s is not None
        times.append(until_probe_s)
    assert times == [1, 2, 4, 8, 10, 10, 10, 10]
    # Closed, all that is forgotten.
    assert breaker.succeeded(begun(breaker, now + OPEN_MAX_S))
    for _ in range(FAILURES_MAX):
        breaker.failed(begun(breaker, now + OPEN_MAX_S), now + 30)
    assert breaker.admits_in(now + 30) == OPEN_MIN_S


def test_the_time_counts_from_when_the_probe_failed() -> None:
    breaker, _ = opened()
    probe = begun(breaker, T0 + 1)
    breaker.failed(probe, T0 + 6)
    assert seen(breaker, T0 + 6) == ("open", 0, 2)


def test_a_cancelled_probe_gives_its_place_back_and_changes_nothing() -> None:
    breaker, _ = opened()
    for _ in range(10):
        breaker.released(begun(breaker, T0 + 1))
        assert seen(breaker, T0 + 1) == ("half_open", 1, 0)
    breaker.failed(begun(breaker, T0 + 1), T0 + 1)
    assert breaker.admits_in(T0 + 1) == 2


@pytest.mark.parametrize("end", ["succeeded", "failed", "released"])
def test_a_release_after_a_result_does_nothing(end: str) -> None:
    """So that a sender can always release at the end."""
    breaker, _ = opened()
    probe = begun(breaker, T0 + 1)
    if end == "succeeded":
        assert breaker.succeeded(probe)
    elif end == "failed":
        breaker.failed(probe, T0 + 1)
    else:
        breaker.released(probe)
    now = T0 + 3
    if end != "succeeded":
        assert begun(breaker, now).probe
    before = seen(breaker, now)
    breaker.released(probe)
    assert seen(breaker, now) == before


LATE: dict[str, Callable[[Breaker, Permit], object]] = {
    "succeeded": lambda breaker, permit: breaker.succeeded(permit),
    "failed": lambda breaker, permit: breaker.failed(permit, T0 + 0.5),
    "released": lambda breaker, permit: breaker.released(permit),
}


@pytest.mark.parametrize("end", LATE)
@pytest.mark.parametrize("now", [T0 + 0.5, T0 + 1])
def test_what_was_under_way_when_it_opened_changes_nothing(end: str, now: float) -> None:
    breaker, late = opened(late=59)
    before = seen(breaker, now)
    for permit in late[:20]:
        assert not LATE[end](breaker, permit)
    assert seen(breaker, now) == before
    # Nor does it beside a probe.
    probe = begun(breaker, T0 + 1)
    for permit in late[20:40]:
        assert not LATE[end](breaker, permit)
    assert seen(breaker, T0 + 1) == ("half_open", 0, None)
    # Nor after it.
    assert breaker.succeeded(probe)
    for permit in late[40:]:
        assert not LATE[end](breaker, permit)
    assert seen(breaker, T0 + 1) == ("closed", 64, 0)


def test_a_late_success_does_not_hide_failures_of_now() -> None:
    breaker, late = opened(late=1)
    assert breaker.succeeded(begun(breaker, T0 + 1))
    for _ in range(FAILURES_MAX - 1):
        breaker.failed(begun(breaker, T0 + 1), T0 + 1)
    assert not breaker.succeeded(late[0])
    breaker.failed(begun(breaker, T0 + 1), T0 + 1)
    assert breaker.state(T0 + 1) == "open"


def test_its_bounds_can_be_others() -> None:
    breaker = Breaker(failures_max=1, open_min_s=3.0, open_max_s=4.0)
    breaker.failed(begun(breaker, T0), T0)
    assert breaker.admits_in(T0) == 3
    breaker.failed(begun(breaker, T0 + 3), T0 + 3)
    assert breaker.admits_in(T0 + 3) == 4


class Exchanges(RuleBasedStateMachine):
    """Exchanges begin, end in any order and way, and time goes by.

    What must hold is told from what an observer sees: which exchanges were admitted, when, and what
    became of them. Seconds are multiples of 1/4, so sums of them are exact.
    """

    under_way = Bundle("under_way")
    ended = Bundle("ended")

    def __init__(self) -> None:
        super().__init__()
        self.breaker = Breaker(FAILURES_MAX, OPEN_MIN_S, OPEN_MAX_S)
        self.now = T0
        self.outages = 0  # how often it opened out of closed, or a probe failed
        self.began_in: dict[Permit, int] = {}
        self.probes: set[Permit] = set()  # under way
        self.row = 0  # failures in a row, since it closed
        self.open_for: list[float] = []  # since it was closed last
        self.opened_at = 0.0

    @property
    def expected(self) -> str:
        if not self.open_for:
            return "closed"
        return "open" if self.now < self.opened_at + self.open_for[-1] else "half_open"

    def opens(self) -> None:
        """For a second, then twice as long each time, never above half a minute."""
        self.outages += 1
        self.opened_at = self.now
        until_probe_s = self.breaker.admits_in(self.now)
        assert until_probe_s is not None
        self.open_for.append(until_probe_s)
        assert self.open_for[0] == OPEN_MIN_S
        for shorter, longer in pairwise(self.open_for):
            assert longer == min(2 * shorter, OPEN_MAX_S)

    def begin(self, wanted: int) -> list[Permit]:
        """As many as there are, whatever the allowance says: that may be a while ago."""
        allowed = self.breaker.allowance(self.now, wanted)
        asked = [self.breaker.begin(self.now) for _ in range(wanted)]
        permits = [permit for permit in asked if permit is not None]
        half_open = self.expected == "half_open"
        room = {"closed": wanted, "open": 0, "half_open": int(not self.probes)}[self.expected]
        assert len(permits) == allowed == room
        for permit in permits:
            assert permit.probe is half_open
            self.began_in[permit] = self.outages
            if permit.probe:
                self.probes.add(permit)
        return permits

    def succeed(self, permit: Permit) -> None:
        closed = self.breaker.succeeded(permit)
        assert closed is permit.probe
        if closed:
            self.probes.remove(permit)
            self.row, self.open_for = 0, []
        elif self.began_in[permit] == self.outages:
            self.row = 0

    def fail(self, permit: Permit) -> None:
        self.breaker.failed(permit, self.now)
        if permit.probe:
            self.probes.remove(permit)
            self.opens()
        elif self.began_in[permit] == self.outages:
            self.row += 1
            if self.row == FAILURES_MAX:
                self.opens()

    @rule(quarters=st.integers(1, 160) | st.integers(1, 4))
    def time_goes_by(self, quarters: int) -> None:
        self.now += quarters / 4

    @precondition(lambda self: self.expected == "open")
    @rule()
    def it_becomes_half_open(self) -> None:
        until_probe_s = self.breaker.admits_in(self.now)
        assert until_probe_s is not None
        assert self.breaker.allowance(self.now + until_probe_s - 0.25, 1) == 0
        self.now += until_probe_s
        assert self.breaker.allowance(self.now, 1) == 1

    @rule(target=under_way, wanted=st.integers(1, 8))
    def exchanges_begin(self, wanted: int) -> object:
        return multiple(*self.begin(wanted))

    @rule(target=ended, permit=consumes(under_way))
    def one_succeeds(self, permit: Permit) -> Permit:
        self.succeed(permit)
        return permit

    @rule(target=ended, permits=st.lists(consumes(under_way), max_size=FAILURES_MAX + 1))
    def some_fail(self, permits: list[Permit]) -> object:
        for permit in permits:
            self.fail(permit)
        return multiple(*permits)

    @rule(target=ended, permit=consumes(under_way))
    def one_is_cancelled(self, permit: Permit) -> Permit:
        self.breaker.released(permit)
        self.probes.discard(permit)
        return permit

    @rule(results=st.lists(st.sampled_from([fail, fail, succeed]), max_size=12))
    def one_after_the_other(self, results: list[Callable[["Exchanges", Permit], None]]) -> None:
        for result in results:
            for permit in self.begin(1):
                result(self, permit)

    @precondition(lambda self: self.expected == "closed")
    @rule(target=under_way, more=st.integers(1, 3))
    def it_opens_while_more_are_under_way(self, more: int) -> object:
        permits = self.begin(FAILURES_MAX + more)
        for permit in permits[:FAILURES_MAX]:
            self.fail(permit)
        self.now += 0.25
        return multiple(*permits[FAILURES_MAX:])

    @rule(probes=st.integers(1, 8))
    def the_endpoint_stays_down(self, probes: int) -> None:
        for _ in range(probes):
            self.now += OPEN_MAX_S
            for permit in self.begin(1):
                self.fail(permit)

    @rule(permit=ended)
    def what_has_ended_is_released_once_more(self, permit: Permit) -> None:
        self.breaker.released(permit)

    @invariant()
    def at_most_one_probe_is_under_way(self) -> None:
        assert len(self.probes) <= 1

    @invariant()
    def its_state_follows_from_what_happened(self) -> None:
        assert self.breaker.state(self.now) == self.expected
        if self.expected == "closed":
            assert self.row < FAILURES_MAX

    @invariant()
    def it_says_when_the_next_may_begin(self) -> None:
        until_s = self.breaker.admits_in(self.now)
        if self.probes:
            assert until_s is None
        elif self.expected == "open":
            assert until_s == self.opened_at + self.open_for[-1] - self.now
        else:
            assert until_s == 0

    def teardown(self) -> None:
        """However it ended up: once nobody holds a probe, the next one that succeeds closes it."""
        for permit in self.probes:
            self.breaker.released(permit)
        until_probe_s = self.breaker.admits_in(self.now)
        assert until_probe_s is not None
        assert until_probe_s <= OPEN_MAX_S
        permit = begun(self.breaker, self.now + until_probe_s)
        assert self.breaker.succeeded(permit) is (self.expected != "closed")
        assert self.breaker.state(self.now + until_probe_s) == "closed"


TestExchanges = Exchanges.TestCase
TestExchanges.settings = settings(max_examples=100, stateful_step_count=50, deadline=None)
