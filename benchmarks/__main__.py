"""`python -m benchmarks`: see the package's docstring."""

import statistics
import sys
import tempfile
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path

import click
import msgspec
from rich.console import Console
from rich.table import Table

from benchmarks.audit import AUDIT_PARTS
from benchmarks.callbacks import CallbackDelay, Callbacks
from benchmarks.client_limit import ClientLimit
from benchmarks.load import Figures
from benchmarks.overload import Overload
from benchmarks.parts import PARTS, Part
from payments import embedded_postgres
from payments.database import DatabaseAddress
from payments.logs import set_up_logs

MORE: tuple[type[Part], ...] = (Callbacks, ClientLimit, CallbackDelay, Overload, *AUDIT_PARTS)
ALL: dict[str, type[Part]] = {**PARTS, **{part.name: part for part in MORE}}

RATIOS = (
    ("charge", "floor_post"),
    ("get", "floor_get"),
    ("charge", "pg_commit"),
    ("charge", "library"),
    ("charge", "charge_bare"),
    ("charge", "charge_blind"),
    ("callbacks", "client_limit"),
    ("rebuild", "raw_read"),
    ("rebuild", "raw_read_events"),
    ("verify", "raw_read"),
)


@contextmanager
def server() -> Iterator[DatabaseAddress]:
    """An embedded Postgres of this run alone, with its default settings."""
    with tempfile.TemporaryDirectory(prefix="payments-benchmarks-") as name:
        directory = Path(name)
        directory.chmod(0o755)  # the server's user must get in
        with embedded_postgres.start(directory) as running:
            yield DatabaseAddress(
                str(running.socket_dir), running.port, running.user, None, "postgres"
            )
        embedded_postgres.wait_until_stopped(directory)


def measure(parts: list[Part], rounds: int, seconds: float) -> dict[str, list[Figures]]:
    """The figures of each part, one per round; within a round the parts take turns."""
    results: dict[str, list[Figures]] = {part.name: [] for part in parts}
    for number in range(rounds + 1):
        for part in parts:
            warm_up = number == 0
            click.echo(f"  {'warm-up' if warm_up else f'round {number}'}: {part.name}", err=True)
            figures = part.run(1.0 if warm_up else seconds)
            if not warm_up:
                results[part.name].append(figures)
    return results


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
@click.option("--seconds", default=5.0, show_default=True, help="Per part and round.")
def main(names: tuple[str, ...], as_json: bool, rounds: int, seconds: float) -> None:
    """Measure the named parts, or all of them."""
    set_up_logs("auto", "WARNING")
    with ExitStack() as stack:
        address = stack.enter_context(server())
        parts = [stack.enter_context(ALL[name](address)) for name in names or ALL]
        results = measure(parts, rounds, seconds)
        for part in parts:
            for line in part.remarks():
                click.echo(f"  {part.name}: {line}", err=True)
        details = {part.name: rows for part in parts if (rows := part.rows())}
    table = summary(results)
    if as_json:
        sys.stdout.write(msgspec.json.encode({**table, "details": details}).decode() + "\n")
    else:
        show(table)
        for name, rows in details.items():
            show_details(name, rows)


if __name__ == "__main__":
    main()
