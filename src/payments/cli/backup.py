"""`payments dump` and `payments restore`: the whole database to one file, and from it."""

import os
import secrets
import shutil
import signal
import subprocess
import sys
import tempfile
from collections.abc import Mapping
from contextlib import suppress
from itertools import islice
from pathlib import Path
from typing import IO, Any

import click
import psycopg

from payments.cli import programs
from payments.cli.start import begin
from payments.database.connections import connect
from payments.errors import StartError
from payments.opening import open_database

# A relation without a log also prevents a restore.
FIRST_RELATION = """
SELECT format('%I.%I', n.nspname, c.relname)
  FROM pg_class c JOIN pg_namespace n ON n.oid = c.relnamespace
 WHERE n.nspname <> 'information_schema' AND n.nspname !~ '^pg_' LIMIT 1
"""
HAS_LOG = "SELECT to_regclass('payment_events') IS NOT NULL"

# Unknown to servers before 17, and off by default.
NOT_EVERYWHERE = b"SET transaction_timeout = 0;\n"
HEADER_LINES = 100  # it is among the first lines

NEXT = """\
Next, with the same settings:
1. payments audit verify --head POSITION:HASH    with the newest head that you kept before the dump
2. payments doctor
3. compare with the provider the time since the dump: docs/backup.md, "After a loss"
Callbacks that were due at the time of the dump, even if delivered since, are sent as soon as a \
service runs on this database with ORDER_CALLBACK_URL: leave it unset for a copy."""


@click.command()
@click.argument("file", type=click.Path(path_type=Path))
def dump(file: Path) -> None:
    """Write the whole database to a new FILE, for `payments restore`.

    The dump is consistent, and the service may run meanwhile. FILE appears once it is complete;
    only its owner may read it.
    """
    _refuse_existing(file)
    _end_in_order()
    settings = begin()
    with open_database(settings, to="look") as address:
        with connect(address, "payments dump") as connection:
            programs.check_version(connection)
            if connection.execute(HAS_LOG).fetchone() != (True,):
                raise StartError(f"there is no log in {address!r}: is this the right database?")
            env = programs.environment(address, connection, "payments dump")
        partial = _new_file(file)
        try:
            _dump(partial, env)
            _refuse_existing(file)
            partial.rename(file)
        except BaseException:
            partial.unlink(missing_ok=True)
            raise
    click.echo(f"dumped: {file.stat().st_size:,} bytes", err=True)


@click.command()
@click.argument("file", type=click.Path(exists=True, dir_okay=False, readable=True, path_type=Path))
def restore(file: Path) -> None:
    """Load FILE, made by `payments dump`, into an empty database.

    All of it or nothing. At the end it prints the next steps.
    """
    _end_in_order()
    settings = begin()
    with open_database(settings, to="look") as address:
        with connect(address, "payments restore") as connection:
            programs.check_version(connection)
            _refuse_unless_empty(connection)
            env = programs.environment(address, connection, "payments restore")
        _restore(file, env)
    click.echo(f"restored: {file}", err=True)
    click.echo(NEXT, err=True)


def _refuse_existing(file: Path) -> None:
    if os.path.lexists(file):
        raise click.BadParameter(
            f"{str(file)!r} already exists, and is not overwritten", param_hint="FILE"
        )


def _new_file(file: Path) -> Path:
    """A new file beside it, readable only by its owner."""
    partial = file.with_name(f".{file.name}.{secrets.token_hex(4)}.partial")
    try:
        os.close(os.open(partial, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600))
    except OSError as error:
        text = f"{str(file)!r} cannot be written: {error.strerror}"
        raise click.BadParameter(text, param_hint="FILE") from None
    return partial


def _end_in_order() -> None:
    """Turns signals into an exit, so that partial files are removed. An ignored SIGHUP stays
    ignored (nohup)."""
    for number in (signal.SIGTERM, signal.SIGHUP):
        if signal.getsignal(number) is not signal.SIG_IGN:
            signal.signal(number, lambda number, _: sys.exit(128 + number))


def _dump(partial: Path, env: Mapping[str, str]) -> None:
    with tempfile.TemporaryFile() as said:
        process = programs.start(
            *(
                "pg_dump",
                "--format=custom",
                "--no-large-objects",
                "--no-password",
                f"--file={partial}",
            ),
            env=env,
            said=said,
        )
        try:
            failed = process.wait()
        finally:
            programs.end(process)
        if failed:
            raise programs.failure("pg_dump", said)


def _refuse_unless_empty(connection: psycopg.Connection[Any]) -> None:
    if connection.execute("SHOW transaction_read_only").fetchone() == ("on",):
        raise StartError("the database refuses writes: it is a standby, or read-only")
    found = connection.execute(FIRST_RELATION).fetchone()
    if found is not None:
        raise StartError(
            f"the database {connection.info.dbname} is not empty, it contains {found[0]}: set "
            "DATABASE_NAME to an empty one (on your own server: createdb NAME; the embedded "
            "Postgres creates it)"
        )


def _restore(file: Path, env: Mapping[str, str]) -> None:
    """Restores in one transaction, which is committed once the file was read to its end.

    Through psql: pg_restore alone would send settings that older servers refuse.
    """
    with tempfile.TemporaryFile() as read_said, tempfile.TemporaryFile() as write_said:
        reading = programs.start(
            *("pg_restore", "--format=custom", "--no-owner", "--file=-", str(file)),
            env=env,
            said=read_said,
            stdout=subprocess.PIPE,
        )
        writing = programs.start(
            *("psql", "--no-psqlrc", "--quiet", "--no-password"),
            *("--set=ON_ERROR_STOP=1", "--file=-"),
            env=env,
            said=write_said,
            stdin=subprocess.PIPE,
        )
        assert reading.stdout is not None
        assert writing.stdin is not None
        try:
            with suppress(BrokenPipeError):  # psql reports the reason
                copy_script(reading.stdout, writing.stdin)
                if reading.wait():
                    raise programs.failure("pg_restore", read_said)
                writing.stdin.write(b"COMMIT;\n")
                writing.stdin.close()
            if writing.wait():
                raise programs.failure("nothing was restored: psql", write_said)
        finally:
            programs.end(reading, writing)
            reading.stdout.close()
            with suppress(BrokenPipeError):
                writing.stdin.close()


def copy_script(script: IO[bytes], to: IO[bytes]) -> None:
    """Copies the script into a transaction, which the caller must commit."""
    to.write(b"BEGIN;\n")
    to.writelines(line for line in islice(script, HEADER_LINES) if line != NOT_EVERYWHERE)
    shutil.copyfileobj(script, to)
    to.flush()
