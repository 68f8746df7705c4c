"""Group commit: every caller hears the truth about its own append, whatever happens to the rest."""

import asyncio
import uuid
from collections.abc import AsyncIterator
from typing import Any

import psycopg
import pytest
from eventsourcing.persistence import StoredEvent

from payments.database.connections import Database, DatabaseAddress
from payments.errors import DatabaseUnavailable, TooBusy
from payments.events.appender import (
    BATCH_MAX,
    BATCH_TIMEOUT_S,
    INTENT_TIMEOUT_S,
    Appender,
    AppendRefused,
    StreamConflict,
    Unwanted,
)
from payments.events.store import APPEND, append_params
from payments.observability.metrics import Telemetry
from tests.events.commits import commits, let_commits_not_wait, lock_held, log_of, waits_for_lock
from tests.machine import within
from tests.proxy import ServerProxy
from tests.support import stored_event, until

pytestmark = pytest.mark.anyio


@pytest.fixture
async def appender(database: Database) -> AsyncIterator[Appender]:
    """Not started: what is submitted before start() goes out in one batch."""
    appender = Appender(database.connect, Telemetry(), intent_queue_max=300)
    yield appender
    await appender.stop(1)


async def test_positions_follow_the_order_of_arrival(
    appender: Appender, connection: psycopg.Connection[Any]
) -> None:
    events = [stored_event() for _ in range(5)]
    futures = [appender.append([event]) for event in events]
    appender.start()
    assert await asyncio.gather(*futures) == [1, 2, 3, 4, 5]
    assert [stream for _, stream, _ in log_of(connection)] == [e.originator_id for e in events]


async def test_events_of_one_append_stay_together(
    appender: Appender, connection: psycopg.Connection[Any]
) -> None:
    stream = uuid.uuid4()
    other = appender.append([stored_event()])
    three = appender.append([stored_event(stream, version) for version in (1, 2, 3)])
    appender.start()
    assert (await other, await three) == (1, 4)
    assert log_of(connection)[1:] == [(2, stream, 1), (3, stream, 2), (4, stream, 3)]


async def test_one_batch_with_a_conflict_a_duplicate_stream_and_a_nul(
    appender: Appender, connection: psycopg.Connection[Any]
) -> None:
    """Only the culprits fail; a hundred good appends around them are stored."""
    taken, twice = stored_event(), uuid.uuid4()
    appender.start()
    await appender.append([taken])
    with lock_held(connection):
        blocker = appender.append([stored_event()])
        await waits_for_lock(connection)
        good = [appender.append([stored_event()]) for _ in range(50)]
        conflict = appender.append([stored_event(taken.originator_id)])
        first, second = (
            appender.append([stored_event(twice)]),
            appender.append([stored_event(twice)]),
        )
        third = appender.append([stored_event(twice, 2)])
        nul = appender.append([stored_event(topic="Payment\0Initiated")])
        good += [appender.append([stored_event()]) for _ in range(50)]
    with pytest.raises(StreamConflict):
        await conflict
    with pytest.raises(StreamConflict):
        await second
    with pytest.raises(AppendRefused):
        await nul
    positions = await asyncio.gather(blocker, *good, first, third)
    assert sorted(positions) == list(range(2, 2 + 103))
    assert len(log_of(connection)) == 104


async def test_appending_the_same_events_again_counts_as_committed(
    appender: Appender, connection: psycopg.Connection[Any]
) -> None:
    stream = uuid.uuid4()
    events = [stored_event(stream, 1), stored_event(stream, 2)]
    appender.start()
    assert await appender.append(events) == 2
    assert await appender.append(events) == 2
    assert await appender.append(events[1:]) == 2
    with pytest.raises(StreamConflict):  # the first event stands there, the second is another
        await appender.append([events[0], stored_event(stream, 2)])
    with pytest.raises(StreamConflict):  # same bytes, other topic
        await appender.append([StoredEvent(stream, 2, "Other", events[1].state)])
    assert len(log_of(connection)) == 2


async def test_a_reply_lost_after_the_commit_50_times(
    address: DatabaseAddress, connection: psycopg.Connection[Any]
) -> None:
    """The outcome is unknown, the same batch is sent again, and every event stands once."""
    async with ServerProxy(address) as proxy:
        database = Database(proxy.address, pool_max=1)
        appender = Appender(database.connect, Telemetry(), intent_queue_max=10)
        appender.start()
        await appender.append([stored_event()])
        for count in range(2, 52):
            proxy.lose_next_reply()
            assert await appender.append([stored_event()]) == count
        await appender.stop(1)
    assert proxy.lost == 50
    assert len(log_of(connection)) == 51


async def test_a_connection_that_dies_before_the_commit(
    appender: Appender, connection: psycopg.Connection[Any]
) -> None:
    appender.start()
    with lock_held(connection):
        future = appender.append([stored_event()])
        await waits_for_lock(connection)
        connection.execute(
            "SELECT pg_terminate_backend(pid) FROM pg_stat_activity"
            " WHERE application_name = 'payments appender' AND datname = current_database()"
        )
    assert await future == 1


async def test_an_append_is_answered_when_it_is_on_disk(
    appender: Appender, connection: psycopg.Connection[Any], address: DatabaseAddress
) -> None:
    let_commits_not_wait(connection, address)
    appender.start()
    await appender.append([stored_event()])
    await appender.append_intent(stored_event())
    assert commits(connection) == [("payments appender", "on")] * 2


@pytest.mark.parametrize("rival_writes", ["another stream", "this very event", "another event"])
async def test_a_rival_that_takes_the_place_without_the_lock_costs_no_event(
    database: Database,
    connection: psycopg.Connection[Any],
    address: DatabaseAddress,
    rival_writes: str,
) -> None:
    """As a script of somebody's may do it. The function runs into a unique key once, and whoever
    appends an outcome, which nobody else has, hears no other end than usual."""
    telemetry = Telemetry()
    appender = Appender(database.connect, telemetry, intent_queue_max=10)
    first = stored_event()
    mine = stored_event(first.originator_id, 2)
    theirs = {
        "another stream": stored_event(),
        "this very event": mine,
        "another event": stored_event(first.originator_id, 2),
    }[rival_writes]
    appender.start()
    await appender.append([first])
    with psycopg.connect(address.conninfo("tests")) as rival:
        rival.execute(
            "INSERT INTO payment_events VALUES (2, %s, %s, %s, %s, now())",
            [theirs.originator_id, theirs.originator_version, theirs.topic, theirs.state],
        )
        outcome = appender.append([mine])
        waiting = "SELECT 1 FROM pg_locks WHERE locktype = 'transactionid' AND NOT granted"
        await until(lambda: connection.execute(waiting).fetchone())
        other = appender.append([stored_event()])
        rival.commit()
    if rival_writes == "another event":
        with pytest.raises(StreamConflict):
            await outcome
        assert await other == 3
    else:
        assert await outcome == (3 if rival_writes == "another stream" else 2)
        assert await other == await outcome + 1
    failures = {name: child._value.get() for name, child in telemetry.append_failures.items()}
    assert (failures["retried"], failures["refused"]) == (1, 0)
    await appender.stop(1)


async def test_a_caller_cancelled_while_its_append_is_in_flight(
    appender: Appender, connection: psycopg.Connection[Any]
) -> None:
    """It is stored all the same, and nobody else notices."""
    appender.start()
    mine = stored_event()
    with lock_held(connection):
        cancelled = appender.append([mine])
        await waits_for_lock(connection)
        other = appender.append([stored_event()])
        cancelled.cancel()
    assert await other == 2
    assert log_of(connection)[0] == (1, mine.originator_id, 1)


async def test_an_intent_is_given_up_while_the_lock_is_held_and_the_next_succeeds(
    appender: Appender, connection: psycopg.Connection[Any]
) -> None:
    appender.start()
    with lock_held(connection):
        with within(INTENT_TIMEOUT_S + 1):
            in_flight = appender.append_intent(stored_event())
            await waits_for_lock(connection)
            dropped = stored_event()
            waiting = appender.append_intent(dropped)
            outcome = appender.append([stored_event()])
            for refused in (in_flight, waiting):
                with pytest.raises(DatabaseUnavailable):
                    await refused
        assert not outcome.done()
    await outcome
    await appender.append_intent(stored_event())
    # The one that had been sent may be stored; the one that had not is dropped.
    assert dropped.originator_id not in {stream for _, stream, _ in log_of(connection)}


async def test_an_intent_that_is_given_up_while_the_connection_is_opened_is_not_stored(
    database: Database,
) -> None:
    connecting, may_connect = asyncio.Event(), asyncio.Event()

    async def connect(name: str) -> Any:
        connecting.set()
        await may_connect.wait()
        return await database.connect(name)

    running = Appender(connect, Telemetry(), intent_queue_max=10)
    running.start()
    intent = running.append_intent(stored_event())
    outcome = running.append([stored_event()])
    await connecting.wait()
    with pytest.raises(DatabaseUnavailable):
        await intent
    may_connect.set()
    assert await outcome == 1
    await running.stop(1)


async def test_an_intent_given_up_alone_while_the_connection_is_opened(database: Database) -> None:
    connecting, may_connect = asyncio.Event(), asyncio.Event()
    committed: list[None] = []

    async def connect(name: str) -> Any:
        connecting.set()
        await may_connect.wait()
        return await database.connect(name)

    running = Appender(
        connect, Telemetry(), intent_queue_max=10, appended=lambda: committed.append(None)
    )
    running.start()
    wanted = True
    intent = running.append_intent(stored_event(), wanted=lambda: wanted)
    await connecting.wait()
    wanted = False
    may_connect.set()
    with pytest.raises(Unwanted):
        await intent
    assert not committed
    assert await running.append([stored_event()]) == 1
    await running.stop(1)


async def test_intents_past_the_bound_are_refused_at_once_and_outcomes_never(
    appender: Appender, connection: psycopg.Connection[Any]
) -> None:
    intents = [appender.append_intent(stored_event()) for _ in range(300)]
    with pytest.raises(TooBusy):
        appender.append_intent(stored_event())
    outcomes = [appender.append([stored_event()]) for _ in range(100)]
    appender.start()
    assert sorted(await asyncio.gather(*intents, *outcomes)) == list(range(1, 401))
    assert len(intents) + len(outcomes) > BATCH_MAX  # more than one batch was needed


async def test_stopping_writes_what_waits(
    appender: Appender, connection: psycopg.Connection[Any]
) -> None:
    futures = [appender.append([stored_event()]) for _ in range(10)]
    appender.start()
    await appender.stop(5)
    assert await asyncio.gather(*futures) == list(range(1, 11))


async def test_stopping_in_an_outage_tells_every_caller(
    appender: Appender, connection: psycopg.Connection[Any]
) -> None:
    appender.start()
    with lock_held(connection):
        in_flight = appender.append([stored_event()])
        await waits_for_lock(connection)
        waiting = appender.append([stored_event()])
        await appender.stop(0.1)
        for future in (in_flight, waiting):
            with pytest.raises(DatabaseUnavailable):
                await future


async def test_an_unexpected_error_does_not_end_the_appender(database: Database) -> None:
    attempts = 0

    async def connect(name: str) -> psycopg.AsyncConnection[Any]:
        nonlocal attempts
        attempts += 1
        if attempts < 3:
            raise RuntimeError("a surprise")
        return await database.connect(name)

    appender = Appender(connect, Telemetry(), intent_queue_max=10)
    appender.start()
    assert await appender.append([stored_event()]) == 1
    assert attempts == 3
    await appender.stop(1)


async def test_what_cannot_be_packed_is_refused_and_blocks_nobody(appender: Appender) -> None:
    unpackable = appender.append([stored_event(topic="\ud800")])
    too_large = appender.append([stored_event(version=2**70)])
    good = appender.append([stored_event()])
    appender.start()
    for refused in (unpackable, too_large):
        with pytest.raises(AppendRefused):
            await refused
    assert await good == 1


async def test_the_store_works_under_another_default_isolation_level(
    appender: Appender, connection: psycopg.Connection[Any], address: DatabaseAddress
) -> None:
    """The function must see what was committed while it waited for its lock."""
    level = f"ALTER DATABASE {address.dbname} SET default_transaction_isolation = 'serializable'"
    connection.execute(level.encode())
    appender.start()
    assert await appender.append([stored_event()]) == 1
    with psycopg.connect(address.conninfo()) as other:
        other.isolation_level = psycopg.IsolationLevel.REPEATABLE_READ
        with pytest.raises(psycopg.errors.InvalidTransactionState, match="READ COMMITTED"):
            other.execute(APPEND, append_params([[stored_event()]]))


async def test_a_conflict_tells_how_the_stream_began(appender: Appender) -> None:
    event = stored_event()
    appender.start()
    await appender.append([event])
    with pytest.raises(StreamConflict) as conflict:
        await appender.append([stored_event(event.originator_id)])
    assert conflict.value.first_state == event.state
    with pytest.raises(StreamConflict) as conflict:
        await appender.append([stored_event(version=5)])
    assert conflict.value.first_state is None


async def test_stopping_is_quick_although_the_server_does_not_answer(
    appender: Appender, connection: psycopg.Connection[Any]
) -> None:
    appender.start()
    with lock_held(connection):
        future = appender.append([stored_event()])
        await waits_for_lock(connection)
        with within(BATCH_TIMEOUT_S):
            await appender.stop(0.1)
        with pytest.raises(DatabaseUnavailable):
            await future


async def test_what_is_being_written_counts_as_waiting(
    database: Database, connection: psycopg.Connection[Any]
) -> None:
    """While Postgres does not answer, all that waits may be in the batch under way."""
    telemetry = Telemetry()
    appender = Appender(database.connect, telemetry, intent_queue_max=300)

    def gauge(name: str) -> float:
        value = telemetry.registry.get_sample_value(f"payments_append_{name}")
        assert value is not None
        return value

    assert (gauge("backlog"), gauge("oldest_age_seconds")) == (0, 0)
    appender.start()
    with lock_held(connection):
        futures = [appender.append([stored_event()]) for _ in range(3)]
        await waits_for_lock(connection)
        futures.append(appender.append([stored_event()]))
        assert gauge("backlog") == 4
        await until(lambda: gauge("oldest_age_seconds") > 0.1)
    await asyncio.gather(*futures)
    assert (gauge("backlog"), gauge("oldest_age_seconds")) == (0, 0)
    await appender.stop(1)
