"""`payments callbacks`: lists callbacks, and sends them again."""

import asyncio
import sys
from datetime import datetime
from typing import Any, TypeVar
from uuid import UUID

import click

from payments.callbacks.outbox import redrive as redrive_deliveries
from payments.callbacks.ping import ping
from payments.cli.exits import FINDINGS, one_is_a_finding
from payments.cli.moments import TIME
from payments.cli.output import (
    format_option,
    list_format_option,
    one_line,
    print_json,
    print_rows,
    say_if_more,
)
from payments.cli.start import begin, with_database
from payments.cli.unfulfilled import print_unfulfilled
from payments.database.connections import Database
from payments.errors import StartError
from payments.opening import open_database
from payments.order_service.target import Target
from payments.projections.callbacks import CallbacksProjection, backfill, begin_at_the_end
from payments.queries.callbacks import (
    Attempt,
    Delivery,
    attempts,
    dead_deliveries,
    deliveries_of_order,
    delivery,
    due_deliveries,
    ids_in_state,
    ids_since,
    newest_deliveries,
    text_of,
)

LIMIT_MAX = 100_000
REDRIVE_ROWS = 500  # in one transaction
# The fields of a delivery that fit into 130 columns. JSON and CSV have all.
IN_THE_TABLE = ("event_id", "order_id", "status", "state", "attempts", "next_at", "last_attempt")
T = TypeVar("T")


@click.group()
def callbacks() -> None:
    """List, show, redrive and test callbacks to Order Service."""


@callbacks.command("list")
@click.option("--due", is_flag=True, help="Callbacks that are due, the longest due first.")
@click.option("--dead", is_flag=True, help="Dead callbacks, the oldest first.")
@click.option(
    "--unfulfilled",
    is_flag=True,
    help="Payments whose order may not have been fulfilled, the oldest first.",
)
@click.option("--given-back", is_flag=True, help="Payments that the service gave back by itself.")
@click.option("--order", metavar="ID", type=click.UUID, help="Only of this order.")
@click.option(
    "--limit", type=click.IntRange(1, LIMIT_MAX), default=100, show_default=True, help="Rows."
)
@list_format_option
def list_callbacks(
    due: bool,
    dead: bool,
    unfulfilled: bool,
    given_back: bool,
    order: UUID | None,
    limit: int,
    form: str,
) -> None:
    """Print callbacks, the newest first by default.

    STATE is due (not delivered yet), delivered, dead (all attempts failed, or the response was
    410), superseded (a FAILED or REFUNDED that is not sent, since its order is paid), or excluded
    (ORDER_CALLBACK_STATUSES does not include it, or it is the REFUNDED of a payment that the
    service gave back by itself). NEXT_AT is the time of the order's next attempt; while a callback
    is being sent, the end of its lease.

    --unfulfilled, optionally with --order, prints payments: STATE is then suspect (the order's
    status is not known), unfulfilled (the order failed), or paid_twice; docs/order-service.md
    describes the remedies. With --given-back STATE is given_back.
    """
    of_payments = unfulfilled or given_back
    if due + dead + unfulfilled + given_back + (order is not None and not of_payments) > 1:
        raise click.UsageError(
            "use one of --due, --dead, --order, --unfulfilled and --given-back; only the last "
            "two can be combined with --order"
        )
    if of_payments:
        print_unfulfilled(given_back=given_back, order_id=order, limit=limit, form=form)
        return

    async def read(database: Database) -> list[Delivery]:
        if order is not None:
            return await deliveries_of_order(database, order, limit + 1)
        find = due_deliveries if due else dead_deliveries if dead else newest_deliveries
        return await find(database, limit + 1)

    with open_database(begin(), to="read") as address:
        found = with_database(address, read)
    shown = found[:limit]
    if form == "table":
        cells = ([getattr(each, column) for column in IN_THE_TABLE] for each in shown)
        print_rows(IN_THE_TABLE, cells, form)
    else:
        print_rows(Delivery._fields, shown, form)
    say_if_more(found, limit)


@callbacks.command()
@click.argument("event_id", metavar="ID", type=click.UUID)
@format_option
def show(event_id: UUID, form: str) -> None:
    """Print one callback and all its attempts; ID is its event_id.

    As JSON it is one object, with the attempts in `attempts_on_record`.
    """

    async def read(database: Database) -> tuple[Delivery | None, list[Attempt]]:
        return await delivery(database, event_id), await attempts(database, [event_id])

    with open_database(begin(), to="read") as address:
        found, made = with_database(address, read)
    if found is None:
        raise StartError(f"there is no callback {event_id}")
    columns = [field for field in Attempt._fields if field != "event_id"]
    rows = [(*attempt[1:-1], text_of(attempt.answer)) for attempt in made]
    if form == "json":
        shown = [dict(zip(columns, row, strict=True)) for row in rows]
        print_json(found._asdict() | {"attempts_on_record": shown})
        return
    print_rows(("field", "value"), found._asdict().items(), form)
    click.echo()
    print_rows(columns, rows, form)


@callbacks.command()
@click.argument("event_id", metavar="[ID]", type=click.UUID, required=False)
@click.option("--dead", is_flag=True, help="All dead callbacks.")
@click.option(
    "--due", is_flag=True, help="All due callbacks: retry now instead of at their scheduled time."
)
@click.option(
    "--since",
    metavar="TIME",
    type=TIME,
    help="All outcomes from this time (RFC 3339) on, delivered ones included, except FAILED.",
)
@click.option("--with-failed", is_flag=True, help="With --since: FAILED outcomes too.")
def redrive(
    event_id: UUID | None, dead: bool, due: bool, since: datetime | None, with_failed: bool
) -> None:
    """Redrive callbacks: one by its event_id, or all that are dead, due, or since a time.

    The callbacks become due at once, with all their attempts again. A running service sends them
    within seconds, those of an order in order. A single ID does not wait for dead callbacks of its
    order, but does wait for a callback that Order Service may still be processing. A superseded or
    excluded callback, or a FAILED or REFUNDED whose order is paid, is never sent.

    For many receivers a second FAILED reverts what the order has become since: --since leaves out
    FAILED outcomes unless --with-failed is given.
    """
    if (event_id is not None) + dead + due + (since is not None) != 1:
        raise click.UsageError("give one ID, or one of --dead, --due and --since TIME")
    if with_failed and since is None:
        raise click.UsageError("--with-failed requires --since")

    async def run(database: Database) -> int:
        connection = await database.connect("payments callbacks redrive")
        done = 0
        async with connection:
            await connection.execute("SET statement_timeout = 0")
            if event_id is not None:
                chosen = [event_id]
            elif since is not None:
                chosen = await ids_since(connection, since, failed=with_failed)
            else:
                chosen = await ids_in_state(connection, "dead" if dead else "due")
            for start in range(0, len(chosen), REDRIVE_ROWS):
                done += len(
                    await redrive_deliveries(connection, chosen[start : start + REDRIVE_ROWS])
                )
        return done

    with open_database(begin(), to="run") as address:
        done = with_database(address, run)
    if event_id is not None and not done:
        raise StartError(
            f"there is no callback {event_id}, or it is superseded or excluded, or a FAILED or "
            "REFUNDED whose order is paid"
        )
    click.echo(f"due again: {done}")


@callbacks.command("backfill")
@click.option(
    "--from",
    "first",
    type=click.IntRange(1, 2**63 - 1),
    required=True,
    help="Position in the log of the first event to read.",
)
def backfill_callbacks(first: int) -> None:
    """Enqueue callbacks for outcomes from before the first start with ORDER_CALLBACK_URL.

    Callbacks that are already enqueued are not changed. Delivered callbacks that were pruned since
    (CALLBACK_RETENTION_DAYS) are sent a second time. Exit code 1: some events could not be read.
    """
    settings = begin()
    if settings.order_callback_url is None:
        raise StartError("ORDER_CALLBACK_URL is not set: no callbacks are sent")
    projection = CallbacksProjection(settings.order_callback_statuses)

    async def run(database: Database) -> Any:
        await begin_at_the_end(database)
        connection = await database.connect("payments callbacks backfill")
        async with connection:
            return await backfill(connection, projection, first)

    with open_database(settings, to="run") as address:
        done = with_database(address, run)
    click.echo(f"enqueued: {done.enqueued}")
    for position in done.unreadable:
        click.echo(f"not readable: the event at position {position}", err=True)
    sys.exit(1 if done.unreadable else 0)


@callbacks.command("test")
def test_endpoint() -> None:
    """Send a ping to ORDER_CALLBACK_URL, signed like a callback, and print the response.

    Its body has the `type` "ping" and no order. Exit code 0: the response was 2xx. 1: it was
    another status. 2: there was no response, or the ping could not be sent.
    """
    one_is_a_finding()
    settings = begin()
    target = Target.of_callbacks(settings)
    if target is None:
        raise StartError("ORDER_CALLBACK_URL is not set: no callbacks are sent")
    from payments.service import build_endpoint  # which the other commands do without

    exchange = asyncio.run(ping(build_endpoint(settings, target)))
    to = target.url.origin
    if exchange.status is None:
        sent = "it was sent" if exchange.sent else "nothing was sent"
        raise StartError(f"{to} gave no response: {exchange.reason}; {sent}")
    click.echo(f"{to} responded {exchange.status} after {exchange.seconds:.3f} s; {target.signed}")
    if answer := text_of(exchange.answer):
        click.echo(one_line(answer))
    sys.exit(0 if 200 <= exchange.status < 300 else FINDINGS)
