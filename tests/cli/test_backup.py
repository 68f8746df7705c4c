"""`payments dump`, `restore` and `psql`: the programs that come with the server, where it is."""

import io
import os
import signal
import subprocess
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import msgspec
import psycopg
import pytest
from click.testing import Result

from payments import embedded_postgres
from payments.cli import programs
from payments.cli.backup import NOT_EVERYWHERE, copy_script
from payments.cli.programs import environment
from payments.database.connections import DatabaseAddress
from payments.embedded_postgres import EmbeddedPostgresError
from payments.migrations import migrate
from tests.outside_postgres import OutsidePostgres
from tests.process import PAYMENTS, at, open_directory, run
from tests.process import environment as process_environment
from tests.support import History, append, eventually

Connection = psycopg.Connection[Any]
Operator = Callable[..., Result]


@pytest.fixture(autouse=True)
def signals() -> Iterator[None]:
    """Commands that run in this process set their own."""
    before = {each: signal.getsignal(each) for each in (signal.SIGTERM, signal.SIGHUP)}
    yield
    for number, handler in before.items():
        signal.signal(number, handler)


@pytest.fixture
def dump(address: DatabaseAddress, connection: Connection, tmp_path: Path) -> Path:
    append(connection, [fact for n in range(50) for fact in History(f"k{n}").charged().facts])
    file = tmp_path / "payments.dump"
    done = run("dump", str(file), **at(address))
    assert (done.returncode, done.stdout) == (0, ""), done.stderr
    assert done.stderr == f"dumped: {file.stat().st_size:,} bytes\n"
    return file


def relations(address: DatabaseAddress) -> list[Any]:
    with psycopg.connect(address.conninfo("tests")) as connection:
        return connection.execute(
            "SELECT relname FROM pg_class WHERE relnamespace = 'public'::regnamespace ORDER BY 1"
        ).fetchall()


def test_a_dump_is_private_and_never_overwritten(dump: Path, address: DatabaseAddress) -> None:
    assert dump.stat().st_mode & 0o777 == 0o600
    before = dump.read_bytes()
    done = run("dump", str(dump), **at(address))
    assert (done.returncode, done.stdout) == (2, "")
    assert "exists, and is not overwritten" in done.stderr
    assert dump.read_bytes() == before
    assert list(dump.parent.iterdir()) == [dump]


def test_all_is_back_with_what_it_may(
    dump: Path, address: DatabaseAddress, empty_database: DatabaseAddress
) -> None:
    done = run("restore", str(dump), **at(empty_database))
    assert (done.returncode, done.stdout) == (0, ""), done.stderr
    assert "payments audit verify --head" in done.stderr
    assert "ORDER_CALLBACK_URL" in done.stderr
    assert relations(empty_database) == relations(address)
    # What nobody changed is dumped as no rights at all.
    rights = (
        "SELECT proname, coalesce(proacl, acldefault('f', proowner))::text FROM pg_proc"
        " WHERE pronamespace = 'public'::regnamespace ORDER BY 1, 2"
    )
    both = []
    for each in (address, empty_database):
        with psycopg.connect(each.conninfo("tests")) as connection:
            log = "SELECT * FROM payment_events ORDER BY notification_id"
            both.append((connection.execute(log).fetchall(), connection.execute(rights).fetchall()))
    assert both[0] == both[1]
    assert len(both[0][0]) == 100
    refused = run("restore", str(dump), **at(empty_database))
    assert (refused.returncode, refused.stderr.count("\n")) == (1, 1)
    assert "is not empty, it contains public." in refused.stderr
    assert "DATABASE_NAME" in refused.stderr


@pytest.mark.parametrize("size", [0, 500, 0.5, 0.97])
def test_half_a_dump_is_nothing(dump: Path, empty_database: DatabaseAddress, size: float) -> None:
    whole = dump.read_bytes()
    dump.write_bytes(whole[: int(size if size > 1 or not size else len(whole) * size)])
    done = run("restore", str(dump), **at(empty_database))
    assert (done.returncode, done.stdout, done.stderr.count("\n")) == (1, "", 1), done.stderr
    assert done.stderr.startswith("payments: pg_restore: ")
    assert relations(empty_database) == []


def test_a_role_that_is_not_there(
    address: DatabaseAddress,
    connection: Connection,
    tmp_path: Path,
    empty_database: DatabaseAddress,
) -> None:
    role = f"reader_{os.getpid()}"
    connection.execute(f"CREATE ROLE {role}".encode())
    connection.execute(f"GRANT SELECT ON payments TO {role}".encode())
    file = str(tmp_path / "payments.dump")
    assert run("dump", file, **at(address)).returncode == 0
    connection.execute(f"DROP OWNED BY {role}; DROP ROLE {role}".encode())
    done = run("restore", file, **at(empty_database))
    assert (done.returncode, done.stderr.count("\n")) == (1, 1)
    assert f'nothing was restored: psql: ERROR:  role "{role}" does not exist' in done.stderr
    assert relations(empty_database) == []


def test_nohup_is_for_a_dump_as_well(
    address: DatabaseAddress, connection: Connection, tmp_path: Path
) -> None:
    file = tmp_path / "payments.dump"
    with psycopg.connect(address.conninfo("tests")) as other:
        other.execute("SET idle_in_transaction_session_timeout = 0")
        other.execute("LOCK TABLE payments")
        process = subprocess.Popen(
            ["nohup", *PAYMENTS, "dump", str(file)],
            env=process_environment(**at(address)),
            stderr=subprocess.PIPE,
        )
        try:
            eventually(lambda: connection.execute(WAITING.encode()).rowcount)
            process.send_signal(signal.SIGHUP)
            other.rollback()
            process.communicate(timeout=20)
        finally:
            process.kill()
            process.wait()
    assert (process.returncode, file.exists()) == (0, True)


# For the lock of a test.
WAITING = """
SELECT FROM pg_stat_activity
 WHERE datname = current_database() AND application_name = 'payments dump'
   AND wait_event_type = 'Lock'
"""


@pytest.mark.parametrize("signum", [signal.SIGTERM, signal.SIGINT, signal.SIGHUP])
def test_an_interrupted_dump_leaves_no_file(
    address: DatabaseAddress, connection: Connection, tmp_path: Path, signum: int
) -> None:
    with psycopg.connect(address.conninfo("tests")) as other:
        other.execute("SET idle_in_transaction_session_timeout = 0")
        other.execute("LOCK TABLE payments")
        process = subprocess.Popen(
            [*PAYMENTS, "dump", str(tmp_path / "payments.dump")],
            env=process_environment(**at(address)),
            stderr=subprocess.PIPE,
        )
        try:
            eventually(lambda: connection.execute(WAITING.encode()).rowcount)
            assert [path.name[:15] for path in tmp_path.iterdir()] == [".payments.dump."]
            process.send_signal(signum)
            process.communicate(timeout=20)
        finally:
            process.kill()
            process.wait()
        assert process.returncode not in (0, None)
        assert list(tmp_path.iterdir()) == []
        eventually(lambda: not connection.execute(WAITING.encode()).rowcount)


def test_what_cannot_be_dumped(
    operator: Operator, empty_database: DatabaseAddress, tmp_path: Path
) -> None:
    nowhere = operator("dump", tmp_path / "missing" / "payments.dump")
    assert nowhere.exit_code == 2
    assert "cannot be written: No such file or directory" in nowhere.stderr
    for name in ("/dev/full", tmp_path):
        assert "exists, and is not overwritten" in operator("dump", name).stderr
    done = run("dump", str(tmp_path / "payments.dump"), **at(empty_database))
    assert (done.returncode, done.stderr.count("\n")) == (1, 1)
    assert "there is no log in" in done.stderr
    assert operator("restore", tmp_path / "nothing").exit_code == 2
    assert list(tmp_path.iterdir()) == []


def test_a_server_that_is_newer_and_a_program_that_is_missing(
    operator: Operator, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, dump: Path
) -> None:
    def missing(name: str) -> Path:
        raise EmbeddedPostgresError(f"the package embedded-postgres has no program {name}")

    commands = (("dump", tmp_path / "new"), ("restore", dump), ("psql", "-c", "SELECT 1"))
    with monkeypatch.context() as patched:
        patched.setattr(programs, "version", lambda _: "17.2.1")
        for command in commands:
            done = operator(*command)
            assert (done.exit_code, done.stdout) == (1, "")
            assert done.stderr.endswith("use pg_dump, pg_restore and psql of version 18 or newer\n")
    monkeypatch.setattr(embedded_postgres, "binary", missing)
    done = operator(*commands[0])
    assert (done.exit_code, done.stderr.count("\n")) == (1, 1)
    assert "has no program pg_dump: install pg_dump of the server's version" in done.stderr
    assert list(tmp_path.iterdir()) == [dump]


def test_what_older_servers_refuse_is_left_out() -> None:
    script, out = (
        b"SET statement_timeout = 0;\n" + NOT_EVERYWHERE + b"SELECT 1;\n" * 300,
        io.BytesIO(),
    )
    copy_script(io.BytesIO(script + NOT_EVERYWHERE), out)
    assert out.getvalue().startswith(b"BEGIN;\nSET statement_timeout = 0;\nSELECT 1;\n")
    assert out.getvalue().endswith(b"SELECT 1;\n" + NOT_EVERYWHERE)  # in data


def test_psql_gets_its_arguments_and_keeps_its_exit_code(
    address: DatabaseAddress, tmp_path: Path
) -> None:
    done = run("psql", "-At", "-c", "SELECT current_database(), 'a b'", **at(address))
    assert (done.returncode, done.stdout, done.stderr) == (0, f"{address.dbname}|a b\n", "")
    script = tmp_path / "script.sql"
    script.write_text("SELECT 1 / 0;")
    failed = run("psql", "-v", "ON_ERROR_STOP=1", "-f", str(script), **at(address))
    assert failed.returncode == 3
    assert "division by zero" in failed.stderr
    help = run("psql", "--help")
    assert "Open psql on the service's database" in help.stdout
    assert "General options:" in run("psql", "--", "--help", **at(address)).stdout


@pytest.fixture(scope="module")
def guarded() -> Iterator[OutsidePostgres]:
    """A server that asks for a password."""
    with open_directory("payments-guarded-") as home, OutsidePostgres(home / "server") as server:
        migrate(server.address)
        yield server


def test_the_password_is_in_no_argument_and_in_no_output(
    guarded: OutsidePostgres, tmp_path: Path
) -> None:
    password = guarded.address.password
    assert password is not None
    look = r"\! cat /proc/*/cmdline 2>/dev/null | tr '\0' ' '"
    done = run("psql", "-X", "-c", "SELECT 1", "-c", look, **guarded.settings)
    assert done.returncode == 0, done.stderr
    assert "psql -X -c SELECT 1" in done.stdout
    assert password not in done.stdout + done.stderr
    file = str(tmp_path / "payments.dump")
    assert run("dump", file, **guarded.settings).returncode == 0
    with guarded.connect() as connection:
        connection.execute("CREATE DATABASE restored")
    into = guarded.settings | {"DATABASE_NAME": "restored"}
    restored = run("restore", file, **into)
    assert restored.returncode == 0, restored.stderr
    wrong = run("dump", f"{file}.2", **guarded.settings | {"DATABASE_PASSWORD": "canary"})
    assert (wrong.returncode, wrong.stderr.count("\n")) == (1, 1)
    for each in (restored, wrong):
        assert password not in each.stderr
        assert "canary" not in each.stderr


def test_other_settings_of_libpq_do_not_lead_elsewhere(address: DatabaseAddress) -> None:
    """Each of them counts for psql before the host, the user or the settings that it was given."""
    foreign = {"PGHOSTADDR": "127.0.0.1", "PGSERVICE": "x", "PGOPTIONS": "-c x=y", "PGUSER": "x"}
    done = run("psql", "-AtX", "-c", "SELECT current_database()", **at(address) | foreign)
    assert (done.returncode, done.stdout, done.stderr) == (0, f"{address.dbname}\n", "")


def test_the_programs_go_to_the_server_that_was_looked_at(guarded: OutsidePostgres) -> None:
    """Of a list, or of a name with several addresses, another one may be a standby that lags."""
    several = msgspec.structs.replace(guarded.address, host="localhost")
    with psycopg.connect(several.conninfo("tests")) as checked:
        theirs = environment(several, checked, "tests")
    assert (theirs["PGHOST"], theirs["PGHOSTADDR"]) == ("localhost", "127.0.0.1")
    assert (theirs["PGPORT"], theirs["PGPASSWORD"]) == (str(several.port), several.password)
