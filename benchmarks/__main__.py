"""`python -m benchmarks`: see the package's docstring."""

import signal
import statistics
import sys
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import click
import msgspec
from rich.console import Console
from rich.table import Table

from benchmarks.appenders import AppendSlowCommit, AppendTwoSlowCommit
from benchmarks.audit import AUDIT_PARTS
from benchmarks.callbacks import CallbackDelay, Callbacks
from benchmarks.client_limit import ClientLimit
from benchmarks.exports import Exports
from benchmarks.flood import FLOOD_PARTS
from benchmarks.harness import WARM_UP_S, Harness
from benchmarks.load import Figures
from benchmarks.overload import Overload
from benchmarks.parts import PARTS, Part
from payments import embedded_postgres
from payments.database.connections import DatabaseAddress
from payments.observability.logs import set_up_logs

MORE: tuple[type[Part], ...] = (
    AppendSlowCommit,
    AppendTwoSlowCommit,
    Callbacks,
    ClientLimit,
    CallbackDelay,
    Exports,
    Overload,
    *FLOOD_PARTS,
    *AUDIT_PARTS,
)
ALL: dict[str, type[Part]] = {**PARTS, **{part.name: part for part in MORE}}

RATIOS = (
    ("charge", "floor_post"),
    ("get", "floor_get"),
    ("charge", "pg_commit"),
    ("charge", "library"),
    ("charge", "charge_bare"),
    ("charge", "charge_blind"),
    ("append_two_slow_commit", "append_slow_commit"),
    ("callbacks", "client_limit"),
    ("rebuild", "raw_read"),
    ("rebuild", "raw_read_events"),
    ("verify", "raw_read"),
)

OPTIONS = {"max_connections": "1000"}


@contextmanager
def server() -> Iterator[DatabaseAddress]:
    """An embedded Postgres of this run alone, with its default settings but for connections: every
    part keeps its own open."""
    with tempfile.TemporaryDirectory(prefix="payments-benchmarks-") as name:
        directory = Path(name)
        directory.chmod(0o755)  # the server's user must get in
        try:
            with embedded_postgres.start(directory, options=OPTIONS) as running:
                yield DatabaseAddress(
                    host=str(running.socket_dir),
                    port=running.port,
                    user=running.user,
                    password=None,
                    dbname="postgres",
                )
        finally:
            embedded_postgres.wait_until_stopped(directory)


def summary(results: dict[str, list[Figures]]) -> dict[str, dict[str, float]]:
    table = {
        name: {
            field: round(statistics.median(getattr(figures, field) for figures in rounds), 2)
            for field in ("per_s", "p50_ms", "p99_ms")
        }
        for name, rounds in results.items()
    }
    table["ratios"] = {
        f"{over}/{under}": round(
            statistics.median(
                a.per_s / b.per_s for a, b in zip(results[over], results[under], strict=True)
            ),
            3,
        )
        for over, under in RATIOS
        if over in results and under in results
    }
    return table


def show(table: dict[str, dict[str, float]]) -> None:
    console = Console(highlight=False)
    rows = Table("part", "per second", "p50 ms", "p99 ms", box=None)
    for name, figures in table.items():
        if name != "ratios":
            rows.add_row(name, *(f"{figures[key]:,.1f}" for key in ("per_s", "p50_ms", "p99_ms")))
    for name, ratio in table["ratios"].items():
        rows.add_row(name, f"{ratio:.2f}")
    console.print(rows)


def show_details(name: str, rows: dict[str, dict[str, float]]) -> None:
    """What a part measured besides: one column for each of its rows."""
    table = Table(name, *rows, box=None)
    for field in next(iter(rows.values())):
        table.add_row(field, *(f"{row[field]:,.1f}" for row in rows.values()))
    Console(highlight=False).print(table)


@click.command()
@click.argument("names", nargs=-1, type=click.Choice(list(ALL)))
@click.option("--json", "as_json", is_flag=True, help="Print JSON alone to stdout.")
@click.option("--rounds", default=3, show_default=True, type=click.IntRange(1, 50))
@click.option(
    "--seconds",
    default=5.0,
    show_default=True,
    type=click.FloatRange(WARM_UP_S, min_open=True),
    help="Per part and round.",
)
@click.option(
    "--patience",
    default=600.0,
    show_default=True,
    help="Seconds after which a step of a part is given up. Filling a log takes the longest.",
)
def main(
    names: tuple[str, ...], as_json: bool, rounds: int, seconds: float, patience: float
) -> None:
    """Measure the named parts, or all of them. Exit code 1: some failed, and the others' figures
    are shown."""
    set_up_logs("auto", "WARNING")
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(128 + signal.SIGTERM))
    with server() as address:
        harness = Harness([ALL[name](address) for name in dict.fromkeys(names) or ALL], patience)
        harness.run(rounds, seconds)
    table = summary(harness.figures)
    if as_json:
        more = {"details": harness.details, "failed": harness.failed}
        sys.stdout.write(msgspec.json.encode({**table, **more}).decode() + "\n")
    else:
        show(table)
        for name, rows in harness.details.items():
            show_details(name, rows)
    if harness.failed:
        click.echo(f"failed: {', '.join(harness.failed)}", err=True)
        sys.exit(1)


if __name__ == "__main__":
    main()
