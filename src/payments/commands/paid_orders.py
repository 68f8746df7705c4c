"""Whether an order is paid already, for SECOND_CHARGE=refuse.

The read model names the order's payments, and the log those that it does not show yet; each is then
read from its own events. So a capture counts from its commit on, and a payment that was given back
whole counts no more.
"""

from uuid import UUID

from payments.errors import OrderAlreadyPaid
from payments.event_store import EventStore
from payments.payment.state import Payment, Status

NOBODY = UUID(int=0)  # no payment's id


async def refuse_if_paid(store: EventStore, payment_id: UUID, order_id: UUID, client: str) -> None:
    """Before a charge is begun. Raises OrderAlreadyPaid if another payment of the order is captured
    and was not given back whole, whichever client made it; DatabaseUnavailable.

    A payment that has begun is never refused: its key has an outcome, or will have one.
    """
    for payment in await store.perhaps_paid(order_id, but=payment_id):
        if _pays(payment, order_id):
            raise OrderAlreadyPaid(_detail(payment, client))


async def is_paid_otherwise(store: EventStore, payment: Payment) -> bool:
    """The same of a payment that has begun and is not captured, before it may be. Raises
    DatabaseUnavailable."""
    order_id = payment.merchant_order_id
    return any(_pays(each, order_id) for each in await store.perhaps_paid(order_id, but=NOBODY))


def _pays(payment: Payment, order_id: UUID) -> bool:
    return payment.merchant_order_id == order_id and payment.status is Status.SUCCESS


def _detail(payment: Payment, client: str) -> str:
    """The payment's id is for its own client."""
    of_whom = f"payment {payment.id}" if payment.client == client else "another client's payment"
    return (
        f"The order is already paid by {of_whom}. Nothing was charged. To charge the order "
        "again, refund that payment first. To read its outcome, retry with its own "
        "Idempotency-Key."
    )
