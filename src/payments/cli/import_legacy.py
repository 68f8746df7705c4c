"""`payments import-legacy`: imports the payments of the Node service from its database."""

import asyncio
import re
import sys

import click

from payments.cli.exits import FINDINGS, one_is_a_finding
from payments.cli.output import one_line
from payments.cli.progress import Progress
from payments.cli.start import begin
from payments.commands.importing import LOCK_KEYS, TRY_LOCK, import_rows, take_over
from payments.commands.legacy_rows import NAME, Asked, Looked, check, look
from payments.database.connections import Database, DatabaseAddress, connect
from payments.errors import StartError
from payments.legacy import NO_GATEWAY
from payments.migrations import legacy_of, migrate
from payments.migrations.legacy import LegacyTable
from payments.money import amount_text
from payments.observability.metrics import Telemetry
from payments.opening import open_database
from payments.projections.callbacks import CallbacksProjection
from payments.projections.follower import Follower
from payments.projections.payments import PaymentsProjection
from payments.projections.seals import BATCH_MAX as SEALS_MAX
from payments.projections.seals import SealsProjection
from payments.settings import Settings

NOTHING = "there is no table payments of the Node service in {!r}: is this the right database?"


def _gateway(_: click.Context, __: click.Parameter, name: str) -> str:
    if not re.fullmatch("[a-z0-9][a-z0-9_-]{0,63}", name):
        raise click.BadParameter("must be a gateway's name: 1 to 64 of a-z, 0-9, _ and -")
    return name


@click.command("import-legacy")
@click.option(
    "--gateway",
    default=NO_GATEWAY,
    show_default=True,
    callback=_gateway,
    metavar="NAME",
    help="The provider that captured the payments of the Node service, by its name in "
    f"GATEWAY; then they can be refunded through this service. With {NO_GATEWAY} they "
    "cannot.",
)
@click.option(
    "--timezone",
    default="UTC",
    show_default=True,
    metavar="ZONE",
    help="Time zone of the times in the table, such as Asia/Kolkata.",
)
@click.option("--dry-run", is_flag=True, help="Only list the rows that cannot be imported.")
@click.option(
    "--leave-out-rows",
    is_flag=True,
    help="Import the other rows. The service does not know the rows that are left out: a "
    "charge with the idempotency key of such a row IS SENT TO THE PROVIDER AGAIN.",
)
@click.option(
    "--ignore-connections",
    is_flag=True,
    help="Start while other sessions are connected to the database. The Node service must not "
    "be one of them: it would write to the new table.",
)
def import_legacy(
    gateway: str, timezone: str, dry_run: bool, leave_out_rows: bool, ignore_connections: bool
) -> None:
    """Import the payments of the Node service, which used this database before, into the log.

    Its table payments becomes legacy_payments, and no service starts on the database until all
    rows are imported. After an interruption run it again; after completion it changes nothing.
    Exit code 1: some rows cannot be imported, and nothing was changed; 2: the import failed.
    """
    one_is_a_finding()
    settings = begin()
    asked = Asked(gateway=gateway, timezone=timezone, leaves_out=leave_out_rows)
    with open_database(settings, to="look") as address, connect(address, NAME) as lock:
        if lock.execute(TRY_LOCK, LOCK_KEYS).fetchone() != (True,):
            raise StartError("another import is running")
        where = legacy_of(lock)
        if where is LegacyTable.COMPLETE:
            click.echo("the payments of the Node service are already imported", err=True)
            return
        if where is LegacyTable.NONE:
            raise StartError(NOTHING.format(address))
        asyncio.run(check(address, asked))
        looked = _looked(address, asked, where, dry_run, ignore_connections)
        if dry_run or (looked.faulty and not leave_out_rows):
            _tell(looked)
            sys.exit(FINDINGS if looked.faulty else 0)
        _import(settings, address, asked, looked)
    _tell_pending(looked)


def _looked(
    address: DatabaseAddress,
    asked: Asked,
    where: LegacyTable,
    dry_run: bool,
    ignore_connections: bool,
) -> Looked:
    """Reads the table, and sets it aside unless `dry_run`, or faulty rows must not be left out."""
    if where is LegacyTable.OPEN or dry_run:
        set_aside = where is LegacyTable.OPEN
        return asyncio.run(look(address, asked.timezone, _tell_of, set_aside=set_aside))
    return asyncio.run(take_over(address, asked, _tell_of, despite_others=ignore_connections))


def _tell_of(row_id: str | None, reasons: list[str]) -> None:
    name = "without an id" if row_id is None else row_id
    click.echo(one_line(f"row {name}: {', '.join(reasons)}"))


def _tell(looked: Looked) -> None:
    count = f"{looked.rows:,} rows, {looked.faulty:,} of them cannot be imported"
    click.echo(f"{count}; nothing was changed")
    _tell_pending(looked)


def _import(settings: Settings, address: DatabaseAddress, asked: Asked, looked: Looked) -> None:
    migrate(address, importing=True)
    exclude = CallbacksProjection(()).exclude
    with Progress() as progress:

        def tell(done: int) -> None:
            progress("import", done, looked.rows - looked.faulty)

        count = asyncio.run(import_rows(address, asked, exclude, tell))
        asyncio.run(_catch_up(settings, address, progress))
    click.echo(f"imported: {count:,} rows of {looked.rows:,}")
    if looked.faulty:
        click.echo(f"left out: {looked.faulty:,} rows, which are only in legacy_payments")


async def _catch_up(settings: Settings, address: DatabaseAddress, progress: Progress) -> None:
    """Seals and projects the imported events before a service starts."""
    database, telemetry = Database(address, 1), Telemetry()
    listed, sealed = PaymentsProjection(settings.charge_deadline_s), SealsProjection()
    followers = (
        Follower(database.connect, listed, telemetry, listens=False),
        Follower(database.connect, sealed, telemetry, SEALS_MAX, listens=False),
    )
    done = 0

    async def follow(follower: Follower) -> None:
        nonlocal done
        try:
            while moved := await follower.run_once():
                done += moved
                progress("list and seal", done, None)
        finally:
            await follower.stop()

    await asyncio.gather(*(follow(follower) for follower in followers))


def _tell_pending(looked: Looked) -> None:
    """Reports payments that must be checked manually at the provider."""
    for row in looked.pending:
        amount = amount_text(int(row.amount_cents or 0), row.currency or "")
        began = f"{row.created_at or row.updated_at:%Y-%m-%dT%H:%M:%SZ}"
        text = f"{amount}, order {row.merchant_order_id}, since {began}"
        click.echo(
            f"PENDING, and not settled by this service: payment {row.payment_id} ({row.id}): {text}"
        )
