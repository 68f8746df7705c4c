"""The `payments` command. Data goes to stdout, everything else to stderr.

Exit codes: 0 done, 1 could not (one line says why), 2 wrong arguments.
"""

import importlib
import os
import signal
import sys

import click
import msgspec
from rich.console import Console
from rich.table import Table

from payments.errors import StartError
from payments.service import build_gateway, open_database
from payments.settings import Settings, describe, read_settings
from payments.telemetry import set_up_logs


class _Group(click.Group):
    """Turns StartError into one line and exit code 1."""

    def invoke(self, ctx: click.Context) -> object:
        try:
            return super().invoke(ctx)
        except StartError as error:
            click.echo(f"payments: {error}", err=True)
            sys.exit(1)


def _settings() -> Settings:
    settings = read_settings(os.environ)
    set_up_logs(settings.log_format, settings.log_level)  # type: ignore[arg-type]
    return settings


@click.group(cls=_Group, context_settings={"help_option_names": ["-h", "--help"]})
@click.version_option(package_name="payment-service")
def main() -> None:
    """The Payment Service. Settings are environment variables: `payments settings` lists them."""


@main.command()
def serve() -> None:
    """Start the service and run until SIGTERM."""
    # Until the server takes over, a SIGTERM ends the start-up in an orderly way.
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(0))
    settings = _settings()
    # By name: nothing in payments imports web.
    server = importlib.import_module("web.server")
    listener = server.bind(settings)
    gateway = build_gateway(settings)
    with open_database(settings, migrating=settings.migrate_on_start) as address:
        server.run(settings, address, gateway, listener)


@main.command()
def migrate() -> None:
    """Bring the database's schema up to date and exit."""
    settings = _settings()
    with open_database(settings, migrating=True):
        click.echo("the database is up to date", err=True)


@main.command()
@click.option("--format", "form", type=click.Choice(["table", "json"]), default="table")
def settings(form: str) -> None:
    """Print every setting with its value, default and meaning; secrets are hidden."""
    rows = list(describe(read_settings(os.environ)))
    columns = ("variable", "value", "default", "meaning")
    if form == "json":
        listed = [dict(zip(columns, row, strict=True)) for row in rows]
        click.echo(msgspec.json.format(msgspec.json.encode(listed), indent=2))
        return
    table = Table(*columns, box=None, pad_edge=False)
    for row in rows:
        table.add_row(*row)
    # Off a terminal nothing is wrapped, so that grep finds whole lines.
    Console(width=None if sys.stdout.isatty() else 220, highlight=False).print(table)
