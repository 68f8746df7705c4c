"""Holding commits up, and looking at what they did."""

import contextlib
import uuid
from typing import Any

import psycopg

from payments.database.connections import DatabaseAddress
from tests.support import until

LOCK = "BEGIN; LOCK TABLE append_lock IN SHARE UPDATE EXCLUSIVE MODE"
UNLOCK = "COMMIT"


@contextlib.contextmanager
def lock_held(connection: psycopg.Connection[Any]) -> Any:
    """While this is open, no append can commit."""
    connection.execute(LOCK)
    try:
        yield
    finally:
        connection.execute(UNLOCK)


def log_of(connection: psycopg.Connection[Any]) -> list[tuple[int, uuid.UUID, int]]:
    return connection.execute(
        "SELECT notification_id, originator_id, originator_version FROM payment_events ORDER BY 1"
    ).fetchall()


def let_commits_not_wait(connection: psycopg.Connection[Any], address: DatabaseAddress) -> None:
    """As an administrator may have told the database; and from now on it notes what the commit of
    each event does."""
    off = f"ALTER DATABASE {address.dbname} SET synchronous_commit = off"
    connection.execute(off.encode())
    connection.execute("CREATE TABLE commits (application text, synchronous_commit text)")
    connection.execute(
        "CREATE FUNCTION note_commit() RETURNS trigger LANGUAGE plpgsql AS $$ BEGIN"
        " INSERT INTO commits SELECT current_setting('application_name'),"
        " current_setting('synchronous_commit'); RETURN NULL; END $$"
    )
    connection.execute(
        "CREATE CONSTRAINT TRIGGER note_commit AFTER INSERT ON payment_events"
        " DEFERRABLE INITIALLY DEFERRED FOR EACH ROW EXECUTE FUNCTION note_commit()"
    )


def commits(connection: psycopg.Connection[Any]) -> list[tuple[str, str]]:
    return connection.execute("SELECT * FROM commits").fetchall()


async def waits_for_lock(connection: psycopg.Connection[Any]) -> None:
    """Until the appender's statement is waiting for the lock that we hold."""
    waiting = "SELECT 1 FROM pg_locks WHERE relation = 'append_lock'::regclass AND NOT granted"
    await until(lambda: connection.execute(waiting).fetchone())
