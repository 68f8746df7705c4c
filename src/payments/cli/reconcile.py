"""`payments reconcile`: compares captures with the records of others."""

import asyncio
import sys
from collections.abc import Callable, Iterable
from datetime import UTC, datetime

import click

from payments.cli.exits import FINDINGS, one_is_a_finding
from payments.cli.moments import TIME
from payments.cli.output import csv_line, print_rows
from payments.cli.progress import Progress
from payments.cli.start import begin
from payments.database.connections import Database, DatabaseAddress
from payments.errors import StartError
from payments.fulfilment.reconciliation import Found, Reconciliation
from payments.fulfilment.status import OrderStatus
from payments.opening import open_database
from payments.order_service.target import Target

CONNECTIONS = 4
SHOWN_MAX = 100_000  # rows of a table or JSON, which are printed at once; CSV has all
PER_S_MAX = 1000


@click.group()
def reconcile() -> None:
    """Compare captured payments with Order Service's records."""


@reconcile.command()
@click.option(
    "--since",
    metavar="TIME",
    type=TIME,
    help="Start of the period in which the payments began (RFC 3339).",
)
@click.option("--until", metavar="TIME", type=TIME, help="End of that period; now by default.")
@click.option(
    "--limit-per-second",
    "per_s",
    type=click.IntRange(1, PER_S_MAX),
    default=50,
    show_default=True,
    help="Status requests per second, at most.",
)
@click.option(
    "--format",
    "form",
    type=click.Choice(["table", "json", "csv"]),
    default="table",
    show_default=True,
)
def orders(since: datetime | None, until: datetime | None, per_s: int, form: str) -> None:
    """Request the status of each paid order from Order Service, and print the contradictions.

    KIND is unfulfilled (paid, but the order failed), paid_twice (this payment is not the first of a
    confirmed order), not_known (paid, but the order has another status, or none is known for the
    reason in PROBLEM), or unpaid (confirmed, but all its payments failed or were refunded). The
    paid ones are checked from then on: `payments callbacks list --unfulfilled`.

    Needs ORDER_STATUS_URL. Exit code 0: no findings. 1: findings. 2: the comparison failed.
    """
    one_is_a_finding()
    since, until = since or datetime.min.replace(tzinfo=UTC), until or datetime.now(UTC)
    if since >= until:
        raise click.UsageError("--since must be before --until")
    settings = begin()
    target = Target.of_order_status(settings)
    if target is None:
        raise StartError("ORDER_STATUS_URL is not set: the status of orders cannot be requested")
    from payments.service import build_order_status, check_status_target

    status = build_order_status(target)
    asyncio.run(check_status_target(target))
    shown: list[Found] = []

    def show(found: Found) -> None:
        if form == "csv":
            _write(found)
        elif len(shown) < SHOWN_MAX:
            shown.append(found)

    if form == "csv":
        _write(Found._fields)
    with open_database(settings, to="run") as address:
        count, asked = asyncio.run(_run(address, status, (since, until), per_s, show))
    if form != "csv":
        print_rows(Found._fields, shown, form)
    more = f", the first {SHOWN_MAX:,} of them shown" if count > len(shown) > 0 else ""
    click.echo(f"orders: {asked:,} checked; findings: {count:,}{more}", err=True)
    sys.exit(FINDINGS if count else 0)


async def _run(
    address: DatabaseAddress,
    status: OrderStatus,
    time: tuple[datetime, datetime],
    per_s: int,
    show: Callable[[Found], None],
) -> tuple[int, int]:
    async with Database(address, CONNECTIONS) as database:
        await status.open()
        try:
            with Progress() as progress:
                reconciliation = Reconciliation(
                    database, status, per_s, lambda asked: progress("orders", asked, None)
                )
                count = await reconciliation.run(*time, show)
            return count, reconciliation.asked
        finally:
            await status.close()


def _write(cells: Iterable[object]) -> None:
    sys.stdout.buffer.write(csv_line("" if cell is None else str(cell) for cell in cells))
