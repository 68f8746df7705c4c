"""The group-commit appender: every append that waits is written in one transaction.

One task owns one connection. While a batch commits, the next one gathers; there is no timer. See
docs/decisions/event-store.md for why, and append_payment_events in
migrations/0020_provider_references.sql for what the database does with a batch.
"""

import asyncio
import struct
import time
from collections import deque
from collections.abc import Awaitable, Callable, Sequence
from contextlib import suppress
from typing import Any

import psycopg
from eventsourcing.persistence import StoredEvent

from payments.backoff import Backoff
from payments.database.connections import cut_after
from payments.errors import DatabaseUnavailable, TooBusy
from payments.events.store import APPEND, CAPTURED, CLAIMED, CONFLICT, append_params
from payments.events.watch import LogWatch
from payments.observability.logs import Repeats
from payments.observability.metrics import Telemetry
from payments.tasks import finish

BATCH_MAX = 256  # appends; at this size the cost per event has long stopped falling
BATCH_TIMEOUT_S = 1.5  # a round trip takes milliseconds; then the connection is given up
INTENT_TIMEOUT_S = 2.0  # how long an intent waits for the store, see design "request in < 3 s"
EXPIRY_S = 0.05  # how often it is looked whether an intent has waited too long
NEVER = float("inf")
RECONNECT_MIN_S, RECONNECT_MAX_S = 0.02, 0.5


class StreamConflict(Exception):
    """The stream moved on or went back, or already has other events at these versions.

    `first_state` holds the stored bytes of its first event, None if the stream is empty.
    """

    def __init__(self, first_state: bytes | None) -> None:
        super().__init__("another event is recorded there")
        self.first_state = first_state


class CaptureTaken(Exception):
    """Another payment of the same provider names the capture that is to be recorded."""


class ReferenceTaken(Exception):
    """Another payment of the same provider has the reference that is to be recorded."""


class Unwanted(Exception):
    """An intent that nobody wants any more, now that it was to be written."""


class AppendRefused(Exception):
    """The database refuses these events for what is in them."""


class Unpackable(Exception):
    """An event holds a value that Postgres has no form for."""


class _Append:
    """One caller's events and the future that tells it their fate."""

    __slots__ = ("after", "events", "expires_at", "future", "submitted_at", "wanted")

    def __init__(
        self,
        events: Sequence[StoredEvent],
        after: StoredEvent | None,
        expires_at: float,
        wanted: Callable[[], bool] | None,
    ) -> None:
        self.events = events
        self.after = after.state if after is not None else None
        self.submitted_at = time.monotonic()
        self.expires_at = expires_at  # by the same clock; infinite unless it is an intent
        self.wanted = wanted
        self.future: asyncio.Future[int] = asyncio.get_running_loop().create_future()

    @property
    def is_intent(self) -> bool:
        return self.expires_at < NEVER

    def given_up(self) -> bool:
        """Looked at immediately before it is sent: an intent that nobody waits for any more, since
        its request was refused, or wants any more, is dropped."""
        if self.wanted is not None and not self.wanted():
            self.resolve(Unwanted())
        return self.is_intent and self.future.done()

    def resolve(self, result: int | Exception) -> None:
        if self.future.done():  # the caller went away or stopped waiting; the events are stored
            return
        if isinstance(result, Exception):
            self.future.set_exception(result)
        else:
            self.future.set_result(result)


class Appender:
    """Appends events; an append is answered only after its commit.

    An append whose very events are stored already counts as committed. So whenever the outcome
    of a batch is unknown (the connection broke, a deadline passed) the same batch is sent again.
    """

    def __init__(
        self,
        connect: Callable[[str], Awaitable[psycopg.AsyncConnection[Any]]],
        telemetry: Telemetry,
        intent_queue_max: int,
        watch: LogWatch | None = None,
        appended: Callable[[], None] = lambda: None,
    ) -> None:
        """`watch` is told of what is acknowledged, and looks at the log with each connection;
        `appended` is called after each commit that may have stored something."""
        self._intent_queue_max = intent_queue_max
        self._waiting: deque[_Append] = deque()
        self._intents = 0  # of those that wait
        self._wake = asyncio.Event()
        self._stopping = False
        self._expiry: asyncio.TimerHandle | None = None
        self._writer = _Writer(connect, telemetry, watch, appended)
        self._task: asyncio.Task[None] | None = None
        telemetry.append_backlog.set_function(lambda: len(self._writer.batch) + len(self._waiting))
        telemetry.append_oldest_age.set_function(self.oldest_wait_s)

    def start(self) -> None:
        self._task = asyncio.create_task(self._run(), name="appender")

    async def stop(self, timeout_s: float) -> None:
        """Writes what waits, for at most `timeout_s`; then whoever still waits is told."""
        self._stopping = True
        self._wake.set()
        if self._task is not None:
            await finish({self._task}, timeout_s, 1)
        for append in self._pending():
            append.resolve(DatabaseUnavailable("The service is stopping."))
        self._waiting.clear()
        self._intents = 0
        await self._writer.disconnect()

    def append_intent(
        self,
        event: StoredEvent,
        *,
        after: StoredEvent | None = None,
        wanted: Callable[[], bool] | None = None,
    ) -> "asyncio.Future[int]":
        """Appends the event that has to be durable before a provider is asked; `after` as below.

        Its future fails with DatabaseUnavailable after INTENT_TIMEOUT_S; the event may still be
        stored later. It fails with Unwanted if it is no longer `wanted` when it is to be sent,
        which the process may have been stopped before. Raises TooBusy at once if too many intents
        wait already.
        """
        if self._intents >= self._intent_queue_max:
            raise TooBusy("Too many requests are waiting for the event store.")
        self._intents += 1
        return self._submit([event], after, time.monotonic() + INTENT_TIMEOUT_S, wanted)

    def append(
        self, events: Sequence[StoredEvent], *, after: StoredEvent | None = None
    ) -> "asyncio.Future[int]":
        """Appends consecutive events of one stream; never refused, however many wait. It is a
        conflict if the event before them is not `after`, to the byte.

        The future's result is the position of the last event. It fails with StreamConflict,
        CaptureTaken, ReferenceTaken or AppendRefused, and with nothing else while the service
        runs: through an outage it waits.
        """
        return self._submit(events, after, NEVER)

    def oldest_wait_s(self) -> float:
        """How long the append that waits longest has waited; 0 if none does.

        Metrics ask for it in a thread: it iterates over nothing that the event loop changes.
        """
        for appends in (self._writer.batch, self._waiting):
            with suppress(IndexError):
                return time.monotonic() - appends[0].submitted_at
        return 0.0

    def _submit(
        self,
        events: Sequence[StoredEvent],
        after: StoredEvent | None,
        expires_at: float,
        wanted: Callable[[], bool] | None = None,
    ) -> "asyncio.Future[int]":
        append = _Append(events, after, expires_at, wanted)
        self._waiting.append(append)
        self._wake.set()
        if self._expiry is None:
            self._expire()
        return append.future

    def _expire(self) -> None:
        """Tells the intents whose time is up; one timer for all of them."""
        now, pending = time.monotonic(), self._pending()
        for append in pending:
            if now >= append.expires_at:
                append.resolve(
                    DatabaseUnavailable("The event store does not respond. Nothing was charged.")
                )
        loop = asyncio.get_running_loop()
        self._expiry = loop.call_later(EXPIRY_S, self._expire) if pending else None

    def _pending(self) -> list[_Append]:
        """Everything that is being written or waits for it."""
        return [*self._writer.batch, *self._waiting]

    async def _run(self) -> None:
        while True:
            if not self._waiting:
                if self._stopping:
                    return
                self._wake.clear()
                await self._wake.wait()
                # Let the requests that woke in the same turn of the loop join this batch.
                await asyncio.sleep(0)
            await self._writer.write(self._gather())

    def _gather(self) -> list[_Append]:
        batch: list[_Append] = []
        while self._waiting and len(batch) < BATCH_MAX:
            append = self._waiting.popleft()
            self._intents -= append.is_intent
            if not append.given_up():
                batch.append(append)
        return batch


class _Writer:
    """One connection that writes batches, one after another."""

    def __init__(
        self,
        connect: Callable[[str], Awaitable[psycopg.AsyncConnection[Any]]],
        telemetry: Telemetry,
        watch: LogWatch | None,
        appended: Callable[[], None],
    ) -> None:
        self._connect = connect
        self._telemetry = telemetry
        self._watch = watch
        self._appended = appended
        self._cursor: psycopg.AsyncCursor[Any] | None = None
        self._repeats = Repeats()
        self.batch: list[_Append] = []

    async def write(self, batch: list[_Append]) -> None:
        """Writes the batch, however long that takes."""
        self.batch = batch
        try:
            await self._write(batch)
        except (psycopg.Error, Unpackable):
            # It was refused for its data: only the culprit shall fail.
            for append in batch:
                await self._write_alone(append)
        self.batch = []

    async def _write_alone(self, append: _Append) -> None:
        try:
            await self._write([append])
        except (psycopg.Error, Unpackable) as error:
            self._telemetry.append_failures["refused"].inc()
            reason = getattr(error, "sqlstate", None) or type(error).__name__
            message = "the event store rejected an append"
            self._repeats.tell("ERROR", message, of=reason, reason=reason)
            append.resolve(AppendRefused(f"rejected: {reason}"))

    async def _write(self, batch: list[_Append]) -> None:
        """Sends the batch until its fate is known, whatever happens to the connection.

        Raises psycopg.Error or Unpackable if it cannot be stored because of its data.
        """
        backoff = Backoff(RECONNECT_MIN_S, RECONNECT_MAX_S)
        while batch:
            try:
                if self._cursor is None:
                    await self._open()
                    batch = [append for append in batch if not append.given_up()]
                if batch:
                    await self._send(batch)
            except Exception as error:
                await self.disconnect()
                if _is_refusal(error):
                    raise
                self._telemetry.append_failures["retried"].inc()
                reason, message = (
                    type(error).__name__,
                    "the event store does not respond, retrying",
                )
                self._repeats.tell("WARNING", message, of=reason, reason=reason, appends=len(batch))
            else:
                return
            await asyncio.sleep(backoff.next_s())
            batch = [append for append in batch if not append.given_up()]

    async def _send(self, batch: list[_Append]) -> None:
        """One round trip, one transaction, one flush to disk; then every caller is told."""
        assert self._cursor is not None
        try:
            params = append_params(
                [append.events for append in batch], [append.after for append in batch]
            )
        except (ValueError, TypeError, struct.error) as error:
            raise Unpackable from error
        started = time.perf_counter()
        with cut_after(self._cursor.connection, BATCH_TIMEOUT_S):
            await self._cursor.execute(APPEND, params, prepare=True)
            rows = await self._cursor.fetchall()
        self._telemetry.append_seconds.observe(time.perf_counter() - started)
        self._telemetry.append_batch_size.observe(len(batch))
        for append, (outcome, position, first_state) in zip(batch, rows, strict=True):
            if outcome == CONFLICT:
                append.resolve(StreamConflict(first_state))
            elif outcome == CAPTURED:
                append.resolve(CaptureTaken())
            elif outcome == CLAIMED:
                append.resolve(ReferenceTaken())
            else:
                if self._watch is not None:
                    self._watch.acknowledged(position, append.events[-1])
                append.resolve(position)
        self._appended()

    async def _open(self) -> None:
        connection = await self._connect("payments appender")
        self._cursor = connection.cursor(binary=True)
        if self._watch is not None:
            # The server may be another one by now, which lacks what the last one had.
            with cut_after(connection, BATCH_TIMEOUT_S):
                await self._watch.look_through(self._cursor)

    async def disconnect(self) -> None:
        if self._cursor is not None:
            cursor, self._cursor = self._cursor, None
            await cursor.connection.close()


# SQLSTATEs of class 22 that say nothing about an event: positions and times are the function's own.
_NOT_THE_DATA = {"22003", "22008"}  # a number, a time out of range


def _is_refusal(error: Exception) -> bool:
    """Whether the data is at fault, so that sending it again is no use: SQLSTATE class 22.

    Class 23 is not: what the table's constraints look at is given out by the function under its
    lock. So a violation says that something else is wrong, and no event must be lost for it.
    """
    if isinstance(error, psycopg.Error) and error.sqlstate is not None:
        return error.sqlstate[:2] == "22" and error.sqlstate not in _NOT_THE_DATA
    return isinstance(error, Unpackable)
