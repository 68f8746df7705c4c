"""Ask the provider what became of a payment that was left open, and append what it says.

A crash, a silent provider or a missed deadline leaves a payment PENDING, or a refund under way.
Charges are only asked about, never sent; refunds are sent again while that is safe. Which payments,
when and how often: settling_loop.py. The rules and why: docs/decisions/settling.md.
"""

import time
from collections.abc import Callable

import msgspec
from loguru import logger

from payments.clients import SETTLING
from payments.commands.giving_back import GivingBack
from payments.commands.outcomes import Outcomes
from payments.commands.refund import provider_refund
from payments.commands.runs import cause
from payments.commands.telling import (
    tell,
    tell_if_open_too_long,
    tell_mismatch,
    tell_other_gateway,
)
from payments.errors import LogRewound
from payments.event_store import EventStore, LoadedPayment
from payments.gateways import (
    Gateway,
    NeverSent,
    OutcomeUnknown,
    ProviderRefund,
    declines_may_turn_s,
)
from payments.observability.logs import trace_field
from payments.observability.metrics import Telemetry
from payments.observability.tracing import current_traceparent, span
from payments.payment.decisions import (
    Cause,
    OutcomeMismatch,
    abandon,
    charge_outcome,
    refund_outcome,
    return_outcome,
)
from payments.payment.state import (
    DECLINED,
    Approved,
    Declined,
    LateCapture,
    Payment,
    Refund,
    Status,
)
from payments.settings import Settings

CALLS_MAX = 3  # an attempt has the time of so many calls that all time out; then it sends no more
LATE_CAPTURE_S = 24 * 3600.0  # however soon a gateway says that no capture can come any more


class SettleAttempt(msgspec.Struct, frozen=True):
    """What one attempt came to: the payment afterwards, and whether it was watched to its end: no
    event says so, but nothing can become of it any more. `due_in_s`: when to ask, if it was too
    early."""

    payment: Payment
    finished: bool
    due_in_s: float | None = None


class Settler:
    """Asks about one payment at a time."""

    def __init__(
        self,
        store: EventStore,
        gateway: Gateway,
        giving_back: GivingBack,
        telemetry: Telemetry,
        settings: Settings,
    ) -> None:
        self._outcomes = Outcomes(store, telemetry)
        self._store = store
        self._gateway = gateway
        self._giving_back = giving_back
        self._telemetry = telemetry
        self._deadline_s = settings.charge_deadline_s
        self._gateway_timeout_s = settings.gateway_timeout_s
        self.attempt_s = CALLS_MAX * settings.gateway_timeout_s
        self._abandon_after_s = settings.pending_abandon_after_s
        self._late_capture_s = max(LATE_CAPTURE_S, gateway.late_capture_s)
        self.declines_may_turn_s = declines_may_turn_s(gateway)

    async def settle(self, loaded: LoadedPayment, attempts: int) -> SettleAttempt:
        """One attempt at everything that is open. What it cannot find out it leaves as it is."""
        payment, kind = loaded.payment, self._open_for(loaded.payment)
        if kind is None:
            # Declined, and listed by a process whose gateway's declines may turn.
            done = payment.declined and payment.late_capture is None
            return SettleAttempt(payment, finished=done)
        if kind == DECLINED:
            due_in_s = self.declines_may_turn_s - loaded.age_s(payment.version)
            if due_in_s > 0:
                return SettleAttempt(payment, finished=False, due_in_s=due_in_s)
        with (
            logger.contextualize(
                payment_id=payment.id,
                order_id=payment.merchant_order_id,
                attempts=attempts,
                **trace_field(loaded.traceparent),
            ),
            span("settle", parent=loaded.traceparent, payment_id=payment.id),
        ):
            return await self._settle(loaded, kind, attempts)

    def _open_for(self, payment: Payment) -> str | None:
        if payment.unsettled is not None:
            return payment.unsettled.kind
        turning = self.declines_may_turn_s > 0 and payment.declined
        return DECLINED if turning and payment.late_capture is None else None

    async def _settle(self, loaded: LoadedPayment, kind: str, attempts: int) -> SettleAttempt:
        payment, log = loaded.payment, logger.bind(kind=kind)
        if payment.gateway != self._gateway.name:
            self._telemetry.settling[kind, "other_gateway"].inc()
            await tell_other_gateway(self._store, payment, kind)
            return SettleAttempt(payment, finished=False)
        attempt, outcome, reason = SettleAttempt(payment, finished=False), "unknown", ""
        try:
            attempt = await self._ask(loaded, attempts)
            outcome = "settled" if attempt.payment.unsettled is None else "open"
            reason = "unknown to the provider"
        except (OutcomeUnknown, NeverSent) as error:
            reason = str(error)
            log.bind(reason=reason).info("the provider's outcome is not known yet")
        except LogRewound:
            reason = "no refund is sent until the loss of the log is accepted"
            await tell(self._store, payment.id, "WARNING", reason, kind=kind)
        except OutcomeMismatch as error:
            outcome = "mismatch"
            operation = "refund" if kind in ("refund", "late_capture") else "charge"
            self._telemetry.mismatches[operation].inc()
            await tell_mismatch(self._store, payment.id, kind, error)
        self._telemetry.settling[kind, outcome].inc()
        if outcome in ("unknown", "open"):
            await self._tell_if_open_too_long(loaded, attempt.payment, reason)
        if attempt.payment.version > payment.version:
            settled = attempt.payment
            log.bind(status=settled.status, failure=settled.failure).info("settled")
        return attempt

    async def _tell_if_open_too_long(
        self, loaded: LoadedPayment, payment: Payment, reason: str
    ) -> None:
        if payment.unsettled is not None:
            kind, open_s = payment.unsettled.kind, _age_at_most_s(loaded, _opened_by(payment))
            await tell_if_open_too_long(self._store, payment.id, kind, open_s, reason)

    async def _ask(self, loaded: LoadedPayment, attempts: int) -> SettleAttempt:
        give_up_at = time.monotonic() + self.attempt_s

        def timeout_s() -> float:
            """Looked at before each call: a process that was frozen must not send late."""
            if time.monotonic() > give_up_at:
                raise OutcomeUnknown("this attempt took too long")
            return self._gateway_timeout_s

        payment, finished = loaded.payment, False
        if payment.provider_txn_id is None and payment.late_capture is None:
            found = await self._gateway.find_charge(payment.id, timeout_s())
            finished = self._watched_long_enough(loaded, found)
            payment = await self._append_found(loaded, found)
        late = payment.late_capture
        if late is not None and late.provider_refund_id is None:
            if attempts == 1 or loaded.payment.late_capture is None:
                logger.warning("a late capture is returned")
            payment = await self._return_late_capture(loaded, payment, late, timeout_s)
        payment = await self._settle_refunds(loaded, payment, attempts, timeout_s)
        return SettleAttempt(payment, finished)

    def _watched_long_enough(
        self, loaded: LoadedPayment, found: Approved | Declined | None
    ) -> bool:
        """Whether a payment that was abandoned or declined can surely not be captured any more."""
        payment = loaded.payment
        if payment.status is not Status.FAILED or isinstance(found, Approved):
            return False
        failed_for_s = loaded.age_s(payment.version)
        return payment.declined or found is not None or failed_for_s > self._late_capture_s

    async def _append_found(
        self, loaded: LoadedPayment, found: Approved | Declined | None
    ) -> Payment:
        payment = loaded.payment
        if found is not None:
            return await self._outcomes.append(
                payment,
                loaded.events,
                lambda payment: charge_outcome(payment, found, _cause(loaded)),
            )
        if loaded.age_s() < self._abandon_after_s:
            return payment
        return await self._outcomes.append(
            payment, loaded.events, lambda payment: abandon(payment, _cause(loaded))
        )

    async def _settle_refunds(
        self,
        loaded: LoadedPayment,
        payment: Payment,
        attempts: int,
        timeout_s: Callable[[], float],
    ) -> Payment:
        under_way = [
            refund
            for refund in loaded.payment.refunds
            # A young one is left to its request. One from the future is not young: nobody knows how
            # old it is.
            if refund.status is Status.PENDING
            and loaded.age_at_most_s(refund.version) > self._deadline_s
        ]
        # One refund that nobody knows of must not hold up the others, nor use up their time.
        first = attempts % len(under_way) if under_way else 0
        failure: Exception | None = None
        for refund in under_way[first:] + under_way[:first]:
            try:
                payment = await self._settle_refund(loaded, payment, refund, timeout_s)
            except (OutcomeUnknown, NeverSent, OutcomeMismatch, LogRewound) as error:
                failure = error
        if failure is not None:
            raise failure
        return payment

    async def _return_late_capture(
        self,
        loaded: LoadedPayment,
        payment: Payment,
        late: LateCapture,
        timeout_s: Callable[[], float],
    ) -> Payment:
        order = ProviderRefund(
            refund_id=late.refund_id,
            payment_id=payment.id,
            provider_txn_id=late.provider_txn_id,
            amount_cents=payment.amount_cents,
            currency=payment.currency,
        )
        age_s = _age_at_most_s(loaded, late.version)
        outcome = await self._giving_back.send_again(order, age_s, timeout_s, unsent=True)
        return await self._outcomes.append(
            payment,
            loaded.events,
            lambda payment: return_outcome(payment, late, outcome, _cause(loaded)),
        )

    async def _settle_refund(
        self,
        loaded: LoadedPayment,
        payment: Payment,
        refund: Refund,
        timeout_s: Callable[[], float],
    ) -> Payment:
        age_s = _age_at_most_s(loaded, refund.version)
        order = provider_refund(payment, refund)
        outcome = await self._giving_back.send_again(order, age_s, timeout_s)
        return await self._outcomes.append(
            payment,
            loaded.events,
            lambda payment: refund_outcome(payment, refund, outcome, _cause(loaded)),
        )


def _opened_by(payment: Payment) -> int:
    """The version of the event that opened what is open, of several the first."""
    if payment.late_capture is not None:
        return payment.late_capture.version
    refunds = (each.version for each in payment.refunds if each.status is Status.PENDING)
    return next(refunds, 1)


def _age_at_most_s(loaded: LoadedPayment, version: int) -> float:
    """How old an event is; one that was appended since the stream was read is new."""
    return loaded.age_at_most_s(version) if version <= len(loaded.recorded_at) else 0.0


def _cause(loaded: LoadedPayment) -> Cause:
    """Of the trace of the request that began the payment."""
    return cause(SETTLING, traceparent=current_traceparent(loaded.traceparent))
