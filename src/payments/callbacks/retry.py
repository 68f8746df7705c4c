"""What becomes of a callback after an attempt: delivered, dead, or tried again, and when.

Pure: the time of the answer and the random share are handed in. Why it is so:
docs/decisions/callbacks.md.
"""

import re
from datetime import UTC, datetime
from typing import TYPE_CHECKING, Literal, NamedTuple

from payments.order_service.responses import is_json

if TYPE_CHECKING:
    from payments.order_service.endpoint import Exchange

WAIT_FIRST_S = 1  # most failures are over at once: a dropped connection, a restart
WAIT_MAX_S = 3600  # whatever was repaired, and whenever: its callbacks come within the hour
RETRY_FOR_S = 72 * 3600  # a weekend, and a working day to repair what broke

# Against the endpoint as a whole: too busy, and broken. Whether a 500 is one order's, the orders
# tell: see breaker.py.
DOWN_STATUSES = {429, 500}
# A proxy's, that does not reach Order Service; with a JSON body, its own, about one order.
PROXY_STATUSES = {502, 503, 504}
# Where Retry-After says when to come again: RFC 6585 section 4 for 429, RFC 9110 section 10.2.3 for
# 503. That also gives it a meaning for 3xx, before a redirect is followed; none is.
RETRY_AFTER_STATUSES = {429, 503}

# RFC 9110 section 5.6.7: one form to send, and two old ones that a recipient must accept too.
_HTTP_DATES = ("%a, %d %b %Y %H:%M:%S GMT", "%A, %d-%b-%y %H:%M:%S GMT", "%a %b %d %H:%M:%S %Y")

Outcome = Literal["delivered", "gone", "http_error", "unreachable", "timeout", "end_unknown"]


class Verdict(NamedTuple):
    """`final` is None if it is tried again, after the wait that `jittered` gives."""

    outcome: Outcome
    final: Literal["delivered", "dead"] | None
    delay_max_s: float  # the retry waits a random share of this,
    asked_s: float  # but at least what was asked for,
    busy_s: float  # and until nothing of the attempt may be running any more
    endpoint_down: bool  # for the circuit breaker: it speaks against the endpoint as a whole


class Step(NamedTuple):
    attempt: int  # counted from 1
    wait_max_s: float  # since the attempt before
    expected_s: float  # since the first attempt, on average; the attempts' own time not counted


def judge(
    exchange: "Exchange", attempt: int, due_for_s: float, timeout_s: float, now: datetime
) -> Verdict:
    """`attempt` is the one that was just made, counted from 1, of a delivery that has been due for
    `due_for_s`; `timeout_s` is what an exchange may take; `now` is aware."""
    status, outcome = exchange.status, _outcome(exchange)
    by_proxy = status in PROXY_STATUSES and not is_json(exchange.content_type)
    endpoint_down = status is None or status in DOWN_STATUSES or by_proxy
    # Whoever says 504 gave up waiting for Order Service, or for what that asked; it may go on.
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
    """Seconds until the retry; `share` is drawn evenly from [0, 1)."""
    return max(verdict.asked_s, verdict.busy_s, share * verdict.delay_max_s)


def schedule() -> tuple[Step, ...]:
    """All attempts: as few as it takes to be waiting for RETRY_FOR_S on average."""
    steps = [Step(attempt=1, wait_max_s=0.0, expected_s=0.0)]
    while steps[-1].expected_s < RETRY_FOR_S:
        attempt, _, expected_s = steps[-1]
        wait_max_s = _wait_max_s(attempt)
        # A random share of it is half of it on average.
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
    """After this attempt has failed."""
    return float(min(WAIT_MAX_S, WAIT_FIRST_S * 2 ** (attempt - 1)))


def _retry_after_s(text: str, now: datetime) -> float:
    """From 0 to WAIT_MAX_S; 0 for what is past or is neither of RFC 9110's two forms."""
    text = text.strip(" \t")
    if re.fullmatch("[0-9]+", text):
        # int() refuses thousands of digits, float() makes them infinite.
        return min(float(WAIT_MAX_S), float(text))
    for form in _HTTP_DATES:
        try:
            date = datetime.strptime(text, form).replace(tzinfo=UTC)
        except ValueError:
            continue
        return min(float(WAIT_MAX_S), max(0.0, (date - now).total_seconds()))
    return 0.0


ATTEMPTS_MAX = len(schedule())
