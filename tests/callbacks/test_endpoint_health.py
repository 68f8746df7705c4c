"""What attempts tell of the endpoint as a whole; time is handed in."""

import uuid
from collections.abc import Iterator
from datetime import UTC, datetime

import pytest
from loguru import logger

from payments.callbacks.breaker import ORDERS_MIN, Breaker, Permit
from payments.callbacks.endpoint_health import (
    BEGAN_BEFORE_S,
    REFUSED_MAX,
    TOLD_AFTER_S,
    EndpointHealth,
)
from payments.callbacks.retry import Verdict, judge
from tests.callbacks.conftest import answered, failed

NOW = datetime(2026, 1, 31, 18, 30, tzinfo=UTC)
DELIVERED = judge(answered(200), 1, 0.0, 25.0, NOW)
REFUSED = judge(answered(404), 1, 0.0, 25.0, NOW)
DOWN = judge(failed("unreachable"), 1, 0.0, 25.0, NOW)


class Endpoint:
    """Attempts, each for an order of its own, at a time of its own."""

    def __init__(self) -> None:
        self.health = EndpointHealth(Breaker())

    def permit(self, now: float) -> Permit:
        permit = self.health.breaker.begin(now)
        assert permit is not None
        return permit

    def note(self, verdict: Verdict, now: float, *, attempt: int = 1) -> None:
        permit = self.permit(now)
        self.health.note(verdict, permit, uuid.uuid4(), attempt, "why", now)

    def go_away(self, now: float) -> None:
        permit = self.permit(now)
        for _ in range(ORDERS_MIN):
            self.health.note(DOWN, permit, uuid.uuid4(), 1, "why", now)


@pytest.fixture
def endpoint() -> Endpoint:
    return Endpoint()


@pytest.fixture
def told() -> Iterator[list[str]]:
    lines: list[str] = []
    sink = logger.add(lambda message: lines.append(message.record["message"]))
    yield lines
    logger.remove(sink)


def test_an_outage_is_over_with_a_delivery_after_it(endpoint: Endpoint) -> None:
    endpoint.note(DELIVERED, 0.0)
    endpoint.go_away(100.0)
    assert endpoint.health.over_since is None
    assert not endpoint.health.is_over(150.0)
    endpoint.note(DELIVERED, 200.0)
    assert endpoint.health.over_since == 100.0
    assert endpoint.health.is_over(200.0)


def test_an_answer_that_merely_shows_it_alive_makes_nothing_due(endpoint: Endpoint) -> None:
    endpoint.note(DELIVERED, 0.0)
    endpoint.go_away(100.0)
    endpoint.note(REFUSED, 200.0)
    assert endpoint.health.breaker.state(200.0) == "closed"
    assert endpoint.health.over_since is None
    assert not endpoint.health.is_over(200.0)
    endpoint.note(DELIVERED, 300.0)
    assert endpoint.health.over_since == 100.0


def test_who_delivered_nothing_before_does_not_know_when_it_began(endpoint: Endpoint) -> None:
    endpoint.go_away(100.0)
    endpoint.note(DELIVERED, 200.0)
    assert endpoint.health.over_since == 100.0 - BEGAN_BEFORE_S


def test_what_was_sent_before_it_and_is_delivered_in_it_does_not_tell_when_it_began(
    endpoint: Endpoint,
) -> None:
    permit = endpoint.permit(0.0)
    endpoint.go_away(100.0)
    endpoint.health.note(DELIVERED, permit, uuid.uuid4(), 1, "why", 150.0)
    assert endpoint.health.over_since is None
    assert not endpoint.health.is_over(150.0)
    endpoint.note(DELIVERED, 200.0)
    assert endpoint.health.over_since == 100.0 - BEGAN_BEFORE_S
    endpoint.go_away(300.0)
    endpoint.note(DELIVERED, 400.0)
    assert endpoint.health.over_since == 100.0 - BEGAN_BEFORE_S, "the first was not dealt with"


def test_an_order_that_failed_before_tells_nothing_new(endpoint: Endpoint) -> None:
    for _ in range(2 * ORDERS_MIN):
        endpoint.note(DOWN, 0.0, attempt=2)
    assert endpoint.health.breaker.state(0.0) == "closed"


def test_an_outage_that_lasts_is_told_once_and_its_end(endpoint: Endpoint, told: list[str]) -> None:
    endpoint.go_away(0.0)
    endpoint.health.tell_of_an_outage(TOLD_AFTER_S - 0.1)
    assert told == []
    for late in (0.0, 1.0):
        endpoint.health.tell_of_an_outage(TOLD_AFTER_S + late)
    endpoint.note(DELIVERED, 100.0)
    assert told == [
        "Order Service is unavailable: callbacks wait",
        "Order Service is available again",
    ]


def test_refusals_in_a_row_are_told_once_they_last(endpoint: Endpoint, told: list[str]) -> None:
    for _ in range(2 * REFUSED_MAX):
        endpoint.note(REFUSED, 0.0)
    assert told == []
    endpoint.note(REFUSED, REFUSED_MAX * TOLD_AFTER_S)
    endpoint.note(REFUSED, REFUSED_MAX * TOLD_AFTER_S)
    endpoint.note(DELIVERED, REFUSED_MAX * TOLD_AFTER_S)
    assert told == [
        "Order Service rejects callbacks",
        "Order Service accepts callbacks again",
    ]


def test_a_few_refusals_tell_nothing_however_far_apart(endpoint: Endpoint, told: list[str]) -> None:
    for number in range(REFUSED_MAX - 1):
        endpoint.note(REFUSED, number * TOLD_AFTER_S)
    assert told == []
