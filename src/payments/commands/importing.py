"""Bring the payments of the Node service that had this database before into the log.

    rows looked through -> table set aside -> schema migrated -> rows appended, batch by batch

Until every row is in, no service starts on the database (migrations/legacy.py), so no key can be
charged whose row is still to come; and nobody else is connected when it begins. Each batch is one
transaction with its rows' old ids, so whoever is run again after a crash goes on behind it.

The events are appended as all others are. Their callbacks are written with them, as excluded: also
a version that knows nothing of imports then sends none.
"""

import asyncio
from collections.abc import AsyncIterator, Awaitable, Callable, Sequence
from contextlib import asynccontextmanager
from datetime import UTC, datetime
from typing import Any, NamedTuple
from uuid import UUID

import psycopg
from eventsourcing.persistence import StoredEvent

from payments import legacy_ids
from payments.database import Database, DatabaseAddress
from payments.errors import StartError
from payments.events.arrays import uuids
from payments.events.chain import LogEntry
from payments.events.store import (
    APPEND,
    APPENDED,
    CAPTURED,
    REPEATED,
    append_params,
    to_stored_event,
)
from payments.legacy import LegacyRow, facts_of, faults
from payments.migrations.legacy import SET_ASIDE
from payments.payment import Status

LOCK_KEYS = (7165010, 4)  # 3: projections/rebuild.py
NAME = "payments import-legacy"
BATCH_ROWS = 500
LEAVE_S = 5.0  # a connection that was just closed may still be seen
LEAVE_POLL_S = 0.1

# It reads and sorts a whole table, and its times are to be read as those of the zone.
UNHURRIED = """
SELECT set_config('statement_timeout', '0', false), set_config('enable_seqscan', 'on', false),
       set_config('idle_in_transaction_session_timeout', '0', false),
       set_config('work_mem', '64MB', false), set_config('TimeZone', %s, false)
"""

IS_ZONE = "SELECT FROM pg_timezone_names WHERE name = %s"

TRY_LOCK = "SELECT pg_try_advisory_lock(%s, %s)"

COLUMNS = """
SELECT attname::text FROM pg_attribute
 WHERE attrelid = to_regclass(%s) AND attnum > 0 AND NOT attisdropped
"""
NEEDED = (
    *("id", "merchant_order_id", "idempotency_key", "amount_cents", "currency", "status"),
    *("provider_txn_id", "created_at", "updated_at"),
)

# Its own processes included, but for this connection. What some roles may not see is NULL.
OTHERS = """
SELECT DISTINCT coalesce(nullif(application_name, ''), 'without a name'), coalesce(usename, '?')
  FROM pg_stat_activity
 WHERE datname = current_database() AND coalesce(backend_type, 'client backend') = 'client backend'
   AND application_name IS DISTINCT FROM 'payments import-legacy' AND pid <> pg_backend_pid()
 ORDER BY 1, 2
"""

HOLD = "SET LOCAL lock_timeout = '10s'; LOCK TABLE payments IN ACCESS EXCLUSIVE MODE"

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

BEGIN = """
INSERT INTO legacy_import (gateway, timezone, leaves_out) VALUES (%s, %s, %s)
    ON CONFLICT (one) DO NOTHING
"""
BEGUN = "SELECT gateway, timezone, leaves_out FROM legacy_import"
COMPLETE = "UPDATE legacy_import SET completed_at = clock_timestamp()"


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


async def look(address: DatabaseAddress, timezone: str, found: Found, *, set_aside: bool) -> Looked:
    """Reads the whole table and changes nothing."""
    async with _unhurried(address, timezone) as connection, connection.transaction():
        return await _look(connection, ROWS_SET_ASIDE if set_aside else ROWS_IN_PLACE, found)


async def take_over(
    address: DatabaseAddress, asked: Asked, found: Found, *, despite_others: bool
) -> Looked:
    """Looks the table through and sets it aside, in one transaction. If rows have faults and are
    not to be left out, nothing is changed.

    Raises StartError if somebody else is connected to the database: the Node service must not
    write to what is ours from then on.
    """
    async with _unhurried(address, asked.timezone) as connection:
        if not despite_others:
            await _wait_for_others(connection)
        try:
            async with connection.transaction():
                await connection.execute(HOLD)
                looked = await _look(connection, ROWS_IN_PLACE, found)
                await connection.execute(SET_ASIDE.encode())
                changed = await _changed(connection, found)
                looked = looked._replace(faulty=looked.faulty + changed)
                if looked.faulty and not asked.leaves_out:
                    raise psycopg.Rollback
        except psycopg.errors.LockNotAvailable:
            raise StartError("the table payments is in use: stop the Node service") from None
    return looked


# Notes, in the transaction of these events, that nobody is called back for them.
Exclude = Callable[[psycopg.AsyncConnection[Any], Sequence[LogEntry]], Awaitable[object]]


async def import_rows(
    address: DatabaseAddress,
    asked: Asked,
    exclude: Exclude,
    progress: Callable[[int], None] = lambda _: None,
) -> int:
    """Appends every row that is not yet in the log; returns how many those were.

    Raises StartError if an earlier run was asked for something else, or a row cannot be imported.
    """
    imported = 0
    async with (
        _unhurried(address, asked.timezone) as reader,
        _unhurried(address, "UTC") as writer,
    ):
        await _begin(writer, asked)
        async with reader.transaction():
            async for rows in _batches(reader, ROWS_LEFT):
                sound = [row for row in rows if not any(faults(row))]
                if len(sound) < len(rows) and not asked.leaves_out:
                    raise StartError("rows were changed since they were looked through")
                if sound:
                    await _append(writer, sound, asked.gateway, exclude)
                imported += len(sound)
                progress(imported)
        await writer.execute(COMPLETE)
    return imported


async def check_asked(address: DatabaseAddress, timezone: str) -> list[str]:
    """The columns that the Node service's table lacks, wherever it is; StartError for a time zone
    that the server does not know."""
    async with _unhurried(address, "UTC") as connection:
        if not (await connection.execute(IS_ZONE, [timezone])).rowcount:
            raise StartError(f"the server knows no time zone {timezone!r}; one is Asia/Kolkata")
        for table in ("legacy_payments", "payments"):
            cursor = await connection.execute(COLUMNS, [table])
            if there := {name for (name,) in await cursor.fetchall()}:
                return [name for name in NEEDED if name not in there]
    return list(NEEDED)


@asynccontextmanager
async def _unhurried(
    address: DatabaseAddress, timezone: str
) -> AsyncIterator[psycopg.AsyncConnection[Any]]:
    connection = await Database(address, 1).connect(NAME)
    async with connection:
        await connection.execute(UNHURRIED, [timezone])
        yield connection


async def _wait_for_others(connection: psycopg.AsyncConnection[Any]) -> None:
    for _ in range(round(LEAVE_S / LEAVE_POLL_S)):
        others = await (await connection.execute(OTHERS)).fetchall()
        if not others:
            return
        await asyncio.sleep(LEAVE_POLL_S)
    named = ", ".join(f"{name} ({user})" for name, user in others)
    raise StartError(
        f"others are connected to the database: {named}: stop the Node service; if none of these "
        "is it, --ignore-connections goes on"
    )


async def _look(connection: psycopg.AsyncConnection[Any], query: str, found: Found) -> Looked:
    count, faulty, pending = 0, 0, []
    async for rows in _batches(connection, query):
        count += len(rows)
        for row in rows:
            if reasons := list(faults(row)):
                faulty += 1
                found(row.id, reasons)
            elif row.status == Status.PENDING:
                pending.append(row)
    return Looked(count, pending, faulty)


async def _changed(connection: psycopg.AsyncConnection[Any], found: Found) -> int:
    """How many rows the Node service has changed since they were imported or given to it."""
    if await (await connection.execute(HAS_OURS)).fetchone() != (True,):
        return 0
    rows = await (await connection.execute(CHANGED)).fetchall()
    for id, there, here in rows:
        found(id, [f"its status is {there}, and its payment here is {here}"])
    return len(rows)


async def _batches(
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


async def _begin(writer: psycopg.AsyncConnection[Any], asked: Asked) -> None:
    await writer.execute(BEGIN, asked)
    ((*begun,),) = await (await writer.execute(BEGUN)).fetchall()
    if (earlier := Asked(*begun)) != asked:
        options = f"--gateway {earlier.gateway} --timezone {earlier.timezone}"
        options += " --leave-out-rows" if earlier.leaves_out else ""
        raise StartError(f"the import was begun with {options}: run it again with the same")


async def _append(
    writer: psycopg.AsyncConnection[Any], rows: list[LegacyRow], gateway: str, exclude: Exclude
) -> None:
    appends = [[to_stored_event(fact) for fact in facts_of(row, gateway)] for row in rows]
    async with writer.transaction(), writer.cursor(binary=True) as cursor:
        await cursor.execute(APPEND, append_params(appends), prepare=True)
        entries: list[LogEntry] = []
        for row, events, (outcome, position, _) in zip(
            rows, appends, await cursor.fetchall(), strict=True
        ):
            if outcome not in (APPENDED, REPEATED):
                why = "names a capture that another payment names"
                other = "its payment is in the log already, and differs"
                raise StartError(f"row {row.id}: {why if outcome == CAPTURED else other}")
            entries += _entries(row.payment_id, events, position)
        await exclude(writer, entries)
        old_ids = uuids([row.id or "" for row in rows])
        await cursor.execute(legacy_ids.ADD, [old_ids, uuids([row.payment_id for row in rows])])


def _entries(payment_id: UUID, events: list[StoredEvent], last: int) -> list[LogEntry]:
    """As they stand in the log, but for the time."""
    now, first = datetime.now(UTC), last - len(events) + 1
    return [
        LogEntry(position, payment_id, event.originator_version, event.topic, event.state, now)
        for position, event in enumerate(events, first)
    ]
