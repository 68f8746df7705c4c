"""The state of the database server: standbys, clock, whether it is writable and durable, and what
blocks vacuum."""

import time
from bisect import bisect_right
from typing import Literal, NamedTuple

from payments.database.connections import Database

# A role that may not see other sessions sees only that there is a standby; then it counts by
# whether the server waits for any. Base backups, WAL archivers and logical decoding are not
# standbys.
SERVER = """
WITH standbys AS (
    SELECT coalesce(r.sync_state IN ('sync', 'quorum'),
                    current_setting('synchronous_standby_names') <> '') AS synchronous
      FROM pg_stat_replication r
     WHERE coalesce(r.state, 'streaming') IN ('streaming', 'catchup')
       AND coalesce(r.application_name, '') NOT IN ('pg_receivewal', 'pg_basebackup')
       AND NOT EXISTS (SELECT FROM pg_replication_slots s
                        WHERE s.active_pid = r.pid AND s.slot_type = 'logical'))
SELECT (SELECT count(*) FILTER (WHERE r.synchronous) FROM standbys r),
       (SELECT count(*) FILTER (WHERE NOT r.synchronous) FROM standbys r),
       extract(epoch FROM clock_timestamp())::float8,
       coalesce((SELECT greatest(0, extract(epoch FROM least(e.recorded_at, '2200-01-01Z')
                                                       - clock_timestamp()))::float8
                   FROM payment_events e ORDER BY e.notification_id DESC LIMIT 1), 0),
       pg_is_in_recovery() OR current_setting('transaction_read_only')::boolean
"""


class ServerState(NamedTuple):
    """`skew_s`: the database's clock minus this process's, 0 if the duration of the query may
    explain it. `log_ahead_s`: how far in the future the log's last event is, by the database's
    clock. `read_only`: it is a standby, or refuses to write.
    """

    synchronous: int
    asynchronous: int
    skew_s: float
    log_ahead_s: float
    read_only: bool

    @property
    def may_lose(self) -> bool:
        """Whether a failover may lose acknowledged events: there is a standby, and commits do not
        wait for it."""
        return self.asynchronous > 0 and self.synchronous == 0


async def server_state(database: Database) -> ServerState:
    """Raises DatabaseUnavailable."""
    began = time.time()
    rows = await database.fetch(SERVER)
    ended = time.time()
    ((synchronous, asynchronous, now, log_ahead_s, read_only),) = rows
    skew_s = now - began if now < began else max(0.0, now - ended)
    return ServerState(
        synchronous=synchronous,
        asynchronous=asynchronous,
        skew_s=skew_s,
        log_ahead_s=log_ahead_s,
        read_only=read_only,
    )


# Settings that no session can override.
UNSAFE = """
SELECT name FROM pg_settings
 WHERE name IN ('fsync', 'full_page_writes') AND setting <> 'on' ORDER BY name
"""


UNSAFE_MEANS = "a crash of the database's machine may lose or damage acknowledged payments"


async def unsafe_settings(database: Database) -> list[str]:
    """The server's settings with which a crash of its machine may lose or damage committed data.
    Raises DatabaseUnavailable."""
    return [name for (name,) in await database.fetch(UNSAFE)]


# Vacuum must keep all rows, of every table, that the oldest of these may still see. Only
# pg_read_all_stats may read since when another role's session holds them; all roles may read which
# session it is and what it holds. VACUUM itself holds nothing. A session of another database counts
# if it writes: until it ends, no snapshot is newer.
HORIZON = """
WITH holders AS (
    SELECT format('session %%s (%%s)', a.pid, coalesce(nullif(a.application_name, ''), a.usename)),
           held.xid, a.xact_start
      FROM pg_stat_activity a
     CROSS JOIN LATERAL (VALUES (a.backend_xid),
                                (CASE WHEN a.datname IS NULL OR a.datname = current_database()
                                      THEN a.backend_xmin END)) AS held (xid)
     WHERE held.xid IS NOT NULL AND a.pid <> pg_backend_pid()
       AND NOT EXISTS (SELECT FROM pg_stat_progress_vacuum v WHERE v.pid = a.pid)
     UNION ALL
    SELECT format('prepared transaction %%s', p.gid), p.transaction, p.prepared
      FROM pg_prepared_xacts p
     UNION ALL
    SELECT format('replication slot %%s', s.slot_name), held.xid, NULL
      FROM pg_replication_slots s
     CROSS JOIN LATERAL (VALUES (s.xmin), (s.catalog_xmin)) AS held (xid)
     WHERE held.xid IS NOT NULL
), oldest (who, xid, since) AS (
    SELECT * FROM holders h (who, xid, since) ORDER BY age(xid) DESC, since LIMIT 1
)
SELECT pg_snapshot_xmax(pg_current_snapshot())::text::bigint, o.who, coalesce(age(o.xid), 0),
       coalesce(extract(epoch FROM clock_timestamp() - o.since), 0)::float8
  FROM (SELECT) AS always LEFT JOIN oldest o ON true
"""


class Horizon(NamedTuple):
    """The oldest transaction that vacuum must respect. `next_transaction` is the number of the next
    writing transaction; `held_by` is the oldest holder, None if there is none, `transactions`
    behind the next one, since `held_s` seconds if this role may read that, else 0.
    """

    next_transaction: int
    held_by: str | None
    transactions: int
    held_s: float


async def horizon(database: Database) -> Horizon:
    """Raises DatabaseUnavailable."""
    ((next_transaction, held_by, transactions, held_s),) = await database.fetch(HORIZON)
    return Horizon(
        next_transaction=next_transaction,
        held_by=held_by,
        transactions=transactions,
        held_s=max(0.0, held_s),
    )


class HorizonAge:
    """The minimum age of the horizon, also for holders without a time: this process remembers which
    transaction was the next one at what time."""

    KEPT = 10_000
    EVERY_S = 10.0

    def __init__(self) -> None:
        self._next: list[int] = []  # ascending; _times has when each was the next one
        self._times: list[float] = []

    def seconds(self, found: Horizon, now: float) -> float:
        """`now` is from a monotonic clock."""
        if not self._times or now - self._times[-1] >= self.EVERY_S:
            self._next.append(found.next_transaction)
            self._times.append(now)
            del self._next[: -self.KEPT], self._times[: -self.KEPT]
        # By that time the held transaction had been assigned.
        known = bisect_right(self._next, found.next_transaction - found.transactions)
        since = self._times[known] if known < len(self._times) else now
        return max(found.held_s, now - since)


# The appends that wait now: for which session or standby, and for how long.
WAITING_APPENDS = """
SELECT format('session %%s (%%s)', b.pid, coalesce(nullif(b.application_name, ''), b.usename)),
       coalesce(extract(epoch FROM clock_timestamp() - l.waitstart), 0)::float8
  FROM pg_stat_activity a
  JOIN pg_locks l ON l.pid = a.pid AND NOT l.granted
 CROSS JOIN LATERAL unnest(pg_blocking_pids(a.pid)) AS blocking (pid)
  JOIN pg_stat_activity b ON b.pid = blocking.pid
 WHERE a.datname = current_database() AND a.application_name = 'payments appender'
 UNION ALL
SELECT 'a synchronous standby',
       coalesce(extract(epoch FROM clock_timestamp() - a.query_start), 0)::float8
  FROM pg_stat_activity a
 WHERE a.datname = current_database() AND a.application_name = 'payments appender'
   AND a.wait_event = 'SyncRep'
"""


async def waiting_appends(database: Database) -> dict[str, float]:
    """The sessions or standby that appends wait for now, with the longest wait in seconds. Under
    load each append waits for the one before, with a timeout and retry of about a second. Raises
    DatabaseUnavailable."""
    found: dict[str, float] = {}
    for who, waits_s in await database.fetch(WAITING_APPENDS):
        found[who] = max(waits_s, found.get(who, 0.0))
    return found


NOTIFICATIONS = """
SELECT pg_notification_queue_usage()::float8
"""


async def unread_notifications(database: Database) -> float:
    """How full the server's notification queue is, 0 to 1: it keeps what a listener has not read.
    Raises DatabaseUnavailable."""
    ((usage,),) = await database.fetch(NOTIFICATIONS)
    return float(usage)


# owner: may do everything to the log, like a superuser; inserts: may insert directly; appends: only
# through the append function; reads: neither.
Role = Literal["owner", "inserts", "appends", "reads"]

ROLE = """
SELECT CASE WHEN pg_has_role(c.relowner, 'USAGE') THEN 'owner'
            WHEN has_table_privilege(c.oid, 'INSERT') THEN 'inserts'
            WHEN has_function_privilege(p.oid, 'EXECUTE') THEN 'appends' ELSE 'reads' END
  FROM pg_class c,
       (SELECT oid FROM pg_proc WHERE proname = 'append_payment_events'
         ORDER BY pronargs DESC LIMIT 1) AS p
 WHERE c.oid = 'payment_events'::regclass
"""


async def role_of(database: Database) -> Role:
    """What the connected role may do to the log."""
    ((role,),) = await database.fetch(ROLE)
    return role  # type: ignore[no-any-return]
