"""`payments rebuild`: corrects a read model from the log."""

import sys
from typing import Literal

import click

from payments.cli.exits import FINDINGS, one_is_a_finding
from payments.cli.output import one_line, print_rows
from payments.cli.progress import Progress
from payments.cli.start import begin
from payments.migrations import restore_shape
from payments.opening import open_database
from payments.projections.comparison import Difference, Totals, Unreadable
from payments.projections.rebuild import Rebuilt, check, rebuild

SHOWN_MAX = 20  # differing rows that are shown; all are counted


@click.command("rebuild")
@click.option(
    "--projection",
    type=click.Choice(["payments"]),
    default="payments",
    show_default=True,
    help="The read model: the tables payments, refunds, payment_clients, unsettled_payments.",
)
@click.option(
    "--dry-run",
    is_flag=True,
    help="Only compare; exit code 1 if anything differs, 2 if the comparison failed.",
)
def rebuild_read_model(projection: str, dry_run: bool) -> None:
    """Compare a read model with the log, and replace the rows that differ.

    The service may run meanwhile: its requests neither wait nor fail. Replaced rows are kept in the
    table replaced_rows. No callbacks are sent and no gateway is called. Exit code 1: the events of
    some payments cannot be read, or the rebuild failed. With --dry-run, 1 means that something
    differs or cannot be read, and 2 that the comparison failed.
    """
    if dry_run:
        one_is_a_finding()
    settings = begin()
    shown = 0

    def show(found: Difference | Unreadable) -> None:
        nonlocal shown
        shown += 1
        if shown <= SHOWN_MAX:
            click.echo(one_line(str(found)))
        elif shown == SHOWN_MAX + 1:
            click.echo("more rows differ; all are counted below")

    to: Literal["read", "run"] = "read" if dry_run else "run"
    with open_database(settings, to=to) as address, Progress() as progress:
        if dry_run:
            done = check(address, show, progress)
        else:
            restore_shape(address)
            done = rebuild(address, settings.charge_deadline_s, show, progress)
    _tell(done, dry_run)
    differing = sum(done.differing.values())
    sys.exit(FINDINGS if done.unreadable or (dry_run and differing) else 0)


def _tell(done: Rebuilt, dry_run: bool) -> None:
    click.echo(f"compared: {done.payments:,} payments with the log, up to position {done.position}")
    what = "differ" if dry_run else "written"
    for table, rows in done.differing.items():
        click.echo(f"{what}: {rows:,} rows of {table}")
    if not dry_run:
        click.echo(f"replaced: {done.replaced:,} rows, kept in replaced_rows")
    if done.parked:
        click.echo(f"parked, not changed: {done.parked:,} payments: `payments parked list`")
    if done.unreadable:
        click.echo(f"not readable, not changed: {len(done.unreadable):,} payments")
    click.echo()
    print_rows(
        ("table", "status", "currency", "log", "log_cents", "in_table", "in_table_cents"),
        _side_by_side(done.log, done.tables),
        "table",
    )


def _side_by_side(log: Totals, tables: Totals) -> list[tuple[object, ...]]:
    return [
        (*kind, *log.get(kind, (0, 0)), *tables.get(kind, (0, 0)))
        for kind in sorted(log.keys() | tables.keys())
    ]
