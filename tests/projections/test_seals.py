"""The follower that seals the log: each event once, in order, whatever it is or breaks."""

import asyncio
from typing import Any

import psycopg
import pytest

from payments.database.connections import Database
from payments.events.chain import GENESIS, seal
from payments.events.store import LogEntry
from payments.observability.metrics import Telemetry
from payments.projections.follower import Follower
from payments.projections.seals import SealsProjection
from payments.service import Service
from tests.support import History, append, append_stored, charge_of, seal_log, stored_event, until

pytestmark = pytest.mark.anyio

Connection = psycopg.Connection[Any]

LOG = """
SELECT notification_id, originator_id, originator_version, topic, state, recorded_at
  FROM payment_events ORDER BY notification_id
"""


def check_seals(connection: Connection) -> int:
    """Every event has its seal, and each follows from the one before; returns how many."""
    seals = dict(connection.execute("SELECT position, hash FROM log_seals").fetchall())
    before, expected = GENESIS, {}
    for row in connection.execute(LOG.encode()):
        event = LogEntry(*row)
        before = expected[event.position] = seal(before, event)
    assert seals == expected
    return len(seals)


@pytest.mark.parametrize("batch_max", [1, 2, 7, 1000])
async def test_every_event_is_sealed(
    database: Database, connection: Connection, batch_max: int
) -> None:
    append(connection, [fact for n in range(10) for fact in History(f"k{n}").charged().facts])
    await seal_log(database, batch_max)
    append(connection, History("k").charged().refunded().facts)
    await seal_log(database, batch_max)
    assert check_seals(connection) == 24


async def test_what_nobody_can_read_is_sealed(database: Database, connection: Connection) -> None:
    for state in (b"", b"\x00\xff", b"{", b"[" * 100_000):
        append_stored(connection, [stored_event(state=state, topic="Unknown ✓")])
    await seal_log(database)
    assert check_seals(connection) == 4
    assert not connection.execute("SELECT FROM parked_streams").fetchall()


async def test_a_gap_does_not_stop_it(database: Database, connection: Connection) -> None:
    append(connection, [History(f"k{n}").facts[0] for n in range(5)])
    connection.execute("ALTER TABLE payment_events DISABLE TRIGGER ALL")
    connection.execute("DELETE FROM payment_events WHERE notification_id IN (1, 3)")
    await seal_log(database)
    assert check_seals(connection) == 3


async def test_several_at_once_and_crashes(database: Database, connection: Connection) -> None:
    """Each position once, though three of them are cancelled again and again in mid batch."""

    class Slow(SealsProjection):
        async def apply(self, connection: psycopg.AsyncConnection[Any], events: Any) -> None:
            await super().apply(connection, events)
            await asyncio.sleep(0.002)

    async def run() -> None:
        follower = Follower(database.connect, Slow(), Telemetry(), 10)
        try:
            for _ in range(200):
                await follower.run_once()
        finally:
            await follower.close()

    append(connection, [History(f"k{n}").facts[0] for n in range(600)])
    for _ in range(20):
        running = [asyncio.create_task(run()) for _ in range(3)]
        await asyncio.sleep(0.03)
        for task in running:
            task.cancel()
        await asyncio.gather(*running, return_exceptions=True)
    await seal_log(database)
    assert check_seals(connection) == 600


async def test_a_service_seals_within_about_a_second(
    service: Service, connection: Connection
) -> None:
    await service.charging.charge(charge_of("k1"))
    sealed = "SELECT FROM log_seals WHERE position = 2"
    await until(lambda: connection.execute(sealed).fetchall())
    assert check_seals(connection) == 2


@pytest.mark.parametrize(
    "statement",
    [
        "UPDATE log_seals SET hash = sha256('')",
        "DELETE FROM log_seals",
        "TRUNCATE log_seals",
        "UPDATE log_seals SET hash = sha256('') WHERE false",
    ],
)
@pytest.mark.parametrize("role", ["origin", "replica"])
async def test_seals_cannot_be_changed(
    database: Database, connection: Connection, statement: str, role: str
) -> None:
    append(connection, History("k").facts)
    await seal_log(database)
    connection.execute(f"SET session_replication_role = {role}".encode())
    with pytest.raises(psycopg.errors.InsufficientPrivilege, match="append-only"):
        connection.execute(statement.encode())
    assert check_seals(connection) == 1


async def test_it_does_not_listen(database: Database, connection: Connection) -> None:
    """A NOTIFY for each append would wake it, and it has time."""
    follower = Follower(database.connect, SealsProjection(), Telemetry(), listens=False)
    follower.start()
    try:
        append(connection, History("k").facts)
        await until(lambda: connection.execute("SELECT FROM log_seals").fetchall())
        listening = connection.execute(
            "SELECT query FROM pg_stat_activity WHERE application_name = 'payments follower seals'"
            "   AND datname = current_database() AND query LIKE '%LISTEN%'"
        ).fetchall()
        assert not listening
    finally:
        await follower.stop()


async def test_a_seal_ahead_of_the_log_does_not_spoil_the_chain(
    database: Database, connection: Connection
) -> None:
    """Somebody put one there. What comes is sealed as ever, and that one seal is wrong."""
    append(connection, History("k").facts)
    await seal_log(database)
    connection.execute("INSERT INTO log_seals VALUES (3, sha256(''))")
    append(connection, [History(f"k{n}").facts[0] for n in range(4)])
    await seal_log(database, 3)
    assert not connection.execute("SELECT FROM parked_streams").fetchall()
    rows = connection.execute(LOG.encode()).fetchall()
    seals = dict(connection.execute("SELECT position, hash FROM log_seals").fetchall())
    assert set(seals) == {1, 2, 3, 4, 5}
    before = GENESIS
    for row in rows:
        event = LogEntry(*row)
        before = seal(before, event)
        assert (seals[event.position] == before) == (event.position != 3)


async def test_only_what_is_in_the_log_is_sealed(connection: Connection) -> None:
    append(connection, History("k").facts)
    connection.execute(
        "SELECT add_log_seals(ARRAY[1, 2]::bigint[], ARRAY[sha256('a'), sha256('b')])"
    )
    assert connection.execute("SELECT position FROM log_seals").fetchall() == [(1,)]
