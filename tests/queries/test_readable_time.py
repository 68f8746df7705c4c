"""readable_time, and that Postgres puts its expression into every query that calls it."""

import json
import uuid
from collections.abc import Iterator
from datetime import UTC, datetime
from typing import Any

import psycopg
import pytest

from payments.database.connections import DatabaseAddress
from payments.events import store
from payments.migrations import migrate
from payments.projections import comparison
from tests.support import History, append

Connection = psycopg.Connection[Any]

QUERIES = {
    name: value
    for module in (store, comparison)
    for name, value in vars(module).items()
    if isinstance(value, str) and "readable_time(" in value
}
ID = uuid.uuid4()
PARAMS = {
    **dict.fromkeys(("after", "first"), 1),
    **dict.fromkeys(("last", "last_event", "last_seal"), 10),
    **dict.fromkeys(("first_id", "last_id"), ID),
    **dict.fromkeys(("ids", "payment_id", "types", "holding")),
}


@pytest.fixture
def reader(connection: Connection) -> Iterator[Connection]:
    """As a role that may read the tables and was given nothing else."""
    name = f"reader_{uuid.uuid4().hex[:8]}"
    connection.execute(
        f"CREATE ROLE {name}; GRANT SELECT ON ALL TABLES IN SCHEMA public TO {name};"
        f" SET ROLE {name}".encode()
    )
    yield connection
    connection.execute(f"RESET ROLE; DROP OWNED BY {name}; DROP ROLE {name}".encode())


@pytest.mark.parametrize("name", QUERIES)
def test_no_query_calls_it_row_by_row(reader: Connection, name: str) -> None:
    query = QUERIES[name]
    params: Any = PARAMS if "%(" in query else [ID] * query.count("%s")
    row = reader.execute(f"EXPLAIN (VERBOSE, FORMAT JSON) {query}".encode(), params).fetchone()
    explained = json.dumps(row)
    assert "CASE WHEN" in explained
    assert "readable_time" not in explained


def test_whoever_may_read_the_tables_may_call_it(empty_database: DatabaseAddress) -> None:
    """Also where the owner gives out no functions by default."""
    with psycopg.connect(empty_database.conninfo("tests"), autocommit=True) as connection:
        connection.execute("ALTER DEFAULT PRIVILEGES REVOKE EXECUTE ON FUNCTIONS FROM PUBLIC")
        migrate(empty_database)
        rows = connection.execute(
            "SELECT has_function_privilege('pg_monitor', oid, 'EXECUTE') FROM pg_proc"
            " WHERE proname = 'readable_time'"
        ).fetchall()
    assert rows == [(True,), (True,)]


def test_the_queries_of_the_log_and_of_all_tables_are_among_them() -> None:
    tables = {table.select for table in comparison.TABLES}
    assert tables <= set(QUERIES.values())
    assert {"LOAD_ENTRIES", "READ_PART", "READ_MATCHING", "READ_PLACES"} <= QUERIES.keys()


FIRST = datetime(1, 1, 1, tzinfo=UTC)
LAST = datetime(9999, 12, 31, 23, 59, 59, 999999, tzinfo=UTC)
# With a place for the zone.
MOMENTS: list[tuple[str, datetime | None]] = [
    ("-infinity", None),
    ("4713-01-01 00:00:00{} BC", None),
    ("0001-12-31 23:59:59.999999{} BC", None),
    ("0001-01-01 00:00:00{}", FIRST),
    ("2026-01-02 03:04:05.000006{}", datetime(2026, 1, 2, 3, 4, 5, 6, tzinfo=UTC)),
    ("9999-12-31 23:59:59.999999{}", LAST),
    ("10000-01-01 00:00:00{}", None),
    ("infinity", None),
]


@pytest.mark.parametrize("zone", ["UTC", "Asia/Kolkata", "America/Los_Angeles"])
@pytest.mark.parametrize("style", ["ISO, YMD", "SQL, DMY", "German"])
def test_a_time_that_python_does_not_have_is_null(
    connection: Connection, zone: str, style: str
) -> None:
    """Whatever the session is set to. Compared by Postgres: psycopg reads times in UTC alone."""
    connection.execute(f"SET TimeZone = '{zone}'; SET DateStyle = '{style}'".encode())
    for text, expected in MOMENTS:
        row = connection.execute(
            "SELECT readable_time(%s::timestamptz) IS NOT DISTINCT FROM %s::timestamptz,"
            " readable_time(%s::timestamp) IS NOT DISTINCT FROM %s::timestamptz",
            [text.format("Z"), expected, text.format(""), expected],
        ).fetchone()
        assert row == (True, True), text
    row = connection.execute(
        "SELECT readable_time(NULL::timestamptz), readable_time(NULL::timestamp)"
    ).fetchone()
    assert row == (None, None)


def test_rows_that_hold_one_are_read(connection: Connection) -> None:
    history = History("k").charged()
    append(connection, history.facts)
    connection.execute(
        "ALTER TABLE payment_events DISABLE TRIGGER ALL, DROP CONSTRAINT payment_events_sane;"
        "UPDATE payment_events SET recorded_at = 'infinity' WHERE originator_version = 1"
    )
    rows = connection.execute(store.LOAD_ENTRIES.encode(), [history.id]).fetchall()
    assert rows[0][5] == datetime(1970, 1, 1, tzinfo=UTC)
    assert rows[1][5].year >= 2026
