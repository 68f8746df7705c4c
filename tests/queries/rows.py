"""Rows as the projector writes them, put in by hand: these tests are about reading."""

import uuid
from collections.abc import Sequence
from datetime import UTC, datetime
from typing import Any

import psycopg
from psycopg.sql import SQL, Identifier, Placeholder

from payments.payment.state import Status
from payments.queries.payments import PaymentView


def view(created_at: datetime, **fields: Any) -> PaymentView:
    """A payment in the list; what is not given does not matter."""
    id = fields.pop("id", None) or uuid.uuid4()
    defaults: dict[str, Any] = {
        "id": id,
        "merchant_order_id": uuid.uuid4(),
        "idempotency_key": f"key {id}",
        "amount_cents": 1500,
        "currency": "INR",
        "status": Status.SUCCESS,
        "provider_txn_id": None,
        "created_at": created_at,
        "updated_at": created_at,
        "refunded_cents": 0,
    }
    return PaymentView(**(defaults | fields))


def insert(
    connection: psycopg.Connection[Any], views: Sequence[PaymentView], client: str | None = None
) -> None:
    """Writes the payments; as that API client's, if one is given."""
    with connection.cursor() as cursor:
        cursor.executemany(
            "INSERT INTO payments VALUES (%s, %s, %s, %s, %s, %s, %s, %s, %s)",
            [
                (
                    each.id,
                    each.merchant_order_id,
                    each.idempotency_key,
                    each.amount_cents,
                    each.currency,
                    each.status.value,
                    each.provider_txn_id,
                    _utc(each.created_at),
                    _utc(each.updated_at),
                )
                for each in views
            ],
        )
        if client is not None:
            cursor.executemany(
                "INSERT INTO payment_clients VALUES (%s, %s, %s, %s, %s)",
                [
                    (each.id, client, each.status.value, each.currency, _utc(each.created_at))
                    for each in views
                ],
            )


def insert_refund(
    connection: psycopg.Connection[Any], payment: PaymentView, amount_cents: int, status: str
) -> None:
    connection.execute(
        "INSERT INTO refunds VALUES (gen_random_uuid(), %s, NULL, %s, 'INR', %s, NULL, NULL,"
        " now(), now())",
        [payment.id, amount_cents, status],
    )


def insert_fulfilment(
    connection: psycopg.Connection[Any],
    payment: PaymentView,
    state: str,
    said: str = "nothing",
    **columns: Any,
) -> None:
    """The payment's row in `fulfilments`; a column that is None or not given has its default."""
    given = {name: value for name, value in columns.items() if value is not None}
    values = {
        "payment_id": payment.id,
        "order_id": payment.merchant_order_id,
        "state": state,
        "said": said,
        **given,
    }
    statement = SQL("INSERT INTO fulfilments ({}) VALUES ({})").format(
        SQL(", ").join(map(Identifier, values)), SQL(", ").join(map(Placeholder, values))
    )
    connection.execute(statement, values)


def _utc(time: datetime) -> datetime:
    return time.astimezone(UTC).replace(tzinfo=None)
