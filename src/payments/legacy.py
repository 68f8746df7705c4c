"""Converts a row of the Node service's table to events, or says why it cannot.

Pure. docs/migrating-from-node.md describes each conversion.
"""

import re
from collections.abc import Iterator
from datetime import datetime
from typing import Any, NamedTuple
from uuid import UUID

from payments.clients import DEFAULT_CLIENT
from payments.events.facts import (
    Fact,
    Legacy,
    PaymentCharged,
    PaymentFailed,
    PaymentInitiated,
    PaymentRefunded,
    RefundInitiated,
)
from payments.money import DECIMALS, MAX_AMOUNT_CENTS, MIN_AMOUNT_CENTS
from payments.payment.identity import (
    KEY_MAX,
    KEY_PATTERN,
    ChargeRequest,
    fingerprint,
    imported_event_id,
    payment_id_for,
)
from payments.payment.state import Status

# Not the name of a provider: such a payment is neither settled nor refunded.
NO_GATEWAY = "legacy"
NO_DECLINE_CODE = "not_recorded"
TXN_ID_MAX = 255  # the provider's ids are indexed, and index entries have a maximum size

_UUID = re.compile("[0-9a-f]{8}(-[0-9a-f]{4}){3}-[0-9a-f]{12}", re.IGNORECASE)
_KEY = re.compile(KEY_PATTERN[1:-1])
_CAPTURED = (Status.SUCCESS, Status.REFUNDED)


class LegacyRow(NamedTuple):
    """A row of the table, with all columns except times as text, whatever their types.

    A time outside Python's range is None too. `id_is_shared` and so on: another row has the same
    value; for the provider's id, another captured row.
    """

    id: str | None
    merchant_order_id: str | None
    idempotency_key: str | None
    amount_cents: str | None
    currency: str | None
    status: str | None
    provider_txn_id: str | None
    created_at: datetime | None
    updated_at: datetime | None
    id_is_shared: bool
    key_is_shared: bool
    txn_id_is_shared: bool

    @property
    def payment_id(self) -> UUID:
        """The payment id for a row without faults; with a key it is derived from the key, by which
        retries find it."""
        return (
            UUID(self.id) if self.idempotency_key is None else payment_id_for(self.idempotency_key)
        )


def faults(row: LegacyRow) -> Iterator[str]:
    """The reasons why a row cannot be imported, in a few words each."""
    if row.id is None or not _UUID.fullmatch(row.id):
        yield "id is not a UUID"
    elif row.id_is_shared:
        yield "another row has the same id"
    if row.merchant_order_id is None or not _UUID.fullmatch(row.merchant_order_id):
        yield "merchant_order_id is not a UUID" if row.merchant_order_id else "no merchant_order_id"
    if row.idempotency_key is not None and not _KEY.fullmatch(row.idempotency_key):
        yield f"idempotency_key is not 1 to {KEY_MAX} printable ASCII characters"
    elif row.key_is_shared:
        yield "another row has the same idempotency_key"
    if row.amount_cents is None or not _is_amount(row.amount_cents):
        yield f"amount_cents is not from {MIN_AMOUNT_CENTS} to {MAX_AMOUNT_CENTS}"
    if row.currency not in DECIMALS:
        yield "currency is not an ISO 4217 code in upper case"
    if row.status not in set(Status):
        yield f"status is none of {', '.join(Status)}"
    if len(row.provider_txn_id or "") > TXN_ID_MAX:
        yield f"provider_txn_id has more than {TXN_ID_MAX} characters"
    elif row.txn_id_is_shared:
        yield "another captured row has the same provider_txn_id"
    if row.created_at is None and row.updated_at is None:
        yield "neither created_at nor updated_at is a time"


def key_of_none(legacy_id: UUID) -> str:
    """The substitute for the key of a row without one. It begins with a blank, which the key of a
    request cannot: header values have no leading blanks."""
    return f" legacy:{legacy_id}"


def facts_of(row: LegacyRow, gateway: str) -> list[Fact]:
    """The events of a row without faults. `gateway`: the provider of the captured rows.

    A missing time is replaced by the other one.
    """
    legacy_id, payment_id, order_id = UUID(row.id), row.payment_id, UUID(row.merchant_order_id)
    amount_cents, currency = int(row.amount_cents or ""), row.currency or ""
    began_at, ended_at = _times(row)

    def metadata(version: int, at: datetime) -> dict[str, Any]:
        return {
            "payment_id": payment_id,
            "version": version,
            "event_id": imported_event_id(legacy_id, version),
            "occurred_at": at,
            "client": DEFAULT_CLIENT,
            "imported": True,
            "merchant_order_id": order_id,
            "amount_cents": amount_cents,
            "currency": currency,
        }

    request = _request(row, legacy_id, order_id)
    facts: list[Fact] = [
        PaymentInitiated(
            idempotency_key=request.idempotency_key,
            fingerprint=fingerprint(request),
            gateway=gateway if row.status in _CAPTURED else NO_GATEWAY,
            legacy=Legacy(legacy_id, row.provider_txn_id, ended_at),
            **metadata(1, began_at),
        )
    ]
    if row.status == Status.FAILED:
        facts.append(
            PaymentFailed(reason="declined", decline_code=NO_DECLINE_CODE, **metadata(2, ended_at))
        )
    if row.status in _CAPTURED:
        # A refunded row does not have the time of its capture.
        captured_at = ended_at if row.status == Status.SUCCESS else began_at
        facts.append(
            PaymentCharged(provider_txn_id=row.provider_txn_id or "", **metadata(2, captured_at))
        )
    if row.status == Status.REFUNDED:
        refund_id = imported_event_id(legacy_id, 3)
        facts += _refund(refund_id, amount_cents, metadata(3, ended_at), metadata(4, ended_at))
    return facts


def _request(row: LegacyRow, legacy_id: UUID, order_id: UUID) -> ChargeRequest:
    """A request whose fingerprint the previous version finds equal: default client, no payment
    method."""
    key = key_of_none(legacy_id) if row.idempotency_key is None else row.idempotency_key
    return ChargeRequest(
        idempotency_key=key,
        merchant_order_id=order_id,
        amount_cents=int(row.amount_cents or ""),
        currency=row.currency or "",
        client=DEFAULT_CLIENT,
    )


def _refund(
    refund_id: UUID, amount_cents: int, begun: dict[str, Any], ended: dict[str, Any]
) -> list[Fact]:
    """A refund of the whole amount; `begun` and `ended` are the metadata of its two events."""
    return [
        RefundInitiated(refund_id=refund_id, idempotency_key=None, whole=True, **begun),
        PaymentRefunded(
            refund_id=refund_id,
            provider_refund_id="",
            refunded_cents=amount_cents,
            captured_cents=amount_cents,
            **ended,
        ),
    ]


def _times(row: LegacyRow) -> tuple[datetime, datetime]:
    """The time of the beginning, and of the last change, which is not earlier."""
    began_at = row.created_at or row.updated_at
    assert began_at is not None
    return began_at, max(began_at, row.updated_at or began_at)


def _is_amount(text: str) -> bool:
    whole = re.fullmatch("-?[0-9]{1,12}", text)
    return bool(whole) and MIN_AMOUNT_CENTS <= int(text) <= MAX_AMOUNT_CENTS
