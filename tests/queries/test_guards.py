"""What keeps the log from being altered: each part of it that is missing or changed is named."""

from typing import Any

import psycopg
import pytest
from psycopg import sql

from payments.database.connections import DatabaseAddress
from payments.queries.guards import CONSTRAINTS, FUNCTIONS, NEVER_NULL, TRIGGERS, broken_guards
from payments.snapshot import Reader
from tests.support import History, append

Connection = psycopg.Connection[Any]
TRIGGER = "the trigger payment_events_append_only on payment_events"
FUNCTION = "the function refuse_change_of_payment_events"
NOT_OURS = "is not the one that the migrations made"
MAKE_TRIGGER = (
    "CREATE OR REPLACE TRIGGER payment_events_append_only {} ON payment_events"
    " FOR EACH STATEMENT {} EXECUTE FUNCTION {}();"
    " ALTER TABLE payment_events ENABLE ALWAYS TRIGGER payment_events_append_only"
)
BEFORE, OURS = "BEFORE UPDATE OR DELETE OR TRUNCATE", "refuse_change_of_payment_events"
LET_THROUGH = " RETURNS trigger LANGUAGE plpgsql AS 'BEGIN RETURN NULL; END'"


def found(address: DatabaseAddress) -> list[str]:
    with Reader(address, "tests") as reader:
        return [str(each) for each in broken_guards(reader)]


def test_all_are_in_place(address: DatabaseAddress, connection: Connection) -> None:
    append(connection, History("k").charged().facts)
    assert found(address) == []


def test_the_lists_are_what_the_migrations_make(connection: Connection) -> None:
    """Whoever adds a guard to one of these tables is to add it to the list."""
    tables = sorted({trigger.table for trigger in TRIGGERS})
    triggers = connection.execute(
        "SELECT c.relname, t.tgname, p.proname FROM pg_trigger t"
        "  JOIN pg_class c ON c.oid = t.tgrelid JOIN pg_proc p ON p.oid = t.tgfoid"
        " WHERE NOT t.tgisinternal AND c.relname = ANY (%s)",
        [tables],
    ).fetchall()
    assert set(triggers) == set(TRIGGERS)
    constraints = connection.execute(
        "SELECT conname FROM pg_constraint"
        " WHERE conrelid = 'payment_events'::regclass AND contype <> 'n'"
    ).fetchall()
    listed = {each.name for each in CONSTRAINTS if each.table == "payment_events"}
    assert {name for (name,) in constraints} == listed
    columns = connection.execute(
        "SELECT attname FROM pg_attribute WHERE attrelid = 'payment_events'::regclass"
        "   AND attnum > 0 AND NOT attisdropped"
    ).fetchall()
    assert {name for (name,) in columns} == set(NEVER_NULL)


@pytest.mark.parametrize("trigger", TRIGGERS, ids=lambda trigger: trigger.name)
@pytest.mark.parametrize(
    ("statement", "words"),
    [
        ("ALTER TABLE {table} DISABLE TRIGGER {name}", "is disabled"),
        ("ALTER TABLE {table} DISABLE TRIGGER ALL", "is disabled"),
        ("ALTER TABLE {table} ENABLE TRIGGER {name}", "does not fire in every session"),
        ("ALTER TABLE {table} ENABLE REPLICA TRIGGER {name}", "does not fire in every session"),
        ("DROP TRIGGER {name} ON {table}", "is missing"),
        ("ALTER TRIGGER {name} ON {table} RENAME TO other", "is missing"),
    ],
    ids=["disabled", "all disabled", "not always", "replicas", "dropped", "renamed"],
)
def test_a_trigger_that_does_not_fire(
    address: DatabaseAddress, connection: Connection, trigger: Any, statement: str, words: str
) -> None:
    names = {"table": sql.Identifier(trigger.table), "name": sql.Identifier(trigger.name)}
    connection.execute(sql.SQL(statement).format(**names))
    assert found(address) == [f"guard: the trigger {trigger.name} on {trigger.table} {words}"]


@pytest.mark.parametrize(
    ("statement", "guard"),
    [
        (MAKE_TRIGGER.format("BEFORE UPDATE OR DELETE", "", OURS), TRIGGER),
        (MAKE_TRIGGER.format("BEFORE UPDATE OF topic OR DELETE OR TRUNCATE", "", OURS), TRIGGER),
        (MAKE_TRIGGER.format("AFTER UPDATE OR DELETE OR TRUNCATE", "", OURS), TRIGGER),
        (MAKE_TRIGGER.format(BEFORE, "WHEN (false)", OURS), TRIGGER),
        (
            f"CREATE FUNCTION let_through(){LET_THROUGH};"
            + MAKE_TRIGGER.format(BEFORE, "", "let_through"),
            TRIGGER,
        ),
        (f"CREATE OR REPLACE FUNCTION {OURS}(){LET_THROUGH}", FUNCTION),
    ],
    ids=["not on truncate", "of a column", "after", "never", "another function", "its function"],
)
def test_a_trigger_that_does_something_else(
    address: DatabaseAddress, connection: Connection, statement: str, guard: str
) -> None:
    connection.execute(statement.encode())
    assert found(address) == [f"guard: {guard} {NOT_OURS}"]


@pytest.mark.parametrize("constraint", CONSTRAINTS, ids=lambda constraint: constraint.name)
def test_a_constraint_that_is_missing(
    address: DatabaseAddress, connection: Connection, constraint: Any
) -> None:
    drop = "ALTER TABLE {} DROP CONSTRAINT {}"
    names = sql.Identifier(constraint.table), sql.Identifier(constraint.name)
    connection.execute(sql.SQL(drop).format(*names))
    expected = f"guard: the constraint {constraint.name} on {constraint.table} is missing"
    assert found(address)[0] == expected


@pytest.mark.parametrize(
    ("name", "definition", "words"),
    [
        ("payment_events_stream", "UNIQUE (originator_id)", NOT_OURS),
        ("payment_events_position", "UNIQUE (notification_id, originator_id)", NOT_OURS),
        ("payment_events_sane", "CHECK (true)", NOT_OURS),
        ("payment_events_sane", "CHECK (notification_id > 0) NOT ENFORCED", "is not enforced"),
    ],
)
def test_a_constraint_that_demands_less(
    address: DatabaseAddress, connection: Connection, name: str, definition: str, words: str
) -> None:
    if "NOT ENFORCED" in definition and connection.info.server_version < 180_000:
        pytest.skip("this Postgres enforces every constraint")
    connection.execute(
        f"ALTER TABLE payment_events DROP CONSTRAINT {name},"
        f" ADD CONSTRAINT {name} {definition}".encode()
    )
    assert f"guard: the constraint {name} on payment_events {words}" in found(address)


def test_a_column_that_takes_null(address: DatabaseAddress, connection: Connection) -> None:
    connection.execute(
        "ALTER TABLE payment_events ALTER state DROP NOT NULL, ALTER topic DROP NOT NULL"
    )
    assert found(address) == [
        "guard: the column topic of payment_events takes NULL",
        "guard: the column state of payment_events takes NULL",
    ]


REPLACED = (
    "CREATE OR REPLACE FUNCTION readable_time(moment timestamptz) RETURNS timestamptz"
    " LANGUAGE {} IMMUTABLE AS '{}'"
)
READABLE_TIME = "the function readable_time(timestamptz)"


@pytest.mark.parametrize(
    "statement",
    [
        REPLACED.format("sql", "SELECT moment"),
        REPLACED.format("plpgsql", "BEGIN RETURN moment; END"),
        "ALTER FUNCTION readable_time(timestamptz) SET search_path = public",
        # Found before ours, by whoever does not name the schema.
        "CREATE SCHEMA elsewhere;"
        + REPLACED.format("sql", "SELECT moment").replace("readable", "elsewhere.readable", 1)
        + "; DO $$ BEGIN EXECUTE format('ALTER DATABASE %I SET search_path = elsewhere, public',"
        " current_database()); END $$",
    ],
    ids=["another body", "another language", "a path of its own", "another one before it"],
)
def test_a_function_that_the_audit_reads_with_is_another_one(
    address: DatabaseAddress, connection: Connection, statement: str
) -> None:
    connection.execute(statement.encode())
    assert found(address) == [f"guard: {READABLE_TIME} {NOT_OURS}"]


@pytest.mark.parametrize("signature", FUNCTIONS)
def test_a_function_that_is_missing(
    address: DatabaseAddress, connection: Connection, signature: str
) -> None:
    connection.execute(f"ALTER FUNCTION {signature} RENAME TO other".encode())
    assert found(address) == [f"guard: the function {signature} is missing"]
