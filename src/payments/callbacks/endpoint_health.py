"""What attempts tell of the endpoint as a whole: to the circuit breaker, to people, and to
callbacks that failed in an outage which is over.

Time is handed in, as seconds of a monotonic clock. One per process, used from its event loop alone.
"""

import math
from uuid import UUID

from loguru import logger

from payments.callbacks.breaker import Breaker, Permit
from payments.callbacks.retry import WAIT_MAX_S, Verdict

REFUSED_MAX = 5  # in a row, until somebody is told
# What orders in trouble of their own look like, when they happen to come one after another, is over
# before.
TOLD_AFTER_S = 5.0
# A process that has delivered nothing yet does not know when an outage began: whatever is still
# waiting for its next attempt then may be of it.
BEGAN_BEFORE_S = WAIT_MAX_S + 300.0


class EndpointHealth:
    def __init__(self, breaker: Breaker) -> None:
        self.breaker = breaker
        # When an outage began that is over, and what failed in it has yet to be made due.
        self.over_since: float | None = None
        self._refused = 0  # in a row, by an endpoint that is there
        self._refused_since = 0.0
        self._refusal_told = False
        self._away_reason = ""
        self._away_told = False
        # When the outage began since whose end nothing was delivered.
        self._was_away_since: float | None = None
        self._has_delivered = False

    def note(
        self,
        verdict: Verdict,
        permit: Permit,
        order_id: UUID,
        attempt: int,
        reason: str,
        now: float,
    ) -> None:
        """One attempt's result; `attempt` is which one of its delivery, from 1."""
        delivered = verdict.final == "delivered"
        if verdict.endpoint_down:
            # An order that failed before tells nothing new about the endpoint.
            if attempt == 1:
                self._away_reason = reason
                self.breaker.failed(permit, order_id, now)
        elif self.breaker.succeeded(permit) if delivered else self.breaker.answered(permit):
            self._is_back()
        if delivered:
            self._delivered()
        elif not verdict.endpoint_down:
            self._was_refused(reason, now)

    def tell_of_an_outage(self, now: float) -> None:
        """Once, when one lasts."""
        if self._away_told or self.breaker.state(now) == "closed":
            return
        if now - self.breaker.since >= TOLD_AFTER_S:
            self._away_told = True
            logger.bind(reason=self._away_reason).warning(
                "Order Service is away: callbacks wait for it"
            )

    def _is_back(self) -> None:
        since = self.breaker.since - (0.0 if self._has_delivered else BEGAN_BEFORE_S)
        self._was_away_since = min(self._was_away_since or math.inf, since)
        if self._away_told:
            self._away_told = False
            logger.info("Order Service is back")

    def _delivered(self) -> None:
        self._has_delivered = True
        if self._refusal_told:
            logger.info("Order Service takes callbacks again")
        self._refused, self._refusal_told = 0, False
        # Not for an answer that merely shows it alive: each such attempt is to be paid for with a
        # callback delivered, else one that is always refused would use up all the others'.
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
            logger.bind(reason=reason).warning("Order Service refuses callbacks")
