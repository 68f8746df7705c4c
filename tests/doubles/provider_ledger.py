"""The ledger of tests/doubles/provider.py: an append-only file, and what follows from it."""

import hashlib
import os
from pathlib import Path
from typing import Any, Literal

import msgspec


class Line(msgspec.Struct, frozen=True, omit_defaults=True):
    """One decision. `id` is the client's, `txn_id` ours; a refund names the capture it is of.

    `open` is a step of a charge that goes by a `reference`, `prepare` the first one.
    """

    kind: Literal["capture", "decline", "refund", "refund_decline", "prepare", "open"]
    id: str
    txn_id: str
    amount_cents: int
    currency: str
    body_sha256: str
    charge_txn_id: str = ""
    code: str = ""
    reference: str = ""
    step: str = ""
    payment_method: str = ""
    acted: bool = False

    def answer(self) -> dict[str, Any]:
        shared = {"id": self.id, "amount_cents": self.amount_cents, "currency": self.currency}
        if self.reference:
            shared["reference"] = self.reference
        if self.step:
            return {"status": self.step, **shared}
        if self.code:
            return {"status": "declined", "code": self.code, **shared}
        status = "captured" if self.kind == "capture" else "refunded"
        return {"status": status, "txn_id": self.txn_id, **shared}


class Order(msgspec.Struct):
    """The body of a charge or a refund."""

    amount_cents: int
    currency: str
    charge_txn_id: str = ""


class Ledger:
    """An append-only file of Lines, and what follows from them."""

    def __init__(self, path: Path) -> None:
        self._file = os.open(path, os.O_WRONLY | os.O_APPEND | os.O_CREAT, 0o600)
        self._lines = 0
        self.account = f"acct_{hashlib.sha256(str(path.resolve()).encode()).hexdigest()[:16]}"
        self.charges: dict[str, Line] = {}
        self.refunds: dict[str, Line] = {}
        self.prepared: dict[str, Line] = {}  # by the client's id
        self.intents: dict[str, Line] = {}  # by reference, as they stand
        self._left: dict[str, Line] = {}  # what is still captured, by our capture id
        for line in read_ledger(path):
            self._remember(line)

    def charge(self, client_id: str, order: Order, sha256: str, code: str) -> Line:
        code = code or ("insufficient_funds" if order.amount_cents % 10 == 7 else "")
        return self._append("decline" if code else "capture", client_id, order, sha256, code)

    def refund(self, client_id: str, order: Order, sha256: str, code: str) -> Line:
        code = code or self._refusal(order)
        return self._append("refund_decline" if code else "refund", client_id, order, sha256, code)

    def _refusal(self, order: Order) -> str:
        left = self._left.get(order.charge_txn_id)
        if left is None:
            return "no_such_charge"
        if left.currency != order.currency:
            return "other_currency"
        return "exceeds_capture" if order.amount_cents > left.amount_cents else ""

    def _append(self, kind: Any, client_id: str, order: Order, sha256: str, code: str) -> Line:
        line = Line(
            kind=kind,
            id=client_id,
            txn_id=self.next_id("txn"),
            amount_cents=order.amount_cents,
            currency=order.currency,
            body_sha256=sha256,
            charge_txn_id=order.charge_txn_id,
            code=code,
        )
        return self.write(line)

    def next_id(self, prefix: str) -> str:
        return f"{prefix}_{self._lines + 1}"

    def write(self, line: Line) -> Line:
        text = msgspec.json.encode(line) + b"\n"
        assert os.write(self._file, text) == len(text)
        self._remember(line)
        return line

    def _remember(self, line: Line) -> None:
        self._lines += 1
        if line.kind == "prepare":
            self.prepared[line.id] = line
        if line.reference:
            self.intents[line.reference] = line
        elif line.kind in ("capture", "decline"):
            self.charges[line.id] = line
        else:
            self.refunds[line.id] = line
        if line.kind == "capture":
            self._left[line.txn_id] = line
        if line.kind == "refund":
            left = self._left[line.charge_txn_id]
            self._left[line.charge_txn_id] = msgspec.structs.replace(
                left, amount_cents=left.amount_cents - line.amount_cents
            )


def read_ledger(path: Path) -> list[Line]:
    """Of a line that another process is still writing, what is there already is passed over."""
    *texts, _ = path.read_bytes().split(b"\n")
    return [msgspec.json.decode(text, type=Line) for text in texts]
