"""A payment provider as an HTTP process of its own, with a ledger that outlives it.

    python -m tests.doubles.provider --ledger FILE [--port N]

See stand_in.py. Tests use ProviderProcess.

    POST /charges          Idempotency-Key: our payment id; {"amount_cents", "currency", ...}
    GET  /charges/ID
    POST /refunds          Idempotency-Key: our refund id; {"charge_txn_id", "amount_cents", ...}
    GET  /refunds/ID

A charge is captured, or declined if its amount ends in 7; a refund is declined beyond the capture.
The answer is 200 with `status` captured, refunded or declined; 404 for an unknown id; 422 for a key
that was used with another body. A repeated key gets the first answer again.

The same provider can also charge in steps, by a reference of its own: provider_intents.py.

Each capture, money-out and decline is a Line of the ledger, written before its answer is.
"""

import hashlib
from pathlib import Path
from typing import Any, Literal

import msgspec

from tests.doubles.provider_intents import Intents
from tests.doubles.provider_ledger import Ledger, Line, Order, read_ledger
from tests.doubles.stand_in import Call, Response, StandIn, StandInProcess, run

Operation = Literal[
    "charge", "find_charge", "refund", "find_refund", "prepare", "cancel", "account"
]
ROUTES: dict[tuple[str, ...], Operation] = {
    ("POST", "charges"): "charge",
    ("GET", "charges", "ID"): "find_charge",
    ("POST", "refunds"): "refund",
    ("GET", "refunds", "ID"): "find_refund",
    ("POST", "intents"): "prepare",
    ("POST", "intents", "ID", "confirm"): "charge",
    ("GET", "intents", "ID"): "find_charge",
    ("POST", "intents", "ID", "cancel"): "cancel",
    ("GET", "account"): "account",
}


class Provider(StandIn):
    def __init__(self, ledger: Path, port: int) -> None:
        super().__init__(port)
        self._ledger = Ledger(ledger)
        self._intents = Intents(self._ledger)
        self._counts = dict.fromkeys(ROUTES.values(), 0)

    def operation_of(self, call: Call) -> str | None:
        _, place, *more = call.path.split("/")
        operation = ROUTES.get((call.method, place, *("ID" for _ in more[:1]), *more[1:]))
        unnamed = not (more[:1] or call.headers.get("idempotency-key"))
        return None if call.method == "POST" and unnamed else operation

    def command(self, command: dict[str, Any]) -> Any:
        match command["do"]:
            case "made_by_customer":
                return self._intents.made_by_customer(command["amount_cents"], command["currency"])
            case "customer_acts":
                act = self._intents.customer_acts
            case _:
                act = self._intents.finish
        return act(command["payment_id"], declined=command["declined"])

    def do(self, operation: str, call: Call, *, forgotten: bool, declined: bool) -> Response:
        _, place, *more = call.path.split("/")
        named = more[0] if more else call.headers.get("idempotency-key", "")
        return Response(*self._do(operation, place, named, call.body, forgotten, declined))

    def misstated(self, kind: str, body: Any) -> Any:
        match kind:
            case "wrong_amount":
                return body | {"amount_cents": body.get("amount_cents", 0) + 1}
            case "wrong_currency":
                return body | {"currency": "JPY"}
        return body | {"id": "00000000-0000-4000-8000-000000000000"}

    def _do(
        self, operation: str, place: str, named: str, body: bytes, forgotten: bool, declined: bool
    ) -> tuple[int, dict[str, Any]]:
        """`named` is the idempotency key, or what the path names."""
        code = "declined_on_request" if declined else ""
        if place == "account":
            return 200, {"id": self._ledger.account}
        if place == "intents":
            return self._intents.do(operation, named, body, forgotten, code)
        charging = place == "charges"
        known = self._ledger.charges if charging else self._ledger.refunds
        line = known.get(named)
        if operation in ("find_charge", "find_refund"):
            return (200, line.answer()) if line else (404, {"error": "not_found", "id": named})
        sha256 = hashlib.sha256(body).hexdigest()
        if line is None or forgotten:
            order = msgspec.json.decode(body, type=Order)
            decide = self._ledger.charge if charging else self._ledger.refund
            line = decide(named, order, sha256, code)
        elif line.body_sha256 != sha256:
            return 422, {"error": "key_used_with_another_body", "id": named}
        return 200, line.answer()


class ProviderProcess(StandInProcess):
    """The provider for a test."""

    module = "tests.doubles.provider"

    def made_by_customer(self, amount_cents: int, currency: str) -> str:
        """An intent that was made without us, as by a page of the provider; its reference."""
        return self._ask(str, do="made_by_customer", amount_cents=amount_cents, currency=currency)

    def customer_acts(self, payment_id: object, *, declined: bool = False) -> bool:
        """What `action` asks for is done: the charge is ready, authorized or declined. False: it
        asks for nothing."""
        return self._ask(bool, do="customer_acts", payment_id=str(payment_id), declined=declined)

    def finish(self, payment_id: object, *, declined: bool = False) -> bool:
        """What is processing is captured, or declined. False: nothing is."""
        return self._ask(bool, do="finish", payment_id=str(payment_id), declined=declined)

    def ledger(self, client_id: object = None) -> list[Line]:
        """All lines, or those with this id of ours."""
        lines = read_ledger(self.path)
        return [line for line in lines if client_id is None or line.id == str(client_id)]

    def captures(self, payment_id: object = None) -> list[Line]:
        return [line for line in self.ledger(payment_id) if line.kind == "capture"]

    def refunds(self, refund_id: object = None) -> list[Line]:
        return [line for line in self.ledger(refund_id) if line.kind == "refund"]


if __name__ == "__main__":
    run(ProviderProcess.module, Provider)
