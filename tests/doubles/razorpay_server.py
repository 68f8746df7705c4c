"""A stand-in of Razorpay, with a ledger that outlives it.

    python -m tests.doubles.razorpay_server --ledger FILE [--port N]

See stand_in.py. Tests use RazorpayProcess. Entities and errors are as in Razorpay's documentation;
what a request did is a line of the ledger before it is responded to. Customers, the bank and the
dashboard are commands of the test.

    POST  /v1/orders                  prepare        one order for one receipt, if unique_receipt
    GET   /v1/orders?receipt=         find_order
    GET   /v1/orders/ID               find_order
    GET   /v1/orders/ID/payments      find_charge
    GET   /v1/payments/ID             find_charge
    PATCH /v1/payments/ID             mark           replaces the notes
    POST  /v1/payments/ID/capture     charge         the whole amount, once
    POST  /v1/payments/ID/refund      refund         X-Refund-Idempotency
    GET   /v1/payments/ID/refunds     find_refund
"""

import base64
import hashlib
import re
from pathlib import Path
from typing import Any
from urllib.parse import parse_qs
from uuid import UUID

from tests.doubles.razorpay_ledger import (
    Entity,
    Ledger,
    Rejected,
    body_of,
    error,
    new_order,
    new_payment,
    new_refund,
    page,
    read_ledger,
    shown,
)
from tests.doubles.stand_in import Call, Response, StandIn, StandInProcess, run

KEY_ID, KEY_SECRET = "rzp_test_StandIn000000", "secretOfTheStandIn"
AUTHORIZATION = "Basic " + base64.b64encode(f"{KEY_ID}:{KEY_SECRET}".encode()).decode()

ROUTES = {
    ("POST", "orders"): "prepare",
    ("GET", "orders"): "find_order",
    ("GET", "orders", "ID"): "find_order",
    ("GET", "orders", "ID", "payments"): "find_charge",
    ("GET", "payments", "ID"): "find_charge",
    ("PATCH", "payments", "ID"): "mark",
    ("POST", "payments", "ID", "capture"): "charge",
    ("POST", "payments", "ID", "refund"): "refund",
    ("GET", "payments", "ID", "refunds"): "find_refund",
}
ORDER_FIELDS = {"amount", "currency", "receipt", "notes", "payment", "unique_receipt"}
NOWHERE = "The requested URL was not found on the server."


class Razorpay(StandIn):
    def __init__(self, ledger: Path, port: int) -> None:
        super().__init__(port)
        self._ledger = Ledger(ledger)
        self._counts = dict.fromkeys(ROUTES.values(), 0)
        self._pays_at_once = False
        self._knows_unique_receipt = True
        self._refund_status = "processed"
        self._order_error: Entity | None = None

    def operation_of(self, call: Call) -> str | None:
        _, version, *places = call.path.split("/")
        shape = (call.method, *places[:1], *("ID" for _ in places[1:2]), *places[2:])
        return ROUTES.get(shape) if version == "v1" else None

    def not_found(self, call: Call) -> Response:
        return Response(400, error(NOWHERE))

    def do(self, operation: str, call: Call, *, forgotten: bool, declined: bool) -> Response:
        if call.headers.get("authorization") != AUTHORIZATION:
            return Response(
                401,
                {"error": {"code": "BAD_REQUEST_ERROR", "description": "Authentication failed"}},
            )
        _, _, place, *more = call.path.split("/")
        query = {
            name: values[-1] for name, values in parse_qs(call.target.partition("?")[2]).items()
        }
        try:
            if place == "orders":
                return Response(200, self._orders(operation, more, query, call, forgotten))
            payment = self._known(more[0], "pay")
            match operation:
                case "mark":
                    payment = self._ledger.write(payment | {"notes": body_of(call)["notes"]})
                case "charge":
                    payment = self._capture(payment, body_of(call), declined)
                case "refund":
                    return Response(200, self._refund(payment, call, forgotten, declined))
                case "find_refund":
                    refunds = [
                        e for e in self._ledger.all("refund") if e["payment_id"] == payment["id"]
                    ]
                    return Response(200, page(refunds[::-1], query, 10))
            return Response(200, payment)
        except Rejected as rejected:
            return rejected.response

    def misstated(self, kind: str, body: Any) -> Any:
        if body.get("entity") == "collection":
            return body | {"items": [self.misstated(kind, each) for each in body["items"]]}
        match kind:
            case "wrong_amount":
                return body | {"amount": body.get("amount", 0) + 1}
            case "wrong_currency":
                return body | {"currency": "JPY"}
        other = "00000000-0000-4000-8000-000000000000"
        if body.get("entity") == "payment":
            return body | {"notes": {"payment_id": other}}
        return body | {"receipt": other}

    def command(self, command: dict[str, Any]) -> Any:
        match command.pop("do"):
            case "pay":
                return self._pay(**command)["id"]
            case "turn":
                self._turn(**command)
            case "act":
                self._act(**command)
            case "set":
                for name, value in command.items():
                    assert hasattr(self, f"_{name}")
                    setattr(self, f"_{name}", value)
            case "entity":
                return self._ledger.entities[command["id"]]
        return None

    def _known(self, named: str, prefix: str) -> Entity:
        if not re.fullmatch(f"{prefix}_[A-Za-z0-9]{{14}}", named):
            raise Rejected(f"{named} is not a valid id")
        if named not in self._ledger.entities:
            raise Rejected("The id provided does not exist")
        return self._ledger.entities[named]

    def _orders(
        self, operation: str, more: list[str], query: dict[str, str], call: Call, forgotten: bool
    ) -> Entity:
        if operation == "prepare":
            if self._order_error is not None:
                raise Rejected("", more=self._order_error)
            return self._make_order(body_of(call), forgotten)
        if not more:
            receipt = query.get("receipt")
            orders = self._ledger.all("order")
            orders = [each for each in orders if receipt in (None, each["receipt"])]
            return page([shown(each) for each in orders[::-1]], query, 10)
        order = self._known(more[0], "order")
        if len(more) == 1:
            return shown(order)
        payments = [e for e in self._ledger.all("payment") if e["order_id"] == order["id"]]
        return page(payments, {}, 100)

    def _make_order(self, body: Entity, forgotten: bool) -> Entity:
        known = ORDER_FIELDS if self._knows_unique_receipt else ORDER_FIELDS - {"unique_receipt"}
        if superfluous := body.keys() - known:
            raise Rejected(f"{', '.join(superfluous)} is/are not required and should not be sent")
        if not isinstance(body["amount"], int):
            raise Rejected("The amount must be an integer.", field="amount")
        if body["currency"] == "INR" and body["amount"] < 100:
            raise Rejected("The amount must be at least INR 1.00", field="amount")
        for order in self._ledger.all("order"):
            if body.get("unique_receipt") and order["receipt"] == body["receipt"] and not forgotten:
                return shown(order)
        order = self._ledger.write(new_order(self._ledger.new_id("order"), body))
        if self._pays_at_once:
            self._pay(order["amount"], order["currency"], order["id"])
        return shown(order)

    def _pay(
        self,
        amount: int,
        currency: str,
        order_id: str | None = None,
        status: str = "authorized",
        notes: Entity | None = None,
    ) -> Entity:
        payment = new_payment(self._ledger.new_id("pay"), amount, currency, order_id, notes)
        self._ledger.write(payment)
        if order_id is not None:
            order = self._ledger.entities[order_id]
            assert order["status"] != "paid", "no further payment of a paid order"
            attempted = {"status": "attempted", "attempts": order["attempts"] + 1}
            self._ledger.write(order | attempted)
        return payment if status == "created" else self._turn(payment["id"], status)

    def _act(self, receipt: str, method: str | None) -> None:
        if method is not None:
            if self._ledger.entities[method]["status"] == "created":
                self._turn(method, "authorized")
            return
        for order in self._ledger.all("order"):
            if order["receipt"] == receipt and order["status"] == "created":
                self._pay(order["amount"], order["currency"], order["id"])

    def _turn(self, payment_id: str, status: str) -> Entity:
        """The bank, or the dashboard: authorized, also late; failed; captured; expired, which is
        `refunded` without a capture."""
        payment = self._ledger.entities[payment_id] | {"status": status}
        if status == "failed":
            payment |= {
                "error_code": "BAD_REQUEST_ERROR",
                "error_description": "Payment failed",
                "error_source": "bank",
                "error_step": "payment_authorization",
                "error_reason": "payment_failed",
            }
        elif status == "captured":
            return self._captured(payment)
        elif status == "expired":
            whole = {"amount_refunded": payment["amount"], "refund_status": "full"}
            payment |= {"status": "refunded", "captured": False, **whole}
        else:
            payment |= {name: None for name in payment if name.startswith("error_")}
        return self._ledger.write(payment)

    def _captured(self, payment: Entity) -> Entity:
        fee = payment["amount"] // 50
        payment |= {"status": "captured", "captured": True, "fee": fee, "tax": 0}
        if payment["order_id"] is None:
            return self._ledger.write(payment)
        paid = {"amount_paid": payment["amount"], "amount_due": 0, "status": "paid"}
        return self._ledger.write(payment, self._ledger.entities[payment["order_id"]] | paid)

    def _capture(self, payment: Entity, body: Entity, declined: bool) -> Entity:
        if payment["captured"]:
            raise Rejected("This payment has already been captured")
        if payment["status"] != "authorized" or declined:
            raise Rejected(
                "Only payments which have been authorized and not yet captured can be captured"
            )
        order = self._ledger.entities.get(payment["order_id"] or "", {"status": ""})
        if order["status"] == "paid":
            raise Rejected(
                "Your payment has been declined as the order is already paid. "
                "Please initiate the payment with a new order."
            )
        if (body["amount"], body["currency"]) != (payment["amount"], payment["currency"]):
            raise Rejected("Capture amount must be equal to the amount authorized", field="amount")
        return self._captured(dict(payment))

    def _refund(self, payment: Entity, call: Call, forgotten: bool, declined: bool) -> Entity:
        key, body = call.headers.get("x-refund-idempotency"), body_of(call)
        sha256 = hashlib.sha256(call.body).hexdigest()
        if key is not None and not re.fullmatch(r"[A-Za-z0-9_-]{10,}", key):
            raise Rejected("The idempotency key must be at least 10 characters long.")
        used = self._ledger.entities.get(f"key {key}")
        if key is not None and used is not None and not forgotten:
            if used["body_sha256"] != sha256:
                raise Rejected(
                    "Different request with the same idempotency key has already been processed.",
                    409,
                )
            return self._ledger.entities[used["refund_id"]]
        amount: int = body["amount"] if "amount" in body else payment["amount"]
        left = payment["amount"] - payment["amount_refunded"]
        if declined:
            raise Rejected(
                "Refund is not supported by the bank because the payment is more than 6 months old"
            )
        if not payment["captured"]:
            raise Rejected("The payment status should be captured for action to be taken")
        if left == 0:
            raise Rejected("The payment has been fully refunded already")
        if amount > left:
            raise Rejected(
                "The refund amount provided is greater than amount captured", field="amount"
            )
        return self._give_back(payment, body, amount, key, sha256)

    def _give_back(
        self, payment: Entity, body: Entity, amount: int, key: str | None, sha256: str
    ) -> Entity:
        refund = new_refund(self._ledger.new_id("rfnd"), payment, body, amount, self._refund_status)
        written = [refund]
        if key is not None:
            used = {"id": f"key {key}", "entity": "key", "body_sha256": sha256}
            written.append(used | {"refund_id": refund["id"]})
        if refund["status"] != "failed":
            refunded = payment["amount_refunded"] + amount
            whole = refunded == payment["amount"]
            changed = {"amount_refunded": refunded, "refund_status": "full" if whole else "partial"}
            written.append(payment | changed | ({"status": "refunded"} if whole else {}))
        return self._ledger.write(*written)


class RazorpayProcess(StandInProcess):
    """Razorpay for a test."""

    module = "tests.doubles.razorpay_server"

    def pay(
        self,
        amount: int,
        currency: str = "INR",
        *,
        order_id: str | None = None,
        status: str = "authorized",
        notes: Entity | None = None,
    ) -> str:
        """A customer pays, for this order or none: authorized, failed, created or captured. The id
        of the payment."""
        payment = {"amount": amount, "currency": currency, "order_id": order_id}
        return self._ask(str, do="pay", **payment, status=status, notes=notes)

    def turn(self, payment_id: str, status: str) -> None:
        """What the bank or the dashboard makes of a payment: authorized, failed, captured, expired
        (given back uncaptured), or any other status."""
        self._ask(Any, do="turn", payment_id=payment_id, status=status)

    def customer_acts(self, payment_id: UUID, method: str | None) -> None:
        """What there is to do for this payment of ours: the payment that is its payment method is
        authorized, or without one the order that was made for it is paid."""
        self._ask(Any, do="act", receipt=str(payment_id), method=method)

    def pays_at_once(self, pays: bool = True) -> None:
        """Whether the customer of each new order pays it at once."""
        self._ask(Any, do="set", pays_at_once=pays)

    def as_at_first(self) -> None:
        """Takes back the four settings."""
        given = {"pays_at_once": False, "knows_unique_receipt": True, "refund_status": "processed"}
        self._ask(Any, do="set", **given, order_error=None)

    def knows_unique_receipt(self, knows: bool) -> None:
        """Whether it makes one order for one receipt, or rejects that as no field."""
        self._ask(Any, do="set", knows_unique_receipt=knows)

    def makes_no_order(self, **error: str) -> None:
        """It rejects each with this error, with status 400."""
        self._ask(Any, do="set", order_error=error)

    def refund_status(self, status: str) -> None:
        """Of the refunds from here on: processed, pending or failed."""
        self._ask(Any, do="set", refund_status=status)

    def entity(self, entity_id: str) -> Entity:
        return self._ask(Entity, do="entity", id=entity_id)

    def entities(self, kind: str) -> list[Entity]:
        """All orders, payments or refunds, as they stand; also while the process is dead."""
        last = {entity["id"]: entity for entity in read_ledger(self.path)}
        return [entity for entity in last.values() if entity["entity"] == kind]

    def captures(self, payment_id: UUID | None = None) -> list[Entity]:
        """The captured payments of customers, or those for this payment of ours."""
        captured = [each for each in self.entities("payment") if each["captured"]]
        return [each for each in captured if payment_id in (None, self.our_id(each))]

    def refunds(self, refund_id: UUID | None = None) -> list[Entity]:
        """What was given back, or under this refund of ours."""
        made = [each for each in self.entities("refund") if each["status"] != "failed"]
        return [each for each in made if refund_id is None or each["receipt"] == str(refund_id)]

    def our_id(self, payment: Entity) -> UUID | None:
        """The payment of ours that a customer's payment was captured for."""
        named = dict(payment["notes"]).get("payment_id")
        if named is None and payment["order_id"] is not None:
            (named,) = (
                e["receipt"] for e in self.entities("order") if e["id"] == payment["order_id"]
            )
        return UUID(named) if named else None


if __name__ == "__main__":
    run(RazorpayProcess.module, Razorpay)
