"""Migrations: applied once, by one process, and never changed afterwards."""

import subprocess
import sys
from pathlib import Path
from typing import Any

import msgspec
import psycopg
import pytest

from payments import migrations
from payments.database import DatabaseAddress
from payments.errors import StartError
from payments.migrations import Migration, check_migrated, known_migrations, migrate

MIGRATE = """
import sys, msgspec
from payments.database import DatabaseAddress
from payments.migrations import migrate
address = msgspec.json.decode(sys.argv[1], type=DatabaseAddress)
print(len(migrate(address)))
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


def test_unmigrated_is_said(empty_database: DatabaseAddress) -> None:
    with pytest.raises(StartError, match=r"lacks 0001_event_store.*payments migrate"):
        check_migrated(empty_database)


def test_a_changed_file_stops_the_start(
    address: DatabaseAddress, monkeypatch: pytest.MonkeyPatch
) -> None:
    changed = [Migration(m.number, m.name, m.sql + "\n-- changed") for m in known_migrations()]
    monkeypatch.setattr(migrations, "known_migrations", lambda: changed)
    with pytest.raises(StartError, match="0001_event_store was changed after it was applied"):
        migrate(address)


def test_a_newer_database_stops_the_start(
    address: DatabaseAddress, connection: psycopg.Connection[Any]
) -> None:
    connection.execute("INSERT INTO schema_migrations VALUES (9999, 'future', 'x')")
    with pytest.raises(StartError, match="9999, which this version does not know"):
        migrate(address)


def test_a_failing_migration_leaves_nothing_behind(
    address: DatabaseAddress,
    connection: psycopg.Connection[Any],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    known = known_migrations()
    broken = Migration(len(known) + 1, "broken", "CREATE TABLE half (); SELECT 1 / 0")
    monkeypatch.setattr(migrations, "known_migrations", lambda: [*known, broken])
    with pytest.raises(StartError, match="migration failed: division by zero"):
        migrate(address)
    assert connection.execute("SELECT to_regclass('half')").fetchone() == (None,)
    assert connection.execute("SELECT count(*) FROM schema_migrations").fetchone() == (len(known),)


def test_the_files_are_part_of_the_package() -> None:
    assert {path.name for path in Path(migrations.__file__).parent.glob("*.sql")} == {
        f"{migration.number:04}_{migration.name}.sql" for migration in known_migrations()
    }
