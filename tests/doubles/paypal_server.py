"""PayPal as an HTTP process of its own, with a ledger that outlives it.

    python -m tests.doubles.paypal_server --ledger FILE [--port N]

See stand_in.py. Tests use PayPalProcess.

    token     POST  /v1/oauth2/token
    prepare   POST  /v2/checkout/orders             account: one without a custom_id
    find_charge  GET   /v2/checkout/orders/ID       find_refund reads the same
    claim     PATCH /v2/checkout/orders/ID          cancel: one that changes the intent
    confirm   POST  /v2/checkout/orders/ID/confirm-payment-source
    charge    POST  /v2/checkout/orders/ID/capture
    refund    POST  /v2/payments/captures/ID/refund
    verify    POST  /v1/notifications/verify-webhook-signature
    webhook   GET   /v1/notifications/webhooks/ID

The customer approves each order that we make as soon as it is made, unless the test says otherwise.
A capture of an amount that ends in 7 is declined. PayPal-Request-Id: the resource as it is now, or
the rejection again; for 6 hours with orders, for 45 days with refunds.

Each step is a Line of the ledger, written before the response is.
"""

import base64
import hashlib
import hmac
import zlib
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any
from uuid import uuid4

import msgspec

from tests.doubles import paypal_ledger as ledgers
from tests.doubles.paypal_ledger import Ledger, Line, Order, Payment
from tests.doubles.stand_in import Call, Response, StandIn, StandInProcess, run

CLIENT_ID, CLIENT_SECRET = "client", "client-secret"
WEBHOOK_ID, WEBHOOK_SECRET = "8PT597110X687430L", "the key of PayPal"
TOKEN_S = 32_400
KEY_LIVES = {"order": timedelta(hours=6), "refund": timedelta(days=45)}
ORDER_LIVES = timedelta(hours=3)

ROUTES = {
    ("POST", "v1", "oauth2", "token"): "token",
    ("POST", "v2", "checkout", "orders"): "prepare",
    ("GET", "v2", "checkout", "orders", "ID"): "find_charge",
    ("PATCH", "v2", "checkout", "orders", "ID"): "claim",
    ("POST", "v2", "checkout", "orders", "ID", "confirm-payment-source"): "confirm",
    ("POST", "v2", "checkout", "orders", "ID", "capture"): "charge",
    ("POST", "v2", "payments", "captures", "ID", "refund"): "refund",
    ("POST", "v1", "notifications", "verify-webhook-signature"): "verify",
    ("GET", "v1", "notifications", "webhooks", "ID"): "webhook",
}

PROBLEMS = {
    400: (
        "INVALID_REQUEST",
        "Request is not well-formed, syntactically incorrect, or violates schema.",
    ),
    401: (
        "AUTHENTICATION_FAILURE",
        "Authentication failed due to missing authorization header, or invalid authentication "
        "credentials.",
    ),
    404: ("RESOURCE_NOT_FOUND", "The specified resource does not exist."),
    409: ("RESOURCE_CONFLICT", "The server has detected a conflict while processing this request."),
    422: (
        "UNPROCESSABLE_ENTITY",
        "The requested action could not be performed, semantically incorrect, or failed business "
        "validation.",
    ),
}


class Asked(msgspec.Struct):
    """The question whether a webhook is genuine; the event as it was sent."""

    transmission_id: str
    transmission_time: str
    transmission_sig: str
    webhook_id: str
    webhook_event: msgspec.Raw


class PayPal(StandIn):
    def __init__(self, ledger: Path, port: int) -> None:
        super().__init__(port)
        self._ledger = Ledger(ledger)
        self._tokens: set[str] = set()
        self._approves = True
        self._secret = CLIENT_SECRET
        self._token_s = TOKEN_S
        self._conflicts = 0
        self._makes_not = ""  # the issue with which it makes no order
        self._later = timedelta()
        self._counts = dict.fromkeys((*ROUTES.values(), "account", "cancel"), 0)

    def operation_of(self, call: Call) -> str | None:
        parts = tuple(call.path.strip("/").split("/"))
        for route, operation in ROUTES.items():
            if len(route) == len(parts) + 1 and all(
                want in ("ID", is_) for want, is_ in zip(route, (call.method, *parts), strict=True)
            ):
                if operation == "prepare" and b"custom_id" not in call.body:
                    return "account"
                closes = operation == "claim" and b'"/intent"' in call.body
                return "cancel" if closes else operation
        return None

    def do(self, operation: str, call: Call, *, forgotten: bool, declined: bool) -> Response:
        if operation == "token":
            return self._token(call)
        if call.headers.get("authorization", "").removeprefix("Bearer ") not in self._tokens:
            return problem(401, "")
        if operation == "verify":
            return self._verify(call)
        named = call.path.strip("/").split("/")[3] if call.path.count("/") > 3 else ""
        if operation == "webhook":
            known = {"id": WEBHOOK_ID, "url": "https://pay.example/hook", "event_types": []}
            return Response(200, known) if named == WEBHOOK_ID else self._unknown_webhook()
        if operation in ("prepare", "account"):
            return self._create(call, forgotten)
        if operation == "refund":
            return self._refund(named, call, forgotten, declined)
        order = self._ledger.orders.get(named)
        if order is None or self._is_expired(order):
            return problem(404, "INVALID_RESOURCE_ID")
        match operation:
            case "find_charge":
                return Response(200, order.body())
            case "confirm":
                return self._confirm(order)
            case "charge":
                return self._capture(order, call, forgotten, declined)
        return self._patch(order, msgspec.json.decode(call.body))

    def misstated(self, kind: str, body: Any) -> Any:
        stated = [body] if "purchase_units" not in body else []
        for unit in body.get("purchase_units", ()):
            payments = unit.get("payments", {})
            stated += [*payments.get("captures", ()), *payments.get("refunds", ())]
        for each in stated:
            match kind:
                case "wrong_amount":
                    value = each["amount"]["value"]
                    each["amount"]["value"] = value[:-1] + str((int(value[-1]) + 1) % 10)
                case "wrong_currency":
                    each["amount"]["currency_code"] = "USD"
                case "wrong_id":
                    each["custom_id"] = "00000000-0000-4000-8000-000000000000"
        return body

    def command(self, command: dict[str, Any]) -> Any:
        match command.pop("do"):
            case "set":
                for name, value in command.items():
                    setattr(self, f"_{name}", value)
            case "revoke":
                self._tokens.clear()
            case "later":
                self._later += timedelta(seconds=command["seconds"])
            case "make":
                return self._made(**command).id
            case "change":
                order = self._ledger.orders[command.pop("order_id")]
                self._write(msgspec.structs.replace(order, **command))
            case "customer_acts":
                for order in list(self._ledger.orders.values()):
                    waits = order.status in ("CREATED", "PAYER_ACTION_REQUIRED")
                    if waits and order.custom_id == command["payment_id"]:
                        self._write(msgspec.structs.replace(order, status="APPROVED"))
            case "finish":
                order = self._ledger.orders[command["order_id"]]
                (capture,) = order.captures
                ended = msgspec.structs.replace(capture, status=command["status"], reason="")
                self._write(msgspec.structs.replace(order, captures=[ended]))
        return None

    def _now(self) -> datetime:
        return datetime.now(UTC) + self._later

    def _is_expired(self, order: Order) -> bool:
        age = self._now() - datetime.fromisoformat(order.made_at)
        return order.expired or (not order.captures and age > ORDER_LIVES)

    def _token(self, call: Call) -> Response:
        expected = base64.b64encode(f"{CLIENT_ID}:{self._secret}".encode()).decode()
        if call.headers.get("authorization") != f"Basic {expected}":
            told = "Client Authentication failed"
            return Response(401, {"error": "invalid_client", "error_description": told})
        token = f"A21AA{uuid4().hex}"
        self._tokens.add(token)
        granted = {"access_token": token, "token_type": "Bearer", "expires_in": self._token_s}
        return Response(200, granted | {"app_id": "APP-80W284485P519543T", "scope": "openid"})

    def _verify(self, call: Call) -> Response:
        asked = msgspec.json.decode(call.body, type=Asked)
        event = bytes(asked.webhook_event)
        sent = (asked.transmission_id, asked.transmission_time, asked.webhook_id)
        expected = signature(WEBHOOK_SECRET, *sent, event)
        sound = hmac.compare_digest(expected, asked.transmission_sig)
        sound = sound and asked.webhook_id == WEBHOOK_ID
        return Response(200, {"verification_status": "SUCCESS" if sound else "FAILURE"})

    def _unknown_webhook(self) -> Response:
        told = {"name": "INVALID_RESOURCE_ID", "message": "not found", "debug_id": "b1d1f06c7246c"}
        return Response(404, told)

    def _repeated(self, kind: str, key: str, forgotten: bool) -> Response | None:
        """What a request with a known key gets."""
        if self._conflicts:
            self._conflicts -= 1
            return problem(409, "PREVIOUS_REQUEST_IN_PROGRESS")
        known = None if forgotten else self._ledger.keys.get(key)
        if known is None or self._now() - datetime.fromisoformat(known.at) > KEY_LIVES[kind]:
            return None
        if known.issue:
            return problem(422, known.issue)
        if kind == "refund":
            return Response(201, self._ledger.refunds[known.refund_id].body())
        return Response(200, self._ledger.orders[known.order.id].body())

    def _made(self, **fields: Any) -> Order:
        order = Order(id=ledgers.new_id(), made_at=self._now().isoformat(), **fields)
        self._write(order)
        return order

    def _create(self, call: Call, forgotten: bool) -> Response:
        key = f"create {call.headers['paypal-request-id']}"
        if (repeated := self._repeated("order", key, forgotten)) is not None:
            return repeated
        if self._makes_not:
            return problem(422, self._makes_not)
        (unit,) = msgspec.json.decode(call.body)["purchase_units"]
        order = Order(
            id=ledgers.new_id(),
            value=unit["amount"]["value"],
            currency=unit["amount"]["currency_code"],
            custom_id=unit.get("custom_id", ""),
            invoice_id=unit.get("invoice_id", ""),
            status="APPROVED" if self._approves else "CREATED",
            made_at=self._now().isoformat(),
        )
        self._write(order, key)
        return Response(201, order.body())

    def _confirm(self, order: Order) -> Response:
        if order.status != "CREATED":
            return problem(422, "PAYMENT_ALREADY_APPROVED")
        order = self._write(msgspec.structs.replace(order, status="PAYER_ACTION_REQUIRED"))
        return Response(200, order.body())

    def _patch(self, order: Order, changes: list[dict[str, str]]) -> Response:
        if order.status in ("COMPLETED", "VOIDED"):
            return problem(422, "ORDER_ALREADY_COMPLETED")
        if order.status not in ("CREATED", "APPROVED") or order.fixed:
            return problem(422, "NOT_PATCHABLE")
        fields: dict[str, str] = {}
        for change in changes:
            field = change["path"].rpartition("/")[2]
            if (change["op"] == "replace") is not bool(getattr(order, field)):
                return problem(400, "INVALID_PATCH_OPERATION")
            fields[field] = change["value"]
        self._write(msgspec.structs.replace(order, **fields))
        return Response(204, {})

    def _capture(self, order: Order, call: Call, forgotten: bool, declined: bool) -> Response:
        key = f"capture {call.headers['paypal-request-id']}"
        if (repeated := self._repeated("order", key, forgotten)) is not None:
            return repeated
        vaulted = b"vault_id" in call.body
        issue = "INSTRUMENT_DECLINED" if declined else order.rejects
        if order.captures:
            issue = "ORDER_ALREADY_CAPTURED"
        elif order.intent != "CAPTURE":
            issue = "ACTION_DOES_NOT_MATCH_INTENT"
        elif order.status != "APPROVED" and not vaulted:
            issue = "ORDER_NOT_APPROVED"
        if issue:
            if issue == "PAYER_ACTION_REQUIRED":
                order = msgspec.structs.replace(order, status=issue, rejects="")
            self._write(order, key, issue)
            return problem(422, issue, links=order.links())
        outcome = order.outcome or ("DECLINED" if order.value[-1] == "7" else "COMPLETED")
        capture = Payment(
            id=ledgers.new_id(),
            status=outcome,
            value=order.value,
            currency=order.currency,
            custom_id=order.custom_id,
            invoice_id=order.invoice_id,
            reason="ECHECK" if outcome == "PENDING" else "",
        )
        status = order.ends or "COMPLETED"
        done = msgspec.structs.replace(order, status=status, captures=[capture])
        self._write(done, key)
        return Response(201, done.body(captured=True))

    def _refund(self, capture_id: str, call: Call, forgotten: bool, declined: bool) -> Response:
        key = f"refund {call.headers['paypal-request-id']}"
        if (repeated := self._repeated("refund", key, forgotten)) is not None:
            return repeated
        order = self._ledger.captured.get(capture_id)
        if order is None:
            return problem(404, "INVALID_RESOURCE_ID")
        asked = msgspec.json.decode(call.body)
        issue = "REFUND_NOT_ALLOWED" if declined else order.refund_issue(asked["amount"])
        if issue:
            self._write(order, key, issue)
            return problem(422, issue)
        refund = Payment(
            id=ledgers.new_id(),
            status=order.refund_status or "COMPLETED",
            value=asked["amount"]["value"],
            currency=asked["amount"]["currency_code"],
            custom_id=asked["custom_id"],
            invoice_id=asked["invoice_id"],
            capture_id=capture_id,
        )
        self._write(order.refunded(refund), key, refund_id=refund.id)
        return Response(201, refund.body())

    def _write(self, order: Order, key: str = "", issue: str = "", refund_id: str = "") -> Order:
        order = msgspec.structs.replace(order, changes=order.changes + 1)
        at = self._now().isoformat()
        self._ledger.write(Line(order=order, key=key, at=at, issue=issue, refund_id=refund_id))
        return order


def problem(status: int, issue: str, **more: Any) -> Response:
    name, message = PROBLEMS[status]
    told = {"name": name, "message": message, "debug_id": "b1d1f06c7246c"}
    return Response(status, told | ({"details": [{"issue": issue}]} if issue else {}) | more)


def signature(secret: str, transmission_id: str, sent_at: str, webhook_id: str, body: bytes) -> str:
    signed = f"{transmission_id}|{sent_at}|{webhook_id}|{zlib.crc32(body)}"
    return hmac.new(secret.encode(), signed.encode(), hashlib.sha256).hexdigest() + "x"


def signed(body: bytes, secret: str = WEBHOOK_SECRET, sent_at: str = "") -> dict[str, str]:
    """The headers of a webhook that PayPal sends."""
    transmission_id = "69cd13f0-d67a-11e5-baa3-778b53f4ae55"
    sent_at = sent_at or datetime.now(UTC).strftime("%Y-%m-%dT%H:%M:%SZ")
    return {
        "paypal-auth-algo": "SHA256withRSA",
        "paypal-cert-url": "https://api.paypal.com/v1/notifications/certs/CERT-360caa42-fca2a594",
        "paypal-transmission-id": transmission_id,
        "paypal-transmission-sig": signature(secret, transmission_id, sent_at, WEBHOOK_ID, body),
        "paypal-transmission-time": sent_at,
    }


class PayPalProcess(StandInProcess):
    """PayPal for a test."""

    module = "tests.doubles.paypal_server"

    def set(self, **values: Any) -> None:
        """approves: whether customers approve our orders at once; secret: the one of the client;
        token_s: how long a token lives; conflicts: how many requests with a key get a 409;
        makes_not: the issue with which it makes no order."""
        self._ask(Any, do="set", **values)

    def revoke_tokens(self) -> None:
        self._ask(Any, do="revoke")

    def later(self, seconds: float) -> None:
        """So much time passes."""
        self._ask(Any, do="later", seconds=seconds)

    def make_order(self, value: str, currency: str, **fields: Any) -> str:
        """An order of the customer's browser, by our client id; its id. `fields` as of Order."""
        made: dict[str, Any] = {"status": "APPROVED"} | fields
        return self._ask(str, do="make", value=value, currency=currency, **made)

    def change(self, order_id: str, **fields: Any) -> None:
        """The order has these fields of Order."""
        self._ask(Any, do="change", order_id=order_id, **fields)

    def approve(self, order_id: str) -> None:
        self.change(order_id, status="APPROVED")

    def customer_acts(self, payment_id: object) -> None:
        """The customer approves what was made for this payment, if anything waits for it."""
        self._ask(Any, do="customer_acts", payment_id=str(payment_id))

    def finish(self, order_id: str, status: str = "COMPLETED") -> None:
        """The capture that was pending has this status."""
        self._ask(Any, do="finish", order_id=order_id, status=status)

    def orders(self) -> dict[str, Order]:
        return ledgers.read_orders(self.path)

    def captures(self, payment_id: object = None) -> list[Payment]:
        """The captures that took money, all of them or those with this id of ours."""
        return ledgers.moved(self.orders(), "captures", _text(payment_id))

    def refunds(self, refund_id: object = None) -> list[Payment]:
        return ledgers.moved(self.orders(), "refunds", _text(refund_id))


def _text(our_id: object) -> str | None:
    return None if our_id is None else str(our_id)


if __name__ == "__main__":
    run(PayPalProcess.module, PayPal)
