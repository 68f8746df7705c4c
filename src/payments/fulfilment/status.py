"""Asks ORDER_STATUS_URL about an order: one bounded exchange, like that of a callback."""

from typing import TYPE_CHECKING
from uuid import UUID

from payments.order_service.responses import Reading, not_known, read_status
from payments.order_service.target import Target
from payments.setting_values import ORDER_ID

if TYPE_CHECKING:
    from payments.order_service.endpoint import Endpoint, Exchange

TIMEOUT_S = 5.0  # a read by id; slower ones are retried later

_PROBLEMS = {
    "timeout": "timeout",
    "unreachable": "unreachable",
    "forbidden_address": "forbidden address",
    "protocol": "no HTTP response",
}


class OrderStatus:
    """`target` is that of ORDER_STATUS_URL; `endpoint` was made with it."""

    def __init__(self, target: Target, endpoint: "Endpoint") -> None:
        self._path_qs = target.url.path_qs
        self._endpoint = endpoint

    async def open(self) -> None:
        """Must be called in the event loop of `ask`."""
        await self._endpoint.open()

    async def close(self) -> None:
        await self._endpoint.close()

    async def ask(self, order_id: UUID) -> Reading:
        """The order's status, within the endpoint's timeout; raises only CancelledError."""
        exchange = await self._endpoint.get(self._path_qs.replace(ORDER_ID, str(order_id)))
        return _read(exchange, order_id)


def _read(exchange: "Exchange", order_id: UUID) -> Reading:
    if exchange.status is None:
        return not_known(_PROBLEMS[exchange.error or "protocol"])
    if exchange.status == 200 and exchange.reason:
        # The header section was complete, the body was not.
        late = exchange.reason == "TimeoutError"
        return not_known("timeout" if late else exchange.reason)
    return read_status(exchange.status, exchange.content_type, exchange.answer, order_id)
