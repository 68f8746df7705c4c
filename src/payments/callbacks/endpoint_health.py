"""Derives the health of the endpoint from attempts: for the circuit breaker, for the log, and for
callbacks that failed in an outage and can be retried when it is over.

Callers pass the time, as seconds of a monotonic clock. One per process, used only from its event
loop.
"""

import math
from uuid import UUID

from loguru import logger

from payments.callbacks.breaker import Breaker, Permit
from payments.callbacks.retry import WAIT_MAX_S, Verdict

REFUSED_MAX = 5  # rejected callbacks in a row before a warning
# Before a warning. Failures of single orders that happen to follow each other are over by then.
TOLD_AFTER_S = 5.0
# A process that delivered nothing before an outage does not know when it began: every failure whose
# retry is still due may belong to it.
BEGAN_BEFORE_S = WAIT_MAX_S + 300.0


class EndpointHealth:
    def __init__(self, breaker: Breaker) -> None:
        self.breaker = breaker
        # When an ended outage began; None once the callbacks that failed in it are made due.
        self.over_since: float | None = None
        self._refused = 0  # rejected in a row by a reachable endpoint
        self._refused_since = 0.0
        self._refusal_told = False
        self._away_reason = ""
        self._away_told = False
        # When an outage began after whose end nothing was delivered yet.
        self._was_away_since: float | None = None
        self._first_delivered_at = math.inf

    def note(
        self,
        verdict: Verdict,
        permit: Permit,
        order_id: UUID,
        attempt: int,
        reason: str,
        now: float,
    ) -> None:
        """Notes the result of one attempt; `attempt` is its number, from 1."""
        delivered = verdict.final == "delivered"
        if verdict.endpoint_down:
            # An order that has failed before says nothing new about the endpoint.
            if attempt == 1:
                self._away_reason = reason
                self.breaker.failed(permit, order_id, now)
        elif self.breaker.succeeded(permit) if delivered else self.breaker.answered(permit):
            self._is_back()
        if delivered:
            self._delivered(now)
        elif not verdict.endpoint_down:
            self._was_refused(reason, now)

    def is_over(self, now: float) -> bool:
        """Whether there is no outage, and something was delivered since the last one."""
        return self.breaker.state(now) == "closed" and self._was_away_since is None

    def tell_of_an_outage(self, now: float) -> None:
        """Logs a lasting outage, once."""
        if self._away_told or self.breaker.state(now) == "closed":
            return
        if now - self.breaker.since >= TOLD_AFTER_S:
            self._away_told = True
            logger.bind(reason=self._away_reason).warning(
                "Order Service is unavailable: callbacks wait"
            )

    def _is_back(self) -> None:
        since = self.breaker.since
        if self._first_delivered_at > since:
            since -= BEGAN_BEFORE_S
        self._was_away_since = min(self._was_away_since or math.inf, since)
        if self._away_told:
            self._away_told = False
            logger.info("Order Service is available again")

    def _delivered(self, now: float) -> None:
        self._first_delivered_at = min(self._first_delivered_at, now)
        if self._refusal_told:
            logger.info("Order Service accepts callbacks again")
        self._refused, self._refusal_told = 0, False
        # Only after a delivery, not after a response that merely shows the endpoint alive: else a
        # callback that is always rejected could make all others due again and again.
        if self._was_away_since is not None:
            self.over_since = min(self.over_since or math.inf, self._was_away_since)
            self._was_away_since = None

    def _was_refused(self, reason: str, now: float) -> None:
        if self._refused == 0:
            self._refused_since = now
        self._refused += 1
        lasts = now - self._refused_since >= TOLD_AFTER_S
        if lasts and self._refused >= REFUSED_MAX and not self._refusal_told:
            self._refusal_told = True
            logger.bind(reason=reason).warning("Order Service rejects callbacks")
