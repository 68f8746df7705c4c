"""Which event may come next: from a payment and what is asked for, or what a provider answered.

Pure, like state.py. A deciding function returns the event to append, None if the events already
say it, or raises why there is none.
"""

from datetime import datetime, timedelta
from typing import Any
from uuid import UUID

import msgspec

from payments.errors import (
    IdempotencyKeyReused,
    PaymentAlreadyRefunded,
    PaymentNotRefundable,
    RefundExceedsCapture,
)
from payments.events.facts import (
    LateCaptureFound,
    LateCaptureReturned,
    PaymentActionRequired,
    PaymentCharged,
    PaymentFailed,
    PaymentInitiated,
    PaymentReferenced,
    PaymentRefunded,
    RefundFailed,
    RefundInitiated,
)
from payments.payment.identity import (
    ChargeRequest,
    RefundRequest,
    fingerprint,
    late_capture_refund_id,
    payment_id_for,
    refund_id_for,
    told_to,
    unfulfilled_refund_id,
)
from payments.payment.state import Approved, Declined, LateCapture, Payment, Refund, Status

# Of one payment: those that went through or are under way, and all, with those that the provider
# refused. A stream is read as a whole, and that must stay quick.
REFUNDS_MAX = 100
REFUND_ATTEMPTS_MAX = 1000


class OutcomeMismatch(Exception):
    """The provider's answer does not fit what was asked for, or contradicts the events."""


class Cause(msgspec.Struct, frozen=True, kw_only=True):
    """Who asked for an event, and when: what the deciding functions put into every fact.

    `client` is the API client's name; `traceparent` is a W3C trace context header.
    """

    event_id: UUID
    occurred_at: datetime
    client: str
    request_id: str | None = None
    traceparent: str | None = None


def is_held_for(hold_until: datetime | None, now: datetime, seconds: float) -> bool:
    """Whether seats are held for at least so long from now; without a hold that is not known, and
    taken for yes."""
    return hold_until is None or hold_until - now >= timedelta(seconds=seconds)


def initiate(
    request: ChargeRequest,
    gateway: str,
    cause: Cause,
    hold_until: datetime | None = None,
    provider_reference: str | None = None,
) -> PaymentInitiated:
    """`hold_until` is no part of the request: the first one that is stored counts.
    `provider_reference` is the provider's own id of the charge, if the payment method names it."""
    return PaymentInitiated(
        payment_id=payment_id_for(request.idempotency_key),
        version=1,
        idempotency_key=request.idempotency_key,
        fingerprint=fingerprint(request),
        merchant_order_id=request.merchant_order_id,
        amount_cents=request.amount_cents,
        currency=request.currency,
        gateway=gateway,
        hold_until=msgspec.UNSET if hold_until is None else hold_until,
        provider_reference=msgspec.UNSET if provider_reference is None else provider_reference,
        **_metadata(cause),
    )


def charge_outcome(
    payment: Payment, outcome: Approved | Declined, cause: Cause
) -> PaymentCharged | PaymentFailed | LateCaptureFound | None:
    """The event for what the provider says became of a charge.

    Raises OutcomeMismatch if that is not about this payment, or contradicts its outcome: a decline
    of what was captured, or a second capture.
    """
    if isinstance(outcome, Declined):
        if payment.outcome is Status.SUCCESS:
            raise OutcomeMismatch("the provider declines what it had captured")
        if payment.outcome is Status.FAILED:
            return None
        return PaymentFailed(
            reason="declined", decline_code=outcome.code, **_next(payment, payment, cause)
        )
    _check_answer(outcome, payment.id, payment.amount_cents, payment.currency)
    if payment.outcome is Status.PENDING:
        return PaymentCharged(
            provider_txn_id=outcome.provider_txn_id, **_next(payment, payment, cause)
        )
    known = payment.late_capture or payment
    if payment.outcome is Status.FAILED and payment.late_capture is None:
        return LateCaptureFound(
            refund_id=late_capture_refund_id(payment.id),
            provider_txn_id=outcome.provider_txn_id,
            **_next(payment, payment, cause),
        )
    if known.provider_txn_id != outcome.provider_txn_id:
        raise OutcomeMismatch("the provider has captured the payment twice")
    return None


def referenced(payment: Payment, reference: str, cause: Cause) -> PaymentReferenced | None:
    """The event for the id that the provider gave the charge when it prepared it.

    None also if the payment has an outcome by now: then nothing may be captured under it.
    Raises OutcomeMismatch if the charge has another one.
    """
    if payment.provider_reference not in (None, reference):
        raise OutcomeMismatch("the provider has prepared the charge twice")
    if payment.provider_reference is not None or payment.status is not Status.PENDING:
        return None
    return PaymentReferenced(provider_reference=reference, **_next(payment, payment, cause))


def require_action(payment: Payment, kind: str, cause: Cause) -> PaymentActionRequired | None:
    """The event for a client that is told, for the first time, that its customer has to act."""
    if payment.action_required or payment.status is not Status.PENDING:
        return None
    return PaymentActionRequired(kind=kind, **_next(payment, payment, cause))


def abandon(payment: Payment, cause: Cause) -> PaymentFailed | None:
    """The end of a payment that the provider does not know of."""
    if payment.outcome is not Status.PENDING:
        return None
    return PaymentFailed(reason="abandoned", **_next(payment, payment, cause))


def known_refund(payment: Payment, request: RefundRequest) -> Refund | None:
    """The refund that an earlier request like this one began.

    Raises IdempotencyKeyReused if the key was used for another refund of this payment.
    """
    if request.unfulfilled:
        return payment.refund(unfulfilled_refund_id(payment.id))
    if request.idempotency_key is None:
        unkeyed = (refund for refund in payment.refunds if refund.idempotency_key is None)
        return next((refund for refund in unkeyed if refund.status is Status.PENDING), None)
    refund = payment.refund(refund_id_for(payment.id, request.idempotency_key))
    if refund is None:
        return None
    same_amount = request.amount_cents == refund.amount_cents or (
        request.amount_cents is None and refund.whole
    )
    if differing := told_to(refund, request.client, () if same_amount else ("amount_cents",)):
        raise IdempotencyKeyReused(differing)
    return refund


def initiate_refund(payment: Payment, request: RefundRequest, cause: Cause) -> RefundInitiated:
    """Reserves the amount of a refund that is not known yet.

    Raises PaymentNotRefundable, PaymentAlreadyRefunded or RefundExceedsCapture.
    """
    if payment.outcome is not Status.SUCCESS:
        raise PaymentNotRefundable(
            f"The payment is {payment.status}; only a captured payment can be refunded."
        )
    if payment.status is Status.REFUNDED:
        raise PaymentAlreadyRefunded("The whole amount is already refunded.")
    if len(payment.refunds) >= REFUND_ATTEMPTS_MAX:
        raise PaymentNotRefundable(
            f"{REFUND_ATTEMPTS_MAX} refunds were requested, including those that the provider "
            "refused: the limit for a payment."
        )
    if sum(refund.status is not Status.FAILED for refund in payment.refunds) >= REFUNDS_MAX:
        raise PaymentNotRefundable(f"It has {REFUNDS_MAX} refunds, the limit for a payment.")
    left = payment.remaining_cents
    amount = left if request.amount_cents is None else request.amount_cents
    if not 0 < amount <= left:
        under_way = payment.reserved_cents
        raise RefundExceedsCapture(
            f"Of {payment.amount_cents} captured, {payment.refunded_cents} are refunded"
            + (f" and {under_way} are being refunded" if under_way else "")
            + f": at most {left} can be refunded."
        )
    key = request.idempotency_key
    if request.unfulfilled:
        refund_id = unfulfilled_refund_id(payment.id)
    else:
        # Without a key nobody will name this refund again: its own event's id is as good as any.
        refund_id = cause.event_id if key is None else refund_id_for(payment.id, key)
    whole = request.amount_cents is None
    return _reservation(payment, refund_id, key, amount, cause, whole=whole)


def _reservation(
    payment: Payment,
    refund_id: UUID,
    idempotency_key: str | None,
    amount_cents: int,
    cause: Cause,
    *,
    whole: bool,
) -> RefundInitiated:
    return RefundInitiated(
        payment_id=payment.id,
        version=payment.version + 1,
        refund_id=refund_id,
        idempotency_key=idempotency_key,
        merchant_order_id=payment.merchant_order_id,
        amount_cents=amount_cents,
        currency=payment.currency,
        whole=whole,
        **_metadata(cause),
    )


def refund_outcome(
    payment: Payment, refund: Refund, outcome: Approved | Declined, cause: Cause
) -> RefundInitiated | PaymentRefunded | RefundFailed | None:
    """The event for what the provider says became of a refund; OutcomeMismatch as above.

    If the log lost the refund, and does not hold what was lost any more as it was, its amount is
    reserved again first; OutcomeMismatch if that does not fit.
    """
    stored = payment.refund(refund.id)
    if stored is None:
        if isinstance(outcome, Declined):
            return None
        _check_answer(outcome, refund.id, refund.amount_cents, payment.currency)
        return _reserve_again(payment, refund, cause)
    if isinstance(outcome, Declined):
        if stored.status is Status.SUCCESS:
            raise OutcomeMismatch("the provider declines a refund that it had made")
        if stored.status is Status.FAILED:
            return None
        return RefundFailed(
            refund_id=stored.id, decline_code=outcome.code, **_next(payment, stored, cause)
        )
    _check_answer(outcome, stored.id, stored.amount_cents, payment.currency)
    if stored.status is Status.FAILED:
        raise OutcomeMismatch("the provider has made a refund that it had declined")
    if stored.status is Status.SUCCESS:
        if stored.provider_refund_id != outcome.provider_txn_id:
            raise OutcomeMismatch("the provider has made the refund twice")
        return None
    return PaymentRefunded(
        refund_id=stored.id,
        provider_refund_id=outcome.provider_txn_id,
        refunded_cents=payment.refunded_cents + stored.amount_cents,
        captured_cents=payment.amount_cents,
        **_next(payment, stored, cause),
    )


def _reserve_again(payment: Payment, refund: Refund, cause: Cause) -> RefundInitiated:
    if not 0 < refund.amount_cents <= payment.remaining_cents:
        raise OutcomeMismatch("the provider made a refund that the log lost and has no room for")
    return _reservation(
        payment,
        refund.id,
        refund.idempotency_key,
        refund.amount_cents,
        msgspec.structs.replace(cause, client=refund.client),
        whole=refund.whole,
    )


def return_outcome(
    payment: Payment, found: LateCapture, outcome: Approved | Declined, cause: Cause
) -> LateCaptureFound | LateCaptureReturned | None:
    """The event for sending a late capture back; OutcomeMismatch also if the provider refuses.

    `found` is the late capture that was sent back. If the log lost it, it is found again first.
    """
    if isinstance(outcome, Declined):
        raise OutcomeMismatch("the provider declines to return a late capture")
    _check_answer(outcome, found.refund_id, payment.amount_cents, payment.currency)
    stored = payment.late_capture
    if stored is None:
        if payment.status is not Status.FAILED:
            raise OutcomeMismatch("the provider returned a capture that now counts as paid")
        return LateCaptureFound(
            refund_id=found.refund_id,
            provider_txn_id=found.provider_txn_id,
            **_next(payment, payment, cause),
        )
    if stored.provider_refund_id is not None:
        if stored.provider_refund_id != outcome.provider_txn_id:
            raise OutcomeMismatch("the provider has returned a late capture twice")
        return None
    return LateCaptureReturned(
        refund_id=stored.refund_id,
        provider_refund_id=outcome.provider_txn_id,
        **_next(payment, payment, cause),
    )


def _check_answer(outcome: Approved, id: UUID, amount_cents: int, currency: str) -> None:
    if (outcome.id, outcome.amount_cents, outcome.currency) != (id, amount_cents, currency):
        raise OutcomeMismatch("the provider responded with another id, amount or currency")


def _next(payment: Payment, about: Payment | Refund, cause: Cause) -> dict[str, Any]:
    """What every fact after the first holds."""
    return {
        "payment_id": payment.id,
        "version": payment.version + 1,
        "merchant_order_id": payment.merchant_order_id,
        "amount_cents": about.amount_cents,
        "currency": payment.currency,
        **_metadata(cause),
    }


def _metadata(cause: Cause) -> dict[str, Any]:
    return {
        "event_id": cause.event_id,
        "occurred_at": cause.occurred_at,
        "client": cause.client,
        "request_id": cause.request_id,
        "traceparent": cause.traceparent,
    }
