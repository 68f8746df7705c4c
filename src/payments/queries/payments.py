"""Reads payments: one as of now from its events, a list from the read model."""

from collections.abc import Awaitable, Callable, Mapping, Sequence
from datetime import UTC, datetime
from typing import Annotated, Any, TypeVar
from uuid import UUID

import msgspec
from msgspec import UNSET, UnsetType

from payments import legacy_ids
from payments.database.connections import Database
from payments.errors import DatabaseUnavailable, PaymentNotFound
from payments.event_store import fold_stored
from payments.events.store import LOAD_STREAM_AS_OF, belongs_to
from payments.money import amount_text
from payments.payment.state import Payment, Status
from payments.queries.cursor import ListPlace, read_cursor, write_cursor
from payments.queries.lookups import PaymentLookups

T = TypeVar("T")

LIMIT_DEFAULT, LIMIT_MAX = 50, 200
OF_ORDER_MAX = 5
# Naming an order's payments is an optional part of a 404: with the lookup before it the request
# stays under 3 s.
COURTESY_TIMEOUT_S = 0.4

Moment = int | datetime  # a position of the log, or a time

# A page of all payments, newest first, and the projector's position; one row without a payment if
# none matches. `limit` is the page size plus one. Always planned for the values of this page, so
# that unused filters are not part of the plan.
PAGE = """
SELECT f.position, p.id, p.merchant_order_id, p.idempotency_key, p.amount_cents, p.currency,
       p.status, p.provider_txn_id,
       p.created_at AT TIME ZONE 'UTC', p.updated_at AT TIME ZONE 'UTC',
       (SELECT coalesce(sum(r.amount_cents), 0) FROM refunds r
         WHERE r.payment_id = p.id AND r.status = 'SUCCESS')
  FROM followers f
  LEFT JOIN LATERAL (
       SELECT * FROM payments
        WHERE (%(merchant_order_id)s::uuid IS NULL OR merchant_order_id = %(merchant_order_id)s)
          AND (%(status)s::text IS NULL OR status = %(status)s)
          AND (%(currency)s::text IS NULL OR currency = %(currency)s)
          AND (%(created_from)s::timestamp IS NULL OR created_at >= %(created_from)s)
          AND (%(created_until)s::timestamp IS NULL OR created_at < %(created_until)s)
          AND (%(before)s::timestamp IS NULL
               OR (created_at, id) < (%(before)s, %(before_id)s::uuid))
        ORDER BY created_at DESC, id DESC LIMIT %(limit)s) AS p ON true
 WHERE f.name = 'payments'
 ORDER BY p.created_at DESC, p.id DESC
"""

# The same for one API client. payment_clients has the columns of the filters, as payments has them,
# and an index for each filter and for status and currency together: a page reads only the rows that
# it lists. Of an order all clients' payments are read, since they are few. The worst case is a
# table that was never vacuumed, where nearly all payments match the filter but none of the
# client's: all of the client's rows are read, 500,000 in 0.12 s.
PAGE_OF_CLIENT = """
SELECT f.position, p.id, p.merchant_order_id, p.idempotency_key, p.amount_cents, p.currency,
       p.status, p.provider_txn_id,
       p.created_at AT TIME ZONE 'UTC', p.updated_at AT TIME ZONE 'UTC',
       (SELECT coalesce(sum(r.amount_cents), 0) FROM refunds r
         WHERE r.payment_id = p.id AND r.status = 'SUCCESS')
  FROM followers f
  LEFT JOIN LATERAL (
       SELECT p.* FROM payment_clients c JOIN payments p ON p.id = c.payment_id
        WHERE c.client = %(client)s
          AND (%(merchant_order_id)s::uuid IS NULL OR p.merchant_order_id = %(merchant_order_id)s)
          AND (%(status)s::text IS NULL OR c.status = %(status)s)
          AND (%(currency)s::text IS NULL OR c.currency = %(currency)s)
          AND (%(created_from)s::timestamp IS NULL OR c.created_at >= %(created_from)s)
          AND (%(created_until)s::timestamp IS NULL OR c.created_at < %(created_until)s)
          AND (%(before)s::timestamp IS NULL
               OR (c.created_at, c.payment_id) < (%(before)s, %(before_id)s::uuid))
        ORDER BY c.created_at DESC, c.payment_id DESC LIMIT %(limit)s) AS p ON true
 WHERE f.name = 'payments'
 ORDER BY p.created_at DESC, p.id DESC
"""

# A page of the orders that have a payment with an outcome in a period, oldest first: each once, at
# its first such payment.
ORDERS = """
SELECT p.created_at AT TIME ZONE 'UTC', p.id, p.merchant_order_id
  FROM payments p
 WHERE p.created_at >= %(since)s AND p.created_at < %(until)s
   AND (p.created_at, p.id) > (%(after)s, %(after_id)s::uuid)
   AND p.status <> 'PENDING' AND p.merchant_order_id IS NOT NULL
   AND NOT EXISTS (SELECT FROM payments e
                    WHERE e.merchant_order_id = p.merchant_order_id AND e.status <> 'PENDING'
                      AND e.created_at >= %(since)s
                      AND (e.created_at, e.id) < (p.created_at, p.id))
 ORDER BY p.created_at, p.id LIMIT %(limit)s
"""

# Whether no payment of an order is captured or may still be.
NO_MONEY = """
SELECT coalesce(bool_and(status IN ('FAILED', 'REFUNDED')), false)
  FROM payments WHERE merchant_order_id = %(order_id)s
"""

# The newest payments of an order; with `client` only that API client's.
OF_ORDER = """
SELECT id, status, amount_cents, currency FROM payments p
 WHERE merchant_order_id = %(merchant_order_id)s
   AND (%(client)s::text IS NULL
        OR EXISTS (SELECT FROM payment_clients c
                    WHERE c.payment_id = p.id AND c.client = %(client)s))
 ORDER BY created_at DESC, id DESC LIMIT %(limit)s
"""


STREAM_EXISTS = """
SELECT 1 FROM payment_event_log WHERE payment_id = %s LIMIT 1
"""


class PaymentView(msgspec.Struct, frozen=True, kw_only=True):
    """A payment: the documented columns, the total of its refunds, and whether its customer has to
    act."""

    id: UUID
    merchant_order_id: UUID
    idempotency_key: str
    amount_cents: int
    currency: str
    status: Status
    provider_txn_id: str | None
    created_at: Annotated[datetime, msgspec.Meta(tz=True)]
    updated_at: Annotated[datetime, msgspec.Meta(tz=True)]
    refunded_cents: int
    awaits_action: Annotated[
        bool | UnsetType,
        msgspec.Meta(
            description="true while the provider captures nothing before the customer has acted; "
            "left out otherwise, and in lists"
        ),
    ] = UNSET


class PaymentFilter(msgspec.Struct, frozen=True, kw_only=True):
    """Filters of the list; `created_from` is inclusive, `created_until` exclusive."""

    merchant_order_id: UUID | None = None
    status: Status | None = None
    currency: str | None = None
    created_from: datetime | None = None
    created_until: datetime | None = None


class PaymentPage(msgspec.Struct, frozen=True):
    """Payments, newest first. `next_cursor` requests the next page; null on the last page.

    `position` is the last event of the log that the list includes.
    """

    payments: list[PaymentView]
    next_cursor: str | None
    position: int


async def get_payment(
    database: Database, lookups: PaymentLookups, payment_id: UUID, client: str | None
) -> PaymentView:
    """The payment as of now, independent of the projector's lag.

    `client` restricts the result to that API client's payments; None reads all. Raises
    PaymentNotFound, PaymentUnreadable or DatabaseUnavailable.
    """

    async def read(payment_id: UUID) -> PaymentView | None:
        payment = await lookups.find(payment_id, client)
        return None if payment is None else view_of(payment)

    return await found(database, payment_id, client, read)


def view_of(payment: Payment) -> PaymentView:
    return PaymentView(
        id=payment.id,
        merchant_order_id=payment.merchant_order_id,
        idempotency_key=payment.idempotency_key,
        amount_cents=payment.amount_cents,
        currency=payment.currency,
        status=payment.status,
        provider_txn_id=payment.provider_txn_id,
        created_at=payment.created_at,
        updated_at=payment.updated_at,
        refunded_cents=payment.refunded_cents,
        awaits_action=payment.awaits_action or UNSET,
    )


async def list_payments(
    database: Database,
    wanted: PaymentFilter,
    client: str | None,
    limit: int = LIMIT_DEFAULT,
    cursor: str | None = None,
) -> PaymentPage:
    """The matching payments of the read model, newest first.

    A payment that was written before the first page was read is on exactly one page, since a page
    continues after a payment, not at an offset. `client` is as for get_payment. Raises
    InvalidRequest for a cursor that is not of an earlier page.
    """
    before = read_cursor(cursor) if cursor is not None else None
    params: Mapping[str, Any] = {
        "client": client,
        "merchant_order_id": wanted.merchant_order_id,
        "status": wanted.status and wanted.status.value,
        "currency": wanted.currency,
        "created_from": _column_time(wanted.created_from),
        "created_until": _column_time(wanted.created_until),
        "before": before and _column_time(before.created_at),
        "before_id": before and before.id,
        "limit": limit + 1,
    }
    query = PAGE if client is None else PAGE_OF_CLIENT
    rows = await database.fetch(query, params, prepare=False)
    payments = [_view(row[1:]) for row in rows if row[1] is not None]
    more = len(payments) > limit
    last = payments[limit - 1] if more else None
    return PaymentPage(
        payments[:limit],
        write_cursor(ListPlace(last.created_at, last.id)) if last else None,
        rows[0][0],
    )


LISTED = PaymentView.__struct_fields__[:-1]


def _view(row: Sequence[Any]) -> PaymentView:
    """The columns are selected in the order of the fields."""
    return PaymentView(**dict(zip(LISTED, row, strict=True)))


async def payments_of_order(
    database: Database, order_id: UUID, client: str | None, limit: int
) -> list[tuple[UUID, str, int, str]]:
    """(id, status, amount_cents, currency) of the order's payments, newest first."""
    params = {"merchant_order_id": order_id, "client": client, "limit": limit}
    rows = await database.fetch(OF_ORDER, params, timeout_s=COURTESY_TIMEOUT_S, prepare=False)
    return [(id, status, amount, currency) for id, status, amount, currency in rows]


async def found(
    database: Database,
    payment_id: UUID,
    client: str | None,
    read: Callable[[UUID], Awaitable[T | None]],
) -> T:
    """The result of `read` for this id, or for the imported payment that had this id in the earlier
    service. Raises PaymentNotFound."""
    result = await read(payment_id)
    if result is None and (new_id := await legacy_ids.find(database, payment_id)) is not None:
        result = await read(new_id)
    if result is None:
        raise await not_found(database, payment_id, client)
    return result


async def orders_with_outcomes(
    database: Database, since: datetime, until: datetime, after: ListPlace | None, limit: int
) -> list[tuple[ListPlace, UUID]]:
    """Orders with a payment that has an outcome and was begun from `since` until before `until`: at
    most `limit`, after the place `after`, each with its place for the next page."""
    params = {
        "since": _column_time(since),
        "until": _column_time(until),
        "after": _column_time(after.created_at if after else since),
        "after_id": after.id if after else UUID(int=0),
        "limit": limit,
    }
    rows = await database.fetch(ORDERS, params, prepare=False)
    return [(ListPlace(created_at, id), order_id) for created_at, id, order_id in rows]


async def has_no_money(database: Database, order_id: UUID) -> bool:
    """Whether all payments of the order failed or were refunded, in the read model."""
    ((none,),) = await database.fetch(NO_MONEY, {"order_id": order_id})
    return bool(none)


async def not_found(database: Database, payment_id: UUID, client: str | None) -> PaymentNotFound:
    """The error for an id that no payment has. If it is an order's id, the error says so."""
    detail = f"Payment {payment_id} does not exist."
    try:
        of_order = await payments_of_order(database, payment_id, client, OF_ORDER_MAX + 1)
    except DatabaseUnavailable:
        of_order = []
    if of_order:
        listed = ", ".join(
            f"{id} ({status}, {amount_text(amount, currency)})"
            for id, status, amount, currency in of_order[:OF_ORDER_MAX]
        )
        older = " and older ones" if len(of_order) > OF_ORDER_MAX else ""
        detail += (
            f" It is the id of an order with the payments {listed}{older}: use one of these ids."
        )
    return PaymentNotFound(detail)


def _column_time(time: datetime | None) -> datetime | None:
    """The time as in the documented columns: UTC without a time zone."""
    return None if time is None else time.astimezone(UTC).replace(tzinfo=None)


async def get_payment_as_of(
    database: Database, payment_id: UUID, moment: Moment, client: str | None
) -> PaymentView:
    """The payment as of the event at this position, or as of the events recorded by this time.

    A future moment means now. `client` and errors are those of get_payment; the PaymentNotFound of
    a payment that began later says so.
    """

    async def read(payment_id: UUID) -> PaymentView | None:
        params = {
            "payment_id": payment_id,
            "position": moment if isinstance(moment, int) else None,
            "time": moment if isinstance(moment, datetime) else None,
        }
        rows = await database.fetch(LOAD_STREAM_AS_OF, params)
        if rows and belongs_to(client, payment_id, rows[0]):
            return view_of(fold_stored(payment_id, rows))
        if not rows and client is None and await database.fetch(STREAM_EXISTS, [payment_id]):
            raise PaymentNotFound(f"Payment {payment_id} did not exist yet {_moment_text(moment)}.")
        return None

    return await found(database, payment_id, client, read)


def _moment_text(moment: Moment) -> str:
    if isinstance(moment, int):
        return f"at position {moment}"
    return f"at {moment.isoformat().replace('+00:00', 'Z')}"
