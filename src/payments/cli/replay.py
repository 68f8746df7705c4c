"""`payments replay`: prints the log, or a payment as of a moment."""

import base64
import signal
import sys
from collections.abc import Callable
from itertools import chain
from uuid import UUID

import click
import msgspec

from payments.cli.moments import MOMENT, POSITION_MAX
from payments.cli.output import csv_line, one_line, print_rows
from payments.cli.start import begin, with_database
from payments.database.connections import Database, DatabaseAddress
from payments.errors import PaymentNotFound, StartError
from payments.events.chain import write_line
from payments.events.facts import FACTS
from payments.events.store import LogEntry
from payments.opening import open_database
from payments.queries.explain import summary, time_text
from payments.queries.log import LAST, Moment, Replay, Sealed, Wanted
from payments.queries.payments import PaymentView, get_payment_as_of

FIELDS = PaymentView.__struct_fields__
CSV_COLUMNS = (
    *("position", "payment_id", "version", "type", "recorded_at", "data", "state_base64", "hash"),
)


@click.command("replay")
@click.option("--payment", metavar="ID", type=click.UUID, help="Only events of this payment.")
@click.option(
    "--order", metavar="ID", type=click.UUID, help="Only events of this order's payments."
)
@click.option(
    "--type",
    "types",
    multiple=True,
    type=click.Choice(list(FACTS)),
    help="Only events of this type; may be given several times.",
)
@click.option("--from", "first", type=MOMENT, help="Start of the range, inclusive.")
@click.option(
    "--until",
    "last",
    type=MOMENT,
    help="End of the range: a position is inclusive, a time exclusive.",
)
@click.option("--limit", type=click.IntRange(1, POSITION_MAX), help="Maximum number of events.")
@click.option(
    "--format",
    "form",
    type=click.Choice(["jsonl", "table", "csv"]),
    default="jsonl",
    show_default=True,
    help="jsonl is the exact log, for archives and `payments audit verify`; csv is for "
    "spreadsheets, table for reading.",
)
@click.option("--follow", "following", is_flag=True, help="Continue with new events, until Ctrl-C.")
@click.option(
    "--as-of",
    type=MOMENT,
    help=(
        "Print the state of --payment, or of the payments of --order, at this moment, "
        "instead of events."
    ),
)
def replay_log(
    payment: UUID | None,
    order: UUID | None,
    types: tuple[str, ...],
    first: Moment | None,
    last: Moment | None,
    limit: int | None,
    form: str,
    following: bool,
    as_of: Moment | None,
) -> None:
    """Print the log, oldest first: all of it, or the events that the options select.

    A moment is a position, or the time of recording (RFC 3339, like 2026-01-31T18:30:00Z). --order
    reads the whole log, or the part between --from and --until. Nothing is written, no callbacks
    are sent and no gateway is called. Exit code 1: the payment or order is not in the log.
    """
    if following and (last is not None or as_of is not None):
        raise click.UsageError("--follow cannot be combined with --until or --as-of")
    if as_of is not None:
        if (payment is None) == (order is None):
            raise click.UsageError("--as-of requires --payment or --order")
        if types or first is not None or last is not None or limit is not None:
            raise click.UsageError(
                "--as-of can be combined only with --payment, --order and --format"
            )
    if type(first) is type(last) and first is not None and last is not None and first > last:  # type: ignore[operator]
        raise click.UsageError("--from must not be after --until")
    wanted = Wanted(
        payment_id=payment,
        order_id=order,
        types=types or None,
        first=first or 1,
        last=last or LAST,
        limit=limit,
    )
    if following:
        signal.signal(signal.SIGTERM, lambda *_: sys.exit(0))
    with open_database(begin(), to="read") as address:
        if as_of is not None:
            _print_states(_states(address, payment, order, as_of), form)
        else:
            _print_events(address, wanted, form, following)


def _print_events(address: DatabaseAddress, wanted: Wanted, form: str, following: bool) -> None:
    out, line_of, count = sys.stdout.buffer, _writer(form), 0
    try:
        with Replay(address, wanted) as log:
            for part in chain(log.parts(), log.follow() if following else ()):
                out.write(b"".join(map(line_of, part)))
                out.flush()
                count += len(part)
        out.flush()
    except KeyboardInterrupt:
        sys.exit(0 if following else 130)
    if not count and (wanted.payment_id or wanted.order_id) and not following:
        raise StartError("the log has no such event")


def _states(
    address: DatabaseAddress, payment: UUID | None, order: UUID | None, moment: Moment
) -> list[PaymentView]:
    """The payment, or the order's payments by their beginning."""
    ids = [payment] if payment is not None else []
    if order is not None:
        began = Wanted(order_id=order, types=["PaymentInitiated"])
        with Replay(address, began) as log:
            ids = [found.event.payment_id for part in log.parts() for found in part]

    async def read(database: Database) -> list[PaymentView]:
        found, missing = [], None
        for payment_id in ids:
            try:
                found.append(await get_payment_as_of(database, payment_id, moment, None))
            except PaymentNotFound as error:
                missing = error
        if not found and missing is not None:
            raise missing
        return found

    states = with_database(address, read)
    if not states:
        raise StartError(f"the log has no payment of order {order}")
    return states


def _print_states(states: list[PaymentView], form: str) -> None:
    if form == "jsonl":
        for state in states:
            click.echo(msgspec.json.encode(state))
        return
    fields = [msgspec.to_builtins(state) for state in states]
    if form == "csv":
        columns = [name for name in FIELDS if any(name in state for state in fields)]
        click.echo(csv_line(columns), nl=False)
        for state in fields:
            click.echo(csv_line(state.get(name) for name in columns), nl=False)
        return
    for number, state in enumerate(fields):
        if number:
            click.echo()
        print_rows(("field", "value"), state.items(), "table")


def _writer(form: str) -> Callable[[Sealed], bytes]:
    """The function that formats an event as a line; tables and CSV begin with a header line."""
    out = sys.stdout.buffer
    if form == "jsonl":
        return lambda found: write_line(found.event, found.hash) + b"\n"
    if form == "csv":
        out.write(csv_line(CSV_COLUMNS))
        return lambda found: csv_line(_cells(found))
    encoding = sys.stdout.encoding  # the other forms are always UTF-8
    out.write(_TABLE.format(*_TABLE_COLUMNS).rstrip().encode() + b"\n")
    return lambda found: _table_line(found.event).encode(encoding, "backslashreplace")


def _cells(found: Sealed) -> list[object]:
    event, hash = found
    try:
        data, encoded = event.state.decode(), ""
    except UnicodeDecodeError:
        data, encoded = "", base64.b64encode(event.state).decode()
    return [
        event.position,
        event.payment_id,
        event.version,
        event.topic,
        time_text(event.recorded_at),
        data,
        encoded,
        "" if hash is None else hash.hex(),
    ]


_TABLE_COLUMNS = ("position", "recorded_at", "payment", "version", "type", "what")
_TABLE = "{:>10}  {:<27}  {:<36}  {:>7}  {:<19}  {}"


def _table_line(event: LogEntry) -> str:
    line = _TABLE.format(
        event.position,
        time_text(event.recorded_at),
        str(event.payment_id),
        event.version,
        event.topic,
        summary(event),
    )
    return one_line(line.rstrip()) + "\n"
