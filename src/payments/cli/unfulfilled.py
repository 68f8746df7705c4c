"""`payments callbacks list --unfulfilled`: payments whose order may not be fulfilled."""

from uuid import UUID

import click
import msgspec

from payments.cli.output import print_rows, say_if_more
from payments.cli.start import begin, with_database
from payments.database.connections import Database
from payments.money import amount_text
from payments.opening import open_database
from payments.queries.fulfilments import (
    COUNTED_MAX,
    OPEN_STATES,
    State,
    Unfulfilled,
    counts,
    unfulfilled,
)

# `amount` includes the currency. JSON and CSV have all fields.
IN_THE_TABLE = ("payment_id", "order_id", "state", "amount", "said", "order_status", "problem")


def print_unfulfilled(*, given_back: bool, order_id: UUID | None, limit: int, form: str) -> None:
    """Prints the open ones, or those that the service gave back, oldest first."""
    settings = begin()
    states: tuple[State, ...] = ("given_back",) if given_back else OPEN_STATES

    async def read(database: Database) -> tuple[list[Unfulfilled], int]:
        found = await unfulfilled(database, states, limit + 1, order_id)
        return found, (await counts(database))["silent"].payments

    with open_database(settings, to="read") as address:
        found, silent = with_database(address, read)
    shown = found[:limit]
    if form == "table":
        print_rows(IN_THE_TABLE, map(_cells, shown), form)
    else:
        print_rows(Unfulfilled.__struct_fields__, map(msgspec.structs.astuple, shown), form)
    say_if_more(found, limit)
    if silent and not given_back:
        click.echo(_of_silent(silent, asks=settings.order_status_url is not None), err=True)


def _cells(found: Unfulfilled) -> list[object]:
    amount = amount_text(found.amount_cents, found.currency)
    return [amount if name == "amount" else getattr(found, name) for name in IN_THE_TABLE]


def _of_silent(count: int, *, asks: bool) -> str:
    more = " or more" if count == COUNTED_MAX else ""
    text = f"not listed: {count}{more} payments whose order status is not known, since the "
    text += "response to their callback did not contain it"
    if asks:
        return f"{text}; the process that sends callbacks requests it from ORDER_STATUS_URL"
    return f"{text}: set ORDER_STATUS_URL to find out: docs/order-service.md"
