"""Asks for the status of every order that was paid in a period, and reports contradictions between
Order Service and the log.

Orders are read by key, in pages, each with its own statement; no transaction is held between them.
Payments whose order failed or is unknown become suspects.
"""

import asyncio
import time
from collections.abc import AsyncIterator, Callable
from datetime import datetime
from typing import Literal, NamedTuple
from uuid import UUID

from payments.database.connections import Database
from payments.errors import StartError
from payments.fulfilment import table
from payments.fulfilment.checking import CONCURRENCY_MAX
from payments.fulfilment.status import OrderStatus
from payments.order_service.responses import Reading
from payments.queries.cursor import ListPlace
from payments.queries.payments import has_no_money, orders_with_outcomes

PAGE = 200  # orders that one statement reads
IN_VAIN_MAX = 50  # failed requests in a row about paid orders: the URL must be wrong

Kind = Literal["unfulfilled", "paid_twice", "not_known", "unpaid"]


class Found(NamedTuple):
    """A contradiction between an order's status and its payments.

    unfulfilled: the payment is captured, and its order failed. paid_twice: the order is confirmed,
    and an earlier captured payment paid it. not_known: the payment is captured, and the order's
    status is unknown: `problem` says why, or `order_status` is a word that we do not know. unpaid:
    the order is confirmed, and each of its payments failed or was refunded wholly; `payment_id` is
    None. A refunded payment does not count as captured.
    """

    kind: Kind
    order_id: UUID
    payment_id: UUID | None
    order_status: str | None
    problem: str | None


class Reconciliation:
    """`per_s` is the maximum of status requests in a second. `progress` is called with their number
    so far."""

    def __init__(
        self,
        database: Database,
        status: OrderStatus,
        per_s: float,
        progress: Callable[[int], None] = lambda asked: None,
    ) -> None:
        self._database = database
        self._status = status
        self._pause_s = 1 / per_s
        self._progress = progress
        self._next_at = 0.0
        self._in_vain = 0  # failed requests in a row
        self.asked = 0  # orders

    async def run(self, since: datetime, until: datetime, show: Callable[[Found], None]) -> int:
        """Shows the contradictions of orders that were paid from `since` until before `until`;
        returns their number. Raises DatabaseUnavailable, or StartError if the URL never responds
        with a status."""
        found, under_way = 0, set[asyncio.Task[list[Found]]]()
        try:
            async for order_id in self._orders(since, until):
                await self._pace()
                under_way.add(asyncio.create_task(self._look_at(order_id)))
                self.asked += 1
                self._progress(self.asked)
                if len(under_way) == CONCURRENCY_MAX:
                    done, under_way = await asyncio.wait(
                        under_way, return_when=asyncio.FIRST_COMPLETED
                    )
                    found += _show_all(done, show)
            while under_way:
                done, under_way = await asyncio.wait(under_way)
                found += _show_all(done, show)
        finally:
            for task in under_way:
                task.cancel()
        return found

    async def _orders(self, since: datetime, until: datetime) -> AsyncIterator[UUID]:
        after: ListPlace | None = None
        while page := await orders_with_outcomes(self._database, since, until, after, PAGE):
            for _, order_id in page:
                yield order_id
            after, _ = page[-1]

    async def _pace(self) -> None:
        await asyncio.sleep(self._next_at - time.monotonic())
        self._next_at = max(self._next_at, time.monotonic() - self._pause_s) + self._pause_s

    async def _look_at(self, order_id: UUID) -> list[Found]:
        reading = await self._status.ask(order_id)
        captured = await table.captured_for(self._database, order_id)
        told = reading.order_status, reading.problem
        if not captured.standing:
            unpaid = reading.verdict == "confirmed" and await has_no_money(self._database, order_id)
            return [Found("unpaid", order_id, None, *told)] if unpaid else []
        self._count_in_vain(reading)
        kind: Kind = "not_known"
        payment_ids = captured.standing
        if reading.verdict != "unknown":
            kind = "paid_twice" if reading.verdict == "confirmed" else "unfulfilled"
            payment_ids = captured.paid_for_nothing(reading.verdict)
        if payment_ids:
            await table.add(self._database, [(each, order_id) for each in payment_ids])
        return [Found(kind, order_id, payment_id, *told) for payment_id in payment_ids]

    def _count_in_vain(self, reading: Reading) -> None:
        self._in_vain = 0 if reading.problem is None else self._in_vain + 1
        if self._in_vain >= IN_VAIN_MAX:
            raise StartError(
                f"ORDER_STATUS_URL gave no status of {IN_VAIN_MAX} paid orders in a row, last: "
                f"{reading.problem}"
            )


def _show_all(done: set[asyncio.Task[list[Found]]], show: Callable[[Found], None]) -> int:
    found = [each for task in done for each in task.result()]
    for each in found:
        show(each)
    return len(found)
