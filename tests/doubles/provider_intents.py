"""Charges of tests/doubles/provider.py that go by a reference of the provider, in steps.

    POST /intents                Idempotency-Key; form amount_cents, currency, metadata[payment_id]
    POST /intents/REF/confirm    Idempotency-Key; the same form, payment_method, return_url
    GET  /intents/REF
    POST /intents/REF/cancel

Nothing is found by the client's id: it is only a key of the first call, and metadata that each
response repeats. An intent that the customer made without us gets it when it is first confirmed.

`status` is ready, action, authorized or processing, then captured or declined. Confirming captures
an intent that is ready or authorized, once, unless `payment_method` says otherwise:

    pm_action         the customer has to act; then it is ready again
    pm_authorized     the customer has to act; then it is authorized
    pm_processing     it is processing until the test finishes it

Cancelling declines it, except while it is processing.
"""

import hashlib
from typing import Any
from urllib.parse import parse_qsl

import msgspec

from tests.doubles.provider_ledger import Ledger, Line

Response = tuple[int, dict[str, Any]]

STEP_AFTER_ACTION = {"pm_action": "ready", "pm_authorized": "authorized"}
STEP_AT_FIRST = {"pm_action": "action", "pm_authorized": "action", "pm_processing": "processing"}


class Intents:
    def __init__(self, ledger: Ledger) -> None:
        self._ledger = ledger

    def do(self, operation: str, named: str, body: bytes, forgotten: bool, code: str) -> Response:
        """`named` is the key of the first call, and the reference of the others."""
        form = dict(parse_qsl(body.decode(), keep_blank_values=True))
        if operation == "prepare":
            return self._prepare(named, form, hashlib.sha256(body).hexdigest(), forgotten)
        line = self._ledger.intents.get(named)
        if line is None:
            return 404, {"error": "not_found", "reference": named}
        if operation == "charge":
            return self._confirm(line, form, code)
        if operation == "cancel" and line.step not in ("", "processing"):
            line = self._end(line, "cancelled")
        return 200, _response(line)

    def made_by_customer(self, amount_cents: int, currency: str) -> str:
        return self._begin("", amount_cents, currency, "").reference

    def customer_acts(self, payment_id: str, *, declined: bool) -> bool:
        """Whether there was something to do."""
        if (line := self._of(payment_id, "action")) is None:
            return False
        if declined:
            self._end(line, "authentication_failed")
        else:
            self._go_on(line, step=STEP_AFTER_ACTION[line.payment_method], acted=True)
        return True

    def finish(self, payment_id: str, *, declined: bool) -> bool:
        """Whether it was processing."""
        if (line := self._of(payment_id, "processing")) is None:
            return False
        self._end(line, "bank_declined" if declined else "")
        return True

    def _of(self, payment_id: str, step: str) -> Line | None:
        """The intent of this payment that stands at this step."""
        lines = self._ledger.intents.values()
        return next((each for each in lines if (each.id, each.step) == (payment_id, step)), None)

    def _prepare(self, key: str, form: dict[str, str], sha256: str, forgotten: bool) -> Response:
        line = self._ledger.prepared.get(key)
        if line is None or forgotten:
            payment_id, amount_cents = form["metadata[payment_id]"], int(form["amount_cents"])
            line = self._begin(payment_id, amount_cents, form["currency"], sha256)
        elif line.body_sha256 != sha256:
            return 422, {"error": "key_used_with_another_body", "id": key}
        return 200, _response(line)

    def _begin(self, payment_id: str, amount_cents: int, currency: str, sha256: str) -> Line:
        line = Line(
            kind="prepare",
            id=payment_id,
            txn_id="",
            amount_cents=amount_cents,
            currency=currency,
            body_sha256=sha256,
            reference=self._ledger.next_id("ref"),
            step="ready",
        )
        return self._ledger.write(line)

    def _confirm(self, line: Line, form: dict[str, str], code: str) -> Response:
        if (str(line.amount_cents), line.currency) != (form["amount_cents"], form["currency"]):
            return 422, {"error": "other_amount", "id": line.id}
        if line.step not in ("ready", "authorized"):
            return 200, _response(line)
        line = msgspec.structs.replace(line, id=line.id or form["metadata[payment_id]"])
        method = form.get("payment_method", "")
        if not line.acted and (step := STEP_AT_FIRST.get(method)):
            line = self._go_on(line, step=step, payment_method=method)
        else:
            line = self._end(line, code)
        return 200, _response(line)

    def _go_on(self, line: Line, **changes: Any) -> Line:
        return self._ledger.write(msgspec.structs.replace(line, kind="open", **changes))

    def _end(self, line: Line, code: str) -> Line:
        code = code or ("insufficient_funds" if line.amount_cents % 10 == 7 else "")
        ended = msgspec.structs.replace(
            line,
            kind="decline" if code else "capture",
            txn_id=self._ledger.next_id("txn"),
            code=code,
            step="",
        )
        return self._ledger.write(ended)


def _response(line: Line) -> dict[str, Any]:
    response = line.answer() | {"id": line.id or None}
    if line.step == "action":
        response["action_url"] = f"https://provider.invalid/customer/{line.reference}"
        response["client_secret"] = f"secret_{line.reference}"
    return response
