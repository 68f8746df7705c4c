"""The circuit breaker of a provider, with the time handed in."""

import pytest

from payments.gateways.breaker import (
    CALLS_MAX,
    FAILURES_MIN,
    LATELY_S,
    PAUSE_MAX_S,
    PAUSE_MIN_S,
    UNASKED_S,
    ProviderBreaker,
    ProviderPermit,
)


def call(breaker: ProviderBreaker, now: float, *, failed: bool) -> bool:
    permit = breaker.begin(now)
    assert permit is not None
    return breaker.ended(permit, now, failed=failed)


def opened(now: float = 0.0) -> ProviderBreaker:
    breaker = ProviderBreaker()
    for number in range(FAILURES_MIN):
        assert call(breaker, now, failed=True) is (number == FAILURES_MIN - 1)
    return breaker


def test_it_opens_when_the_provider_is_down() -> None:
    breaker = opened()
    assert breaker.is_open
    assert breaker.begin(0.0) is None
    assert breaker.wait_s(0.0) == PAUSE_MIN_S


@pytest.mark.parametrize("failures", [FAILURES_MIN - 1, FAILURES_MIN])
def test_a_few_failures_among_many_successes_are_no_outage(failures: int) -> None:
    breaker = ProviderBreaker()
    for _ in range(CALLS_MAX - failures):
        call(breaker, 0.0, failed=False)
    assert not any(call(breaker, 0.0, failed=True) for _ in range(failures))
    assert not breaker.is_open


def test_half_of_the_calls_are_one() -> None:
    breaker = ProviderBreaker()
    for _ in range(FAILURES_MIN):
        assert not call(breaker, 0.0, failed=False)
    assert [call(breaker, 0.0, failed=True) for _ in range(FAILURES_MIN)][-1]


def test_what_failed_long_ago_does_not_count() -> None:
    breaker = ProviderBreaker()
    for _ in range(FAILURES_MIN - 1):
        call(breaker, 0.0, failed=True)
    assert not call(breaker, LATELY_S + 1, failed=True)


def test_one_probe_at_a_time() -> None:
    breaker = opened()
    probe = breaker.begin(PAUSE_MIN_S)
    assert probe is not None
    assert breaker.is_open
    assert breaker.begin(PAUSE_MIN_S + 100) is None
    assert breaker.wait_s(PAUSE_MIN_S + 100) == PAUSE_MIN_S
    breaker.ended(probe, PAUSE_MIN_S, failed=True)
    assert breaker.begin(PAUSE_MIN_S) is None


def test_pauses_double_up_to_the_longest() -> None:
    breaker, now, pauses = opened(), 0.0, []
    for _ in range(8):
        pauses.append(breaker.wait_s(now))
        now += pauses[-1]
        assert not call(breaker, now, failed=True)
    assert pauses == [min(PAUSE_MIN_S * 2**n, PAUSE_MAX_S) for n in range(8)]


def test_a_probe_that_succeeds_closes_it_and_forgets_what_failed() -> None:
    breaker = opened()
    assert call(breaker, PAUSE_MIN_S, failed=False)
    assert not breaker.is_open
    assert not call(breaker, PAUSE_MIN_S, failed=True)


def test_a_probe_that_nobody_waited_for_lets_the_next_one_begin() -> None:
    breaker = opened()
    probe = breaker.begin(PAUSE_MIN_S)
    assert probe is not None
    breaker.cancelled(probe)
    assert breaker.begin(PAUSE_MIN_S) == probe


def test_what_was_under_way_when_it_opened_does_not_count() -> None:
    breaker = ProviderBreaker()
    early = breaker.begin(0.0)
    assert early is not None
    for _ in range(FAILURES_MIN):
        call(breaker, 0.0, failed=True)
    assert not breaker.ended(early, 0.5, failed=False)
    assert breaker.is_open


def test_a_late_end_does_not_free_a_probe_of_another_period() -> None:
    breaker = opened()
    assert breaker.begin(PAUSE_MIN_S) is not None
    breaker.cancelled(ProviderPermit(period=0, probe=True))
    assert breaker.begin(PAUSE_MIN_S) is None


def test_what_nobody_asks_for_long_is_not_known_to_be_down() -> None:
    """A process without requests must not tell of an outage for hours. The next call is a probe."""
    breaker = opened()
    late = PAUSE_MIN_S + UNASKED_S
    assert breaker.is_known_down(0.0)
    assert breaker.is_known_down(late - 0.1)
    assert not breaker.is_known_down(late)
    probe = breaker.begin(late)
    assert probe is not None
    assert probe.probe
    assert breaker.is_known_down(late + 1)
    breaker.ended(probe, late + 1, failed=False)
    assert not breaker.is_known_down(late + 1)
