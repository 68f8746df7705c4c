"""How a payment is asked about at its provider: where, in which words, and when it need not be."""

from typing import Literal, TypeVar

from payments.commands.telling import tell_other_gateway
from payments.event_store import EventStore
from payments.gateways import Gateway, Open, OutcomeUnknown, ProviderCharge, ProviderRefund
from payments.gateways.chosen import Gateways
from payments.payment.decisions import OutcomeMismatch
from payments.payment.state import Approved, Declined, Payment, Refund

G = TypeVar("G", bound=Gateway)

Found = Approved | Declined | Open | None


async def own_gateway(
    store: EventStore,
    payment: Payment,
    gateways: Gateways[G],
    kind: Literal["charge", "refund"],
) -> G:
    """The provider that the payment was begun with; OutcomeUnknown if it is not configured."""
    gateway = gateways.of(payment.gateway)
    if gateway is None:
        await tell_other_gateway(store, payment, kind)
        raise OutcomeUnknown("only the provider that was asked knows")
    return gateway


def provider_charge(
    payment: Payment, payment_method: str | None = None, return_url: str | None = None
) -> ProviderCharge:
    """What the client sent with its request is known while that is served, and never afterwards."""
    return ProviderCharge(
        payment_id=payment.id,
        amount_cents=payment.amount_cents,
        currency=payment.currency,
        reference=payment.provider_reference,
        payment_method=payment_method,
        return_url=return_url,
        order_id=payment.merchant_order_id,
        idempotency_key=payment.idempotency_key,
    )


def provider_refund(payment: Payment, refund: Refund) -> ProviderRefund:
    """Raises OutcomeMismatch for a payment that the log has no capture of."""
    if payment.provider_txn_id is None:
        raise OutcomeMismatch("a refund of a payment that was not captured")
    return ProviderRefund(
        refund_id=refund.id,
        payment_id=payment.id,
        provider_txn_id=payment.provider_txn_id,
        amount_cents=refund.amount_cents,
        currency=payment.currency,
        reference=payment.provider_reference,
    )


def surely_unsent(gateway: Gateway, payment: Payment) -> bool:
    """Nothing captures before the provider's own id of the charge is stored. A provider that knows
    the charge by our id has none."""
    return payment.provider_reference is None and not gateway.knows_our_id


async def find(
    gateway: Gateway, payment: Payment, timeout_s: float, charge: ProviderCharge | None = None
) -> Found:
    """What became of the charge; it is not asked about where that is known. While a request is
    served, `charge` holds what came with it. Raises OutcomeUnknown, NeverSent, or OutcomeMismatch
    for a response about another payment."""
    if surely_unsent(gateway, payment):
        return None
    found = await gateway.find_charge(charge or provider_charge(payment), timeout_s)
    check_about(found, payment)
    return found


def check_about(found: Found, payment: Payment) -> None:
    """Raises OutcomeMismatch for an open charge of another payment; of outcomes, the decisions look
    at more than that."""
    if isinstance(found, Open) and found.id != payment.id:
        raise OutcomeMismatch("the provider responded with another id")
