"""Migrations: applied once, by one process, and never changed afterwards."""

import re
import subprocess
import sys
import uuid
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import msgspec
import psycopg
import pytest
from loguru import logger

from payments import migrations
from payments.database.connections import DatabaseAddress, connect
from payments.errors import StartError
from payments.migrations import (
    LOCK_KEYS,
    Migration,
    check_migrated,
    check_readable,
    known_migrations,
    migrate,
)

Connection = psycopg.Connection[Any]

MIGRATE = """
import sys, msgspec
from payments.database.connections import DatabaseAddress
from payments.migrations import migrate
address = msgspec.json.decode(sys.argv[1], type=DatabaseAddress)
print(len(migrate(address)))
"""

# Who waits for the end of somebody else's transaction.
WAITING = """
SELECT pid FROM pg_stat_activity
 WHERE datname = current_database() AND application_name = 'payments migrate'
   AND wait_event = 'virtualxid'
"""


def test_numbers_are_consecutive() -> None:
    known = known_migrations()
    assert [migration.number for migration in known] == list(range(1, len(known) + 1))


def test_a_second_run_applies_nothing(empty_database: DatabaseAddress) -> None:
    assert migrate(empty_database) == known_migrations()
    assert migrate(empty_database) == []
    check_migrated(empty_database)


def test_five_processes_at_once_exactly_one_applies(empty_database: DatabaseAddress) -> None:
    target = msgspec.json.encode(empty_database).decode()
    runners = [
        subprocess.Popen([sys.executable, "-c", MIGRATE, target], stdout=subprocess.PIPE, text=True)
        for _ in range(5)
    ]
    applied = sorted(int(runner.communicate(timeout=60)[0]) for runner in runners)
    assert [runner.returncode for runner in runners] == [0] * 5
    assert applied == [0, 0, 0, 0, len(known_migrations())]


def test_who_looks_while_another_applies_takes_our_table_for_ours(
    empty_database: DatabaseAddress, monkeypatch: pytest.MonkeyPatch
) -> None:
    applied = migrations._applied

    def just_before_another_applies(connection: Connection) -> dict[int, migrations.Applied]:
        with monkeypatch.context() as inner:
            inner.setattr(migrations, "_applied", applied)
            migrate(empty_database)
        return {}

    with connect(empty_database, "test") as connection:
        with monkeypatch.context() as first:
            first.setattr(migrations, "_applied", just_before_another_applies)
            assert migrations.schema_of(connection).missing == known_migrations()
        assert migrations.schema_of(connection).missing == []


def test_unmigrated_is_said(empty_database: DatabaseAddress) -> None:
    with pytest.raises(StartError, match=r"lacks 0001_event_store.*payments migrate"):
        check_migrated(empty_database)


def test_a_changed_file_stops_the_start(
    address: DatabaseAddress, monkeypatch: pytest.MonkeyPatch
) -> None:
    changed = [
        Migration(number=m.number, name=m.name, sql=m.sql + "\n-- changed")
        for m in known_migrations()
    ]
    monkeypatch.setattr(migrations, "known_migrations", lambda: changed)
    with pytest.raises(StartError, match="0001_event_store was changed after it was applied"):
        migrate(address)


def newer_by(connection: Connection, ahead: int, oldest: int) -> str:
    """The database as a version leaves it that knows `ahead` migrations more; the last one's
    name."""
    newest = known_migrations()[-1].number
    for number in range(newest + 1, newest + 1 + ahead):
        connection.execute(
            "INSERT INTO schema_versions (number, name, checksum, oldest)"
            " VALUES (%s, 'future', 'x', %s)",
            [number, oldest],
        )
    return f"{newest + ahead:04}_future"


@pytest.fixture
def warnings() -> Iterator[list[dict[str, Any]]]:
    """The fields of each warning that is logged."""
    found: list[dict[str, Any]] = []
    sink = logger.add(lambda message: found.append(message.record["extra"]), level="WARNING")
    yield found
    logger.remove(sink)


def test_a_newer_database_that_allows_this_version_is_run_on(
    address: DatabaseAddress, connection: Connection, warnings: list[dict[str, Any]]
) -> None:
    newest = newer_by(connection, 2, oldest=known_migrations()[-1].number)
    assert migrate(address) == []
    check_migrated(address)
    check_readable(address)
    assert warnings == [{"migration": newest}] * 3


def test_a_newer_database_that_does_not_stops_the_start(
    address: DatabaseAddress, connection: Connection, warnings: list[dict[str, Any]]
) -> None:
    """Also if only one of its migrations does not. Reading is tried all the same."""
    known = known_migrations()[-1].number
    newer_by(connection, 1, oldest=known + 1)
    connection.execute(
        "INSERT INTO schema_versions (number, name, checksum, oldest) VALUES (9999, 'far', 'x', 5)"
    )
    said = f"9999_far, which this version does not know: .* that knows migration {known + 1:04}$"
    for stopped in (migrate, check_migrated):
        with pytest.raises(StartError, match=said):
            stopped(address)
    assert warnings == []
    check_readable(address)
    assert warnings == [{"migration": "9999_far"}]


def test_what_is_not_migrated_is_not_read(empty_database: DatabaseAddress) -> None:
    with pytest.raises(StartError, match=r"lacks 0001_event_store.*payments migrate"):
        check_readable(empty_database)


def test_the_first_release_finds_what_it_knows(connection: Connection) -> None:
    """Its own query: it refuses a database in which this answers more than its five."""
    released = connection.execute("SELECT number, name, checksum FROM schema_migrations").fetchall()
    assert sorted(released) == [(m.number, m.name, m.checksum) for m in known_migrations()[:5]]
    later = connection.execute("SELECT number, name, oldest FROM schema_versions").fetchall()
    assert sorted(later) == [(m.number, m.name, m.oldest) for m in known_migrations()[5:]]


def test_a_database_of_the_first_release_is_brought_up_to_date(
    empty_database: DatabaseAddress, monkeypatch: pytest.MonkeyPatch
) -> None:
    known = known_migrations()
    monkeypatch.setattr(migrations, "known_migrations", lambda: known[:5])
    migrate(empty_database)
    with psycopg.connect(empty_database.conninfo("tests"), autocommit=True) as connection:
        connection.execute("DROP TABLE schema_versions")  # which it does not have
    check_migrated(empty_database)
    monkeypatch.setattr(migrations, "known_migrations", lambda: known)
    with pytest.raises(StartError, match=r"lacks 0006_\w+, 0007_"):
        check_migrated(empty_database)
    assert migrate(empty_database) == known[5:]


def test_a_role_that_may_look_may_go_on_looking(
    empty_database: DatabaseAddress, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Without a word of whoever migrates: it is to be found out that the software is too old."""
    known, reader = known_migrations(), f"reader_{uuid.uuid4().hex[:8]}"
    monkeypatch.setattr(migrations, "known_migrations", lambda: known[:5])
    migrate(empty_database)
    with psycopg.connect(empty_database.conninfo("tests"), autocommit=True) as connection:
        connection.execute(f"CREATE ROLE {reader} LOGIN".encode())
        try:
            connection.execute(f"GRANT SELECT ON schema_migrations TO {reader}".encode())
            connection.execute("DROP TABLE schema_versions")
            monkeypatch.undo()
            migrate(empty_database)
            for check in (check_migrated, check_readable):
                check(msgspec.structs.replace(empty_database, user=reader))
        finally:
            connection.execute(f"DROP OWNED BY {reader}".encode())
            connection.execute(f"DROP ROLE {reader}".encode())


def test_a_failing_migration_leaves_nothing_behind(
    address: DatabaseAddress, connection: Connection, monkeypatch: pytest.MonkeyPatch
) -> None:
    known = known_migrations()
    broken = Migration(
        number=len(known) + 1, name="broken", sql="CREATE TABLE half (); SELECT 1 / 0"
    )
    monkeypatch.setattr(migrations, "known_migrations", lambda: [*known, broken])
    with pytest.raises(StartError, match="migration failed: division by zero"):
        migrate(address)
    assert connection.execute("SELECT to_regclass('half')").fetchone() == (None,)
    monkeypatch.undo()
    assert migrate(address) == []


def test_a_migration_that_cannot_be_recorded_was_not_applied(
    address: DatabaseAddress, connection: Connection, monkeypatch: pytest.MonkeyPatch
) -> None:
    known = known_migrations()
    added = Migration(number=len(known) + 1, name="whole", sql="CREATE TABLE whole ()")
    monkeypatch.setattr(migrations, "known_migrations", lambda: [*known, added])
    monkeypatch.setattr(migrations, "RECORD_LATER", "SELECT %s, %s, %s, %s / 0")
    with pytest.raises(StartError, match="migration failed: division by zero"):
        migrate(address)
    assert connection.execute("SELECT to_regclass('whole')").fetchone() == (None,)


def statements(migration: Migration) -> list[str]:
    """Of a file without bodies of functions or texts that hold a semicolon."""
    without_comments = re.sub(r"--.*", "", migration.sql)
    return [each.strip() for each in without_comments.split(";") if each.strip()]


@pytest.mark.parametrize("migration", known_migrations(), ids=str)
class TestFiles:
    def test_it_names_the_oldest_version_that_may_run_on_its_schema(
        self, migration: Migration
    ) -> None:
        """The first five cannot be changed, and are of a version that goes by no such line."""
        stated = re.match(r"-- oldest: [0-9]{4}\n", migration.sql)
        assert (stated is not None) == (migration.number > 5)
        assert migration.oldest <= migration.number

    def test_an_index_that_is_built_beside_writes_is_alone(self, migration: Migration) -> None:
        """Two statements would be a transaction."""
        if any("CONCURRENTLY" in statement for statement in statements(migration)):
            assert migration.index is not None
            assert len(statements(migration)) == 1


class TestIndexes:
    """CREATE INDEX CONCURRENTLY, which leaves an index that nobody uses wherever it is stopped."""

    @pytest.fixture
    def building(self, monkeypatch: pytest.MonkeyPatch) -> Migration:
        known = known_migrations()
        built = Migration(
            number=len(known) + 1,
            name="seconds",
            sql="-- oldest: 0005\n-- Why.\n\n"
            "CREATE UNIQUE INDEX CONCURRENTLY IF NOT EXISTS seconds ON payments (created_at);\n",
        )
        monkeypatch.setattr(migrations, "known_migrations", lambda: [*known, built])
        return built

    def is_valid(self, connection: Connection) -> bool | None:
        query = "SELECT indisvalid FROM pg_index WHERE indexrelid = to_regclass('seconds')"
        row = connection.execute(query).fetchone()
        return None if row is None else row[0]

    def test_it_is_built_and_recorded(
        self, address: DatabaseAddress, connection: Connection, building: Migration
    ) -> None:
        assert migrate(address) == [building]
        assert self.is_valid(connection)
        assert migrate(address) == []

    def test_one_that_was_built_and_not_recorded(
        self, address: DatabaseAddress, connection: Connection, building: Migration
    ) -> None:
        connection.execute(building.sql.encode())
        assert migrate(address) == [building]
        assert self.is_valid(connection)

    def test_one_that_failed_is_built_again(
        self, address: DatabaseAddress, connection: Connection, building: Migration
    ) -> None:
        connection.execute(
            "INSERT INTO payments (id, created_at) SELECT gen_random_uuid(), 'epoch'"
            " FROM generate_series(1, 2)"
        )
        with pytest.raises(StartError, match="could not create unique index"):
            migrate(address)
        assert self.is_valid(connection) is False
        connection.execute("DELETE FROM payments")
        assert migrate(address) == [building]
        assert self.is_valid(connection)

    def test_one_that_was_killed_is_built_again(
        self, address: DatabaseAddress, connection: Connection, building: Migration
    ) -> None:
        """While it waits for somebody's transaction."""
        with psycopg.connect(address.conninfo("tests")) as other, ThreadPoolExecutor() as pool:
            other.execute("SET idle_in_transaction_session_timeout = 0")
            other.execute("LOCK payments IN ROW EXCLUSIVE MODE")
            migrating = pool.submit(migrate, address)
            while (waiting := connection.execute(WAITING).fetchone()) is None:
                assert not migrating.done()
            connection.execute("SELECT pg_terminate_backend(%s)", waiting)
            with pytest.raises(StartError, match="terminating connection"):
                migrating.result(timeout=30)
        assert self.is_valid(connection) is False
        assert migrate(address) == [building]
        assert self.is_valid(connection)


def test_nobody_waits_for_the_lock_without_anything_to_migrate(
    address: DatabaseAddress, connection: Connection, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Every session may take it: a role that reads could keep the service from starting."""
    monkeypatch.setattr(migrations, "LOCK_WAIT_S", 0)
    connection.execute("SELECT pg_advisory_lock(%s, %s)", LOCK_KEYS)
    assert migrate(address) == []
    last = known_migrations()[-1]
    connection.execute("DELETE FROM schema_versions WHERE number = %s", [last.number])
    with pytest.raises(StartError, match="another process has been migrating"):
        migrate(address)


def test_the_files_are_part_of_the_package() -> None:
    assert {path.name for path in Path(migrations.__file__).parent.glob("*.sql")} == {
        f"{migration.number:04}_{migration.name}.sql" for migration in known_migrations()
    }
