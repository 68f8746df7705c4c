"""What Order Service does with a callback: as it is today, and as it is asked to be.

Today (`naive`): an order is PENDING when it is first heard of. SUCCESS confirms a PENDING order and
issues its tickets; between the look at the order and the issuing there is a moment, and nothing
that keeps another SUCCESS out of it. SUCCESS for a FAILED order is swallowed. Any other status
marks the order FAILED, even a confirmed one. order_id and payment_id must be UUIDs of version 4.

As it is asked to be: it verifies signatures, does an event_id once, ignores a sequence that is
older than one it knows of the same payment, and looks and issues in one step.
"""

import asyncio
import re
from collections.abc import Mapping, Sequence
from typing import Any, Literal, NamedTuple

import msgspec

OrderState = Literal["PENDING", "CONFIRMED", "FAILED", "REFUNDED"]

Effect = Literal[
    "issued",  # the order is confirmed, its tickets are issued
    "failed",  # the order is marked FAILED
    "broken",  # the order was confirmed, and is marked FAILED
    "swallowed",  # SUCCESS for a FAILED order
    "repeated",  # SUCCESS for a confirmed order
    "duplicate",  # not if naive: a known event_id
    "older",  # not if naive: an older sequence
    "unseated",  # only with seats: SUCCESS, and the seats were refused: the order is marked FAILED
    "ignored",  # only with seats: FAILED or REFUNDED for an order that is one of both
    "rejected",  # 400 or 401
]

ACCEPTED = 200, b'{"ok":true}'

Signature = Literal["unchecked", "valid", "missing", "invalid"]

UUID_4 = re.compile(
    r"[0-9a-f]{8}-[0-9a-f]{4}-4[0-9a-f]{3}-[89ab][0-9a-f]{3}-[0-9a-f]{12}", re.IGNORECASE
)


class Rejected(Exception):
    """Answered with this status; the message says why."""

    def __init__(self, status: int, message: str) -> None:
        super().__init__(message)
        self.status = status


class Callback(NamedTuple):
    order_id: str
    status: str
    payment_id: str
    event_id: str
    sequence: int


def decode(body: bytes) -> Any:
    """The JSON of a body; None if it is none."""
    try:
        return msgspec.json.decode(body)
    except (msgspec.DecodeError, UnicodeDecodeError):
        return None


def check(content: Any, *, naive: bool) -> Callback:
    """Raises Rejected. Who is naive never looks at the event_id and the sequence."""
    if not isinstance(content, dict):
        raise Rejected(400, "the body is no JSON object")
    for name in ("order_id", "payment_id"):
        text = content.get(name)
        if not isinstance(text, str) or not UUID_4.fullmatch(text):
            raise Rejected(400, f"{name} is no UUID of version 4")
    status, event_id, sequence = (content.get(name) for name in ("status", "event_id", "sequence"))
    if not isinstance(status, str):
        raise Rejected(400, "status is missing")
    if not naive and not (isinstance(event_id, str) and isinstance(sequence, int)):
        raise Rejected(400, "event_id or sequence is missing")
    order_id, payment_id = content["order_id"].lower(), content["payment_id"].lower()
    return Callback(
        order_id,
        status,
        payment_id,
        event_id if isinstance(event_id, str) else "",
        sequence if isinstance(sequence, int) else 0,
    )


class Orders:
    """All orders, by their id in lower case."""

    def __init__(self, *, naive: bool, issue_takes_s: float) -> None:
        self.states: dict[str, OrderState] = {}
        self._naive = naive
        self._issue_takes_s = issue_takes_s
        self._events: set[str] = set()
        self._sequences: dict[str, int] = {}  # the newest, by payment_id

    async def receive(self, callback: Callback) -> Effect:
        pending = self.states.setdefault(callback.order_id, "PENDING") == "PENDING"
        may_issue = callback.status == "SUCCESS" and pending
        if may_issue and self._issue_takes_s:
            await asyncio.sleep(self._issue_takes_s)
        if may_issue and self._naive:
            effect: Effect = "issued"  # whatever became of the order meanwhile
        else:
            effect = self._decide(callback)
        self.apply(callback, effect)
        return effect

    def _decide(self, callback: Callback) -> Effect:
        if not self._naive:
            if callback.event_id in self._events:
                return "duplicate"
            if callback.sequence < self._sequences.get(callback.payment_id, 0):
                return "older"
        state = self.states[callback.order_id]
        if callback.status != "SUCCESS":
            return "broken" if state == "CONFIRMED" else "failed"
        if state == "PENDING":
            return "issued"
        return "swallowed" if state == "FAILED" else "repeated"

    def shown(self, order_id: str) -> dict[str, Any] | None:
        """What GET /v1/orders/{order_id} tells of an order."""
        state = self.states.get(order_id)
        return state and {"order_id": order_id, "status": state}

    def response(self, order_id: str, effect: Effect) -> tuple[int, bytes]:
        """Status and body of the response to a callback."""
        return ACCEPTED

    def apply(self, callback: Callback, effect: Effect) -> None:
        """Also for what a log says that was done before."""
        self.states.setdefault(callback.order_id, "PENDING")
        if effect == "issued":
            self.states[callback.order_id] = "CONFIRMED"
        elif effect in ("failed", "broken"):
            self.states[callback.order_id] = "FAILED"
        if effect not in ("duplicate", "older"):
            self._events.add(callback.event_id)
            self._sequences[callback.payment_id] = callback.sequence


class Verifier:
    """Standard Webhooks 1.0, by the library that the specification comes with."""

    def __init__(self, secrets: Sequence[str]) -> None:
        """Each is "whsec_" and base64; a signature with any of them will do."""
        self._hooks: list[Any] = []
        if secrets:
            # Here, as only the tests' environment has it, and the benchmarks have no secrets.
            from standardwebhooks import Webhook, WebhookVerificationError

            self._hooks = [Webhook(secret) for secret in secrets]
            # The library splits and decodes the header without a look at it first.
            self._failures = (WebhookVerificationError, ValueError)

    def check(self, headers: Mapping[str, str], body: bytes) -> Signature:
        if not self._hooks:
            return "unchecked"
        if "webhook-signature" not in headers:
            return "missing"
        for hook in self._hooks:
            try:
                hook.verify(body, dict(headers))
            except self._failures:
                continue
            return "valid"
        return "invalid"
