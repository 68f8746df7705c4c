"""Orders that are sold at a steady rate, through a real service: how soon each was told of, and how
it ended."""

import time
import uuid
from collections.abc import Collection, Iterable, Sequence
from typing import Any, NamedTuple, Self

import psycopg

from tests.doubles.order_bookings import Booking, Purchase
from tests.doubles.order_requests import repeated_early
from tests.doubles.order_service import OrderServiceProcess
from tests.invariants.callbacks import is_followed
from tests.invariants.orders import broken_orders

PER_S = 3.0
PAID, DECLINED = 1500, 1507  # the simulated provider declines what ends with a 7
DECISION_S = 10.0  # for what the service and Order Service still do when nothing more is sold

CALLED_BACK = """
SELECT state, extract(epoch FROM finished_at - occurred_at)::float
  FROM callback_deliveries WHERE order_id = ANY(%s::uuid[]) AND status = 'SUCCESS'
"""

# Not yet in the outbox, or due.
OWED = """
SELECT count(*) FROM unnest(%s::uuid[]) AS sold (order_id)
 WHERE NOT EXISTS (
     SELECT FROM callback_deliveries d WHERE d.order_id = sold.order_id AND d.state <> 'due'
 ) OR EXISTS (
     SELECT FROM callback_deliveries d WHERE d.order_id = sold.order_id AND d.state = 'due'
 )
"""


class Delays(NamedTuple):
    """From an outcome to its delivered callback, in seconds; `owed` were not delivered."""

    delivered: int
    owed: int
    dead: int
    p50_s: float
    p99_s: float
    max_s: float

    @classmethod
    def of(cls, states: Iterable[tuple[str, float | None]]) -> Self:
        states = list(states)
        delays = sorted(s for state, s in states if state == "delivered" and s is not None)
        dead = sum(state == "dead" for state, _ in states)
        middle, last = [_quantile(delays, share) for share in (0.5, 0.99)]
        owed = len(states) - len(delays) - dead
        return cls(len(delays), owed, dead, middle, last, delays[-1] if delays else 0.0)

    def __str__(self) -> str:
        return (
            f"{self.delivered} delivered, {self.owed} owed, {self.dead} dead; delay p50"
            f" {self.p50_s:.2f} s, p99 {self.p99_s:.2f} s, max {self.max_s:.2f} s"
        )


def _quantile(ordered: list[float], share: float) -> float:
    return ordered[min(len(ordered) - 1, int(share * len(ordered)))] if ordered else 0.0


def new_orders(count: int) -> list[str]:
    """Their ids."""
    return [str(uuid.uuid4()) for _ in range(count)]


class Sale:
    """`url` is that of the service, whose database the connection is to."""

    def __init__(
        self, url: str, orders: OrderServiceProcess, connection: psycopg.Connection[Any]
    ) -> None:
        self.url = url
        self._orders = orders
        self._connection = connection

    def sell(self, sold: Sequence[str], declined: Collection[str] = ()) -> None:
        """These orders, each of one seat of its own; the cards of some are `declined`."""
        began = time.monotonic()
        for number, order_id in enumerate(sold):
            time.sleep(max(0.0, began + number / PER_S - time.monotonic()))
            self.charge(order_id, "first", DECLINED if order_id in declined else PAID)

    def charge(self, order_id: str, key: str, amount_cents: int) -> None:
        """Begins to; the seat is its order's."""
        seats = (f"seat of {order_id}",)
        purchase = Purchase(self.url, order_id, f"{order_id}-{key}", seats, amount_cents)
        assert self._orders.sell(purchase)

    def settle(self, sold: Collection[str], timeout_s: float) -> float:
        """Waits until nothing of these orders is owed, and Order Service is done with what came; at
        most so long. How long it took, in seconds."""
        began = time.monotonic()
        while self._is_owed(sold) and time.monotonic() < began + timeout_s:
            time.sleep(0.05)
        took_s = time.monotonic() - began
        idle_by = time.monotonic() + DECISION_S
        while self._is_at_work() and time.monotonic() < idle_by:
            time.sleep(0.1)
        return took_s

    def delays(self, sold: Collection[str]) -> Delays:
        """Of what the orders' payments with a SUCCESS were told."""
        return Delays.of(self._connection.execute(CALLED_BACK, [list(sold)]).fetchall())

    def book(self) -> dict[str, Booking]:
        return self._orders.book

    def broken(self) -> dict[str, int]:
        """How many orders are broken, in each way and in any."""
        found = broken_orders(self._connection, self.book())
        every = {order_id for order_ids in found.values() for order_id in order_ids}
        ways = {str(broken): len(order_ids) for broken, order_ids in sorted(found.items())}
        return {"broken": len(every)} | ways | {"repeated_early": len(self.repeated_early())}

    def repeated_early(self) -> list[str]:
        return repeated_early(self._orders.requests)

    def _is_owed(self, sold: Collection[str]) -> bool:
        if not is_followed(self._connection):
            return True
        return self._connection.execute(OWED, [list(sold)]).fetchone() != (0,)

    def _is_at_work(self) -> bool:
        requests = self._orders.requests
        return self._orders.selling > 0 or any(
            request.effect is None and request.fault is None for request in requests
        )
