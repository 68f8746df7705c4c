"""What Order Service does with orders that have seats, as it was measured.

A callback reads its order once, at its beginning. SUCCESS allocates the seats of a PENDING order,
then confirms it and issues a ticket, whatever became of the order meanwhile; if the allocation is
refused, it releases the seats and marks the order FAILED. For an order that is decided it does
nothing. FAILED and REFUNDED release the seats and mark the order FAILED, also a confirmed one; one
that is FAILED or REFUNDED they leave alone.
"""

from collections.abc import Sequence
from typing import Any

import msgspec

from tests.doubles.order_faults import APPLICATION_ERROR
from tests.doubles.order_seats import Seating, Seats, SeatsTaken
from tests.doubles.order_states import Callback, Effect, OrderState


class Booking(msgspec.Struct):
    """One order. `order_id` is in lower case."""

    order_id: str
    seats: tuple[str, ...]
    state: OrderState = "PENDING"
    tickets: list[str] = []  # ids of the payments that they were issued for
    # What each charge came to: SUCCESS, FAILED or PENDING, a status above 299, or "none".
    charges: list[str] = []
    payments: list[str] = []  # their ids, as far as they were told in a charge's response
    lost: tuple[str, ...] = ()  # those of the seats that can be sold again, or are another order's


class Purchase(msgspec.Struct, frozen=True):
    """`url` is that of the Payment Service. An order may be charged again, with another key."""

    url: str
    order_id: str
    key: str
    seats: tuple[str, ...]
    amount_cents: int = 1500


class Bookings:
    """All orders; one that a callback is the first to name has one seat, and holds it."""

    def __init__(self, seating: Seating) -> None:
        self.seats = Seats(seating)
        self._orders: dict[str, Booking] = {}

    @property
    def states(self) -> dict[str, OrderState]:
        return {order_id: order.state for order_id, order in self._orders.items()}

    def book(self) -> dict[str, Booking]:
        """All orders as they are now."""
        return {
            order_id: msgspec.structs.replace(order, lost=self.seats.lost(order_id, order.seats))
            for order_id, order in self._orders.items()
        }

    def shown(self, order_id: str) -> dict[str, Any] | None:
        """What GET /v1/orders/{order_id} tells of an order."""
        order = self._orders.get(order_id)
        if order is None:
            return None
        return {
            "order_id": order_id,
            "status": order.state,
            "seats": order.seats,
            "tickets": order.tickets,
        }

    def place(self, order_id: str, names: Sequence[str]) -> Booking:
        """Holds the seats for an order, new or not; SeatsTaken."""
        if order_id not in self._orders:
            self.seats.hold(order_id, names)
            self._orders[order_id] = Booking(order_id, tuple(names))
        return self._orders[order_id]

    def fail(self, order_id: str) -> None:
        """Its charge failed."""
        order = self._orders[order_id]
        if order.state == "PENDING":
            self._end(order, "FAILED")

    def refunded(self, order_id: str, payment_id: str) -> None:
        """Order Service gave this payment's money back."""
        order = self._orders[order_id]
        if payment_id in order.tickets:
            self._end(order, "REFUNDED")

    async def receive(self, callback: Callback) -> Effect:
        order = self.place(callback.order_id, [callback.order_id])
        if callback.status != "SUCCESS":
            return self._undo(order)
        if order.state != "PENDING":
            return "repeated" if order.state == "CONFIRMED" else "swallowed"
        try:
            await self.seats.allocate(order.order_id, order.seats)
        except SeatsTaken:
            self._end(order, "FAILED")
            return "unseated"
        order.state = "CONFIRMED"
        order.tickets.append(callback.payment_id)
        return "issued"

    def _undo(self, order: Booking) -> Effect:
        if order.state in ("FAILED", "REFUNDED"):
            return "ignored"
        effect: Effect = "broken" if order.state == "CONFIRMED" else "failed"
        self._end(order, "FAILED")
        return effect

    def _end(self, order: Booking, state: OrderState) -> None:
        self.seats.release(order.seats)
        order.state = state

    def response(self, order_id: str, effect: Effect) -> tuple[int, bytes]:
        """Status and body of the response to a callback."""
        if effect == "unseated":
            return 502, msgspec.json.encode(APPLICATION_ERROR | {"order_id": order_id})
        if effect in ("issued", "failed", "broken"):
            status = "CONFIRMED" if effect == "issued" else "FAILED"
            return 200, msgspec.json.encode({"order_id": order_id, "status": status})
        return 200, b'{"message":"already processed"}'
