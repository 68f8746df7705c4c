"""Stripe as an HTTP process of its own, with a ledger that outlives it.

    python -m tests.doubles.stripe_server --ledger FILE [--port N]

See stand_in.py. Tests use StripeProcess. It does what Stripe's documentation says of PaymentIntents
and Refunds: stripe_flows.py. Here are its routes, its API keys and its idempotency keys.

The result of a request with an Idempotency-Key is stored once its execution began, whatever it is,
and every repetition within 24 hours gets it with Idempotent-Replayed. Before that come 401, 429 and
errors of validation.

    sk_test_stand_in    is accepted
    rk_test_stand_in    likewise, but may not read the account
"""

import hashlib
import hmac
import re
import time
from pathlib import Path
from typing import Any
from urllib.parse import parse_qs

import httpx
import msgspec

from tests.doubles.stand_in import Call, Response, StandIn, StandInProcess, run
from tests.doubles.stripe_flows import Failed, Flows, error
from tests.doubles.stripe_forms import nested
from tests.doubles.stripe_ledger import Ledger, Line, Object, Stored, new_id, read_lines

SECRET_KEY, RESTRICTED_KEY = "sk_test_stand_in", "rk_test_stand_in"
WEBHOOK_SECRET = "whsec_stand_in"
KEYS_KEPT_S = 24 * 3600
PAGE_MAX = 100

ROUTES = {
    ("POST", "/v1/payment_intents"): "prepare",
    ("GET", "/v1/payment_intents"): "list_intents",
    ("GET", "/v1/payment_intents/ID"): "find_charge",
    ("POST", "/v1/payment_intents/ID/confirm"): "charge",
    ("POST", "/v1/payment_intents/ID/cancel"): "cancel",
    ("POST", "/v1/refunds"): "refund",
    ("GET", "/v1/refunds"): "find_refund",
    ("GET", "/v1/refunds/ID"): "read_refund",
    ("GET", "/v1/account"): "account",
}
ID = re.compile(r"/(?:pi|re)_[^/]*|(?<=/payment_intents)/[^/]+|(?<=/refunds)/[^/]+")


class Stripe(StandIn):
    def __init__(self, ledger: Path, port: int) -> None:
        super().__init__(port)
        self._ledger = Ledger(ledger)
        self._flows = Flows(self._ledger)
        self._counts = dict.fromkeys(ROUTES.values(), 0)
        self._keys = {SECRET_KEY, RESTRICTED_KEY}
        self._busy = 0
        self._internal = 0

    def operation_of(self, call: Call) -> str | None:
        return ROUTES.get((call.method, ID.sub("/ID", call.path, count=1)))

    def not_found(self, call: Call) -> Response:
        return Response(404, error("invalid_request_error", message="Unrecognized request URL"))

    def do(self, operation: str, call: Call, *, forgotten: bool, declined: bool) -> Response:
        key = call.headers.get("authorization", "").removeprefix("Bearer ")
        if key not in self._keys:
            return Response(401, error("invalid_request_error", message="Invalid API Key provided"))
        if key == RESTRICTED_KEY and operation == "account":
            message = f"The provided key does not have access to account '{self._ledger.account}'"
            return Response(403, error("invalid_request_error", message=message))
        if call.method == "GET":
            return self._executed(operation, call, declined)
        named = call.headers.get("idempotency-key")
        headers = {"Idempotency-Key": named} if named else {}
        if self._busy:
            self._busy -= 1
            code = "idempotency_key_in_use" if self._busy % 2 else "lock_timeout"
            busy = error("idempotency_error" if self._busy % 2 else "invalid_request_error", code)
            return Response(409 if self._busy % 2 else 429, busy, headers)
        request = f"{call.path} {hashlib.sha256(call.body).hexdigest()}"
        known = self._ledger.stored.get(named or "")
        if known is not None and not forgotten and known.at > time.time() - KEYS_KEPT_S:
            if known.request != request:
                message = "Keys for idempotent requests can only be used with the same parameters"
                return Response(400, error("idempotency_error", message=message), headers)
            return Response(known.status, known.body, headers | {"Idempotent-Replayed": "true"})
        response = self._executed(operation, call, declined)
        is_kept = named and response.status != 429
        stored = Stored(named or "", request, time.time(), response.status, response.body)
        self._ledger.write(stored if is_kept else None)
        return response._replace(headers=headers)

    def misstated(self, kind: str, body: Any) -> Any:
        if "data" in body:
            return body | {"data": [self.misstated(kind, each) for each in body["data"]]}
        match kind:
            case "wrong_amount":
                names = {"amount", "amount_received"} & set(body)
                return body | {name: body[name] + 1 for name in names}
            case "wrong_currency":
                return body | {"currency": "usd"}
        other = dict.fromkeys(body.get("metadata", {}), "00000000-0000-4000-8000-000000000000")
        return body | {"metadata": other}

    def command(self, command: dict[str, Any]) -> Any:
        match command["do"]:
            case "accept_keys":
                self._keys = set(command["keys"])
            case "busy":
                self._busy = command["count"]
            case "internal":
                self._internal = command["count"]
            case "age_keys":
                for key, each in self._ledger.stored.items():
                    aged = Stored(
                        key, each.request, each.at - command["seconds"], each.status, each.body
                    )
                    self._ledger.stored[key] = aged
            case "customer_acts":
                self._flows.customer_acts(command["intent"], command["method"])
            case "finish":
                self._flows.finish(command["id"], command["status"])
            case "alter":
                changed = self._ledger.objects[command["id"]] | command["fields"]
                self._ledger.put(changed)
            case "refunded_elsewhere":
                intent = self._ledger.objects[command["intent"]]
                for _ in range(command["count"]):
                    self._flows.make_refund(intent, command["amount"], {})
            case "event":
                return self._event(command["type"], self._ledger.objects[command["id"]])
        self._ledger.write()
        return None

    def _executed(self, operation: str, call: Call, declined: bool) -> Response:
        _, _, query = call.target.partition("?")
        asked = nested(parse_qs(call.body.decode() if call.method == "POST" else query))
        named = [*call.path.split("/"), ""][3]
        if self._internal and operation in ("charge", "refund"):
            self._internal -= 1
            return Response(500, error("api_error", message="An unknown error occurred"))
        try:
            return Response(200, self._do(operation, named, asked, declined))
        except Failed as failed:
            return Response(failed.status, failed.body)

    def _do(self, operation: str, named: str, asked: Object, declined: bool) -> Object:
        match operation:
            case "prepare":
                return self._flows.make_intent(asked)
            case "charge":
                return self._flows.confirm(named, asked, declined=declined)
            case "cancel":
                return self._flows.cancel(named, asked)
            case "refund":
                return self._flows.refund(asked, declined=declined)
            case "account":
                return {
                    "id": self._ledger.account,
                    "object": "account",
                    "charges_enabled": True,
                    "country": "IN",
                    "type": "standard",
                }
            case "find_refund":
                every = self._ledger.refunds_of(self._flows.intent(asked["payment_intent"])["id"])
                return _page(every, "/v1/refunds", asked)
            case "list_intents":
                every = [
                    each
                    for each in reversed(self._ledger.objects.values())
                    if each["object"] == "payment_intent"
                ]
                return _page(every, "/v1/payment_intents", asked)
            case "read_refund":
                return self._flows.find(named, "refund", "id")
        return self._flows.intent(named, "intent")

    def _event(self, type: str, about: Object) -> Object:
        return {
            "id": new_id("evt"),
            "object": "event",
            "api_version": "2023-08-16",
            "created": int(time.time()),
            "data": {"object": about},
            "livemode": False,
            "pending_webhooks": 1,
            "request": {"id": None, "idempotency_key": None},
            "type": type,
        }


def _page(every: list[Object], url: str, asked: Object) -> Object:
    ids = [each["id"] for each in every]
    first = ids.index(asked["starting_after"]) + 1 if "starting_after" in asked else 0
    limit = min(int(asked.get("limit", 10)), PAGE_MAX)
    data = every[first : first + limit]
    return {"object": "list", "data": data, "has_more": len(every) > first + limit, "url": url}


class StripeProcess(StandInProcess):
    """Stripe for a test. Ids are Stripe's: pi_… and re_…."""

    module = "tests.doubles.stripe_server"

    def accept_keys(self, *keys: str) -> None:
        """These API keys and no others."""
        self._ask(Any, do="accept_keys", keys=keys)

    def busy(self, count: int) -> None:
        """So many POSTs meet another one with the same key, or on the same object, in turn."""
        self._ask(Any, do="busy", count=count)

    def fail_inside(self, count: int) -> None:
        """So many confirmations or refunds do nothing and end with 500, which is stored."""
        self._ask(Any, do="internal", count=count)

    def age_keys(self, seconds: float) -> None:
        """As if all idempotency keys were so much older."""
        self._ask(Any, do="age_keys", seconds=seconds)

    def customer_acts(self, intent: object, method: str | None = None) -> None:
        """The customer authenticates; or fails to, with "fails"; or confirms the intent in the
        browser with another payment method."""
        self._ask(Any, do="customer_acts", intent=intent, method=method)

    def finish(self, id: object, status: str = "succeeded") -> None:
        """What is processing, or a refund that is pending, comes to this."""
        self._ask(Any, do="finish", id=id, status=status)

    def alter(self, id: str, **fields: object) -> None:
        """As if somebody had, in the dashboard."""
        self._ask(Any, do="alter", id=id, fields=fields)

    def refunded_elsewhere(self, intent: str, amount: int, count: int = 1) -> None:
        """In the dashboard: refunds without our metadata."""
        self._ask(Any, do="refunded_elsewhere", intent=intent, amount=amount, count=count)

    def event(self, type: str, id: str) -> Object:
        """The body of a webhook about an object, as it is now."""
        return self._ask(Object, do="event", type=type, id=id)

    def deliver(self, url: str, event: Object, *secrets: str, age_s: float = 0) -> int:
        """Sends a webhook, signed so long ago; the status of the response."""
        body = msgspec.json.encode(event)
        headers = signed(body, time.time() - age_s, *(secrets or (WEBHOOK_SECRET,)))
        return httpx.post(url, content=body, headers=headers).status_code

    def lines(self) -> list[Line]:
        return read_lines(self.path)

    def moved(self, our_id: object = None) -> list[Object]:
        """Captures and refunds that moved money, once for each time; those with this id of ours."""
        lines, last = self.lines(), dict[str, Object]()
        for line in lines:
            last |= {each["id"]: each for each in line.objects}
        every = [last[id] for line in lines for id in line.moved]
        return [each for each in every if our_id is None or str(our_id) == _our_id(each)]


def _our_id(object: Object) -> str | None:
    name = "refund_id" if object["object"] == "refund" else "payment_id"
    found: str | None = object["metadata"].get(name)
    return found


def signed(body: bytes, sent_at: float, *secrets: str) -> dict[str, str]:
    """The header of a webhook, with a signature for each secret."""
    stamp = f"{sent_at:.0f}"
    message = stamp.encode() + b"." + body
    hexes = [hmac.new(each.encode(), message, hashlib.sha256).hexdigest() for each in secrets]
    return {"stripe-signature": ",".join([f"t={stamp}", *(f"v1={each}" for each in hexes)])}


if __name__ == "__main__":
    run(StripeProcess.module, Stripe)
