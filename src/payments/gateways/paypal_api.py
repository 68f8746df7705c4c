"""Requests to PayPal: how one is sent, what is in it, and what its rejections mean."""

import re
from collections.abc import Awaitable
from typing import Any

from payments.gateways import ProviderCharge, ProviderRefund, ReferenceNotFound
from payments.gateways.adapters import Exchanges
from payments.gateways.http import ProviderResponse
from payments.gateways.oauth import OAuthHttp
from payments.gateways.paypal_orders import ORDER_ID, PayPalOrder
from payments.gateways.units import to_paypal

AGAIN_S = 0.2  # until a request that PayPal is still working on is sent again
ORDERS = "/v2/checkout/orders"
VAULT = re.compile(r"vault:([0-9a-zA-Z_-]{1,245})")


def _words(text: str) -> frozenset[str]:
    return frozenset(text.split())


# developer.paypal.com/api/rest/reference/currency-codes; BRL, CNY, INR and MYR only for accounts
# of the country.
CURRENCIES = _words(
    "AUD BRL CAD CHF CNY CZK DKK EUR GBP HKD HUF ILS INR JPY MXN MYR NOK NZD PHP PLN SEK SGD THB "
    "TWD USD"
)

# What the making of an order is rejected with, finally: no order of this amount, or none to this
# payee.
REFUSALS = _words(
    "CANNOT_BE_ZERO_OR_NEGATIVE CURRENCY_NOT_SUPPORTED DECIMALS_NOT_SUPPORTED DECIMAL_PRECISION "
    "INVALID_CURRENCY_CODE MAX_VALUE_EXCEEDED PAYEE_ACCOUNT_INVALID "
    "PAYEE_ACCOUNT_LOCKED_OR_CLOSED PAYEE_ACCOUNT_RESTRICTED"
)

# What a capture is rejected with, finally: the customer has to pay in another way.
DECLINES = _words(
    "AGREEMENT_ALREADY_CANCELLED BILLING_AGREEMENT_NOT_FOUND CARD_BRAND_NOT_SUPPORTED "
    "CARD_EXPIRED COMPLIANCE_VIOLATION DECLINED_DUE_TO_RELATED_TXN DOMESTIC_TRANSACTION_REQUIRED "
    "IDENTIFIER_NOT_FOUND INSTRUMENT_DECLINED MAX_NUMBER_OF_PAYMENT_ATTEMPTS_EXCEEDED "
    "MISMATCHED_VAULT_ID_TO_PAYMENT_SOURCE PAYEE_BLOCKED_TRANSACTION "
    "PAYER_ACCOUNT_LOCKED_OR_CLOSED PAYER_ACCOUNT_RESTRICTED PAYER_CANNOT_PAY "
    "REFERENCED_CARD_EXPIRED TOKEN_ID_NOT_FOUND TRANSACTION_BLOCKED_BY_PAYEE "
    "TRANSACTION_LIMIT_EXCEEDED TRANSACTION_RECEIVING_LIMIT_EXCEEDED TRANSACTION_REFUSED"
)
CUSTOMER_AGAIN = _words("PAYER_ACTION_REQUIRED REDIRECT_PAYER_FOR_ALTERNATE_FUNDING")

# The order says what happened; with the first of these it may also be open as before.
LOOK = _words(
    "ORDER_NOT_APPROVED ACTION_DOES_NOT_MATCH_INTENT DUPLICATE_INVOICE_ID ORDER_ALREADY_CAPTURED "
    "ORDER_ALREADY_COMPLETED ORDER_COMPLETION_IN_PROGRESS"
)
REFUND_DECLINES = _words(
    "CAPTURE_FULLY_REFUNDED CURRENCY_MISMATCH MAX_NUMBER_OF_REFUNDS_EXCEEDED "
    "PARTIAL_REFUND_NOT_ALLOWED REFUND_AMOUNT_EXCEEDED REFUND_AMOUNT_TOO_LOW "
    "REFUND_CAPTURE_CURRENCY_MISMATCH REFUND_IS_RESTRICTED REFUND_NOT_ALLOWED "
    "REFUND_NOT_PERMITTED_DUE_TO_CHARGEBACK REFUND_TIME_LIMIT_EXCEEDED TRANSACTION_DISPUTED"
)


class PayPalCall:
    """The exchanges of one call of the gateway, within its time."""

    def __init__(self, http: OAuthHttp, timeout_s: float) -> None:
        self._http = http
        self._exchanges = Exchanges(timeout_s)

    async def ask(
        self, method: str, path: str, body: object = None, *, key: str = "", moves: bool = False
    ) -> ProviderResponse:
        """One exchange, repeated while PayPal works on an earlier request with this key. Once what
        `moves` may have arrived, NeverSent would not be true of the call any more."""
        headers = {"PayPal-Request-Id": key, "Prefer": "return=representation"} if key else {}

        def once(left_s: float) -> Awaitable[ProviderResponse]:
            return self._http.exchange(method, path, timeout_s=left_s, headers=headers, body=body)

        return await self._exchanges.repeated(
            once, lambda response: response.status == 409, AGAIN_S, moves=moves
        )


async def made(
    call: PayPalCall, unit: dict[str, Any], key: str, *, moves: bool = False
) -> ProviderResponse:
    """The response to the creation of an order. Without `payment_source` it is only made."""
    body = {"intent": "CAPTURE", "purchase_units": [unit]}
    return await call.ask("POST", ORDERS, body, key=key, moves=moves)


async def named(
    call: PayPalCall, order: PayPalOrder, charge: ProviderCharge, why_closed: str | None = None
) -> ProviderResponse:
    """Has the order name our payment; closes it, if there is a reason to."""
    unit, payment_id = order.unit, str(charge.payment_id)
    invoice_id = payment_id if why_closed is None else f"{payment_id} {why_closed}"
    closing = [{"op": "replace", "path": "/intent", "value": "AUTHORIZE"}]
    changes = [
        *(closing if why_closed is not None else ()),
        _changed(unit.reference_id, "custom_id", unit.custom_id, payment_id),
        _changed(unit.reference_id, "invoice_id", unit.invoice_id, invoice_id),
    ]
    moves = why_closed is not None
    return await call.ask("PATCH", f"{ORDERS}/{order.id}", changes, moves=moves)


async def written(call: PayPalCall, charge: ProviderCharge) -> ProviderResponse:
    """The response to a change that changes nothing of an order of ours."""
    payment_id = str(charge.payment_id)
    changes = [_changed("default", "custom_id", payment_id, payment_id)]
    return await call.ask("PATCH", f"{ORDERS}/{checked(charge.reference)}", changes)


def _changed(unit: str, field: str, was: str, value: str) -> dict[str, str]:
    path = f"/purchase_units/@reference_id=='{unit}'/{field}"
    return {"op": "replace" if was else "add", "path": path, "value": value}


def money(asked: ProviderCharge | ProviderRefund) -> dict[str, str]:
    value = to_paypal(asked.amount_cents, asked.currency)
    return {"currency_code": asked.currency, "value": value}


def checked(reference: str | None) -> str:
    if reference is None or not ORDER_ID.fullmatch(reference):
        raise ReferenceNotFound("the reference is no id of a PayPal order")
    return reference
