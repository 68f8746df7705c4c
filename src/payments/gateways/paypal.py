"""PayPal: Orders v2 and Payments v2. docs/gateways/paypal.md describes it.

A charge is an order with the intent CAPTURE. Only our own call captures it, after the customer has
approved it. An order that is not to be captured any more is closed at PayPal before that is said:
it gets the intent AUTHORIZE, with which it cannot be captured, and keeps the reason.
"""

import re
from collections.abc import Mapping
from urllib.parse import quote

from payments.errors import StartError
from payments.gateways import (
    Hint,
    NeverSent,
    Open,
    OutcomeUnknown,
    ProviderCharge,
    ProviderFinding,
    ProviderRefund,
    ReferenceNotFound,
    Refusal,
    paypal_api,
    paypal_orders,
    paypal_webhooks,
)
from payments.gateways.adapters import connected
from payments.gateways.http import ProviderHttp, ProviderResponse
from payments.gateways.oauth import OAuthHttp
from payments.gateways.paypal_api import ORDERS, VAULT, PayPalCall
from payments.gateways.paypal_orders import ORDER_ID, PayPalOrder, issue_of, read_order, stands
from payments.gateways.units import to_paypal
from payments.payment.state import Approved, Declined
from payments.settings import Settings

HOUR_S = 3600.0
DAY_S = 24 * HOUR_S
BASES = {"live": "https://api-m.paypal.com", "sandbox": "https://api-m.sandbox.paypal.com"}
TOKEN_PATH = "/v1/oauth2/token"  # noqa: S105 - no secret
ACCOUNT_KEY = "payment-service-account"


class PayPalGateway:
    name = "paypal"
    knows_our_id = False
    charge_retry_s = 5 * HOUR_S  # keys of orders live for 6 hours
    refund_retry_s = 44 * DAY_S  # those of refunds for 45 days
    late_capture_s = 14 * DAY_S
    # PayPal does not say what becomes of a capture that is under way while the order is closed.
    declines_may_turn_s = HOUR_S

    def __init__(self, http: OAuthHttp, *, environment: str, webhook_id: str | None = None) -> None:
        self._http = http
        self._environment = environment
        self._webhook_id = webhook_id
        self._merchant_id: str | None = None
        self._account_compared = False

    def refuses(self, charge: ProviderCharge) -> Refusal | None:
        if charge.currency not in paypal_api.CURRENCIES:
            return Refusal("currency", "must be one that PayPal has")
        try:
            to_paypal(charge.amount_cents, charge.currency)
        except ValueError as error:
            return Refusal("amount_cents", str(error))
        if charge.payment_method is None or self.reference(charge) or _vault(charge):
            return None
        return Refusal(
            "payment_method",
            "must be the id of a PayPal order, or vault: and the token of a saved payment method",
        )

    def reference(self, charge: ProviderCharge) -> str | None:
        method = charge.payment_method
        return method if method is not None and ORDER_ID.fullmatch(method) else None

    def needs_preparing(self, charge: ProviderCharge) -> bool:
        return self.reference(charge) is None

    async def account(self, timeout_s: float) -> str | None:
        merchant_id = await self._merchant(PayPalCall(self._http, timeout_s))
        self._account_compared = True  # by the caller, before anything is charged
        return f"{self._environment}:{merchant_id}"

    async def prepare(self, charge: ProviderCharge, timeout_s: float) -> str | Declined:
        named = str(charge.payment_id)
        unit = {"custom_id": named, "invoice_id": named, "amount": paypal_api.money(charge)}
        call = PayPalCall(self._http, timeout_s)
        response = await paypal_api.made(call, unit, named, moves=True)
        if response.status == 422 and (issue := issue_of(response).issue) in paypal_api.REFUSALS:
            return Declined(issue)
        order = read_order(response)
        if order.owner != charge.payment_id:
            raise OutcomeUnknown("the provider prepared something else")
        return order.id

    async def charge(self, charge: ProviderCharge, timeout_s: float) -> Approved | Declined | Open:
        call = PayPalCall(self._http, timeout_s)
        order = await self._order(call, charge)
        found = _found(order, charge)
        if isinstance(order, Declined) or not _is_ours_to_end(found, charge):
            return found
        merchant_id = None  # an order of our own is paid to us
        if order.owner is None:
            merchant_id = self._merchant_id or await self._merchant(call)
        if reason := paypal_orders.misfit(order, charge, merchant_id):
            return await self._declined(call, order, charge, reason)
        if isinstance(found, Open) and found.step == "action":
            return await self._to_customer(call, order, charge, found)
        if order.owner is None:
            response = await paypal_api.named(call, order, charge)
            if response.status != 204:
                return await self._look(call, charge, response)
            order = paypal_orders.claimed(order, charge)
        return await self._capture(call, order, charge)

    async def find_charge(
        self, charge: ProviderCharge, timeout_s: float
    ) -> Approved | Declined | Open | None:
        return _found(await self._order(PayPalCall(self._http, timeout_s), charge), charge)

    async def cancel(
        self, charge: ProviderCharge, timeout_s: float
    ) -> Approved | Declined | Open | None:
        call = PayPalCall(self._http, timeout_s)
        order = await self._order(call, charge)
        found = _found(order, charge)
        if isinstance(order, Declined) or not _is_ours_to_end(found, charge):
            return found
        return await self._close(call, order, charge, paypal_orders.CANCELLED)

    async def refund(self, refund: ProviderRefund, timeout_s: float) -> Approved | Declined:
        named = str(refund.refund_id)
        path = f"/v2/payments/captures/{quote(refund.provider_txn_id, safe='')}/refund"
        body = {"amount": paypal_api.money(refund), "custom_id": named, "invoice_id": named}
        call = PayPalCall(self._http, timeout_s)
        response = await call.ask("POST", path, body, key=named, moves=True)
        if response.status in (200, 201):
            return paypal_orders.refund_outcome(paypal_orders.read_refund(response), refund)
        if response.status not in (404, 422):
            response.unexpected()
        issue = issue_of(response).issue
        if issue != paypal_orders.NO_SUCH_ID and issue not in paypal_api.REFUND_DECLINES:
            response.unexpected()
        return Declined(issue)

    async def find_refund(
        self, refund: ProviderRefund, timeout_s: float
    ) -> Approved | Declined | None:
        reference = paypal_api.checked(refund.reference)
        response = await PayPalCall(self._http, timeout_s).ask("GET", f"{ORDERS}/{reference}")
        if paypal_orders.is_unknown_id(response):
            raise ReferenceNotFound("the provider does not know the order of the refund")
        found = paypal_orders.find_refund(read_order(response, reference), refund)
        return None if found is None else paypal_orders.refund_outcome(found, refund)

    async def hint(
        self, headers: Mapping[str, str], raw_body: bytes, timeout_s: float
    ) -> Hint | None:
        question = paypal_webhooks.question(headers, raw_body, self._webhook_id)
        call = PayPalCall(self._http, timeout_s)
        paypal_webhooks.check(await call.ask("POST", paypal_webhooks.VERIFY_PATH, question))
        return paypal_webhooks.hint_of(raw_body)

    async def findings(self, timeout_s: float) -> list[ProviderFinding]:
        try:
            await self._http.check(timeout_s)
        except NeverSent as error:
            if error.is_outage:
                raise
            next_step = (
                "set PAYPAL_CLIENT_ID and PAYPAL_CLIENT_SECRET to those of one REST app in the "
                f"environment {self._environment}"
            )
            return [ProviderFinding(True, f"{error}: {next_step}")]
        accepted = ProviderFinding(False, f"{self._environment}: the credentials are accepted")
        call = PayPalCall(self._http, timeout_s)
        return [accepted, await paypal_webhooks.finding(call.ask, self._webhook_id)]

    async def close(self) -> None:
        await self._http.close()

    async def _merchant(self, call: PayPalCall) -> str:
        """PayPal states the merchant's id as the payee of an order. So one is made, the same for
        six hours; nobody approves it."""
        unit = {"amount": {"currency_code": "USD", "value": "1.00"}}
        order = read_order(await paypal_api.made(call, unit, ACCOUNT_KEY))
        merchant_id = order.unit.payee.merchant_id
        if not re.fullmatch(r"[A-Z0-9]{1,32}", merchant_id):
            raise OutcomeUnknown("the provider does not state the payee of an order")
        self._merchant_id = merchant_id
        return merchant_id

    async def _order(self, call: PayPalCall, charge: ProviderCharge) -> PayPalOrder | Declined:
        """An order that nobody captured expires after some hours, and is not found any more. Nor
        is one of another account: that it is none is known once `account` was compared. A second
        request, which would write, must say the same."""
        reference = paypal_api.checked(charge.reference)
        response = await call.ask("GET", f"{ORDERS}/{reference}")
        if not paypal_orders.is_unknown_id(response):
            return read_order(response, reference)
        if not self._account_compared:
            raise ReferenceNotFound("the provider does not know its order")
        if paypal_orders.is_unknown_id(await paypal_api.written(call, charge)):
            return Declined("order_not_found")
        raise OutcomeUnknown("the order was not found, and then it was")

    async def _capture(
        self, call: PayPalCall, order: PayPalOrder, charge: ProviderCharge
    ) -> Approved | Declined | Open:
        # PayPal may return the rejection of a key again, so the key is another one once the
        # customer has acted. That an order is captured once, PayPal ensures without it.
        since = re.sub(r"[^0-9A-Za-z]", "", order.update_time)[:32]
        vault = _vault(charge)
        response = await call.ask(
            "POST",
            f"{ORDERS}/{order.id}/capture",
            {"payment_source": {"paypal": {"vault_id": vault}}} if vault else {},
            key=f"{charge.payment_id}-capture-{since}",
            moves=True,
        )
        if response.status in (200, 201):
            captured = read_order(response, order.id)
            found = _found(captured, charge)
            if captured.captures and _is_ours_to_end(found, charge):
                code = paypal_orders.decline_code(captured.captures[-1])
                return await self._declined(call, order, charge, code)
            return found
        if response.status != 422:
            response.unexpected()
        problem = issue_of(response)
        if problem.issue in paypal_api.CUSTOMER_AGAIN:
            action = paypal_orders.redirect((*problem.links, *order.links))
            return Open(id=charge.payment_id, step="action", action=action)
        if problem.issue in paypal_api.DECLINES:
            return await self._declined(call, order, charge, problem.issue)
        return await self._look(call, charge, response)

    async def _look(
        self, call: PayPalCall, charge: ProviderCharge, rejected: ProviderResponse
    ) -> Approved | Declined | Open:
        """What the order says, after PayPal rejected something because of its state."""
        issue = issue_of(rejected).issue if rejected.status == 422 else ""
        if issue not in paypal_api.LOOK:
            rejected.unexpected()
        found = _found(await self._order(call, charge), charge)
        if isinstance(found, Open) and found.step == "ready" and issue != "ORDER_NOT_APPROVED":
            raise OutcomeUnknown(f"the provider rejected it with {issue}, and the order is open")
        return found

    async def _to_customer(
        self, call: PayPalCall, order: PayPalOrder, charge: ProviderCharge, found: Open
    ) -> Approved | Declined | Open:
        """PayPal learns only here where the customer is to return to: it is not in the log."""
        if charge.return_url is None or order.status != "CREATED":
            return found
        context = {
            "return_url": charge.return_url,
            "cancel_url": charge.return_url,
            "shipping_preference": "NO_SHIPPING",
            "user_action": "PAY_NOW",
        }
        body = {"payment_source": {"paypal": {"experience_context": context}}}
        response = await call.ask("POST", f"{ORDERS}/{order.id}/confirm-payment-source", body)
        if response.status not in (200, 422):  # 422: another request came first, or the customer
            response.unexpected()
        return _found(await self._order(call, charge), charge)

    async def _declined(
        self, call: PayPalCall, order: PayPalOrder, charge: ProviderCharge, reason: str
    ) -> Approved | Declined | Open:
        found = await self._close(call, order, charge, reason)
        if _is_ours_to_end(found, charge):
            raise OutcomeUnknown(f"{reason}, and the order cannot be closed")
        return found

    async def _close(
        self, call: PayPalCall, order: PayPalOrder, charge: ProviderCharge, reason: str
    ) -> Approved | Declined | Open:
        """Has the order never be captured, if PayPal allows that at its step; what it is then."""
        response = await paypal_api.named(call, order, charge, reason)
        if response.status not in (204, 400, 422):
            response.unexpected()
        return _found(await self._order(call, charge), charge)


def _found(order: PayPalOrder | Declined, charge: ProviderCharge) -> Approved | Declined | Open:
    if isinstance(order, Declined):
        return order
    return stands(order, charge, pays_alone=_vault(charge) is not None)


def _is_ours_to_end(found: Approved | Declined | Open, charge: ProviderCharge) -> bool:
    """Whether it waits for us or the customer, and is this payment's."""
    return isinstance(found, Open) and found.step != "processing" and found.id == charge.payment_id


def _vault(charge: ProviderCharge) -> str | None:
    """The token of a saved payment method, which pays without the customer."""
    token = VAULT.fullmatch(charge.payment_method or "")
    return None if token is None else token[1]


def build(settings: Settings) -> PayPalGateway:
    """`GATEWAY=paypal`. Raises StartError."""
    client_id, secret = settings.paypal_client_id, settings.paypal_client_secret
    for name, value in (("PAYPAL_CLIENT_ID", client_id), ("PAYPAL_CLIENT_SECRET", secret)):
        if not value:
            raise StartError(f"{name} must be set to that of a REST app, for the provider paypal")
    base = settings.paypal_api_base
    if base is None:
        http = ProviderHttp(BASES[settings.paypal_environment])
    else:
        http = connected("PAYPAL_API_BASE", base, ProviderHttp)
    oauth = OAuthHttp(http, TOKEN_PATH, client_id or "", secret or "")
    return PayPalGateway(
        oauth, environment=settings.paypal_environment, webhook_id=settings.paypal_webhook_id
    )
