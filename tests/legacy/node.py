"""The database of the Node service, as its own documentation describes it."""

import uuid
from typing import Any

import psycopg

TABLE = """
CREATE TABLE payments (
    id UUID PRIMARY KEY DEFAULT gen_random_uuid(),
    merchant_order_id UUID NULL,
    idempotency_key TEXT UNIQUE NULL,
    amount_cents INT DEFAULT 0,
    currency TEXT DEFAULT 'INR' NULL,
    status TEXT CHECK(status IN ('PENDING','SUCCESS','FAILED','REFUNDED')) NULL,
    provider_txn_id TEXT NULL,
    created_at TIMESTAMP DEFAULT now() NULL,
    updated_at TIMESTAMP DEFAULT now() NULL
)
"""

# Without what keeps its rows sound.
LOOSE_TABLE = """
CREATE TABLE payments (
    id text, merchant_order_id text, idempotency_key text, amount_cents bigint, currency text,
    status text, provider_txn_id text, created_at timestamp, updated_at timestamptz
)
"""

ORDER_ID = uuid.UUID("f50d9fa2-5d3e-4e49-9a02-218ad32ef4a9")

SOUND: dict[str, Any] = {
    "merchant_order_id": str(ORDER_ID),
    "idempotency_key": "abc123",
    "amount_cents": 1500,
    "currency": "INR",
    "status": "SUCCESS",
    "provider_txn_id": "txn_1",
    "created_at": "2025-06-01 12:00:00",
    "updated_at": "2025-06-01 12:00:02",
}


def insert(connection: psycopg.Connection[Any], **differing: Any) -> str:
    """A row, sound but for what differs; its id."""
    row = {"id": str(uuid.uuid4())} | SOUND | differing
    names, places = ", ".join(row), ", ".join(f"%({name})s" for name in row)
    connection.execute(f"INSERT INTO payments ({names}) VALUES ({places})".encode(), row)
    return str(row["id"])


MANY = """
INSERT INTO payments
SELECT gen_random_uuid(), gen_random_uuid(), CASE WHEN n %% 10 > 0 THEN 'order-' || n END,
       100 + n, 'INR', (ARRAY['SUCCESS', 'FAILED', 'REFUNDED'])[1 + n %% 3], 'txn_' || n,
       timestamp '2025-01-01' + n * interval '1 minute', timestamp '2026-01-01'
  FROM generate_series(1, %s) n
"""
