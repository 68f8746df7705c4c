"""Calls of Razorpay's API, and the errors that mean something."""

import asyncio
import re
from collections.abc import Mapping
from typing import NoReturn
from uuid import UUID

from payments.gateways import (
    OutcomeUnknown,
    ProviderCharge,
    ProviderRefund,
    ReferenceNotFound,
)
from payments.gateways.http import ProviderHttp, ProviderResponse, decoded
from payments.gateways.razorpay_entities import (
    ERROR,
    ORDER,
    ORDERS,
    PAYMENT,
    PAYMENTS,
    REFUNDS,
    RazorpayErrorDetail,
    RazorpayOrder,
    RazorpayPayment,
    RazorpayRefund,
    as_dict,
    code_of,
    made_for,
    named,
)
from payments.gateways.units import to_razorpay
from payments.payment.state import Declined

PAGE = 100  # the most entries of a list
LIST_BYTES_MAX = 512 * 1024
ORDER_STATES = ("paid", "attempted", "created")  # the one that tells most comes first
# What the description of a rejected order is about; a limit of the account has no `field`.
REFUSED = ("amount", "currency")
ABOUT_REFUSED = re.compile(r"((the|order) )?(amount|currency)\b", re.IGNORECASE)
UNKNOWN_ID = re.compile(r"\bid provided does not exist\b|\bis not a valid id\b")


class RazorpayApi:
    """Each call ends at `until`, a time of the event loop. Raises as ProviderHttp does, and
    ReferenceNotFound for an id that this account does not have."""

    def __init__(self, http: ProviderHttp) -> None:
        self._http = http

    async def payment(self, payment_id: str, until: float) -> RazorpayPayment:
        return payment_in(await self.send("GET", f"/payments/{payment_id}", until), payment_id)

    async def mark(
        self, payment: RazorpayPayment, payment_id: UUID, until: float
    ) -> RazorpayPayment:
        """The payment with our id in its notes, as Razorpay states it."""
        if named(payment.notes) == payment_id:
            return payment
        notes = {**as_dict(payment.notes), "payment_id": str(payment_id)}
        path = f"/payments/{payment.id}"
        return payment_in(await self.send("PATCH", path, until, {"notes": notes}), payment.id)

    async def order(self, order_id: str, until: float) -> RazorpayOrder:
        response = await self.send("GET", f"/orders/{order_id}", until)
        order = response.read(ORDER) if response.status == 200 else fail(response)
        if order.id != order_id or order.status not in ORDER_STATES:
            raise OutcomeUnknown("Razorpay responded about another order, or with another status")
        return order

    async def payments_of(self, order_id: str, until: float) -> list[RazorpayPayment]:
        response = await self.send("GET", f"/orders/{order_id}/payments", until)
        listed = response.read(PAYMENTS).items if response.status == 200 else fail(response)
        if any(payment.order_id != order_id for payment in listed):
            raise OutcomeUnknown("Razorpay responded about another order")
        return listed

    async def order_of(self, charge: ProviderCharge, until: float) -> RazorpayOrder | None:
        """The order that was made before for this payment; of several the one that is paid, or
        was to be: only one of them was ever shown to a customer."""
        path = f"/orders?receipt={charge.payment_id}&count={PAGE}"
        response = await self.send("GET", path, until)
        listed = response.read(ORDERS).items if response.status == 200 else fail(response)
        ours = [each for each in listed if made_for(each) == charge.payment_id]
        ours = [each for each in ours if each.status in ORDER_STATES]
        return min(
            ours,
            key=lambda each: (ORDER_STATES.index(each.status), each.created_at, each.id),
            default=None,
        )

    async def make_order(
        self, charge: ProviderCharge, expiry_min: int, until: float
    ) -> RazorpayOrder | Declined:
        """`expiry_min`: after so many minutes an authorized payment goes back to the customer.
        Declined if Razorpay makes no order of this amount or currency."""
        payment_id = str(charge.payment_id)
        body: dict[str, object] = {
            "amount": to_razorpay(charge.amount_cents, charge.currency),
            "currency": charge.currency,
            "receipt": payment_id,
            "notes": {"payment_id": payment_id},
            "payment": {
                "capture": "manual",
                "capture_options": {
                    "manual_expiry_period": expiry_min,
                    "refund_speed": "normal",
                },
            },
        }
        # One order for one receipt, also for calls at the same time. An account for which that is
        # no field rejects it, and makes nothing.
        response = await self.send("POST", "/orders", until, body | {"unique_receipt": True})
        if response.status == 400 and "unique_receipt" in description_of(response):
            response = await self.send("POST", "/orders", until, body)
        if (refused := refusal_of(response)) is not None:
            return refused
        return response.read(ORDER) if response.status == 200 else fail(response)

    async def refund_of(self, refund: ProviderRefund, until: float) -> RazorpayRefund | None:
        """By our id, which is its receipt and in its notes."""
        our_id, skip = str(refund.refund_id), 0
        while True:
            path = f"/payments/{refund.provider_txn_id}/refunds?count={PAGE}&skip={skip}"
            response = await self.send("GET", path, until)
            listed = response.read(REFUNDS).items if response.status == 200 else fail(response)
            for each in listed:
                if our_id in (each.receipt, as_dict(each.notes).get("refund_id")):
                    return each
            if len(listed) < PAGE:
                return None
            skip += PAGE

    async def send(
        self,
        method: str,
        path: str,
        until: float,
        body: object = None,
        headers: Mapping[str, str] | None = None,
    ) -> ProviderResponse:
        return await self._http.exchange(
            method,
            f"/v1{path}",
            timeout_s=until - now(),
            headers=headers,
            body=body,
            response_bytes_max=LIST_BYTES_MAX,
        )

    async def close(self) -> None:
        await self._http.close()


def now() -> float:
    return asyncio.get_running_loop().time()


def error_of(response: ProviderResponse) -> RazorpayErrorDetail:
    """Razorpay's error; an empty one if the body is none."""
    body = decoded(response.body, ERROR)
    return RazorpayErrorDetail() if body is None else body.error


def description_of(response: ProviderResponse) -> str:
    return error_of(response).description or ""


def refusal_of(response: ProviderResponse) -> Declined | None:
    """Of an order whose amount or currency Razorpay does not take: none is made, now or later."""
    error = error_of(response)
    if response.status != 400 or error.code != "BAD_REQUEST_ERROR":
        return None
    if error.field not in REFUSED and not ABOUT_REFUSED.match(error.description or ""):
        return None
    reason = None if error.reason == "NA" else error.reason
    return Declined(code_of(reason, error.code))


def fail(response: ProviderResponse) -> NoReturn:
    """Raises ReferenceNotFound or OutcomeUnknown. There is no error code for an unknown id."""
    if response.status in (400, 404) and UNKNOWN_ID.search(description_of(response)):
        raise ReferenceNotFound("Razorpay does not know the id: is the key of another account?")
    response.unexpected()


def payment_in(response: ProviderResponse, payment_id: str) -> RazorpayPayment:
    payment = response.read(PAYMENT) if response.status == 200 else fail(response)
    if payment.id != payment_id:
        raise OutcomeUnknown("Razorpay responded about another payment")
    return payment
