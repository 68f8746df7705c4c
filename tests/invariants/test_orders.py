"""The checker of orders itself: it passes what is right, and finds each kind of wrong."""

import uuid
from collections.abc import Callable
from typing import Any

import psycopg
import pytest

from tests.doubles.order_bookings import Booking
from tests.invariants.orders import Broken, broken_orders, check_orders
from tests.support import History, append

ORDER = uuid.UUID(int=1, version=4)
ID = str(ORDER)
SEATS = ("A1", "A2")

Payments = Callable[[str], History]


def paid(key: str) -> History:
    return History(key, order_id=ORDER).charged()


def declined(key: str) -> History:
    return History(key, order_id=ORDER).declined()


def refunded(key: str) -> History:
    return paid(key).refunded()


def partly_refunded(key: str) -> History:
    return paid(key).refunded("a part", 500)


def order(state: Any, tickets: int = 0, *lost: str) -> Booking:
    return Booking(ID, SEATS, state, ["a payment"] * tickets, lost=lost)


@pytest.mark.parametrize(
    ("payments", "booked", "broken"),
    [
        ([paid], order("CONFIRMED", 1), []),
        ([partly_refunded], order("CONFIRMED", 1), []),
        ([refunded, paid], order("CONFIRMED", 1), []),
        ([declined], order("FAILED", 0, *SEATS), []),
        ([refunded], order("REFUNDED", 1, *SEATS), []),
        ([refunded], order("FAILED", 0, *SEATS), []),
        ([], order("PENDING"), []),
        ([paid], order("PENDING"), ["paid_without_ticket"]),
        ([paid], None, ["paid_without_ticket"]),
        ([paid], order("FAILED", 0, *SEATS), ["paid_and_failed", "paid_without_ticket"]),
        ([paid], order("FAILED", 1, *SEATS), ["paid_and_failed"]),
        ([paid], order("CONFIRMED", 1, "A2"), ["seat_for_sale"]),
        ([declined], order("CONFIRMED", 1), ["ticket_without_payment"]),
        ([refunded], order("CONFIRMED", 1), ["ticket_without_payment"]),
    ],
)
def test_an_order_is_broken_in_these_ways(
    connection: psycopg.Connection[Any],
    payments: list[Payments],
    booked: Booking | None,
    broken: list[Broken],
) -> None:
    for number, made in enumerate(payments):
        append(connection, made(str(number)).facts)
    book = {} if booked is None else {ID: booked}
    assert broken_orders(connection, book) == {each: [ID] for each in broken}
    check_orders(connection, book, but=[ID])
    if broken:
        with pytest.raises(AssertionError, match=f"order {ID} is {broken[0]}"):
            check_orders(connection, book)
