"""`payments psql`: SQL on the service's database."""

import signal
import subprocess
import sys

import click

from payments.cli import programs
from payments.cli.start import begin
from payments.database.connections import connect
from payments.opening import open_database

# -h is an option of psql: the host.
AS_THEY_ARE = {"ignore_unknown_options": True, "help_option_names": ["--help"]}


@click.command("psql", context_settings=AS_THEY_ARE)
@click.argument("arguments", metavar="[ARGS]...", nargs=-1, type=click.UNPROCESSED)
def open_psql(arguments: tuple[str, ...]) -> None:
    """Open psql on the service's database; ARGS are passed to psql, such as -c "SELECT 1".

    The exit code is psql's. Only the service writes its tables: read them, and change nothing.
    """
    settings = begin()
    with open_database(settings, to="look") as address:
        with connect(address, "payments psql") as connection:
            programs.check_version(connection)
            env = programs.environment(address, connection, "payments psql")
        # psql receives Ctrl-C too and handles it. This process must continue, since the embedded
        # server runs only as long as it does.
        signal.signal(signal.SIGINT, lambda *_: None)
        signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))
        process = subprocess.Popen([programs.program("psql"), *arguments], env=env)  # noqa: S603
        try:
            code = process.wait()
        finally:
            process.terminate()
            process.wait()
    sys.exit(code if code >= 0 else 128 - code)
