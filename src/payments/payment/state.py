"""The payment: what its events amount to.

Pure: no I/O, no clock, no randomness. Commands load events, `fold` them, ask a function of
decisions.py for the next event, and append it.
"""

from collections.abc import Callable, Iterable
from datetime import datetime
from enum import StrEnum
from typing import Any, Literal, TypeVar
from uuid import UUID

import msgspec

from payments.events.facts import (
    Fact,
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

T = TypeVar("T")

ABANDONED, DECLINED = "abandoned", "declined"  # why a payment is FAILED
IMPORTED = "imported"  # or it was FAILED in the service before this one, which did not say why


class Status(StrEnum):
    PENDING = "PENDING"
    SUCCESS = "SUCCESS"
    FAILED = "FAILED"
    REFUNDED = "REFUNDED"


class Refund(msgspec.Struct, frozen=True, kw_only=True):
    """One refund of a payment: PENDING, SUCCESS or FAILED.

    `version` is that of its RefundInitiated. `refunded_cents` is what had been given back of the
    payment in total once this refund went through, 0 until then.
    """

    id: UUID
    version: int
    idempotency_key: str | None
    client: str
    amount_cents: int
    whole: bool
    status: Status
    created_at: datetime
    updated_at: datetime
    refunded_cents: int = 0
    provider_refund_id: str | None = None
    decline_code: str | None = None


class LateCapture(msgspec.Struct, frozen=True, kw_only=True):
    """Money that the provider captured for a FAILED payment, on its way back or there.

    `version` is that of its LateCaptureFound.
    """

    refund_id: UUID
    version: int
    found_at: datetime
    provider_txn_id: str
    provider_refund_id: str | None = None


class Unsettled(msgspec.Struct, frozen=True):
    """Why the provider must be asked about a payment again, and since when."""

    kind: Literal["charge", "abandoned", "late_capture", "refund"]
    since: datetime


class Payment(msgspec.Struct, frozen=True, kw_only=True):
    """A payment as its events so far describe it.

    `imported`: the service before this one charged it. Nobody is asked what became of that, and
    nothing of it is called back. `provider_reference` is the provider's own id of the charge, None
    while it has none, or if the provider knows it by our id. `action_required`: the client was told
    that its customer has to act.
    """

    id: UUID
    version: int
    merchant_order_id: UUID
    idempotency_key: str
    fingerprint: str
    client: str
    amount_cents: int
    currency: str
    gateway: str
    status: Status
    created_at: datetime
    updated_at: datetime
    hold_until: datetime | None = None
    provider_reference: str | None = None
    action_required: bool = False
    provider_txn_id: str | None = None
    failure: str | None = None
    decline_code: str | None = None
    refunds: tuple[Refund, ...] = ()
    late_capture: LateCapture | None = None
    imported: bool = False

    @property
    def outcome(self) -> Status:
        """What its charge came to: PENDING, SUCCESS or FAILED, whatever was refunded since."""
        return Status.SUCCESS if self.status is Status.REFUNDED else self.status

    @property
    def awaits_action(self) -> bool:
        """Whether the provider captures nothing before the customer has acted."""
        return self.action_required and self.status is Status.PENDING

    @property
    def declined(self) -> bool:
        return self.failure == DECLINED

    @property
    def refunded_cents(self) -> int:
        return self._refund_cents(Status.SUCCESS)

    @property
    def reserved_cents(self) -> int:
        """What refunds under way may still give back."""
        return self._refund_cents(Status.PENDING)

    @property
    def remaining_cents(self) -> int:
        """What may still be asked back."""
        if self.outcome is not Status.SUCCESS:
            return 0
        return self.amount_cents - self.refunded_cents - self.reserved_cents

    @property
    def unsettled(self) -> "Unsettled | None":
        """What is left to find out at the provider, the most urgent thing of several."""
        if self.status is Status.PENDING:
            return None if self.imported else Unsettled("charge", self.created_at)
        if self.status is Status.FAILED:
            if self.late_capture is not None:
                returned = self.late_capture.provider_refund_id is not None
                return None if returned else Unsettled("late_capture", self.late_capture.found_at)
            # The provider does not know of it, and may yet capture it.
            return Unsettled("abandoned", self.created_at) if self.failure == ABANDONED else None
        under_way = [each for each in self.refunds if each.status is Status.PENDING]
        return Unsettled("refund", under_way[0].created_at) if under_way else None

    def refund(self, refund_id: UUID) -> Refund | None:
        return next((refund for refund in self.refunds if refund.id == refund_id), None)

    def _refund_cents(self, status: Status) -> int:
        return sum(refund.amount_cents for refund in self.refunds if refund.status is status)


class Approved(msgspec.Struct, frozen=True):
    """The provider captured the money, or gave it back; everything is as the provider states it.

    `id` is ours, which the provider was given: the payment's, or the refund's. `provider_txn_id`
    is the provider's own id of the capture or of the refund. Not for keywords alone: gateways that
    others wrote build it by position.
    """

    id: UUID
    amount_cents: int
    currency: str
    provider_txn_id: str


class Declined(msgspec.Struct, frozen=True):
    """The provider refused, and will not change its mind under this id."""

    code: str


class UnexpectedEvent(Exception):
    """A fact that cannot follow the ones before it: the stream is damaged."""


def fold(facts: Iterable[Fact], payment: Payment | None = None) -> Payment | None:
    """The payment after these facts, continuing from `payment` if given.

    Raises UnexpectedEvent if a fact cannot stand where it stands.
    """
    for fact in facts:
        payment = evolve(payment, fact)
    return payment


def evolve(payment: Payment | None, fact: Fact) -> Payment:
    """The payment after one more fact."""
    if payment is None:
        if not isinstance(fact, PaymentInitiated) or fact.version != 1:
            raise UnexpectedEvent(f"a stream cannot begin with {fact.TOPIC} {fact.version}")
        return _begin(fact)
    if fact.version != payment.version + 1 or fact.payment_id != payment.id:
        raise UnexpectedEvent(f"{fact.TOPIC} {fact.version} cannot follow {payment.version}")
    changes = _CHANGES[type(fact)](payment, fact)
    return msgspec.structs.replace(
        payment,
        version=fact.version,
        # The clocks of two processes may differ; time never runs backwards for a reader.
        updated_at=max(payment.updated_at, fact.occurred_at),
        **changes,
    )


def _begin(fact: PaymentInitiated) -> Payment:
    return Payment(
        id=fact.payment_id,
        version=fact.version,
        merchant_order_id=fact.merchant_order_id,
        idempotency_key=fact.idempotency_key,
        fingerprint=fact.fingerprint,
        client=fact.client,
        amount_cents=fact.amount_cents,
        currency=fact.currency,
        gateway=fact.gateway,
        status=Status.PENDING,
        created_at=fact.occurred_at,
        hold_until=_unless_unset(fact.hold_until),
        provider_reference=_unless_unset(fact.provider_reference),
        updated_at=fact.occurred_at if not fact.legacy else fact.legacy.updated_at,
        provider_txn_id=None if not fact.legacy else fact.legacy.provider_txn_id,
        imported=fact.imported is True,
    )


def _initiated(payment: Payment, fact: PaymentInitiated) -> dict[str, Any]:
    raise UnexpectedEvent("a payment begins once")


def _unless_unset(value: T | msgspec.UnsetType) -> T | None:
    return None if value is msgspec.UNSET else value


def _referenced(payment: Payment, fact: PaymentReferenced) -> dict[str, Any]:
    fits = payment.status is Status.PENDING and payment.provider_reference is None
    _check(payment, fact, fits, payment.amount_cents)
    return {"provider_reference": fact.provider_reference}


def _action_required(payment: Payment, fact: PaymentActionRequired) -> dict[str, Any]:
    _check(
        payment,
        fact,
        not payment.action_required and payment.status is Status.PENDING,
        payment.amount_cents,
    )
    return {"action_required": True}


def _charged(payment: Payment, fact: PaymentCharged) -> dict[str, Any]:
    _check(payment, fact, payment.status is Status.PENDING, payment.amount_cents)
    return {"status": Status.SUCCESS, "provider_txn_id": _known(fact, fact.provider_txn_id)}


def _failed(payment: Payment, fact: PaymentFailed) -> dict[str, Any]:
    _check(payment, fact, payment.status is Status.PENDING, payment.amount_cents)
    return {
        "status": Status.FAILED,
        "failure": IMPORTED if fact.imported is True else fact.reason,
        "decline_code": fact.decline_code,
    }


def _refund_initiated(payment: Payment, fact: RefundInitiated) -> dict[str, Any]:
    fits = 0 < fact.amount_cents <= payment.remaining_cents and not payment.refund(fact.refund_id)
    _check(payment, fact, fits, fact.amount_cents)
    refund = Refund(
        id=fact.refund_id,
        version=fact.version,
        idempotency_key=fact.idempotency_key,
        client=fact.client,
        amount_cents=fact.amount_cents,
        whole=fact.whole,
        status=Status.PENDING,
        created_at=fact.occurred_at,
        updated_at=fact.occurred_at,
    )
    return {"refunds": (*payment.refunds, refund)}


def _refunded(payment: Payment, fact: PaymentRefunded) -> dict[str, Any]:
    refund = _pending_refund(payment, fact)
    given_back = payment.refunded_cents + refund.amount_cents
    totals = (fact.refunded_cents, fact.captured_cents)
    _check(payment, fact, totals == (given_back, payment.amount_cents), refund.amount_cents)
    changes = _refund_changes(
        payment,
        refund,
        fact,
        status=Status.SUCCESS,
        refunded_cents=given_back,
        provider_refund_id=_known(fact, fact.provider_refund_id),
    )
    if given_back == payment.amount_cents:
        changes["status"] = Status.REFUNDED
    return changes


def _refund_failed(payment: Payment, fact: RefundFailed) -> dict[str, Any]:
    refund = _pending_refund(payment, fact)
    _check(payment, fact, True, refund.amount_cents)
    return _refund_changes(
        payment, refund, fact, status=Status.FAILED, decline_code=fact.decline_code
    )


def _late_capture_found(payment: Payment, fact: LateCaptureFound) -> dict[str, Any]:
    fits = payment.status is Status.FAILED and payment.late_capture is None
    _check(payment, fact, fits, payment.amount_cents)
    return {
        "late_capture": LateCapture(
            refund_id=fact.refund_id,
            version=fact.version,
            found_at=fact.occurred_at,
            provider_txn_id=fact.provider_txn_id,
        )
    }


def _late_capture_returned(payment: Payment, fact: LateCaptureReturned) -> dict[str, Any]:
    found = payment.late_capture
    if found is None or found.provider_refund_id is not None or found.refund_id != fact.refund_id:
        raise UnexpectedEvent(f"{fact.TOPIC} cannot follow {payment.status}")
    _check(payment, fact, True, payment.amount_cents)
    returned = msgspec.structs.replace(found, provider_refund_id=fact.provider_refund_id)
    return {"late_capture": returned}


def _known(fact: Fact, provider_id: str) -> str | None:
    """Where the service before this one kept no id of the provider's, "" is stored."""
    return None if fact.imported is True and not provider_id else provider_id


def _pending_refund(payment: Payment, fact: PaymentRefunded | RefundFailed) -> Refund:
    refund = payment.refund(fact.refund_id)
    if refund is None or refund.status is not Status.PENDING:
        raise UnexpectedEvent(f"{fact.TOPIC} without a refund that is under way")
    return refund


def _refund_changes(
    payment: Payment, refund: Refund, fact: Fact, **changes: Any
) -> dict[str, tuple[Refund, ...] | Status]:
    updated_at = max(refund.updated_at, fact.occurred_at)
    changed = msgspec.structs.replace(refund, updated_at=updated_at, **changes)
    return {"refunds": tuple(changed if each is refund else each for each in payment.refunds)}


def _check(payment: Payment, fact: Any, fits: bool, amount_cents: int) -> None:
    """Whether the fact may stand here, and is about the same order, amount and currency."""
    if not fits:
        raise UnexpectedEvent(f"{fact.TOPIC} cannot follow {payment.status}")
    same = (payment.merchant_order_id, amount_cents, payment.currency)
    if (fact.merchant_order_id, fact.amount_cents, fact.currency) != same:
        raise UnexpectedEvent(f"{fact.TOPIC} is about another order, amount or currency")


_CHANGES: dict[type[Fact], Callable[[Payment, Any], dict[str, Any]]] = {
    PaymentInitiated: _initiated,
    PaymentReferenced: _referenced,
    PaymentActionRequired: _action_required,
    PaymentCharged: _charged,
    PaymentFailed: _failed,
    RefundInitiated: _refund_initiated,
    PaymentRefunded: _refunded,
    RefundFailed: _refund_failed,
    LateCaptureFound: _late_capture_found,
    LateCaptureReturned: _late_capture_returned,
}
