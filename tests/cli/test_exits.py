"""Exit codes of real processes: 1 of a check is a finding and nothing else."""

import importlib
import io
import os
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import click
import psycopg
import pytest
from click.testing import Result

from payments.cli import main
from payments.cli.exits import OutputError, _SilentStderr, _Stdout
from payments.cli.output import print_rows
from payments.database.connections import DatabaseAddress
from tests.process import PAYMENTS, at, environment, run, run_to
from tests.support import (
    ORDER_ID,
    History,
    append,
    append_stored,
    catch_up,
    eventually,
    stored_event,
)

Connection = psycopg.Connection[Any]
Operator = Callable[..., Result]

PAYMENT = History("k").charged().refunded("r1", 500)
CHECKS = ["audit verify", "rebuild --dry-run"]
EVENT = PAYMENT.facts[1].event_id
ALL_TIMES = "--from 2020-01-01T00:00:00Z --to 2100-01-01T00:00:00Z"
PRINTING = [
    *CHECKS,
    *("doctor", "audit head", "rebuild", "settings", "settings --format json", "keys new orders"),
    *(f"replay --format {form}" for form in ("jsonl", "csv", "table")),
    *(f"replay --as-of 2 --order {ORDER_ID} --format {form}" for form in ("jsonl", "csv", "table")),
    *(
        "replay --follow --limit 1",
        f"export {ALL_TIMES}",
        "parked list",
        "parked list --format json",
    ),
    *(f"explain {PAYMENT.id}", f"explain {PAYMENT.id} --format json"),
    *("callbacks list", "callbacks list --format json", f"callbacks redrive {EVENT}"),
    *(f"callbacks show {EVENT}", f"callbacks show {EVENT} --format json"),
    *("callbacks backfill --from 1", "log accept-loss --by Ada --reason test"),
    *("--help", "--version", "audit verify --help"),
]


@pytest.fixture
def log(address: DatabaseAddress, connection: Connection) -> DatabaseAddress:
    append(connection, PAYMENT.facts)
    catch_up(address)
    fill(connection)
    return address


def fill(connection: Connection) -> None:
    """There is a callback to show, and a loss to accept."""
    connection.execute(
        "INSERT INTO callback_deliveries (event_id, position, order_id, payment_id, sequence,"
        " status, amount_cents, currency, occurred_at, state, finished_at)"
        " VALUES (%s, 2, %s, %s, 2, 'SUCCESS', 1500, 'INR', now(), 'dead', now())",
        [EVENT, ORDER_ID, PAYMENT.id],
    )
    connection.execute(
        "INSERT INTO callback_attempts (event_id, claim, started_at, seconds, outcome, status,"
        " answer) VALUES (%s, 1, now(), 0.0125, 'http_error', 500, %s)",
        [EVENT, "Zürich 支付".encode()],
    )


def lose(connection: Connection) -> None:
    connection.execute(
        "INSERT INTO log_losses (kind, by, reason, kept_position, lost_position,"
        " head_position) VALUES ('found', 'tests', 'lacks', 2, 9, 4)"
    )


def printing_to(
    stdout: int, command: str, address: DatabaseAddress, **settings: object
) -> subprocess.CompletedProcess[str]:
    given = at(address) | settings
    return run_to(stdout, *command.split(), LOG_LEVEL="WARNING", **given)


def one_line(done: subprocess.CompletedProcess[str], words: str) -> None:
    assert done.stderr.startswith("payments: ")
    assert words in done.stderr
    assert done.stderr.count("\n") == 1


CALLBACK = "http://127.0.0.1:1/callback"


@pytest.mark.parametrize("part", range(4))
def test_a_full_disk_and_a_reader_that_is_gone(
    log: DatabaseAddress, connection: Connection, part: int
) -> None:
    """Of whatever prints, it is no finding, and nothing is taken for whole that is not."""
    for command in PRINTING[part::4]:
        if command.startswith("log"):
            lose(connection)
        with Path("/dev/full").open("w") as full:
            done = printing_to(full.fileno(), command, log, ORDER_CALLBACK_URL=CALLBACK)
        assert done.returncode == 2, (command, done.stderr)
        *talk, told = done.stderr.splitlines()
        assert told.endswith("the output cannot be written: No space left on device"), command
        assert told.startswith("payments: ")
        assert len(talk) == (command == "keys new orders")
    for command in PRINTING[part:12:4]:  # it is found out in the same place
        reading, writing = os.pipe()
        os.close(reading)
        try:
            done = printing_to(writing, command, log)
        finally:
            os.close(writing)
        assert done.returncode == 2, (command, done.stderr)
        assert done.stderr.endswith("the output cannot be written: Broken pipe\n"), command


def leaves(group: click.Group, path: str = "") -> Iterator[str]:
    """Every command by its whole name."""
    context = click.Context(group)
    for name in group.list_commands(context):
        command = group.get_command(context, name)
        if isinstance(command, click.Group):
            yield from leaves(command, f"{path}{name} ")
        else:
            yield f"{path}{name}"


def test_every_command_that_prints_is_among_them() -> None:
    """The others print nothing, are other programs, or need an Order Service, a brake that was
    pulled, or the Node service's table."""
    silent = {"serve", "work", "migrate", "parked retry", "dump", "restore", "psql"}
    silent |= {"callbacks test", "reconcile orders", "giving-back resume", "import-legacy"}
    assert {
        name
        for name in leaves(main)
        if not any(f"{each} ".startswith(f"{name} ") for each in PRINTING)
    } == silent


@pytest.mark.parametrize("unbuffered", ["", "1"])
@pytest.mark.parametrize("command", ["audit verify", "replay"])
def test_whether_python_buffers_does_not_matter(
    log: DatabaseAddress, command: str, unbuffered: str
) -> None:
    with Path("/dev/full").open("w") as full:
        done = printing_to(full.fileno(), command, log, PYTHONUNBUFFERED=unbuffered)
    assert done.returncode == 2, done.stderr
    one_line(done, "the output cannot be written: No space left on device")


def test_what_is_too_large_for_a_buffer() -> None:
    with Path("/dev/full").open("w") as full:
        out, err = (
            kind(io.FileIO(full.fileno(), "w", closefd=False)) for kind in (_Stdout, _SilentStderr)
        )
        with pytest.raises(OutputError, match="the output cannot be written: No space left"):
            out.write(bytes(100_000))
        assert err.write(bytes(100_000)) == 100_000


@pytest.mark.parametrize("command", ["audit verify", "doctor", "replay", "settings", "--help"])
def test_a_stdout_that_is_closed(log: DatabaseAddress, command: str) -> None:
    done = subprocess.run(
        ["/bin/sh", "-c", 'exec "$@" >&-', "sh", *PAYMENTS, *command.split()],
        env=environment(**at(log), LOG_LEVEL="WARNING"),
        stderr=subprocess.PIPE,
        text=True,
        timeout=60,
        check=False,
    )
    assert done.returncode == 2, done.stderr
    one_line(done, "the output cannot be written: Bad file descriptor")


def test_a_stdin_that_is_closed() -> None:
    done = subprocess.run(
        ["/bin/sh", "-c", 'exec "$@" <&-', "sh", *PAYMENTS, "audit", "verify", "--export", "-"],
        env=environment(),
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )
    assert done.returncode == 2, done.stderr
    one_line(done, "could not check: the export contains no event")


def test_what_prints_nothing_needs_no_stdout(address: DatabaseAddress) -> None:
    with Path("/dev/full").open("w") as full:
        assert printing_to(full.fileno(), "migrate", address).returncode == 0


@pytest.mark.parametrize("redirected", ["2>/dev/full", "2>&-"])
def test_whom_nobody_can_tell_fails_all_the_same(log: DatabaseAddress, redirected: str) -> None:
    """And what succeeds does."""
    for command, code in (("audit verify", 0), ("audit head", 0), ("audit verify extra", 2)):
        done = subprocess.run(
            ["/bin/sh", "-c", f'exec "$@" {redirected}', "sh", *PAYMENTS, *command.split()],
            env=environment(**at(log)),
            stdout=subprocess.PIPE,
            timeout=60,
            check=False,
        )
        assert done.returncode == code, command


def in_encoding(
    encoding: str, command: str, address: DatabaseAddress
) -> subprocess.CompletedProcess[bytes]:
    return subprocess.run(
        [*PAYMENTS, *command.split()],
        env=environment(**at(address), PYTHONIOENCODING=encoding),
        capture_output=True,
        timeout=60,
        check=False,
    )


@pytest.mark.parametrize("encoding", ["ascii", "latin-1", "utf-8"])
def test_programs_get_utf_8_in_every_form(log: DatabaseAddress, encoding: str) -> None:
    """Python writes in what PYTHONIOENCODING says, and raises for the rest."""
    for command in (f"callbacks show {EVENT}", f"explain {PAYMENT.id}"):
        for form in ("", " --format json"):
            done = in_encoding(encoding, command + form, log)
            assert (done.returncode, done.stderr) == (0, b""), command
            assert "支付" in done.stdout.decode(), command


def test_a_table_of_the_log_too(log: DatabaseAddress, connection: Connection) -> None:
    append_stored(connection, [stored_event(topic="Überwiesen")])
    done = in_encoding("ascii", "replay --format table", log)
    assert (done.returncode, done.stderr) == (0, b"")
    assert "Überwiesen" in done.stdout.decode()


class Gone(io.TextIOBase):
    def write(self, text: str) -> int:
        if text:
            raise BrokenPipeError
        return 0


def test_a_table_that_nobody_reads_does_not_end_the_process(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Rich would, with an exit code that is a finding of `rebuild --dry-run`."""
    monkeypatch.setattr(sys, "stdout", Gone())
    with pytest.raises(BrokenPipeError):
        print_rows(("first", "second"), [("1", "2")], "table")


@pytest.fixture
def checking(
    log: DatabaseAddress, connection: Connection, request: pytest.FixtureRequest
) -> Iterator[subprocess.Popen[str]]:
    """A check that is in the middle of it."""
    connection.execute(
        "ALTER TABLE payments RENAME TO sound;"
        " CREATE VIEW payments AS SELECT sound.* FROM sound, pg_sleep(15)"
    )
    process = subprocess.Popen(
        [*PAYMENTS, *request.param.split()],
        env=environment(**at(log), LOG_LEVEL="ERROR"),
        stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
        text=True,
    )
    eventually(lambda: connection.execute(SLEEPING).fetchall())
    yield process
    process.kill()
    process.communicate(timeout=10)


SLEEPING = """
SELECT pid FROM pg_stat_activity
 WHERE datname = current_database() AND wait_event = 'PgSleep'
"""


@pytest.mark.parametrize("checking", CHECKS, indirect=True)
def test_control_c(checking: subprocess.Popen[str]) -> None:
    checking.send_signal(signal.SIGINT)
    _, told = checking.communicate(timeout=40)
    assert (checking.returncode, told) == (2, "payments: could not check: interrupted\n")


@pytest.mark.parametrize("checking", CHECKS, indirect=True)
def test_the_database_goes_away(checking: subprocess.Popen[str], connection: Connection) -> None:
    connection.execute(f"SELECT pg_terminate_backend(pid) FROM ({SLEEPING}) AS found".encode())
    _, told = checking.communicate(timeout=40)
    assert checking.returncode == 2
    assert told.startswith("payments: could not check: the database: terminating connection")
    assert told.count("\n") == 1


@pytest.mark.parametrize("command", CHECKS)
@pytest.mark.parametrize(
    ("statement", "words"),
    [
        (
            "ALTER TABLE payments DROP COLUMN currency",
            'the database: column "currency" does not exist: '
            "does the schema match this version? `payments doctor`",
        ),
        # An error that no other command expects.
        (
            "ALTER TABLE payments RENAME TO sound; CREATE VIEW payments AS"
            " SELECT id, merchant_order_id, idempotency_key, amount_cents / 0 AS amount_cents,"
            " currency, status, provider_txn_id, created_at, updated_at FROM sound",
            "the database: division by zero",
        ),
    ],
    ids=["a column", "a division"],
)
def test_a_query_that_fails(
    log: DatabaseAddress, connection: Connection, command: str, statement: str, words: str
) -> None:
    connection.execute(statement.encode())
    done = run(*command.split(), **at(log), LOG_LEVEL="ERROR")
    assert done.returncode == 2
    assert done.stderr == f"payments: could not check: {words}\n"


@pytest.mark.parametrize(
    "command",
    [
        "rebuild",
        f"parked retry {PAYMENT.id}",
        f"callbacks redrive {PAYMENT.facts[1].event_id}",
        "callbacks backfill --from 1",
        "log accept-loss --by Ada --reason test",
    ],
    ids=["rebuild", "parked", "redrive", "backfill", "log"],
)
def test_a_database_that_refuses_to_write(
    log: DatabaseAddress, connection: Connection, command: str
) -> None:
    lose(connection)
    connection.execute("INSERT INTO parked_streams VALUES ('payments', %s, 1, '')", [PAYMENT.id])
    read_only = f"ALTER DATABASE {log.dbname} SET default_transaction_read_only = on"
    connection.execute(read_only.encode())
    url = "http://127.0.0.1:1/callback"
    done = run(*command.split(), **at(log), LOG_LEVEL="ERROR", ORDER_CALLBACK_URL=url)
    assert done.returncode == 1, done
    one_line(done, "the database refuses writes: it is a standby, or read-only")


TOO_LARGE = "99999999999999999999"


@pytest.mark.parametrize(
    "command",
    [
        *(f"replay --limit {TOO_LARGE}", f"replay --limit {2**63}", "replay --limit 0"),
        *("replay --limit -1", f"replay --from {TOO_LARGE}", f"replay --until {2**63}"),
        *(f"replay --as-of {TOO_LARGE} --payment {PAYMENT.id}", "replay --from 0"),
        *(f"callbacks list --limit {TOO_LARGE}", "callbacks list --limit 0"),
        *(f"callbacks backfill --from {TOO_LARGE}", f"callbacks backfill --from {2**63}"),
        *("callbacks backfill --from 0", f"audit verify --head {TOO_LARGE}:{'a' * 64}"),
        f"log accept-loss --by A --reason B --head {TOO_LARGE}:{'a' * 64}",
    ],
)
def test_a_number_out_of_range(operator: Operator, command: str) -> None:
    done = operator(*command.split())
    assert (done.exit_code, done.stdout) == (2, "")


LARGEST = 2**63 - 1


@pytest.mark.parametrize(
    ("command", "lines"),
    [
        (f"replay --limit {LARGEST}", 4),
        (f"replay --from 2 --until {LARGEST}", 3),
        (f"replay --from {LARGEST} --until {LARGEST}", 0),
        (f"replay --from {LARGEST} --type PaymentCharged", 0),
        (f"replay --as-of {LARGEST} --payment {PAYMENT.id}", 1),
        ("replay --from 0001-01-01T00:00:00Z --until 9999-12-31T23:59:59.999999Z", 4),
        (f"replay --as-of 9999-12-31T23:59:59Z --payment {PAYMENT.id}", 1),
        ("callbacks redrive --since 0001-01-01T00:00:00Z", 1),
        ("callbacks redrive --since 9999-12-31T23:59:59Z", 1),
        ("callbacks list --limit 100000", 2),
    ],
)
def test_a_number_or_time_at_its_end(
    operator: Operator, log: DatabaseAddress, command: str, lines: int
) -> None:
    done = operator(*command.split())
    assert (done.exit_code, done.stderr) == (0, ""), done.output
    assert done.stdout.count("\n") == lines


@pytest.mark.parametrize("command", CHECKS)
def test_settings_that_are_wrong(command: str) -> None:
    done = run(*command.split(), PORT="many")
    assert done.returncode == 2
    one_line(done, "could not check: PORT")


@pytest.mark.parametrize(
    ("command", "defective"),
    [
        (("audit", "verify"), "places_of"),
        (("audit", "verify", "--export", "-"), "places_in"),
        (("rebuild", "--dry-run"), "check"),
    ],
)
def test_a_defect_is_no_finding(
    operator: Operator,
    monkeypatch: pytest.MonkeyPatch,
    command: tuple[str, ...],
    defective: str,
) -> None:
    def fail(*_: object) -> None:
        raise ZeroDivisionError("on two\nlines")

    module = importlib.import_module(f"payments.cli.{command[0]}")
    monkeypatch.setattr(module, defective, fail)
    done = operator(*command)
    assert (done.exit_code, done.stdout) == (2, "")
    last = done.stderr.splitlines()[-1]
    assert last == r"payments: could not check: ZeroDivisionError: on two\nlines"


def test_the_traceback_of_a_defect_is_for_who_asks_for_it(
    log: DatabaseAddress, tmp_path: Path
) -> None:
    """Also where no settings are read: an export is checked anywhere."""
    (tmp_path / "sitecustomize.py").write_text(
        "import payments.queries.verification as verification\n"
        "def fail(*_): raise LookupError('defect')\n"
        "verification.read_line = verification.LogEntry._make = verification.seal = fail\n"
    )
    export = tmp_path / "log.jsonl"
    export.write_text("{}\n")
    path = f"{tmp_path}:{os.environ.get('PYTHONPATH', '')}"
    told = "payments: could not check: LookupError: defect\n"
    done = run("audit", "verify", "--export", str(export), PYTHONPATH=path)
    assert (done.returncode, done.stdout, done.stderr) == (2, "", told)
    for level, shown in (("INFO", False), ("DEBUG", True)):
        done = run("audit", "verify", **at(log), PYTHONPATH=path, LOG_LEVEL=level)
        assert (done.returncode, done.stdout) == (2, "")
        assert done.stderr.endswith(told)
        assert ("Traceback" in done.stderr) is shown
