"""The payments read model: what the events say, however they are cut into batches."""

from collections.abc import AsyncIterator, Sequence
from datetime import UTC, datetime, timedelta
from itertools import chain, zip_longest
from typing import Any

import psycopg
import pytest

from payments.database.connections import Database
from payments.events.facts import Fact
from payments.events.store import READ_LOG, LogEntry
from payments.projections.payments import PaymentsProjection
from tests.invariants.checker import TABLES, check
from tests.machine import Machine, bound
from tests.support import ORDER_ID, History, append, follow, histories

pytestmark = pytest.mark.anyio

SETTLE_AFTER_S = 7.0
BEGAN_AT = datetime(2026, 1, 2, 3, 4, 5, 6, tzinfo=UTC)
BEGAN = BEGAN_AT.replace(tzinfo=None)

# As other teams were told.
DOCUMENTED = """
CREATE TABLE payments (
    id UUID PRIMARY KEY DEFAULT gen_random_uuid(),
    merchant_order_id UUID NULL,
    idempotency_key TEXT UNIQUE NULL,
    amount_cents INT DEFAULT 0,
    currency TEXT DEFAULT 'INR' NULL,
    status TEXT CHECK(status IN ('PENDING','SUCCESS','FAILED','REFUNDED')) NULL,
    provider_txn_id TEXT NULL,
    created_at TIMESTAMP DEFAULT now() NULL,
    updated_at TIMESTAMP DEFAULT now() NULL
);
"""

COLUMNS = """
SELECT attnum, attname, format_type(atttypid, atttypmod), attnotnull, attidentity, attgenerated,
       attcollation, pg_get_expr(adbin, adrelid)
  FROM pg_attribute LEFT JOIN pg_attrdef ON (adrelid, adnum) = (attrelid, attnum)
 WHERE attrelid = %s::regclass AND attnum > 0 ORDER BY attnum
"""

CONSTRAINTS = """
SELECT conname, contype, pg_get_constraintdef(oid), condeferrable, convalidated
  FROM pg_constraint WHERE conrelid = %s::regclass ORDER BY conname
"""

TABLE = """
SELECT relkind, relpersistence, relrowsecurity, relhastriggers, relispartition
  FROM pg_class WHERE oid = %s::regclass
"""


def interleaved(known: dict[str, History]) -> list[Fact]:
    """The first facts of all payments, then the second ones, and so on."""
    rounds = zip_longest(*(history.facts for history in known.values()))
    return [fact for fact in chain.from_iterable(rounds) if fact is not None]


@pytest.fixture
async def working(database: Database) -> AsyncIterator[psycopg.AsyncConnection[Any]]:
    """A follower's connection."""
    opened = await database.connect("tests")
    yield opened
    await opened.close()


async def log_after(connection: psycopg.AsyncConnection[Any], position: int = 0) -> list[LogEntry]:
    cursor = await connection.execute(READ_LOG, [position, 10_000])
    return [LogEntry(*row) for row in await cursor.fetchall()]


async def apply(connection: psycopg.AsyncConnection[Any], *batches: Sequence[LogEntry]) -> None:
    projection = PaymentsProjection(SETTLE_AFTER_S)
    for batch in batches:
        await projection.apply(connection, batch)


async def tables(connection: psycopg.AsyncConnection[Any]) -> dict[str, set[tuple[Any, ...]]]:
    rows = {}
    for table, query in TABLES.items():
        cursor = await connection.execute(query.encode())
        rows[table] = set(await cursor.fetchall())
    return rows


async def test_every_kind_of_history_in_one_batch_and_in_batches_of_every_size(
    database: Database, connection: psycopg.Connection[Any]
) -> None:
    for size in (1, 2, 3, 7, 1000):
        append(connection, interleaved(histories(f"by {size}", client="order")))
        await follow(database, batch_max=size)
        report = check(connection)
        assert not report.parked
    assert report.payments == 5 * len(histories())


async def test_cut_in_two_at_every_place_it_gives_the_same(
    working: psycopg.AsyncConnection[Any], connection: psycopg.Connection[Any]
) -> None:
    append(connection, interleaved(histories(client="order")))
    events = await log_after(working)
    async with working.transaction(force_rollback=True):
        await apply(working, events)
        whole = await tables(working)
    assert all(whole.values())
    for place in range(1, len(events)):
        async with working.transaction(force_rollback=True):
            await apply(working, events[:place], events[place:])
            assert await tables(working) == whole, f"cut after {place}"


async def test_applied_again_it_changes_nothing(
    working: psycopg.AsyncConnection[Any], connection: psycopg.Connection[Any]
) -> None:
    """As when a parked stream is retried whose rows were written in part."""
    append(connection, interleaved(histories()))
    events = await log_after(working)
    await apply(working, events)
    before = await tables(working)
    await apply(working, events)
    assert await tables(working) == before


async def test_the_table_is_the_documented_one(connection: psycopg.Connection[Any]) -> None:
    with connection.transaction(force_rollback=True):
        connection.execute("CREATE SCHEMA documented")
        connection.execute("SET LOCAL search_path TO documented")
        connection.execute(DOCUMENTED)
        for query in (COLUMNS, CONSTRAINTS, TABLE):
            ours, documented = (
                connection.execute(query.encode(), [f"{schema}.payments"]).fetchall()
                for schema in ("public", "documented")
            )
            assert ours == documented
            assert ours


async def test_a_charged_payment(database: Database, connection: psycopg.Connection[Any]) -> None:
    history = History("k1", 1234, currency="EUR").charged()
    append(connection, history.facts)
    await follow(database)
    assert connection.execute("SELECT * FROM payments").fetchall() == [
        (
            history.id,
            ORDER_ID,
            "k1",
            1234,
            "EUR",
            "SUCCESS",
            f"txn-{history.id}",
            BEGAN,
            BEGAN + timedelta(seconds=1),
        )
    ]


async def test_statuses(database: Database, connection: psycopg.Connection[Any]) -> None:
    append(connection, interleaved(histories("k")))
    await follow(database)
    rows = connection.execute("SELECT substr(idempotency_key, 3), status FROM payments").fetchall()
    assert dict(rows) == {
        "pending": "PENDING",
        "charged": "SUCCESS",
        "declined": "FAILED",
        "abandoned": "FAILED",
        "refund under way": "SUCCESS",
        "partly refunded": "SUCCESS",
        "refunded in parts": "REFUNDED",
        "refunded": "REFUNDED",
        "refund failed": "SUCCESS",
        "refunded at last": "REFUNDED",
        "two refunds at once": "SUCCESS",
        "late capture found": "FAILED",
        "late capture returned": "FAILED",
        "declined, yet captured": "FAILED",
    }


async def test_refunds(database: Database, connection: psycopg.Connection[Any]) -> None:
    history = History("k1", 1000, currency="EUR").charged()
    history.refund_begun("r1", 300).refund_failed().refunded("r2", 300).refund_begun()
    append(connection, history.facts)
    await follow(database)
    failed, done, under_way = history.payment.refunds
    at = [BEGAN + timedelta(seconds=second) for second in range(7)]
    assert connection.execute("SELECT * FROM refunds ORDER BY created_at").fetchall() == [
        (failed.id, history.id, "r1", 300, "EUR", "FAILED", None, "account_closed", at[2], at[3]),
        (done.id, history.id, "r2", 300, "EUR", "SUCCESS", f"re-{done.id}", None, at[4], at[5]),
        (under_way.id, history.id, None, 700, "EUR", "PENDING", None, None, at[6], at[6]),
    ]


async def test_clients(database: Database, connection: psycopg.Connection[Any]) -> None:
    """Nobody's payments but those of named clients are listed, with what a list filters by."""
    append(connection, History("of nobody").charged().facts)
    of_order = History("of order", currency="EUR", client="order")
    rows = []
    for step in ("charged", "refund_begun", "refund_succeeded", ""):
        append(connection, of_order.facts[-1:])
        await follow(database)
        rows += connection.execute("SELECT * FROM payment_clients").fetchall()
        if step:
            getattr(of_order, step)()
    assert rows == [
        (of_order.id, "order", status, "EUR", BEGAN)
        for status in ("PENDING", "SUCCESS", "SUCCESS", "REFUNDED")
    ]


async def test_times_are_utc_whatever_the_sessions_zone(
    working: psycopg.AsyncConnection[Any], connection: psycopg.Connection[Any]
) -> None:
    append(connection, interleaved(histories(client="order")))
    await working.execute("SET TimeZone = 'Asia/Kolkata'")
    events = await log_after(working)
    await apply(working, events)
    connection.execute("UPDATE followers SET position = %s", [len(events)])
    check(connection)
    for table in ("payments", "refunds", "payment_clients"):
        query = f"SELECT min(created_at), max(created_at) FROM {table}"
        found = connection.execute(query.encode()).fetchone()
        assert found
        assert BEGAN <= found[0] <= found[1] < BEGAN + timedelta(minutes=1)


async def test_what_is_open_is_listed_until_it_is_settled(
    database: Database, connection: psycopg.Connection[Any]
) -> None:
    history = History("k1")
    seen = []
    for step in ("charged", "refund_begun", "refund_failed", "refund_begun", "refund_succeeded"):
        append(connection, history.facts[-1:])
        await follow(database)
        rows = connection.execute("SELECT payment_id, kind, since FROM unsettled_payments")
        seen.append(rows.fetchall())
        getattr(history, step)()
    second = timedelta(seconds=1)
    assert seen == [
        [(history.id, "charge", BEGAN_AT)],
        [],
        [(history.id, "refund", BEGAN_AT + 2 * second)],
        [],
        [(history.id, "refund", BEGAN_AT + 4 * second)],
    ]


async def test_a_late_capture_is_listed_until_it_is_returned(
    database: Database, connection: psycopg.Connection[Any]
) -> None:
    history = History("k1")
    kinds = []
    for step in ("abandoned", "late_capture_found", "late_capture_returned", ""):
        append(connection, history.facts[-1:])
        await follow(database)
        kinds += connection.execute("SELECT kind FROM unsettled_payments").fetchall() or [None]
        if step:
            getattr(history, step)()
    assert kinds == [("charge",), ("abandoned",), ("late_capture",), None]


DUE = """
SELECT extract(epoch FROM due_at - clock_timestamp())::float8, attempts FROM unsettled_payments
"""


async def test_what_is_open_is_due_when_its_request_is_over(
    database: Database, connection: psycopg.Connection[Any], machine: Machine
) -> None:
    append(connection, History("k1").facts)
    await follow(database)
    ((due_in_s, attempts),) = connection.execute(DUE).fetchall()
    assert due_in_s <= SETTLE_AFTER_S
    bound(SETTLE_AFTER_S - due_in_s, 2, machine)
    assert attempts == 0


@pytest.mark.parametrize(("was_due_in_s", "is_due_in_s"), [(900, SETTLE_AFTER_S), (1, 1)])
async def test_a_new_reason_to_ask_is_due_soon(
    database: Database,
    connection: psycopg.Connection[Any],
    was_due_in_s: float,
    is_due_in_s: float,
    machine: Machine,
) -> None:
    """However patient the settling of the earlier reason had become; never later than it was."""
    history = History("k1").abandoned()
    append(connection, history.facts)
    await follow(database)
    connection.execute(
        "UPDATE unsettled_payments SET attempts = 9,"
        " due_at = clock_timestamp() + make_interval(secs => %s)",
        [was_due_in_s],
    )
    append(connection, history.late_capture_found().facts[-1:])
    await follow(database)
    ((due_in_s, attempts),) = connection.execute(DUE).fetchall()
    assert due_in_s <= is_due_in_s
    bound(is_due_in_s - due_in_s, 2, machine)
    assert attempts == 0


async def test_several_events_of_a_payment_are_one_write(
    working: psycopg.AsyncConnection[Any], connection: psycopg.Connection[Any]
) -> None:
    append(connection, History("k1").charged().refunded("r1", 500).refunded("r2", 500).facts)
    append(connection, History("k2").charged().facts)
    events = await log_after(working)
    async with working.transaction():
        await apply(working, events)
        cursor = await working.execute(
            "SELECT relname, pg_stat_get_xact_tuples_inserted(oid),"
            "       pg_stat_get_xact_tuples_updated(oid) FROM pg_class"
            " WHERE relname IN ('payments', 'refunds', 'unsettled_payments') ORDER BY 1"
        )
        assert await cursor.fetchall() == [
            ("payments", 2, 0),
            ("refunds", 2, 0),
            ("unsettled_payments", 0, 0),
        ]
