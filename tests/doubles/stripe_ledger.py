"""The ledger of tests/doubles/stripe_server.py: Stripe's objects, as its API shows them.

A file of JSON lines. Each holds what one request changed: objects as they are from then on, and the
response that is stored under its idempotency key.
"""

import hashlib
import os
import time
import uuid
from pathlib import Path
from typing import Any

import msgspec

Object = dict[str, Any]


class Stored(msgspec.Struct, frozen=True):
    """The result of a request with an idempotency key. `at` is in seconds since 1970."""

    key: str
    request: str
    at: float
    status: int
    body: Any


class Line(msgspec.Struct, frozen=True, omit_defaults=True):
    """`moved` names what captured or gave back money: pi_ and re_ ids."""

    objects: list[Object] = []
    stored: Stored | None = None
    moved: list[str] = []


def read_lines(path: Path) -> list[Line]:
    """Those that are complete."""
    lines = path.read_bytes().split(b"\n")[:-1] if path.exists() else []
    return [msgspec.json.decode(line, type=Line) for line in lines]


class Ledger:
    def __init__(self, path: Path) -> None:
        self._file = os.open(path, os.O_WRONLY | os.O_APPEND | os.O_CREAT, 0o600)
        digest = hashlib.sha256(str(path.resolve()).encode()).hexdigest()
        self.account = f"acct_{digest[:16]}"
        self.objects: dict[str, Object] = {}
        self.stored: dict[str, Stored] = {}
        self._changed: dict[str, Object] = {}
        self._moved: list[str] = []
        for line in read_lines(path):
            self._remember(line)

    def put(self, object: Object, *, moved: bool = False) -> Object:
        """It is so from now on, for this process; `write` makes it durable."""
        self.objects[object["id"]] = self._changed[object["id"]] = object
        if moved:
            self._moved.append(object["id"])
        return object

    def write(self, stored: Stored | None = None) -> None:
        line = Line(list(self._changed.values()), stored, self._moved)
        self._changed, self._moved = {}, []
        if line.objects or stored is not None:
            os.write(self._file, msgspec.json.encode(line) + b"\n")
            self._remember(line)

    def _remember(self, line: Line) -> None:
        self.objects |= {each["id"]: each for each in line.objects}
        if line.stored is not None:
            self.stored[line.stored.key] = line.stored

    def refunds_of(self, intent: str) -> list[Object]:
        """The newest first, as in Stripe's lists."""
        every = reversed(self.objects.values())
        return [
            each
            for each in every
            if each["object"] == "refund" and each["payment_intent"] == intent
        ]


def new_id(kind: str) -> str:
    return f"{kind}_3{uuid.uuid4().hex[:23]}"


def new_intent(amount: int, currency: str, types: list[str], metadata: Object) -> Object:
    id = new_id("pi")
    return {
        "id": id,
        "object": "payment_intent",
        "amount": amount,
        "amount_capturable": 0,
        "amount_details": {"tip": {}},
        "amount_received": 0,
        "application": None,
        "canceled_at": None,
        "cancellation_reason": None,
        "capture_method": "automatic",
        "client_secret": f"{id}_secret_{uuid.uuid4().hex[:25]}",
        "confirmation_method": "automatic",
        "created": int(time.time()),
        "currency": currency,
        "customer": None,
        "description": None,
        "last_payment_error": None,
        "latest_charge": None,
        "livemode": False,
        "metadata": metadata,
        "next_action": None,
        "payment_method": None,
        "payment_method_options": {},
        "payment_method_types": types,
        "processing": None,
        "receipt_email": None,
        "setup_future_usage": None,
        "status": "requires_payment_method",
    }


def new_refund(intent: Object, amount: int, metadata: Object, status: str) -> Object:
    return {
        "id": new_id("re"),
        "object": "refund",
        "amount": amount,
        "balance_transaction": new_id("txn") if status == "succeeded" else None,
        "charge": intent["latest_charge"],
        "created": int(time.time()),
        "currency": intent["currency"],
        "metadata": metadata,
        "payment_intent": intent["id"],
        "reason": None,
        "receipt_number": None,
        "source_transfer_reversal": None,
        "status": status,
        "transfer_reversal": None,
    }
