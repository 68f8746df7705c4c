"""`payments replay` and `payments explain`: the log as it is, in part, and as of a moment."""

import asyncio
import base64
import csv
import io
import json
import re
import signal
import subprocess
import uuid
from collections.abc import Callable, Iterator
from datetime import UTC, datetime, timedelta
from typing import Any

import msgspec
import psycopg
import pytest
from click.testing import Result
from hypothesis import given
from hypothesis import strategies as st

from payments.cli.output import csv_line
from payments.database.connections import Database, DatabaseAddress
from payments.events.chain import GENESIS, read_line, seal, write_line
from payments.events.store import LogEntry
from tests.process import PAYMENTS, ROOT, at, environment, peak_mb
from tests.support import ORDER_ID, History, append, append_stored, seal_log, spread, stored_event

Connection = psycopg.Connection[Any]
Operator = Callable[..., Result]
OTHER_ORDER = uuid.UUID("0d2c7d5e-0f0f-4b64-9e0b-6cbb3a3c6d11")


@pytest.fixture
def payments(connection: Connection) -> dict[str, History]:
    """Three payments of two orders, interleaved; positions 1 to 8."""
    known = {
        "refunded": History("k1").charged().refunded("r1", 500),
        "declined": History("k2").declined("insufficient_funds"),
        "other": History("k3", order_id=OTHER_ORDER, client="orders").charged(),
    }
    first = [history.facts[0] for history in known.values()]
    rest = [fact for history in known.values() for fact in history.facts[1:]]
    append(connection, [*first, *rest])
    return known


def lines(result: Result) -> list[dict[str, Any]]:
    assert result.exit_code == 0, result.output
    return [json.loads(line) for line in result.stdout.splitlines()]


def positions(result: Result) -> list[int]:
    return [line["position"] for line in lines(result)]


def test_a_line_holds_the_stored_bytes_and_the_seal(
    operator: Operator,
    payments: dict[str, History],
    connection: Connection,
    address: DatabaseAddress,
) -> None:
    assert [line["hash"] for line in lines(operator("replay"))] == [None] * 8
    asyncio.run(seal_log(Database(address, 1)))
    printed = operator("replay").stdout.encode().splitlines()
    stored = connection.execute(
        "SELECT notification_id, originator_id, originator_version, topic, state, recorded_at"
        "  FROM payment_events ORDER BY notification_id"
    ).fetchall()
    before = GENESIS
    for line, row in zip(printed, stored, strict=True):
        read, event = read_line(line), LogEntry(*row)
        before = seal(before, event)
        assert (read.entry, read.hash) == (event, before.hex())
        assert row[4] in line
        assert json.loads(line)["data"]["payment_id"] == str(row[1])


def test_filters(operator: Operator, payments: dict[str, History]) -> None:
    assert positions(operator("replay")) == [1, 2, 3, 4, 5, 6, 7, 8]
    assert positions(operator("replay", "--payment", payments["declined"].id)) == [2, 7]
    assert positions(operator("replay", "--order", OTHER_ORDER)) == [3, 8]
    assert positions(operator("replay", "--order", ORDER_ID)) == [1, 2, 4, 5, 6, 7]
    assert positions(operator("replay", "--order", ORDER_ID, "--limit", 2)) == [1, 2]
    assert positions(operator("replay", "--type", "PaymentCharged")) == [4, 8]
    both = ("--type", "PaymentCharged", "--type", "PaymentFailed")
    assert positions(operator("replay", *both)) == [4, 7, 8]
    assert positions(operator("replay", "--from", 3, "--until", 5)) == [3, 4, 5]
    assert positions(operator("replay", "--from", 7, "--limit", 1)) == [7]
    assert positions(operator("replay", "--from", 9)) == []
    assert positions(operator("replay", *both, "--until", 7, "--order", ORDER_ID)) == [4, 7]


def test_the_order_is_taken_from_the_fact_and_not_from_any_text(
    operator: Operator, connection: Connection
) -> None:
    """Another payment's key may hold the order's id; and what cannot be read is shown."""
    named = History(f"key of {OTHER_ORDER}")
    append(connection, named.facts)
    append_stored(connection, [stored_event(state=b"{broken " + str(OTHER_ORDER).encode())])
    assert positions(operator("replay", "--order", OTHER_ORDER)) == [2]


def test_times(operator: Operator, payments: dict[str, History], connection: Connection) -> None:
    times = spread(connection, 0, 1, 1, 1, 2, 5, 5, 9)
    text = [each.isoformat() for each in times]

    def found(*arguments: object) -> list[int]:
        return positions(operator("replay", *arguments))

    assert found("--from", text[1]) == [2, 3, 4, 5, 6, 7, 8]
    assert found("--until", text[1]) == [1]
    assert found("--from", text[1], "--until", text[4]) == [2, 3, 4]
    assert found("--from", (times[4] + timedelta(microseconds=1)).isoformat()) == [6, 7, 8]
    assert found("--from", "2026-02-01T04:30:05+05:30") == [6, 7, 8]
    assert found("--from", "2026-01-31T23:00:02.000000999z") == [5, 6, 7, 8]
    # As our tables and psql print it.
    assert found("--from", str(times[5])) == [6, 7, 8]
    assert found("--from", "2026-02-01 04:30:05.0+05:30") == [6, 7, 8]
    assert found("--from", "2026-01-31 23:00:05+00") == [6, 7, 8]
    assert found("--from", 3, "--until", text[5]) == [3, 4, 5]
    assert found("--from", "2030-01-01T00:00:00Z") == []
    assert found("--until", "2030-01-01T00:00:00Z") == list(range(1, 9))
    assert found("--until", "2020-01-01T00:00:00Z") == []


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (("--from", "0"), "is not a position"),
        (("--from", "-3"), "is not a position"),
        (("--until", "99999999999999999999"), "is not a"),
        (("--from", "2026-01-31T18:30:00"), "is not a time like 2026-01-31T18:30:00Z"),
        (("--from", "yesterday"), "is not a time"),
        (("--from", "2026-01-31"), "is not a time"),
        (("--from", "20260131T183000Z"), "is not a time"),
        (("--from", "2026-01-31T24:00:00Z"), "is not a time"),
        (("--from", "5", "--until", "4"), "--from must not be after --until"),
        (
            ("--from", "2026-01-02T00:00:00Z", "--until", "2026-01-01T00:00:00Z"),
            "--from must not be after --until",
        ),
        (("--type", "PaymentLost"), "PaymentLost"),
        (("--payment", "7"), "is not a valid UUID"),
        (("--limit", "0"), "0"),
        (("--as-of", "3"), "--as-of requires --payment or --order"),
        (
            ("--as-of", "3", "--payment", str(ORDER_ID), "--order", str(ORDER_ID)),
            "--as-of requires --payment or --order",
        ),
        (
            ("--as-of", "3", "--payment", str(ORDER_ID), "--limit", "1"),
            "--as-of can be combined only",
        ),
        (("--follow", "--until", "3"), "--follow cannot be combined"),
        (("--format", "xml"), "xml"),
    ],
)
def test_wrong_arguments(operator: Operator, arguments: tuple[str, ...], words: str) -> None:
    done = operator("replay", *arguments)
    assert done.exit_code == 2
    assert words in " ".join(done.stderr.split())
    assert done.stdout == ""


@pytest.mark.parametrize("of", ["--payment", "--order"])
@pytest.mark.parametrize("as_of", [(), ("--as-of", "5")])
def test_what_is_not_in_the_log(
    operator: Operator, payments: dict[str, History], of: str, as_of: tuple[str, ...]
) -> None:
    done = operator("replay", of, uuid.uuid4(), *as_of)
    assert (done.exit_code, done.stdout) == (1, "")
    assert done.stderr.startswith("payments: ")
    assert done.stderr.count("\n") == 1


BYTES = [
    b'{"a":1}',
    b'{"a": [1,\n2]}',
    b" {}",
    b"null",
    b"\xff\xfe",
    b"",
    b'"\\ud800"',
    "=1+1 é".encode(),
    b'a,"b"\r\nc',
]


def test_csv(operator: Operator, connection: Connection) -> None:
    append_stored(connection, [stored_event(state=state) for state in BYTES])
    done = operator("replay", "--format", "csv")
    assert done.exit_code == 0
    rows = list(csv.DictReader(io.StringIO(done.stdout_bytes.decode(), newline="")))
    assert list(rows[0]) == [
        *("position", "payment_id", "version", "type", "recorded_at", "data", "state_base64"),
        "hash",
    ]
    for row, state in zip(rows, BYTES, strict=True):
        data = row["data"].removeprefix("'") if state.startswith(b"=") else row["data"]
        stored = base64.b64decode(row["state_base64"]) or data.encode()
        assert stored == state
        assert row["recorded_at"].endswith("Z")


FORMULAS = [
    *("=HYPERLINK(1)", "+1+1", "-1+1", "@SUM(1)", "\t=1", "\r=1", "\n=1"),
    *("＝1+1", "＋1", "－1", "＠SUM(1)"),
]


@pytest.mark.parametrize("key", [key for key in FORMULAS if key.isascii() and key.isprintable()])
def test_a_spreadsheet_computes_nothing_of_a_payment(
    operator: Operator, connection: Connection, key: str
) -> None:
    history = History(key).charged()
    append(connection, history.facts)
    for arguments in (("--payment", history.id), ("--order", ORDER_ID)):
        done = operator("replay", *arguments, "--as-of", 2, "--format", "csv")
        (row,) = csv.DictReader(io.StringIO(done.stdout))
        assert row["idempotency_key"] == f"'{key}"
        assert (row["amount_cents"], row["refunded_cents"]) == ("1500", "0")
        (state,) = lines(operator("replay", *arguments, "--as-of", 2))
        assert state["idempotency_key"] == key


@pytest.mark.parametrize("text", FORMULAS)
def test_a_spreadsheet_computes_nothing_of_the_log(
    operator: Operator, connection: Connection, text: str
) -> None:
    """Neither of a type nor of data that only damage, or whoever writes to the table, can bring."""
    append_stored(connection, [stored_event(topic=text, state=text.encode())])
    append_stored(connection, [stored_event(state=b"\xf8")])  # in base64: +A==
    done = operator("replay", "--format", "csv")
    rows = list(csv.reader(io.StringIO(done.stdout_bytes.decode(), newline="")))
    assert [rows[1][3], rows[1][5]] == [f"'{text}"] * 2
    assert rows[2][6] == "'+A=="
    assert [row[0] for row in rows[1:]] == ["1", "2"]
    assert not any(cell.startswith(tuple("=+-@\t\r\n＝＋－＠")) for row in rows for cell in row)
    exact = [read_line(line).entry for line in operator("replay").stdout_bytes.splitlines()]
    assert (exact[0].topic, exact[0].state) == (text, text.encode())


def test_numbers_of_a_line_stay_numbers() -> None:
    assert csv_line([-1, 0, -1.5, None, "-1", "", "'=1", "a=1"]) == b"-1,0,-1.5,,'-1,,'=1,a=1\r\n"


def test_jsonl_of_any_bytes_is_a_line_each(operator: Operator, connection: Connection) -> None:
    append_stored(connection, [stored_event(state=state) for state in BYTES])
    printed = operator("replay").stdout_bytes.splitlines()
    assert [read_line(line).entry.state for line in printed] == BYTES


@given(st.binary(max_size=60) | st.text(max_size=30).map(str.encode))
def test_any_bytes_survive_a_line(state: bytes) -> None:
    event = LogEntry(
        position=7,
        payment_id=ORDER_ID,
        version=2,
        topic="Topic",
        state=state,
        recorded_at=datetime(2026, 1, 2, tzinfo=UTC),
    )
    line = write_line(event, None)
    assert read_line(line).entry == event
    assert not {b"\n", b"\r"} & {line[at : at + 1] for at in range(len(line))}
    json.loads(line)


def test_the_table_for_people(operator: Operator, payments: dict[str, History]) -> None:
    done = operator("replay", "--format", "table")
    header, *rows = done.stdout.splitlines()
    assert header.split() == ["position", "recorded_at", "payment", "version", "type", "what"]
    assert len(rows) == 8
    assert "the provider refunded 5.00 INR" in rows[5]
    assert "insufficient_funds" in rows[6]


def test_nobody_speaks_to_the_terminal(operator: Operator, connection: Connection) -> None:
    append(connection, [History("a\tb").facts[0]])
    append_stored(connection, [stored_event(topic="x\x1b[2Jy\nz", state=b"\x1b")])
    for arguments in (("replay", "--format", "table"), ("explain", History("a\tb").id)):
        printed = operator(*arguments).stdout
        assert all(line.isprintable() for line in printed.splitlines())


def test_as_of(operator: Operator, payments: dict[str, History], connection: Connection) -> None:
    times = spread(connection, 0, 1, 1, 1, 2, 5, 5, 9)

    def state(moment: object) -> dict[str, Any]:
        (line,) = lines(operator("replay", "--payment", payments["refunded"].id, "--as-of", moment))
        return line

    assert [state(position)["status"] for position in (1, 3, 4)] == ["PENDING"] * 2 + ["SUCCESS"]
    assert [state(position)["refunded_cents"] for position in (4, 5, 6)] == [0, 0, 500]
    assert state(10**9) == state(6) == state("2030-01-01T00:00:00Z")
    # What was recorded at that very moment is part of it.
    assert state(times[3].isoformat())["status"] == "SUCCESS"
    before = (times[3] - timedelta(microseconds=1)).isoformat()
    assert state(before)["status"] == "PENDING"
    early = operator("replay", "--payment", payments["declined"].id, "--as-of", 1)
    assert (early.exit_code, early.stdout) == (1, "")
    assert "did not exist yet at position 1" in early.stderr


def test_as_of_of_an_order(operator: Operator, payments: dict[str, History]) -> None:
    def states(moment: int, *arguments: str) -> list[tuple[str, str]]:
        done = operator("replay", "--order", ORDER_ID, "--as-of", moment, *arguments)
        return [(line["id"], line["status"]) for line in lines(done)]

    refunded, declined = str(payments["refunded"].id), str(payments["declined"].id)
    assert states(1) == [(refunded, "PENDING")]
    assert states(7) == [(refunded, "SUCCESS"), (declined, "FAILED")]
    table = operator("replay", "--order", ORDER_ID, "--as-of", 7, "--format", "table")
    assert table.stdout.count("amount_cents") == 2
    rows = list(
        csv.DictReader(
            operator("replay", "--order", ORDER_ID, "--as-of", 7, "--format", "csv")
            .stdout_bytes.decode()
            .splitlines()
        )
    )
    assert [row["refunded_cents"] for row in rows] == ["500", "0"]


def test_damage_behind_the_moment_does_not_matter(
    operator: Operator, connection: Connection
) -> None:
    damaged = History("k").charged()
    append(connection, damaged.facts)
    append_stored(connection, [stored_event(damaged.id, 3, b"{", "PaymentRefunded")])
    (state,) = lines(operator("replay", "--payment", damaged.id, "--as-of", 2))
    assert state["status"] == "SUCCESS"
    done = operator("replay", "--payment", damaged.id, "--as-of", 3)
    assert (done.exit_code, done.stdout) == (1, "")
    story = operator("explain", damaged.id)
    assert story.exit_code == 0
    assert "cannot be read" in story.stdout


def follower(address: DatabaseAddress, *arguments: str) -> subprocess.Popen[bytes]:
    return subprocess.Popen(
        [*PAYMENTS, "replay", "--follow", *arguments],
        cwd=ROOT,
        env=environment(**at(address), LOG_LEVEL="WARNING"),
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
    )


@pytest.fixture
def following(address: DatabaseAddress) -> Iterator[subprocess.Popen[bytes]]:
    process = follower(address)
    yield process
    if process.poll() is None:
        process.kill()
    process.communicate(timeout=10)


@pytest.mark.parametrize("signum", [signal.SIGINT, signal.SIGTERM])
def test_follow_prints_what_comes_and_survives_its_connection(
    following: subprocess.Popen[bytes], connection: Connection, signum: int
) -> None:
    def next_position() -> int:
        assert following.stdout is not None
        return read_line(following.stdout.readline()).position

    append(connection, History("before").facts)
    assert next_position() == 1
    append(connection, History("k0").facts)
    assert next_position() == 2
    for number in range(3):
        killed = connection.execute(
            "SELECT pg_terminate_backend(pid) FROM pg_stat_activity"
            " WHERE datname = current_database() AND application_name = 'payments replay'"
        ).fetchall()
        assert killed
        append(connection, History(f"k{number + 1}").charged().facts)
        assert [next_position(), next_position()] == [2 * number + 3, 2 * number + 4]
    following.send_signal(signum)
    left, errors = following.communicate(timeout=10)
    assert (following.returncode, left, errors) == (0, b"", b"")


def test_follow_with_filters_and_a_limit(address: DatabaseAddress, connection: Connection) -> None:
    append(connection, History("k1").charged().facts)
    process = follower(address, "--type", "PaymentCharged", "--limit", "2")
    assert process.stdout is not None
    assert read_line(process.stdout.readline()).position == 2
    append(connection, [*History("k2").facts, *History("k3").charged().facts])
    left, errors = process.communicate(timeout=20)
    assert (process.returncode, errors) == (0, b"")
    assert [read_line(line).position for line in left.splitlines()] == [5]


def test_a_reader_that_has_seen_enough(address: DatabaseAddress, connection: Connection) -> None:
    append(connection, [fact for n in range(3000) for fact in History(f"k{n}").facts])
    process = subprocess.Popen(
        [*PAYMENTS, "replay"],
        cwd=ROOT,
        env=environment(**at(address), LOG_LEVEL="WARNING"),
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
    )
    assert process.stdout is not None
    process.stdout.readline()
    process.stdout.close()
    assert process.wait(timeout=20) == 2  # what was read may be half of an export
    assert process.stderr is not None
    told = b"payments: the output cannot be written: Broken pipe\n"
    assert process.stderr.read() == told
    process.stderr.close()


def test_memory_stays_the_same_however_long_the_log_is(
    address: DatabaseAddress, connection: Connection
) -> None:
    append(connection, History("k").facts)
    small = peak_mb("replay", **at(address))
    connection.execute("SET statement_timeout = 0")
    connection.execute(
        "INSERT INTO payment_events SELECT n, gen_random_uuid(), 1, 'PaymentInitiated',"
        " convert_to(repeat('x', 1000), 'UTF8'), now() FROM generate_series(2, 50000) n"
    )
    assert peak_mb("replay", **at(address)) < small + 15  # the log is 50 MB


def test_reading_writes_nothing(
    operator: Operator, payments: dict[str, History], connection: Connection
) -> None:
    def changes() -> list[Any]:
        connection.execute("SELECT pg_stat_force_next_flush()")
        return connection.execute(
            "SELECT relname, n_tup_ins, n_tup_upd, n_tup_del FROM pg_stat_user_tables ORDER BY 1"
        ).fetchall()

    connection.execute(
        f"ALTER DATABASE {connection.info.dbname} SET default_transaction_read_only = on".encode()
    )
    before = changes()
    for arguments in (
        ("replay",),
        ("replay", "--payment", payments["refunded"].id, "--as-of", 5),
        ("explain", payments["refunded"].id),
        ("audit", "verify"),
        ("rebuild", "--dry-run"),
    ):
        assert operator(*arguments).exit_code in (0, 1), arguments
    assert changes() == before


def test_explain(operator: Operator, connection: Connection) -> None:
    paid = (
        History("abc123", client="orders")
        .charged()
        .refunded("r1", 500)
        .refund_begun()
        .refund_failed("account_closed")
    )
    late = History("late").abandoned().late_capture_found().late_capture_returned()
    append(connection, [*paid.facts, *late.facts])
    done = operator("explain", paid.id)
    assert done.exit_code == 0
    header, *entries = done.stdout.splitlines()
    assert header == (f"payment {paid.id}: SUCCESS, 15.00 INR, 5.00 INR refunded, order {ORDER_ID}")
    assert [re.split(r"\s{2,}", line)[1:3] for line in entries] == [
        [fact.TOPIC, "orders"] for fact in paid.facts
    ]
    for words, line in zip(
        (
            "requested with the key abc123",
            "captured 15.00 INR as txn-",
            "of 5.00 INR requested with the key r1",
            "refunded 5.00 INR",
            "of 10.00 INR, the remaining amount requested with no key",
            "declined the refund",
        ),
        entries,
        strict=True,
    ):
        assert words in line
    story = operator("explain", late.id).stdout
    for words in ("abandoned", "captured 15.00 INR after all", "returned 15.00 INR"):
        assert words in story
    as_json = json.loads(operator("explain", late.id, "--format", "json").stdout)
    assert [entry["position"] for entry in as_json["entries"]] == [7, 8, 9, 10]


def test_explain_tells_how_long_seats_are_held(operator: Operator, connection: Connection) -> None:
    history = History("k")
    (begun,) = history.facts
    until = datetime(2026, 1, 31, 18, 45, tzinfo=UTC)
    append(connection, [msgspec.structs.replace(begun, hold_until=until)])
    assert (
        "seats held until 2026-01-31T18:45:00.000000Z"
        in operator("explain", begun.payment_id).stdout
    )


def test_explain_tells_of_the_providers_own_id(operator: Operator, connection: Connection) -> None:
    prepared = History("prepared").referenced("pi_1").told_to_act("redirect").charged()
    (supplied,) = History("supplied").facts
    supplied = msgspec.structs.replace(supplied, provider_reference="pay_1")
    append(connection, [*prepared.facts, supplied])
    story = operator("explain", prepared.id).stdout
    for words in ("prepared the charge as pi_1", "the customer has to act", "(redirect)"):
        assert words in story
    assert "at the provider simulated, where it is pay_1" in (
        operator("explain", supplied.payment_id).stdout
    )


def test_explain_tells_the_callbacks(operator: Operator, connection: Connection) -> None:
    paid = History("k").charged()
    append(connection, paid.facts)
    connection.execute(
        "INSERT INTO callback_deliveries (event_id, position, order_id, payment_id, sequence,"
        " status, amount_cents, currency, occurred_at, state, finished_at)"
        " VALUES (%s, 2, %s, %s, 2, 'SUCCESS', 1500, 'INR', now(), 'dead', now())",
        [paid.facts[1].event_id, ORDER_ID, paid.id],
    )
    connection.execute(
        "INSERT INTO callback_attempts (event_id, claim, started_at, seconds, outcome, status,"
        " answer) VALUES (%s, 1, now(), 0.0125, 'http_error', 500, %s)",
        [paid.facts[1].event_id, b"no\nidea"],
    )
    story = operator("explain", paid.id).stdout
    assert "attempt 1, http_error, HTTP 500, after 12 ms, response: no\\nidea" in story
    assert "dead, until it is redriven" in story


def test_explain_what_is_not_there(operator: Operator, payments: dict[str, History]) -> None:
    done = operator("explain", uuid.uuid4())
    assert (done.exit_code, done.stdout) == (1, "")
    assert done.stderr.startswith("payments: Payment ")
    assert "does not exist" in done.stderr


def test_no_other_process_has_to_run(operator: Operator, payments: dict[str, History]) -> None:
    """The read model and the seals are empty: the log is enough."""
    assert len(lines(operator("replay", "--order", ORDER_ID))) == 6
    assert msgspec.json.decode(operator("explain", payments["other"].id, "--format", "json").stdout)
