"""`payments giving-back`: payments that the service gives back by itself."""

import click

from payments import brake
from payments.cli.log import one_line_of_text
from payments.cli.start import begin, with_database
from payments.errors import StartError
from payments.opening import open_database


@click.group("giving-back")
def giving_back() -> None:
    """Payments that the service gives back by itself, since their orders failed."""


@giving_back.command()
@click.option(
    "--by", required=True, callback=one_line_of_text, metavar="NAME", help="Who lets it go on."
)
@click.option(
    "--reason", required=True, callback=one_line_of_text, metavar="TEXT", help="What it was."
)
def resume(by: str, reason: str) -> None:
    """Let it go on after it has stopped, since it had given back too much; print why it had.

    Before that, look whether those orders really failed: what ORDER_STATUS_URL shows of them, and
    what Order Service says (docs/operations.md). What was given back so far counts no more. Who let
    it go on, and why, stays in the table giving_back_stopped. Exit code 1: it had not stopped.
    """
    with open_database(begin(), to="run") as address:
        stop = with_database(address, lambda database: brake.lift(database, by, reason))
    if stop is None:
        raise StartError("it has not stopped; whether it gives back at all, UNFULFILLED says")
    click.echo(f"stopped: {stop.stopped_at:%Y-%m-%dT%H:%M:%SZ}")
    click.echo(f"why: {stop.reason}")
    click.echo("goes on: what was held back is asked about within an hour", err=True)
