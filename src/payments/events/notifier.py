"""Tells followers that there are new events: those of this process at once, all others by NOTIFY.

NOTIFY is a hint, and followers poll as well. So it has a connection and a transaction of its own,
begun after the commit that was acknowledged: while a transaction that notifies commits it holds a
lock of the whole server, and it fails while the server's queue is full. Neither is to befall an
append. Why: docs/decisions/event-store.md.
"""

import asyncio
from collections.abc import Awaitable, Callable
from typing import TYPE_CHECKING, Any

import psycopg
from loguru import logger

from payments.backoff import Backoff
from payments.database.connections import cut_after
from payments.tasks import end

if TYPE_CHECKING:  # commands read the log by way of this module, and measure nothing
    from payments.observability.metrics import Telemetry

NOTIFY = "NOTIFY payment_events"
LISTEN = "LISTEN payment_events"

# What is appended within this time after a NOTIFY is told by the next one: under load that saves
# two commits for each charge, and those who listen gather for as long anyway.
PAUSE_S = 0.01
TIMEOUT_S = 1.5
RECONNECT_MIN_S, RECONNECT_MAX_S = 0.1, 5.0

Connect = Callable[[str], Awaitable[psycopg.AsyncConnection[Any]]]


class Notifier:
    """One per process that appends; `wake` is told of each batch before anybody else."""

    def __init__(
        self, connect: Connect, telemetry: "Telemetry", wake: Callable[[], None] = lambda: None
    ) -> None:
        self._connect = connect
        self._sent = telemetry.notifications
        self._wake = wake
        self._appended = asyncio.Event()
        self._connection: psycopg.AsyncConnection[Any] | None = None
        self._task: asyncio.Task[None] | None = None
        self._works = True  # whether the last NOTIFY was sent

    def start(self) -> None:
        self._task = asyncio.create_task(self._run(), name="notifier")

    async def stop(self) -> None:
        """Sends what is still to be told; whoever does not hear of it polls."""
        if self._task is not None:
            await end({self._task}, 1)
        if self._appended.is_set():
            await self._notify()
        await self._disconnect()

    def appended(self) -> None:
        """Events were committed."""
        self._wake()
        self._appended.set()

    async def _run(self) -> None:
        backoff = Backoff(RECONNECT_MIN_S, RECONNECT_MAX_S)
        while True:
            await self._appended.wait()
            if await self._notify():
                backoff.reset()
                await asyncio.sleep(PAUSE_S)
            else:
                await asyncio.sleep(backoff.next_s())

    async def _notify(self) -> bool:
        """Whether it could be sent. If not, it is not sent again: nobody waits for it."""
        self._appended.clear()
        try:
            connection = self._connection or await self._open()
            with cut_after(connection, TIMEOUT_S):
                await connection.execute(NOTIFY)
        except (psycopg.Error, OSError) as error:
            await self._disconnect()
            self._sent["failed"].inc()
            if self._works:
                reason = getattr(error, "sqlstate", None) or type(error).__name__
                logger.bind(reason=reason).warning(
                    "other processes are not notified of new events; they poll"
                )
            self._works = False
        else:
            self._sent["sent"].inc()
            self._works = True
        return self._works

    async def _open(self) -> psycopg.AsyncConnection[Any]:
        self._connection = await self._connect("payments notifier")
        with cut_after(self._connection, TIMEOUT_S):
            # There is nothing that a crash could lose, so it waits for no disk and no standby.
            await self._connection.execute("SET synchronous_commit = off")
        return self._connection

    async def _disconnect(self) -> None:
        if self._connection is not None:
            connection, self._connection = self._connection, None
            await connection.close()
