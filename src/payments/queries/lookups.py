"""Reading single payments as they are now: from their streams, never from a table written later.

So a payment can be read the instant its charge was answered, with the projector stopped or its
stream parked. Lookups that come while a statement is under way share the next one: under load one
statement reads dozens of streams, and a quiet service answers without waiting for company.
"""

import asyncio
import time
from itertools import groupby
from operator import itemgetter
from typing import Any
from uuid import UUID

from payments.database import READ_TIMEOUT_S, Database
from payments.errors import DatabaseUnavailable
from payments.events.arrays import uuids
from payments.events.store import LOAD_STREAMS, fold_stored
from payments.payment import Payment

BATCH_MAX = 256  # ids in one statement: about 4 ms of work for the event loop when it returns

_Rows = list[tuple[Any, ...]]
_stream = itemgetter(0)


class _Wanted:
    """One payment's rows, and everyone who waits for them."""

    __slots__ = ("deadline", "waiters")

    def __init__(self, deadline: float) -> None:
        self.deadline = deadline  # of whoever came first
        self.waiters: list[asyncio.Future[_Rows]] = []

    def tell(self, rows: _Rows) -> None:
        for waiter in self.waiters:
            if not waiter.done():
                waiter.set_result(rows)

    def fail(self, error: Exception) -> None:
        for waiter in self.waiters:
            if not waiter.done():
                waiter.set_exception(error)


class PaymentLookups:
    """Looks payments up by id. One instance per process."""

    def __init__(self, database: Database) -> None:
        self._database = database
        # In order of arrival, so the first one's time is up first.
        self._waiting: dict[UUID, _Wanted] = {}
        self._reading: asyncio.Task[None] | None = None

    async def find(self, payment_id: UUID) -> Payment | None:
        """The payment as of now; None if it has no events. Within READ_TIMEOUT_S.

        Raises DatabaseUnavailable, or PaymentUnreadable if its events cannot be decoded or folded.
        """
        wanted = self._waiting.get(payment_id)
        if wanted is None:
            wanted = self._waiting[payment_id] = _Wanted(time.monotonic() + READ_TIMEOUT_S)
        # A future of its own, so that a request which goes away takes nobody with it.
        waiter: asyncio.Future[_Rows] = asyncio.get_running_loop().create_future()
        wanted.waiters.append(waiter)
        if self._reading is None:
            self._reading = asyncio.create_task(self._read_all(), name="lookups")
        rows = await waiter
        # Folded by each request for itself: a damaged stream is its own lookups' trouble.
        return fold_stored(payment_id, (row[1:] for row in rows)) if rows else None

    async def _read_all(self) -> None:
        """Reads until nobody waits; one statement at a time."""
        batch: dict[UUID, _Wanted] = {}
        try:
            while self._waiting:
                # Taken before the statement begins: whoever comes from here on waits for the next
                # one, since this one may not see what was appended before they asked.
                batch = self._take()
                await self._read(batch)
        finally:
            # Whatever way this ended, nobody waits for ever.
            self._reading = None
            stopped = DatabaseUnavailable("The service is stopping.")
            for wanted in (*batch.values(), *self._waiting.values()):
                wanted.fail(stopped)
            self._waiting.clear()

    def _take(self) -> dict[UUID, _Wanted]:
        if len(self._waiting) <= BATCH_MAX:
            batch, self._waiting = self._waiting, {}
            return batch
        return {id: self._waiting.pop(id) for id in list(self._waiting)[:BATCH_MAX]}

    async def _read(self, batch: dict[UUID, _Wanted]) -> None:
        """One statement for all of them; if it fails, it fails for them alone."""
        try:
            rows = await self._fetch(batch)
        except Exception as error:  # noqa: BLE001 - whoever waits must hear of it, whatever it is
            for wanted in batch.values():
                wanted.fail(error)
            return
        by_bytes = {payment_id.bytes: wanted for payment_id, wanted in batch.items()}
        for id_bytes, group in groupby(rows, _stream):
            by_bytes.pop(id_bytes).tell(list(group))
        for wanted in by_bytes.values():
            wanted.tell([])

    async def _fetch(self, batch: dict[UUID, _Wanted]) -> _Rows:
        # A statement that comes late has what is left of the time of its oldest lookup.
        left_s = next(iter(batch.values())).deadline - time.monotonic()
        if left_s <= 0:
            raise DatabaseUnavailable("The database does not answer.")
        return await self._database.fetch(LOAD_STREAMS, [uuids(list(batch))], timeout_s=left_s)
