"""`payments migrate`: the database's schema."""

import click

from payments.cli.start import begin
from payments.opening import open_database


@click.command()
def migrate() -> None:
    """Bring the database's schema up to date and exit."""
    with open_database(begin(told=True), to="migrate"):
        click.echo("the database is up to date", err=True)
