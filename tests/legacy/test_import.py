"""What becomes of the Node service's payments."""

import os
import signal
import subprocess
import uuid
from datetime import UTC, datetime
from typing import Any

import psycopg
import pytest

from payments.database.connections import DatabaseAddress, connect
from payments.events import facts
from payments.events.store import READ_LOG, LogEntry, fact_of
from payments.legacy import LegacyRow, facts_of
from payments.payment.identity import payment_id_for
from payments.payment.state import Payment, Status, fold
from tests.legacy.conftest import Command, Node
from tests.legacy.node import MANY, insert
from tests.process import PAYMENTS, at, environment
from tests.support import eventually

Connection = psycopg.Connection[Any]

ROWS = """
SELECT id, merchant_order_id, idempotency_key, amount_cents, currency, status, provider_txn_id,
       created_at, updated_at FROM {} ORDER BY created_at, id
"""


def log_of(node: Node) -> dict[uuid.UUID, list[facts.Fact]]:
    """Every stream."""
    streams: dict[uuid.UUID, list[facts.Fact]] = {}
    for row in node.execute(READ_LOG, [0, 100_000]).fetchall():
        entry = LogEntry(*row)
        streams.setdefault(entry.payment_id, []).append(fact_of(entry))
    return streams


def payment_of(node: Node, payment_id: uuid.UUID) -> Payment:
    payment = fold(log_of(node)[payment_id])
    assert payment is not None
    return payment


def test_rows_become_events_and_rows_again(node: Node, payments: Command) -> None:
    ids = {
        status: insert(node, status=status, idempotency_key=f"key-{status}", provider_txn_id=status)
        for status in ("PENDING", "SUCCESS", "FAILED", "REFUNDED")
    }
    keyless = insert(node, idempotency_key=None, provider_txn_id=None)
    before = node.execute(ROWS.format("payments").encode()).fetchall()
    done = payments("import-legacy")
    assert done.exit_code == 0
    assert (
        f"PENDING, and not settled by this service: payment {payment_id_for('key-PENDING')} "
        in (done.stdout)
    )
    assert ids["PENDING"] in done.stdout
    # The documented columns are as they were, but for the id, and the key of what has none.
    after = {row[0]: row[1:] for row in node.execute(ROWS.format("payments").encode()).fetchall()}
    for id, order, key, *rest in before:
        new_id = id if key is None else payment_id_for(key)
        assert after[new_id] == (order, key or f" legacy:{id}", *rest)
    assert uuid.UUID(keyless) in after
    topics = {
        status: [fact.TOPIC for fact in log_of(node)[payment_id_for(f"key-{status}")]]
        for status in ids
    }
    assert topics == {
        "PENDING": ["PaymentInitiated"],
        "SUCCESS": ["PaymentInitiated", "PaymentCharged"],
        "FAILED": ["PaymentInitiated", "PaymentFailed"],
        "REFUNDED": ["PaymentInitiated", "PaymentCharged", "RefundInitiated", "PaymentRefunded"],
    }
    assert all(fact.imported is True for stream in log_of(node).values() for fact in stream)
    assert node.execute("SELECT count(*) FROM unsettled_payments").fetchone() == (0,)
    for check in (("audit", "verify"), ("rebuild", "--dry-run")):
        assert payments(*check).exit_code == 0
    # Nothing happens twice.
    count = node.execute("SELECT count(*) FROM payment_events").fetchone()
    again = payments("import-legacy")
    assert (again.exit_code, again.stdout) == (0, "")
    assert node.execute("SELECT count(*) FROM payment_events").fetchone() == count


@pytest.mark.parametrize(
    ("zone", "hour", "minute"),
    [("UTC", 12, 0), ("Asia/Kolkata", 6, 30), ("America/New_York", 16, 0)],
)
def test_times_are_those_of_the_zone(
    node: Node, payments: Command, zone: str, hour: int, minute: int
) -> None:
    insert(node)
    assert payments("import-legacy", "--timezone", zone).exit_code == 0
    initiated, charged = log_of(node)[payment_id_for("abc123")]
    assert initiated.occurred_at == datetime(2025, 6, 1, hour, minute, tzinfo=UTC)
    assert charged.occurred_at == datetime(2025, 6, 1, hour, minute, 2, tzinfo=UTC)


def test_only_what_was_captured_belongs_to_the_gateway(node: Node, payments: Command) -> None:
    """What was not, no provider is asked about, also by a version that knows nothing of imports."""
    for status in Status:
        insert(node, status=status, idempotency_key=status, provider_txn_id=status)
    assert payments("import-legacy", "--gateway", "simulated").exit_code == 0
    gateways = {str(s): payment_of(node, payment_id_for(s)).gateway for s in Status}
    assert gateways == {
        "PENDING": "legacy",
        "FAILED": "legacy",
        "SUCCESS": "simulated",
        "REFUNDED": "simulated",
    }


def test_what_nobody_kept_an_id_of(node: Node, payments: Command) -> None:
    insert(node, provider_txn_id=None)
    assert payments("import-legacy").exit_code == 0
    assert payment_of(node, payment_id_for("abc123")).provider_txn_id is None
    assert node.execute("SELECT provider_txn_id FROM payments").fetchone() == (None,)


def test_an_import_goes_on_as_it_was_begun(
    node: Node, payments: Command, empty_database: DatabaseAddress
) -> None:
    insert(node)
    assert payments("import-legacy", "--gateway", "simulated").exit_code == 0
    node.execute("UPDATE legacy_import SET completed_at = NULL")
    done = payments("import-legacy", "--gateway", "other")
    assert done.exit_code == 2
    assert "begun with --gateway simulated --timezone UTC" in done.stderr


def test_nobody_else_may_be_connected(
    node: Node, payments: Command, empty_database: DatabaseAddress, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("payments.commands.importing.LEAVE_S", 0.3)
    insert(node)
    with connect(empty_database, "node-app"):
        done = payments("import-legacy")
        assert done.exit_code == 2
        assert "other sessions are connected to the database: node-app (postgres)" in done.stderr
        assert node.execute("SELECT to_regclass('legacy_payments')").fetchone() == (None,)
        assert payments("import-legacy", "--ignore-connections").exit_code == 0


def test_one_import_at_a_time(node: Node, payments: Command) -> None:
    insert(node)
    node.execute("SELECT pg_advisory_lock(7165010, 4)")
    done = payments("import-legacy")
    assert done.exit_code == 2
    assert "another import is running" in done.stderr


def test_killed_in_the_middle_and_run_again(
    node: Node, payments: Command, empty_database: DatabaseAddress
) -> None:
    rows = 2500
    node.execute(MANY, [rows])
    killed = subprocess.Popen(
        [*PAYMENTS, "import-legacy"], env=environment(**at(empty_database)), stderr=subprocess.PIPE
    )
    count = "SELECT count(*) FROM legacy_payment_ids"
    eventually(
        lambda: (
            node.execute("SELECT to_regclass('legacy_payment_ids')").fetchone() != (None,)
            and node.execute(count).fetchone() != (0,)
        )
    )
    os.kill(killed.pid, signal.SIGKILL)
    killed.communicate()
    ((some,),) = node.execute(count).fetchall()
    assert 0 < some < rows
    assert node.execute("SELECT count(DISTINCT originator_id) FROM payment_events").fetchone() == (
        some,
    )
    done = payments("import-legacy")
    assert f"imported: {rows - some:,} rows of {rows:,}" in done.stdout
    expected = {}
    for row in node.execute(ROWS.format("legacy_payments").encode()).fetchall():
        texts = [None if value is None else str(value) for value in row[:7]]
        times = [time.replace(tzinfo=UTC) for time in row[7:]]
        legacy = LegacyRow._make([*texts, *times, False, False, False])
        expected[legacy.payment_id] = facts_of(legacy, "legacy")
    assert log_of(node) == expected
    assert payments("audit", "verify").exit_code == 0
