"""Which orders ended badly, checked from outside: the log, and the orders of Order Service.

Look when nothing is owed any more: an order whose SUCCESS is still to be delivered has no ticket.
"""

from collections import defaultdict
from collections.abc import Collection, Mapping
from typing import Any, Literal

import psycopg

from tests.doubles.order_bookings import Booking
from tests.invariants.callbacks import _outcomes
from tests.invariants.checker import LOG, _text

Broken = Literal[
    "paid_without_ticket",
    "ticket_without_payment",
    "seat_for_sale",  # it is confirmed, and a seat of it can be sold again or is another order's
    "paid_and_failed",
]


def broken_orders(
    connection: psycopg.Connection[Any], book: Mapping[str, Booking]
) -> dict[Broken, list[str]]:
    """The ids of the orders that are broken, in each way; an order may be so in several.

    An order is paid while it has a payment with a SUCCESS whose whole amount did not go back.
    """
    paid = _paid(connection)
    found: dict[Broken, list[str]] = defaultdict(list)
    for order_id in sorted(paid | book.keys()):
        for broken in _broken(order_id in paid, book.get(order_id)):
            found[broken].append(order_id)
    return dict(found)


def check_orders(
    connection: psycopg.Connection[Any],
    book: Mapping[str, Booking],
    but: Collection[str] = (),
) -> None:
    """Raises AssertionError with all broken orders; those of `but` may be so."""
    found = [
        f"order {order_id} is {broken}: {book.get(order_id)}"
        for broken, order_ids in broken_orders(connection, book).items()
        for order_id in order_ids
        if order_id not in but
    ]
    assert not found, _text(found)


def _broken(is_paid: bool, order: Booking | None) -> list[Broken]:
    tickets = order.tickets if order else []
    state = order.state if order else "PENDING"
    ways: dict[Broken, bool] = {
        "paid_without_ticket": is_paid and not tickets,
        "ticket_without_payment": bool(tickets) and not is_paid and state != "REFUNDED",
        "seat_for_sale": order is not None and state == "CONFIRMED" and bool(order.lost),
        "paid_and_failed": is_paid and state == "FAILED",
    }
    return [broken for broken, is_so in ways.items() if is_so]


def _paid(connection: psycopg.Connection[Any]) -> set[str]:
    """The ids of the orders that are."""
    orders, refunded = {}, set()
    for outcome in _outcomes(connection.execute(LOG)):
        if outcome.status == "SUCCESS":
            orders[outcome.payment_id] = str(outcome.order_id)
        elif outcome.status == "REFUNDED":
            refunded.add(outcome.payment_id)
    return {order_id for payment_id, order_id in orders.items() if payment_id not in refunded}
