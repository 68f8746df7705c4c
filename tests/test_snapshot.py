"""Reading in short statements: ahead of whoever works on it, and again where it was cut off."""

import os
import threading
import time
from collections.abc import Iterator
from socket import SHUT_RDWR, socket
from typing import Any

import psycopg
import pytest

from payments.database import connections as database
from payments.database.connections import DatabaseAddress
from payments.errors import StartError
from payments.snapshot import Reader, Snapshot, windows
from tests.machine import within
from tests.support import History, append

Connection = psycopg.Connection[Any]

TERMINATE = """
SELECT pg_terminate_backend(pid) FROM pg_stat_activity
 WHERE datname = current_database() AND application_name = 'reader'
"""


@pytest.fixture
def reader(address: DatabaseAddress, connection: Connection) -> Iterator[Reader]:
    append(connection, [History(f"k{n}").facts[0] for n in range(3)])
    with Reader(address, "reader") as opened:
        yield opened


def test_the_next_part_is_read_meanwhile(reader: Reader) -> None:
    asked = [threading.Event() for _ in range(3)]

    def parts() -> Iterator[int]:
        for number in range(3):
            asked[number].set()
            yield reader.fetch("SELECT %(n)s::integer", {"n": number})[0][0]

    for number, part in enumerate(reader.ahead(parts())):
        assert part == number
        assert number == 2 or asked[number + 1].wait(10)


def test_what_fails_ahead_is_told(reader: Reader) -> None:
    def parts() -> Iterator[Any]:
        yield 1
        yield reader.fetch("SELECT 1/0")

    ahead = reader.ahead(parts())
    assert next(ahead) == 1
    with pytest.raises(psycopg.errors.DivisionByZero):
        next(ahead)


def test_who_gives_up_waits_for_nothing(reader: Reader) -> None:
    """As by Ctrl-C, while the server takes its time with the next part."""
    begun = threading.Event()

    def parts() -> Iterator[Any]:
        yield 1
        begun.set()
        yield reader.fetch("SELECT pg_sleep(30)")

    def interrupted() -> None:
        for _ in reader.ahead(parts()):
            assert begun.wait(10)
            time.sleep(0.1)
            raise KeyboardInterrupt

    with within(5), pytest.raises(KeyboardInterrupt):
        interrupted()


def test_a_connection_that_ends_without_a_word_is_opened_again(
    reader: Reader, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A standby says why it cuts a session off, but that may be lost on the way."""
    monkeypatch.setattr(database, "CONFLICT_PAUSE_S", 0)
    with socket(fileno=os.dup(reader._connection.fileno())) as wire:
        wire.shutdown(SHUT_RDWR)
    assert reader.fetch("SELECT 1") == [(1,)]
    assert reader.at_one_moment(lambda snapshot: snapshot.fetch("SELECT 2")) == [(2,)]


def cut_off_once(connection: Connection, reader: Reader, monkeypatch: pytest.MonkeyPatch) -> Any:
    """Reads, but the first time as a standby that ends the session."""
    monkeypatch.setattr(database, "CONFLICT_PAUSE_S", 0)
    seen: list[int] = []

    def read(snapshot: Snapshot) -> int:
        seen.append(1)
        if len(seen) == 1:
            assert connection.execute(TERMINATE.encode()).rowcount == 1
            with pytest.raises(psycopg.OperationalError):
                snapshot.fetch("SELECT 1")
            raise psycopg.errors.SerializationFailure
        return len(seen)

    return reader.at_one_moment(read)


def test_a_session_that_a_standby_ended_is_opened_again(
    reader: Reader, connection: Connection, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert cut_off_once(connection, reader, monkeypatch) == 2
    assert reader.fetch("SELECT 1") == [(1,)]


def test_but_not_on_a_server_that_is_behind(
    reader: Reader, connection: Connection, monkeypatch: pytest.MonkeyPatch
) -> None:
    connection.execute("ALTER TABLE payment_events DISABLE TRIGGER ALL")
    connection.execute("DELETE FROM payment_events WHERE notification_id = 3")
    with pytest.raises(StartError, match="the log ends at position 2; before, it ended at 3"):
        cut_off_once(connection, reader, monkeypatch)


def test_who_conflicts_for_ever_is_told(reader: Reader, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(database, "CONFLICT_FOR_S", 0.3)

    def read(_: Snapshot) -> None:
        raise psycopg.errors.SerializationFailure

    with pytest.raises(psycopg.errors.SerializationFailure):
        reader.at_one_moment(read)
    assert reader.fetch("SELECT 1") == [(1,)]


def test_windows_leave_gaps_out(reader: Reader, connection: Connection) -> None:
    connection.execute("ALTER TABLE payment_events DISABLE TRIGGER ALL")
    connection.execute("ALTER TABLE payment_events DROP CONSTRAINT payment_events_sane")
    connection.execute(
        "UPDATE payment_events SET notification_id = %s WHERE notification_id = 2", [2**62]
    )
    connection.execute("INSERT INTO log_seals VALUES (9, sha256(''))")
    assert list(windows(reader, 2**62, 2)) == [(1, 2), (3, 4), (9, 10), (2**62, 2**62)]
    assert list(windows(reader, 3, 2)) == [(1, 2), (3, 3)]
    assert list(windows(reader, 0, 2)) == []
