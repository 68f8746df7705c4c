"""Several followers that crash again and again: still each event is applied once, in order."""

import asyncio
import random
import subprocess
import sys
import uuid
from collections.abc import AsyncIterator, Awaitable, Callable
from pathlib import Path
from typing import Any

import msgspec
import psycopg
import pytest

from payments.database.connections import Database, DatabaseAddress, connect
from payments.events.store import LogEntry
from payments.observability.metrics import Telemetry
from payments.projections.follower import Follower
from tests.projections.counting import SCHEMA, Connection, Counting, Place, applied, position
from tests.support import append_stored, stored_event, until

pytestmark = pytest.mark.anyio

ROOT = Path(__file__).parents[2]
SEED = 20261123
FOLLOWERS = 3
BATCH_MAX = 50
CRASH_SHARE = 0.05
EVENTS, WRITERS, STREAM_LENGTH = 20_000, 4, 5
PROCESSES, EVENTS_EACH = 8, 300

Poison = Callable[[LogEntry], None]
Start = Callable[..., Awaitable["Crew"]]


class Crew:
    """Three followers of one log, each as in a process of its own."""

    def __init__(self, address: DatabaseAddress, poison: Poison | None) -> None:
        self._random = random.Random(SEED)
        self._administrator = connect(address, "tests")
        self.crashes = 0
        self.telemetries = [Telemetry() for _ in range(FOLLOWERS)]
        self._connect = Database(address, 1).connect
        self._poison = poison
        self.followers = [self.new_follower(telemetry) for telemetry in self.telemetries]

    def new_follower(self, telemetry: Telemetry) -> Follower:
        projection = Counting(poison=self._poison, step=self._maybe_crash)
        return Follower(self._connect, projection, telemetry, BATCH_MAX)

    async def stop(self) -> None:
        await asyncio.gather(*(follower.stop() for follower in self.followers))
        self._administrator.close()

    def active(self) -> int:
        """How many of them have applied something."""
        return sum(each.follower_applied["payments"]._value.get() > 0 for each in self.telemetries)

    async def _maybe_crash(self, connection: Connection, place: Place) -> None:
        # A batch with poison in it is applied in many parts; they shall not all crash.
        if self._random.random() > CRASH_SHARE / 3 / (10 if self._poison else 1):
            return
        self.crashes += 1
        if place == "after" and self._random.random() < 0.5:
            # Noticed when the position is moved, or at the commit.
            pid = connection.info.backend_pid
            self._administrator.execute("SELECT pg_terminate_backend(%s)", [pid])
        else:
            raise ConnectionError("a crash")


@pytest.fixture
async def start(
    address: DatabaseAddress, connection: psycopg.Connection[Any]
) -> AsyncIterator[Start]:
    crews: list[Crew] = []

    async def start(poison: Poison | None = None) -> Crew:
        connection.execute(SCHEMA)
        crews.append(Crew(address, poison))
        for follower in crews[-1].followers:
            follower.start()
        return crews[-1]

    yield start
    for crew in crews:
        await crew.stop()


def write(address: DatabaseAddress, count: int, seed: int) -> None:
    """Appends `count` events: streams of a few events each, some under way at any time."""
    choose = random.Random(seed)
    versions: dict[uuid.UUID, int] = {uuid.UUID(int=choose.getrandbits(128)): 0 for _ in range(40)}
    with connect(address, "tests") as connection:
        while count:
            events = []
            for stream in choose.sample(sorted(versions), min(count, choose.randint(1, 30))):
                versions[stream] += 1
                events.append(stored_event(stream, versions[stream]))
                if versions[stream] == STREAM_LENGTH:
                    del versions[stream]
                    versions[uuid.UUID(int=choose.getrandbits(128))] = 0
            append_stored(connection, events)
            count -= len(events)


def check_each_once(connection: psycopg.Connection[Any], count: int) -> None:
    twice = connection.execute("SELECT position FROM counted WHERE n <> 1").fetchall()
    assert not twice
    assert sorted(applied(connection)) == list(range(1, count + 1))


async def test_each_event_is_applied_once_in_order(
    address: DatabaseAddress, connection: psycopg.Connection[Any], start: Start
) -> None:
    crew = await start()
    share = EVENTS // WRITERS
    await asyncio.gather(
        *(asyncio.to_thread(write, address, share, SEED + number) for number in range(WRITERS))
    )
    await until(lambda: position(connection) == EVENTS, timeout_s=60)
    check_each_once(connection, EVENTS)
    assert applied(connection) == list(range(1, EVENTS + 1))
    assert not connection.execute("SELECT * FROM parked_streams").fetchall()
    assert crew.crashes > 10
    assert crew.active() > 1


async def test_parked_streams_lose_nothing_either(
    address: DatabaseAddress, connection: psycopg.Connection[Any], start: Start
) -> None:
    """One stream in twenty is poison for a while, and taken up again while the others go on."""
    mended: set[uuid.UUID] = set()

    def poison(event: LogEntry) -> None:
        if event.payment_id.int % 20 == 0 and event.payment_id not in mended:
            raise ValueError("poison")

    crew = await start(poison)
    operator = crew.new_follower(Telemetry())
    count = EVENTS // 20
    writing = asyncio.create_task(asyncio.to_thread(write, address, count, SEED))
    tries = 0

    async def mend_and_retry() -> bool:
        nonlocal tries
        done = writing.done() and position(connection) == count
        parked = connection.execute("SELECT payment_id FROM parked_streams").fetchall()
        mended.update(id for (id,) in parked)
        try:
            left = await operator.retry_parked()
        except (OSError, psycopg.Error):
            await operator.close()
            return False
        tries += bool(parked)
        return done and not left

    await until(mend_and_retry, timeout_s=60)
    await operator.close()
    await writing
    assert tries > 1
    check_each_once(connection, count)
    out_of_order = connection.execute(
        "SELECT payment_id FROM applied GROUP BY payment_id"
        " HAVING array_agg(version ORDER BY seq) <> array_agg(version ORDER BY version)"
    ).fetchall()
    assert not out_of_order


async def test_with_writers_in_other_processes(
    address: DatabaseAddress, connection: psycopg.Connection[Any], start: Start
) -> None:
    await start()
    target = msgspec.json.encode(address).decode()
    command = [sys.executable, "-m", "tests.events.writer", target, str(EVENTS_EACH)]
    writers = [subprocess.Popen(command, cwd=ROOT) for _ in range(PROCESSES)]
    try:
        total = PROCESSES * EVENTS_EACH
        await until(lambda: position(connection) == total, timeout_s=60)
        assert [writer.wait(timeout=10) for writer in writers] == [0] * PROCESSES
    finally:
        for writer in writers:
            writer.kill()
            writer.wait()
    assert applied(connection) == list(range(1, total + 1))
    check_each_once(connection, total)
