"""What a provider is asked: which one, in which words, and when it need not be.

A new charge may be refused here. What was begun before is asked about where it was begun.
"""

import math
from datetime import UTC, datetime
from typing import Literal, NamedTuple, TypeVar

from payments.commands.telling import tell_other_gateway
from payments.errors import FieldError, GatewayUnavailable, InvalidRequest, PaymentsError
from payments.event_store import EventStore
from payments.gateways import (
    Gateway,
    Open,
    OutcomeUnknown,
    ProviderCharge,
    ProviderRefund,
    Refusal,
)
from payments.gateways.chosen import Gateways
from payments.gateways.counted import CountedGateway, is_storable
from payments.payment.decisions import OutcomeMismatch, is_held_for
from payments.payment.identity import ChargeRequest, payment_id_for
from payments.payment.state import Approved, Declined, Payment, Refund
from payments.settings import Settings

G = TypeVar("G", bound=Gateway)

Found = Approved | Declined | Open | None


class NewCharge(NamedTuple):
    """A charge as its provider would be asked for it; `reference` is the provider's own id of it,
    if the payment method names it."""

    gateway: CountedGateway
    charge: ProviderCharge
    reference: str | None


class NewCharges:
    """One per process."""

    def __init__(self, gateways: Gateways[CountedGateway], settings: Settings) -> None:
        self._gateways = gateways
        self._hold_needed_s = settings.hold_needed_s

    def of(self, request: ChargeRequest, return_url: str | None) -> NewCharge:
        gateway = self._gateways.for_new(request.currency)
        charge = ProviderCharge(
            payment_id=payment_id_for(request.idempotency_key),
            amount_cents=request.amount_cents,
            currency=request.currency,
            payment_method=request.payment_method,
            return_url=return_url,
        )
        return NewCharge(gateway, charge, gateway.reference(charge))

    def refusal(self, new: NewCharge, hold_until: datetime | None) -> PaymentsError | None:
        """Why it is not begun; None if it may be."""
        if not is_held_for(hold_until, datetime.now(UTC), self._hold_needed_s):
            message = (
                f"must be at least {self._hold_needed_s:g} s from now, so that the charge can "
                "finish before it: extend the hold, and retry with the same key and the new "
                "hold_until"
            )
            return InvalidRequest(
                "The hold ends too soon to complete the charge. Nothing was charged.",
                (FieldError("hold_until", message),),
            )
        refusal = new.gateway.refuses(new.charge) or _unusable(new.reference)
        if refusal is not None:
            return InvalidRequest(
                f"The provider {new.gateway.name} does not take this charge. Nothing was charged.",
                (FieldError(refusal.field, refusal.message),),
            )
        if wait_s := new.gateway.unavailable_for_s():
            unavailable = GatewayUnavailable("The payment provider is down. Nothing was charged.")
            unavailable.retry_after_s = math.ceil(max(1.0, wait_s))
            return unavailable
        return None


def _unusable(reference: str | None) -> Refusal | None:
    if reference is None or is_storable(reference):
        return None
    return Refusal("payment_method", "must be an id that the provider gave")


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
