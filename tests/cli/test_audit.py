"""`payments audit` and `payments rebuild` as their users see them: words and exit codes."""

import os
import pty
import re
import subprocess
import sys
import uuid
from collections.abc import Callable
from pathlib import Path

import pytest
from click.testing import Result

from payments.cli import progress
from payments.cli.audit import SHOWN_MAX
from payments.database.connections import DatabaseAddress
from payments.events.facts import encode
from payments.queries import verification
from tests.process import PAYMENTS, ROOT, at, environment, peak_mb
from tests.support import (
    Connection,
    History,
    append,
    append_stored,
    catch_up,
    log_id,
    stored_event,
)

Operator = Callable[..., Result]


@pytest.fixture
def payment(address: DatabaseAddress, connection: Connection) -> History:
    """Four events of one payment, sealed; and six of others."""
    history = History("k").charged().refunded("r1", 500)
    others = [History(f"o{n}", client="orders").charged() for n in range(3)]
    append(connection, [*history.facts, *(fact for each in others for fact in each.facts)])
    catch_up(address)
    return history


def test_a_sound_database(operator: Operator, payment: History, connection: Connection) -> None:
    id = log_id(connection)
    head = operator("audit", "head")
    assert (head.exit_code, head.stderr) == (0, f"the head of log {id}\n")
    assert re.fullmatch(r"10:[0-9a-f]{64}\n", head.stdout)
    done = operator("audit", "verify", "--head", head.stdout.strip(), "--log", id)
    assert (done.exit_code, done.stderr) == (0, "")
    assert done.stdout.splitlines() == [
        f"log: 10 events, id {id}",
        f"head: {head.stdout.strip()}",
        "tables: 4 payments compared with the log up to position 10",
        "nothing was found",
    ]


def test_findings_are_lines(operator: Operator, payment: History, connection: Connection) -> None:
    connection.execute("ALTER TABLE payment_events DISABLE TRIGGER ALL")
    connection.execute("UPDATE payment_events SET recorded_at = now() WHERE notification_id = 7")
    connection.execute("UPDATE payments SET amount_cents = 15 WHERE id = %s", [payment.id])
    connection.execute("DELETE FROM refunds")
    connection.execute(
        "UPDATE payment_clients SET client = E'evil\\nline' WHERE payment_id ="
        " (SELECT min(payment_id::text)::uuid FROM payment_clients)"
    )
    done = operator("audit", "verify")
    assert done.exit_code == 1
    printed = done.stdout.splitlines()
    assert printed[0] == "position 7: the event is not the one that was sealed"
    assert "guard: the trigger payment_events_append_only on payment_events is disabled" in printed
    assert f"payments {payment.id}: amount_cents is 15, the log says 1500" in printed
    assert f"refunds {payment.payment.refunds[0].id}: missing from the table" in printed
    assert sum("client is evil\\nline, the log says orders" in line for line in printed) == 1
    assert printed[-1] == "findings: 5"


def test_many_findings_are_counted(
    operator: Operator, address: DatabaseAddress, connection: Connection
) -> None:
    many = SHOWN_MAX + 17
    append(connection, [History(f"k{n}").facts[0] for n in range(many)])
    catch_up(address)
    connection.execute("DELETE FROM payments")
    done = operator("audit", "verify")
    assert (done.exit_code, done.stdout.count("missing from the table")) == (1, SHOWN_MAX)
    assert "and 17 more like these" in done.stdout
    assert done.stdout.endswith(f"findings: {many}\n")


def test_another_log_is_a_finding(
    operator: Operator, payment: History, connection: Connection
) -> None:
    other = uuid.uuid4()
    done = operator("audit", "verify", "--log", other)
    assert done.exit_code == 1
    line = f"log: its id is {log_id(connection)}, not {other}: is this the right database?"
    assert done.stdout.splitlines()[0] == line
    assert done.stdout.endswith("findings: 1\n")


def test_a_log_without_an_id_is_a_finding(
    operator: Operator, payment: History, connection: Connection
) -> None:
    connection.execute("ALTER TABLE log_identity DISABLE TRIGGER ALL")
    connection.execute("DELETE FROM log_identity")
    connection.execute("ALTER TABLE log_identity ENABLE ALWAYS TRIGGER log_identity_append_only")
    done = operator("audit", "verify")
    assert done.exit_code == 1
    assert done.stdout.splitlines()[:2] == ["log: its id is missing", "log: 10 events"]


def test_an_empty_log_is_a_finding(operator: Operator) -> None:
    """Whoever audits a new database, and not the one that was meant, must not be put at ease."""
    done = operator("audit", "verify")
    assert done.exit_code == 1
    assert done.stdout.splitlines()[0] == (
        "position 1: the log is empty: is this the right database?"
    )


@pytest.mark.parametrize("positions", [1, 3, 10_000])
def test_two_payments_of_one_capture_are_a_finding(
    operator: Operator,
    payment: History,
    address: DatabaseAddress,
    connection: Connection,
    monkeypatch: pytest.MonkeyPatch,
    positions: int,
) -> None:
    """One of them is not what was paid, however many positions are looked at at once. Nobody
    appends it any more; here software from before."""
    monkeypatch.setattr(verification, "CAPTURES_POSITIONS", positions)
    other = History("other").charged()
    named = f"txn-{payment.id}"
    state = encode(other.facts[1]).replace(f"txn-{other.id}".encode(), named.encode())
    append(connection, other.facts[:1])
    connection.execute(
        "INSERT INTO payment_events SELECT 12, %s, 2, 'PaymentCharged', %s, now()",
        [other.id, state],
    )
    # What cannot be read names none.
    append_stored(connection, [stored_event(None, 1, b"{", "PaymentCharged") for _ in "ab"])
    catch_up(address)
    done = operator("audit", "verify")
    assert done.exit_code == 1
    assert done.stdout.splitlines()[0] == (
        f"payment {other.id}: names the provider's transaction {named}, "
        f"as payment {payment.id} does"
    )
    assert done.stdout.endswith("findings: 1\n")


def test_a_payment_that_is_parked_by_hand_is_a_finding(
    operator: Operator, payment: History, connection: Connection
) -> None:
    """Its rows are compared as they were before: that hides what is done to them."""
    connection.execute("INSERT INTO parked_streams VALUES ('payments', %s, 3, '')", [payment.id])
    connection.execute("DELETE FROM refunds")
    connection.execute(
        "UPDATE payments SET updated_at = created_at + interval '1 s' WHERE id = %s", [payment.id]
    )
    done = operator("audit", "verify")
    assert done.exit_code == 1
    line = f"payment {payment.id}: parked by payments although its events can be read: "
    assert f"{line}`payments parked retry {payment.id}`" in done.stdout.splitlines()
    assert done.stdout.endswith("findings: 1\n")
    assert operator("parked", "retry", payment.id).exit_code == 0
    assert connection.execute("SELECT FROM refunds").rowcount == 1
    assert operator("audit", "verify").exit_code == 0


def test_what_is_parked_or_not_sealed_is_told_and_no_finding(
    operator: Operator, payment: History, address: DatabaseAddress, connection: Connection
) -> None:
    append_stored(connection, [stored_event(payment.id, 5, b"{", "PaymentRefunded")])

    catch_up(address, seal=False)
    done = operator("audit", "verify")
    assert done.exit_code == 0
    assert "log: 11 events, 1 not sealed yet" in done.stdout
    assert "1 payments are parked" in done.stdout


@pytest.mark.parametrize(
    "arguments",
    [
        ("verify", "--head", "10"),
        ("verify", "--head", f"0:{'0' * 64}"),
        ("verify", "--head", f"5:{'0' * 63}"),
        ("verify", "--head", f"5:{'g' * 64}"),
        ("verify", "--head", f"5:{'0' * 64}", "--head", f"5:{'1' * 64}"),
        ("verify", "--log", "5"),
        ("verify", "--export", "/nowhere/to/be/found"),
        ("verify", "extra"),
        ("head", "extra"),
        ("heal",),
    ],
)
def test_wrong_arguments(operator: Operator, arguments: tuple[str, ...]) -> None:
    done = operator("audit", *arguments)
    assert (done.exit_code, done.stdout) == (2, "")


def test_it_could_not_check(
    operator: Operator, monkeypatch: pytest.MonkeyPatch, connection: Connection
) -> None:
    assert operator("audit", "head").stderr.startswith("payments: nothing is sealed yet")
    connection.execute("DELETE FROM schema_migrations WHERE number = 4")
    lacking = operator("audit", "verify")
    assert (lacking.exit_code, lacking.stdout) == (2, "")
    assert "the database lacks 0004_audit" in lacking.stderr
    monkeypatch.setenv("DATABASE_PORT", "1")
    monkeypatch.setenv("DATABASE_HOST", "127.0.0.1")
    monkeypatch.setenv("DATABASE_PASSWORD", "canary")
    away = operator("audit", "verify")
    assert (away.exit_code, away.stdout) == (2, "")
    assert away.stderr.startswith("payments: could not check: cannot connect to Postgres")
    assert away.stderr.count("\n") == 1
    assert "canary" not in away.stderr
    monkeypatch.setenv("PORT", "many")
    assert operator("audit", "verify").exit_code == 2


def test_an_export_needs_no_database(
    operator: Operator, payment: History, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    export, head = operator("replay").stdout_bytes, operator("audit", "head").stdout.strip()
    path = tmp_path / "log.jsonl"
    path.write_bytes(export)
    monkeypatch.setenv("DATABASE_HOST", "/nowhere")
    done = operator("audit", "verify", "--export", path, "--head", head)
    assert (done.exit_code, done.stderr) == (0, "")
    assert done.stdout.splitlines() == ["log: 10 events", f"head: {head}", "nothing was found"]
    assert operator("audit", "verify", "--export", "-", text=export).exit_code == 0
    unknown = operator("audit", "verify", "--export", path, "--log", uuid.uuid4())
    assert (unknown.exit_code, unknown.stdout) == (2, "")
    assert "an export does not contain the log's id" in unknown.stderr
    path.write_bytes(export.replace(b'"amount_cents":500', b'"amount_cents":50', 1))
    altered = operator("audit", "verify", "--export", path)
    assert altered.exit_code == 1
    assert altered.stdout.splitlines()[0].startswith("position 3: the event is not the one")


@pytest.mark.parametrize(
    ("text", "words"),
    [
        (b"", "the export contains no event"),
        (b"position,payment_id\n", "line 1 is not an event of an export"),
    ],
)
def test_what_is_no_export(operator: Operator, text: bytes, words: str) -> None:
    done = operator("audit", "verify", "--export", "-", text=text)
    assert (done.exit_code, done.stdout) == (2, "")
    assert words in done.stderr


def test_an_export_of_what_is_not_sealed(operator: Operator, connection: Connection) -> None:
    append(connection, History("k").facts)
    done = operator("audit", "verify", "--export", "-", text=operator("replay").stdout_bytes)
    assert done.exit_code == 2
    assert "none of its events is sealed" in done.stderr


def test_the_documented_program_checks_an_export(
    operator: Operator, payment: History, connection: Connection, address: DatabaseAddress
) -> None:
    """The one in docs/audit.md, which has none of our code."""
    append_stored(connection, [stored_event(state=b"\xff\n", topic="Größe")])
    catch_up(address)
    (program,) = re.findall(r"```python\n(.*?)```", (ROOT / "docs/audit.md").read_text(), re.DOTALL)
    export, head = operator("replay").stdout_bytes, operator("audit", "head").stdout

    def check(text: bytes) -> subprocess.CompletedProcess[str]:
        return subprocess.run(
            [sys.executable, "-c", program, "/dev/stdin"],
            input=text.decode(),
            capture_output=True,
            text=True,
            timeout=20,
            check=False,
        )

    sound = check(export)
    assert (sound.returncode, sound.stdout, sound.stderr) == (0, head, "")
    altered = check(export.replace(b'"amount_cents":500', b'"amount_cents":50', 1))
    assert (altered.returncode, altered.stdout) == (1, "")
    assert altered.stderr == "position 3 is not as it was sealed\n"


def test_rebuild(operator: Operator, payment: History, connection: Connection) -> None:
    connection.execute("UPDATE payments SET amount_cents = 15 WHERE id = %s", [payment.id])
    looked = operator("rebuild", "--dry-run")
    assert (looked.exit_code, looked.stderr) == (1, "")
    first = f"payments {payment.id}: amount_cents is 15, the log says 1500"
    assert looked.stdout.splitlines()[:3] == [
        first,
        "compared: 4 payments with the log, up to position 10",
        "differ: 1 rows of payments",
    ]
    row = ["payments", "SUCCESS", "INR", "4", "6000", "4", "4515"]
    assert row in [line.split() for line in looked.stdout.splitlines()]
    done = operator("rebuild", "--projection", "payments")
    assert (done.exit_code, done.stderr) == (0, "")
    assert "written: 1 rows of payments\n" in done.stdout
    assert "replaced: 1 rows, kept in replaced_rows\n" in done.stdout
    row = ["payments", "SUCCESS", "INR", "4", "6000", "4", "6000"]
    assert row in [line.split() for line in done.stdout.splitlines()]
    assert operator("rebuild", "--dry-run").exit_code == 0
    assert operator("rebuild", "--projection", "callbacks").exit_code == 2


def test_rebuild_where_a_payment_cannot_be_read(
    operator: Operator, payment: History, connection: Connection
) -> None:
    connection.execute("ALTER TABLE payment_events DISABLE TRIGGER ALL")
    connection.execute("UPDATE payment_events SET state = '{' WHERE notification_id = 2")
    done = operator("rebuild")
    assert done.exit_code == 1
    assert "not readable, not changed: 1 payments" in done.stdout


def test_it_calls_nobody_back_and_asks_no_provider(
    operator: Operator,
    payment: History,
    connection: Connection,
    monkeypatch: pytest.MonkeyPatch,
    tmp_path: Path,
) -> None:
    """Nor does it need either: the provider's settings are wrong, and nobody listens."""
    monkeypatch.setenv("ORDER_CALLBACK_URL", "http://127.0.0.1:1/callback")
    monkeypatch.setenv("GATEWAY", "nowhere.to_be:found")
    connection.execute("TRUNCATE payments, refunds, payment_clients, unsettled_payments")
    for arguments in (("rebuild",), ("replay",), ("audit", "verify"), ("explain", payment.id)):
        assert operator(*arguments).exit_code == 0
    for table in ("callback_deliveries", "callback_lanes", "callback_attempts"):
        assert not connection.execute(f"SELECT FROM {table}".encode()).fetchall()


def test_progress_off_a_terminal_is_a_line_now_and_then(
    operator: Operator,
    address: DatabaseAddress,
    connection: Connection,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    append(connection, [History(f"k{n}").facts[0] for n in range(30)])
    catch_up(address)
    monkeypatch.setattr(progress, "LINE_EVERY_S", 0.0)
    monkeypatch.setattr("payments.projections.comparison.PROGRESS_EVERY", 10)
    done = operator("rebuild", "--dry-run")
    lines = done.stderr.splitlines()
    assert len(lines) == 3
    for line, events in zip(lines, (10, 20, 30), strict=True):
        assert re.fullmatch(rf"compare: {events} of 30(, [\d,]+/s, \d+ s left)?", line), line


def test_progress_on_a_terminal_is_a_bar(address: DatabaseAddress, connection: Connection) -> None:
    append(connection, [fact for n in range(6000) for fact in History(f"k{n}").facts])
    catch_up(address)
    terminal, theirs = pty.openpty()
    process = subprocess.Popen(
        [*PAYMENTS, "rebuild", "--dry-run"],
        env=environment(**at(address), TERM="xterm", COLUMNS=100),
        stdout=subprocess.PIPE,
        stderr=theirs,
    )
    os.close(theirs)
    shown = b""
    try:
        while read := os.read(terminal, 4096):
            shown += read
    except OSError:  # its end
        pass
    finally:
        os.close(terminal)
    printed, _ = process.communicate(timeout=20)
    assert process.returncode == 0
    assert b"5000/6000" in shown.replace(b" ", b"")
    assert "━".encode() in shown
    assert b"compared: 6,000 payments" in printed


def test_memory_stays_the_same_however_long_the_log_is(
    address: DatabaseAddress, connection: Connection
) -> None:
    """20 MB of events and 20 MB of rows fill what they read at once; as much again is no more."""
    commands = (("audit", "verify"), ("rebuild",))
    connection.execute("SET statement_timeout = 0")

    def lengthen(first: int, last: int) -> None:
        """By events that cannot be read, and rows that the log does not know of: `rebuild` removes
        those, so all of them are there again."""
        connection.execute(
            "INSERT INTO payment_events"
            " SELECT n, md5(n::text)::uuid, 1, 'PaymentInitiated',"
            " convert_to(repeat('x', 1000), 'UTF8'), now()"
            " FROM generate_series(%s::int, %s::int) n",
            [first, last],
        )
        connection.execute(
            "INSERT INTO payments (id, provider_txn_id) SELECT md5(('p' || n)::text)::uuid,"
            " repeat('x', 1000) FROM generate_series(1, %s::int) n ON CONFLICT DO NOTHING",
            [last],
        )
        connection.execute("UPDATE followers SET position = %s WHERE name = 'payments'", [last])

    lengthen(1, 20_000)
    half = [peak_mb(*command, **at(address)) for command in commands]
    lengthen(20_001, 40_000)
    for command, before in zip(commands, half, strict=True):
        assert peak_mb(*command, **at(address)) < before + 20, command
