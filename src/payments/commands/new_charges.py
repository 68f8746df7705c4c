"""Which new charges are begun, and at which provider. What was begun before is not asked here."""

import math
from datetime import UTC, datetime
from typing import NamedTuple

from payments.errors import FieldError, GatewayUnavailable, InvalidRequest, PaymentsError
from payments.gateways import ProviderCharge, Refusal
from payments.gateways.chosen import Gateways
from payments.gateways.counted import CountedGateway, is_storable
from payments.payment.decisions import is_held_for
from payments.payment.identity import ChargeRequest, payment_id_for
from payments.settings import Settings


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
