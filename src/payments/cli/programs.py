"""The Postgres programs that come with the embedded server: pg_dump, pg_restore and psql.

Those of a distribution are often older than the server, which pg_dump refuses. The environment
names the database: a password in the arguments would be visible to all users.
"""

import os
import re
import subprocess
from collections.abc import Mapping
from importlib.metadata import version
from typing import IO, Any

import psycopg

from payments import embedded_postgres
from payments.database.connections import DatabaseAddress
from payments.embedded_postgres import EmbeddedPostgresError
from payments.errors import StartError

END_S = 5.0


def program(name: str) -> str:
    """The path of a program; raises StartError."""
    try:
        return str(embedded_postgres.binary(name))
    except EmbeddedPostgresError as error:
        raise StartError(f"{error}: install {name} of the server's version or newer") from None


def check_version(connection: psycopg.Connection[Any]) -> None:
    """Raises StartError if the server is newer than the programs, which may not support it."""
    server = connection.info.server_version // 10_000
    shipped = int(version("embedded-postgres").partition(".")[0])
    if server > shipped:
        raise StartError(
            f"the server is Postgres {server}, but the programs of this service have version "
            f"{shipped}: use pg_dump, pg_restore and psql of version {server} or newer"
        )


def environment(
    address: DatabaseAddress, checked: psycopg.Connection[Any], name: str
) -> dict[str, str]:
    """The programs' environment: the server that was `checked`, of the several that a list or a
    name can mean, and the password if there is one."""
    where = {
        "PGHOST": checked.info.host,
        "PGHOSTADDR": checked.info.hostaddr,
        "PGPORT": str(checked.info.port),
        "PGUSER": address.user,
        "PGDATABASE": address.dbname,
        "PGAPPNAME": name,
    }
    if address.password is not None:
        where["PGPASSWORD"] = address.password
    return dict(os.environ) | where


def start(
    name: str,
    *arguments: str,
    env: Mapping[str, str],
    said: IO[bytes],
    stdin: int | IO[bytes] = subprocess.DEVNULL,
    stdout: int = subprocess.DEVNULL,
) -> "subprocess.Popen[bytes]":
    """Starts a program that does not prompt for a password; its stderr goes to the file `said`."""
    command = [program(name), *arguments]
    return subprocess.Popen(command, env=env, stdin=stdin, stdout=stdout, stderr=said)  # noqa: S603


def end(*processes: "subprocess.Popen[bytes]") -> None:
    """Terminates running programs. On SIGTERM pg_dump cancels its query in the server."""
    for process in processes:
        process.terminate()
    for process in processes:
        try:
            process.wait(END_S)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()


def failure(name: str, said: IO[bytes]) -> StartError:
    """The error for a failed program, with its own error line."""
    said.seek(0)
    lines = said.read().decode(errors="replace").splitlines() or ["no error message"]
    line = next((line for line in lines if "error" in line.lower()), lines[-1])
    said_itself = re.sub(r"^(psql:\S*|pg_\w+:) (error: )?", "", line)  # psql:<stdin>:12: ERROR:  …
    return StartError(f"{name}: {said_itself}")
