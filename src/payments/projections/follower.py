"""The follower: reads the log in order and hands it to a projection, batch by batch.

One transaction holds a batch's rows and the position behind it, so each event is applied once. The
follower's row in `followers` is locked meanwhile, so among any number of processes one is active;
its lock goes with its transaction, and another takes over.

A stream that cannot be applied is parked, and the others go on: see `_apply_or_park`.
"""

import asyncio
import time
import traceback
from collections.abc import Awaitable, Callable, Collection, Sequence
from contextlib import suppress
from functools import partial
from typing import TYPE_CHECKING, Any, NamedTuple, Protocol
from uuid import UUID

import psycopg
from loguru import logger

from payments.database import cut_after
from payments.events.facts import UndecodableEvent, traceparent_of
from payments.events.notifier import LISTEN
from payments.events.store import READ_LOG, READ_STREAM_PART, LogEntry, read_events
from payments.logs import Repeats
from payments.payment import UnexpectedEvent
from payments.tasks import end
from payments.tracing import spans_since

if TYPE_CHECKING:  # commands use what is below, and measure nothing
    from payments.telemetry import Telemetry

BATCH_MAX = 1000  # events; larger ones save nothing and keep the event loop for longer
# A batch takes milliseconds; a server that does not answer is given up after this, so that lists
# are up to date again within 5 s of an outage that nobody was told of.
BATCH_TIMEOUT_S = 4.0
POLL_S = 1.0  # a NOTIFY is a hint that may be lost
# Events that come together are applied together: the two of a charge stand for one row.
GATHER_S = 0.01
BUSY_GATHER_S = 0.1
BUSY_EVENTS = 64
RETRY_MIN_S, RETRY_MAX_S = 0.05, 2.0
# A process that knows more than the one which parked a stream may have been running all along.
RETRY_PARKED_S = 600.0
RETRY_PARKED_FOR_S = 0.1

# Without a row another process is active.
TAKE_POSITION = """
SELECT position FROM followers WHERE name = %s FOR UPDATE SKIP LOCKED
"""

AWAIT_POSITION = """
SELECT position FROM followers WHERE name = %s FOR UPDATE
"""

# To be read once the position is taken: the follower before may just have parked one.
PARKED_IDS = """
SELECT payment_id FROM parked_streams WHERE follower = %s
"""

PARKED_POSITION = """
SELECT position FROM parked_streams WHERE follower = %s AND payment_id = %s
"""

MOVE_POSITION = """
UPDATE followers SET position = %s, updated_at = clock_timestamp() WHERE name = %s
"""

PARK = """
INSERT INTO parked_streams (follower, payment_id, position, reason) VALUES (%s, %s, %s, %s)
    ON CONFLICT (follower, payment_id) DO UPDATE SET reason = excluded.reason
"""

LIST_PARKED = """
SELECT payment_id, position, reason, parked_at
  FROM parked_streams WHERE follower = %s ORDER BY position
"""

UNPARK = """
DELETE FROM parked_streams WHERE follower = %s AND payment_id = %s
"""


class Projection(Protocol):
    """What a follower keeps up to date. Its name is that of its row in `followers`."""

    name: str

    async def apply(
        self, connection: psycopg.AsyncConnection[Any], events: Sequence[LogEntry]
    ) -> None:
        """Writes what these events mean, within the follower's transaction.

        The events are in order, and of each stream nothing is left out between what was applied
        before and these. Raises for the whole batch if one of them cannot be applied.
        """
        ...


class Parked(NamedTuple):
    """A stream that is parked; `position` is its first event that was not applied."""

    payment_id: UUID
    position: int
    reason: str
    parked_at: Any


class Follower:
    """Follows the log for one projection, on a connection of its own."""

    def __init__(
        self,
        connect: Callable[[str], Awaitable[psycopg.AsyncConnection[Any]]],
        projection: Projection,
        telemetry: "Telemetry",
        batch_max: int = BATCH_MAX,
        *,
        applied: Callable[[], None] | None = None,
        listens: bool = True,
    ) -> None:
        """`applied` is called whenever a batch is committed. One that does not listen looks at the
        log every POLL_S only: its batches are larger, and cost the appends less."""
        self._connect = connect
        self._projection = projection
        self._name = projection.name
        self._telemetry = telemetry
        self._batch_max = self._limit = batch_max
        self._repeats = Repeats()
        self._applied = applied or (lambda: None)
        self._listens = listens
        self._woken = asyncio.Event()
        self._opened: psycopg.AsyncConnection[Any] | None = None
        self._task: asyncio.Task[None] | None = None
        self._applying = self._stopping = False
        self._retry_parked_at = 0.0
        self._to_retry: list[UUID] = []

    def start(self) -> None:
        self._task = asyncio.create_task(self._run(), name=f"follower {self._name}")

    async def stop(self, timeout_s: float = 2.0) -> None:
        """Stops after the present batch; one that takes too long has not happened."""
        self._stopping = True
        if self._task is not None:
            if self._applying:
                await asyncio.wait({self._task}, timeout=timeout_s)
            await end({self._task}, 1)
        await self.close()

    def wake(self) -> None:
        """There are events that this process has appended."""
        self._woken.set()

    @property
    def name(self) -> str:
        return self._name

    async def close(self) -> None:
        if self._opened is not None:
            connection, self._opened = self._opened, None
            await connection.close()

    async def run_once(self) -> int:
        """Applies one batch; returns by how many events the position moved.

        0 if there are none, or if another process is active.
        """
        started = time.perf_counter()
        connection = await self._connection()
        with cut_after(connection, BATCH_TIMEOUT_S):
            async with connection.transaction():
                position = await _one(connection, TAKE_POSITION, [self._name])
                if position is None:
                    return 0
                events = await read_events(connection, READ_LOG, [position, self._limit])
                if not events:
                    return 0
                await self._apply(connection, events)
                await connection.execute(MOVE_POSITION, [events[-1].position, self._name])
        self._applied()
        self._telemetry.follower_applied[self._name].inc(len(events))
        seconds = time.perf_counter() - started
        self._telemetry.follower_seconds[self._name].observe(seconds)
        traceparents = (traceparent_of(event.state) for event in events)
        spans_since(f"project {self._name}", seconds, traceparents)
        return len(events)

    async def parked(self) -> list[Parked]:
        """The parked streams, oldest first."""
        connection = await self._connection()
        with cut_after(connection, BATCH_TIMEOUT_S):
            cursor = await connection.execute(LIST_PARKED, [self._name])
            return [Parked(*row) for row in await cursor.fetchall()]

    async def retry_parked(self, payment_ids: Collection[UUID] | None = None) -> list[Parked]:
        """Applies what parked streams have missed (all, or these); returns those still parked.

        Waits for its turn if another process is active.
        """
        for parked in await self.parked():
            if payment_ids is None or parked.payment_id in payment_ids:
                await self._retry(parked.payment_id)
        return [
            parked
            for parked in await self.parked()
            if payment_ids is None or parked.payment_id in payment_ids
        ]

    async def _retry_some_parked(self) -> None:
        """At the start, and now and then, what is parked gets another chance, a few streams at a
        time: following must not wait for it."""
        now = time.monotonic()
        if now >= self._retry_parked_at:
            self._retry_parked_at = now + RETRY_PARKED_S
            self._to_retry = [parked.payment_id for parked in await self.parked()]
        while self._to_retry and time.monotonic() < now + RETRY_PARKED_FOR_S:
            await self._retry(self._to_retry.pop(0))

    async def _retry(self, payment_id: UUID) -> None:
        connection = await self._connection()
        with cut_after(connection, BATCH_TIMEOUT_S):
            async with connection.transaction():
                position = await _one(connection, AWAIT_POSITION, [self._name])
                # Another process may have retried it since, and parked it again further on.
                first = await _one(connection, PARKED_POSITION, [self._name, payment_id])
                if first is None:
                    return
                events = await read_events(
                    connection, READ_STREAM_PART, [payment_id, first, position]
                )
                # Without any it was parked by hand, and there is nothing to apply.
                if not events or await self._apply_or_park(connection, events):
                    await connection.execute(UNPARK, [self._name, payment_id])

    async def _run(self) -> None:
        """Follows until cancelled, whatever happens to the database."""
        pause_s = RETRY_MIN_S
        while not self._stopping:
            try:
                connection = await self._connection()
                await self._retry_some_parked()
                await self._run_connected(connection)
            except asyncio.CancelledError:
                raise
            except Exception as error:  # noqa: BLE001 - it must go on, whatever it is
                self._complain(error)
                # Perhaps it was too much for the time that a batch has.
                self._limit = max(1, self._limit // 2)
                with suppress(Exception):
                    await self.close()
                await asyncio.sleep(pause_s)
                pause_s = min(pause_s * 2, RETRY_MAX_S)
            else:
                pause_s = RETRY_MIN_S
                self._limit = min(self._limit * 2, self._batch_max)

    def _complain(self, error: Exception) -> None:
        reason = type(error).__name__
        tell = partial(self._repeats.tell, of=reason, follower=self._name, reason=reason)
        if isinstance(error, psycopg.Error | OSError):
            tell("WARNING", "the follower lost its database, trying again")
        else:
            tell("ERROR", "the follower failed, trying again", exception=error)

    async def _run_connected(self, connection: psycopg.AsyncConnection[Any]) -> None:
        """Applies a batch; if there is none, waits until it is woken, for a NOTIFY or the poll."""
        self._woken.clear()
        moved = await self._run_batch()
        if self._stopping:
            return
        if not self._listens:
            await asyncio.sleep(0 if moved == self._limit else POLL_S)
            return
        if not await _was_notified(connection) and not moved:
            await self._wait(connection)
        if moved < self._limit:
            await asyncio.sleep(BUSY_GATHER_S if moved > BUSY_EVENTS else GATHER_S)

    async def _wait(self, connection: psycopg.AsyncConnection[Any]) -> None:
        """Until this process appends something, or the server says something; POLL_S at most."""
        loop, socket = asyncio.get_running_loop(), connection.fileno()
        loop.add_reader(socket, self._woken.set)
        try:
            async with asyncio.timeout(POLL_S):
                await self._woken.wait()
        except TimeoutError:
            pass
        finally:
            loop.remove_reader(socket)
        await _was_notified(connection)

    async def _run_batch(self) -> int:
        self._applying = True
        try:
            return await self.run_once()
        finally:
            self._applying = False

    async def _connection(self) -> psycopg.AsyncConnection[Any]:
        if self._opened is None:
            self._opened = await self._connect(f"payments follower {self._name}")
            with cut_after(self._opened, BATCH_TIMEOUT_S):
                # Nothing is lost if a crash of the server undoes the last batches: their position
                # goes with them. Waiting for the disk would only slow the appends down.
                await self._opened.execute("SET synchronous_commit = off")
                if self._listens:
                    await self._opened.execute(LISTEN)
        return self._opened

    async def _parked_ids(self, connection: psycopg.AsyncConnection[Any]) -> set[UUID]:
        cursor = await connection.execute(PARKED_IDS, [self._name])
        return {payment_id for (payment_id,) in await cursor.fetchall()}

    async def _apply(
        self, connection: psycopg.AsyncConnection[Any], events: list[LogEntry]
    ) -> None:
        parked = await self._parked_ids(connection)
        events = [event for event in events if event.payment_id not in parked]
        if events:
            await self._apply_or_park(connection, events)

    async def _apply_or_park(
        self, connection: psycopg.AsyncConnection[Any], events: list[LogEntry]
    ) -> bool:
        """Applies the events, but parks the streams that cannot be; returns whether there is none.

        A batch that fails is halved until the culprits are alone, each part in a savepoint: stream
        by stream, one of them would make a large batch take longer than it may.
        """
        try:
            async with connection.transaction():
                await self._projection.apply(connection, events)
        except Exception as error:
            if not _is_the_events_fault(error):
                raise
            reason = _reason(error)
        else:
            return True
        streams = list(dict.fromkeys(event.payment_id for event in events))
        if len(streams) == 1:
            await self._park(connection, events[0], reason)
            return False
        half = set(streams[: len(streams) // 2])
        for part in (True, False):
            of_part = [event for event in events if (event.payment_id in half) is part]
            await self._apply_or_park(connection, of_part)
        return False

    async def _park(
        self, connection: psycopg.AsyncConnection[Any], first: LogEntry, reason: str
    ) -> None:
        logger.bind(follower=self._name, payment_id=first.payment_id, reason=reason).error(
            "a stream is parked: `payments parked list`"
        )
        await connection.execute(PARK, [self._name, first.payment_id, first.position, reason])


async def _one(connection: psycopg.AsyncConnection[Any], query: str, params: list[Any]) -> Any:
    cursor = await connection.execute(query.encode(), params)
    row = await cursor.fetchone()
    return row[0] if row else None


async def _was_notified(connection: psycopg.AsyncConnection[Any]) -> bool:
    """Whether a NOTIFY has come, also during a batch: psycopg keeps them for whoever asks, without
    bound. Raises OperationalError if the connection is lost."""
    return bool([None async for _ in connection.notifies(timeout=0)])


def _is_the_events_fault(error: Exception) -> bool:
    """Whether it would fail again: not for a lost connection, a lock, or a full disk."""
    if isinstance(error, psycopg.Error):
        # SQLSTATE classes 22 and 23, and what psycopg itself refuses to send.
        return isinstance(error, psycopg.DataError | psycopg.IntegrityError)
    return not isinstance(error, OSError | MemoryError)


def _reason(error: Exception) -> str:
    """For people. Other messages than our own may quote what is in a row."""
    kind = type(error).__name__
    if isinstance(error, UndecodableEvent | UnexpectedEvent):
        return f"{kind}: {error}"[:500]
    if isinstance(error, psycopg.Error):
        names = (error.diag.table_name, error.diag.column_name, error.diag.constraint_name)
        return " ".join(part for part in (error.sqlstate, kind, *names) if part)
    *_, (frame, line) = traceback.walk_tb(error.__traceback__)
    return f"{kind} in {frame.f_code.co_qualname}, line {line}"
