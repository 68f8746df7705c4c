"""Bring the payments of the Node service that had this database before into the log.

    rows looked through -> table set aside -> schema migrated -> rows appended, batch by batch

Until every row is in, no service starts on the database (migrations/legacy.py), so no key can be
charged whose row is still to come; and nobody else is connected when it begins. Each batch is one
transaction with its rows' old ids, so whoever is run again after a crash goes on behind it.

The events are appended as all others are. Their callbacks are written with them, as excluded: also
a version that knows nothing of imports then sends none.
"""

import asyncio
from collections.abc import Awaitable, Callable, Sequence
from datetime import UTC, datetime
from typing import Any
from uuid import UUID

import psycopg
from eventsourcing.persistence import StoredEvent

from payments import legacy_ids
from payments.commands.legacy_rows import (
    ROWS_IN_PLACE,
    ROWS_LEFT,
    Asked,
    Found,
    Looked,
    batches,
    changed,
    look_through,
    unhurried,
)
from payments.database.arrays import uuids
from payments.database.connections import DatabaseAddress
from payments.errors import StartError
from payments.events.store import (
    APPEND,
    APPENDED,
    CAPTURED,
    REPEATED,
    LogEntry,
    append_params,
    to_stored_event,
)
from payments.legacy import LegacyRow, facts_of, faults
from payments.migrations.legacy import SET_ASIDE

LOCK_KEYS = (7165010, 4)  # 3: projections/rebuild.py
LEAVE_S = 5.0  # a connection that was just closed may still be seen
LEAVE_POLL_S = 0.1

TRY_LOCK = "SELECT pg_try_advisory_lock(%s, %s)"

# Its own processes included, but for this connection. What some roles may not see is NULL.
OTHERS = """
SELECT DISTINCT coalesce(nullif(application_name, ''), 'without a name'), coalesce(usename, '?')
  FROM pg_stat_activity
 WHERE datname = current_database() AND coalesce(backend_type, 'client backend') = 'client backend'
   AND application_name IS DISTINCT FROM 'payments import-legacy' AND pid <> pg_backend_pid()
 ORDER BY 1, 2
"""

HOLD = "SET LOCAL lock_timeout = '10s'; LOCK TABLE payments IN ACCESS EXCLUSIVE MODE"

BEGIN = """
INSERT INTO legacy_import (gateway, timezone) VALUES (%s, %s) ON CONFLICT (one) DO NOTHING
"""
COMPLETE = "UPDATE legacy_import SET completed_at = clock_timestamp()"


async def take_over(
    address: DatabaseAddress, asked: Asked, found: Found, *, despite_others: bool
) -> Looked:
    """Looks the table through and sets it aside, in one transaction. If rows have faults and are
    not to be left out, nothing is changed.

    Raises StartError if somebody else is connected to the database: the Node service must not
    write to what is ours from then on.
    """
    async with unhurried(address, asked.timezone) as connection:
        if not despite_others:
            await _wait_for_others(connection)
        try:
            async with connection.transaction():
                await connection.execute(HOLD)
                looked = await look_through(connection, ROWS_IN_PLACE, found)
                await connection.execute(SET_ASIDE.encode())
                faulty = looked.faulty + await changed(connection, found)
                looked = looked._replace(faulty=faulty)
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
        unhurried(address, asked.timezone) as reader,
        unhurried(address, "UTC") as writer,
    ):
        await writer.execute(BEGIN, [asked.gateway, asked.timezone])
        async with reader.transaction():
            async for rows in batches(reader, ROWS_LEFT):
                sound = [row for row in rows if not any(faults(row))]
                if len(sound) < len(rows) and not asked.leaves_out:
                    raise StartError("rows have changed since they were checked")
                if sound:
                    await _append(writer, sound, asked.gateway, exclude)
                imported += len(sound)
                progress(imported)
        await writer.execute(COMPLETE)
    return imported


async def _wait_for_others(connection: psycopg.AsyncConnection[Any]) -> None:
    for _ in range(round(LEAVE_S / LEAVE_POLL_S)):
        others = await (await connection.execute(OTHERS)).fetchall()
        if not others:
            return
        await asyncio.sleep(LEAVE_POLL_S)
    named = ", ".join(f"{name} ({user})" for name, user in others)
    raise StartError(
        f"other sessions are connected to the database: {named}: stop the Node service; if it is "
        "none of these, continue with --ignore-connections"
    )


async def _append(
    writer: psycopg.AsyncConnection[Any], rows: list[LegacyRow], gateway: str, exclude: Exclude
) -> None:
    streams = [facts_of(row, gateway) for row in rows]
    ids = [facts[0].payment_id for facts in streams]
    appends = [[to_stored_event(fact) for fact in facts] for facts in streams]
    async with writer.transaction(), writer.cursor(binary=True) as cursor:
        await cursor.execute(APPEND, append_params(appends), prepare=True)
        entries: list[LogEntry] = []
        for row, payment_id, events, (outcome, position, _) in zip(
            rows, ids, appends, await cursor.fetchall(), strict=True
        ):
            if outcome not in (APPENDED, REPEATED):
                why = "has the provider_txn_id of another payment"
                other = "its payment is already in the log, and differs"
                raise StartError(f"row {row.id}: {why if outcome == CAPTURED else other}")
            entries += _entries(payment_id, events, position)
        await exclude(writer, entries)
        await cursor.execute(legacy_ids.ADD, [uuids([row.id or "" for row in rows]), uuids(ids)])


def _entries(payment_id: UUID, events: list[StoredEvent], last: int) -> list[LogEntry]:
    """As they stand in the log, but for the time."""
    now, first = datetime.now(UTC), last - len(events) + 1
    return [
        LogEntry(
            position=position,
            payment_id=payment_id,
            version=event.originator_version,
            topic=event.topic,
            state=event.state,
            recorded_at=now,
        )
        for position, event in enumerate(events, first)
    ]
