"""What the database server is to this service: its standbys, its clock, whether it is writable, and
whether it keeps what it was given."""

import time
from typing import Literal, NamedTuple

from payments.database import Database

# A role that may not see others' sessions sees no more of a standby than that there is one; then it
# counts by whether the server waits for any. What takes a base backup, receives WAL for an archive
# or decodes it is no standby.
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


class Server(NamedTuple):
    """`skew_s`: the database's clock minus this process's, 0 if the time that asking took may
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
        """Whether a failover may lose what was acknowledged: it goes to a standby that nothing
        waits for."""
        return self.asynchronous > 0 and self.synchronous == 0


async def server_state(database: Database) -> Server:
    """Raises DatabaseUnavailable."""
    began = time.time()
    rows = await database.fetch(SERVER)
    ended = time.time()
    ((synchronous, asynchronous, now, log_ahead_s, read_only),) = rows
    skew_s = now - began if now < began else max(0.0, now - ended)
    return Server(synchronous, asynchronous, skew_s, log_ahead_s, read_only)


# What no session can set for itself.
UNSAFE = """
SELECT name FROM pg_settings
 WHERE name IN ('fsync', 'full_page_writes') AND setting <> 'on' ORDER BY name
"""


UNSAFE_MEANS = "a crash of the database's machine may lose or damage what was answered"


async def unsafe_settings(database: Database) -> list[str]:
    """The server's settings with which a crash of its machine may lose, or damage, what it had
    committed. Raises DatabaseUnavailable."""
    return [name for (name,) in await database.fetch(UNSAFE)]


# owner: it may do everything to the log, a superuser as well; inserts: it may insert directly;
# appends: only through the append function; reads: neither.
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
    """What the role that is connected may do to the log."""
    ((role,),) = await database.fetch(ROLE)
    return role  # type: ignore[no-any-return]
