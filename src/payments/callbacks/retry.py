"""Judges an attempt: the callback is delivered, dead, or retried, and when.

Pure: callers pass the time of the response and the random share. The reasons are in
docs/decisions/callbacks.md.
"""

import re
from datetime import UTC, datetime
from typing import TYPE_CHECKING, Literal, NamedTuple

from payments.order_service.responses import is_json

if TYPE_CHECKING:
    from payments.order_service.endpoint import Exchange

WAIT_FIRST_S = 1  # most failures are short: a dropped connection, a restart
WAIT_MAX_S = 3600  # after any repair the callbacks arrive within an hour
RETRY_FOR_S = 72 * 3600  # a weekend, and a working day for the repair

# The endpoint as a whole is too busy or broken. breaker.py tells whether a 500 concerns one order.
DOWN_STATUSES = {429, 500}
# From a proxy that does not reach Order Service; with a JSON body, from Order Service, about one
# order.
PROXY_STATUSES = {502, 503, 504}
# With which Retry-After says when to retry: RFC 6585 section 4 for 429, RFC 9110 section 10.2.3 for
# 503. Its meaning with 3xx does not matter here, since no redirect is followed.
RETRY_AFTER_STATUSES = {429, 503}

# RFC 9110 section 5.6.7: the current form, and two old ones that a recipient must accept too.
_HTTP_DATES = ("%a, %d %b %Y %H:%M:%S GMT", "%A, %d-%b-%y %H:%M:%S GMT", "%a %b %d %H:%M:%S %Y")

Outcome = Literal["delivered", "gone", "http_error", "unreachable", "timeout", "end_unknown"]


class Verdict(NamedTuple):
    """`final` is None if the callback is retried, after the wait that `jittered` returns."""

    outcome: Outcome
    final: Literal["delivered", "dead"] | None
    delay_max_s: float  # the retry waits a random share of this,
    asked_s: float  # but at least the Retry-After,
    busy_s: float  # and as long as Order Service may still work on the attempt
    endpoint_down: bool  # for the circuit breaker: the endpoint as a whole seems to be down


class Step(NamedTuple):
    attempt: int  # counted from 1
    wait_max_s: float  # since the previous attempt
    expected_s: float  # since the first attempt, on average, without the duration of attempts


def judge(
    exchange: "Exchange", attempt: int, due_for_s: float, timeout_s: float, now: datetime
) -> Verdict:
    """`attempt` is the number of this attempt, from 1, of a delivery that has been due for
    `due_for_s`; `timeout_s` limits an exchange; `now` has a time zone."""
    status, outcome = exchange.status, _outcome(exchange)
    by_proxy = status in PROXY_STATUSES and not is_json(exchange.content_type)
    endpoint_down = status is None or status in DOWN_STATUSES or by_proxy
    # After a 504 a proxy has timed out, but Order Service may still work on the request.
    running = exchange.sent if status is None else status == 504
    busy_s = timeout_s if running else 0.0
    if outcome == "delivered":
        return Verdict(
            outcome=outcome,
            final="delivered",
            delay_max_s=0.0,
            asked_s=0.0,
            busy_s=busy_s,
            endpoint_down=endpoint_down,
        )
    if outcome == "gone" or (attempt >= ATTEMPTS_MAX and due_for_s >= RETRY_FOR_S):
        return Verdict(
            outcome=outcome,
            final="dead",
            delay_max_s=0.0,
            asked_s=0.0,
            busy_s=busy_s,
            endpoint_down=endpoint_down,
        )
    asked_s = 0.0
    if exchange.retry_after is not None and status in RETRY_AFTER_STATUSES:
        asked_s = _retry_after_s(exchange.retry_after, now)
    return Verdict(
        outcome=outcome,
        final=None,
        delay_max_s=_wait_max_s(attempt),
        asked_s=asked_s,
        busy_s=busy_s,
        endpoint_down=endpoint_down,
    )


def jittered(verdict: Verdict, share: float) -> float:
    """Seconds until the retry; `share` is a uniform random number from [0, 1)."""
    return max(verdict.asked_s, verdict.busy_s, share * verdict.delay_max_s)


def schedule() -> tuple[Step, ...]:
    """All attempts: the fewest whose waits add up to RETRY_FOR_S on average."""
    steps = [Step(attempt=1, wait_max_s=0.0, expected_s=0.0)]
    while steps[-1].expected_s < RETRY_FOR_S:
        attempt, _, expected_s = steps[-1]
        wait_max_s = _wait_max_s(attempt)
        # A uniform random share is half on average.
        steps.append(
            Step(attempt=attempt + 1, wait_max_s=wait_max_s, expected_s=expected_s + wait_max_s / 2)
        )
    return tuple(steps)


def _outcome(exchange: "Exchange") -> Outcome:
    status = exchange.status
    if status is None:
        if exchange.error == "timeout":
            return "timeout"
        return "end_unknown" if exchange.sent else "unreachable"
    if 200 <= status < 300:
        return "delivered"
    return "gone" if status == 410 else "http_error"


def _wait_max_s(attempt: int) -> float:
    """The longest wait after this attempt has failed."""
    return float(min(WAIT_MAX_S, WAIT_FIRST_S * 2 ** (attempt - 1)))


def _retry_after_s(text: str, now: datetime) -> float:
    """Seconds from 0 to WAIT_MAX_S; 0 for a past time, or for neither of RFC 9110's two forms."""
    text = text.strip(" \t")
    if re.fullmatch("[0-9]+", text):
        # int() raises for thousands of digits, float() returns infinity.
        return min(float(WAIT_MAX_S), float(text))
    for form in _HTTP_DATES:
        try:
            date = datetime.strptime(text, form).replace(tzinfo=UTC)
        except ValueError:
            continue
        return min(float(WAIT_MAX_S), max(0.0, (date - now).total_seconds()))
    return 0.0


ATTEMPTS_MAX = len(schedule())
