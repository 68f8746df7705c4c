"""`payments giving-back`: payments that the service gives back by itself."""

import click

from payments import brake
from payments.cli.log import one_line_of_text
from payments.cli.start import begin, with_database
from payments.errors import StartError
from payments.opening import open_database


@click.group("giving-back")
def giving_back() -> None:
    """Resume automatic refunds after their limit was reached."""


@giving_back.command()
@click.option(
    "--by",
    required=True,
    callback=one_line_of_text,
    metavar="NAME",
    help="Name of the operator, kept on record.",
)
@click.option(
    "--reason",
    required=True,
    callback=one_line_of_text,
    metavar="TEXT",
    help="Reason for resuming, kept on record.",
)
def resume(by: str, reason: str) -> None:
    """Resume automatic refunds after they stopped at their limit; print why they stopped.

    First check whether those orders really failed: with ORDER_STATUS_URL, and at Order Service
    (docs/operations.md). Earlier refunds no longer count towards the limit. Operator and reason are
    kept in the table giving_back_stopped. Exit code 1: automatic refunds had not stopped.
    """
    with open_database(begin(), to="run") as address:
        stop = with_database(address, lambda database: brake.lift(database, by, reason))
    if stop is None:
        raise StartError(
            "automatic refunds have not stopped; UNFULFILLED says whether they are enabled"
        )
    click.echo(f"stopped: {stop.stopped_at:%Y-%m-%dT%H:%M:%SZ}")
    click.echo(f"why: {stop.reason}")
    click.echo("resumed: the orders that were held back are checked within an hour", err=True)
