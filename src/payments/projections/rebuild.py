"""`payments rebuild`: corrects the payments read model from the log, while the service runs.

1. Compare, slice by slice, without locks. Differences are staged in temporary tables, which end
   with the connection.
2. Catch up: payments with events since the start are compared again, until few are left.
3. Lock the follower's row, so that tables and log are at the same position; compare the last few;
   in the same transaction write the rows that differ, and keep those that they replace.

The live tables are updated, not swapped: readers neither wait nor see intermediate states. A
rebuild sends no callbacks and calls no gateway.
"""

import os
import socket
import time
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from datetime import UTC, datetime, timedelta
from typing import Any, NamedTuple
from uuid import UUID

import psycopg

from payments import unsettled
from payments.database.arrays import uuids
from payments.database.connections import DatabaseAddress
from payments.errors import StartError
from payments.projections.comparison import (
    TABLES,
    Comparison,
    Difference,
    Row,
    Slice,
    Totals,
    Unreadable,
    position_of,
    table_totals,
)
from payments.snapshot import Reader, unhurried

LOCK_KEYS = (7165010, 3)  # 2: migrations/__init__.py
NAME = "payments rebuild"
LOCK_POLL_S = 0.05
STAGE_ROWS = 2000
CATCH_UP_EVENTS = 500  # the maximum that is compared while the follower waits
CATCH_UPS_MAX = 20
# A batch of the follower takes milliseconds, `payments parked retry` takes seconds at worst.
POSITION_WAIT_S = 60
# An abandoned payment may be captured late; payments abandoned longer ago are not watched again.
# Gateways declare days at most, and one needless request does no harm.
WATCHED_FOR = timedelta(days=30)

# The transaction is idle while the last payments are compared.
BEGIN_WRITING = f"""
SET LOCAL lock_timeout = '{POSITION_WAIT_S}s';
SET LOCAL idle_in_transaction_session_timeout = '{POSITION_WAIT_S}s'
"""

TRY_LOCK = """
SELECT pg_try_advisory_lock(%s, %s)
"""

UNLOCK = """
SELECT pg_advisory_unlock(%s, %s)
"""

# The application name of the connection that holds the lock.
LOCK_HOLDER = """
SELECT a.application_name, a.backend_start
  FROM pg_locks l JOIN pg_stat_activity a USING (pid)
 WHERE l.locktype = 'advisory' AND l.granted AND l.database = a.datid
   AND (l.classid, l.objid) = (%s, %s)
"""

# The rows that differ, as computed from the log, and surplus rows. Only the columns are copied:
# columns that others added to the live tables, and constraints, do not concern the log.
STAGING = """
CREATE TEMPORARY TABLE rebuilt_payments AS
SELECT id, merchant_order_id, idempotency_key, amount_cents, currency, status, provider_txn_id,
       created_at, updated_at
  FROM payments WITH NO DATA;
CREATE TEMPORARY TABLE rebuilt_refunds AS
SELECT id, payment_id, idempotency_key, amount_cents, currency, status, provider_refund_id,
       decline_code, created_at, updated_at
  FROM refunds WITH NO DATA;
CREATE TEMPORARY TABLE rebuilt_payment_clients AS
SELECT payment_id, client, status, currency, created_at FROM payment_clients WITH NO DATA;
CREATE TEMPORARY TABLE rebuilt_unsettled_payments AS
SELECT payment_id, kind, since FROM unsettled_payments WITH NO DATA;
CREATE TEMPORARY TABLE surplus_rows (table_name text, id uuid, payment_id uuid)
"""

STAGE = {
    "payments": "COPY rebuilt_payments FROM STDIN",
    "refunds": "COPY rebuilt_refunds FROM STDIN",
    "payment_clients": "COPY rebuilt_payment_clients FROM STDIN",
    "unsettled_payments": "COPY rebuilt_unsettled_payments FROM STDIN",
    "surplus_rows": "COPY surplus_rows FROM STDIN",
}

UNSTAGE = (
    "DELETE FROM rebuilt_payments WHERE id = ANY (%b::uuid[])",
    "DELETE FROM rebuilt_refunds WHERE payment_id = ANY (%b::uuid[])",
    "DELETE FROM rebuilt_payment_clients WHERE payment_id = ANY (%b::uuid[])",
    "DELETE FROM rebuilt_unsettled_payments WHERE payment_id = ANY (%b::uuid[])",
    "DELETE FROM surplus_rows WHERE payment_id = ANY (%b::uuid[])",
)

ANALYZE = """
ANALYZE rebuilt_payments, rebuilt_refunds, rebuilt_payment_clients, rebuilt_unsettled_payments,
        surplus_rows
"""

STAGED = """
SELECT 'payments', count(*) FROM rebuilt_payments
 UNION ALL SELECT 'refunds', count(*) FROM rebuilt_refunds
 UNION ALL SELECT 'payment_clients', count(*) FROM rebuilt_payment_clients
 UNION ALL SELECT 'unsettled_payments', count(*) FROM rebuilt_unsettled_payments
 UNION ALL SELECT table_name, count(*) FROM surplus_rows GROUP BY table_name
"""

HOLD_POSITION = """
SELECT position FROM followers WHERE name = 'payments' FOR UPDATE
"""

# Copies each table's rows before they are replaced or removed.
KEEP = """
INSERT INTO replaced_rows (rebuilt_at, table_name, id, row)
SELECT now(), 'payments', p.id, to_jsonb(p) FROM payments p
 WHERE id IN (SELECT id FROM rebuilt_payments)
    OR id IN (SELECT id FROM surplus_rows WHERE table_name = 'payments')
 UNION ALL
SELECT now(), 'refunds', r.id, to_jsonb(r) FROM refunds r
 WHERE id IN (SELECT id FROM rebuilt_refunds)
    OR id IN (SELECT id FROM surplus_rows WHERE table_name = 'refunds')
 UNION ALL
SELECT now(), 'payment_clients', c.payment_id, to_jsonb(c) FROM payment_clients c
 WHERE payment_id IN (SELECT payment_id FROM rebuilt_payment_clients)
    OR payment_id IN (SELECT id FROM surplus_rows WHERE table_name = 'payment_clients')
 UNION ALL
SELECT now(), 'unsettled_payments', u.payment_id, to_jsonb(u) FROM unsettled_payments u
 WHERE payment_id IN (SELECT payment_id FROM rebuilt_unsettled_payments)
    OR payment_id IN (SELECT id FROM surplus_rows WHERE table_name = 'unsettled_payments')
"""

# Keys are cleared first: a row may hold the key of another.
REPLACE = (
    "DELETE FROM payments WHERE id IN (SELECT id FROM surplus_rows WHERE table_name = 'payments')",
    "DELETE FROM refunds WHERE id IN (SELECT id FROM surplus_rows WHERE table_name = 'refunds')",
    "DELETE FROM payment_clients"
    " WHERE payment_id IN (SELECT id FROM surplus_rows WHERE table_name = 'payment_clients')",
    "DELETE FROM unsettled_payments"
    " WHERE payment_id IN (SELECT id FROM surplus_rows WHERE table_name = 'unsettled_payments')",
    "UPDATE payments SET idempotency_key = NULL WHERE id IN (SELECT id FROM rebuilt_payments)",
    """
UPDATE payments p
   SET merchant_order_id = r.merchant_order_id,
       idempotency_key = r.idempotency_key,
       amount_cents = r.amount_cents,
       currency = r.currency,
       status = r.status,
       provider_txn_id = r.provider_txn_id,
       created_at = r.created_at,
       updated_at = r.updated_at
  FROM rebuilt_payments r
 WHERE p.id = r.id
""",
    # In the order of most indexes: a third faster than ON CONFLICT in the order of ids.
    """
INSERT INTO payments (id, merchant_order_id, idempotency_key, amount_cents, currency, status,
                      provider_txn_id, created_at, updated_at)
SELECT * FROM rebuilt_payments r
 WHERE NOT EXISTS (SELECT FROM payments p WHERE p.id = r.id)
 ORDER BY created_at DESC, id DESC
""",
    """
INSERT INTO refunds (id, payment_id, idempotency_key, amount_cents, currency, status,
                     provider_refund_id, decline_code, created_at, updated_at)
SELECT * FROM rebuilt_refunds
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
""",
    """
INSERT INTO payment_clients (payment_id, client, status, currency, created_at)
SELECT * FROM rebuilt_payment_clients
    ON CONFLICT (payment_id) DO UPDATE
   SET client = excluded.client,
       status = excluded.status,
       currency = excluded.currency,
       created_at = excluded.created_at
""",
)


class Rebuilt(NamedTuple):
    """The result of a rebuild. `log` and `tables` are the totals at `position`.

    `differing`: rows by table. `replaced` of them existed, and are kept in replaced_rows. `held_s`:
    for how long the follower had to wait.
    """

    position: int
    events: int
    payments: int
    differing: dict[str, int]
    replaced: int
    unreadable: list[Unreadable]
    parked: int
    log: Totals
    tables: Totals
    held_s: float


Found = Callable[[Difference | Unreadable], None]
# (step, events done, their total); the steps are `compare`, `catch up`, `write`.
Progress = Callable[[str, int, int], None]


def check(
    address: DatabaseAddress,
    found: Found = lambda _: None,
    progress: Progress = lambda *_: None,
) -> Rebuilt:
    """Only compares; `found` is called with each difference. Raises StartError, psycopg.Error."""
    differing = dict.fromkeys((table.name for table in TABLES), 0)
    unreadable = []
    with Reader(address, NAME) as reader:
        comparison = _comparison(reader, progress)
        for difference in comparison.of_all():
            if isinstance(difference, Unreadable):
                unreadable.append(difference)
            elif difference.may_be:
                continue
            else:
                differing[difference.table.name] += 1
            found(difference)
        for _ in range(CATCH_UPS_MAX):
            if position_of(reader) - comparison.position <= CATCH_UP_EVENTS:
                break
            comparison.catch_up(_nothing)
        tables = comparison.end(_nothing, table_totals)
    return Rebuilt(
        position=comparison.position,
        events=comparison.events,
        payments=comparison.payments,
        differing=differing,
        replaced=0,
        unreadable=unreadable,
        parked=len(comparison.parked),
        log=comparison.totals,
        tables=tables,
        held_s=0.0,
    )


def rebuild(
    address: DatabaseAddress,
    settle_after_s: float,
    found: Found = lambda _: None,
    progress: Progress = lambda *_: None,
) -> Rebuilt:
    """Compares and corrects. `settle_after_s`: as for PaymentsProjection.

    `found` is called with each difference of the first comparison. Raises StartError if another
    rebuild is running, or psycopg.Error; then nothing was changed.
    """
    writer = unhurried(address, f"{NAME} {os.getpid()}@{socket.gethostname()}"[:63])
    with writer, _the_only_one(writer), Reader(address, NAME) as reader:
        return _Rebuild(reader, writer, settle_after_s, found, progress).run()


def _comparison(reader: Reader, progress: Progress) -> Comparison:
    comparison = Comparison(reader)
    comparison.progress = lambda events: progress("compare", events, comparison.position)
    return comparison


def _nothing(_: Slice, differences: Iterator[Difference | Unreadable]) -> None:
    """Ignores differences, which were reported before: only the totals are needed."""
    deque(differences, maxlen=0)


@contextmanager
def _the_only_one(connection: psycopg.Connection[Any]) -> Iterator[None]:
    """Holds the lock of rebuilds; StartError names the process that holds it already."""
    while not (row := connection.execute(TRY_LOCK, LOCK_KEYS).fetchone()) or not row[0]:
        if (row := connection.execute(LOCK_HOLDER, LOCK_KEYS).fetchone()) is not None:
            name, since = row
            raise StartError(f"a rebuild is already running: {name}, since {since:%F %T} UTC")
        time.sleep(LOCK_POLL_S)  # it has just ended
    yield
    # After an error the connection is closed, which releases the lock.
    connection.execute(UNLOCK, LOCK_KEYS)


class _Rebuild:
    def __init__(
        self,
        reader: Reader,
        writer: psycopg.Connection[Any],
        settle_after_s: float,
        found: Found,
        progress: Progress,
    ) -> None:
        self._reader = reader
        self._comparison = _comparison(reader, progress)
        self._writer = writer
        self._settle_after_s = settle_after_s
        self._found = found
        self._progress = progress
        self._unreadable: dict[UUID, Unreadable] = {}
        self._may_be: set[UUID] = set()

    def run(self) -> Rebuilt:
        self._writer.execute(STAGING)
        comparison = self._comparison
        self._stage(comparison.of_all(), self._found)
        for _ in range(CATCH_UPS_MAX):
            if not self._catch_up(CATCH_UP_EVENTS):
                break
        self._writer.execute(ANALYZE)
        differing, held_s, replaced = self._differing(), 0.0, 0
        if any(differing.values()) or self._may_be:
            differing, replaced, held_s = self._write()
        tables = comparison.end(_nothing, table_totals)
        return Rebuilt(
            position=comparison.position,
            events=comparison.events,
            payments=comparison.payments,
            differing=differing,
            replaced=replaced,
            unreadable=list(self._unreadable.values()),
            parked=len(comparison.parked),
            log=comparison.totals,
            tables=tables,
            held_s=held_s,
        )

    def _catch_up(self, few: int) -> bool:
        """Compares payments that have changed; False if at most `few` events are left."""
        position = position_of(self._reader)
        if position - self._comparison.position <= few:
            return False
        self._progress("catch up", self._comparison.position, position)
        self._comparison.catch_up(self._stage_again)
        return True

    def _stage_again(self, part: Slice, differences: Iterator[Difference | Unreadable]) -> None:
        """Replaces the earlier differences of these payments."""
        ids = part.ids or []
        for query in UNSTAGE:
            self._writer.execute(query, [uuids(ids)])
        self._may_be.difference_update(ids)
        for payment_id in ids:
            self._unreadable.pop(payment_id, None)
        self._stage(differences, lambda _: None)

    def _stage(self, differences: Iterable[Difference | Unreadable], found: Found) -> None:
        staged = _Staged(self._writer)
        watched_since = datetime.now(UTC) - WATCHED_FOR
        for difference in differences:
            if isinstance(difference, Unreadable):
                self._unreadable[difference.payment_id] = difference
            elif difference.may_be:
                assert difference.expected is not None
                if difference.expected[2] > watched_since:
                    self._may_be.add(difference.payment_id)
                    staged.add(difference)
                continue
            else:
                staged.add(difference)
            found(difference)
        staged.flush()

    def _differing(self) -> dict[str, int]:
        rows = self._writer.execute(STAGED).fetchall()
        differing = dict.fromkeys((table.name for table in TABLES), 0)
        for table, count in rows:
            differing[table] += count
        differing["unsettled_payments"] -= len(self._may_be)
        return differing

    def _write(self) -> tuple[dict[str, int], int, float]:
        """Returns how many rows differed by table, how many were replaced, and the duration."""
        with self._writer.transaction():
            self._writer.execute(BEGIN_WRITING)
            self._writer.execute(HOLD_POSITION)
            held = time.monotonic()
            self._comparison.end(self._stage_again, lambda _: None)
            differing = self._differing()
            self._progress("write", 0, sum(differing.values()))
            replaced = self._writer.execute(KEEP).rowcount
            for query in REPLACE:
                self._writer.execute(query.encode())
            self._writer.execute(unsettled.ADD_REBUILT.encode(), [self._settle_after_s])
        return differing, replaced, time.monotonic() - held


class _Staged:
    """Buffers rows for the temporary tables."""

    def __init__(self, writer: psycopg.Connection[Any]) -> None:
        self._writer = writer
        self._rows: dict[str, list[Row]] = {name: [] for name in STAGE}

    def add(self, difference: Difference) -> None:
        table = difference.table.name
        if difference.expected is not None:
            rows = self._rows[table]
            rows.append(difference.expected)
        else:
            table = "surplus_rows"
            rows = self._rows[table]
            rows.append((difference.table.name, difference.id, difference.payment_id))
        if len(rows) >= STAGE_ROWS:
            self._copy(table)

    def flush(self) -> None:
        for table in self._rows:
            self._copy(table)

    def _copy(self, table: str) -> None:
        rows = self._rows[table]
        if rows:
            with self._writer.cursor() as cursor, cursor.copy(STAGE[table]) as copy:
                for row in rows:
                    copy.write_row(list(map(_in_utc, row)))
            rows.clear()


def _in_utc(value: Any) -> Any:
    """Times in UTC, since columns without a time zone drop the offset."""
    return value.astimezone(UTC) if isinstance(value, datetime) else value
