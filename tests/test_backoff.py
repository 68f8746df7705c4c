"""Pauses that double."""

import pytest

from payments.backoff import Backoff


@pytest.mark.parametrize(
    ("least_s", "most_s", "pauses"),
    [
        (0.25, 2.0, [0.25, 0.5, 1.0, 2.0, 2.0]),
        (0.5, 1.25, [0.5, 1.0, 1.25, 1.25]),
        (1.0, 1.0, [1.0, 1.0]),
    ],
)
def test_each_pause_is_twice_the_one_before_up_to_the_longest(
    least_s: float, most_s: float, pauses: list[float]
) -> None:
    backoff = Backoff(least_s, most_s)
    assert [backoff.next_s() for _ in pauses] == pauses


def test_after_a_success_they_begin_again() -> None:
    backoff = Backoff(0.25, 2.0)
    backoff.reset()
    assert [backoff.next_s() for _ in range(3)] == [0.25, 0.5, 1.0]
    backoff.reset()
    assert [backoff.next_s() for _ in range(2)] == [0.25, 0.5]


def test_a_thousand_failures_are_no_overflow() -> None:
    backoff = Backoff(0.25, 2.0)
    assert [backoff.next_s() for _ in range(2000)][-1] == 2.0
