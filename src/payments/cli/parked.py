"""`payments parked`: streams that a follower skips."""

import asyncio
import sys
from typing import TYPE_CHECKING
from uuid import UUID

import click

from payments.cli.output import format_option, one_line, print_rows
from payments.cli.start import begin, with_database
from payments.database.connections import Database, DatabaseAddress
from payments.opening import open_database
from payments.queries.followers import ParkedStream, parked_streams
from payments.settings import Settings

if TYPE_CHECKING:
    from payments.projections.parking import Parked


@click.group()
def parked() -> None:
    """Payments that a read model skips, since one of their events could not be applied."""


@parked.command("list")
@format_option
def list_parked(form: str) -> None:
    "Print the parked payments and the reasons."

    with open_database(begin(), to="read") as address:
        print_rows(ParkedStream._fields, with_database(address, parked_streams), form)


@parked.command()
@click.argument("payments", nargs=-1, type=click.UUID)
@click.option("--all", "every", is_flag=True, help="Retry every parked payment.")
def retry(payments: tuple[UUID, ...], every: bool) -> None:
    "Apply the missed events of parked payments; exit code 1 if one of them stays parked."
    if bool(payments) == every:
        raise click.UsageError("give the PAYMENTS to retry, or --all")
    settings = begin()
    with open_database(settings, to="run") as address:
        unknown, left = asyncio.run(_retry(settings, address, payments or None))
    for payment_id in unknown:
        click.echo(f"not parked: {payment_id}", err=True)
    for stream in left:
        click.echo(f"still parked: {stream.payment_id}: {one_line(stream.reason)}", err=True)
    sys.exit(1 if left or unknown else 0)


async def _retry(
    settings: Settings, address: DatabaseAddress, payments: tuple[UUID, ...] | None
) -> "tuple[list[UUID], list[Parked]]":
    """Returns which of the payments are not parked, and which streams still are."""
    from payments.gateways.building import build_gateways
    from payments.gateways.chosen import Gateways
    from payments.observability.metrics import Telemetry
    from payments.service import build_followers  # the list does not need it

    unknown, left = set(payments or ()), []
    turning_s = Gateways(build_gateways(settings, to="look")).declines_may_turn_s()
    for follower in build_followers(
        settings, Database(address, 1), Telemetry(), declines_may_turn_s=turning_s
    ):
        try:
            unknown -= {stream.payment_id for stream in await follower.parked()}
            left += await follower.retry_parked(payments)
        finally:
            await follower.close()
    return [payment_id for payment_id in payments or () if payment_id in unknown], left
