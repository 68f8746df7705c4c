"""Output of commands: a table for people, JSON for programs, CSV for spreadsheets.

Unprintable characters are escaped, so that data cannot begin a new line or control the terminal.
"""

import csv
import io
import sys
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import click
import msgspec

# Characters that begin a formula in spreadsheets, also in full width (OWASP: CSV Injection).
FORMULA_BEGINS = ("=", "+", "-", "@", "\t", "\r", "\n", "＝", "＋", "－", "＠")

UNWRAPPED = 10_000_000  # columns; an environment variable, the longest of values, has 131,072

format_option = click.option(
    "--format", "form", type=click.Choice(["table", "json"]), default="table", show_default=True
)
list_format_option = click.option(
    *("--format", "form"),
    type=click.Choice(["table", "json", "csv"]),
    default="table",
    show_default=True,
)


def print_rows(columns: Sequence[str], rows: Iterable[Sequence[Any]], form: str) -> None:
    """JSON is a list of objects, one per row."""
    if form == "json":
        print_json([dict(zip(columns, row, strict=True)) for row in rows])
    elif form == "csv":
        for line in (columns, *rows):
            click.echo(csv_line(line), nl=False)
    else:
        _print_table(columns, rows)


def say_if_more(found: Sequence[object], limit: int) -> None:
    """`found` was read with `limit` + 1, to detect that there are more."""
    if len(found) > limit:
        click.echo(f"only the first {limit} (--limit) are shown; there are more", err=True)


def _print_table(columns: Sequence[str], rows: Iterable[Sequence[Any]]) -> None:
    from rich.console import Console  # the other forms do not need it
    from rich.measure import Measurement
    from rich.table import Table

    table = Table(box=None, pad_edge=False)
    texts = [["" if value is None else one_line(str(value)) for value in row] for row in rows]
    for place, column in enumerate(columns):
        # Single words, like ids, are not wrapped, so that they can be copied.
        table.add_column(column, no_wrap=all(" " not in row[place] for row in texts))
    for row in texts:
        table.add_row(*row)
    # Without a terminal nothing is wrapped, so that grep finds whole lines.
    console = Console(highlight=False, markup=False, emoji=False)
    unwrapped = console.options.update(width=UNWRAPPED)
    least = Measurement.get(console, unwrapped, table).minimum
    console.width = max(console.width, least) if sys.stdout.isatty() else UNWRAPPED
    # Rich itself would end the process after a broken pipe.
    with console.capture() as shown:
        console.print(table)
    click.echo(shown.get(), nl=False)


def csv_line(cells: Iterable[object]) -> bytes:
    """A line by RFC 4180. Texts are untrusted and must not become formulas in a spreadsheet: those
    that could get a leading apostrophe. Numbers stay numbers."""
    line = io.StringIO()
    csv.writer(line).writerow(_no_formula(cell) for cell in cells)
    return line.getvalue().encode()


def _no_formula(cell: object) -> object:
    return f"'{cell}" if isinstance(cell, str) and cell.startswith(FORMULA_BEGINS) else cell


def print_json(value: Any) -> None:
    lines = msgspec.json.format(msgspec.json.encode(value), indent=2).decode().split("\n")
    click.echo("\n".join(_printable(line, _json_escape) for line in lines))


def one_line(text: str) -> str:
    r"""The text with unprintable characters escaped as in Python: \n, \x1b, \u202e."""
    return _printable(text, lambda char: char.encode("unicode_escape").decode())


def _json_escape(char: str) -> str:
    units = char.encode("utf-16-be", "surrogatepass").hex()
    return "".join(f"\\u{units[at : at + 4]}" for at in range(0, len(units), 4))


def _printable(text: str, escape: Callable[[str], str]) -> str:
    return "".join(char if char.isprintable() else escape(char) for char in text)
