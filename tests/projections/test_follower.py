"""The follower: each event once, in order, whatever breaks; poison harms its own stream alone."""

import asyncio
import os
import signal
import statistics
import time
import uuid
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator
from contextlib import contextmanager
from typing import Any, get_args

import msgspec
import psycopg
import pytest
from eventsourcing.persistence import StoredEvent

from payments.database.connections import Database, DatabaseAddress
from payments.events.facts import Fact
from payments.events.store import LogEntry, to_stored_event
from payments.observability.metrics import Telemetry
from payments.projections import follower as follower_module
from payments.projections.follower import Follower
from payments.projections.parking import Projection
from payments.projections.payments import PaymentsProjection
from tests.invariants.checker import check
from tests.machine import Machine, bound, within
from tests.projections.counting import SCHEMA, Connection, Counting, Place, applied, position
from tests.proxy import ServerProxy
from tests.support import PATIENCE_S, History, append, append_stored, stored_event, until

pytestmark = pytest.mark.anyio

SECRET = "secret-key"

Build = Callable[..., Follower]


@pytest.fixture
async def build(database: Database) -> AsyncIterator[Build]:
    """Builds followers that are stopped when the test is over."""
    built: list[Follower] = []

    def build(projection: Projection | None = None, **options: Any) -> Follower:
        options = {"connect": database.connect, "telemetry": Telemetry(), **options}
        built.append(Follower(projection=projection or PaymentsProjection(7), **options))
        return built[-1]

    yield build
    await asyncio.gather(*(follower.stop(0.5) for follower in built))


@pytest.fixture
def counted(connection: psycopg.Connection[Any]) -> psycopg.Connection[Any]:
    """A connection to a database in which Counting can count."""
    connection.execute(SCHEMA)
    return connection


class Payments(PaymentsProjection):
    """The payments projection with trouble: `before` and `after` may raise."""

    def __init__(
        self,
        before: Callable[[LogEntry], None] | None = None,
        after: Callable[[Connection], Awaitable[None]] | None = None,
    ) -> None:
        super().__init__(settle_after_s=7)
        self.before = before
        self.after = after

    async def apply(self, connection: Connection, events: Any) -> None:
        if self.before is not None:
            for event in events:
                self.before(event)
        await super().apply(connection, events)
        if self.after is not None:
            await self.after(connection)


def crash_at(crashing: Place) -> Callable[[Connection, Place], Awaitable[None]]:
    async def crash(connection: Connection, place: Place) -> None:
        if place == crashing:
            raise ConnectionError("a crash")

    return crash


class Gate:
    """Holds a follower in the middle of its batch, and says when it is there."""

    def __init__(self) -> None:
        self.reached = asyncio.Event()
        self.opened = asyncio.Event()

    async def __call__(self, connection: Connection, place: Place) -> None:
        if place == "after":
            self.reached.set()
            await self.opened.wait()


def some_events(connection: psycopg.Connection[Any], count: int = 1) -> int:
    """Events for Counting; returns the last position."""
    return append_stored(connection, [stored_event() for _ in range(count)])


def notified_events(connection: psycopg.Connection[Any]) -> int:
    """As another process appends them."""
    last = some_events(connection)
    connection.execute("NOTIFY payment_events")
    return last


def parked(connection: psycopg.Connection[Any]) -> dict[uuid.UUID, tuple[int, str]]:
    rows = connection.execute(
        'SELECT payment_id, "position", reason FROM parked_streams ORDER BY "position"'
    )
    return {row[0]: row[1:] for row in rows.fetchall()}


def text_of(query: str | bytes) -> str:
    return query if isinstance(query, str) else query.decode()


BACKENDS = """
SELECT pid FROM pg_stat_activity
 WHERE application_name = 'payments follower payments' AND datname = current_database()
"""

# It waits for a NOTIFY: nothing was asked of it for longer than a follower ever pauses.
WAITING = f"{BACKENDS} AND state = 'idle' AND clock_timestamp() - state_change > '60 ms'"


def backends(connection: psycopg.Connection[Any], query: str = BACKENDS) -> list[int]:
    return [pid for (pid,) in connection.execute(query.encode())]


async def waits(connection: psycopg.Connection[Any]) -> None:
    """Until a started follower has nothing to do and waits."""
    await until(lambda: backends(connection, WAITING))


@contextmanager
def frozen(pid: int) -> Iterator[None]:
    """While this is open, that backend of the server does nothing."""
    os.kill(pid, signal.SIGSTOP)
    try:
        yield
    finally:
        os.kill(pid, signal.SIGCONT)


# Position and effect


async def test_a_crash_leaves_neither_effect_nor_position(
    build: Build, counted: psycopg.Connection[Any]
) -> None:
    some_events(counted, 3)
    for place in get_args(Place):
        with pytest.raises(ConnectionError):
            await build(Counting(step=crash_at(place))).run_once()
        assert (applied(counted), position(counted)) == ([], 0)
    assert await build(Counting()).run_once() == 3
    assert (applied(counted), position(counted)) == ([1, 2, 3], 3)


async def test_a_server_crash_right_before_the_commit_leaves_neither(
    build: Build, counted: psycopg.Connection[Any]
) -> None:
    async def kill(connection: Connection, place: Place) -> None:
        if place == "after":
            pid = connection.info.backend_pid
            counted.execute("SELECT pg_terminate_backend(%s)", [pid])
            await until(lambda: pid not in backends(counted))

    some_events(counted, 3)
    with pytest.raises(psycopg.OperationalError):
        await build(Counting(step=kill)).run_once()
    assert (applied(counted), position(counted)) == ([], 0)


async def test_a_commit_whose_reply_is_lost_is_not_applied_again(
    build: Build,
    counted: psycopg.Connection[Any],
    address: DatabaseAddress,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(follower_module, "RETRY_MAX_S", 0.1)
    monkeypatch.setattr(follower_module, "POLL_S", 0.05)
    async with ServerProxy(address) as proxy:

        async def connect(name: str) -> psycopg.AsyncConnection[Any]:
            connection = await Database(proxy.address, 1).connect(name)
            execute = connection.execute

            async def execute_and_lose(query: Any, *args: Any, **kwargs: Any) -> Any:
                cursor = await execute(query, *args, **kwargs)
                if "UPDATE followers" in text_of(query) and proxy.lost < 10:
                    proxy.lose_next_reply()  # that of the commit
                return cursor

            connection.execute = execute_and_lose  # type: ignore[method-assign]
            return connection

        follower = build(Counting(), connect=connect)
        follower.start()
        for count in range(1, 12):
            await waits(counted)
            some_events(counted)
            await until(lambda count=count: proxy.lost >= min(count, 10))
        await until(lambda: position(counted) == 11)
        await follower.stop()
    assert proxy.lost == 10
    assert applied(counted) == list(range(1, 12))


async def test_a_batch_that_moved_nothing_says_so(
    build: Build, counted: psycopg.Connection[Any]
) -> None:
    follower = build(Counting(), batch_max=2)
    assert await follower.run_once() == 0
    some_events(counted, 3)
    assert [await follower.run_once() for _ in range(3)] == [2, 1, 0]
    assert applied(counted) == [1, 2, 3]


async def test_without_a_position_nothing_is_followed(
    build: Build, counted: psycopg.Connection[Any]
) -> None:
    some_events(counted)
    counted.execute("DELETE FROM followers")
    assert await build(Counting()).run_once() == 0


# One active


async def test_a_second_follower_gets_nothing_and_takes_over_from_a_dead_one(
    build: Build, counted: psycopg.Connection[Any]
) -> None:
    some_events(counted, 3)
    gate = Gate()
    first, second = build(Counting(step=gate)), build(Counting())
    active = asyncio.create_task(first.run_once())
    await gate.reached.wait()
    (pid,) = backends(counted)
    async with asyncio.timeout(PATIENCE_S):
        assert await second.run_once() == 0
    counted.execute("SELECT pg_terminate_backend(%s)", [pid])
    await until(lambda: pid not in backends(counted))
    assert await second.run_once() == 3
    gate.opened.set()
    with pytest.raises(psycopg.OperationalError):
        await active
    assert applied(counted) == [1, 2, 3]


async def test_started_ones_take_turns_when_the_active_one_dies(
    build: Build, counted: psycopg.Connection[Any]
) -> None:
    gate = Gate()
    for step in (gate, None):
        build(Counting(step=step)).start()
    await until(lambda: len(backends(counted, WAITING)) == 2)
    while not gate.reached.is_set():  # whoever is quicker gets the first batches
        last = some_events(counted)
        await until(lambda last=last: gate.reached.is_set() or position(counted) == last)
    last = some_events(counted)
    held = "SELECT pid FROM pg_stat_activity WHERE state = 'idle in transaction'"

    def only_one() -> list[Any]:  # the other one asks now and then whether it is free
        found = backends(counted, f"{held} AND pid IN ({BACKENDS})")
        return found if len(found) == 1 else []

    (pid,) = await until(only_one)
    counted.execute("SELECT pg_terminate_backend(%s)", [pid])
    await until(lambda: position(counted) == last)
    gate.opened.set()
    await waits(counted)
    assert applied(counted) == list(range(1, last + 1))


# Poison


def other(fact: Fact, **values: Any) -> StoredEvent:
    return to_stored_event(msgspec.structs.replace(fact, **values))


def unknown_topic(_: History) -> StoredEvent:
    return stored_event(topic="PaymentTeleported")


def bad_bytes(_: History) -> StoredEvent:
    return stored_event(state=b'\xff{"secret-key"')


def wrong_fields(_: History) -> StoredEvent:
    return stored_event(state=b'{"idempotency_key": "secret-key", "amount_cents": "secret-key"}')


def moved_row(good: History) -> StoredEvent:
    return StoredEvent(uuid.uuid4(), 1, "PaymentInitiated", to_stored_event(good.facts[0]).state)


def impossible(_: History) -> StoredEvent:
    return other(History(SECRET).charged().facts[1], version=1)


def nul_in_a_text(_: History) -> StoredEvent:
    return to_stored_event(History("secret-key \0").facts[0])


def key_of_another(good: History) -> StoredEvent:
    return other(good.facts[0], payment_id=uuid.uuid4())


def too_large_an_amount(_: History) -> StoredEvent:
    return other(History(SECRET).facts[0], amount_cents=2**31)


def handled_with_a_bug(_: History) -> StoredEvent:
    return to_stored_event(History("a bug").facts[0])


BUGGY = History("a bug").id


def bug(event: LogEntry) -> None:
    if event.payment_id == BUGGY:
        raise KeyError("secret-key \0")


@pytest.mark.parametrize(
    ("poison", "reason"),
    [
        (unknown_topic, "unknown topic 'PaymentTeleported'"),
        (bad_bytes, "UndecodableEvent"),
        (wrong_fields, "UndecodableEvent"),
        (moved_row, "belongs to another stream"),
        (impossible, "a stream cannot begin with PaymentCharged"),
        (nul_in_a_text, "22021"),
        (key_of_another, "23505"),
        (too_large_an_amount, "error"),
        (handled_with_a_bug, "KeyError"),
    ],
)
async def test_poison_parks_its_own_stream_alone(
    build: Build,
    connection: psycopg.Connection[Any],
    poison: Callable[[History], StoredEvent],
    reason: str,
) -> None:
    good = [History(f"{SECRET} {n}").charged() for n in range(20)]
    append(connection, [history.facts[0] for history in good])
    bad = poison(good[0])
    at = append_stored(connection, [bad])
    append(connection, [history.facts[1] for history in good])
    follower = build(Payments(bug))
    assert await follower.run_once() == 41
    stream = bad.originator_id
    assert isinstance(stream, uuid.UUID)
    ((parked_id, (parked_at, why)),) = parked(connection).items()
    assert (parked_id, parked_at) == (stream, at)
    assert reason in why
    assert SECRET not in why
    # What comes later of that stream is left out, and of the others nothing.
    append_stored(connection, [stored_event(stream, 2)])
    append(connection, good[0].refunded().facts[2:])
    assert await follower.run_once() == 3
    assert list(check(connection).parked) == [stream]
    assert list(parked(connection)) == [stream]
    assert connection.execute("SELECT count(*) FROM payments").fetchone() == (20,)


async def test_several_poisoned_streams_in_one_batch(
    build: Build, counted: psycopg.Connection[Any]
) -> None:
    events = [stored_event() for _ in range(100)]
    for event in list(events[::3]):
        assert isinstance(event.originator_id, uuid.UUID)
        events.append(stored_event(event.originator_id, 2))
    poisoned = {event.originator_id for event in events[:100:7]}

    def poison(event: LogEntry) -> None:
        if event.payment_id in poisoned:
            raise ValueError("poison")

    append_stored(counted, events)
    assert await build(Counting(poison=poison)).run_once() == len(events)
    assert parked(counted).keys() == poisoned
    good = [n for n, event in enumerate(events, 1) if event.originator_id not in poisoned]
    assert sorted(applied(counted)) == good


async def test_poison_in_a_full_batch_takes_little_longer(
    build: Build, connection: psycopg.Connection[Any]
) -> None:
    """Else a batch that is slow already would never end."""
    append(connection, [History(f"k{n}").facts[0] for n in range(1000)])
    machine, started = Machine(), time.monotonic()
    assert await build().run_once() == 1000
    without_s = time.monotonic() - started
    append(connection, [History(f"l{n}").facts[0] for n in range(999)])
    append_stored(connection, [stored_event()])
    started = time.monotonic()
    assert await build().run_once() == 1000
    with_s = time.monotonic() - started
    assert len(parked(connection)) == 1
    bound(with_s, 6 * without_s + 0.2, machine)


async def test_a_refusal_before_the_server_sees_it_is_poison_too(
    build: Build, counted: psycopg.Connection[Any]
) -> None:
    """psycopg itself refuses a text with a NUL; there is no SQLSTATE then."""
    bad = stored_event()
    append_stored(counted, [stored_event(), bad, stored_event()])

    class Noting(Counting):
        async def apply(self, connection: Connection, events: Any) -> None:
            note = "\0" if any(event.position == 2 for event in events) else ""
            await connection.execute("SELECT %s", [f"{SECRET} {note}"])
            await super().apply(connection, events)

    assert await build(Noting()).run_once() == 3
    assert applied(counted) == [1, 3]
    assert list(parked(counted)) == [bad.originator_id]


REFUSED = [
    "SELECT 'secret-key'::integer",
    "SELECT 'secret-key'::timestamptz",
    "SELECT '99999999999'::integer",
    "INSERT INTO checked VALUES ('secret-key')",
    "INSERT INTO checked VALUES (NULL)",
]


async def test_no_reason_quotes_a_row(build: Build, counted: psycopg.Connection[Any]) -> None:
    counted.execute("CREATE TABLE checked (word text NOT NULL CHECK (word = 'fine'))")
    left = list(REFUSED)

    async def refuse(connection: Connection, _: Place) -> None:
        await connection.execute(left.pop(0).encode())

    follower = build(Counting(step=refuse))
    for _ in REFUSED:
        some_events(counted)
        assert await follower.run_once() == 1
    reasons = [why for _, why in parked(counted).values()]
    assert reasons == [
        "22P02 InvalidTextRepresentation",
        "22007 InvalidDatetimeFormat",
        "22003 NumericValueOutOfRange",
        "23514 CheckViolation checked checked_word_check",
        "23502 NotNullViolation checked word",
    ]


# Parked streams are taken up again


class Poison:
    """What is parked until it is mended."""

    def __init__(self, *streams: uuid.UUID) -> None:
        self.streams = set(streams)

    def __call__(self, event: LogEntry) -> None:
        if event.payment_id in self.streams:
            raise ValueError("poison")


async def three_batches(
    build: Build, counted: psycopg.Connection[Any]
) -> tuple[list[uuid.UUID], Poison]:
    """Three streams of three events each, in three batches; two of them are parked."""
    streams = [uuid.uuid4() for _ in range(3)]
    poison = Poison(*streams[:2])
    follower = build(Counting(poison=poison))
    for version in (1, 2, 3):
        append_stored(counted, [stored_event(stream, version) for stream in streams])
        await follower.run_once()
    assert parked(counted).keys() == poison.streams
    assert applied(counted) == [3, 6, 9]
    return streams, poison


async def test_retrying_all_applies_exactly_what_was_missed(
    build: Build, counted: psycopg.Connection[Any]
) -> None:
    await three_batches(build, counted)
    assert await build(Counting()).retry_parked() == []
    assert applied(counted) == [3, 6, 9, 1, 4, 7, 2, 5, 8]
    assert not parked(counted)


async def test_retrying_one(build: Build, counted: psycopg.Connection[Any]) -> None:
    streams, _ = await three_batches(build, counted)
    follower = build(Counting())
    assert await follower.retry_parked([streams[1], uuid.uuid4()]) == []
    assert applied(counted)[3:] == [2, 5, 8]
    assert list(parked(counted)) == [streams[0]]


async def test_what_still_fails_stays_parked_as_it_was(
    build: Build, counted: psycopg.Connection[Any]
) -> None:
    streams, poison = await three_batches(build, counted)
    poison.streams = {streams[0]}
    since = "SELECT payment_id, parked_at FROM parked_streams"
    before = dict(counted.execute(since).fetchall())
    follower = build(Counting(poison=poison))
    (left,) = await follower.retry_parked()
    assert left.payment_id == streams[0]
    assert (left.position, left.parked_at) == (1, before[streams[0]])
    assert applied(counted)[3:] == [2, 5, 8]
    assert await follower.retry_parked([streams[1]]) == []


async def test_a_stream_that_was_taken_up_is_followed_again(
    build: Build, counted: psycopg.Connection[Any]
) -> None:
    streams, _ = await three_batches(build, counted)
    follower = build(Counting())
    await follower.retry_parked()
    append_stored(counted, [stored_event(stream, 4) for stream in streams])
    await follower.run_once()
    assert applied(counted)[-3:] == [10, 11, 12]


async def test_a_started_follower_begins_with_what_is_parked(
    build: Build, counted: psycopg.Connection[Any]
) -> None:
    await three_batches(build, counted)
    build(Counting()).start()
    await until(lambda: not parked(counted))
    assert sorted(applied(counted)) == list(range(1, 10))


async def test_a_parked_payment_comes_back_as_the_fold_says(
    build: Build, connection: psycopg.Connection[Any]
) -> None:
    """Parked in the middle of its life, over several batches."""
    history = History("a bug").charged()
    append(connection, history.facts)
    await build().run_once()
    follower = build(Payments(bug))
    for _ in range(3):
        append(connection, history.refunded(None, 400).facts[-2:])
        await follower.run_once()
    assert parked(connection)[BUGGY][0] == 3
    assert connection.execute("SELECT count(*) FROM refunds").fetchone() == (0,)
    assert await build().retry_parked() == []
    assert check(connection).payments == 1
    assert connection.execute("SELECT count(*) FROM refunds").fetchone() == (3,)


async def test_retrying_waits_for_its_turn(build: Build, counted: psycopg.Connection[Any]) -> None:
    await three_batches(build, counted)
    some_events(counted)
    gate = Gate()
    active = asyncio.create_task(build(Counting(step=gate)).run_once())
    await gate.reached.wait()
    retrying = asyncio.create_task(build(Counting()).retry_parked())
    locks = "SELECT 1 FROM pg_locks WHERE NOT granted"
    await until(lambda: counted.execute(locks).fetchone())
    gate.opened.set()
    assert await active == 1
    assert await retrying == []
    assert sorted(applied(counted)) == list(range(1, 11))


def connect_with(
    database: Database, word: str, meanwhile: Callable[[], Awaitable[Any]]
) -> Callable[[str], Awaitable[psycopg.AsyncConnection[Any]]]:
    """Connections on which something happens right before the first statement with this word."""

    async def connect(name: str) -> psycopg.AsyncConnection[Any]:
        connection = await database.connect(name)
        execute = connection.execute

        async def execute_later(query: Any, *args: Any, **kwargs: Any) -> Any:
            if word in text_of(query):
                connection.execute = execute  # type: ignore[method-assign]
                await meanwhile()
            return await execute(query, *args, **kwargs)

        connection.execute = execute_later  # type: ignore[method-assign]
        return connection

    return connect


async def test_what_another_follower_has_just_parked_is_left_out(
    build: Build, database: Database, counted: psycopg.Connection[Any]
) -> None:
    """The list of parked streams is read when nobody else can park one any more."""
    stream = uuid.uuid4()
    append_stored(counted, [stored_event(stream)])
    first = build(Counting(poison=Poison(stream)))

    async def park() -> None:
        await first.run_once()
        append_stored(counted, [stored_event(stream, 2), stored_event()])

    second = build(Counting(), connect=connect_with(database, "FOR UPDATE", park))
    assert await second.run_once() == 2
    assert applied(counted) == [3]
    assert await second.retry_parked() == []
    assert applied(counted) == [3, 1, 2]


async def test_what_another_follower_has_just_retried_is_not_applied_again(
    build: Build, database: Database, counted: psycopg.Connection[Any]
) -> None:
    """Even if it was parked again since, for a later event."""
    stream = uuid.uuid4()
    append_stored(counted, [stored_event(stream)])
    poison = Poison(stream)
    first = build(Counting(poison=poison))
    await first.run_once()

    async def retry_and_park_again() -> None:
        poison.streams.clear()
        assert await first.retry_parked() == []
        append_stored(counted, [stored_event(stream, 2)])
        poison.streams.add(stream)
        await first.run_once()
        assert parked(counted)[stream][0] == 2

    connect = connect_with(database, "FOR UPDATE", retry_and_park_again)
    assert await build(Counting(), connect=connect).retry_parked() == []
    assert applied(counted) == [1, 2]


# Other errors park nothing


async def raise_after_lock(connection: Connection) -> None:
    await connection.execute("SET LOCAL lock_timeout = '20ms'")
    await connection.execute("LOCK TABLE refunds")


async def raise_disk_full(connection: Connection) -> None:
    raise psycopg.errors.DiskFull("No space left on device")


async def raise_memory(connection: Connection) -> None:
    raise MemoryError


async def raise_cancelled_query(connection: Connection) -> None:
    await connection.execute("SET LOCAL statement_timeout = '10ms'")
    await connection.execute("SELECT pg_sleep(5)")


async def raise_missing_table(connection: Connection) -> None:
    await connection.execute("SELECT * FROM not_migrated_yet")


async def kill_own_backend(connection: Connection) -> None:
    await connection.execute("SELECT pg_terminate_backend(pg_backend_pid())")


@pytest.mark.parametrize(
    ("trouble", "error"),
    [
        (raise_after_lock, psycopg.errors.LockNotAvailable),
        (raise_disk_full, psycopg.errors.DiskFull),
        (raise_memory, MemoryError),
        (raise_cancelled_query, psycopg.errors.QueryCanceled),
        (raise_missing_table, psycopg.errors.UndefinedTable),
        (kill_own_backend, psycopg.OperationalError),
    ],
)
async def test_other_errors_park_nothing_and_the_batch_is_tried_again(
    build: Build,
    connection: psycopg.Connection[Any],
    trouble: Callable[[Connection], Awaitable[None]],
    error: type[Exception],
) -> None:
    append(connection, History("k1").charged().facts)
    with connection.transaction():
        connection.execute("LOCK TABLE refunds IN EXCLUSIVE MODE")
        with pytest.raises(error):
            await build(Payments(after=trouble)).run_once()
    assert not parked(connection)
    assert position(connection) == 0

    failures = 0

    async def twice(working: Connection) -> None:
        nonlocal failures
        failures += 1
        if failures <= 2:
            with connection.transaction():
                connection.execute("LOCK TABLE refunds IN EXCLUSIVE MODE")
                await trouble(working)

    build(Payments(after=twice)).start()
    await until(lambda: position(connection) == 2)
    assert failures == 3
    assert not check(connection).parked


async def test_trouble_during_a_retry_leaves_the_stream_parked(
    build: Build, counted: psycopg.Connection[Any]
) -> None:
    await three_batches(build, counted)
    before = parked(counted)
    with pytest.raises(ConnectionError):
        await build(Counting(step=crash_at("after"))).retry_parked()
    assert parked(counted) == before
    assert applied(counted) == [3, 6, 9]


# Waking


async def time_to_apply(counted: psycopg.Connection[Any], put: Callable[[], int]) -> float:
    """How long until the event that `put` stores was applied and committed."""
    await waits(counted)
    started = time.monotonic()
    last = put()
    while position(counted) < last:
        assert time.monotonic() - started < PATIENCE_S, "not applied"
        await asyncio.sleep(0.002)
    return time.monotonic() - started


async def test_a_notify_wakes_it_at_once(
    build: Build, counted: psycopg.Connection[Any], machine: Machine
) -> None:
    build(Counting()).start()
    latencies = [await time_to_apply(counted, lambda: notified_events(counted)) for _ in range(15)]
    bound(statistics.median(latencies), follower_module.POLL_S / 5, machine)


async def test_what_its_process_appended_wakes_it_without_a_notify(
    build: Build, counted: psycopg.Connection[Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(follower_module, "POLL_S", 60.0)
    follower = build(Counting())
    follower.start()

    def put() -> int:
        last = some_events(counted)
        follower.wake()
        return last

    for _ in range(5):
        await time_to_apply(counted, put)


@pytest.mark.parametrize("how", ["woken", "notified"])
async def test_what_comes_behind_a_batch_is_not_waited_for(
    build: Build, counted: psycopg.Connection[Any], monkeypatch: pytest.MonkeyPatch, how: str
) -> None:
    """Of a NOTIFY nothing more comes on the socket: psycopg has taken it from there already."""
    monkeypatch.setattr(follower_module, "POLL_S", 60.0)
    batches = 0
    run_once = Follower.run_once

    async def run_and_append(self: Follower) -> int:
        nonlocal batches
        moved = await run_once(self)
        batches += 1
        if batches == 2:  # it found nothing, and is about to wait
            if how == "woken":
                some_events(counted)
                self.wake()
            else:
                notified_events(counted)
                assert self._opened is not None
                await self._opened.execute("SELECT 1")
        return moved

    monkeypatch.setattr(Follower, "run_once", run_and_append)
    follower = build(Counting())
    some_events(counted)
    follower.start()
    await until(lambda: position(counted) == 2)


async def test_lost_notifies_are_found_by_the_poll(
    build: Build, counted: psycopg.Connection[Any]
) -> None:
    def put() -> int:
        row = counted.execute(
            "INSERT INTO payment_events SELECT coalesce(max(notification_id), 0) + 1,"
            " gen_random_uuid(), 1, 'Unnoticed', '', now() FROM payment_events"
            " RETURNING notification_id"
        ).fetchone()
        assert row is not None
        last: int = row[0]
        return last

    build(Counting()).start()
    for _ in range(2):
        await time_to_apply(counted, put)


async def test_it_listens_again_after_each_lost_connection(
    build: Build,
    counted: psycopg.Connection[Any],
    monkeypatch: pytest.MonkeyPatch,
    long_run: bool,
) -> None:
    lost = 20 if long_run else 5
    monkeypatch.setattr(follower_module, "POLL_S", 60.0)  # only a NOTIFY can wake it
    build(Counting()).start()
    await waits(counted)
    for _ in range(lost):
        (pid,) = backends(counted)
        counted.execute("SELECT pg_terminate_backend(%s)", [pid])
        await until(lambda pid=pid: pid not in backends(counted))
        await time_to_apply(counted, lambda: notified_events(counted))
    assert applied(counted) == list(range(1, lost + 1))


async def test_notifies_do_not_pile_up_while_it_is_busy(
    build: Build, counted: psycopg.Connection[Any]
) -> None:
    """psycopg keeps those that come during a statement until somebody asks for them."""
    most = 0

    async def look(connection: Connection, place: Place) -> None:
        nonlocal most
        backlog = connection._notifies_backlog
        most = max(most, len(backlog or ()))
        if place == "between":
            notified_events(counted)  # so there is always more, and it never waits
            await connection.execute("SELECT 1")

    follower = build(Counting(step=look))
    some_events(counted)
    follower.start()
    await until(lambda: position(counted) >= 60)
    await follower.stop()
    assert most < 10


async def test_a_server_that_is_down_at_first(
    build: Build, database: Database, counted: psycopg.Connection[Any]
) -> None:
    tries = 0

    async def connect(name: str) -> psycopg.AsyncConnection[Any]:
        nonlocal tries
        tries += 1
        if tries < 4:
            raise psycopg.OperationalError("no server")
        return await database.connect(name)

    some_events(counted)
    build(Counting(), connect=connect).start()
    await until(lambda: position(counted) == 1)


# A frozen server


async def test_a_server_that_froze_while_nothing_happened_is_given_up(
    build: Build, counted: psycopg.Connection[Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(follower_module, "BATCH_TIMEOUT_S", 0.3)
    # Long enough that it is not in the middle of looking when its server freezes.
    monkeypatch.setattr(follower_module, "POLL_S", 2.0)
    build(Counting()).start()
    first = some_events(counted)
    await until(lambda: position(counted) == first)
    await waits(counted)
    (pid,) = backends(counted)
    with frozen(pid):
        last = some_events(counted)
        await until(lambda: position(counted) == last)
    assert applied(counted) == [1, 2]


async def test_a_server_that_froze_in_mid_batch_is_given_up(
    build: Build, counted: psycopg.Connection[Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its lock stays as long as it is frozen; then another connection goes on."""
    monkeypatch.setattr(follower_module, "BATCH_TIMEOUT_S", 0.3)
    some_events(counted)
    pids: list[int] = []

    async def freeze(connection: Connection, place: Place) -> None:
        if place == "between":
            pids.append(connection.info.backend_pid)
            os.kill(pids[0], signal.SIGSTOP)

    try:
        with within(3), pytest.raises(psycopg.OperationalError):
            await build(Counting(step=freeze)).run_once()
    finally:
        os.kill(pids[0], signal.SIGCONT)
    await until(lambda: pids[0] not in backends(counted))
    assert await build(Counting()).run_once() == 1
    assert applied(counted) == [1]


@pytest.mark.parametrize("word", ["LISTEN", "parked_streams"])
async def test_a_server_that_froze_before_the_first_batch_is_given_up(
    build: Build,
    database: Database,
    counted: psycopg.Connection[Any],
    monkeypatch: pytest.MonkeyPatch,
    word: str,
) -> None:
    monkeypatch.setattr(follower_module, "BATCH_TIMEOUT_S", 0.3)
    some_events(counted)
    pids: list[int] = []

    async def freeze() -> None:
        if not pids:
            pids.extend(backends(counted))
            os.kill(pids[0], signal.SIGSTOP)

    build(Counting(), connect=connect_with(database, word, freeze)).start()
    try:
        await until(lambda: position(counted) == 1)
    finally:
        for pid in pids:
            os.kill(pid, signal.SIGCONT)
    assert pids


# Stopping


async def test_an_idle_one_stops_at_once(build: Build, counted: psycopg.Connection[Any]) -> None:
    follower = build(Counting())
    follower.start()
    await waits(counted)
    with within(1.5):  # of the 2 s that it may take
        await follower.stop()
    await until(lambda: not backends(counted))


async def test_it_stops_at_a_batch_boundary(build: Build, counted: psycopg.Connection[Any]) -> None:
    some_events(counted, 3)
    gate = Gate()
    follower = build(Counting(step=gate), batch_max=1)
    follower.start()
    await gate.reached.wait()
    stopping = asyncio.create_task(follower.stop())
    await asyncio.sleep(0)
    assert not stopping.done()
    gate.opened.set()
    await stopping
    assert (applied(counted), position(counted)) == ([1], 1)


async def test_a_batch_that_takes_too_long_is_cut_off_and_has_not_happened(
    build: Build, counted: psycopg.Connection[Any]
) -> None:
    some_events(counted, 3)
    gate = Gate()
    follower = build(Counting(step=gate))
    follower.start()
    await gate.reached.wait()
    started = time.monotonic()
    with within(1.1):
        await follower.stop(0.2)
    assert time.monotonic() - started >= 0.2
    await until(lambda: not backends(counted))
    assert (applied(counted), position(counted)) == ([], 0)


async def test_it_stops_at_once_in_an_outage(build: Build, database: Database) -> None:
    refused = asyncio.Event()

    async def connect(name: str) -> psycopg.AsyncConnection[Any]:
        refused.set()
        raise psycopg.OperationalError("no server")

    follower = build(Counting(), connect=connect)
    follower.start()
    await refused.wait()
    with within(1.5):  # of the 2 s that it may take
        await follower.stop()


async def test_stopping_twice_or_without_a_start_is_no_trouble(build: Build) -> None:
    follower = build(Counting())
    await follower.stop()
    await follower.stop()


# Metrics


async def test_it_counts_what_it_applied(build: Build, counted: psycopg.Connection[Any]) -> None:
    telemetry = Telemetry()
    follower = build(Counting(), telemetry=telemetry, batch_max=2)
    some_events(counted, 3)
    for _ in range(3):
        await follower.run_once()
    shown = telemetry.exposition().decode()
    assert 'payments_follower_applied_events_total{follower="payments"} 3.0' in shown
    assert 'payments_follower_batch_duration_seconds_count{follower="payments"} 2.0' in shown


async def test_a_batch_that_failed_is_not_counted(
    build: Build, counted: psycopg.Connection[Any]
) -> None:
    telemetry = Telemetry()
    some_events(counted, 3)
    with pytest.raises(ConnectionError):
        await build(Counting(step=crash_at("after")), telemetry=telemetry).run_once()
    shown = telemetry.exposition().decode()
    assert 'payments_follower_applied_events_total{follower="payments"} 0.0' in shown


async def test_many_parked_streams_do_not_keep_it_from_following(
    build: Build, connection: psycopg.Connection[Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    """They are retried a few at a time, from the start on."""
    monkeypatch.setattr(follower_module, "POLL_S", 0.02)
    append_stored(connection, [stored_event(topic="Unknown") for _ in range(200)])
    before = build()
    before.start()
    parked = "SELECT count(*) FROM parked_streams"
    await until(lambda: connection.execute(parked).fetchone() == (200,), 3 * PATIENCE_S)
    await before.stop()
    history = History("k").charged()
    append(connection, history.facts)
    follower = build()
    follower.start()
    key = "SELECT FROM payments WHERE idempotency_key = 'k'"
    await until(lambda: connection.execute(key).fetchone() is not None)
    assert follower._to_retry
    await until(lambda: not follower._to_retry)


async def test_a_batch_that_takes_too_long_is_tried_in_smaller_ones(
    build: Build, connection: psycopg.Connection[Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Half of the streams are poison, and the database is far away."""
    monkeypatch.setattr("payments.projections.follower.BATCH_TIMEOUT_S", 0.15)
    append_stored(connection, [stored_event(topic="Unknown") for _ in range(300)])
    build().start()
    await until(lambda: position(connection) == 300, 3 * PATIENCE_S)
