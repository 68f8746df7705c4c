"""`payments export`: movements of money as CSV, for accounting."""

import sys
from datetime import UTC, datetime

import click

from payments.cli.moments import TIME
from payments.cli.output import csv_line
from payments.cli.start import begin
from payments.money import DECIMALS, decimal_text
from payments.opening import open_database
from payments.queries.log import Replay, Wanted
from payments.queries.movements import MOVEMENTS, Movement, UnreadableMovement, movements

COLUMNS = (
    *("time", "order", "payment", "kind", "amount", "currency"),
    *("provider_id", "refund", "client", "key"),
)


@click.command("export")
@click.option("--from", "first", type=TIME, required=True, help="Included.")
@click.option("--to", "last", type=TIME, required=True, help="Not included.")
def export_money(first: datetime, last: datetime) -> None:
    """Print a period's captures and refunds as CSV, one row for each.

    A row is a capture or refund that the provider carried out and that was recorded in the period;
    times are RFC 3339, like 2026-01-01T00:00:00Z. The column time is UTC; amount is a decimal of
    the currency, never negative: kind is the direction. Exit code 1: some events could not be read.
    """
    if first >= last:
        raise click.UsageError("--from must be before --to")
    out, unreadable = sys.stdout.buffer, 0
    with (
        open_database(begin(), to="read") as address,
        Replay(address, Wanted(types=MOVEMENTS, first=first, last=last)) as log,
    ):
        out.write(csv_line(COLUMNS))
        for part in movements(log):
            for found in part:
                if isinstance(found, UnreadableMovement):
                    unreadable += 1
                    click.echo(f"not readable: the event at position {found.position}", err=True)
                elif found.currency not in DECIMALS:  # from a newer version
                    unreadable += 1
                    text = f"of payment {found.payment_id}: the currency {found.currency!r}"
                    click.echo(f"not readable: {text} is not known", err=True)
                else:
                    out.write(csv_line(_cells(found)))
            out.flush()
    sys.exit(1 if unreadable else 0)


def _cells(found: Movement) -> list[str]:
    """The time has no zone and no fraction: a spreadsheet would treat it as text."""
    at = found.recorded_at
    return [
        f"{at.astimezone(UTC):%Y-%m-%d %H:%M:%S}" if at is not None else "",
        str(found.order_id),
        str(found.payment_id),
        found.kind,
        decimal_text(found.amount_cents, found.currency),
        found.currency,
        found.provider_id,
        "" if found.refund_id is None else str(found.refund_id),
        found.client or "",
        found.key or "",
    ]
