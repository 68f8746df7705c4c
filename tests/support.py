"""Small helpers that several test modules share."""

import asyncio
import time
import uuid
from collections.abc import Awaitable, Callable
from typing import Any

from eventsourcing.persistence import StoredEvent

from payments.commands.charge import ChargePayment
from payments.payment import ChargeRequest

ORDER_ID = uuid.UUID("f50d9fa2-5d3e-4e49-9a02-218ad32ef4a9")


def charge_of(
    key: str,
    amount_cents: int = 1500,
    *,
    order_id: uuid.UUID = ORDER_ID,
    currency: str = "INR",
    client: str = "default",
    payment_method: str | None = None,
) -> ChargePayment:
    request = ChargeRequest(key, order_id, amount_cents, currency, client, payment_method)
    return ChargePayment(request, request_id="test")


def stored_event(
    stream: uuid.UUID | str | None = None,
    version: int = 1,
    state: bytes | None = None,
    topic: str = "PaymentInitiated",
) -> StoredEvent:
    """An event for the store alone; its state need not decode."""
    state = b'{"n": "%s"}' % uuid.uuid4().bytes.hex().encode() if state is None else state
    return StoredEvent(stream or uuid.uuid4(), version, topic, state)


async def until(
    holds: Callable[[], Any] | Callable[[], Awaitable[Any]], timeout_s: float = 10
) -> Any:
    """Polls a condition until it holds and returns what it returned; fails after `timeout_s`."""
    deadline = time.monotonic() + timeout_s
    while True:
        found = holds()
        if asyncio.iscoroutine(found):
            found = await found
        if found:
            return found
        assert time.monotonic() < deadline, "the condition did not come to hold"
        await asyncio.sleep(0.01)
