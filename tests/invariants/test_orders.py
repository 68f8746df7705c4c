"""The checker of orders itself: it passes what is right, and finds each kind of wrong."""

import uuid
from collections.abc import Callable
from typing import Any

import psycopg
import pytest

from tests.doubles.order_bookings import Booking
from tests.invariants.checker import InvariantBroken
from tests.invariants.orders import (
    Broken,
    Misjudged,
    broken_orders,
    check_fulfilments,
    check_orders,
    misjudged,
)
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
        with pytest.raises(InvariantBroken, match=f"order {ID} is {broken[0]}"):
            check_orders(connection, book)


def asked(state: str, said: str = "failed") -> tuple[str, str, bool]:
    """A row in fulfilments whose order was asked for."""
    return state, said, True


def silent(said: str = "nothing") -> tuple[str, str, bool]:
    return "suspect", said, False


Rows = list[tuple[str, str, bool] | None]


@pytest.mark.parametrize(
    ("payments", "booked", "rows", "ways"),
    [
        ([paid], order("CONFIRMED", 1), [None], [None]),
        ([paid, paid], order("CONFIRMED", 1), [None, asked("paid_twice")], [None, None]),
        ([partly_refunded], order("FAILED"), [asked("unfulfilled")], [None]),
        ([refunded], order("FAILED"), [None], [None]),
        ([refunded], order("FAILED"), [asked("given_back")], [None]),
        ([refunded], order("FAILED"), [asked("unfulfilled")], [None]),  # as it is not shown
        ([refunded, paid], order("CONFIRMED", 1), [None, None], [None, None]),
        ([declined], order("FAILED"), [None], [None]),
        ([paid], order("PENDING"), [asked("suspect", "nothing")], [None]),
        ([paid], None, [asked("suspect")], [None]),
        ([paid], order("FAILED"), [None], ["not_found"]),
        ([partly_refunded], order("FAILED"), [None], ["not_found"]),
        ([paid], order("FAILED"), [silent()], ["not_found"]),
        ([paid], order("FAILED"), [silent("repeated")], ["not_found"]),
        ([paid], order("PENDING"), [silent()], ["not_found"]),
        ([paid], None, [None], ["not_found"]),
        ([paid, paid], order("CONFIRMED", 1), [None, None], [None, "not_found"]),
        ([paid], order("FAILED"), [asked("suspect")], ["wrong_state"]),
        ([paid], order("FAILED"), [asked("paid_twice")], ["wrong_state"]),
        (
            [paid, paid],
            order("CONFIRMED", 1),
            [None, asked("unfulfilled")],
            [None, "wrong_state"],
        ),
        ([paid], order("CONFIRMED", 1), [asked("suspect")], ["fulfilled"]),
        ([paid], order("CONFIRMED", 1), [silent()], ["fulfilled"]),
        (
            [paid, paid],
            order("CONFIRMED", 1),
            [asked("paid_twice"), asked("paid_twice")],
            ["fulfilled", None],
        ),
        ([paid], order("FAILED"), [asked("given_back")], ["kept"]),
        ([paid], order("CONFIRMED", 1), [asked("given_back")], ["kept"]),
    ],
)
def test_a_payment_is_misjudged_in_these_ways(
    connection: psycopg.Connection[Any],
    payments: list[Payments],
    booked: Booking | None,
    rows: Rows,
    ways: list[Misjudged | None],
) -> None:
    found: dict[Misjudged, list[str]] = {}
    for number, (made, row, way) in enumerate(zip(payments, rows, ways, strict=True)):
        history = made(str(number))
        append(connection, history.facts)
        if row is not None:
            connection.execute(
                "INSERT INTO fulfilments (payment_id, order_id, state, said, checked_at)"
                " VALUES (%s, %s, %s, %s, CASE WHEN %s THEN now() END)",
                [history.id, ORDER, *row],
            )
        if way is not None:
            found.setdefault(way, []).append(str(history.id))
    book = {} if booked is None else {ID: booked}
    assert misjudged(connection, book) == found
    wrong = [payment_id for payment_ids in found.values() for payment_id in payment_ids]
    check_fulfilments(connection, book, but=wrong)
    if wrong:
        with pytest.raises(InvariantBroken, match=f"payment {wrong[0]} is misjudged"):
            check_fulfilments(connection, book)
