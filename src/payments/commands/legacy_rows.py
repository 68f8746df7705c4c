"""Reading the table of the Node service, whatever it holds, and saying what is wrong with it."""

from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from datetime import UTC
from typing import Any, NamedTuple

import psycopg

from payments.database.connections import Database, DatabaseAddress
from payments.errors import StartError
from payments.legacy import LegacyRow, faults
from payments.payment.state import Status

NAME = "payments import-legacy"
BATCH_ROWS = 500

# It reads and sorts a whole table, and its times are to be read as those of the zone.
UNHURRIED = """
SELECT set_config('statement_timeout', '0', false), set_config('enable_seqscan', 'on', false),
       set_config('idle_in_transaction_session_timeout', '0', false),
       set_config('work_mem', '64MB', false), set_config('TimeZone', %s, false)
"""

IS_ZONE = "SELECT FROM pg_timezone_names WHERE name = %s"

COLUMNS = """
SELECT attname::text FROM pg_attribute
 WHERE attrelid = to_regclass(%s) AND attnum > 0 AND NOT attisdropped
"""
NEEDED = (
    *("id", "merchant_order_id", "idempotency_key", "amount_cents", "currency", "status"),
    *("provider_txn_id", "created_at", "updated_at"),
)

# Whatever types its columns have; oldest first, as the log would have grown.
_ROWS = """
SELECT l.*
  FROM (SELECT id::text, merchant_order_id::text, idempotency_key::text, amount_cents::text,
               currency::text, status::text, provider_txn_id::text,
               CASE WHEN created_at >= '0001-01-02' AND created_at < '9999-12-31'
                    THEN created_at::timestamptz END AS began_at,
               CASE WHEN updated_at >= '0001-01-02' AND updated_at < '9999-12-31'
                    THEN updated_at::timestamptz END,
               count(*) OVER (PARTITION BY id) > 1,
               idempotency_key IS NOT NULL AND count(*) OVER (PARTITION BY idempotency_key) > 1,
               status::text IN ('SUCCESS', 'REFUNDED') AND provider_txn_id <> ''
               AND count(*) FILTER (WHERE status::text IN ('SUCCESS', 'REFUNDED'))
                            OVER (PARTITION BY provider_txn_id) > 1
"""
ROWS_IN_PLACE = _ROWS + "FROM payments) l ORDER BY began_at, id"
ROWS_SET_ASIDE = _ROWS + "FROM legacy_payments) l ORDER BY began_at, id"
# What is neither imported, nor was given to the Node service when it had the database back.
_NOT_HERE = """
          FROM legacy_payments) l
 WHERE NOT EXISTS (SELECT FROM legacy_payment_ids i WHERE i.legacy_id::text = l.id)
   AND NOT EXISTS (SELECT FROM payments p WHERE p.id::text = l.id)
 ORDER BY began_at, id
"""
ROWS_LEFT = _ROWS + _NOT_HERE

# Of the others what it has changed since: ours is the table of the read model.
HAS_OURS = "SELECT to_regclass('legacy_payment_ids') IS NOT NULL"
CHANGED = """
SELECT l.id::text, l.status::text, p.status
  FROM legacy_payments l
  LEFT JOIN legacy_payment_ids i ON i.legacy_id::text = l.id::text
  JOIN payments p ON p.id::text = coalesce(i.payment_id::text, l.id::text)
 WHERE l.status::text IS DISTINCT FROM p.status
 ORDER BY l.id::text
"""

BEGUN = "SELECT gateway, timezone FROM legacy_import"


class Asked(NamedTuple):
    """What the import is asked for: the provider that captured what was captured, the time zone of
    the table's times, and whether rows that cannot be imported are left out."""

    gateway: str
    timezone: str
    leaves_out: bool


class Looked(NamedTuple):
    """What the table holds: how many rows, which of them are PENDING, and how many have faults."""

    rows: int
    pending: list[LegacyRow]
    faulty: int


# Is told of each row that cannot be imported, by its id, and why.
Found = Callable[[str | None, list[str]], None]


async def check(address: DatabaseAddress, asked: Asked) -> None:
    """Whether it can be done as asked for; StartError."""
    async with unhurried(address, "UTC") as connection:
        if not (await connection.execute(IS_ZONE, [asked.timezone])).rowcount:
            raise StartError(
                f"the server does not know the time zone {asked.timezone!r}; try Asia/Kolkata"
            )
        if await _has_ours(connection):
            async for begun in await connection.execute(BEGUN):
                if begun != (asked.gateway, asked.timezone):
                    options = "--gateway {} --timezone {}".format(*begun)
                    raise StartError(f"the import was begun with {options}: use the same options")
        for table in ("legacy_payments", "payments"):
            cursor = await connection.execute(COLUMNS, [table])
            there = {name for (name,) in await cursor.fetchall()}
            if there and (missing := ", ".join(name for name in NEEDED if name not in there)):
                raise StartError(
                    f"{table} lacks {missing}: it is not the table of the Node service"
                )


async def look(address: DatabaseAddress, timezone: str, found: Found, *, set_aside: bool) -> Looked:
    """Reads the whole table and changes nothing."""
    async with unhurried(address, timezone) as connection, connection.transaction():
        if not set_aside:
            return await look_through(connection, ROWS_IN_PLACE, found)
        looked = await look_through(connection, ROWS_SET_ASIDE, found)
        return looked._replace(faulty=looked.faulty + await changed(connection, found))


async def look_through(
    connection: psycopg.AsyncConnection[Any], query: str, found: Found
) -> Looked:
    count, faulty, pending = 0, 0, []
    async for rows in batches(connection, query):
        count += len(rows)
        for row in rows:
            if reasons := list(faults(row)):
                faulty += 1
                found(row.id, reasons)
            elif row.status == Status.PENDING:
                pending.append(row)
    return Looked(rows=count, pending=pending, faulty=faulty)


async def changed(connection: psycopg.AsyncConnection[Any], found: Found) -> int:
    """How many rows the Node service has changed since they were imported or given to it."""
    if not await _has_ours(connection):
        return 0
    rows = await (await connection.execute(CHANGED)).fetchall()
    for id, there, here in rows:
        found(id, [f"its status is {there}, and its payment here is {here}"])
    return len(rows)


async def _has_ours(connection: psycopg.AsyncConnection[Any]) -> bool:
    """Whether an import was begun before."""
    return await (await connection.execute(HAS_OURS)).fetchone() == (True,)


async def batches(
    connection: psycopg.AsyncConnection[Any], query: str
) -> AsyncIterator[list[LegacyRow]]:
    """Within a transaction; memory is constant."""
    async with connection.cursor(name="legacy") as cursor:
        await cursor.execute(query.encode())
        while rows := await cursor.fetchmany(BATCH_ROWS):
            yield [_row(*row) for row in rows]


def _row(*values: Any) -> LegacyRow:
    row = LegacyRow(*values)
    began_at, ended_at = (
        time.astimezone(UTC) if time is not None else None
        for time in (row.created_at, row.updated_at)
    )
    return row._replace(created_at=began_at, updated_at=ended_at)


@asynccontextmanager
async def unhurried(
    address: DatabaseAddress, timezone: str
) -> AsyncIterator[psycopg.AsyncConnection[Any]]:
    connection = await Database(address, 1).connect(NAME)
    async with connection:
        await connection.execute(UNHURRIED, [timezone])
        yield connection
