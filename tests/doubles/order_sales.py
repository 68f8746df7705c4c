"""Order Service as a client: it holds the seats, charges once, and refunds.

A charge is never repeated. After SUCCESS and PENDING the order waits for its callback, after any
other response it is FAILED, and without one it is what its Seating says.
"""

import asyncio
from collections.abc import Sequence
from typing import Any

import httpx

from tests.doubles.order_bookings import Booking, Bookings, Purchase
from tests.doubles.order_seats import SeatsTaken

REFUND_TIMEOUT_S = 15.0


class Sales:
    def __init__(self, orders: Bookings) -> None:
        self._orders = orders
        self._client = httpx.AsyncClient(timeout=None)
        self._charging: set[asyncio.Task[None]] = set()

    def sell(self, purchase: Purchase) -> bool:
        """Holds the seats and begins to charge; False if they are not for sale."""
        try:
            order = self._orders.place(purchase.order_id, purchase.seats)
        except SeatsTaken:
            return False
        task = asyncio.create_task(self._charge(order, purchase))
        self._charging.add(task)
        task.add_done_callback(self._charging.discard)
        return True

    @property
    def under_way(self) -> int:
        """Charges that wait for their response."""
        return len(self._charging)

    async def _charge(self, order: Booking, purchase: Purchase) -> None:
        seating = self._orders.seats.seating
        body = {"merchant_order_id": order.order_id, "amount_cents": purchase.amount_cents}
        try:
            async with asyncio.timeout(seating.charge_timeout_s):
                response = await self._client.post(
                    f"{purchase.url}/v1/charge",
                    json=body,
                    headers={"Idempotency-Key": purchase.key},
                )
        except (TimeoutError, httpx.TransportError):
            order.charges.append("none")
            failed = seating.unanswered == "FAILED"
        else:
            told: dict[str, Any] = response.json() if response.status_code < 300 else {}
            order.charges.append(told.get("status", str(response.status_code)))
            order.payments += [told["id"]] if told else []
            failed = order.charges[-1] not in ("SUCCESS", "PENDING")
        if failed:
            self._orders.fail(order.order_id)

    async def refund(self, url: str, order_id: str, payment_id: str) -> str:
        """The status that the refund was answered with."""
        response = await self._client.post(
            f"{url}/v1/refund", json={"payment_id": payment_id}, timeout=REFUND_TIMEOUT_S
        )
        status = str(response.raise_for_status().json()["status"])
        if status == "REFUNDED":
            self._orders.refunded(order_id, payment_id)
        return status

    async def close(self) -> None:
        charging: Sequence[asyncio.Task[None]] = list(self._charging)
        for task in charging:
            task.cancel()
        await asyncio.gather(*charging, return_exceptions=True)
        await self._client.aclose()
