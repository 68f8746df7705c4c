"""Razorpay: captures what the customer paid at its Checkout, with or without an order of ours.

The reference is a payment (`pay_…`, from the client) or an order (`order_…`, made by `prepare`). A
capture has no idempotency key there. What prevents a second one: Razorpay captures a payment once;
the client's `pay_…` is claimed when the intent is stored; and our id is written into its notes, and
read back, before it is captured. An order has our id as receipt. docs/gateways/razorpay.md
"""

import base64
import hashlib
import math
import re
from collections.abc import Mapping
from uuid import UUID

from payments.errors import StartError
from payments.gateways import (
    BadSignature,
    Hint,
    NextAction,
    Open,
    OutcomeUnknown,
    ProviderCharge,
    ProviderFinding,
    ProviderRefund,
    Refusal,
)
from payments.gateways.adapters import after_sending, connected
from payments.gateways.http import ProviderHttp, decoded
from payments.gateways.razorpay_api import (
    RazorpayApi,
    description_of,
    fail,
    now,
    payment_in,
)
from payments.gateways.razorpay_entities import (
    CURRENCIES,
    EVENT,
    REFUND,
    RazorpayOrder,
    RazorpayPayment,
    cents,
    code_of,
    differing,
    made_for,
    named,
    refunded,
)
from payments.gateways.signatures import is_signed
from payments.gateways.units import to_razorpay
from payments.payment.state import Approved, Declined
from payments.settings import Settings

DAY_S = 24 * 3600.0
INR_MIN = 100
# When an authorized payment of an order goes back to the customer: what Razorpay allows, in minutes
EXPIRY_MIN, EXPIRY_MAX = 12, 7200

# Of the refusals of a refund these are final. Only the description tells them apart.
REFUND_DECLINES = {
    "greater than amount captured": "refund_exceeds_capture",
    "fully refunded already": "already_refunded",
    "more than 6 months old": "refund_too_late",
    "amount must be at least": "amount_too_small",
}
KEY_ID = re.compile(r"rzp_(test|live)_[A-Za-z0-9]+")
PAYMENT_ID = re.compile(r"pay_[A-Za-z0-9]{1,40}")

# How a charge stands, and the customer's payment by which it does.
Look = tuple[Approved | Declined | Open, RazorpayPayment | None]


class RazorpayGateway:
    name = "razorpay"
    knows_our_id = False
    charge_retry_s = DAY_S  # of orders: one is found by its receipt before another is made
    refund_retry_s = 3600.0  # how long a key is remembered is not documented
    late_capture_s = 6 * DAY_S  # an authorized payment expires after 5 days at the latest
    declines_may_turn_s = 6 * DAY_S  # Razorpay asks the bank about a failed one for up to 5 days

    def __init__(
        self,
        http: ProviderHttp,
        key_id: str,
        webhook_secrets: tuple[str, ...] = (),
        *,
        expiry_min: int = EXPIRY_MIN,
    ) -> None:
        """`http` must not keep connections: errors and empty lists do not name what was asked."""
        self._api = RazorpayApi(http)
        self._key_id = key_id
        self._webhook_secrets = webhook_secrets
        self._expiry_min = expiry_min

    def refuses(self, charge: ProviderCharge) -> Refusal | None:
        if charge.currency not in CURRENCIES:
            return Refusal("currency", "must be one that Razorpay takes")
        if charge.currency == "INR" and charge.amount_cents < INR_MIN:
            return Refusal("amount_cents", f"must be at least {INR_MIN} in INR")
        try:
            to_razorpay(charge.amount_cents, charge.currency)
        except ValueError as error:
            return Refusal("amount_cents", str(error))
        if charge.payment_method is not None and self.reference(charge) is None:
            message = (
                "must be the pay_… that Razorpay Checkout returned; without it an order is made"
            )
            return Refusal("payment_method", message)
        return None

    def reference(self, charge: ProviderCharge) -> str | None:
        method = charge.payment_method or ""
        return method if PAYMENT_ID.fullmatch(method) else None

    def needs_preparing(self, charge: ProviderCharge) -> bool:
        return self.reference(charge) is None

    async def account(self, timeout_s: float) -> str | None:
        """The mode, without a call: the API does not tell the account of a key. So a test key at
        least is not taken for one of the live account."""
        return self._mode

    async def prepare(self, charge: ProviderCharge, timeout_s: float) -> str | Declined:
        until = now() + timeout_s
        order = await self._api.order_of(charge, until)
        if order is None:
            made = await self._api.make_order(charge, self._expiry_min, until)
            if isinstance(made, Declined):
                return made
            order = made
        amount = to_razorpay(charge.amount_cents, charge.currency)
        asked = (charge.payment_id, amount, charge.currency)
        if (made_for(order), order.amount, order.currency) != asked:
            raise OutcomeUnknown("Razorpay made an order for something else")
        return order.id

    async def charge(self, charge: ProviderCharge, timeout_s: float) -> Approved | Declined | Open:
        until = now() + timeout_s
        found, payment = await self._look(charge, until)
        if payment is None or isinstance(found, Declined) or found.id != charge.payment_id:
            return found  # of another payment's the caller sees the id
        if isinstance(found, Open) and found.step != "authorized":
            return found
        of_order = None if payment.id == charge.reference else found.id
        if of_order is None:
            payment = await self._api.mark(payment, charge.payment_id, until)
            if (marked := named(payment.notes)) != charge.payment_id:
                raise OutcomeUnknown(f"the payment is marked as that of {marked}")
        if isinstance(found, Approved):
            return found
        body = {"amount": payment.amount, "currency": payment.currency}
        response = await self._api.send("POST", f"/payments/{payment.id}/capture", until, body)
        if response.status == 200:
            return self._standing(payment_in(response, payment.id), charge, of_order)
        if response.status != 400:
            response.unexpected()
        # Usually it was captured meanwhile.
        found, _ = await after_sending(self._look(charge, until))
        return response.unexpected() if isinstance(found, Open) else found

    async def find_charge(
        self, charge: ProviderCharge, timeout_s: float
    ) -> Approved | Declined | Open | None:
        found, _ = await self._look(charge, now() + timeout_s)
        return found

    async def cancel(
        self, charge: ProviderCharge, timeout_s: float
    ) -> Approved | Declined | Open | None:
        """Razorpay has no such call: what is authorized and not captured expires there."""
        return await self.find_charge(charge, timeout_s)

    async def refund(self, refund: ProviderRefund, timeout_s: float) -> Approved | Declined:
        if not PAYMENT_ID.fullmatch(refund.provider_txn_id):
            return Declined("payment_not_found")
        until = now() + timeout_s
        body = {
            "amount": to_razorpay(refund.amount_cents, refund.currency),
            "receipt": str(refund.refund_id),
            "notes": {"refund_id": str(refund.refund_id), "payment_id": str(refund.payment_id)},
        }
        path = f"/payments/{refund.provider_txn_id}/refund"
        key = {"X-Refund-Idempotency": str(refund.refund_id)}
        response = await self._api.send("POST", path, until, body, key)
        if response.status == 200:
            return refunded(response.read(REFUND), refund)
        description = description_of(response)
        codes = [code for text, code in REFUND_DECLINES.items() if text in description]
        if response.status != 400 or not codes:
            return fail(response)
        # It may have gone through before, if Razorpay did not recognise the key.
        done = await after_sending(self._api.refund_of(refund, until))
        return Declined(codes[0]) if done is None else refunded(done, refund)

    async def find_refund(
        self, refund: ProviderRefund, timeout_s: float
    ) -> Approved | Declined | None:
        found = await self._api.refund_of(refund, now() + timeout_s)
        return None if found is None else refunded(found, refund)

    async def hint(
        self, headers: Mapping[str, str], raw_body: bytes, timeout_s: float
    ) -> Hint | None:
        """The signature covers the body alone, so an old webhook is not known as such."""
        signatures = (headers.get("x-razorpay-signature", ""),)
        if not is_signed(raw_body, signatures, self._webhook_secrets):
            raise BadSignature("the signature is missing or not Razorpay's, or no secret is set")
        event = decoded(raw_body, EVENT)
        if event is None:
            return None  # Razorpay's, and about no payment
        payload = event.payload
        event_id = headers.get("x-razorpay-event-id") or hashlib.sha256(raw_body).hexdigest()
        if (payment_id := payload.payment_id()) is not None:
            return Hint(event_id=event_id, payment_id=payment_id)
        reference = payload.reference()
        return None if reference is None else Hint(event_id=event_id, reference=reference)

    async def findings(self, timeout_s: float) -> list[ProviderFinding]:
        response = await self._api.send("GET", "/orders?count=1", now() + timeout_s)
        refused = response.status == 401 or "Authentication failed" in description_of(response)
        if response.status != 200 and not refused:
            response.unexpected()
        takes = "takes the API key"
        if refused:
            takes = "rejects the API key: set RAZORPAY_KEY_ID and RAZORPAY_KEY_SECRET as generated"
        signed = "webhooks are verified"
        if not self._webhook_secrets:
            signed = "no RAZORPAY_WEBHOOK_SECRETS: webhooks are rejected, settling asks without"
        money = "no real money moves" if self._mode == "test" else "real money moves"
        return [
            ProviderFinding(False, f"{self._mode} mode: {money}"),
            ProviderFinding(refused, takes),
            ProviderFinding(False, signed),
            ProviderFinding(
                False,
                "orders made here are captured manually; for other payments that is a setting of "
                "the dashboard, which the API does not show: it must be manual capture",
            ),
        ]

    async def close(self) -> None:
        await self._api.close()

    @property
    def _mode(self) -> str:
        return self._key_id.split("_")[1]

    async def _look(self, charge: ProviderCharge, until: float) -> Look:
        reference = charge.reference or ""
        if reference.startswith("order_"):
            return await self._look_at_order(reference, charge, until)
        payment = await self._api.payment(reference, until)
        if payment.order_id is not None and named(payment.notes) != charge.payment_id:
            order = await self._api.order(payment.order_id, until)
            if made_for(order) not in (None, charge.payment_id):
                # `prepare` made it for another payment of ours, by which it is captured.
                return Declined("payment_of_another_order"), None
        return self._standing(payment, charge), payment

    async def _look_at_order(self, order_id: str, charge: ProviderCharge, until: float) -> Look:
        """An order is never declined: after a failed payment the customer can try again."""
        order = await self._api.order(order_id, until)  # before its payments, which then are newer
        if (our_id := made_for(order)) is None:
            raise OutcomeUnknown("the order was not made by this service")
        payments = await self._api.payments_of(order_id, until)
        captured = [each for each in payments if each.is_captured]
        if order.status == "paid" and not captured:
            raise OutcomeUnknown("the order is paid, and none of its payments is captured")
        authorized = [each for each in payments if each.status == "authorized"]
        authorized = [each for each in authorized if differing(each, charge) is None]
        # Of several, the same one in every process.
        for payment in sorted(captured or authorized, key=lambda each: (each.created_at, each.id)):
            return self._standing(payment, charge, our_id), payment
        return Open(id=our_id, step="action", action=self._action(order)), None

    def _standing(
        self, payment: RazorpayPayment, charge: ProviderCharge, of_order: UUID | None = None
    ) -> Approved | Declined | Open:
        """What a customer's payment means for a charge. Whose it is says its order, if that is of
        ours, else its notes; unmarked it is that of the charge that has its id as reference."""
        our_id = of_order or named(payment.notes) or charge.payment_id
        if payment.is_captured:
            return Approved(
                id=our_id,
                amount_cents=cents(payment),
                currency=payment.currency,
                provider_txn_id=payment.id,
            )
        match payment.status:
            case "refunded":
                return Declined("expired")  # it was authorized, and went back without a capture
            case "failed":
                return Declined(code_of(payment.error_reason or payment.error_code, "failed"))
            case "authorized" | "created" if differs := differing(payment, charge):
                return Declined(differs)
            case "authorized":
                return Open(id=our_id, step="authorized")
            case (
                "created"
            ):  # the customer is at the bank; another Checkout would be another payment
                return Open(id=our_id, step="action")
        raise OutcomeUnknown("Razorpay responded with a status that it does not document")

    def _action(self, order: RazorpayOrder) -> NextAction:
        """What Checkout needs."""
        fields = {
            "key_id": self._key_id,
            "order_id": order.id,
            "amount": str(order.amount),
            "currency": order.currency,
        }
        return NextAction(type="razorpay", fields=fields)


def build(settings: Settings) -> RazorpayGateway:
    """Raises StartError, which names the variable and repeats no value."""
    if settings.razorpay_key_id is None or not KEY_ID.fullmatch(settings.razorpay_key_id):
        raise StartError("RAZORPAY_KEY_ID must be set to a key id: rzp_test_… or rzp_live_…")
    if settings.razorpay_key_secret is None:
        raise StartError("RAZORPAY_KEY_SECRET must be set to the secret of the API key")
    key = f"{settings.razorpay_key_id}:{settings.razorpay_key_secret}".encode()
    headers = {"Authorization": f"Basic {base64.b64encode(key).decode()}"}
    http = connected(
        "RAZORPAY_API_BASE",
        settings.razorpay_api_base,
        lambda base: ProviderHttp(base, headers, keep_alive=False),
    )
    # What is not captured by then never is, and need not be kept from the customer any longer.
    expiry_min = math.ceil(settings.pending_abandon_after_s / 60)
    return RazorpayGateway(
        http,
        settings.razorpay_key_id,
        settings.razorpay_webhook_secrets,
        expiry_min=min(max(expiry_min, EXPIRY_MIN), EXPIRY_MAX),
    )
