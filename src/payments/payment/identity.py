"""What a request means for ever: which payment, refund or event, and whether two are the same.

Pure, like state.py.
"""

import hashlib
from functools import lru_cache
from uuid import UUID

import msgspec

from payments.payment.state import Payment, Refund

# Fixed for ever: another namespace would give every old key a new payment or a new refund.
_PAYMENT_NAMESPACE = b"payment-service/idempotency-key/1\x00"
_REFUND_NAMESPACE = b"payment-service/refund/1\x00"
_LATE_CAPTURE_NAMESPACE = b"payment-service/late-capture/1\x00"
_UNFULFILLED_NAMESPACE = b"payment-service/unfulfilled/1\x00"
_IMPORT_NAMESPACE = b"payment-service/imported-event/1\x00"

# What an Idempotency-Key may be: printable ASCII without blanks at its ends, which are no part of a
# header's value.
KEY_MAX = 255
KEY_PATTERN = r"^[\x21-\x7e](?:[\x20-\x7e]{0,253}[\x21-\x7e])?$"


class ChargeRequest(msgspec.Struct, frozen=True, kw_only=True):
    """What Order Service asks for. Two requests with one key are the same if all of this is equal.

    `payment_method` is a provider's token; it is passed on and never stored.
    """

    idempotency_key: str
    merchant_order_id: UUID
    amount_cents: int
    currency: str
    client: str
    payment_method: str | None = None


class RefundRequest(msgspec.Struct, frozen=True, kw_only=True):
    """A refund of `amount_cents`, or without it of whatever is left.

    The key counts within its payment. Without one there is no amount either, and a request while
    such a refund is under way means that one.

    `unfulfilled`: the service asks by itself, since the payment's order failed. It has neither a
    key nor an amount, and means the one such refund that a payment may have.
    """

    payment_id: UUID
    amount_cents: int | None
    idempotency_key: str | None
    client: str
    unfulfilled: bool = False


@lru_cache(maxsize=1024)  # a charge asks several times
def payment_id_for(idempotency_key: str) -> UUID:
    """The payment that this key means, for ever: docs/decisions/payment-id.md."""
    return _derived(_PAYMENT_NAMESPACE, idempotency_key.encode())


def refund_id_for(payment_id: UUID, idempotency_key: str) -> UUID:
    """The refund of this payment that this key means, for ever."""
    return _derived(_REFUND_NAMESPACE, payment_id.bytes + idempotency_key.encode())


def imported_event_id(legacy_id: UUID, version: int) -> UUID:
    """Of the event that stands for a row of the service before this one: whoever imports the row
    again makes the very same."""
    return _derived(_IMPORT_NAMESPACE, legacy_id.bytes + version.to_bytes(1))


def late_capture_refund_id(payment_id: UUID) -> UUID:
    """The refund by which a late capture of this payment goes back, for ever."""
    return _derived(_LATE_CAPTURE_NAMESPACE, payment_id.bytes)


def unfulfilled_refund_id(payment_id: UUID) -> UUID:
    """The refund by which the service gives this payment back by itself, for ever."""
    return _derived(_UNFULFILLED_NAMESPACE, payment_id.bytes)


def is_of_unfulfilled(payment_id: UUID, refund_id: UUID) -> bool:
    """Whether the service made this refund by itself, since the payment's order failed."""
    return refund_id == unfulfilled_refund_id(payment_id)


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
    """What to say differs from the request that began this payment; () if nothing does.

    Of an imported one neither client nor payment method was ever stored: whoever asks for the same
    order, amount and currency may have been it.
    """
    if payment.fingerprint == fingerprint(request):
        return ()
    differing = tuple(
        name
        for name in ("merchant_order_id", "amount_cents", "currency")
        if getattr(payment, name) != getattr(request, name)
    )
    if payment.imported:
        return differing
    # The payment method is the one part that is not stored.
    return told_to(payment, request.client, differing or ("payment_method",))


def told_to(first: Payment | Refund, client: str, differing: tuple[str, ...]) -> tuple[str, ...]:
    """What a client is told to differ from what its key began.

    Another client only learns that the key is taken. Each field that is missing in a longer list
    would be one that it has guessed.
    """
    return differing if client == first.client else ("client",)


def _derived(namespace: bytes, name: bytes) -> UUID:
    """A version-4 UUID, as Order Service takes no other."""
    return UUID(bytes=hashlib.sha256(namespace + name).digest()[:16], version=4)
