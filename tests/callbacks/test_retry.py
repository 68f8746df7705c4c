"""What becomes of a callback after each attempt, as tables; and how long it is tried."""

import random
import statistics
from datetime import UTC, datetime, timedelta, timezone

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from payments.callbacks.retry import (
    ATTEMPTS_MAX,
    RETRY_FOR_S,
    WAIT_MAX_S,
    Outcome,
    Verdict,
    jittered,
    judge,
    schedule,
)
from payments.order_service import TIMEOUT_S
from payments.order_service.endpoint import Exchange

NOW = datetime(1994, 11, 6, 8, 49, 37, tzinfo=UTC)  # RFC 9110's own example
NEITHER_2XX_NOR_410 = [*range(100, 200), *range(300, 410), *range(411, 600)]


def verdict(
    status: int | None = 500,
    error: str | None = None,
    *,
    sent: bool = True,
    retry_after: str | None = None,
    content_type: str | None = None,
    attempt: int = 1,
    due_for_s: float = 2.0 * RETRY_FOR_S,
    now: datetime = NOW,
) -> Verdict:
    exchange = Exchange(
        status=status,
        error=error,
        reason="",
        retry_after=retry_after,
        answer=b"",
        seconds=0.01,
        sent=sent,
        content_type=content_type,
    )
    return judge(exchange, attempt, due_for_s, TIMEOUT_S, now)


@pytest.mark.parametrize("status", [200, 201, 202, 204, 226, 299])
@pytest.mark.parametrize("attempt", [1, ATTEMPTS_MAX])
def test_any_2xx_is_delivered(status: int, attempt: int) -> None:
    assert verdict(status, attempt=attempt) == Verdict(
        outcome="delivered",
        final="delivered",
        delay_max_s=0,
        asked_s=0,
        busy_s=0,
        endpoint_down=False,
    )


@pytest.mark.parametrize("retry_after", [None, "5"])
def test_410_is_dead_at_once(retry_after: str | None) -> None:
    assert verdict(410, retry_after=retry_after) == Verdict(
        outcome="gone", final="dead", delay_max_s=0, asked_s=0, busy_s=0, endpoint_down=False
    )


def test_any_other_answer_is_tried_again_and_few_speak_against_the_endpoint() -> None:
    again = {status: verdict(status) for status in NEITHER_2XX_NOR_410}
    assert {each[:4] for each in again.values()} == {("http_error", None, 1, 0)}
    down = [status for status in again if again[status].endpoint_down]
    assert down == [429, 500, 502, 503, 504]


@pytest.mark.parametrize(
    ("content_type", "own"),
    [
        ("application/json", True),
        ("application/json; charset=utf-8", True),
        (" Application/Problem+JSON ", True),
        ("text/html", False),
        ("text/html; about=application/json", False),
        ("application/jsonp", False),
        ("", False),
        (None, False),
    ],
)
def test_what_order_service_itself_says_is_about_one_order(
    content_type: str | None, own: bool
) -> None:
    """A proxy's page is not. What is too busy or broken says so of all, as JSON too."""
    for status in (502, 503, 504):
        judged = verdict(status, content_type=content_type)
        assert judged.endpoint_down is not own
        assert judged.busy_s == (TIMEOUT_S if status == 504 else 0)
    for status in (429, 500):
        assert verdict(status, content_type=content_type).endpoint_down


@pytest.mark.parametrize(
    ("error", "sent", "outcome"),
    [
        ("timeout", True, "timeout"),
        ("timeout", False, "timeout"),  # connecting took that long
        ("unreachable", True, "end_unknown"),
        ("unreachable", False, "unreachable"),
        ("forbidden_address", False, "unreachable"),
        ("protocol", True, "end_unknown"),
    ],
)
def test_no_answer_is_tried_again_soon_only_if_nothing_was_sent(
    error: str, sent: bool, outcome: Outcome
) -> None:
    """Else Order Service may be at it for as long again."""
    busy_s = TIMEOUT_S if sent else 0
    judged = verdict(None, error, sent=sent)
    assert judged == Verdict(
        outcome=outcome, final=None, delay_max_s=1, asked_s=0, busy_s=busy_s, endpoint_down=True
    )
    assert [jittered(judged, share) for share in (0.0, 0.5)] == ([busy_s] * 2 if sent else [0, 0.5])


def test_a_wait_may_be_longer_than_what_may_be_running() -> None:
    assert jittered(verdict(None, "timeout", attempt=10), 0.5) == 256


@pytest.mark.parametrize(("status", "error"), [(500, None), (503, None), (None, "timeout")])
def test_the_last_attempt_is_dead_and_says_what_it_came_to(
    status: int | None, error: str | None
) -> None:
    before = verdict(status, error, retry_after="9", attempt=ATTEMPTS_MAX - 1)
    assert before.final is None
    for attempt in (ATTEMPTS_MAX, ATTEMPTS_MAX + 1):
        last = verdict(status, error, retry_after="9", attempt=attempt)
        expected = Verdict(
            outcome=before.outcome,
            final="dead",
            delay_max_s=0,
            asked_s=0,
            busy_s=before.busy_s,
            endpoint_down=before.endpoint_down,
        )
        assert last == expected


@pytest.mark.parametrize("attempt", [ATTEMPTS_MAX, 10 * ATTEMPTS_MAX])
def test_nothing_dies_before_three_days_are_over(attempt: int) -> None:
    for due_for_s in (-1e9, 0.0, RETRY_FOR_S - 1):
        judged = verdict(attempt=attempt, due_for_s=due_for_s)
        assert (judged.final, judged.delay_max_s) == (None, WAIT_MAX_S)
    assert verdict(attempt=attempt, due_for_s=RETRY_FOR_S).final == "dead"
    assert verdict(attempt=ATTEMPTS_MAX - 1, due_for_s=1e9).final is None


def test_the_wait_doubles_from_a_second_to_an_hour() -> None:
    waits = [verdict(attempt=attempt).delay_max_s for attempt in range(1, ATTEMPTS_MAX)]
    assert waits[:14] == [1, 2, 4, 8, 16, 32, 64, 128, 256, 512, 1024, 2048, 3600, 3600]
    assert set(waits[13:]) == {3600}


def test_a_retry_waits_a_random_share() -> None:
    failed = verdict(attempt=4)
    assert [jittered(failed, share) for share in (0.0, 0.25, 0.5)] == [0, 2, 4]
    assert 7.99 < jittered(failed, 0.999) < 8


def test_a_retry_waits_at_least_as_long_as_it_was_asked_to() -> None:
    asked = verdict(503, retry_after="5", attempt=4)
    assert [jittered(asked, share) for share in (0.0, 0.5, 0.75, 0.875)] == [5, 5, 6, 7]
    longer = verdict(503, retry_after="60", attempt=4)
    assert jittered(longer, 0.999) == 60


@pytest.mark.parametrize(
    ("text", "seconds"),
    [
        ("0", 0),
        ("1", 1),
        ("007", 7),
        (" 120\t", 120),
        ("3600", 3600),
        ("3601", 3600),
        ("9" * 400, 3600),
        ("9" * 10_000, 3600),  # more digits than int() takes
        ("Sun, 06 Nov 1994 08:50:37 GMT", 60),  # the three forms of RFC 9110 section 5.6.7
        ("Sunday, 06-Nov-94 08:50:37 GMT", 60),
        ("Sun Nov  6 08:50:37 1994", 60),
        ("Sun, 06 Nov 1994 08:49:37 GMT", 0),
        ("Sun, 06 Nov 1994 08:49:36 GMT", 0),
        ("Thu, 01 Jan 1970 00:00:00 GMT", 0),
        ("Sun, 06 Nov 1994 09:49:38 GMT", 3600),
        ("Fri, 31 Dec 9999 23:59:59 GMT", 3600),
        ("", 0),
        (" ", 0),
        ("-1", 0),
        ("+5", 0),
        ("1.5", 0),
        ("5 s", 0),
        ("5, 10", 0),
        ("1e3", 0),
        ("1_000", 0),
        ("0x10", 0),
        ("inf", 0),
        ("nan", 0),
        ("٥", 0),  # a digit, but not of RFC 9110
        ("5\n", 0),
        ("soon", 0),
        ("1994-11-06T08:50:37Z", 0),
        ("Sun, 06 Nov 1994 08:50:37 +0100", 0),
        ("Sun, 32 Nov 1994 08:50:37 GMT", 0),
        ("Sun, 06 Nov 0000 08:50:37 GMT", 0),
    ],
)
@pytest.mark.parametrize("status", [429, 503])
def test_retry_after_is_bounded_and_garbage_is_ignored(
    text: str, seconds: float, status: int
) -> None:
    assert verdict(status, retry_after=text) == Verdict(
        outcome="http_error",
        final=None,
        delay_max_s=1,
        asked_s=seconds,
        busy_s=0,
        endpoint_down=True,
    )


def test_a_date_is_compared_in_utc() -> None:
    there = NOW.astimezone(timezone(timedelta(hours=5.5))) + timedelta(seconds=20)
    asked = verdict(503, retry_after="Sun, 06 Nov 1994 08:50:37 GMT", now=there)
    assert asked.asked_s == 40


def test_retry_after_counts_for_429_and_503_alone() -> None:
    asked = {status: verdict(status, retry_after="60") for status in NEITHER_2XX_NOR_410}
    assert [status for status in asked if asked[status].asked_s] == [429, 503]


@settings(max_examples=300)
@given(
    status=st.none() | st.sampled_from([429, 503]) | st.integers(100, 999),
    error=st.sampled_from(["timeout", "unreachable", "forbidden_address", "protocol"]),
    sent=st.booleans(),
    retry_after=st.none()
    | st.text()
    | st.from_regex(r"[0-9]{1,9}|[A-Z][a-z]{2}, .*", fullmatch=True),
    attempt=st.integers(1, 2 * ATTEMPTS_MAX),
    share=st.floats(0, 1, exclude_max=True),
    now=st.datetimes(timezones=st.just(UTC)),
)
def test_whatever_comes_the_wait_is_bounded(
    status: int | None,
    error: str,
    sent: bool,
    retry_after: str | None,
    attempt: int,
    share: float,
    now: datetime,
) -> None:
    error_or_none = error if status is None else None
    judged = verdict(
        status, error_or_none, sent=sent, retry_after=retry_after, attempt=attempt, now=now
    )
    assert judged.busy_s <= jittered(judged, share) <= WAIT_MAX_S
    assert (judged.delay_max_s > 0) is (judged.final is None)


def test_there_are_as_few_attempts_as_three_days_take() -> None:
    steps = schedule()
    assert [step.attempt for step in steps] == list(range(1, ATTEMPTS_MAX + 1))
    assert steps[0] == (1, 0, 0)
    assert steps[-2].expected_s < RETRY_FOR_S <= steps[-1].expected_s
    assert timedelta(hours=72).total_seconds() == RETRY_FOR_S
    assert ATTEMPTS_MAX == 156


def test_the_schedule_is_what_is_done() -> None:
    steps = schedule()
    done = [verdict(attempt=step.attempt) for step in steps]
    assert [step.wait_max_s for step in steps[1:]] == [each.delay_max_s for each in done[:-1]]
    assert [each.final for each in done] == [None] * (ATTEMPTS_MAX - 1) + ["dead"]
    # The random share is the same for all here: its mean.
    waited = [0.0]
    for each in done[:-1]:
        waited.append(waited[-1] + jittered(each, 0.5))
    assert [step.expected_s for step in steps] == pytest.approx(waited)


def test_a_callback_that_always_fails_is_tried_for_three_days() -> None:
    """Simulated: 72 h on average, and nearly never less than 58 h or more than 86 h."""
    draw = random.Random(20_240_601).random
    lives = []
    for _ in range(1000):
        attempt, waited_s = 1, 0.0
        while (judged := verdict(attempt=attempt)).final is None:
            waited_s += jittered(judged, draw())
            attempt += 1
        assert attempt == ATTEMPTS_MAX
        lives.append(waited_s / 3600)
    assert statistics.mean(lives) == pytest.approx(72, abs=0.5)
    assert statistics.stdev(lives) == pytest.approx(3.5, abs=0.3)
    assert min(lives) > 58
    assert max(lives) < 86
