"""What Razorpay responds and sends, as far as it is read, and what it means."""

import re
from typing import Annotated, Generic, Literal, TypeVar
from uuid import UUID

import msgspec

from payments.gateways import OutcomeUnknown, ProviderCharge, ProviderRefund
from payments.gateways.units import from_razorpay, to_razorpay
from payments.payment.state import Approved, Declined

Id = Annotated[str, msgspec.Meta(pattern=r"\A[a-z]+_[A-Za-z0-9]{1,40}\Z")]
CODE = re.compile(r"[A-Za-z0-9_.-]{1,64}")
Notes = dict[str, object] | list[object]  # [] if there are none

# Those of Razorpay's page on international payments, without those that have left ISO 4217.
_CURRENCIES = (
    "AED ALL AMD AUD AWG AZN BAM BBD BDT BHD BIF BMD BND BOB BRL BSD BTN BWP BZD CAD CHF CLP CNY "
    "COP CRC CUP CVE CZK DJF DKK DOP DZD EGP ETB EUR FJD GBP GHS GIP GMD GNF GTQ GYD HKD HNL HTG "
    "HUF IDR ILS INR IQD ISK JMD JOD JPY KES KGS KHR KMF KRW KWD KYD KZT LAK LKR LRD LSL MAD MDL "
    "MGA MKD MMK MNT MOP MUR MVR MWK MXN MYR MZN NAD NGN NIO NOK NPR NZD OMR PEN PGK PHP PKR PLN "
    "PYG QAR RON RSD RUB RWF SAR SCR SEK SGD SOS SVC SZL THB TND TRY TTD TWD TZS UAH UGX USD UYU "
    "UZS VND VUV XAF XCD XOF XPF YER ZAR ZMW"
)
CURRENCIES = frozenset(_CURRENCIES.split())

T = TypeVar("T")


class RazorpayPayment(msgspec.Struct, frozen=True):
    """`amount` is in the minor unit. A `captured` that is not said counts as that of `status`."""

    entity: Literal["payment"]
    id: Id
    amount: int
    currency: str
    status: str
    order_id: Id | None = None
    captured: bool | str | None = None
    notes: Notes = msgspec.field(default_factory=list)
    error_code: str | None = None
    error_reason: str | None = None
    created_at: int = 0

    @property
    def is_captured(self) -> bool:
        """Also if it was refunded since; not if it was authorized only, and went back unused."""
        if self.status == "refunded":
            return self.captured not in (False, "0")
        return self.status == "captured"


class RazorpayOrder(msgspec.Struct, frozen=True):
    entity: Literal["order"]
    id: Id
    amount: int
    currency: str
    status: str
    receipt: str | None = None
    notes: Notes = msgspec.field(default_factory=list)
    created_at: int = 0


class RazorpayRefund(msgspec.Struct, frozen=True):
    entity: Literal["refund"]
    id: Id
    amount: int
    currency: str
    payment_id: Id
    status: str
    receipt: str | None = None
    notes: Notes = msgspec.field(default_factory=list)


class Collection(msgspec.Struct, Generic[T], frozen=True):
    entity: Literal["collection"]
    items: list[T]


class RazorpayErrorDetail(msgspec.Struct, frozen=True):
    code: str | None = None
    description: str | None = None
    reason: str | None = None
    field: str | None = None


class RazorpayError(msgspec.Struct, frozen=True):
    error: RazorpayErrorDetail


class HintedPayment(msgspec.Struct, frozen=True):
    id: Id
    order_id: Id | None = None
    notes: Notes = msgspec.field(default_factory=list)


class HintedOrder(msgspec.Struct, frozen=True):
    id: Id
    notes: Notes = msgspec.field(default_factory=list)


class OfPayment(msgspec.Struct, frozen=True):
    """A refund or a dispute."""

    payment_id: Id


class Entity(msgspec.Struct, Generic[T], frozen=True):
    entity: T


class HintedPayload(msgspec.Struct, frozen=True):
    payment: Entity[HintedPayment] | None = None
    order: Entity[HintedOrder] | None = None
    refund: Entity[OfPayment] | None = None
    dispute: Entity[OfPayment] | None = None

    def payment_id(self) -> UUID | None:
        """Ours, if a payment or its order names it."""
        of_payment = None if self.payment is None else named(self.payment.entity.notes)
        of_order = None if self.order is None else named(self.order.entity.notes)
        return of_payment or of_order

    def reference(self) -> str | None:
        """That of the order, if there is one: its payments have it as reference if it is ours."""
        if self.order is not None:
            return self.order.entity.id
        if self.payment is not None:
            return self.payment.entity.order_id or self.payment.entity.id
        about = self.refund or self.dispute
        return None if about is None else about.entity.payment_id


class RazorpayEvent(msgspec.Struct, frozen=True):
    """A webhook. What it says besides is not read: it may be old or out of order."""

    entity: Literal["event"]
    payload: HintedPayload


PAYMENT = msgspec.json.Decoder(RazorpayPayment)
PAYMENTS = msgspec.json.Decoder(Collection[RazorpayPayment])
ORDER = msgspec.json.Decoder(RazorpayOrder)
ORDERS = msgspec.json.Decoder(Collection[RazorpayOrder])
REFUND = msgspec.json.Decoder(RazorpayRefund)
REFUNDS = msgspec.json.Decoder(Collection[RazorpayRefund])
ERROR = msgspec.json.Decoder(RazorpayError)
EVENT = msgspec.json.Decoder(RazorpayEvent)


def as_dict(notes: Notes) -> dict[str, object]:
    return notes if isinstance(notes, dict) else {}


def uuid_of(text: object) -> UUID | None:
    try:
        return UUID(text) if isinstance(text, str) else None
    except ValueError:
        return None


def named(notes: Notes) -> UUID | None:
    """The payment of ours that is in the notes."""
    return uuid_of(as_dict(notes).get("payment_id"))


def made_for(order: RazorpayOrder) -> UUID | None:
    """The payment of ours that an order was made for by `prepare`."""
    our_id = named(order.notes)
    return our_id if our_id is not None and order.receipt == str(our_id) else None


def differing(payment: RazorpayPayment, charge: ProviderCharge) -> str | None:
    """Why a payment is not the one to be captured, as the code of a decline."""
    if payment.currency != charge.currency:
        return "currency_differs"
    same = payment.amount == to_razorpay(charge.amount_cents, charge.currency)
    return None if same else "amount_differs"


def code_of(stated: str | None, otherwise: str) -> str:
    """The code of a decline."""
    return stated if stated and CODE.fullmatch(stated) else otherwise


def cents(stated: RazorpayPayment | RazorpayRefund) -> int:
    """Raises OutcomeUnknown."""
    try:
        return from_razorpay(stated.amount, stated.currency)
    except ValueError:
        raise OutcomeUnknown("Razorpay stated an amount that the currency does not have") from None


def refunded(stated: RazorpayRefund, refund: ProviderRefund) -> Approved | Declined:
    """What a refund means for the one that was asked for. Raises OutcomeUnknown for one that is
    under way, for days perhaps."""
    if stated.payment_id != refund.provider_txn_id:
        raise OutcomeUnknown("Razorpay responded about a refund of another payment")
    our_id = uuid_of(stated.receipt)
    if our_id is None:
        raise OutcomeUnknown("Razorpay responded without our id of the refund")
    if stated.status == "failed" and our_id == refund.refund_id:
        return Declined("failed")
    if stated.status != "processed":
        raise OutcomeUnknown("the refund is not processed yet")
    return Approved(
        id=our_id,
        amount_cents=cents(stated),
        currency=stated.currency,
        provider_txn_id=stated.id,
    )
