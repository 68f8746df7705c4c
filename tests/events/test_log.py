"""What the log promises: order, permanence, and that people can read it."""

import subprocess
import sys
import time
import uuid
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import msgspec
import psycopg
import pytest

from payments.database.connections import DatabaseAddress
from payments.events.store import APPEND, append_params
from tests.support import stored_event

ROOT = Path(__file__).parents[2]
WRITERS = 8


def append(connection: psycopg.Connection[Any], *events: Any) -> list[tuple[Any, ...]]:
    return connection.execute(APPEND, append_params([[event] for event in events])).fetchall()


@pytest.mark.timeout(180)
def test_a_live_reader_sees_every_event_in_order(
    address: DatabaseAddress, connection: psycopg.Connection[Any], long_run: bool
) -> None:
    """8 writer processes, and a reader that never looks back."""
    events = 50_000 if long_run else 16_000
    target = msgspec.json.encode(address).decode()
    writers = [
        subprocess.Popen(
            [sys.executable, "-m", "tests.events.writer", target, str(events // WRITERS)], cwd=ROOT
        )
        for _ in range(WRITERS)
    ]
    last, stamp = 0, datetime.min.replace(tzinfo=UTC)
    deadline = time.monotonic() + 150
    try:
        while last < events:
            assert time.monotonic() < deadline
            rows = connection.execute(
                "SELECT notification_id, recorded_at FROM payment_events"
                " WHERE notification_id > %s ORDER BY notification_id LIMIT 500",
                [last],
            ).fetchall()
            for position, recorded_at in rows:
                assert position == last + 1, "an event appeared behind the reader, or never will"
                assert recorded_at >= stamp, "recorded_at ran backwards"
                last, stamp = position, recorded_at
        assert [writer.wait(timeout=30) for writer in writers] == [0] * WRITERS
    finally:
        for writer_process in writers:
            writer_process.kill()
            writer_process.wait()
    assert connection.execute("SELECT count(*) FROM payment_events").fetchone() == (events,)


@pytest.mark.parametrize(
    "change",
    [
        "UPDATE payment_events SET topic = 'PaymentFailed'",
        "DELETE FROM payment_events",
        "TRUNCATE payment_events",
        "SET session_replication_role = replica; DELETE FROM payment_events",
    ],
)
def test_events_cannot_be_changed(connection: psycopg.Connection[Any], change: str) -> None:
    append(connection, stored_event())
    with pytest.raises(psycopg.errors.InsufficientPrivilege, match="append-only"):
        connection.execute(change.encode())
    assert connection.execute("SELECT topic FROM payment_events").fetchall() == [
        ("PaymentInitiated",)
    ]


def test_recorded_at_never_runs_backwards(connection: psycopg.Connection[Any]) -> None:
    """Even when the clock of the server was set back: here an event comes from the future."""
    append(connection, stored_event())
    connection.execute("ALTER TABLE payment_events DISABLE TRIGGER ALL")
    connection.execute("UPDATE payment_events SET recorded_at = now() + interval '1 hour'")
    append(connection, stored_event())
    (first,), (second,) = connection.execute(
        "SELECT recorded_at FROM payment_events ORDER BY notification_id"
    ).fetchall()
    assert second == first


def test_a_rolled_back_append_leaves_no_gap(connection: psycopg.Connection[Any]) -> None:
    append(connection, stored_event())
    with connection.transaction(force_rollback=True):
        assert append(connection, stored_event()) == [("appended", 2, None)]
    assert append(connection, stored_event()) == [("appended", 2, None)]


def test_the_view_shows_every_row_as_it_is_stored(connection: psycopg.Connection[Any]) -> None:
    stream = uuid.uuid4()
    text = '{"b": 1,  "a": "ü", "occurred_at": "2026-01-02T03:04:05.000006Z"}'
    nul = '{"a": "\\u0000"}'
    append(connection, stored_event(stream, 1, text.encode()))
    append(
        connection, stored_event(stream, 2, b"\xff not JSON"), stored_event(stream, 3, nul.encode())
    )
    rows = connection.execute(
        'SELECT "position", payment_id, version, type, data::text, occurred_at'
        " FROM payment_event_log ORDER BY 1"
    ).fetchall()
    assert rows == [
        (1, stream, 1, "PaymentInitiated", text, datetime(2026, 1, 2, 3, 4, 5, 6, UTC)),
        (2, stream, 2, "PaymentInitiated", None, None),
        (3, stream, 3, "PaymentInitiated", nul, None),
    ]


def test_an_append_does_not_notify(connection: psycopg.Connection[Any]) -> None:
    """It would commit under a lock of the whole server, and fail while the queue is full."""
    connection.execute("LISTEN payment_events")
    append(connection, stored_event())
    assert not list(connection.notifies(timeout=0.2))


def test_streams_and_tails_are_read_by_index(connection: psycopg.Connection[Any]) -> None:
    for _ in range(20):
        append(connection, *(stored_event() for _ in range(100)))
    connection.execute("ANALYZE payment_events")
    for query, index in [
        ("SELECT * FROM payment_events WHERE originator_id = %s", "payment_events_stream"),
        (
            "SELECT * FROM payment_events WHERE notification_id > %s ORDER BY notification_id",
            "payment_events_position",
        ),
    ]:
        value: Any = uuid.uuid4() if "originator" in query else 1990
        plan = connection.execute(f"EXPLAIN {query}".encode(), [value]).fetchall()
        assert index in str(plan)
