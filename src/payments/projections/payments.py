"""The payments read model: writes the changes of a batch of events.

Tables payments, refunds, payment_clients and unsettled_payments; one statement each per batch.
"""

import asyncio
from collections.abc import Callable, Iterable, Mapping, Sequence
from operator import attrgetter
from typing import Any
from uuid import UUID

import psycopg

from payments import sendings, unsettled
from payments.clients import DEFAULT_CLIENT
from payments.database.arrays import (
    BinaryArray,
    doubles,
    integers,
    texts,
    timestamps,
    utc_times,
    uuids,
    words,
)
from payments.events.store import LOAD_STREAMS, LogEntry, fact_at, fact_of
from payments.payment.state import DECLINED, Payment, Refund, Status, evolve

Row = tuple[Any, ...]
Array = Callable[[Any], BinaryArray]

# Each table's columns, in the order of its rows, and the array type of each.
PAYMENT_COLUMNS: dict[str, Array] = {
    "id": uuids,
    "merchant_order_id": uuids,
    "idempotency_key": texts,
    "amount_cents": integers,
    "currency": texts,
    "status": texts,
    "provider_txn_id": texts,
    "created_at": utc_times,
    "updated_at": utc_times,
}
REFUND_COLUMNS: dict[str, Array] = {
    "id": uuids,
    "payment_id": uuids,
    "idempotency_key": texts,
    "amount_cents": integers,
    "currency": texts,
    "status": texts,
    "provider_refund_id": texts,
    "decline_code": texts,
    "created_at": utc_times,
    "updated_at": utc_times,
}
CLIENT_COLUMNS: dict[str, Array] = {
    "payment_id": uuids,
    "client": texts,
    "status": texts,
    "currency": texts,
    "created_at": utc_times,
}

payment_row = attrgetter(*PAYMENT_COLUMNS)
client_row = attrgetter("id", *list(CLIENT_COLUMNS)[1:])

YIELD_EVERY = 200  # events; then the event loop can serve requests

UPSERT_PAYMENTS = """
INSERT INTO payments (id, merchant_order_id, idempotency_key, amount_cents, currency, status,
                      provider_txn_id, created_at, updated_at)
SELECT * FROM unnest(%b, %b, %b, %b, %b, %b, %b, %b, %b)
    ON CONFLICT (id) DO UPDATE
   SET merchant_order_id = excluded.merchant_order_id,
       idempotency_key = excluded.idempotency_key,
       amount_cents = excluded.amount_cents,
       currency = excluded.currency,
       status = excluded.status,
       provider_txn_id = excluded.provider_txn_id,
       created_at = excluded.created_at,
       updated_at = excluded.updated_at
"""

UPSERT_REFUNDS = """
INSERT INTO refunds (id, payment_id, idempotency_key, amount_cents, currency, status,
                     provider_refund_id, decline_code, created_at, updated_at)
SELECT * FROM unnest(%b, %b, %b, %b, %b, %b, %b, %b, %b, %b)
    ON CONFLICT (id) DO UPDATE
   SET payment_id = excluded.payment_id,
       idempotency_key = excluded.idempotency_key,
       amount_cents = excluded.amount_cents,
       currency = excluded.currency,
       status = excluded.status,
       provider_refund_id = excluded.provider_refund_id,
       decline_code = excluded.decline_code,
       created_at = excluded.created_at,
       updated_at = excluded.updated_at
"""

UPSERT_CLIENTS = """
INSERT INTO payment_clients (payment_id, client, status, currency, created_at)
SELECT * FROM unnest(%b, %b, %b, %b, %b)
    ON CONFLICT (payment_id) DO UPDATE
   SET client = excluded.client,
       status = excluded.status,
       currency = excluded.currency,
       created_at = excluded.created_at
"""


class PaymentsProjection:
    """`settle_after_s`: how long an open payment is left to the request that opened it;
    `declines_may_turn_s`: by the name of each provider that is configured here."""

    name = "payments"

    def __init__(
        self, settle_after_s: float, declines_may_turn_s: Mapping[str, float] | None = None
    ) -> None:
        self._settle_after_s = settle_after_s
        self._declines_may_turn_s = declines_may_turn_s

    async def apply(
        self, connection: psycopg.AsyncConnection[Any], events: Sequence[LogEntry]
    ) -> None:
        """Raises UndecodableEvent or UnexpectedEvent for the whole batch."""
        async with connection.cursor(binary=True) as cursor:
            earlier = await _earlier(cursor, events)
            payments = await _fold(events, earlier)
            await cursor.execute(
                UPSERT_PAYMENTS.encode(), _params(PAYMENT_COLUMNS, map(payment_row, payments))
            )
            if refunds := _changed_refunds(payments, earlier):
                await cursor.execute(UPSERT_REFUNDS.encode(), _params(REFUND_COLUMNS, refunds))
            if of_clients := [p for p in payments if p.client != DEFAULT_CLIENT]:
                await cursor.execute(
                    UPSERT_CLIENTS.encode(), _params(CLIENT_COLUMNS, map(client_row, of_clients))
                )
            await self._list_unsettled(cursor, payments, earlier)

    async def _list_unsettled(
        self,
        cursor: psycopg.AsyncCursor[Any],
        payments: list[Payment],
        earlier: dict[UUID, Payment],
    ) -> None:
        settled, open_ids, kinds, since, due_in_s = [], [], [], [], []
        gateways, references = [], []
        for payment in payments:
            reason = payment.unsettled
            turning_s = self._may_turn_s(payment.gateway)
            turning = turning_s > 0 and payment.declined and payment.late_capture is None
            if reason is not None or turning:
                open_ids.append(payment.id)
                kinds.append(DECLINED if reason is None else reason.kind)
                since.append(payment.updated_at if reason is None else reason.since)
                wait_s = turning_s if reason is None else self._settle_after_s
                due_in_s.append(wait_s)
                gateways.append(payment.gateway)
                references.append(payment.provider_reference)
            elif payment.id in earlier:  # one that began in this batch was never listed
                settled.append(payment.id)
        if open_ids:
            params = (
                *(uuids(open_ids), words(kinds), timestamps(since), doubles(due_in_s)),
                *(words(gateways), texts(references)),
            )
            await cursor.execute(unsettled.ADD.encode(), params)
        if settled:
            await cursor.execute(unsettled.REMOVE.encode(), [uuids(settled)])
        if ended := _ended_refunds(payments):
            await cursor.execute(sendings.REMOVE.encode(), [uuids(ended)])

    def _may_turn_s(self, gateway: str) -> float:
        """Of a provider that is not configured here, a process that has it knows."""
        if self._declines_may_turn_s is None:
            return 0.0
        return self._declines_may_turn_s.get(gateway, unsettled.ELSEWHERE_S)


async def _earlier(
    cursor: psycopg.AsyncCursor[Any], events: Sequence[LogEntry]
) -> dict[UUID, Payment]:
    """The payments of the batch that began before it, as of then."""
    first_versions: dict[UUID, int] = {}
    for event in events:
        first_versions.setdefault(event.payment_id, event.version)
    continued = {stream.bytes: stream for stream, v in first_versions.items() if v > 1}
    if not continued:
        return {}
    await cursor.execute(LOAD_STREAMS.encode(), [uuids(list(continued.values()))])
    earlier: dict[UUID, Payment] = {}
    for number, (id_bytes, version, topic, state) in enumerate(await cursor.fetchall(), 1):
        if number % YIELD_EVERY == 0:
            await asyncio.sleep(0)
        stream = continued[id_bytes]
        if version < first_versions[stream]:
            fact = fact_at(stream, version, topic, state)
            earlier[stream] = evolve(earlier.get(stream), fact)
    return earlier


async def _fold(events: Sequence[LogEntry], earlier: dict[UUID, Payment]) -> list[Payment]:
    """Each payment of the batch, as of its end."""
    payments: dict[UUID, Payment] = {}
    for number, event in enumerate(events):
        if number % YIELD_EVERY == YIELD_EVERY - 1:
            await asyncio.sleep(0)
        stream = event.payment_id
        before = payments.get(stream) or earlier.get(stream)
        payments[stream] = evolve(before, fact_of(event))
    return list(payments.values())


def _changed_refunds(payments: Iterable[Payment], earlier: dict[UUID, Payment]) -> list[Row]:
    """The rows of refunds that this batch began or changed."""
    changed: list[Row] = []
    for payment in payments:
        if payment.refunds:
            before = earlier[payment.id].refunds if payment.id in earlier else ()
            changed += [
                refund_row(payment, refund) for refund in payment.refunds if refund not in before
            ]
    return changed


def _ended_refunds(payments: Iterable[Payment]) -> list[UUID]:
    """Refunds with an outcome, and late captures that were returned."""
    ended: list[UUID] = []
    for payment in payments:
        ended += (each.id for each in payment.refunds if each.status is not Status.PENDING)
        late = payment.late_capture
        if late is not None and late.provider_refund_id is not None:
            ended.append(late.refund_id)
    return ended


def refund_row(payment: Payment, refund: Refund) -> Row:
    return (
        refund.id,
        payment.id,
        refund.idempotency_key,
        refund.amount_cents,
        payment.currency,
        refund.status,
        refund.provider_refund_id,
        refund.decline_code,
        refund.created_at,
        refund.updated_at,
    )


def _params(columns: Mapping[str, Array], rows: Iterable[Row]) -> list[Any]:
    """One array per column; needs at least one row."""
    transposed = zip(*rows, strict=True)
    return [array(values) for array, values in zip(columns.values(), transposed, strict=True)]
