"""Who is taken on: the bounds of one process, with the time handed in."""

import pytest

from payments.admission import CALM_S, REQUESTS_MAX, Admission
from payments.errors import TooBusy


class Clock:
    now = 1000.0

    def __call__(self) -> float:
        return self.now


@pytest.fixture
def clock() -> Clock:
    return Clock()


@pytest.fixture
def admission(clock: Clock) -> Admission:
    return Admission(places=40, slots=3, clock=clock)


def test_a_burst_may_take_all_places(admission: Admission) -> None:
    assert all(admission.admits_another(requests) for requests in range(40))
    assert not admission.admits_another(40)


def test_after_a_refusal_there_are_fewer_until_nobody_was_refused_for_a_while(
    admission: Admission, clock: Clock
) -> None:
    assert not admission.admits_another(40)
    for _ in range(5):  # each refusal counts from anew
        clock.now += CALM_S * 0.9
        assert admission.admits_another(9)
        assert not admission.admits_another(10)
    clock.now += CALM_S
    assert admission.admits_another(10)
    assert admission.admits_another(39)


def test_who_waits_for_somebody_else_holds_no_place(admission: Admission) -> None:
    admission.waiting = 100
    assert admission.admits_another(139)
    assert not admission.admits_another(140)


def test_not_even_those_that_wait_are_without_bound(admission: Admission) -> None:
    admission.waiting = REQUESTS_MAX
    assert admission.admits_another(REQUESTS_MAX - 1)
    assert not admission.admits_another(REQUESTS_MAX)


@pytest.mark.parametrize("places", [1, 2, 3])
def test_one_place_is_always_there(places: int, clock: Clock) -> None:
    admission = Admission(places, 1, clock)
    assert not admission.admits_another(places)
    assert admission.admits_another(0)


def test_slots(admission: Admission) -> None:
    for _ in range(3):
        admission.take_slot()
    with pytest.raises(TooBusy):
        admission.take_slot()
    admission.release_slot()
    admission.take_slot()
