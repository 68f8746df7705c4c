"""PayPal's orders: what they state, and what that means for a charge or a refund.

The captures of an order decide, never its own status: COMPLETED says only that it was processed.
An order without a capture is closed by its intent: one of AUTHORIZE is not captured, neither by us
nor by PayPal. Why we closed it is in its invoice_id, behind our payment id.
"""

import re
from decimal import Decimal, InvalidOperation
from typing import Annotated
from uuid import UUID

import msgspec

from payments.gateways import NextAction, Open, OutcomeUnknown, ProviderCharge, ProviderRefund
from payments.gateways.http import ProviderResponse
from payments.gateways.units import from_paypal, to_paypal
from payments.payment.state import Approved, Declined

ORDER_ID = re.compile(r"[A-Z0-9]{1,36}")
CANCELLED = "cancelled"
NOBODY = UUID(int=0)  # named by what names no payment of ours: the caller sees that it is another
NO_SUCH_ID = "INVALID_RESOURCE_ID"

Word = Annotated[str, msgspec.Meta(pattern=r"\A[!#-\[\]-~]{1,255}\Z")]

_CAPTURED = frozenset({"COMPLETED", "PARTIALLY_REFUNDED", "REFUNDED"})
_DECLINED = frozenset({"DECLINED", "FAILED"})
_TO_THE_CUSTOMER = ("payer-action", "approve", "redirect")


class PayPalMoney(msgspec.Struct, frozen=True):
    currency_code: str
    value: str


class PayPalLink(msgspec.Struct, frozen=True):
    href: str
    rel: str


class _Reason(msgspec.Struct, frozen=True):
    reason: str = ""


class _Processor(msgspec.Struct, frozen=True):
    response_code: str = ""


class PayPalCapture(msgspec.Struct, frozen=True):
    id: Word
    status: str
    amount: PayPalMoney
    custom_id: str = ""
    status_details: _Reason = _Reason()
    processor_response: _Processor = _Processor()


class PayPalRefund(msgspec.Struct, frozen=True):
    """Our refund id is in both of its ids."""

    id: Word
    status: str
    amount: PayPalMoney
    custom_id: str = ""
    invoice_id: str = ""
    status_details: _Reason = _Reason()


class PayPalPayments(msgspec.Struct, frozen=True):
    captures: tuple[PayPalCapture, ...] = ()
    refunds: tuple[PayPalRefund, ...] = ()


class PayPalPayee(msgspec.Struct, frozen=True):
    merchant_id: str = ""


class PayPalUnit(msgspec.Struct, frozen=True):
    """A capture's response leaves out the amount of its unit."""

    reference_id: str = "default"
    amount: PayPalMoney | None = None
    custom_id: str = ""
    invoice_id: str = ""
    payee: PayPalPayee = PayPalPayee()
    payments: PayPalPayments = PayPalPayments()


class PayPalOrder(msgspec.Struct, frozen=True):
    id: Word
    status: str
    purchase_units: tuple[PayPalUnit, ...]
    intent: str = "CAPTURE"
    update_time: str = ""
    links: tuple[PayPalLink, ...] = ()

    @property
    def unit(self) -> PayPalUnit:
        """The first; OutcomeUnknown if there is none."""
        if not self.purchase_units:
            raise OutcomeUnknown("the provider stated an order without a purchase unit")
        return self.purchase_units[0]

    @property
    def captures(self) -> list[PayPalCapture]:
        return [each for unit in self.purchase_units for each in unit.payments.captures]

    @property
    def owner(self) -> UUID | None:
        """The payment of ours that it was made or claimed for. A client's own custom_id may be a
        UUID as well; ours begins the invoice_id, too."""
        unit = self.unit
        ours = unit.invoice_id.partition(" ")[0] == unit.custom_id
        return as_uuid(unit.custom_id) if ours else None

    @property
    def closed(self) -> str | None:
        """Why it will not be captured any more."""
        _, _, reason = self.unit.invoice_id.partition(" ")
        if self.owner is not None and reason:
            return reason
        return None if self.intent == "CAPTURE" else "intent_authorize"


class PayPalIssue(msgspec.Struct, frozen=True):
    issue: Word


class PayPalProblem(msgspec.Struct, frozen=True):
    """The body of a response that is an error."""

    name: str
    details: tuple[PayPalIssue, ...] = ()
    links: tuple[PayPalLink, ...] = ()

    @property
    def issue(self) -> str:
        return self.details[0].issue if self.details else self.name


_ORDER = msgspec.json.Decoder(PayPalOrder)
_REFUND = msgspec.json.Decoder(PayPalRefund)
_PROBLEM = msgspec.json.Decoder(PayPalProblem)


def read_order(response: ProviderResponse, reference: str | None = None) -> PayPalOrder:
    """The order with this id, or one that has just been made; OutcomeUnknown for anything else."""
    if response.status not in (200, 201):
        response.unexpected()
    order = response.read(_ORDER)
    if reference not in (None, order.id) or not ORDER_ID.fullmatch(order.id):
        raise OutcomeUnknown("the provider responded about something else")
    return order


def read_refund(response: ProviderResponse) -> PayPalRefund:
    return response.read(_REFUND)


def issue_of(response: ProviderResponse) -> PayPalProblem:
    """Raises OutcomeUnknown if the body is none of PayPal's, as that of a server before it."""
    return response.read(_PROBLEM)


def is_unknown_id(response: ProviderResponse) -> bool:
    """Whether PayPal itself says that it has nothing with the id in the path."""
    return response.status == 404 and issue_of(response).issue == NO_SUCH_ID


def stands(
    order: PayPalOrder, charge: ProviderCharge, *, pays_alone: bool = False
) -> Approved | Declined | Open:
    """What the order means for the charge. `pays_alone`: the payment method needs no customer."""
    captures = order.captures
    for capture in captures:
        if capture.status in _CAPTURED:
            return _approved(capture)
    for capture in captures:
        if capture.status == "PENDING":
            return Open(id=as_uuid(capture.custom_id) or NOBODY, step="processing")
        if capture.status not in _DECLINED:
            raise OutcomeUnknown("the provider stated a capture with an unknown status")
    return _uncaptured(order, charge, pays_alone)


def _uncaptured(order: PayPalOrder, charge: ProviderCharge, pays_alone: bool) -> Declined | Open:
    owner = order.owner or charge.payment_id
    match order.status:
        case "COMPLETED" if order.captures:
            capture = order.captures[-1]
            if as_uuid(capture.custom_id) != charge.payment_id:
                raise OutcomeUnknown("the provider declined something else")
            return Declined(decline_code(capture))
        case "VOIDED":
            return Declined(order.status)
        case "CREATED" | "APPROVED" | "PAYER_ACTION_REQUIRED" if order.closed is not None:
            return _closed(order, charge)
        case "APPROVED":
            return Open(id=owner, step="ready")
        case "CREATED" if pays_alone:
            return Open(id=owner, step="ready")
        case "CREATED" | "PAYER_ACTION_REQUIRED":
            return Open(id=owner, step="action", action=redirect(order.links))
    raise OutcomeUnknown("the provider stated an order with an unknown status")


def _closed(order: PayPalOrder, charge: ProviderCharge) -> Declined | Open:
    if order.owner not in (None, charge.payment_id):
        return Open(id=order.owner or NOBODY, step="ready")
    return Declined(str(order.closed))


def decline_code(capture: PayPalCapture) -> str:
    code = capture.processor_response.response_code or capture.status_details.reason
    return code if re.fullmatch(r"[A-Z0-9_]{1,64}", code) else capture.status


def redirect(links: tuple[PayPalLink, ...]) -> NextAction:
    """Where the customer approves; OutcomeUnknown if the provider gives no address for it."""
    for rel in _TO_THE_CUSTOMER:
        for link in links:
            if link.rel == rel and link.href.startswith("https://"):
                return NextAction(type="redirect", fields={"url": link.href})
    raise OutcomeUnknown("the customer has to act, and the provider gives no address for it")


def misfit(order: PayPalOrder, charge: ProviderCharge, merchant_id: str | None) -> str | None:
    """Why an order that the customer made is not the one that is to be paid."""
    unit = order.unit
    if len(order.purchase_units) != 1:
        return "several_purchase_units"
    if unit.amount is None:
        raise OutcomeUnknown("the provider stated an order without an amount")
    if unit.amount.currency_code != charge.currency:
        return "currency_mismatch"
    if not _equal(unit.amount.value, to_paypal(charge.amount_cents, charge.currency)):
        return "amount_mismatch"
    if merchant_id is not None and unit.payee.merchant_id != merchant_id:
        return "payee_mismatch"
    return None


def claimed(order: PayPalOrder, charge: ProviderCharge) -> PayPalOrder:
    """As it is now that it names our payment."""
    named = str(charge.payment_id)
    unit = msgspec.structs.replace(order.unit, custom_id=named, invoice_id=named)
    return msgspec.structs.replace(order, purchase_units=(unit, *order.purchase_units[1:]))


def refund_outcome(refund: PayPalRefund, asked: ProviderRefund) -> Approved | Declined:
    """OutcomeUnknown while it is pending."""
    named = as_uuid(refund.custom_id) or NOBODY
    if refund.status == "COMPLETED":
        amount_cents, currency = _amount(refund.amount)
        return Approved(
            id=named, amount_cents=amount_cents, currency=currency, provider_txn_id=refund.id
        )
    if refund.status not in ("FAILED", "CANCELLED"):
        raise OutcomeUnknown("the refund is pending, or has an unknown status")
    if named != asked.refund_id:
        raise OutcomeUnknown("the provider declined something else")
    reason = refund.status_details.reason
    return Declined(reason if re.fullmatch(r"[A-Z0-9_]{1,64}", reason) else refund.status)


def find_refund(order: PayPalOrder, asked: ProviderRefund) -> PayPalRefund | None:
    """By either of its ids: where they differ the caller sees another one."""
    if asked.provider_txn_id not in {each.id for each in order.captures}:
        raise OutcomeUnknown("the provider stated an order without the capture")
    for unit in order.purchase_units:
        for refund in unit.payments.refunds:
            if str(asked.refund_id) in (refund.custom_id, refund.invoice_id):
                return refund
    return None


def as_uuid(text: str) -> UUID | None:
    try:
        return UUID(text) if len(text) == 36 else None
    except ValueError:
        return None


def _approved(capture: PayPalCapture) -> Approved:
    amount_cents, currency = _amount(capture.amount)
    return Approved(
        id=as_uuid(capture.custom_id) or NOBODY,
        amount_cents=amount_cents,
        currency=currency,
        provider_txn_id=capture.id,
    )


def _amount(money: PayPalMoney) -> tuple[int, str]:
    try:
        return from_paypal(money.value, money.currency_code), money.currency_code
    except ValueError as error:
        raise OutcomeUnknown(f"the amount that the provider stated {error}") from None


def _equal(one: str, other: str) -> bool:
    try:
        return Decimal(one) == Decimal(other)
    except InvalidOperation:
        return False
