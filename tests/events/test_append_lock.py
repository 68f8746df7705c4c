"""Appends wait for one another at a lock that only the append function can take."""

import uuid
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import psycopg
import pytest

from payments import migrations
from payments.database.connections import DatabaseAddress
from payments.events.store import APPEND, append_params
from payments.migrations import migrate
from tests.support import append_stored, stored_event

Connection = psycopg.Connection[Any]

MODES = (
    *("ROW SHARE", "ROW EXCLUSIVE", "SHARE UPDATE EXCLUSIVE", "SHARE", "SHARE ROW EXCLUSIVE"),
    *("EXCLUSIVE", "ACCESS EXCLUSIVE"),
)
# What the function took before, and every session can.
NAMED = "SELECT pg_advisory_xact_lock(7165010, 1)"
HELD = "SELECT mode FROM pg_locks WHERE relation = 'append_lock'::regclass AND granted"
WAITING = "SELECT FROM pg_locks WHERE NOT granted AND locktype = %s"


@pytest.fixture
def reader(connection: Connection) -> Iterator[str]:
    """A role that may read everything."""
    role = f"r_{uuid.uuid4().hex[:8]}"
    connection.execute(
        f"CREATE ROLE {role}; GRANT SELECT ON ALL TABLES IN SCHEMA public TO {role}".encode()
    )
    yield role
    connection.execute(f"DROP OWNED BY {role}; DROP ROLE {role}".encode())


def as_reader(address: DatabaseAddress, reader: str) -> Connection:
    connection = psycopg.connect(address.conninfo("tests"))
    connection.execute(f"SET SESSION AUTHORIZATION {reader}".encode())
    connection.commit()
    return connection


@pytest.mark.parametrize("mode", MODES)
def test_who_may_read_cannot_take_it(address: DatabaseAddress, reader: str, mode: str) -> None:
    with (
        as_reader(address, reader) as other,
        pytest.raises(psycopg.errors.InsufficientPrivilege),
    ):
        other.execute(f"LOCK TABLE append_lock IN {mode} MODE".encode())


@pytest.mark.parametrize(
    "taken",
    [
        NAMED,
        "LOCK TABLE append_lock IN ACCESS SHARE MODE",
        "LOCK payment_events IN ACCESS SHARE MODE",
    ],
)
def test_what_who_may_read_can_take_holds_up_no_append(
    address: DatabaseAddress, connection: Connection, reader: str, taken: str
) -> None:
    with as_reader(address, reader) as other:
        other.execute(taken.encode())
        assert append_stored(connection, [stored_event()]) == 1


class TestWhileItIsMigrated:
    """Calls of the function as it was take the lock as it was, also after the migration."""

    @pytest.fixture
    def before(self, empty_database: DatabaseAddress, monkeypatch: pytest.MonkeyPatch) -> Any:
        known = migrations.known_migrations()

        def up_to(number: int) -> DatabaseAddress:
            monkeypatch.setattr(migrations, "known_migrations", lambda: known[:number])
            migrate(empty_database)
            return empty_database

        return up_to

    def test_calls_of_both_wait_for_one_another(self, before: Any) -> None:
        address = before(10)
        with psycopg.connect(address.conninfo("tests")) as old:
            append_stored(old, [stored_event()])
            before(11)
            with psycopg.connect(address.conninfo("tests"), autocommit=True) as new:
                new.execute("SET lock_timeout = '100ms'")
                with pytest.raises(psycopg.errors.LockNotAvailable):
                    append_stored(new, [stored_event()])
                old.commit()
                with new.transaction():
                    assert append_stored(new, [stored_event()]) == 2
                    # What calls of the function to come will wait for.
                    assert new.execute(HELD).fetchall() == [("ShareUpdateExclusiveLock",)]

    def test_the_old_lock_is_left_only_when_nobody_can_have_it(self, before: Any) -> None:
        address = before(10)
        with (
            psycopg.connect(address.conninfo("tests")) as old,
            psycopg.connect(address.conninfo("tests"), autocommit=True) as looking,
            ThreadPoolExecutor() as pool,
        ):
            append_stored(looking, [stored_event()])
            append_stored(old, [stored_event()])
            migrating = pool.submit(before, 12)
            while looking.execute(WAITING, ["advisory"]).fetchone() is None:
                assert not migrating.done()
            assert looking.execute("SELECT max(number) FROM schema_versions").fetchone() == (11,)
            old.commit()
            migrating.result(timeout=30)
            old.execute(NAMED)
            assert append_stored(looking, [stored_event()]) == 3

    def test_writers_before_during_and_after_it(self, before: Any) -> None:
        """Nothing appears at or below a position that was seen already."""
        address = before(10)
        done: list[bool] = []

        def write(_: int) -> int:
            count = 0
            with psycopg.connect(address.conninfo("tests"), autocommit=True) as connection:
                while not done:
                    params = append_params([[stored_event()]])
                    connection.execute(APPEND, params, prepare=True)
                    count += 1
            return count

        def read() -> int:
            last = count = 0
            with psycopg.connect(address.conninfo("tests"), autocommit=True) as connection:
                while True:
                    over = bool(done) and all(writer.done() for writer in writers)
                    rows = connection.execute(
                        "SELECT notification_id FROM payment_events WHERE notification_id > %s"
                        " ORDER BY 1",
                        [last],
                    ).fetchall()
                    count += len(rows)
                    last = rows[-1][0] if rows else last
                    if over and not rows:
                        return count

        with ThreadPoolExecutor(8) as pool:
            writers = [pool.submit(write, number) for number in range(4)]
            reader = pool.submit(read)
            try:
                before(12)
            finally:
                done.append(True)
            stored = sum(writer.result(timeout=30) for writer in writers)
            assert reader.result(timeout=30) == stored > 0
