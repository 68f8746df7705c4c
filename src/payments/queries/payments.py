"""Reading payments."""

from datetime import datetime
from uuid import UUID

import msgspec

from payments.database import Database
from payments.errors import PaymentNotFound
from payments.events.store import load_payment
from payments.payment import Payment, Status


class PaymentView(msgspec.Struct, frozen=True):
    """A payment as it is read: the documented columns, and how much was given back."""

    id: UUID
    merchant_order_id: UUID
    idempotency_key: str
    amount_cents: int
    currency: str
    status: Status
    provider_txn_id: str | None
    created_at: datetime
    updated_at: datetime
    refunded_cents: int


def view_of(payment: Payment) -> PaymentView:
    return PaymentView(
        id=payment.id,
        merchant_order_id=payment.merchant_order_id,
        idempotency_key=payment.idempotency_key,
        amount_cents=payment.amount_cents,
        currency=payment.currency,
        status=payment.status,
        provider_txn_id=payment.provider_txn_id,
        created_at=payment.created_at,
        updated_at=payment.updated_at,
        refunded_cents=0,
    )


async def get_payment(database: Database, payment_id: UUID, client: str | None) -> PaymentView:
    """The payment as of now, folded from its stream.

    `client` restricts the answer to that API client's payments; None reads all. Raises
    PaymentNotFound, PaymentUnreadable or DatabaseUnavailable.
    """
    loaded = await load_payment(database, payment_id)
    if loaded is None or client not in (None, loaded.payment.client):
        raise PaymentNotFound(f"There is no payment {payment_id}.")
    return view_of(loaded.payment)
