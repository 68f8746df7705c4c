"""`payments audit`: verifies the log and the read model."""

import re
import sys
from collections.abc import Iterable, Iterator
from typing import Any, BinaryIO
from uuid import UUID

import click

from payments.cli.exits import FINDINGS, one_is_a_finding
from payments.cli.output import one_line
from payments.cli.progress import Progress
from payments.cli.start import begin, with_database
from payments.database.connections import Database
from payments.errors import StartError
from payments.events.losses import log_id
from payments.opening import open_database
from payments.projections.comparison import Comparison, Difference, Unreadable
from payments.projections.parked import needlessly_parked
from payments.queries.guards import broken_guards
from payments.queries.verification import (
    Finding,
    Head,
    LogPlace,
    NoExport,
    Verification,
    accepted_losses,
    another_log,
    ends_of,
    log_id_in,
    missing_seals,
    newest_head,
    open_losses,
    places_in,
    places_of,
    shared_captures,
)
from payments.snapshot import Reader

SHOWN_MAX = 100  # findings of each kind; all are counted
PROGRESS_EVERY = 10_000  # events
NAME = "payments audit"


@click.group()
def audit() -> None:
    """Check the log against its seals, and the read model against the log."""


@audit.command("head")
def print_head() -> None:
    """Print the newest sealed position and its hash, POSITION:HASH; on stderr, the log's id.

    Keep both outside the database, where its users cannot write: `payments audit verify` with
    --head and --log later proves that nothing up to that position was altered since.
    """

    async def read(database: Database) -> tuple[Head | None, UUID | None]:
        return await newest_head(database), await log_id(database)

    with open_database(begin(), to="read") as address:
        head, id = with_database(address, read)
    if head is None:
        raise StartError("nothing is sealed yet: `payments serve` and `payments work` seal the log")
    click.echo(str(head))
    click.echo(f"the head of log {id}", err=True)


def _heads(_: click.Context, __: click.Parameter, values: tuple[str, ...]) -> dict[int, bytes]:
    heads: dict[int, bytes] = {}
    for value in values:
        match = re.fullmatch(r"\s*([0-9]{1,18}):([0-9a-fA-F]{64})\s*", value)
        if match is None or int(match[1]) == 0:
            raise click.BadParameter(
                f"{value!r} is not POSITION:HASH as `payments audit head` prints it"
            )
        position, hash = int(match[1]), bytes.fromhex(match[2])
        if heads.setdefault(position, hash) != hash:
            raise click.BadParameter(
                f"there are two different hashes for position {position}: verify each separately"
            )
    return heads


heads_option = click.option(
    "--head",
    "heads",
    metavar="POSITION:HASH",
    multiple=True,
    callback=_heads,
    help="A head that `payments audit head` printed earlier; may be given several times.",
)


@audit.command()
@heads_option
@click.option(
    "--log",
    "log",
    metavar="ID",
    type=click.UUID,
    help="Id of the expected log, which `payments audit head` prints on stderr.",
)
@click.option(
    "--export",
    type=click.File("rb"),
    metavar="FILE",
    help="Check this output of `payments replay` instead of the database; - is stdin.",
)
def verify(heads: dict[int, bytes], log: UUID | None, export: BinaryIO | None) -> None:
    """Recompute the chain of seals over the whole log, and compare the tables with the log.

    Also check that this is the expected log, that its guards against changes are in place, that no
    two payments name the same capture, and that no payment is parked without a reason.

    Exit code 0: no findings. 1: findings, one per line. 2: the check could not run. Events that are
    not sealed yet, and tables that lag behind the log, are not findings.
    """
    one_is_a_finding()
    if export is None:
        found = _verify_database(heads, log)
    elif log is None:
        found = _verify_export(export, heads)
    else:
        raise click.UsageError(
            "--log cannot be used with --export: an export does not contain the log's id"
        )
    click.echo(f"findings: {found}" if found else "nothing was found")
    sys.exit(FINDINGS if found else 0)


def _verify_database(heads: dict[int, bytes], log: UUID | None) -> int:
    with open_database(begin(), to="read") as address, Reader(address, NAME) as reader:
        losses, ends = accepted_losses(reader), ends_of(reader)
        verification, comparison = Verification(heads, losses), Comparison(reader)
        with Progress() as progress:
            places = _with_progress(places_of(reader, ends), progress, ends.log)
            found = _show(verification.findings(places))
            found += _show(open_losses(reader))
            found += _show(missing_seals(ends, verification.head))
            id = log_id_in(reader)
            found += _show(another_log(id, log, verification.events))
            found += _show(broken_guards(reader))
            found += _show(shared_captures(reader, ends))
            _tell(verification, f", id {id}" if id is not None else "")
            for loss in losses:
                click.echo(one_line(f"loss: {loss}"))
            comparison.progress = lambda done: progress("compare", done, comparison.position)
            found += _show(each for each in comparison.of_all() if not _may_be(each))
            found += _show(needlessly_parked(reader))
    click.echo(
        f"tables: {comparison.payments:,} payments compared with the log up to position "
        f"{comparison.position}"
    )
    if comparison.parked:
        click.echo(
            f"tables: {len(comparison.parked):,} payments are parked, and were compared "
            "without their parked events: `payments parked list`"
        )
    return found


def _may_be(difference: Difference | Unreadable) -> bool:
    return isinstance(difference, Difference) and difference.may_be


def _verify_export(export: BinaryIO, heads: dict[int, bytes]) -> int:
    damaged: list[Finding] = []
    verification = Verification(heads)
    with Progress() as progress:
        places = _with_progress(places_in(export, damaged), progress, None)
        found = _show(verification.findings(places))
        found += _show(damaged)
    if not verification.events:
        raise NoExport("the export contains no event")
    if not verification.sealed and not heads:
        raise NoExport("none of its events is sealed, and there is no --head to verify it with")
    _tell(verification)
    return found


def _show(findings: Iterable[Any]) -> int:
    count = 0
    for count, finding in enumerate(findings, 1):
        if count <= SHOWN_MAX:
            click.echo(one_line(str(finding)))
    if count > SHOWN_MAX:
        click.echo(f"and {count - SHOWN_MAX:,} more like these")
    return count


def _tell(verification: Verification, id: str = "") -> None:
    left = verification.events - verification.sealed
    unsealed = f", {left:,} not sealed yet" if left else ""
    click.echo(f"log: {verification.events:,} events{unsealed}{id}")
    if verification.head is not None:
        click.echo(f"head: {verification.head}")
    for line in verification.lost_heads:
        click.echo(one_line(line))


def _with_progress(
    places: Iterator[LogPlace], progress: Progress, total: int | None
) -> Iterator[LogPlace]:
    for number, place in enumerate(places, 1):
        if number % PROGRESS_EVERY == 0:
            progress("verify", number, total)
        yield place
