"""A ping: a request that is sent like a callback, but has no outcome."""

import time
from datetime import UTC, datetime
from typing import TYPE_CHECKING
from uuid import UUID, uuid4

import msgspec

if TYPE_CHECKING:
    from payments.order_service.endpoint import Endpoint, Exchange


class PingBody(msgspec.Struct, frozen=True, tag_field="type", tag="ping"):
    """Only a ping has a `type`; it has no order, payment or status."""

    event_id: UUID
    occurred_at: datetime


async def ping(endpoint: "Endpoint") -> "Exchange":
    """Opens the endpoint, makes one exchange and closes it."""
    body = PingBody(uuid4(), datetime.now(UTC))
    await endpoint.open()
    try:
        encoded = msgspec.json.encode(body)
        return await endpoint.post(str(body.event_id), encoded, int(time.time()))
    finally:
        await endpoint.close()
