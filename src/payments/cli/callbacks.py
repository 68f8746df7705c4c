"""`payments callbacks`: what Order Service is owed and was told, and sending it again."""

import sys
from contextlib import suppress
from datetime import UTC, datetime
from typing import Any, TypeVar
from uuid import UUID

import click

from payments.callbacks.outbox import redrive as redrive_deliveries
from payments.cli.output import format_option, print_json, print_rows
from payments.cli.processes import begin, with_database
from payments.database import Database
from payments.errors import StartError
from payments.projections.callbacks import CallbacksProjection, backfill, begin_at_the_end
from payments.queries.callbacks import (
    Attempt,
    Delivery,
    attempts,
    dead_deliveries,
    dead_ids,
    deliveries_of_order,
    delivery,
    due_deliveries,
    ids_since,
    newest_deliveries,
    text_of,
)
from payments.service import open_database

LIMIT_MAX = 100_000
REDRIVE_ROWS = 500  # in one transaction
T = TypeVar("T")


def _time(_: click.Context, __: click.Parameter, value: str | None) -> datetime | None:
    """RFC 3339 with an offset."""
    if value is None:
        return None
    with suppress(ValueError):
        time = datetime.fromisoformat(value)
        if time.tzinfo is not None:
            return time.astimezone(UTC)
    raise click.BadParameter(f"{value!r} is not a time like 2026-01-31T18:30:00Z")


@click.group()
def callbacks() -> None:
    """What Order Service is owed and was told."""


@callbacks.command("list")
@click.option("--due", "state", flag_value="due", help="What is owed; the oldest first.")
@click.option("--dead", "state", flag_value="dead", help="What was given up.")
@click.option("--order", type=click.UUID, help="What concerns this order.")
@click.option(
    "--limit", type=click.IntRange(1, LIMIT_MAX), default=100, show_default=True, help="Rows."
)
@format_option
def list_callbacks(state: str | None, order: UUID | None, limit: int, form: str) -> None:
    """Print callbacks, the newest first unless said otherwise.

    STATE is due (owed and not delivered yet), delivered, dead (given up), superseded (a FAILED that
    is not sent, since its order has a SUCCESS), or excluded by ORDER_CALLBACK_STATUSES.
    """
    if state is not None and order is not None:
        raise click.UsageError("--order goes with neither --due nor --dead")

    async def read(database: Database) -> list[Delivery]:
        if order is not None:
            return await deliveries_of_order(database, order, limit)
        find = {"due": due_deliveries, "dead": dead_deliveries, None: newest_deliveries}[state]
        return await find(database, limit)

    with open_database(begin(), migrating=False) as address:
        print_rows(Delivery._fields, with_database(address, read), form)


@callbacks.command()
@click.argument("event_id", metavar="ID", type=click.UUID)
@format_option
def show(event_id: UUID, form: str) -> None:
    """Print one callback and all its attempts; ID is its event_id.

    As JSON it is one object, with `attempts_on_record`.
    """

    async def read(database: Database) -> tuple[Delivery | None, list[Attempt]]:
        return await delivery(database, event_id), await attempts(database, [event_id])

    with open_database(begin(), migrating=False) as address:
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
@click.option("--dead", is_flag=True, help="All that are dead.")
@click.option(
    "--since",
    metavar="TIME",
    callback=_time,
    help="All that were delivered or are dead and happened at this time (RFC 3339) or later.",
)
def redrive(event_id: UUID | None, dead: bool, since: datetime | None) -> None:
    """Make callbacks due again: one by its event_id, all dead ones, or all since a time.

    A running service sends them within seconds, each order's in order. What is superseded or
    excluded is never sent.
    """
    if (event_id is not None) + dead + (since is not None) != 1:
        raise click.UsageError("name one ID, or say --dead or --since TIME")

    async def run(database: Database) -> int:
        if event_id is not None:
            chosen = [event_id]
        else:
            chosen = await (dead_ids(database) if since is None else ids_since(database, since))
        connection = await database.connect("payments callbacks redrive")
        done = 0
        async with connection:
            for start in range(0, len(chosen), REDRIVE_ROWS):
                done += len(
                    await redrive_deliveries(connection, chosen[start : start + REDRIVE_ROWS])
                )
        return done

    with open_database(begin(), migrating=False) as address:
        done = with_database(address, run)
    if event_id is not None and not done:
        raise StartError(f"there is no callback {event_id}, or it is superseded or excluded")
    click.echo(f"due again: {done}", err=True)


@callbacks.command("backfill")
@click.option(
    "--from",
    "first",
    type=click.IntRange(1, 2**63 - 1),
    required=True,
    help="Position in the log of the first event to look at.",
)
def backfill_callbacks(first: int) -> None:
    """Enqueue callbacks for outcomes from before the first start with ORDER_CALLBACK_URL.

    What is enqueued already is left alone. What was delivered and pruned since
    (CALLBACK_RETENTION_DAYS) is sent again.
    """
    settings = begin()
    if settings.order_callback_url is None:
        raise StartError("ORDER_CALLBACK_URL is not set: nobody is called back")
    projection = CallbacksProjection(settings.order_callback_statuses)

    async def run(database: Database) -> Any:
        await begin_at_the_end(database)
        connection = await database.connect("payments callbacks backfill")
        async with connection:
            return await backfill(connection, projection, first)

    with open_database(settings, migrating=False) as address:
        done = with_database(address, run)
    click.echo(f"enqueued: {done.enqueued}", err=True)
    for position in done.unreadable:
        click.echo(f"not readable: the event at position {position}", err=True)
    sys.exit(1 if done.unreadable else 0)
