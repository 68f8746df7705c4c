"""Ask the provider what became of a payment that was left open, and append what it says.

A crash, a silent provider or a missed deadline leaves a payment PENDING, or a refund under way.
Charges are only asked about, never sent, but for one that the provider has authorized after the
customer acted; refunds are sent again while that is safe. Which payments, when and how often:
settling_loop.py. The rules and why: docs/decisions/settling.md.
"""

import time
from collections.abc import Callable
from datetime import UTC, datetime, timedelta
from typing import NamedTuple

import msgspec
from loguru import logger

from payments.clients import SETTLING
from payments.commands.asking import (
    Found,
    check_about,
    find,
    provider_charge,
    provider_refund,
    surely_unsent,
)
from payments.commands.giving_back import GivingBack
from payments.commands.outcomes import Outcomes, Recorded
from payments.commands.paid_orders import is_paid_otherwise
from payments.commands.runs import cause
from payments.commands.telling import (
    tell,
    tell_if_open_too_long,
    tell_mismatch,
    tell_other_gateway,
)
from payments.errors import LogRewound
from payments.event_store import EventStore, LoadedPayment
from payments.events.facts import PaymentFailed
from payments.gateways import (
    Gateway,
    NeverSent,
    Open,
    OutcomeUnknown,
    ProviderRefund,
    ReferenceNotFound,
    Step,
)
from payments.gateways.chosen import Gateways
from payments.observability.logs import LogFields, trace_field
from payments.observability.metrics import Telemetry
from payments.observability.tracing import current_traceparent, span
from payments.payment.decisions import (
    Cause,
    OutcomeMismatch,
    abandon,
    charge_outcome,
    is_held_for,
    referenced,
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
from payments.settings import HOLD_MARGIN_S, Settings
from payments.unsettled import ELSEWHERE_S

CALLS_MAX = 3  # an attempt has the time of so many calls that all time out; then it sends no more
LATE_CAPTURE_S = 24 * 3600.0  # however soon a gateway says that no capture can come any more
# A declined payment of a provider that is not configured: gateways declare days at most.
DECLINE_ELSEWHERE_S = 30 * 24 * 3600.0

# How far the clocks of two database servers may be apart: a loss is found by the new one's.
CLOCKS_APART = timedelta(minutes=1)


# Why a charge that the provider knows is still open, by its step.
OPEN_AS: dict[Step, str] = {
    "ready": "waits for the client's retry",
    "action": "waits for the customer",
    "authorized": "waits for the client's retry",
    "processing": "the provider is processing it",
}


class SettleAttempt(msgspec.Struct, frozen=True):
    """What one attempt came to: the payment afterwards, and whether it was watched to its end: no
    event says so, but nothing can become of it any more. `due_in_s`: when to ask, if it was too
    early. `answered`: not that the provider did not respond, or contradicts itself. `open_as`: what
    the provider says of a charge that it has neither captured nor declined."""

    payment: Payment
    finished: bool
    due_in_s: float | None = None
    answered: bool = True
    open_as: str = "unknown to the provider"


class Settler:
    """Asks about one payment at a time."""

    def __init__(
        self,
        store: EventStore,
        gateways: Gateways[Gateway],
        giving_back: GivingBack,
        telemetry: Telemetry,
        settings: Settings,
    ) -> None:
        self._outcomes = Outcomes(store, telemetry)
        self._store = store
        self._gateways = gateways
        self._giving_back = giving_back
        self._telemetry = telemetry
        self._deadline_s = settings.charge_deadline_s
        self._gateway_timeout_s = settings.gateway_timeout_s
        self.attempt_s = CALLS_MAX * settings.gateway_timeout_s
        self._abandon_after_s = settings.pending_abandon_after_s
        self._second_is_refused = settings.second_charge == "refuse"
        self.declines_may_turn_s = gateways.declines_may_turn_s()

    async def settle(
        self, loaded: LoadedPayment, attempts: int, *, hinted: bool = False
    ) -> SettleAttempt:
        """One attempt at everything that is open. What it cannot find out it leaves as it is.
        `hinted`: the provider says that there is something new, so it is asked also if it would be
        too early."""
        payment, kind = loaded.payment, self._open_for(loaded.payment)
        if kind is None:
            return self._left_to_others(loaded)
        due_in_s = 0.0
        if kind == DECLINED:
            due_in_s = self.declines_may_turn_s[payment.gateway] - loaded.age_s(payment.version)
            if due_in_s > 0 and not hinted:
                return SettleAttempt(payment, finished=False, due_in_s=due_in_s)
        with (
            LogFields(
                payment_id=payment.id,
                order_id=payment.merchant_order_id,
                attempts=attempts,
                **trace_field(loaded.traceparent),
            ),
            span("settle", parent=loaded.traceparent, payment_id=payment.id),
        ):
            attempt = await self._settle(loaded, kind, attempts)
        if due_in_s > 0 and attempt.answered and attempt.payment.late_capture is None:
            return SettleAttempt(payment, finished=False, due_in_s=due_in_s)  # it may turn later
        return attempt

    def _open_for(self, payment: Payment) -> str | None:
        if payment.unsettled is not None:
            return payment.unsettled.kind
        turning = self.declines_may_turn_s.get(payment.gateway, 0.0) > 0 and payment.declined
        return DECLINED if turning and payment.late_capture is None else None

    def _left_to_others(self, loaded: LoadedPayment) -> SettleAttempt:
        """Declined, and listed by a process whose gateway's declines may turn. That one asks, if
        the provider is not configured here."""
        payment = loaded.payment
        done = payment.declined and payment.late_capture is None
        if not done or payment.gateway in self.declines_may_turn_s:
            return SettleAttempt(payment, finished=done)
        done = loaded.age_s(payment.version) > DECLINE_ELSEWHERE_S
        return SettleAttempt(payment, finished=done, due_in_s=ELSEWHERE_S)

    async def _settle(self, loaded: LoadedPayment, kind: str, attempts: int) -> SettleAttempt:
        payment, log = loaded.payment, logger.bind(kind=kind)
        gateway = self._gateways.of(payment.gateway)
        if gateway is None:
            self._telemetry.settling[kind, "other_gateway"].inc()
            await tell_other_gateway(self._store, payment, kind)
            return SettleAttempt(payment, finished=False)
        attempt, outcome, reason = SettleAttempt(payment, False, answered=False), "unknown", ""
        try:
            attempt = await self._ask(loaded, gateway, attempts)
            outcome = "settled" if attempt.payment.unsettled is None else "open"
            reason = attempt.open_as
        except (OutcomeMismatch, ReferenceNotFound) as error:
            outcome = "mismatch"
            operation = "refund" if kind in ("refund", "late_capture") else "charge"
            self._telemetry.mismatches[operation].inc()
            await tell_mismatch(self._store, payment.id, kind, error)
        except (OutcomeUnknown, NeverSent) as error:
            reason = str(error)
            log.bind(reason=reason).info("the provider's outcome is not known yet")
        except LogRewound:
            reason = "no refund is sent until the loss of the log is accepted"
            await tell(self._store, payment.id, "WARNING", reason, kind=kind)
        self._telemetry.settling[kind, outcome].inc()
        if outcome == "open":
            await self._store.fits_again(payment.id)
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

    async def _ask(self, loaded: LoadedPayment, gateway: Gateway, attempts: int) -> SettleAttempt:
        give_up_at = time.monotonic() + self.attempt_s

        def timeout_s() -> float:
            """Looked at before each call: a process that was frozen must not send late."""
            if time.monotonic() > give_up_at:
                raise OutcomeUnknown("this attempt took too long")
            return self._gateway_timeout_s

        at, finished, found = _At(gateway, timeout_s), False, None
        recorded = Recorded(loaded.payment, loaded.events)
        if loaded.payment.provider_txn_id is None and loaded.payment.late_capture is None:
            recorded, finished, found = await self._settle_charge(loaded, recorded, at)
        late = recorded.payment.late_capture
        if late is not None and late.provider_refund_id is None:
            if attempts == 1 or loaded.payment.late_capture is None:
                logger.warning("a late capture is returned")
            recorded = await self._return_late_capture(loaded, recorded, late, at)
        recorded = await self._settle_refunds(loaded, recorded, attempts, at)
        if isinstance(found, Open):
            return SettleAttempt(recorded.payment, finished, open_as=OPEN_AS[found.step])
        return SettleAttempt(recorded.payment, finished)

    async def _settle_charge(
        self, loaded: LoadedPayment, recorded: Recorded, at: "_At"
    ) -> tuple[Recorded, bool, Found]:
        """The payment afterwards, whether it was watched to its end, and what was found."""
        pending = recorded.payment.status is Status.PENDING
        ends = pending and loaded.age_s() >= self._abandon_after_s
        recorded = await self._referenced_again(loaded, recorded, at, ends=ends)
        payment = recorded.payment
        found = await find(at.gateway, payment, at.timeout_s())
        if await self._is_to_be_cancelled(payment, found, ends=ends):
            if not surely_unsent(at.gateway, payment):
                found = await at.gateway.cancel(provider_charge(payment), at.timeout_s())
        elif self._is_to_be_completed(payment, found):
            found = await at.gateway.charge(provider_charge(payment), at.timeout_s())
        check_about(found, payment)
        finished = self._watched_long_enough(loaded, at.gateway, found)
        if isinstance(found, Approved | Declined):
            outcome = found
            recorded = await self._outcomes.append(
                *recorded, lambda payment: charge_outcome(payment, outcome, _cause(loaded))
            )
        elif ends:
            reference = payment.provider_reference

            def end(payment: Payment) -> PaymentFailed | None:
                """A request that goes on just now may have stored a reference, and capture."""
                same = payment.provider_reference == reference
                return abandon(payment, _cause(loaded)) if same else None

            recorded = await self._outcomes.append(*recorded, end)
        return recorded, finished, found

    async def _is_to_be_cancelled(self, payment: Payment, found: Found, *, ends: bool) -> bool:
        """Whether it shall not be captured any more: a customer may still act on an open charge, or
        a request go on with it, also once the payment has failed, or nobody holds the seats."""
        if ends:
            return isinstance(found, Open | None)
        if not isinstance(found, Open) or found.step == "processing":
            return False
        if payment.status is not Status.PENDING:
            return True
        if not is_held_for(payment.hold_until, datetime.now(UTC), 0):
            return True
        return self._second_is_refused and await is_paid_otherwise(self._store, payment)

    def _is_to_be_completed(self, payment: Payment, found: Found) -> bool:
        """Whether the customer did what the client was told, and the provider waits for us: the
        money may have left the customer's account, and nobody else may ever come back."""
        if not isinstance(found, Open) or found.step != "authorized" or not payment.awaits_action:
            return False
        needed_s = self._gateway_timeout_s + HOLD_MARGIN_S
        return is_held_for(payment.hold_until, datetime.now(UTC), needed_s)

    async def _referenced_again(
        self, loaded: LoadedPayment, recorded: Recorded, at: "_At", *, ends: bool
    ) -> Recorded:
        """The log may have lost the provider's id of a charge that was begun before a loss of it,
        and what was captured under it: it is prepared again, which gives the same id. Before an
        abandonment that is done in any case: nobody need have noticed the loss."""
        payment = recorded.payment
        if payment.status is not Status.PENDING or not surely_unsent(at.gateway, payment):
            return recorded
        in_time = loaded.age_at_most_s(1) <= at.gateway.charge_retry_s
        if not (ends and in_time):
            began = loaded.read_at - timedelta(seconds=loaded.age_s()) - CLOCKS_APART
            if not await self._giving_back.lost_since(began):
                return recorded
            if not in_time:
                raise ReferenceNotFound("the log may have lost the provider's id of the charge")
        prepared = await at.gateway.prepare(provider_charge(payment), at.timeout_s())
        if isinstance(prepared, Declined):  # so there is none
            return recorded
        return await self._outcomes.append(
            *recorded, lambda payment: referenced(payment, prepared, _cause(loaded))
        )

    def _watched_long_enough(self, loaded: LoadedPayment, gateway: Gateway, found: Found) -> bool:
        """Whether a payment that was abandoned or declined can surely not be captured any more."""
        payment = loaded.payment
        if payment.status is not Status.FAILED or isinstance(found, Approved):
            return False
        if isinstance(found, Open) and found.step == "processing":
            return False  # it captures by itself, or declines
        late_capture_s = max(LATE_CAPTURE_S, gateway.late_capture_s)
        over = loaded.age_s(payment.version) > late_capture_s
        return payment.declined or isinstance(found, Declined) or over

    async def _settle_refunds(
        self,
        loaded: LoadedPayment,
        recorded: Recorded,
        attempts: int,
        at: "_At",
    ) -> Recorded:
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
                recorded = await self._settle_refund(loaded, recorded, refund, at)
            except (OutcomeUnknown, NeverSent, OutcomeMismatch, LogRewound) as error:
                failure = error
        if failure is not None:
            raise failure
        return recorded

    async def _return_late_capture(
        self, loaded: LoadedPayment, recorded: Recorded, late: LateCapture, at: "_At"
    ) -> Recorded:
        payment = recorded.payment
        order = ProviderRefund(
            refund_id=late.refund_id,
            payment_id=payment.id,
            provider_txn_id=late.provider_txn_id,
            amount_cents=payment.amount_cents,
            currency=payment.currency,
            reference=payment.provider_reference,
        )
        age_s = _age_at_most_s(loaded, late.version)
        outcome = await self._giving_back.send_again(
            at.gateway, order, age_s, at.timeout_s, unsent=True
        )
        return await self._outcomes.append(
            *recorded, lambda payment: return_outcome(payment, late, outcome, _cause(loaded))
        )

    async def _settle_refund(
        self, loaded: LoadedPayment, recorded: Recorded, refund: Refund, at: "_At"
    ) -> Recorded:
        age_s = _age_at_most_s(loaded, refund.version)
        order = provider_refund(recorded.payment, refund)
        outcome = await self._giving_back.send_again(at.gateway, order, age_s, at.timeout_s)
        return await self._outcomes.append(
            *recorded, lambda payment: refund_outcome(payment, refund, outcome, _cause(loaded))
        )


class _At(NamedTuple):
    """Where an attempt asks. `timeout_s` is called before each call; it may raise to prevent it."""

    gateway: Gateway
    timeout_s: Callable[[], float]


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
