"""What becomes of a callback after an attempt: delivered, dead, or tried again, and when.

Pure: the time of the answer and the random share are handed in. Why it is so:
docs/decisions/callbacks.md.
"""

import re
from datetime import UTC, datetime
from typing import Literal, NamedTuple

WAIT_FIRST_S = 1  # most failures are over at once: a dropped connection, a restart
WAIT_MAX_S = 3600  # whatever was repaired, and whenever: its callbacks come within the hour
RETRY_FOR_S = 72 * 3600  # a weekend, and a working day to repair what broke

DOWN_STATUSES = {429, 502, 503, 504}  # too busy, or a proxy that does not reach Order Service
# Where Retry-After says when to come again: RFC 6585 section 4 for 429, RFC 9110 section 10.2.3 for
# 503. That also gives it a meaning for 3xx, before a redirect is followed; none is.
RETRY_AFTER_STATUSES = {429, 503}

# RFC 9110 section 5.6.7: one form to send, and two old ones that a recipient must accept too.
_HTTP_DATES = ("%a, %d %b %Y %H:%M:%S GMT", "%A, %d-%b-%y %H:%M:%S GMT", "%a %b %d %H:%M:%S %Y")

Outcome = Literal["delivered", "gone", "http_error", "unreachable", "timeout"]


class Verdict(NamedTuple):
    """`final` is None if it is tried again, after the wait that `jittered` gives."""

    outcome: Outcome
    final: Literal["delivered", "dead"] | None
    delay_max_s: float  # the retry waits a random share of this …
    delay_min_s: float  # … but at least this
    endpoint_down: bool  # for the circuit breaker; False: the endpoint is alive, whatever it said


class Step(NamedTuple):
    attempt: int  # counted from 1
    wait_max_s: float  # since the attempt before
    expected_s: float  # since the first attempt, on average; the attempts' own time not counted


def judge(
    status: int | None, error: str | None, retry_after: str | None, attempt: int, now: datetime
) -> Verdict:
    """`status` is None if no answer came, and `error` then says why; `retry_after` is the header.

    `attempt` is the one that was just made, counted from 1; `now` is aware.
    """
    outcome = _outcome(status, error)
    endpoint_down = status is None or status in DOWN_STATUSES
    if outcome == "delivered":
        return Verdict(outcome, "delivered", 0.0, 0.0, endpoint_down)
    if outcome == "gone" or attempt >= ATTEMPTS_MAX:
        return Verdict(outcome, "dead", 0.0, 0.0, endpoint_down)
    asked_s = 0.0
    if retry_after is not None and status in RETRY_AFTER_STATUSES:
        asked_s = _retry_after_s(retry_after, now)
    return Verdict(outcome, None, _wait_max_s(attempt), asked_s, endpoint_down)


def jittered(verdict: Verdict, share: float) -> float:
    """Seconds until the retry; `share` is drawn evenly from [0, 1)."""
    return max(verdict.delay_min_s, share * verdict.delay_max_s)


def schedule() -> tuple[Step, ...]:
    """All attempts: as few as it takes to be waiting for RETRY_FOR_S on average."""
    steps = [Step(1, 0.0, 0.0)]
    while steps[-1].expected_s < RETRY_FOR_S:
        attempt, _, expected_s = steps[-1]
        wait_max_s = _wait_max_s(attempt)
        # A random share of it is half of it on average.
        steps.append(Step(attempt + 1, wait_max_s, expected_s + wait_max_s / 2))
    return tuple(steps)


def _outcome(status: int | None, error: str | None) -> Outcome:
    if status is None:
        return "timeout" if error == "timeout" else "unreachable"
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
