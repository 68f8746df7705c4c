"""Followers are told after the commit, soon, not too often, and nobody waits for it."""

import asyncio
import uuid
from collections.abc import AsyncIterator, Callable
from typing import Any

import psycopg
import pytest

from payments.database.connections import Database, DatabaseAddress
from payments.events import notifier as notifier_module
from payments.events.appender import Appender
from payments.events.notifier import LISTEN, NOTIFY, Notifier
from payments.observability.metrics import Telemetry
from tests.support import stored_event, until

pytestmark = pytest.mark.anyio

Connection = psycopg.AsyncConnection[Any]


class Listener:
    """Another process that follows."""

    def __init__(self, connection: Connection) -> None:
        self.heard = 0
        self._connection = connection
        self._task = asyncio.create_task(self._run())

    async def _run(self) -> None:
        async for notify in self._connection.notifies():
            assert notify.channel == "payment_events"
            self.heard += 1

    async def stop(self) -> None:
        self._task.cancel()
        await asyncio.wait({self._task})


@pytest.fixture
async def listener(database: Database) -> AsyncIterator[Listener]:
    connection = await database.connect("tests listener")
    await connection.execute(LISTEN)
    listener = Listener(connection)
    yield listener
    await listener.stop()
    await connection.close()


@pytest.fixture
async def build(database: Database) -> AsyncIterator[Callable[..., Notifier]]:
    built: list[Notifier] = []

    def build(**more: Any) -> Notifier:
        options: dict[str, Any] = {"connect": database.connect, "telemetry": Telemetry()} | more
        built.append(Notifier(**options))
        built[-1].start()
        return built[-1]

    yield build
    for notifier in built:
        await notifier.stop()


def count(telemetry: Telemetry, outcome: str) -> float:
    return telemetry.notifications[outcome]._value.get()  # type: ignore[no-any-return]


async def test_this_process_is_told_at_once_and_others_soon(
    build: Callable[..., Notifier], listener: Listener
) -> None:
    woken: list[bool] = []
    notifier = build(wake=lambda: woken.append(True))
    notifier.appended()
    assert woken == [True]
    await until(lambda: listener.heard == 1)


async def test_a_burst_is_told_in_few_and_its_end_is(
    build: Callable[..., Notifier], listener: Listener, monkeypatch: pytest.MonkeyPatch
) -> None:
    pause_s = 0.2
    monkeypatch.setattr(notifier_module, "PAUSE_S", pause_s)
    telemetry = Telemetry()
    notifier = build(telemetry=telemetry)
    loop = asyncio.get_running_loop()
    started = loop.time()
    for _ in range(100):
        notifier.appended()
        await asyncio.sleep(0.005)
    before_the_last = listener.heard
    notifier.appended()
    await until(lambda: listener.heard > before_the_last)
    await asyncio.sleep(2 * pause_s)
    await until(lambda: listener.heard == count(telemetry, "sent"))
    assert listener.heard <= (loop.time() - started) / pause_s + 1


async def test_what_is_appended_while_it_notifies_is_told_as_well(
    build: Callable[..., Notifier], listener: Listener, database: Database
) -> None:
    appended = 0

    async def connect(name: str) -> Connection:
        connection = await database.connect(name)
        execute = connection.execute

        async def execute_and_append(query: Any) -> Any:
            nonlocal appended
            cursor = await execute(query)
            if query == NOTIFY and not appended:
                appended += 1
                notifier.appended()
            return cursor

        connection.execute = execute_and_append  # type: ignore[assignment,method-assign]
        return connection

    notifier = build(connect=connect)
    notifier.appended()
    await until(lambda: listener.heard == 2)


async def test_the_last_one_is_told_at_the_end(
    build: Callable[..., Notifier], listener: Listener, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(notifier_module, "PAUSE_S", 60)
    notifier = build()
    notifier.appended()
    await until(lambda: listener.heard == 1)
    notifier.appended()
    await notifier.stop()
    await until(lambda: listener.heard == 2)


async def test_a_connection_that_is_lost_is_opened_again(
    build: Callable[..., Notifier], listener: Listener, connection: psycopg.Connection[Any]
) -> None:
    telemetry = Telemetry()
    notifier = build(telemetry=telemetry)
    notifier.appended()
    await until(lambda: listener.heard == 1)
    connection.execute(
        "SELECT pg_terminate_backend(pid) FROM pg_stat_activity"
        " WHERE application_name = 'payments notifier' AND datname = current_database()"
    )
    notifier.appended()
    await until(lambda: count(telemetry, "failed") == 1)
    notifier.appended()
    await until(lambda: listener.heard == 2)


async def test_appends_go_on_while_nobody_can_be_notified(
    address: DatabaseAddress, build: Callable[..., Notifier]
) -> None:
    async def connect(name: str) -> Connection:
        raise psycopg.errors.ProgramLimitExceeded("too many notifications in the NOTIFY queue")

    telemetry = Telemetry()
    notifier = build(connect=connect, telemetry=telemetry)
    database = Database(address, 1)
    appender = Appender(database.connect, telemetry, intent_queue_max=4, appended=notifier.appended)
    appender.start()
    try:
        for position in range(1, 4):
            assert await appender.append([stored_event()]) == position
        await until(lambda: count(telemetry, "failed") >= 2)
    finally:
        await appender.stop(1)
    assert count(telemetry, "sent") == 0


async def test_it_is_told_after_the_commit_and_for_each_batch(
    address: DatabaseAddress, connection: psycopg.Connection[Any]
) -> None:
    stored: list[int] = []

    def look() -> None:
        row = connection.execute("SELECT count(*) FROM payment_events").fetchone()
        assert row is not None
        stored.append(row[0])

    database = Database(address, 1)
    appender = Appender(database.connect, Telemetry(), intent_queue_max=4, appended=look)
    appender.start()
    try:
        event = stored_event(uuid.uuid4())
        await appender.append([event])
        # Perhaps the process that stored it died before it told anybody.
        await appender.append([event])
        await appender.append([stored_event()])
    finally:
        await appender.stop(1)
    assert stored == [1, 1, 2]


async def test_its_commits_wait_for_no_disk(
    build: Callable[..., Notifier], listener: Listener, connection: psycopg.Connection[Any]
) -> None:
    """Nor for a standby; a NOTIFY writes to the WAL."""
    notifier = build()
    notifier.appended()
    await until(lambda: listener.heard == 1)
    opened = notifier._connection
    assert opened is not None
    cursor = await opened.execute("SHOW synchronous_commit")
    assert await cursor.fetchone() == ("off",)
