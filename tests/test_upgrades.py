"""This version on a database that a newer one migrated: docs/decisions/upgrades.md."""

import json
import uuid
from collections.abc import Callable
from pathlib import Path
from typing import Any

import httpx
import psycopg
import pytest
from click.testing import Result

from payments.database.connections import DatabaseAddress
from payments.migrations import known_migrations
from tests.process import ServiceProcess, at, free_port, run
from tests.support import ORDER_ID, History, append, catch_up

Connection = psycopg.Connection[Any]
Operator = Callable[..., Result]

KNOWN = known_migrations()[-1].number
HISTORY = History("k").charged().refunded("r1", 500)
EVENT_ID = uuid.UUID("7a8e6f3e-58f5-4a53-9c1c-3d1a3c8f6f0b")

READING: list[tuple[str, ...]] = [
    ("audit", "verify"),
    ("audit", "head"),
    ("replay",),
    ("replay", "--payment", str(HISTORY.id), "--as-of", "2"),
    ("explain", str(HISTORY.id)),
    ("parked", "list"),
    ("callbacks", "list"),
    ("callbacks", "show", str(EVENT_ID)),
    ("rebuild", "--dry-run"),
]
WRITING: list[tuple[str, ...]] = [
    ("migrate",),
    ("rebuild",),
    ("parked", "retry", "--all"),
    ("callbacks", "redrive", "--due"),
    ("callbacks", "backfill", "--from", "1"),
]


def newer(connection: Connection, oldest: int) -> None:
    connection.execute(
        "INSERT INTO schema_versions (number, name, checksum, oldest)"
        " VALUES (%s, 'future', 'x', %s)",
        [KNOWN + 1, oldest],
    )


@pytest.fixture
def payment(address: DatabaseAddress, connection: Connection) -> None:
    """One payment that every follower has seen, and a callback of it."""
    append(connection, HISTORY.facts)
    connection.execute(
        "INSERT INTO callback_deliveries (event_id, position, order_id, payment_id, sequence,"
        " status, amount_cents, currency, occurred_at, state)"
        " VALUES (%s, 2, %s, %s, 2, 'SUCCESS', 1500, 'INR', now(), 'delivered')",
        [EVENT_ID, ORDER_ID, HISTORY.id],
    )

    catch_up(address)


@pytest.mark.usefixtures("payment")
@pytest.mark.parametrize("arguments", READING, ids=" ".join)
def test_who_only_reads_is_warned_and_answered(
    operator: Operator, connection: Connection, arguments: tuple[str, ...]
) -> None:
    before = operator(*arguments)
    assert before.exit_code == 0
    newer(connection, oldest=KNOWN + 1)
    done = operator(*arguments)
    assert (done.exit_code, done.stdout) == (0, before.stdout)
    warning, *others = done.stderr.splitlines()
    assert json.loads(warning)["migration"] == f"{KNOWN + 1:04}_future"
    assert others == before.stderr.splitlines()


@pytest.mark.usefixtures("payment")
@pytest.mark.parametrize("arguments", WRITING, ids=" ".join)
def test_who_writes_is_refused_unless_the_newer_version_allows_it(
    operator: Operator,
    connection: Connection,
    monkeypatch: pytest.MonkeyPatch,
    arguments: tuple[str, ...],
) -> None:
    monkeypatch.setenv("ORDER_CALLBACK_URL", "http://127.0.0.1:1/callback")
    newer(connection, oldest=KNOWN + 1)
    refused = operator(*arguments)
    assert (refused.exit_code, refused.stdout, refused.stderr.count("\n")) == (1, "", 1)
    assert f"{KNOWN + 1:04}_future, which this version does not know" in refused.stderr
    connection.execute("UPDATE schema_versions SET oldest = 5 WHERE number = %s", [KNOWN + 1])
    assert operator(*arguments).exit_code == 0


@pytest.mark.parametrize("migrating", ["true", "false"])
def test_the_service_does_not_start_where_it_must_not(
    address: DatabaseAddress, connection: Connection, migrating: str
) -> None:
    newer(connection, oldest=KNOWN + 1)
    given = {**at(address), "MIGRATE_ON_START": migrating, "LOG_LEVEL": "WARNING"}
    for command in ("serve", "work"):
        done = run(command, **given, PORT=free_port())
        assert (done.returncode, done.stderr.count("\n")) == (1, 1)
        assert f"run a version of the service that knows migration {KNOWN + 1:04}" in done.stderr


def test_the_service_works_where_it_may(
    address: DatabaseAddress, connection: Connection, tmp_path: Path
) -> None:
    newer(connection, oldest=KNOWN)
    with (
        ServiceProcess(tmp_path, **at(address), LOG_LEVEL="WARNING") as service,
        httpx.Client(timeout=10) as client,
    ):
        paid = service.charge(client, "k").json()
        assert client.get(f"{service.url}/v1/payments/{paid['id']}").json()["status"] == "SUCCESS"
        assert service.terminate() == 0
    logged = [json.loads(line) for line in service.log.read_text().splitlines()]
    warned = [line["migration"] for line in logged if "migration" in line]
    assert warned == [f"{KNOWN + 1:04}_future"]


@pytest.mark.usefixtures("durable")
@pytest.mark.parametrize(
    ("oldest", "state", "text"),
    [
        (KNOWN, "ok", f"newer than this version, but compatible with it: {KNOWN + 1:04}_future"),
        (KNOWN + 1, "FAIL", f"run a version of the service that knows migration {KNOWN + 1:04}"),
    ],
)
def test_doctor_tells_whether_this_version_may_run(
    operator: Operator, connection: Connection, oldest: int, state: str, text: str
) -> None:
    newer(connection, oldest)
    done = operator("doctor")
    assert (done.exit_code, done.stderr.count("\n")) == (state == "FAIL", 1)
    (line,) = [line for line in done.stdout.splitlines() if line.split()[1] == "database"]
    assert line.startswith(state)
    assert line.endswith(text)


@pytest.mark.usefixtures("payment")
@pytest.mark.parametrize(
    ("change", "arguments", "exit_code"),
    [
        ("ALTER TABLE log_seals RENAME TO seals", ("replay",), 1),
        ("ALTER TABLE log_seals RENAME TO seals", ("audit", "verify"), 2),
        ("ALTER TABLE log_seals RENAME TO seals", ("doctor",), 1),
        ("ALTER TABLE callback_attempts DROP COLUMN answer", ("explain", str(HISTORY.id)), 1),
        ("ALTER TABLE callback_deliveries DROP COLUMN state", ("callbacks", "list"), 1),
        ("ALTER TABLE parked_streams RENAME reason TO why", ("parked", "list"), 1),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, tuple) else None,
)
def test_what_cannot_be_read_in_a_newer_schema_is_one_line(
    operator: Operator,
    connection: Connection,
    change: str,
    arguments: tuple[str, ...],
    exit_code: int,
) -> None:
    newer(connection, oldest=KNOWN + 1)
    connection.execute(change.encode())
    done = operator(*arguments)
    assert isinstance(done.exception, SystemExit)
    assert done.exit_code == exit_code
    said = done.output.splitlines()
    assert [line for line in said if "does not exist" in line]
    assert not [line for line in said if "Traceback" in line]
    assert done.stderr.count("\n") <= 2  # the warning, and why not
