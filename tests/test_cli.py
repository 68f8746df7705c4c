"""The `payments` command: what it prints, and how it says that it cannot."""

import json
import socket
from pathlib import Path

import msgspec
import psycopg
import pytest

from payments.database import DatabaseAddress
from payments.settings import VARIABLES
from tests.process import at, run


def test_settings_lists_every_variable_and_hides_secrets() -> None:
    given = {"DATABASE_HOST": "db", "DATABASE_PASSWORD": "canary", "PORT": "4010"}
    table = run("settings", **given)
    assert (table.returncode, table.stderr) == (0, "")
    assert "canary" not in table.stdout
    assert all(variable.name in table.stdout for variable in VARIABLES)
    listed = {
        row["variable"]: row
        for row in json.loads(run("settings", "--format", "json", **given).stdout)
    }
    assert listed["PORT"]["value"] == "4010"
    assert listed["PORT"]["default"] == "4004"
    assert listed["DATABASE_PASSWORD"]["value"] == "(set, hidden)"


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"PORT": "70000"}, "PORT: '70000' must be a whole number from 1 to 65535"),
        ({"DATABASE_PASSWORD": "canary"}, "DATABASE_HOST"),
        ({"SIMULATED_FAULTS": "explode", "DATABASE_HOST": "/nowhere"}, "SIMULATED_FAULTS"),
        ({"DATABASE_HOST": "/nowhere"}, "cannot connect to Postgres as postgres@/nowhere:5432"),
        ({"DATABASE_HOST": "127.0.0.1", "DATABASE_PORT": "1"}, "refused"),
        ({"GATEWAY": "nowhere.to_be:found"}, "GATEWAY: cannot import 'nowhere.to_be:found'"),
        ({"GATEWAY": "json:nothing"}, "GATEWAY: cannot import 'json:nothing'"),
        ({"HOST": "203.0.113.1"}, "cannot listen on HOST '203.0.113.1'"),
    ],
)
def test_a_start_that_cannot_be_is_one_line(settings: dict[str, str], words: str) -> None:
    done = run("serve", **settings)
    assert done.returncode == 1
    lines = done.stderr.splitlines()
    assert len(lines) == 1
    assert lines[0].startswith("payments: ")
    assert words in lines[0]
    assert "canary" not in done.stderr


def test_a_port_in_use(tmp_path: Path) -> None:
    with socket.socket() as other:
        other.bind(("127.0.0.1", 0))
        other.listen()
        port = other.getsockname()[1]
        done = run("serve", PORT=port, PAYMENTS_DATA_DIR=tmp_path)
    assert done.returncode == 1
    assert done.stderr == (
        f"payments: cannot listen on HOST '127.0.0.1' and PORT {port}: Address already in use\n"
    )
    assert list(tmp_path.iterdir()) == []  # found out before a database was started


def test_a_refused_password(address: DatabaseAddress, server: DatabaseAddress) -> None:
    """The server asks everyone else for a password; here nobody gets in without one."""
    with psycopg.connect(server.conninfo(), autocommit=True) as connection:
        connection.execute("CREATE ROLE locked_out NOLOGIN")
    done = run("migrate", **at(address) | {"DATABASE_USERNAME": "locked_out"})
    assert done.returncode == 1
    assert 'role "locked_out" is not permitted to log in' in done.stderr
    assert len(done.stderr.splitlines()) == 1


def test_migrate_and_the_check_for_it(empty_database: DatabaseAddress) -> None:
    unmigrated = run("serve", **at(empty_database), MIGRATE_ON_START="false", PORT=1 + 4099)
    assert unmigrated.returncode == 1
    assert "run `payments migrate` first" in unmigrated.stderr
    done = run("migrate", **at(empty_database))
    assert (done.returncode, done.stdout) == (0, "")
    assert "up to date" in done.stderr


def test_a_missing_database_is_named(server: DatabaseAddress) -> None:
    missing = msgspec.structs.replace(server, dbname="no_such_database")
    done = run("migrate", **at(missing))
    assert done.returncode == 1
    assert 'database "no_such_database" does not exist' in done.stderr


@pytest.mark.parametrize("arguments", [["nonsense"], ["serve", "--nonsense"], ["settings", "x"]])
def test_wrong_arguments_exit_2(arguments: list[str]) -> None:
    done = run(*arguments)
    assert done.returncode == 2
    assert done.stdout == ""


def test_help_and_version() -> None:
    assert "migrate" in run("--help").stdout
    assert run("--version").returncode == 0
