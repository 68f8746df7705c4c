"""What Stripe states, and what it means: its objects, its errors, and the outcome of each status.

An unknown status, and an object that names no payment of ours, leave the outcome unknown.
"""

from typing import Literal, NoReturn
from uuid import UUID

import msgspec
from loguru import logger

from payments.gateways import NextAction, Open, OutcomeUnknown, ProviderCharge, ReferenceNotFound
from payments.gateways.http import ProviderResponse, decoded
from payments.gateways.units import from_stripe
from payments.payment.state import Approved, Declined

# What the request is about when Stripe refuses it for good: the same request will not do better.
_REFUSED_PARAMS = frozenset(
    {
        *("amount", "currency", "payment_method", "payment_method_types", "confirmation_token"),
        "return_url",
    }
)
_REFUSED_CODES = (
    *("amount_too_", "invalid_charge_amount", "payment_method_", "charge_already_refunded"),
    *("charge_disputed", "refund_disputed_payment", "balance_insufficient"),
)


class StripeFailure(msgspec.Struct, frozen=True):
    """Why the last confirmation failed."""

    code: str | None = None
    decline_code: str | None = None


class StripeRedirect(msgspec.Struct, frozen=True):
    url: str


class StripeStep(msgspec.Struct, frozen=True):
    type: str
    redirect_to_url: StripeRedirect | None = None


class StripeIntent(msgspec.Struct, frozen=True, tag_field="object", tag="payment_intent"):
    """A PaymentIntent."""

    id: str
    status: str
    currency: str
    amount_received: int = 0
    metadata: dict[str, str] = {}
    client_secret: str | None = None
    last_payment_error: StripeFailure | None = None
    latest_charge: str | None = None
    next_action: StripeStep | None = None
    cancellation_reason: str | None = None

    def __repr__(self) -> str:
        """Without the client secret."""
        return f"StripeIntent({self.id!r}, {self.status!r})"

    @property
    def payment_id(self) -> UUID | None:
        return _our_id(self.metadata, "payment_id")

    @property
    def has_failed(self) -> bool:
        """Whether a confirmation failed, so that the customer might confirm it once more. The error
        is erased when the intent is changed, the charge stays."""
        failed = self.last_payment_error is not None or self.latest_charge is not None
        return self.status == "requires_payment_method" and failed

    @property
    def has_ended(self) -> bool:
        return self.status in ("succeeded", "canceled")


class StripeRefund(msgspec.Struct, frozen=True, tag_field="object", tag="refund"):
    id: str
    amount: int
    currency: str
    status: str | None = None
    payment_intent: str | None = None
    failure_reason: str | None = None
    metadata: dict[str, str] | None = None

    @property
    def refund_id(self) -> UUID | None:
        return _our_id(self.metadata, "refund_id")


class StripeError(msgspec.Struct, frozen=True):
    type: str
    code: str | None = None
    decline_code: str | None = None
    param: str | None = None
    message: str | None = None
    payment_intent: StripeIntent | None = None

    @property
    def is_refusal(self) -> bool:
        """Whether the request itself is refused: nothing was done, and nothing will be."""
        if self.type != "invalid_request_error":
            return False
        return self.param in _REFUSED_PARAMS or (self.code or "").startswith(_REFUSED_CODES)

    @property
    def is_busy(self) -> bool:
        """Whether the same request is under way, or something else with the same object."""
        return self.code in ("idempotency_key_in_use", "lock_timeout")

    def refusal(self) -> Declined:
        return Declined(self.decline_code or self.code or f"invalid_{self.param}")


class StripeErrorBody(msgspec.Struct, frozen=True):
    error: StripeError


class StripeAccount(msgspec.Struct, frozen=True, tag_field="object", tag="account"):
    id: str
    charges_enabled: bool = True


class StripeRefunds(msgspec.Struct, frozen=True, tag_field="object", tag="list"):
    data: list[StripeRefund]
    has_more: bool


class StripeEventObject(msgspec.Struct, frozen=True):
    object: str
    id: str = ""
    payment_intent: str | None = None


class StripeEventData(msgspec.Struct, frozen=True):
    object: StripeEventObject


class StripeEvent(msgspec.Struct, frozen=True, tag_field="object", tag="event"):
    """A webhook. Nothing but ids is read of it."""

    id: str
    data: StripeEventData


INTENT = msgspec.json.Decoder(StripeIntent)
REFUND = msgspec.json.Decoder(StripeRefund)
REFUNDS = msgspec.json.Decoder(StripeRefunds)
ACCOUNT = msgspec.json.Decoder(StripeAccount)
EVENT = msgspec.json.Decoder(StripeEvent)
_ERROR = msgspec.json.Decoder(StripeErrorBody)


def error_of(response: ProviderResponse) -> StripeError | None:
    """None for a body that is not Stripe's: a server in front of it has errors as well."""
    if response.status < 400:
        return None
    body = decoded(response.body, _ERROR)
    return None if body is None else body.error


def unexpected(response: ProviderResponse) -> NoReturn:
    """Raises OutcomeUnknown."""
    error = error_of(response)
    what = f": {error.code or error.type}" if error is not None else ""
    reason = f"Stripe responded with {response.status}{what}"
    if response.status == 401:
        reason = "Stripe rejects the API key (401)"
    raise OutcomeUnknown(reason, is_outage=response.is_outage)


def check_known(error: StripeError | None, reference: str) -> None:
    """Raises ReferenceNotFound if Stripe says that it has no such intent."""
    if error is None or error.code != "resource_missing":
        return
    if error.param in ("intent", "payment_intent") and reference in (error.message or ""):
        raise ReferenceNotFound(
            "Stripe does not know the PaymentIntent: the API key may be that of another account, "
            "or of another mode"
        )


def intent_of(response: ProviderResponse, reference: str) -> StripeIntent | None:
    """The intent that a response states, also one that an error names. Raises OutcomeUnknown if
    that is another one."""
    error = error_of(response)
    check_known(error, reference)
    if response.status == 200:
        intent: StripeIntent | None = response.read(INTENT)
    else:
        intent = None if error is None else error.payment_intent
    if intent is not None and intent.id != reference:
        raise OutcomeUnknown("Stripe responded about something else")
    return intent


def failed_with(intent: StripeIntent, error: StripeError | None) -> StripeIntent:
    """The intent of a response that declines it, with the reason that the response gives."""
    if error is None or error.type != "card_error" or intent.status != "requires_payment_method":
        return intent
    failure = StripeFailure(code=error.code or error.type, decline_code=error.decline_code)
    return msgspec.structs.replace(intent, last_payment_error=failure)


def outcome_of(
    intent: StripeIntent, charge: ProviderCharge, publishable_key: str | None
) -> Approved | Declined | Open:
    """What the status means; Declined for one that has failed, which the caller has made final."""
    payment_id = intent.payment_id
    if payment_id is None:
        raise OutcomeUnknown("the PaymentIntent names no payment of ours")
    match intent.status:
        case "succeeded":
            return _approved(payment_id, intent.amount_received, intent.currency, intent.id)
        case "canceled":
            pass
        case "requires_payment_method" if intent.has_failed:
            pass
        case "requires_payment_method" | "requires_confirmation":
            return Open(id=payment_id, step="ready")
        case "requires_action":
            return Open(id=payment_id, step="action", action=_action(intent, publishable_key))
        case "processing":
            return Open(id=payment_id, step="processing")
        case "requires_capture":
            message = (
                "Stripe holds money that was to be captured at once; capture or cancel it there"
            )
            logger.bind(payment_id=payment_id, reference=intent.id).error(message)
            raise OutcomeUnknown("the PaymentIntent waits for a capture that we never make")
        case _:
            raise OutcomeUnknown("a status that the gateway does not know")
    if payment_id != charge.payment_id:  # Declined has no id that the caller could compare
        raise OutcomeUnknown("Stripe declined something else")
    return Declined(_code_of(intent))


def _code_of(intent: StripeIntent) -> str:
    """Why it was declined, or else cancelled."""
    failure = intent.last_payment_error
    stated = failure and (failure.decline_code or failure.code)
    if stated is None and intent.latest_charge is not None:
        stated = "card_declined"
    return stated or intent.cancellation_reason or "canceled"


def _action(intent: StripeIntent, publishable_key: str | None) -> NextAction:
    step = intent.next_action
    if step is not None and step.redirect_to_url is not None:
        return NextAction(type="redirect", fields={"url": step.redirect_to_url.url})
    if intent.client_secret is None:
        raise OutcomeUnknown("an action without a client secret")
    fields = {"client_secret": intent.client_secret}
    if publishable_key is not None:
        fields["publishable_key"] = publishable_key
    return NextAction(type="stripe", fields=fields)


def refund_outcome(refund: StripeRefund) -> Approved | Declined:
    """Raises OutcomeUnknown for one that is under way: that may last for days."""
    refund_id = refund.refund_id
    if refund_id is None:
        raise OutcomeUnknown("the refund names no refund of ours")
    match refund.status:
        case "succeeded":
            return _approved(refund_id, refund.amount, refund.currency, refund.id)
        case "failed" | "canceled":
            return Declined(refund.failure_reason or refund.status)
        case "pending" | "requires_action":
            raise OutcomeUnknown(f"the refund is {refund.status}")
    raise OutcomeUnknown("a status of a refund that the gateway does not know")


def _approved(id: UUID, amount: int, currency: str, provider_txn_id: str) -> Approved:
    currency = currency.upper()
    try:
        amount_cents = from_stripe(amount, currency)
    except ValueError as error:
        raise OutcomeUnknown(f"Stripe states an amount that {error}") from None
    return Approved(
        id=id, amount_cents=amount_cents, currency=currency, provider_txn_id=provider_txn_id
    )


def _our_id(metadata: dict[str, str] | None, name: str) -> UUID | None:
    """None also for what others have written there."""
    try:
        return UUID((metadata or {}).get(name, ""))
    except ValueError:
        return None


Mode = Literal["test", "live"]


def mode_of(key: str, kinds: tuple[str, ...]) -> Mode | None:
    """Of an API key that begins with one of these kinds; None for anything else."""
    kind, _, rest = key.partition("_")
    mode, _, secret = rest.partition("_")
    if kind not in kinds or not secret:
        return None
    match mode:
        case "test" | "live":
            return mode
    return None
