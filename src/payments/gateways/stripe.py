"""Stripe: a PaymentIntent for each charge, made, confirmed and read by its id.

    prepare   POST /v1/payment_intents                key: payment id
    charge    POST /v1/payment_intents/ID/confirm     key: payment id, and a number
    find      GET  /v1/payment_intents/ID
    cancel    POST /v1/payment_intents/ID/cancel      no key
    refund    POST /v1/refunds                        key: refund id
    find      GET  /v1/refunds?payment_intent=ID

Which call has which key is decided by what Stripe does with it: each result is stored, errors and
500 too, and every repetition gets it again for a day.

- An intent is made once: a second one would be another reference of the same payment.
- It is confirmed once. With a key of its own a late repetition could capture after a decline. A
  stored result says how the intent was, not how it is: unless it is final, the intent is read. Only
  if a 500 was stored, and the intent still waits, the next number is used.
- Cancelling repeats itself: of an ended intent Stripe says how it ended.

A decline is final when nobody can confirm the intent any more. The customer can, with the client
secret, once an action was shown. A confirmation of ours that fails at once has shown none. Whatever
else is found failed is cancelled first.
"""

import time
from collections.abc import Callable, Mapping
from urllib.parse import urlencode

from payments.gateways import (
    BadSignature,
    Hint,
    Open,
    OutcomeUnknown,
    ProviderCharge,
    ProviderFinding,
    ProviderRefund,
    Refusal,
)
from payments.gateways.adapters import connected
from payments.gateways.http import ProviderHttp, ProviderResponse, decoded
from payments.gateways.signatures import is_signed
from payments.gateways.stripe_account import (
    CONFIRMATION_TOKEN,
    account_of,
    checked_key,
    findings_of,
    refusal_of,
)
from payments.gateways.stripe_call import REPLAYED, StripeCall
from payments.gateways.stripe_objects import (
    EVENT,
    INTENT,
    REFUND,
    REFUNDS,
    Mode,
    StripeIntent,
    StripeRefund,
    check_known,
    error_of,
    failed_with,
    intent_of,
    outcome_of,
    refund_outcome,
    unexpected,
)
from payments.gateways.units import to_stripe
from payments.payment.state import Approved, Declined
from payments.settings import Settings

API_VERSION = "2023-08-16"
DAY_S = 24 * 3600.0
KEYS_KEPT_S = 23 * 3600.0  # at least 24 hours, says Stripe
BANK_DEBIT_S = 14 * DAY_S  # how long a bank may take; a card has no such time
CONFIRMS_MAX = 5  # each after a stored 500
TOLERANCE_S = 300.0  # of a webhook's time, as in Stripe's own libraries
REFUNDS_BYTES_MAX = 512 * 1024  # a page of 100, each about 1 KiB


class StripeGateway:
    name = "stripe"
    knows_our_id = False
    charge_retry_s = refund_retry_s = KEYS_KEPT_S
    declines_may_turn_s = 0.0

    def __init__(
        self,
        http: ProviderHttp,
        lists: ProviderHttp,
        *,
        mode: Mode,
        publishable_key: str | None = None,
        webhook_secrets: tuple[str, ...] = (),
        payment_method_types: tuple[str, ...] = ("card",),
    ) -> None:
        """`lists` is for responses that name none of our ids: it keeps no connection."""
        self._http = http
        self._lists = lists
        self._mode: Mode = mode
        self._publishable_key = publishable_key
        self._webhook_secrets = webhook_secrets
        self._types = payment_method_types
        self.late_capture_s = DAY_S if set(payment_method_types) <= {"card"} else BANK_DEBIT_S

    def refuses(self, charge: ProviderCharge) -> Refusal | None:
        return refusal_of(charge)

    def reference(self, charge: ProviderCharge) -> str | None:
        return None

    def needs_preparing(self, charge: ProviderCharge) -> bool:
        return charge.reference is None

    async def account(self, timeout_s: float) -> str | None:
        """Account and mode: a test key finds nothing of what a live key has captured."""
        response = await StripeCall(timeout_s).exchange(self._lists, "GET", "/v1/account")
        account = account_of(response)
        return None if account is None else f"{account.id}/{self._mode}"

    async def findings(self, timeout_s: float) -> list[ProviderFinding]:
        call = StripeCall(timeout_s)
        account = await call.exchange(self._lists, "GET", "/v1/account")
        intents = await call.exchange(self._lists, "GET", "/v1/payment_intents?limit=1")
        has_webhooks, has_key = bool(self._webhook_secrets), self._publishable_key is not None
        return findings_of(self._mode, account, intents, has_webhooks, has_key)

    async def prepare(self, charge: ProviderCharge, timeout_s: float) -> str | Declined:
        form = {
            "amount": to_stripe(charge.amount_cents, charge.currency),
            "currency": charge.currency.lower(),
            "payment_method_types": self._types,
            "metadata": {
                "payment_id": charge.payment_id,
                "order_id": charge.order_id,
                "idempotency_key": charge.idempotency_key,
            },
        }
        call = StripeCall(timeout_s)
        key = str(charge.payment_id)
        response = await call.exchange(self._http, "POST", "/v1/payment_intents", form, key=key)
        if response.status == 200:
            intent = response.read(INTENT)
            if intent.payment_id != charge.payment_id:
                raise OutcomeUnknown("Stripe made something else")
            return intent.id
        error = error_of(response)
        if error is not None and error.is_refusal:
            return error.refusal()
        return unexpected(response)

    async def charge(self, charge: ProviderCharge, timeout_s: float) -> Approved | Declined | Open:
        call = StripeCall(timeout_s)
        if charge.payment_method is None:  # there is nothing to confirm it with
            return await self._find(charge, call)
        for number in range(1, CONFIRMS_MAX + 1):
            response = await self._confirm(charge, number, call)
            replayed = REPLAYED in response.headers
            intent, error = intent_of(response, _reference(charge)), error_of(response)
            is_ours = response.status in (200, 402) and not replayed
            if intent is not None and (intent.has_ended or is_ours):
                return self._outcome(failed_with(intent, error), charge)
            if error is not None and error.is_refusal:
                ended = await self._cancel(charge, call)
                return error.refusal() if isinstance(ended, Declined) else ended
            is_read = intent is not None or (error and error.type == "idempotency_error")
            if not replayed and not is_read:
                unexpected(response)
            found = await self._find(charge, call)
            if response.status < 500 or not isinstance(found, Open) or found.step != "ready":
                return found
        return found

    async def find_charge(
        self, charge: ProviderCharge, timeout_s: float
    ) -> Approved | Declined | Open | None:
        return await self._find(charge, StripeCall(timeout_s))

    async def cancel(
        self, charge: ProviderCharge, timeout_s: float
    ) -> Approved | Declined | Open | None:
        return await self._cancel(charge, StripeCall(timeout_s))

    async def refund(self, refund: ProviderRefund, timeout_s: float) -> Approved | Declined:
        try:
            amount = to_stripe(refund.amount_cents, refund.currency)
        except ValueError:
            return Declined("invalid_amount")
        form = {
            "payment_intent": refund.provider_txn_id,
            "amount": amount,
            "metadata": {"refund_id": refund.refund_id, "payment_id": refund.payment_id},
        }
        call = StripeCall(timeout_s)
        response = await call.exchange(
            self._http, "POST", "/v1/refunds", form, key=str(refund.refund_id)
        )
        if response.status == 200:
            made = response.read(REFUND)
            if made.payment_intent != refund.provider_txn_id:
                raise OutcomeUnknown("Stripe responded about something else")
            if REPLAYED not in response.headers or made.status == "succeeded":
                return _about(made, refund)
        error = error_of(response)
        check_known(error, refund.provider_txn_id)
        if error is not None and error.is_refusal:
            return error.refusal()
        if response.status != 200 and (error is None or error.type != "idempotency_error"):
            unexpected(response)
        found = await self._find_refund(refund, call)
        if found is None:
            raise OutcomeUnknown("a key of a refund that Stripe does not list")
        return found

    async def find_refund(
        self, refund: ProviderRefund, timeout_s: float
    ) -> Approved | Declined | None:
        return await self._find_refund(refund, StripeCall(timeout_s))

    async def hint(
        self, headers: Mapping[str, str], raw_body: bytes, timeout_s: float
    ) -> Hint | None:
        """The header is t=SECONDS,v1=HEX, with several v1 while a secret is replaced. v1 is the
        HMAC-SHA256 of the time, a dot and the raw body."""
        pairs = [each.partition("=") for each in headers.get("stripe-signature", "").split(",")]
        sent_at = next((value for name, _, value in pairs if name.strip() == "t"), "")
        signatures = [value for name, _, value in pairs if name.strip() == "v1"]
        if not is_signed(
            f"{sent_at}.".encode("utf-8", "replace") + raw_body, signatures, self._webhook_secrets
        ):
            raise BadSignature("the signature is not Stripe's")
        if not sent_at.isdecimal() or abs(time.time() - int(sent_at)) > TOLERANCE_S:
            raise BadSignature("the signature is too old, or from the future")
        event = decoded(raw_body, EVENT)
        if event is None:
            return None
        about = event.data.object
        reference = about.id if about.object == "payment_intent" else about.payment_intent
        return Hint(event_id=event.id, reference=reference) if reference else None

    async def close(self) -> None:
        await self._http.close()
        await self._lists.close()

    async def _confirm(
        self, charge: ProviderCharge, number: int, call: StripeCall
    ) -> ProviderResponse:
        """Without a return address nobody is there to act: what needs an action is declined."""
        method = charge.payment_method or ""
        name = "payment_method"
        if method.startswith(CONFIRMATION_TOKEN):
            name = "confirmation_token"
        form: dict[str, object] = {name: method, "return_url": charge.return_url}
        if charge.return_url is None:
            form["error_on_requires_action"] = True
        elif self._publishable_key is not None:
            form["use_stripe_sdk"] = True
        path = f"/v1/payment_intents/{_reference(charge)}/confirm"
        key = f"{charge.payment_id}-confirm-{number}"
        return await call.exchange(self._http, "POST", path, form, key=key)

    async def _find(self, charge: ProviderCharge, call: StripeCall) -> Approved | Declined | Open:
        reference = _reference(charge)
        response = await call.exchange(self._http, "GET", f"/v1/payment_intents/{reference}")
        intent = intent_of(response, reference)
        if intent is None or response.status != 200:
            return unexpected(response)
        outcome = self._outcome(intent, charge)
        if not intent.has_failed:
            return outcome
        ended = await self._cancel(charge, call)
        return outcome if isinstance(ended, Declined) else ended

    async def _cancel(self, charge: ProviderCharge, call: StripeCall) -> Approved | Declined | Open:
        reference = _reference(charge)
        path = f"/v1/payment_intents/{reference}/cancel"
        response = await call.exchange(
            self._http, "POST", path, {"cancellation_reason": "abandoned"}
        )
        intent = intent_of(response, reference)
        if intent is None:
            return unexpected(response)
        if intent.has_failed:  # then it cannot be what this response says
            raise OutcomeUnknown("Stripe did not cancel the PaymentIntent")
        return self._outcome(intent, charge)

    def _outcome(self, intent: StripeIntent, charge: ProviderCharge) -> Approved | Declined | Open:
        return outcome_of(intent, charge, self._publishable_key)

    async def _find_refund(
        self, refund: ProviderRefund, call: StripeCall
    ) -> Approved | Declined | None:
        """Lists are consistent at once. One that succeeded counts before all others with our id."""
        ours: list[StripeRefund] = []
        query = {"payment_intent": refund.provider_txn_id, "limit": "100"}
        while True:
            path = f"/v1/refunds?{urlencode(query)}"
            response = await call.exchange(self._lists, "GET", path, bytes_max=REFUNDS_BYTES_MAX)
            if response.status != 200:
                check_known(error_of(response), refund.provider_txn_id)
                unexpected(response)
            page = response.read(REFUNDS)
            ours += [each for each in page.data if each.refund_id == refund.refund_id]
            if not page.has_more or not page.data:
                break
            query["starting_after"] = page.data[-1].id
        first = sorted(ours, key=lambda each: _RANKS.get(each.status, len(_RANKS)))
        return refund_outcome(first[0]) if first else None


# Of several refunds with our id, which one counts.
_RANKS: dict[str | None, int] = {"succeeded": 0, "pending": 1, "requires_action": 2}


def _reference(charge: ProviderCharge) -> str:
    if charge.reference is None:
        raise ValueError("a charge without a PaymentIntent")
    return charge.reference


def _about(made: StripeRefund, refund: ProviderRefund) -> Approved | Declined:
    outcome = refund_outcome(made)
    if isinstance(outcome, Declined) and made.refund_id != refund.refund_id:
        raise OutcomeUnknown("Stripe declined something else")
    return outcome


def build(settings: Settings, connect: Callable[..., ProviderHttp] = ProviderHttp) -> StripeGateway:
    """Raises StartError, which names the variable and does not repeat it."""
    key, mode = checked_key(settings)
    headers = {"Authorization": f"Bearer {key}", "Stripe-Version": API_VERSION}
    http, lists = connected(
        "STRIPE_API_BASE",
        settings.stripe_api_base,
        lambda base: (connect(base, headers), connect(base, headers, keep_alive=False)),
    )
    return StripeGateway(
        http,
        lists,
        mode=mode,
        publishable_key=settings.stripe_publishable_key,
        webhook_secrets=settings.stripe_webhook_secrets,
        payment_method_types=settings.stripe_payment_method_types,
    )
