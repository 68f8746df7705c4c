"""What tests/doubles/stripe_server.py does with PaymentIntents and Refunds.

The payment method decides, by the names of Stripe's test mode:

    pm_card_visa, ctoken_1…, pm_1…              succeeds
    DECLINES below                              is declined
    pm_card_threeDSecure2Required               the customer has to act, then it succeeds
    pm_card_threeDSecureRequiredChargeDeclined  the customer has to act, then it is declined
    pm_usBankAccount_success                    is processing until the test finishes it

The account settles in a currency whose least amount is 50 units, and takes no BOB.
"""

import time
from typing import Any

from tests.doubles.stripe_ledger import Ledger, Object, new_id, new_intent, new_refund

LEAST = 50
NOT_TAKEN = "bob"
DECLINES = {
    "pm_card_chargeDeclined": ("card_declined", "generic_decline"),
    "pm_card_chargeDeclinedInsufficientFunds": ("card_declined", "insufficient_funds"),
    "pm_card_chargeDeclinedFraudulent": ("card_declined", "fraudulent"),
    "pm_card_chargeDeclinedExpiredCard": ("expired_card", None),
    "pm_card_chargeDeclinedIncorrectCvc": ("incorrect_cvc", None),
}
ACTION = "pm_card_threeDSecure2Required"
ACTION_DECLINED = "pm_card_threeDSecureRequiredChargeDeclined"
PROCESSING = "pm_usBankAccount_success"
CAN_CONFIRM = ("requires_payment_method", "requires_confirmation")
CAN_CANCEL = (*CAN_CONFIRM, "requires_action", "requires_capture")


class Failed(Exception):
    def __init__(self, status: int, body: Object) -> None:
        super().__init__(str(body))
        self.status = status
        self.body = body


def error(type: str, code: str | None = None, **more: Any) -> Object:
    return {"error": {"type": type} | ({"code": code} if code else {}) | more}


def invalid(code: str | None = None, **more: Any) -> Failed:
    return Failed(400, error("invalid_request_error", code, **more))


class Flows:
    def __init__(self, ledger: Ledger) -> None:
        self._ledger = ledger

    def find(self, id: str, kind: str, param: str) -> Object:
        found = self._ledger.objects.get(id)
        if found is None or found["object"] != kind:
            message = f"No such {kind}: '{id}'"
            body = error("invalid_request_error", "resource_missing", message=message, param=param)
            raise Failed(404, body)
        return found

    def intent(self, id: str, param: str = "payment_intent") -> Object:
        return self.find(id, "payment_intent", param)

    def make_intent(self, asked: Object) -> Object:
        amount, currency = int(asked["amount"]), asked["currency"]
        if currency == NOT_TAKEN:
            raise invalid(message=f"Invalid currency: {currency}.", param="currency")
        if amount < LEAST:
            raise invalid("amount_too_small", message="Amount must be more", param="amount")
        intent = new_intent(
            amount, currency, asked["payment_method_types"], asked.get("metadata", {})
        )
        return self._ledger.put(intent)

    def confirm(self, id: str, asked: Object, *, declined: bool = False) -> Object:
        intent = self.intent(id, "intent")
        if intent["status"] not in CAN_CONFIRM:
            raise self._unexpected_state(intent)
        method = asked.get("payment_method") or asked.get("confirmation_token") or ""
        if declined:
            method = "pm_card_chargeDeclined"
        known = (*DECLINES, ACTION, ACTION_DECLINED, PROCESSING, "pm_card_visa")
        if method not in known and not method.startswith(("pm_1", "ctoken_1")):
            param = "payment_method"
            message = f"No such PaymentMethod: '{method}'"
            raise invalid("resource_missing", message=message, param=param)
        intent = intent | {"last_payment_error": None, "payment_method": method}
        if method in DECLINES:
            raise self._declined(intent, *DECLINES[method])
        if method in (ACTION, ACTION_DECLINED):
            return self._act(intent, asked)
        if method == PROCESSING:
            return self._ledger.put(intent | {"status": "processing"})
        return self._succeed(intent)

    def cancel(self, id: str, asked: Object) -> Object:
        intent = self.intent(id, "intent")
        if intent["status"] not in CAN_CANCEL:
            raise self._unexpected_state(intent)
        return self._ledger.put(
            intent
            | {
                "status": "canceled",
                "canceled_at": int(time.time()),
                "cancellation_reason": asked.get("cancellation_reason"),
                "next_action": None,
            }
        )

    def customer_acts(self, id: str, method: str | None) -> None:
        """Not through the API with the secret key: with the client secret."""
        intent = self.intent(id) | {"next_action": None}
        if intent["status"] == "requires_action":
            if method == "fails":
                self._fail(intent, "payment_intent_authentication_failure", None)
            elif intent["payment_method"] == ACTION_DECLINED:
                self._fail(intent, "card_declined", "generic_decline", charged=True)
            else:
                self._succeed(intent)
        elif intent["status"] == "requires_payment_method" and method == "pm_card_visa":
            self._succeed(intent | {"last_payment_error": None})

    def finish(self, id: str, status: str) -> None:
        found = self._ledger.objects[id]
        if found["object"] == "refund":
            more = {} if status == "succeeded" else {"failure_reason": "lost_or_stolen_card"}
            self._ledger.put(found | {"status": status} | more, moved=status == "succeeded")
        elif status == "succeeded":
            self._succeed(found)
        else:
            self._fail(found, "payment_intent_payment_attempt_failed", None, charged=True)

    def refund(self, asked: Object, *, declined: bool) -> Object:
        intent, amount = self.intent(asked["payment_intent"]), int(asked["amount"])
        if intent["status"] != "succeeded":
            message = f"This PaymentIntent ({intent['id']}) does not have a successful charge"
            raise invalid(message=message, param="payment_intent")
        made = self._ledger.refunds_of(intent["id"])
        back = sum(each["amount"] for each in made if each["status"] not in ("failed", "canceled"))
        left = intent["amount_received"] - back
        if left == 0:
            raise invalid("charge_already_refunded", message="Charge has already been refunded.")
        if amount > left:
            message = f"Refund amount is greater than unrefunded amount on charge ({left})"
            raise invalid(message=message, param="amount")
        if declined:
            failed = new_refund(intent, amount, asked.get("metadata", {}), "failed")
            return self._ledger.put(failed | {"failure_reason": "expired_or_canceled_card"})
        return self.make_refund(intent, amount, asked.get("metadata", {}))

    def make_refund(self, intent: Object, amount: int, metadata: Object) -> Object:
        """A bank debit's is pending at first."""
        is_card = intent["payment_method_types"] == ["card"]
        refund = new_refund(intent, amount, metadata, "succeeded" if is_card else "pending")
        return self._ledger.put(refund, moved=is_card)

    def _act(self, intent: Object, asked: Object) -> Object:
        if asked.get("error_on_requires_action") == "true":
            raise self._declined(intent, "authentication_required", "authentication_required")
        if asked.get("use_stripe_sdk") == "true":
            step: Object = {"type": "use_stripe_sdk", "use_stripe_sdk": {}}
        else:
            url = f"https://hooks.stripe.com/redirect/authenticate/{new_id('src')}"
            redirect = {"return_url": asked["return_url"], "url": url}
            step = {"type": "redirect_to_url", "redirect_to_url": redirect}
        return self._ledger.put(intent | {"status": "requires_action", "next_action": step})

    def _succeed(self, intent: Object) -> Object:
        changed = {
            "status": "succeeded",
            "amount_received": intent["amount"],
            "latest_charge": new_id("ch"),
            "next_action": None,
        }
        return self._ledger.put(intent | changed, moved=True)

    def _declined(self, intent: Object, code: str, decline_code: str | None) -> Failed:
        charged = code != "authentication_required"
        intent = self._fail(intent, code, decline_code, charged=charged)
        more = {"payment_intent": intent, "message": "Your card was declined."}
        if decline_code:
            more["decline_code"] = decline_code
        return Failed(402, error("card_error", code, **more))

    def _fail(
        self, intent: Object, code: str, decline_code: str | None, *, charged: bool = False
    ) -> Object:
        reason = error("card_error", code, message="Your card was declined.")["error"]
        reason |= {"decline_code": decline_code} if decline_code else {}
        changed = {
            "status": "requires_payment_method",
            "last_payment_error": reason,
            "latest_charge": new_id("ch") if charged else intent["latest_charge"],
            "payment_method": None,
        }
        return self._ledger.put(intent | changed)

    def _unexpected_state(self, intent: Object) -> Failed:
        message = f"This PaymentIntent has a status of {intent['status']}."
        return invalid("payment_intent_unexpected_state", message=message, payment_intent=intent)
