"""The ledger of tests/doubles/paypal_server.py: an append-only file, and what follows from it."""

import os
from collections.abc import Iterator
from decimal import Decimal
from pathlib import Path
from typing import Any, Literal
from uuid import uuid4

import msgspec

MERCHANT_ID = "7QX2FN3JPKWAG"
MADE_AT = "2026-11-28T12:00:{:02}Z"
TOOK_MONEY = ("COMPLETED", "PARTIALLY_REFUNDED", "REFUNDED")


class Payment(msgspec.Struct, frozen=True, omit_defaults=True):
    """A capture or a refund; a refund names its capture."""

    id: str
    status: str
    value: str
    currency: str
    custom_id: str
    invoice_id: str
    reason: str = ""
    capture_id: str = ""

    def body(self) -> dict[str, Any]:
        stated: dict[str, Any] = {
            "id": self.id,
            "status": self.status,
            "amount": {"currency_code": self.currency, "value": self.value},
        }
        ids = {"custom_id": self.custom_id, "invoice_id": self.invoice_id}
        stated |= {name: value for name, value in ids.items() if value}
        if self.reason:
            stated["status_details"] = {"reason": self.reason}
        return stated


class Order(msgspec.Struct, frozen=True, omit_defaults=True):
    """What a test may have it do: `rejects` its capture with an issue; `outcome`, the status of its
    capture; `ends`, its own status after it; `refund_status` and `refund_rejects`; `fixed`, not to
    be patched; `expired`."""

    id: str
    value: str
    currency: str
    status: str
    made_at: str
    custom_id: str = ""
    invoice_id: str = ""
    intent: str = "CAPTURE"
    merchant_id: str = MERCHANT_ID
    changes: int = 0
    captures: list[Payment] = []
    refunds: list[Payment] = []
    units: int = 1
    rejects: str = ""
    outcome: str = ""
    ends: str = ""
    refund_status: str = ""
    refund_rejects: str = ""
    fixed: bool = False
    expired: bool = False

    def links(self) -> list[dict[str, str]]:
        rels = {"CREATED": "approve", "PAYER_ACTION_REQUIRED": "payer-action"}
        if self.status not in rels:
            return []
        href = f"https://www.sandbox.paypal.com/checkoutnow?token={self.id}"
        return [{"href": href, "rel": rels[self.status], "method": "GET"}]

    def body(self, *, captured: bool = False) -> dict[str, Any]:
        """The response to a capture leaves out intent and amount."""
        payments = {
            name: [each.body() for each in of]
            for name, of in (("captures", self.captures), ("refunds", self.refunds))
            if of
        }
        unit: dict[str, Any] = {"reference_id": "default"}
        if not captured:
            unit["amount"] = {"currency_code": self.currency, "value": self.value}
            unit["payee"] = {"merchant_id": self.merchant_id}
            ids = {"custom_id": self.custom_id, "invoice_id": self.invoice_id}
            unit |= {name: value for name, value in ids.items() if value}
        units = [unit | ({"payments": payments} if payments else {})]
        units += [unit | {"reference_id": f"{n}"} for n in range(1, self.units)]
        stated = {"id": self.id, "status": self.status, "purchase_units": units}
        stated |= {"links": self.links(), "update_time": MADE_AT.format(self.changes % 60)}
        return stated if captured else stated | {"intent": self.intent}

    def refund_issue(self, amount: dict[str, str]) -> str:
        (capture,) = self.captures
        if self.refund_rejects or capture.status == "PENDING":
            return self.refund_rejects or "PENDING_CAPTURE"
        if amount["currency_code"] != self.currency:
            return "REFUND_CAPTURE_CURRENCY_MISMATCH"
        left = Decimal(self.value) - self.given_back()
        return "REFUND_AMOUNT_EXCEEDED" if Decimal(amount["value"]) > left else ""

    def given_back(self) -> Decimal:
        return sum((Decimal(each.value) for each in self.refunds), Decimal(0))

    def refunded(self, refund: Payment) -> "Order":
        (capture,) = self.captures
        order = msgspec.structs.replace(self, refunds=[*self.refunds, refund])
        whole = order.given_back() == Decimal(self.value)
        status = "REFUNDED" if whole else "PARTIALLY_REFUNDED"
        changed = msgspec.structs.replace(capture, status=status)
        return msgspec.structs.replace(order, captures=[changed])


class Line(msgspec.Struct, frozen=True, omit_defaults=True):
    """An order as it is from then on, and the request that brought it there."""

    order: Order
    at: str
    key: str = ""
    issue: str = ""
    refund_id: str = ""


class Ledger:
    def __init__(self, path: Path) -> None:
        self._file = os.open(path, os.O_WRONLY | os.O_APPEND | os.O_CREAT, 0o600)
        self.orders: dict[str, Order] = {}
        self.keys: dict[str, Line] = {}
        self.captured: dict[str, Order] = {}  # by capture
        self.refunds: dict[str, Payment] = {}
        for line in read_lines(path):
            self._remember(line)

    def write(self, line: Line) -> None:
        text = msgspec.json.encode(line) + b"\n"
        assert os.write(self._file, text) == len(text)
        self._remember(line)

    def _remember(self, line: Line) -> None:
        self.orders[line.order.id] = line.order
        if line.key:
            self.keys[line.key] = line
        for capture in line.order.captures:
            self.captured[capture.id] = line.order
        for refund in line.order.refunds:
            self.refunds[refund.id] = refund


def new_id() -> str:
    return uuid4().hex[:17].upper()


def read_lines(path: Path) -> Iterator[Line]:
    """Of a line that another process is still writing, what is there already is passed over."""
    *texts, _ = path.read_bytes().split(b"\n")
    for text in texts:
        yield msgspec.json.decode(text, type=Line)


def read_orders(path: Path) -> dict[str, Order]:
    return {line.order.id: line.order for line in read_lines(path)}


def moved(
    orders: dict[str, Order], kind: Literal["captures", "refunds"], our_id: str | None = None
) -> list[Payment]:
    """What moved money, by our id if one is given."""
    return [
        each
        for order in orders.values()
        for each in getattr(order, kind)
        if each.status in TOOK_MONEY and our_id in (None, each.custom_id)
    ]
