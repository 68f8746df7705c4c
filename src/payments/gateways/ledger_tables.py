"""The tables of the simulated provider's ledger, and how their file is opened."""

import sqlite3
import time
from pathlib import Path
from uuid import uuid4

START_WAIT_S = 60.0  # another process makes the tables, or reads in an earlier version's ledger
APPLICATION_ID = 0x70617973  # in the header of the file

# Earlier versions made `charges` with a rowid: two pages are written for each charge then.
TABLES = """
CREATE TABLE ledger (id TEXT NOT NULL);
CREATE TABLE charges (
    id             TEXT PRIMARY KEY NOT NULL, -- the payment's
    amount_cents   INTEGER NOT NULL,
    currency       TEXT NOT NULL,
    outcome        TEXT NOT NULL, -- approved, or the code of the decline
    refunded_cents INTEGER NOT NULL DEFAULT 0
) WITHOUT ROWID;
CREATE TABLE refunds (
    id           TEXT PRIMARY KEY NOT NULL,
    amount_cents INTEGER NOT NULL,
    currency     TEXT NOT NULL,
    outcome      TEXT NOT NULL,
    payment_id   TEXT NOT NULL
);
"""
# Earlier versions made ledgers without it.
BEGINNINGS = """
CREATE TABLE IF NOT EXISTS beginnings (
    id     TEXT PRIMARY KEY NOT NULL, -- the payment's
    method TEXT NOT NULL,
    at     REAL NOT NULL -- seconds since 1970
) WITHOUT ROWID
"""
HAS_BEGINNINGS = "SELECT 1 FROM sqlite_master WHERE name = 'beginnings'"
NAME = "INSERT INTO ledger (id) VALUES (?)"


def open_tables(path: Path | None) -> sqlite3.Connection:
    """With its tables; raises OSError and sqlite3.Error."""
    if path is not None and not path.exists():
        path.parent.mkdir(parents=True, exist_ok=True)
        path.touch(0o600)
    connection = sqlite3.connect(
        path.absolute() if path else ":memory:",
        timeout=START_WAIT_S,
        isolation_level=None,
        check_same_thread=False,  # it is opened before its thread is started
    )
    try:
        # In memory the order of the charges is needed, to forget the first.
        _make_tables(connection, TABLES if path else TABLES.replace("WITHOUT ROWID", ""))
    except BaseException:
        connection.close()
        raise
    return connection


def _make_tables(connection: sqlite3.Connection, tables: str) -> None:
    """Unless they are there; raises sqlite3.Error."""

    def is_made() -> bool:
        (marker,) = connection.execute("PRAGMA application_id").fetchone()
        return bool(marker == APPLICATION_ID)

    # In this order: another process may be making them, all in one transaction.
    if connection.execute("SELECT 1 FROM sqlite_master").fetchone() and not is_made():
        raise sqlite3.DatabaseError("it is the database of another program")
    if _journal_mode(connection) not in ("wal", "memory"):
        raise sqlite3.DatabaseError(
            "its file system does not support the shared memory that WAL needs"
        )
    connection.execute("PRAGMA synchronous = NORMAL")
    if is_made() and connection.execute(HAS_BEGINNINGS).fetchone():
        return
    connection.execute("BEGIN IMMEDIATE")
    if not is_made():
        for statement in tables.split(";")[:-1]:
            connection.execute(statement)
        connection.execute(NAME, [str(uuid4())])
        connection.execute(f"PRAGMA application_id = {APPLICATION_ID}")
    connection.execute(BEGINNINGS)
    connection.execute("COMMIT")


def _journal_mode(connection: sqlite3.Connection) -> str:
    """Sets it; SQLite itself does not wait here for another process that does the same."""
    deadline = time.monotonic() + START_WAIT_S
    while True:
        try:
            return str(connection.execute("PRAGMA journal_mode = WAL").fetchone()[0])
        except sqlite3.OperationalError as error:
            if error.sqlite_errorcode != sqlite3.SQLITE_BUSY or time.monotonic() > deadline:
                raise
            time.sleep(0.01)
