"""`payments log`: manual decisions about the log."""

import click

from payments.cli.audit import heads_option
from payments.cli.output import one_line
from payments.cli.start import begin, with_database
from payments.database.connections import Database
from payments.errors import StartError
from payments.events import losses
from payments.events.losses import OpenLoss
from payments.events.watch import Seal, find_loss
from payments.opening import heads_dir, open_database

TOLD_MAX = 500  # characters


def one_line_of_text(_: click.Context, __: click.Parameter, value: str) -> str:
    """Validates an option whose value is stored for operators to read."""
    if not value.strip() or not value.isprintable() or len(value) > TOLD_MAX:
        raise click.BadParameter(f"must be one line of 1 to {TOLD_MAX} printable characters")
    return value.strip()


@click.group("log")
def log_group() -> None:
    """Accept that the log lost events."""


@log_group.command("accept-loss")
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
    help="What happened, kept on record.",
)
@heads_option
def accept_loss(by: str, reason: str, heads: dict[int, bytes]) -> None:
    """Accept that the log lost events in a failover or a restore: refunds are made again.

    First compare the captures and refunds since then with the provider (docs/backup.md). The log
    is compared with the newest seal in PAYMENTS_DATA_DIR and with --head; the findings of running
    processes are already on record. Operator, reason and loss are kept in the table log_losses, and
    `payments audit verify` prints them. Exit code 1: nothing is lost.
    """
    settings = begin()
    known = [Seal(position, hash) for position, hash in heads.items()]

    async def accept(database: Database) -> tuple[OpenLoss, int, bytes | None]:
        await find_loss(database, heads_dir(settings), known)
        loss = await losses.open_loss(database)
        if loss is None:
            raise StartError(
                "nothing is lost: the log has all events that were acknowledged or kept"
            )
        head = await losses.add(
            database.fetch,
            "accepted",
            by,
            reason,
            kept_position=loss.kept_position,
            lost_position=loss.lost_position,
            lost_hash=loss.lost_hash,
            last_found=loss.id,
        )
        if head is None:
            raise StartError("another loss was found meanwhile: check again with `payments doctor`")
        return loss, *head

    with open_database(settings, to="run") as address:
        loss, position, hash = with_database(address, accept)
    click.echo(f"found: {loss.found_at:%Y-%m-%dT%H:%M:%SZ} by {one_line(loss.found_by)}")
    click.echo(f"kept: at least up to position {loss.kept_position}")
    click.echo(f"old head: {_head(loss.lost_position, loss.lost_hash)}")
    click.echo(f"new head: {_head(position, hash)}")
    click.echo("accepted: refunds continue within a second", err=True)


def _head(position: int, hash: bytes | None) -> str:
    return f"{position}:{hash.hex()}" if hash is not None else f"{position}, not sealed"
