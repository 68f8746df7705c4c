"""`payments settings`: the settings in effect."""

import os

import click

from payments.cli.output import format_option, print_rows
from payments.setting_sources import read_settings
from payments.settings import describe


@click.command()
@format_option
def settings(form: str) -> None:
    """Print every setting with its value, default and meaning; secrets are hidden."""
    columns = ("variable", "value", "default", "meaning")
    print_rows(columns, describe(read_settings(os.environ)), form)
