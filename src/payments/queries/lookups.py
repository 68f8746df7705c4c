"""Reads single payments as of now, from their streams, not from a read model.

So a payment is readable at once after its charge, even if the projector is stopped or the stream is
parked. Lookups that arrive while a statement runs share the next one: under load one statement
reads dozens of streams, and an idle service reads at once.
"""

import asyncio
import time
from itertools import groupby
from operator import itemgetter
from typing import Any
from uuid import UUID

from payments.database.arrays import uuids
from payments.database.connections import READ_TIMEOUT_S, Database
from payments.errors import DatabaseUnavailable
from payments.event_store import fold_stored
from payments.events.store import LOAD_STREAMS, belongs_to
from payments.payment.state import Payment

BATCH_MAX = 256  # lookups in one statement: about 4 ms of event loop time for its result

_Rows = list[tuple[Any, ...]]
_Lookup = tuple[UUID, float, "asyncio.Future[_Rows]"]  # id, deadline, waiter
_stream = itemgetter(0)


class PaymentLookups:
    """Looks payments up by id. One instance per process."""

    def __init__(self, database: Database) -> None:
        self._database = database
        self._waiting: list[_Lookup] = []  # in order of arrival
        self._reading: asyncio.Task[None] | None = None

    async def find(self, payment_id: UUID, client: str | None = None) -> Payment | None:
        """The payment as of now, within READ_TIMEOUT_S; None if it has no events, or `client` may
        not read them.

        Raises DatabaseUnavailable, or PaymentUnreadable if its events cannot be decoded or folded.
        """
        # Each lookup has its own future, so that a cancelled request cancels no other.
        waiter: asyncio.Future[_Rows] = asyncio.get_running_loop().create_future()
        self._waiting.append((payment_id, time.monotonic() + READ_TIMEOUT_S, waiter))
        if self._reading is None:
            self._reading = asyncio.create_task(self._read_all(), name="lookups")
        rows = await waiter
        # Each request folds its own stream: a damaged one affects only its own lookups.
        if not rows or not belongs_to(client, payment_id, rows[0][1:]):
            return None
        return fold_stored(payment_id, (row[1:] for row in rows))

    async def _read_all(self) -> None:
        """Reads until no lookup waits; one statement at a time."""
        batch: list[_Lookup] = []
        try:
            while self._waiting:
                # Taken before the statement begins: later lookups wait for the next one, since this
                # one may not see events that were appended before they arrived.
                batch, self._waiting = self._waiting[:BATCH_MAX], self._waiting[BATCH_MAX:]
                await self._read(batch)
        finally:
            # Also after an error, so that no lookup waits for ever.
            self._reading = None
            _fail([*batch, *self._waiting], DatabaseUnavailable("The service is stopping."))
            self._waiting.clear()

    async def _read(self, batch: list[_Lookup]) -> None:
        """Reads a batch with one statement; its error concerns only this batch."""
        try:
            # The timeout is the remaining time of the oldest lookup.
            left_s = batch[0][1] - time.monotonic()
            ids = uuids([payment_id for payment_id, _, _ in batch])
            rows = await self._database.fetch(LOAD_STREAMS, [ids], timeout_s=left_s)
        except Exception as error:  # noqa: BLE001 - the waiters receive any error
            _fail(batch, error)
            return
        streams = {id_bytes: list(group) for id_bytes, group in groupby(rows, _stream)}
        for payment_id, _, waiter in batch:
            if not waiter.done():
                waiter.set_result(streams.get(payment_id.bytes, []))


def _fail(lookups: list[_Lookup], error: Exception) -> None:
    for _, _, waiter in lookups:
        if not waiter.done():
            waiter.set_exception(error)
