"""Asks for the status of suspects' orders until it is known.

Every process with background work claims due rows; each payment is checked by one process at a
time. Without ORDER_STATUS_URL there are no checks: suspects are removed when their payment is
refunded, or after the retention time.
"""

import asyncio
import time
from collections.abc import Awaitable, Callable
from contextlib import suppress
from typing import Literal
from uuid import UUID

from loguru import logger

from payments.database.connections import Database
from payments.errors import DatabaseUnavailable
from payments.fulfilment import table
from payments.fulfilment.status import TIMEOUT_S, OrderStatus
from payments.fulfilment.table import ClaimedFulfilment
from payments.observability.logs import Repeats
from payments.tasks import end, finish

CONCURRENCY_MAX = 16  # concurrent status requests of one process
# The extra time is for a connection from the pool and for the statements after the response.
LEASE_S = TIMEOUT_S + 10.0
POLL_S = 1.0  # for suspects that other processes found, and for rows that became due
SWEEP_EVERY_S, SWEEP_ROWS = 5.0, 1000
PRUNE_EVERY_S, PRUNE_ROWS = 60.0, 1000

GiveBack = Callable[[UUID], Awaitable[bool]]


class Checking:
    """One per process. `status` is None without ORDER_STATUS_URL.

    `give_back` refunds a payment wholly, and returns whether it did. It is called only after an
    unbroken series of readings, over at least CONFIRMED_AFTER_S and up to now, that show the order
    as failed; never for an order that is paid twice.
    """

    def __init__(
        self,
        database: Database,
        status: OrderStatus | None,
        retention_days: int,
        *,
        give_back: GiveBack | None = None,
    ) -> None:
        self._database = database
        self._status = status
        self._retention_days = retention_days
        self._give_back = give_back
        self._tasks: set[asyncio.Task[None]] = set()
        self._loop: asyncio.Task[None] | None = None
        self._wake = asyncio.Event()
        self._repeats = Repeats()
        self._sweep_at = self._prune_at = 0.0
        self._swept = table.FIRST

    async def start(self) -> None:
        if self._status is not None:
            await self._status.open()
        self._loop = asyncio.create_task(self._run(), name="fulfilments")

    def wake(self) -> None:
        """Suspects may be due."""
        self._wake.set()

    async def stop(self, timeout_s: float) -> None:
        """Claims no more, and waits up to `timeout_s` for running checks. Those that are cancelled
        are repeated once their lease expires."""
        if self._loop is not None:
            await end({self._loop}, 1)
        await finish(self._tasks, timeout_s)
        if self._status is not None:
            await self._status.close()

    async def run_once(self) -> int:
        """Checks due payments; returns how many. To be used without `start`."""
        tasks = await self._begin_due()
        await asyncio.gather(*tasks)
        return len(tasks)

    async def _run(self) -> None:
        while True:
            self._wake.clear()
            try:
                await self._begin_due()
                await self._tidy()
            except Exception as error:  # noqa: BLE001 - a bug must not stop other checks
                message = "suspect payments cannot be claimed, retrying"
                known = isinstance(error, DatabaseUnavailable)
                self._repeats.tell(
                    "WARNING" if known else "ERROR",
                    message,
                    of=type(error),
                    exception=None if known else error,
                )
            with suppress(TimeoutError):
                async with asyncio.timeout(POLL_S):
                    await self._wake.wait()

    async def _begin_due(self) -> list[asyncio.Task[None]]:
        free = CONCURRENCY_MAX - len(self._tasks)
        if self._status is None or free <= 0:
            return []
        claims = await table.claim(self._database, free, LEASE_S)
        tasks = [
            asyncio.create_task(self._check(each, self._status), name="fulfilment")
            for each in claims
        ]
        for task in tasks:
            self._tasks.add(task)
            task.add_done_callback(self._checked)
        return tasks

    def _checked(self, task: asyncio.Task[None]) -> None:
        self._tasks.discard(task)
        if len(self._tasks) == CONCURRENCY_MAX - 1:  # the limit was reached
            self._wake.set()

    async def _check(self, claimed: ClaimedFulfilment, status: OrderStatus) -> None:
        """Reads the order's status and judges it. A failed check is repeated once its lease
        expires."""
        try:
            reading = await status.ask(claimed.order_id)
            if reading.verdict == "unknown":
                known = reading.order_status, reading.problem
                await table.record_unknown(self._database, claimed, *known)
            else:
                await self._judge(claimed, reading.verdict, reading.order_status or "")
        except DatabaseUnavailable:
            message = "the result of an order status query cannot be recorded"
            self._repeats.tell("WARNING", message, payment_id=claimed.payment_id)
        except Exception as error:  # noqa: BLE001 - a bug must not stop other checks
            message = "an order status query failed"
            self._repeats.tell(*("ERROR", message), exception=error, payment_id=claimed.payment_id)

    async def _judge(
        self, claimed: ClaimedFulfilment, verdict: Literal["confirmed", "failed"], order_status: str
    ) -> None:
        """Judges all payments of the order. Others to which the reading applies may have no row,
        since their responses said that the order was confirmed."""
        database = self._database
        captured = await table.captured_for(database, claimed.order_id, claimed.payment_id)
        if claimed.payment_id in captured.refunded:
            await table.remove(database, claimed)
            return
        if claimed.payment_id not in captured.standing:  # the read models are being rebuilt
            await table.record_unknown(database, claimed, None, "payment is not known")
            return
        for_nothing = captured.paid_for_nothing(verdict)
        if beside := [each for each in for_nothing if each != claimed.payment_id]:
            await table.add_beside(database, claimed, beside)
        if claimed.payment_id not in for_nothing:
            await table.remove(database, claimed)
        elif verdict == "confirmed":
            if await table.record_paid_twice(database, claimed, order_status):
                self._tell(claimed, "paid_twice", "an order is paid twice", order_status)
        else:
            await self._note_failed(claimed, order_status)

    async def _note_failed(self, claimed: ClaimedFulfilment, order_status: str) -> None:
        may_give_back = self._give_back is not None
        is_over = await table.record_failed(
            self._database, claimed, order_status, may_give_back=may_give_back
        )
        if is_over is None:
            return
        self._tell(claimed, "unfulfilled", "an order is paid, but failed", order_status)
        if is_over and self._give_back is not None:
            try:
                is_given_back = await self._give_back(claimed.payment_id)
            except BaseException:
                with suppress(DatabaseUnavailable):
                    await table.release(self._database, claimed)
                raise
            note = table.note_given_back if is_given_back else table.release
            await note(self._database, claimed)

    def _tell(
        self, claimed: ClaimedFulfilment, state: str, message: str, order_status: str
    ) -> None:
        """Logs the state once, when it is found."""
        if claimed.state != state:
            logger.bind(
                payment_id=claimed.payment_id, order_id=claimed.order_id, order_status=order_status
            ).warning(f"{message}: `payments callbacks list --unfulfilled`")

    async def _tidy(self) -> None:
        """Sweeps and prunes, few rows at a time."""
        now = time.monotonic()
        if now >= self._sweep_at:
            self._swept = await table.sweep(self._database, self._swept, SWEEP_ROWS)
            self._sweep_at = now + SWEEP_EVERY_S
        if now >= self._prune_at:
            pruned = await table.prune(self._database, self._retention_days, PRUNE_ROWS)
            self._prune_at = now + (0 if pruned >= PRUNE_ROWS else PRUNE_EVERY_S)
