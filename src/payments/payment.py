"""The payment: what its events amount to, and which event may come next.

Pure: no I/O, no clock, no randomness. Commands load events, `fold` them, ask one of the deciding
functions for the next event, and append it.
"""

import hashlib
from collections.abc import Iterable
from datetime import datetime
from enum import StrEnum
from typing import Any
from uuid import UUID

import msgspec

from payments.events.facts import Fact, PaymentCharged, PaymentFailed, PaymentInitiated

# Fixed for ever: another namespace would give every old key a new payment.
_NAMESPACE = b"payment-service/idempotency-key/1\x00"


class Status(StrEnum):
    PENDING = "PENDING"
    SUCCESS = "SUCCESS"
    FAILED = "FAILED"
    REFUNDED = "REFUNDED"


class Cause(msgspec.Struct, frozen=True):
    """Who asked for an event, and when: what the deciding functions put into every fact.

    `client` is the API client's name; `traceparent` is a W3C trace context header.
    """

    event_id: UUID
    occurred_at: datetime
    client: str
    request_id: str | None = None
    traceparent: str | None = None


class ChargeRequest(msgspec.Struct, frozen=True):
    """What Order Service asks for. Two requests with one key are the same if all of this is equal.

    `payment_method` is a provider's token; it is passed on and never stored.
    """

    idempotency_key: str
    merchant_order_id: UUID
    amount_cents: int
    currency: str
    client: str
    payment_method: str | None = None


class Payment(msgspec.Struct, frozen=True, kw_only=True):
    """A payment as its events so far describe it."""

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
    provider_txn_id: str | None = None
    decline_code: str | None = None


class Approved(msgspec.Struct, frozen=True):
    """The provider captured the money. Id, amount and currency are as the provider states them."""

    payment_id: UUID
    amount_cents: int
    currency: str
    provider_txn_id: str


class Declined(msgspec.Struct, frozen=True):
    """The provider refused, and will not change its mind under this payment id."""

    code: str


class UnexpectedEvent(Exception):
    """A fact that cannot follow the ones before it: the stream is damaged."""


class OutcomeMismatch(Exception):
    """The provider answered for another payment, amount or currency than was asked for."""


def payment_id_for(idempotency_key: str) -> UUID:
    """The payment that this key means, for ever: docs/decisions/payment-id.md."""
    digest = hashlib.sha256(_NAMESPACE + idempotency_key.encode()).digest()
    return UUID(bytes=digest[:16], version=4)


def fingerprint(request: ChargeRequest) -> str:
    """SHA-256 of everything in the request but the key, in hex."""
    parts = (
        request.client,
        request.merchant_order_id,
        request.amount_cents,
        request.currency,
        request.payment_method,
    )
    return hashlib.sha256(msgspec.json.encode(parts)).hexdigest()


def differing_fields(payment: Payment, request: ChargeRequest) -> tuple[str, ...]:
    """Which parts of the request differ from the one that began this payment; () if none does."""
    if payment.fingerprint == fingerprint(request):
        return ()
    differing = tuple(
        name
        for name in ("merchant_order_id", "amount_cents", "currency", "client")
        if getattr(payment, name) != getattr(request, name)
    )
    return differing or ("payment_method",)  # the one part that is not stored


def initiate(request: ChargeRequest, gateway: str, cause: Cause) -> PaymentInitiated:
    return PaymentInitiated(
        payment_id=payment_id_for(request.idempotency_key),
        version=1,
        event_id=cause.event_id,
        occurred_at=cause.occurred_at,
        client=cause.client,
        request_id=cause.request_id,
        traceparent=cause.traceparent,
        idempotency_key=request.idempotency_key,
        fingerprint=fingerprint(request),
        merchant_order_id=request.merchant_order_id,
        amount_cents=request.amount_cents,
        currency=request.currency,
        gateway=gateway,
    )


def record_outcome(
    payment: Payment, outcome: Approved | Declined, cause: Cause
) -> PaymentCharged | PaymentFailed | None:
    """The event for what the provider answered; None if the payment already has that outcome.

    Raises OutcomeMismatch if the answer is not about this payment, or contradicts its outcome.
    """
    if isinstance(outcome, Approved):
        answered = (outcome.payment_id, outcome.amount_cents, outcome.currency)
        if answered != (payment.id, payment.amount_cents, payment.currency):
            raise OutcomeMismatch("the provider answered for another id, amount or currency")
    if payment.status is not Status.PENDING:
        if (payment.status is Status.FAILED) is isinstance(outcome, Declined):
            return None
        raise OutcomeMismatch(f"the provider's answer contradicts the stored {payment.status}")
    shared: dict[str, Any] = {
        "payment_id": payment.id,
        "version": payment.version + 1,
        "event_id": cause.event_id,
        "occurred_at": cause.occurred_at,
        "client": cause.client,
        "request_id": cause.request_id,
        "traceparent": cause.traceparent,
        "merchant_order_id": payment.merchant_order_id,
        "amount_cents": payment.amount_cents,
        "currency": payment.currency,
    }
    if isinstance(outcome, Approved):
        return PaymentCharged(provider_txn_id=outcome.provider_txn_id, **shared)
    return PaymentFailed(reason="declined", decline_code=outcome.code, **shared)


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
    if isinstance(fact, PaymentCharged | PaymentFailed):
        _check_same_money(payment, fact)
    if isinstance(fact, PaymentCharged) and payment.status is Status.PENDING:
        return msgspec.structs.replace(
            payment,
            version=fact.version,
            status=Status.SUCCESS,
            provider_txn_id=fact.provider_txn_id,
            updated_at=fact.occurred_at,
        )
    if isinstance(fact, PaymentFailed) and payment.status is Status.PENDING:
        return msgspec.structs.replace(
            payment,
            version=fact.version,
            status=Status.FAILED,
            decline_code=fact.decline_code,
            updated_at=fact.occurred_at,
        )
    raise UnexpectedEvent(f"{fact.TOPIC} cannot follow {payment.status}")


def _check_same_money(payment: Payment, fact: PaymentCharged | PaymentFailed) -> None:
    if (fact.merchant_order_id, fact.amount_cents, fact.currency) != (
        payment.merchant_order_id,
        payment.amount_cents,
        payment.currency,
    ):
        raise UnexpectedEvent(f"{fact.TOPIC} is about another order, amount or currency")


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
        updated_at=fact.occurred_at,
    )
