"""One payment in every state that it can be in, as events."""

from collections.abc import Sequence
from datetime import UTC, datetime, timedelta
from typing import Any
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
from payments.payment.state import Payment, fold

ORDER_ID = UUID("f50d9fa2-5d3e-4e49-9a02-218ad32ef4a9")
PAYMENT_ID = UUID("058c9593-e150-402f-ab5b-37dd4c9816f0")
OTHER_ID = UUID("11111111-1111-4111-8111-111111111111")
# What the keys r1 and r2 mean for this payment; a refund without a key; a late capture's return.
R1 = UUID("f8827278-9918-4c25-a226-83d3043fb3d9")
R2 = UUID("afacf3ab-0d98-4539-a164-910ca329b36d")
UNKEYED = UUID("22222222-2222-4222-8222-222222222222")
LATE = UUID("31ede0d5-849d-4305-9d76-63209442e8f3")
CAPTURED_CENTS = 1500
T0 = datetime(2026, 1, 2, 3, 4, 5, 6, tzinfo=UTC)


def at(version: int) -> datetime:
    """When the fact of this version happened: one a second."""
    return T0 + timedelta(seconds=version - 1)


def about(version: int, amount_cents: int = CAPTURED_CENTS) -> dict[str, Any]:
    """What every fact of this payment holds."""
    return {
        "payment_id": PAYMENT_ID,
        "version": version,
        "event_id": UUID(int=version),
        "occurred_at": at(version),
        "client": "order",
        "request_id": "request-1",
        "traceparent": "00-" + "a" * 32 + "-1-01",
        "merchant_order_id": ORDER_ID,
        "amount_cents": amount_cents,
        "currency": "INR",
    }


def changed(fact: Fact, **fields: Any) -> Fact:
    return msgspec.structs.replace(fact, **fields)


def began(version: int, refund_id: UUID, amount_cents: int, *, whole: bool = False) -> Fact:
    key = {R1: "r1", R2: "r2"}.get(refund_id)
    shared = about(version, amount_cents)
    return RefundInitiated(**shared, refund_id=refund_id, idempotency_key=key, whole=whole)


def given_back(version: int, refund_id: UUID, amount_cents: int, in_total: int) -> Fact:
    return PaymentRefunded(
        **about(version, amount_cents),
        refund_id=refund_id,
        provider_refund_id="re-1",
        refunded_cents=in_total,
        captured_cents=CAPTURED_CENTS,
    )


def refused(version: int, refund_id: UUID, amount_cents: int) -> Fact:
    return RefundFailed(
        **about(version, amount_cents), refund_id=refund_id, decline_code="account_closed"
    )


INITIATED = PaymentInitiated(
    **about(1),
    idempotency_key="abc123",
    fingerprint="aca6776269074565b9d8c8676dbdccb86bff9aa57bc7600de6dc98e9989d323c",
    gateway="simulated",
)
REFERENCED = PaymentReferenced(**about(2), provider_reference="pi_1")
ACTION = PaymentActionRequired(**about(2), kind="redirect")
CHARGED = PaymentCharged(**about(2), provider_txn_id="txn-1")
DECLINED = PaymentFailed(**about(2), reason="declined", decline_code="no_funds")
ABANDONED = PaymentFailed(**about(2), reason="abandoned")
FOUND = LateCaptureFound(**about(3), refund_id=LATE, provider_txn_id="txn-1")
RETURNED = LateCaptureReturned(**about(4), refund_id=LATE, provider_refund_id="re-1")
R1_BEGAN = began(3, R1, 500)
R1_BACK = given_back(4, R1, 500, 500)
SUCCESS: list[Fact] = [INITIATED, CHARGED]

# Every state that a payment can be in, as the events that lead there.
STREAMS: dict[str, list[Fact]] = {
    "none": [],
    "PENDING": [INITIATED],
    "referenced": [INITIATED, REFERENCED],
    "to act": [INITIATED, ACTION],
    "referenced, to act": [INITIATED, REFERENCED, changed(ACTION, version=3)],
    "SUCCESS": SUCCESS,
    "500 under way": [*SUCCESS, R1_BEGAN],
    "all under way": [*SUCCESS, began(3, UNKEYED, 1500, whole=True)],
    "500 back": [*SUCCESS, R1_BEGAN, R1_BACK],
    "500 back, 300 going": [*SUCCESS, R1_BEGAN, R1_BACK, began(5, R2, 300)],
    "300 back, 500 refused": [
        *SUCCESS,
        began(3, R2, 300),
        began(4, R1, 500),
        given_back(5, R2, 300, 300),
        refused(6, R1, 500),
    ],
    "REFUNDED at once": [
        *SUCCESS,
        began(3, R1, 1500, whole=True),
        given_back(4, R1, 1500, 1500),
    ],
    "REFUNDED in parts": [
        *SUCCESS,
        R1_BEGAN,
        began(4, R2, 300),
        given_back(5, R2, 300, 300),
        given_back(6, R1, 500, 800),
        began(7, UNKEYED, 700, whole=True),
        given_back(8, UNKEYED, 700, 1500),
    ],
    "FAILED declined": [INITIATED, DECLINED],
    "FAILED abandoned": [INITIATED, ABANDONED],
    "late capture found": [INITIATED, ABANDONED, FOUND],
    "late capture returned": [INITIATED, ABANDONED, FOUND, RETURNED],
}
STATES = [state for state in STREAMS if state != "none"]


def payment_after(facts: Sequence[Fact]) -> Payment:
    payment = fold(facts)
    assert payment is not None
    return payment


def payment_in(state: str) -> Payment:
    return payment_after(STREAMS[state])
