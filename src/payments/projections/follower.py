"""The follower: reads the log in order and passes it to a projection, batch by batch.

One transaction writes a batch's rows and the new position, so each event is applied once. It locks
the follower's row in `followers`, so only one of any number of processes is active; when its
transaction ends, another can take over.

A stream that cannot be applied is parked, and the others continue: see parking.py.
"""

import asyncio
import time
from collections.abc import Awaitable, Callable, Collection
from contextlib import suppress
from functools import partial
from typing import TYPE_CHECKING, Any
from uuid import UUID

import psycopg

from payments.backoff import Backoff
from payments.database.connections import cut_after
from payments.events.facts import traceparent_of
from payments.events.notifier import LISTEN
from payments.events.store import READ_LOG, read_events
from payments.observability.logs import Repeats
from payments.observability.tracing import spans_since
from payments.projections.parking import Parked, Parking, Projection, fetch_one
from payments.tasks import finish

if TYPE_CHECKING:  # CLI commands use followers without metrics
    from payments.observability.metrics import Telemetry

BATCH_MAX = 1000  # events; larger batches save nothing and block the event loop for longer
# A batch takes milliseconds. With this timeout lists are up to date again within 5 s after the
# server stopped responding without closing the connection.
BATCH_TIMEOUT_S = 4.0
POLL_S = 1.0  # a NOTIFY is a hint that may be lost
# Waits for further events of the same row: a charge has two.
GATHER_S = 0.01
BUSY_GATHER_S = 0.1
BUSY_EVENTS = 64
RETRY_MIN_S, RETRY_MAX_S = 0.05, 2.0
# A newer process may be able to apply a stream that an older one has parked meanwhile.
RETRY_PARKED_S = 600.0
RETRY_PARKED_FOR_S = 0.1

# No row: another process is active.
TAKE_POSITION = """
SELECT position FROM followers WHERE name = %s FOR UPDATE SKIP LOCKED
"""

AWAIT_POSITION = """
SELECT position FROM followers WHERE name = %s FOR UPDATE
"""

MOVE_POSITION = """
UPDATE followers SET position = %s, updated_at = clock_timestamp() WHERE name = %s
"""


class Follower:
    """Follows the log for one projection, on its own connection."""

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
        """`applied` is called after each committed batch. Without `listens` the follower only polls
        every POLL_S: its batches are larger, and slow the appends less."""
        self._connect = connect
        self._parking = Parking(projection)
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
        """Stops after the current batch; one that takes longer than `timeout_s` is rolled back."""
        self._stopping = True
        if self._task is not None:
            await finish({self._task}, timeout_s if self._applying else 0, 1)
        await self.close()

    def wake(self) -> None:
        """This process has appended events."""
        self._woken.set()

    @property
    def name(self) -> str:
        return self._name

    async def close(self) -> None:
        if self._opened is not None:
            connection, self._opened = self._opened, None
            await connection.close()

    async def run_once(self) -> int:
        """Applies one batch; returns how many events it read, 0 if there are none or another
        process is active.
        """
        started = time.perf_counter()
        connection = await self._connection()
        with cut_after(connection, BATCH_TIMEOUT_S):
            async with connection.transaction():
                position = await fetch_one(connection, TAKE_POSITION, [self._name])
                if position is None:
                    return 0
                events = await read_events(connection, READ_LOG, [position, self._limit])
                if not events:
                    return 0
                await self._parking.apply(connection, events)
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
            return await self._parking.parked(connection)

    async def retry_parked(self, payment_ids: Collection[UUID] | None = None) -> list[Parked]:
        """Applies the missed events of parked streams (all, or these); returns those still parked.

        Waits while another process is active.
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
        """Retries parked streams at the start and every RETRY_PARKED_S, a few at a time, so that
        following does not wait."""
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
                position = await fetch_one(connection, AWAIT_POSITION, [self._name])
                await self._parking.retry(connection, payment_id, position)

    async def _run(self) -> None:
        """Follows until cancelled, with retries after any error."""
        backoff = Backoff(RETRY_MIN_S, RETRY_MAX_S)
        while not self._stopping:
            try:
                connection = await self._connection()
                await self._retry_some_parked()
                await self._run_connected(connection)
            except asyncio.CancelledError:
                raise
            except Exception as error:  # noqa: BLE001 - the follower must continue after any error
                self._complain(error)
                # The batch may have been too large for its timeout.
                self._limit = max(1, self._limit // 2)
                with suppress(Exception):
                    await self.close()
                await asyncio.sleep(backoff.next_s())
            else:
                backoff.reset()
                self._limit = min(self._limit * 2, self._batch_max)

    def _complain(self, error: Exception) -> None:
        reason = type(error).__name__
        tell = partial(self._repeats.tell, of=reason, follower=self._name, reason=reason)
        if isinstance(error, psycopg.Error | OSError):
            tell("WARNING", "the follower lost the database connection, retrying")
        else:
            tell("ERROR", "the follower failed, retrying", exception=error)

    async def _run_connected(self, connection: psycopg.AsyncConnection[Any]) -> None:
        """Applies a batch; without events it waits for `wake`, a NOTIFY or POLL_S."""
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
        """Waits until this process appends events or the server sends data, at most POLL_S."""
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
                # A server crash may undo the last batches, but together with their position, so
                # nothing is lost. Waiting for the disk would only slow the appends.
                await self._opened.execute("SET synchronous_commit = off")
                if self._listens:
                    await self._opened.execute(LISTEN)
        return self._opened


async def _was_notified(connection: psycopg.AsyncConnection[Any]) -> bool:
    """Whether a NOTIFY has arrived, also during a batch; empties psycopg's queue, which is
    unbounded. Raises OperationalError if the connection is lost."""
    return bool([None async for _ in connection.notifies(timeout=0)])
