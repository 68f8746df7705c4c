"""The table payments is recognised as changed by something else, and gets its shape back."""

from collections.abc import Callable, Iterator
from typing import Any

import psycopg
import pytest
from click.testing import Result
from loguru import logger

from payments.database.connections import DatabaseAddress
from payments.migrations import check_migrated, check_readable, migrate, shape
from tests.support import History, append, catch_up

Connection = psycopg.Connection[Any]
Operator = Callable[..., Result]

# As an ORM does it that was told to synchronize.
SYNCHRONIZE = """
ALTER TABLE payments DROP CONSTRAINT payments_idempotency_key_key;
DROP INDEX payments_newest;
DROP INDEX payments_of_order;
ALTER TABLE payments DROP COLUMN status;
ALTER TABLE payments ADD status character varying NOT NULL DEFAULT 'PENDING';
ALTER TABLE payments DROP COLUMN currency;
ALTER TABLE payments ADD currency character varying NOT NULL DEFAULT 'INR'
"""
LOST = [
    *("column currency", "column status", "unique idempotency_key", "check of status"),
    *("index payments_newest", "index payments_of_order", "index payments_by_status"),
    "index payments_by_currency",
]


@pytest.fixture
def warned() -> Iterator[list[dict[str, Any]]]:
    """The fields of each warning."""
    found: list[dict[str, Any]] = []
    sink = logger.add(lambda message: found.append(message.record["extra"]), level="WARNING")
    yield found
    logger.remove(sink)


def definition(connection: Connection) -> list[tuple[Any, ...]]:
    return sorted(connection.execute(shape.FIND).fetchall())


def test_as_the_migrations_make_it_nothing_is_lost(connection: Connection) -> None:
    assert shape.lost(connection) == []


def test_it_is_told_and_put_back(
    address: DatabaseAddress, connection: Connection, warned: list[dict[str, Any]]
) -> None:
    before = definition(connection)
    connection.execute(SYNCHRONIZE)
    assert shape.lost(connection) == LOST
    for check in (check_migrated, check_readable):
        check(address)
    assert warned == [{"changed": ", ".join(LOST)}] * 2
    assert migrate(address) == []
    assert warned[2:] == [{"changed": ", ".join(LOST)}]
    assert definition(connection) == before
    assert migrate(address) == []
    assert len(warned) == 3


@pytest.mark.parametrize(
    ("change", "lost"),
    [
        ("ALTER TABLE payments DROP COLUMN provider_txn_id", ["column provider_txn_id"]),
        ("ALTER TABLE payments ALTER amount_cents TYPE bigint", ["column amount_cents"]),
        ("ALTER TABLE payments ALTER amount_cents TYPE text USING 'x'", ["column amount_cents"]),
        ("ALTER TABLE payments ALTER created_at TYPE timestamptz", ["column created_at"]),
        ("ALTER TABLE payments ALTER created_at DROP DEFAULT", ["column created_at"]),
        ("ALTER TABLE payments ALTER provider_txn_id SET NOT NULL", ["column provider_txn_id"]),
        ("ALTER TABLE payments ALTER provider_txn_id SET DEFAULT ''", ["column provider_txn_id"]),
        ("ALTER TABLE payments DROP CONSTRAINT payments_pkey", ["primary key"]),
        ("ALTER TABLE payments DROP CONSTRAINT payments_status_check", ["check of status"]),
        ("DROP INDEX payments_by_status", ["index payments_by_status"]),
        (
            "DROP INDEX payments_newest; CREATE INDEX payments_newest ON payments (created_at)",
            ["index payments_newest"],
        ),
        (
            "UPDATE pg_index SET indisvalid = false WHERE indexrelid = 'payments_newest'::regclass",
            ["index payments_newest"],
        ),
    ],
)
def test_each_change_alone(connection: Connection, change: str, lost: list[str]) -> None:
    before = definition(connection)
    connection.execute("INSERT INTO payments (provider_txn_id, amount_cents) VALUES ('t', 1)")
    connection.execute(change.encode())
    assert shape.lost(connection) == lost
    shape.restore(connection)
    assert shape.lost(connection) == []
    assert definition(connection) == before


def test_a_check_that_was_not_made_for_all_rows_is_none(connection: Connection) -> None:
    connection.execute("ALTER TABLE payments DROP CONSTRAINT payments_status_check")
    added = f"ALTER TABLE payments ADD {shape.KNOWN_STATUS} NOT VALID"
    connection.execute(added.encode())
    assert shape.lost(connection) == ["check of status"]
    shape.restore(connection)
    assert shape.lost(connection) == []


def test_a_table_that_is_gone(connection: Connection) -> None:
    before = definition(connection)
    connection.execute("DROP TABLE payments")
    shape.restore(connection)
    assert definition(connection) == before


def test_rows_that_would_not_fit_are_given_up(connection: Connection) -> None:
    connection.execute(
        "ALTER TABLE payments DROP CONSTRAINT payments_pkey,"
        " DROP CONSTRAINT payments_idempotency_key_key, DROP CONSTRAINT payments_status_check,"
        " ALTER id DROP NOT NULL"
    )
    connection.execute(
        "INSERT INTO payments (id, idempotency_key, status) VALUES"
        " (NULL, 'k', 'PENDING'), ('f50d9fa2-5d3e-4e49-9a02-218ad32ef4a9', 'k', 'PAID'),"
        " ('f50d9fa2-5d3e-4e49-9a02-218ad32ef4a9', 'k', 'PAID'),"
        " ('f50d9fa2-5d3e-4e49-9a02-218ad32ef4aa', 'k', 'SUCCESS')"
    )
    shape.restore(connection)
    assert shape.lost(connection) == []
    rows = connection.execute("SELECT idempotency_key, status FROM payments").fetchall()
    assert sorted(rows, key=str) == [(None, "SUCCESS"), (None, None)]


def test_what_others_added_stays(connection: Connection) -> None:
    connection.execute(
        "ALTER TABLE payments ADD note text, ADD UNIQUE (provider_txn_id);"
        "CREATE INDEX notes ON payments (note);"
        "CREATE VIEW paid AS SELECT id, amount_cents FROM payments;"
        "CREATE TABLE tickets (payment_id uuid REFERENCES payments (id))"
    )
    added = definition(connection)
    assert shape.lost(connection) == []
    connection.execute(SYNCHRONIZE)
    shape.restore(connection)
    assert definition(connection) == added
    assert connection.execute("SELECT * FROM paid").fetchall() == []


def test_what_cannot_be_put_back_keeps_no_service_from_starting(
    address: DatabaseAddress, connection: Connection, warned: list[dict[str, Any]]
) -> None:
    connection.execute("ALTER TABLE payments ALTER status TYPE varchar")
    connection.execute("CREATE VIEW states AS SELECT status FROM payments")
    assert migrate(address) == []
    assert [(each["changed"], "view" in each["reason"]) for each in warned] == [
        ("column status, check of status", True)
    ]


@pytest.mark.usefixtures("durable")
def test_doctor_tells_and_rebuild_restores_shape_and_rows(
    operator: Operator, address: DatabaseAddress, connection: Connection
) -> None:
    histories = [History(f"k{n}", currency="USD").charged() for n in range(3)]
    append(connection, [fact for each in histories for fact in each.facts])
    catch_up(address, seal=False)
    rows = connection.execute("SELECT status, currency FROM payments").fetchall()
    connection.execute(SYNCHRONIZE)
    told = operator("doctor").stdout
    assert f"another program changed the table payments ({', '.join(LOST)}): `payments mig" in told
    assert operator("rebuild", "--dry-run").exit_code == 1
    assert shape.lost(connection) == LOST
    assert operator("rebuild").exit_code == 0
    assert connection.execute("SELECT status, currency FROM payments").fetchall() == rows
    assert "something else" not in operator("doctor").stdout
