"""The `payments` command: what it prints, and how it says that it cannot."""

import json
import re
import socket
import sys
import uuid
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from subprocess import CompletedProcess
from typing import Any

import httpx
import msgspec
import psycopg
import pytest

from payments.cli.output import print_rows
from payments.database.connections import DatabaseAddress
from payments.setting_sources import read_settings
from payments.settings import VARIABLES
from tests.process import ServiceProcess, at, free_port, invoke, run, working
from tests.support import History, append, eventually
from web.auth import authenticate


def test_settings_lists_every_variable_and_hides_secrets() -> None:
    given = {"DATABASE_HOST": "db", "DATABASE_PASSWORD": "canary", "PORT": "4010"}
    table = invoke("settings", **given)
    assert (table.returncode, table.stderr) == (0, "")
    assert "canary" not in table.stdout
    assert all(name in table.stdout for name in VARIABLES)
    listed = {
        row["variable"]: row
        for row in json.loads(invoke("settings", "--format", "json", **given).stdout)
    }
    assert listed["PORT"]["value"] == "4010"
    assert listed["PORT"]["default"] == "4004"
    assert listed["DATABASE_PASSWORD"]["value"] == "(set, hidden)"


MARKUP = "/tmp/[old]/[/old]/[bold]x/:smile:/[link=a]b"


def test_settings_prints_values_as_they_are() -> None:
    """Brackets are no markup, and names between colons no pictures."""
    done = invoke("settings", PAYMENTS_DATA_DIR=MARKUP)
    assert (done.returncode, done.stderr) == (0, "")
    assert MARKUP in done.stdout


LONG = "a word " * 100 + "x" * 500


@pytest.mark.parametrize("environment", [{}, {"COLUMNS": "40"}, {"FORCE_COLOR": "1"}])
def test_off_a_terminal_no_line_is_wrapped(
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
    environment: dict[str, str],
) -> None:
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    print_rows(("first", "second", "third"), [("1", LONG, "end"), ("2", "b", LONG)], "table")
    header, *lines = capsys.readouterr().out.splitlines()
    assert re.findall(r"first|second|third", header) == ["first", "second", "third"]
    assert [line.split() for line in lines] == [
        ["1", *LONG.split(), "end"],
        ["2", "b", *LONG.split()],
    ]


def test_on_a_terminal_texts_are_wrapped_and_ids_are_not(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sys.stdout, "isatty", lambda: True)
    monkeypatch.setenv("COLUMNS", "50")
    monkeypatch.setenv("TERM", "dumb")  # no bold
    rows = [(str(uuid.uuid4()), "one two three " * 5, str(uuid.uuid4()))]
    print_rows(("first", "second", "third"), rows, "table")
    lines = capsys.readouterr().out.splitlines()
    assert [row.split()[0] for row in lines[:2]] == ["first", rows[0][0]]
    assert " ".join(lines).count(rows[0][2]) == 1
    assert len(lines) == 1 + 15
    rows[0] = ("1", "one two three", "2")
    print_rows(("first", "second", "third"), rows, "table")
    assert len(capsys.readouterr().out.splitlines()) == 2


FORGING = "a\nforged: b\r\x1b[2J\x1b]0;title\a \x9b31m\u202e\u2028\x7f\tend"


@pytest.mark.parametrize("form", ["table", "json"])
def test_no_value_forges_a_line_or_speaks_to_the_terminal(
    capsys: pytest.CaptureFixture[str], form: str
) -> None:
    print_rows(("first", "second"), [("1", FORGING), ("2", "é → 支付 🙂 \\n")], form)
    printed = capsys.readouterr().out
    assert all(line.isprintable() for line in printed.split("\n"))
    if form == "json":
        assert [row["second"] for row in json.loads(printed)] == [FORGING, "é → 支付 🙂 \\n"]
    else:
        _, forging, plain = printed.splitlines()
        assert forging.split()[1:] == [
            r"a\nforged:",
            r"b\r\x1b[2J\x1b]0;title\x07",
            r"\x9b31m\u202e\u2028\x7f\tend",
        ]
        assert plain.split() == ["2", "é", "→", "支付", "🙂", r"\n"]


BAD_STARTS: list[tuple[str, dict[str, str], str]] = [
    ("serve", {"PORT": "70000"}, "PORT: the value given must be a whole number from 1 to 65535"),
    ("serve", {"DATABASE_PASSWORD": "canary"}, "DATABASE_HOST"),
    ("work", {"SIMULATED_FAULTS": "explode", "DATABASE_HOST": "/nowhere"}, "SIMULATED_FAULTS"),
    ("work", {"GATEWAY": "nowhere.to:be"}, "GATEWAYS: 'nowhere.to:be' cannot be imported: Mod"),
    ("work", {"GATEWAY": "json:nothing"}, "GATEWAYS: 'json:nothing' cannot be imported: Attr"),
    ("work", {"GATEWAY": "json:loads"}, "GATEWAYS: 'json:loads' failed: TypeError"),
    (
        "work",
        {"GATEWAY": "builtins:repr"},
        "GATEWAYS: 'builtins:repr' returned no gateway: it lacks",
    ),
    (
        "work",
        {"GATEWAYS": "simulated,simulated-b", "GATEWAY_BY_CURRENCY": "USD:acme"},
        "GATEWAY_BY_CURRENCY: USD is to go to a provider that GATEWAYS does not name: there are "
        "simulated, simulated-b",
    ),
    ("work", {"GATEWAYS": "simulated", "GATEWAY": "json:loads"}, "GATEWAY and GATEWAYS name"),
    ("migrate", {"DATABASE_HOST": "/nowhere"}, "cannot connect to Postgres as postgres@/nowhere:5"),
    ("migrate", {"DATABASE_HOST": "127.0.0.1", "DATABASE_PORT": "1"}, "refused"),
    ("migrate", {"DATABASE_HOST": "postgres://u:canary@h/db"}, "DATABASE_HOST: the value given"),
]


@pytest.mark.parametrize(
    ("command", "settings", "words"), BAD_STARTS, ids=[words for *_, words in BAD_STARTS]
)
def test_a_start_that_cannot_be_is_one_line(
    command: str, settings: dict[str, str], words: str
) -> None:
    check_bad_start(invoke(command, **({"PORT": str(free_port())} | settings)), words)


def check_bad_start(done: CompletedProcess[str], words: str) -> None:
    assert done.returncode == 1
    (line,) = done.stderr.splitlines()
    assert line.startswith("payments: ")
    assert words in line
    assert "canary" not in line


def test_a_process_that_cannot_start_says_so_in_one_line() -> None:
    done = run("serve", PORT=free_port(), HOST="203.0.113.1")
    check_bad_start(done, "cannot listen on HOST '203.0.113.1'")


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
    done = invoke("migrate", **at(address) | {"DATABASE_USERNAME": "locked_out"})
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
    done = invoke("migrate", **at(missing))
    assert done.returncode == 1
    assert 'database "no_such_database" does not exist' in done.stderr


def test_wrong_arguments_exit_2() -> None:
    done = run("nonsense")
    assert (done.returncode, done.stdout) == (2, "")


def test_help_and_version() -> None:
    assert "migrate" in invoke("--help").stdout
    assert invoke("--version").returncode == 0


def test_a_new_api_key_fits_the_setting_that_is_printed_with_it() -> None:
    done = invoke("keys", "new", "orders")
    assert done.returncode == 0
    key, setting = done.stdout.splitlines()
    api_keys = read_settings({"PAYMENTS_API_KEYS": setting}).payments_api_keys
    assert authenticate([(b"authorization", f"Bearer {key}".encode())], api_keys) == "orders"
    assert key not in done.stderr
    assert len(key) >= 43  # 256 bits
    assert invoke("keys", "new", "orders").stdout.splitlines()[0] != key


@pytest.mark.parametrize(
    "name",
    [
        "",
        "default",
        "settling",
        "dispatcher",
        "fulfilment",
        "Orders",
        "a,b",
        "a:b",
        "x" * 65,
        "ä",
        "a\n",
        "-",
    ],
)
def test_a_name_that_the_setting_would_refuse_gets_no_key(name: str) -> None:
    done = invoke("keys", "new", "--", name)
    assert (done.returncode, done.stdout) == (2, "")
    assert "must " in done.stderr


def test_parked_streams_are_listed_and_retried(
    address: DatabaseAddress, connection: psycopg.Connection[Any]
) -> None:
    """The table is there for whoever the constraint kept out."""
    history, sound = History("k"), History("l")
    connection.execute(
        "ALTER TABLE payments ADD CONSTRAINT not_this CHECK (idempotency_key <> 'k')"
    )
    append(connection, history.charged().facts)
    append(connection, sound.charged().facts)
    with working(SIMULATED_LEDGER="", **at(address)):
        eventually(lambda: connection.execute("SELECT FROM parked_streams").fetchall())
    (row,) = json.loads(invoke("parked", "list", "--format", "json", **at(address)).stdout)
    assert (row["follower"], row["payment_id"]) == ("payments", str(history.id))
    assert "not_this" in row["reason"]
    assert str(history.id) in invoke("parked", "list", **at(address)).stdout

    refused = invoke("parked", "retry", "--all", **at(address))
    assert (refused.returncode, refused.stdout) == (1, "")
    assert f"still parked: {history.id}" in refused.stderr

    connection.execute("ALTER TABLE payments DROP CONSTRAINT not_this")
    done = invoke("parked", "retry", str(history.id), **at(address))
    assert (done.returncode, done.stdout) == (0, "")
    assert json.loads(invoke("parked", "list", "--format", "json", **at(address)).stdout) == []
    keys = connection.execute("SELECT idempotency_key FROM payments ORDER BY 1").fetchall()
    assert keys == [("k",), ("l",)]


HELD = """
SELECT pid FROM pg_stat_activity
 WHERE datname = current_database() AND wait_event_type = 'Lock'
"""


@pytest.fixture
def held(address: DatabaseAddress, connection: psycopg.Connection[Any]) -> Iterator[None]:
    """A stream is parked, and another process is in the middle of a long batch."""
    connection.execute("INSERT INTO parked_streams VALUES ('payments', gen_random_uuid(), 1, '')")
    with psycopg.connect(address.conninfo("tests")) as other:
        other.execute("SET idle_in_transaction_session_timeout = 0")
        other.execute("SELECT FROM followers WHERE name = 'payments' FOR UPDATE")
        yield


@pytest.mark.usefixtures("held")
def test_a_retry_whose_turn_does_not_come_is_one_line(address: DatabaseAddress) -> None:
    done = invoke("parked", "retry", "--all", **at(address), DATABASE_PASSWORD="canary")
    assert (done.returncode, done.stdout) == (1, "")
    assert done.stderr == (
        "payments: the database: canceling statement due to lock timeout: retry later\n"
    )


@pytest.mark.usefixtures("held")
def test_a_command_that_loses_its_database_is_one_line(
    address: DatabaseAddress, connection: psycopg.Connection[Any]
) -> None:
    with ThreadPoolExecutor() as pool:
        running = pool.submit(
            run, "parked", "retry", "--all", **at(address), DATABASE_PASSWORD="canary"
        )
        eventually(lambda: connection.execute(HELD).fetchall())
        connection.execute(f"SELECT pg_terminate_backend(pid) FROM ({HELD}) AS held".encode())
        done = running.result(timeout=30)
    assert (done.returncode, done.stdout) == (1, "")
    assert done.stderr == (
        "payments: the database: terminating connection due to administrator command: retry later\n"
    )


def test_a_payment_that_is_not_parked_cannot_be_retried(address: DatabaseAddress) -> None:
    unknown = str(uuid.uuid4())
    done = invoke("parked", "retry", unknown, **at(address))
    assert done.returncode == 1
    assert f"not parked: {unknown}" in done.stderr


@pytest.mark.parametrize(
    "arguments",
    [
        ("parked", "retry"),
        ("parked", "retry", "--all", str(uuid.UUID(int=1))),
        ("parked", "retry", "nonsense"),
        ("parked", "list", "--format", "xml"),
        ("serve", "--unknown"),
        ("settings", "x"),
    ],
    ids=" ".join,
)
def test_wrong_arguments_are_exit_code_2(arguments: tuple[str, ...]) -> None:
    done = invoke(*arguments)
    assert (done.returncode, done.stdout) == (2, "")


def test_the_api_without_the_work_and_the_work_without_the_api(
    address: DatabaseAddress, connection: psycopg.Connection[Any], tmp_path: Path
) -> None:
    with ServiceProcess(tmp_path, "--api-only", **at(address)) as service, httpx.Client() as client:
        payment_id = service.charge(client, "k").json()["id"]
        found = client.get(f"{service.url}/v1/payments/{payment_id}").json()
        assert found["status"] == "SUCCESS"
        listed = client.get(f"{service.url}/v1/payments").json()
        assert (listed["payments"], listed["position"]) == ([], 0)
        with working(PAYMENTS_DATA_DIR=tmp_path, **at(address)):
            eventually(lambda: connection.execute("SELECT FROM payments").fetchall())
        assert client.get(f"{service.url}/v1/payments").json()["payments"] == [found]
