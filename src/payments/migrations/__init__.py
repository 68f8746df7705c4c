"""Numbered SQL files and the runner that applies them, each in a transaction of its own.

A file that was applied never changes: its checksum is kept, and a difference stops the start. To
change the schema, add the next number.
"""

import hashlib
import re
import time
from importlib import resources
from typing import Any

import msgspec
import psycopg
from loguru import logger

from payments.database import DatabaseAddress, connect
from payments.errors import StartError

LOCK_KEYS = (7165010, 2)  # 1 is the appenders' lock, in 0001_event_store.sql
LOCK_WAIT_S = 120  # another process may be in the middle of a long migration
LOCK_POLL_S = 0.1


class Migration(msgspec.Struct, frozen=True):
    number: int
    name: str
    sql: str

    @property
    def checksum(self) -> str:
        return hashlib.sha256(self.sql.encode()).hexdigest()


def known_migrations() -> list[Migration]:
    """The migrations that this version of the software brings, in order."""
    found = [
        Migration(int(match[1]), match[2], entry.read_text(encoding="utf-8"))
        for entry in resources.files(__name__).iterdir()
        if (match := re.fullmatch(r"([0-9]{4})_([a-z0-9_]+)\.sql", entry.name))
    ]
    return sorted(found, key=lambda migration: migration.number)


def migrate(address: DatabaseAddress) -> list[Migration]:
    """Brings the database up to date; returns what it applied.

    Any number of processes may call this at once: one applies, the others wait for it. Raises
    StartError if the database is newer than the software, or if an applied file was changed.
    """
    with connect(address, "payments migrate") as connection:
        # A migration may rightly take longer than a request.
        connection.execute("SET statement_timeout = 0; SET lock_timeout = '60s'")
        _lock(connection)
        try:
            return _apply_missing(connection)
        except psycopg.Error as error:
            raise StartError(f"migration failed: {error.diag.message_primary or error}") from error


def check_migrated(address: DatabaseAddress) -> None:
    """StartError unless every known migration is applied: for MIGRATE_ON_START=false."""
    with connect(address, "payments migrate") as connection:
        missing = _missing(connection)
    if missing:
        names = ", ".join(f"{migration.number:04}_{migration.name}" for migration in missing)
        raise StartError(f"the database lacks {names}: run `payments migrate` first")


def _lock(connection: psycopg.Connection[Any]) -> None:
    """One migrator at a time.

    Polled: waiting inside pg_advisory_lock would hold a snapshot, and a CREATE INDEX CONCURRENTLY
    of the process that has the lock would wait for that snapshot: a deadlock.
    """
    deadline = time.monotonic() + LOCK_WAIT_S
    while not _one(connection, "SELECT pg_try_advisory_lock(%s, %s)", LOCK_KEYS):
        if time.monotonic() > deadline:
            raise StartError("another process has been migrating the database for 2 minutes")
        time.sleep(LOCK_POLL_S)


def _apply_missing(connection: psycopg.Connection[Any]) -> list[Migration]:
    connection.execute(
        """
        CREATE TABLE IF NOT EXISTS schema_migrations (
            number     integer     PRIMARY KEY,
            name       text        NOT NULL,
            checksum   text        NOT NULL,
            applied_at timestamptz NOT NULL DEFAULT now()
        )
        """
    )
    missing = _missing(connection)
    for migration in missing:
        with connection.transaction():
            connection.execute(migration.sql.encode())
            connection.execute(
                "INSERT INTO schema_migrations (number, name, checksum) VALUES (%s, %s, %s)",
                [migration.number, migration.name, migration.checksum],
            )
        logger.bind(migration=f"{migration.number:04}_{migration.name}").info("migration applied")
    return missing


def _missing(connection: psycopg.Connection[Any]) -> list[Migration]:
    known = known_migrations()
    if not _one(connection, "SELECT to_regclass('schema_migrations') IS NOT NULL"):
        return known
    rows = connection.execute("SELECT number, name, checksum FROM schema_migrations").fetchall()
    applied = {number: (name, checksum) for number, name, checksum in rows}
    if newer := sorted(set(applied) - {migration.number for migration in known}):
        raise StartError(
            f"the database has migration {newer[-1]:04}, which this version does not know: "
            "run a newer version of the service"
        )
    for migration in known:
        if migration.number in applied and applied[migration.number][1] != migration.checksum:
            raise StartError(
                f"migration {migration.number:04}_{migration.name} was changed after it was "
                "applied to this database: restore the file and add a new migration"
            )
    return [migration for migration in known if migration.number not in applied]


def _one(connection: psycopg.Connection[Any], query: str, params: tuple[int, ...] = ()) -> Any:
    row = connection.execute(query.encode(), params).fetchone()
    return row[0] if row else None
