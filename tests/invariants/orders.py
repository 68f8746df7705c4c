"""Which orders ended badly, checked from outside: the log, and the orders of Order Service.

Look when nothing is owed any more: an order whose SUCCESS is still to be delivered has no ticket.

Whether the service found each of them that is paid and not fulfilled: `misjudged`.
"""

from collections import defaultdict
from collections.abc import Collection, Mapping
from typing import Any, Literal

import psycopg

from tests.doubles.order_bookings import Booking
from tests.invariants.callbacks import _outcomes
from tests.invariants.checker import LOG, expect_none

Broken = Literal[
    "paid_without_ticket",
    "ticket_without_payment",
    "seat_for_sale",  # it is confirmed, and a seat of it can be sold again or is another order's
    "paid_and_failed",
]


Misjudged = Literal[
    "not_found",  # its order does not show it as fulfilled, and it is not among what is shown
    "wrong_state",  # it is shown as something else than it is
    "fulfilled",  # it is, and there is a row all the same
    "kept",  # it is shown as given back, and its money is not
]
# What is shown: a suspect that nobody asked about, and that nothing was said of, is not.
ROWS = """
SELECT payment_id, state, state = 'suspect' AND said IN ('nothing', 'repeated')
       AND checked_at IS NULL
  FROM fulfilments
"""


def misjudged(
    connection: psycopg.Connection[Any], book: Mapping[str, Booking]
) -> dict[Misjudged, list[str]]:
    """The ids of the payments that `fulfilments` does not tell as they are, in each way.

    Every payment that is captured and was not given back as a whole is judged by its order: the
    first of a CONFIRMED order is fulfilled, the others are paid_twice; of a FAILED order they are
    unfulfilled; of another one, or of one that Order Service does not know, suspect. It holds with
    ORDER_STATUS_URL, when everything was asked for after the last change of an order.
    """
    rows = {str(id): (state, silent) for id, state, silent in connection.execute(ROWS)}
    found: dict[Misjudged, list[str]] = defaultdict(list)
    for order_id, payment_ids in _standing(connection).items():
        order = book.get(order_id)
        for number, payment_id in enumerate(payment_ids):
            state, is_silent = rows.get(payment_id, (None, False))
            way = _misjudged(_due_state(order, number), state, is_silent=is_silent)
            if way is not None:
                found[way].append(payment_id)
    return dict(found)


def check_fulfilments(
    connection: psycopg.Connection[Any], book: Mapping[str, Booking], but: Collection[str] = ()
) -> None:
    """Raises AssertionError with all payments that are misjudged; those of `but` may be so."""
    found = [
        f"payment {payment_id} is misjudged: {way}"
        for way, payment_ids in misjudged(connection, book).items()
        for payment_id in payment_ids
        if payment_id not in but
    ]
    expect_none(found)


def _due_state(order: Booking | None, number: int) -> str | None:
    """Of the order's payment of this number, by their captures; None for a fulfilled one."""
    state = order.state if order else "PENDING"
    if state == "CONFIRMED":
        return "paid_twice" if number else None
    return "unfulfilled" if state == "FAILED" else "suspect"


def _misjudged(due: str | None, state: str | None, *, is_silent: bool) -> Misjudged | None:
    if state == due and not is_silent:
        return None
    if state == "given_back":
        return "kept"
    if due is None:
        return "fulfilled"
    return "not_found" if state is None or is_silent else "wrong_state"


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
    expect_none(found)


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
    return set(_standing(connection))


def _standing(connection: psycopg.Connection[Any]) -> dict[str, list[str]]:
    """The ids of the payments whose money was not given back as a whole, by the ids of their
    orders, in the order of their captures."""
    captured, refunded = {}, set()
    for outcome in _outcomes(connection.execute(LOG)):
        if outcome.status == "SUCCESS":
            captured[outcome.payment_id] = str(outcome.order_id)
        elif outcome.status == "REFUNDED":
            refunded.add(outcome.payment_id)
    found: dict[str, list[str]] = defaultdict(list)
    for payment_id, order_id in captured.items():
        if payment_id not in refunded:
            found[order_id].append(str(payment_id))
    return dict(found)
