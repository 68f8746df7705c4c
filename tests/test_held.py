"""Whoever reads much holds nothing while paused: no snapshot, no transaction, no notification.

What a session may still look at, vacuum must not remove from any table.
"""

import array
import fcntl
import random
import signal
import subprocess
import termios
import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import psycopg
import pytest

from payments.database.connections import DatabaseAddress
from payments.events.store import SLICE_END
from payments.projections import comparison
from payments.projections.rebuild import check, rebuild
from payments.queries import verification
from payments.queries.verification import ends_of, places_of
from payments.snapshot import Reader
from tests.process import PAYMENTS, ROOT, at, environment
from tests.support import ORDER_ID, History, append, catch_up, eventually

Connection = psycopg.Connection[Any]
LOG_EVENTS = 60_000
SEED = 20261128
STOPS = 25

SESSIONS = """
SELECT state, wait_event, backend_xmin, backend_xid,
       state <> 'idle' OR backend_xmin IS NOT NULL OR backend_xid IS NOT NULL AS holds
  FROM pg_stat_activity
 WHERE datname = current_database() AND pid <> pg_backend_pid()
   AND backend_type = 'client backend'
"""


def sessions(connection: Connection) -> list[Any]:
    """All but our own, which did something."""
    return connection.execute(SESSIONS).fetchall()


def nothing_is_held(connection: Connection) -> bool:
    return not any(holds for *_, holds in sessions(connection))


def nothing_is_held_any_more(connection: Connection) -> bool:
    """For a while: it was not looked at between two statements."""
    for _ in range(10):
        if not nothing_is_held(connection):
            return False
        time.sleep(0.02)
    return True


@pytest.fixture
def long_log(connection: Connection) -> Connection:
    """30 MB of one payment's first event, under other ids."""
    append(connection, History("k").facts)
    connection.execute("SET statement_timeout = 0")
    connection.execute(
        "INSERT INTO payment_events SELECT n, gen_random_uuid(), 1, topic, state, recorded_at"
        f"  FROM payment_events, generate_series(2, {LOG_EVENTS}) n"
    )
    return connection


@contextmanager
def replaying(
    address: DatabaseAddress, *arguments: str, stdout: int = subprocess.PIPE
) -> Iterator[subprocess.Popen[bytes]]:
    process = subprocess.Popen(
        [*PAYMENTS, "replay", *arguments],
        cwd=ROOT,
        env=environment(**at(address), LOG_LEVEL="WARNING"),
        stdout=stdout,
        stderr=subprocess.DEVNULL,
    )
    try:
        yield process
    finally:
        process.kill()
        process.communicate(timeout=10)


def unread_bytes(process: subprocess.Popen[bytes]) -> int:
    """What lies in its pipe."""
    assert process.stdout is not None
    found = array.array("i", [0])
    fcntl.ioctl(process.stdout, termios.FIONREAD, found)
    return found[0]


@pytest.mark.parametrize(
    "arguments",
    [
        (),
        ("--format", "csv"),
        ("--order", str(ORDER_ID), "--format", "table"),
        ("--type", "PaymentInitiated", "--follow"),
    ],
)
def test_an_export_that_nobody_reads_on(
    long_log: Connection, address: DatabaseAddress, arguments: tuple[str, ...]
) -> None:
    """As `payments replay | less` is, for as long as somebody looks at a page."""
    with replaying(address, *arguments) as process:
        eventually(lambda: unread_bytes(process) > 50_000)
        eventually(lambda: nothing_is_held_any_more(long_log))
        assert len(sessions(long_log)) == 1
        assert process.poll() is None


def test_an_export_that_is_stopped_at_any_moment(
    long_log: Connection, address: DatabaseAddress
) -> None:
    """As by Ctrl-Z: even what it has asked for a moment ago comes to its end."""
    rng = random.Random(SEED)
    seen = 0
    while seen < STOPS:
        with replaying(address, stdout=subprocess.DEVNULL) as process:
            eventually(lambda: sessions(long_log))
            while process.poll() is None and seen < STOPS:
                time.sleep(rng.uniform(0.01, 0.06))
                process.send_signal(signal.SIGSTOP)
                eventually(lambda: nothing_is_held(long_log))
                seen += len(sessions(long_log))
                process.send_signal(signal.SIGCONT)


def test_who_follows_and_is_stopped_keeps_no_notification(
    connection: Connection, address: DatabaseAddress
) -> None:
    """The server keeps what a listener has not read, and in time refuses every NOTIFY."""
    append(connection, History("k1").facts)
    with replaying(address, "--follow") as process:
        assert process.stdout is not None
        assert process.stdout.readline()
        eventually(lambda: nothing_is_held(connection))
        process.send_signal(signal.SIGSTOP)
        eventually(lambda: nothing_is_held(connection))
        for _ in range(3000):  # several times what a socket holds of them
            connection.execute("NOTIFY payment_events")
        assert connection.execute("SELECT pg_notification_queue_usage()").fetchone() == (0,)


@pytest.fixture
def small_parts(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(verification, "PART_POSITIONS", 7)
    small = SLICE_END.replace("OFFSET 9999", "OFFSET 9")
    assert small != SLICE_END
    monkeypatch.setattr(comparison, "SLICE_END", small)


@pytest.fixture
def vandalised(connection: Connection, address: DatabaseAddress, small_parts: None) -> Connection:
    """Many parts; something differs in each of them."""
    append(connection, [fact for n in range(60) for fact in History(f"k{n}").charged().facts])

    catch_up(address, seal=False)
    connection.execute("UPDATE payments SET amount_cents = 1")
    return connection


def test_a_check_of_the_seals_that_is_paused(
    vandalised: Connection, address: DatabaseAddress
) -> None:
    with Reader(address, "payments audit") as reader:
        seen = 0
        for _ in places_of(reader, ends_of(reader)):
            eventually(lambda: nothing_is_held(vandalised))
            seen += 1
    assert seen == 120


@pytest.mark.parametrize("repairs", [False, True])
def test_a_comparison_that_is_paused(
    vandalised: Connection, address: DatabaseAddress, repairs: bool
) -> None:
    seen = 0

    def found(_: object) -> None:
        nonlocal seen
        eventually(lambda: nothing_is_held(vandalised))
        seen += 1

    done = rebuild(address, 7.0, found) if repairs else check(address, found)
    assert (seen, done.payments, done.log == done.tables) == (60, 60, repairs)
