"""What tests/doubles/razorpay_server.py keeps and says: entities, errors and webhooks, shaped as in
Razorpay's documentation."""

import hashlib
import hmac
import os
import time
from pathlib import Path
from typing import Any

import msgspec

from tests.doubles.stand_in import Call, Response

WEBHOOK_SECRET = "secretOfItsWebhook"
ACCOUNT = "acc_StandIn0000000"

Entity = dict[str, Any]


class Rejected(Exception):
    """An error response."""

    def __init__(
        self,
        description: str,
        status: int = 400,
        field: str | None = None,
        more: Entity | None = None,
    ) -> None:
        told = error(description, field)
        self.response = Response(status, {"error": told["error"] | (more or {})})


class Ledger:
    """An append-only file of entities as they stood; the last line of each counts."""

    def __init__(self, path: Path) -> None:
        self._file = os.open(path, os.O_WRONLY | os.O_APPEND | os.O_CREAT, 0o600)
        self.entities: dict[str, Entity] = {}
        self._lines = 0
        for entity in read_ledger(path):
            self._remember(entity)

    def write(self, *entities: Entity) -> Entity:
        """All or none of them; returns the first."""
        text = b"".join(msgspec.json.encode(entity) + b"\n" for entity in entities)
        assert os.write(self._file, text) == len(text)
        for entity in entities:
            self._remember(entity)
        return entities[0]

    def all(self, kind: str) -> list[Entity]:
        return [each for each in self.entities.values() if each["entity"] == kind]

    def new_id(self, prefix: str) -> str:
        return f"{prefix}_{self._lines + 1:014d}"

    def _remember(self, entity: Entity) -> None:
        self._lines += 1
        self.entities[entity["id"]] = entity


def new_order(order_id: str, body: Entity) -> Entity:
    return {
        "id": order_id,
        "entity": "order",
        "amount": body["amount"],
        "amount_paid": 0,
        "amount_due": body["amount"],
        "currency": body["currency"],
        "receipt": body.get("receipt"),
        "offer_id": None,
        "status": "created",
        "attempts": 0,
        "notes": body.get("notes") or [],
        "created_at": int(time.time()),
        "capture": body.get("payment", {}).get("capture", "automatic"),  # not shown
    }


def new_payment(
    payment_id: str, amount: int, currency: str, order_id: str | None, notes: Entity | None
) -> Entity:
    return {
        "id": payment_id,
        "entity": "payment",
        "amount": amount,
        "currency": currency,
        "status": "created",
        "order_id": order_id,
        "invoice_id": None,
        "international": False,
        "method": "netbanking",
        "amount_refunded": 0,
        "refund_status": None,
        "captured": False,
        "description": None,
        "card_id": None,
        "bank": "HDFC",
        "wallet": None,
        "vpa": None,
        "email": "customer@example.com",
        "contact": "+919000000000",
        "notes": notes or [],
        "fee": None,
        "tax": None,
        "error_code": None,
        "error_description": None,
        "error_source": None,
        "error_step": None,
        "error_reason": None,
        "acquirer_data": {"bank_transaction_id": "0125836177"},
        "created_at": int(time.time()),
    }


def new_refund(refund_id: str, payment: Entity, body: Entity, amount: int, status: str) -> Entity:
    return {
        "id": refund_id,
        "entity": "refund",
        "amount": amount,
        "currency": payment["currency"],
        "payment_id": payment["id"],
        "notes": body.get("notes") or [],
        "receipt": body.get("receipt"),
        "acquirer_data": {"arn": None},
        "created_at": int(time.time()),
        "batch_id": None,
        "status": status,
        "speed_processed": "normal",
        "speed_requested": "normal",
    }


def error(description: str, field: str | None = None) -> Entity:
    told = {
        "code": "BAD_REQUEST_ERROR",
        "description": description,
        "source": "business",
        "step": "payment_initiation",
        "reason": "input_validation_failed",
        "metadata": {},
    }
    return {"error": told | ({} if field is None else {"field": field})}


def body_of(call: Call) -> Entity:
    body: Entity = msgspec.json.decode(call.body)
    return body


def shown(order: Entity) -> Entity:
    return {name: value for name, value in order.items() if name != "capture"}


def page(entities: list[Entity], query: dict[str, str], count: int) -> Entity:
    skip, count = int(query.get("skip", 0)), int(query.get("count", count))
    items = entities[skip : skip + count]
    return {"entity": "collection", "count": len(items), "items": items}


def read_ledger(path: Path) -> list[Entity]:
    """Of a line that another process is still writing, what is there already is passed over."""
    *texts, _ = path.read_bytes().split(b"\n")
    return [msgspec.json.decode(text) for text in texts]


def webhook(event: str, **entities: Entity) -> bytes:
    """The raw body of one about these entities."""
    body = {
        "entity": "event",
        "account_id": ACCOUNT,
        "event": event,
        "contains": list(entities),
        "payload": {name: {"entity": entity} for name, entity in entities.items()},
        "created_at": 1_700_000_000,
    }
    return msgspec.json.encode(body)


def signed(
    raw_body: bytes, secret: str = WEBHOOK_SECRET, event_id: str | None = "evt_1"
) -> dict[str, str]:
    """The headers of a webhook, their names in lower case."""
    signature = hmac.new(secret.encode(), raw_body, hashlib.sha256).hexdigest()
    named = {} if event_id is None else {"x-razorpay-event-id": event_id}
    return {"x-razorpay-signature": signature, **named}
