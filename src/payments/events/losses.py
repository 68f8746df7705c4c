"""What the log lost: a failover to a standby that lagged, or a restore, takes back what was
acknowledged. The tables log_losses and log_identity, and all of their SQL.

A loss is open from the moment a process finds it until a person accepts it.
"""

from collections.abc import Awaitable, Callable
from datetime import datetime
from typing import Any, Literal, NamedTuple
from uuid import UUID

from payments.database.connections import Database

Fetch = Callable[[str, dict[str, Any]], Awaitable[list[tuple[Any, ...]]]]

LOG_ID = """
SELECT id FROM log_identity
"""

# Of several databases that hold the log, a restored copy for example, which one this is. It stays
# the same in a failover.
DATABASE_ID = """
SELECT oid::bigint FROM pg_database WHERE datname = current_database()
"""

# What was found since the last acceptance, in one row; no row if nothing was. The newest head goes
# with it, for whoever accepts.
OPEN_LOSS = """
SELECT max(f.id), min(f.at), string_agg(DISTINCT f.by, ', '), min(f.kept_position),
       max(f.lost_position),
       (SELECT l.lost_hash FROM log_losses l
         WHERE l.kind = 'found' AND l.id > accepted.id
         ORDER BY l.lost_position DESC, l.id LIMIT 1)
  FROM log_losses f,
       (SELECT coalesce(max(id), 0) AS id FROM log_losses WHERE kind = 'accepted') AS accepted
 WHERE f.kind = 'found' AND f.id > accepted.id
 GROUP BY accepted.id
"""

ACCEPTED_LOSSES = """
SELECT at, by, reason, kept_position, lost_position, lost_hash, head_position, head_hash
  FROM log_losses WHERE kind = 'accepted' ORDER BY id
"""

FOUND_SINCE = """
SELECT EXISTS (SELECT FROM log_losses WHERE kind = 'found' AND at >= %(moment)s)
"""

# Somebody has accepted the loss of this position since. An id that a restore took back is none.
ACCEPTED_SINCE = """
SELECT 1 FROM log_losses
 WHERE kind = 'accepted'
   AND id > CASE WHEN %(accepted)s > (SELECT max(id) FROM log_losses) THEN 0 ELSE %(accepted)s END
   AND kept_position < %(position)s AND lost_position >= %(position)s LIMIT 1
"""

# The new head is the log's end, with its seal if it has one. What is found does not wait for a
# standby, which may be the very thing that is gone. What is accepted is what was shown: nothing is
# added if more was found since `last_found`.
ADD = """
INSERT INTO log_losses (kind, by, reason, kept_position, lost_position, lost_hash,
                        head_position, head_hash)
SELECT %(kind)s, %(by)s, %(reason)s, %(kept)s, %(lost)s, %(lost_hash)s, log.position,
       (SELECT s.hash FROM log_seals s WHERE s.position = log.position)
  FROM (SELECT coalesce(max(notification_id), 0) AS position FROM payment_events) AS log,
       (SELECT CASE WHEN %(kind)s = 'found' THEN set_config('synchronous_commit', 'local', true)
               ELSE '' END AS mode) AS waiting
 WHERE waiting.mode IS NOT NULL
   AND (%(kind)s = 'found'
        OR %(last_found)s = (SELECT max(id) FROM log_losses WHERE kind = 'found'))
RETURNING head_position, head_hash
"""


class OpenLoss(NamedTuple):
    """`id` is that of the last finding; `found_by` are processes. Up to `kept_position` the log is
    known to be as it was; `lost_position` is the last one that is known to be lost, with its seal
    if that is known."""

    id: int
    found_at: datetime
    found_by: str
    kept_position: int
    lost_position: int
    lost_hash: bytes | None


class AcceptedLoss(NamedTuple):
    """A loss that somebody accepted: the old head, and the new one as of then."""

    at: datetime
    by: str
    reason: str
    kept_position: int
    lost_position: int
    lost_hash: bytes | None
    head_position: int
    head_hash: bytes | None

    def covers(self, position: int) -> bool:
        return self.kept_position < position <= self.lost_position

    def __str__(self) -> str:
        return (
            f"events up to position {self.lost_position} were lost, none up to "
            f"{self.kept_position}; accepted by {self.by} on {self.at:%Y-%m-%d}, when the log "
            f"ended at {self.head_position}: {self.reason}"
        )


async def log_id(database: Database) -> UUID | None:
    """Which log this is; a restored copy has the same id. None: somebody removed it."""
    rows = await database.fetch(LOG_ID)
    return rows[0][0] if rows else None


async def open_loss(database: Database) -> OpenLoss | None:
    rows = await database.fetch(OPEN_LOSS)
    return OpenLoss(*rows[0]) if rows else None


async def found_since(database: Database, moment: datetime) -> bool:
    """Whether a loss was found at this time or later, accepted since or not."""
    ((found,),) = await database.fetch(FOUND_SINCE, {"moment": moment})
    return bool(found)


async def add(
    fetch: Fetch,
    kind: Literal["found", "accepted"],
    by: str,
    reason: str,
    *,
    kept_position: int,
    lost_position: int,
    lost_hash: bytes | None,
    last_found: int | None = None,
) -> tuple[int, bytes | None] | None:
    """Returns the log's head as of now; None if more was found since `last_found`, which is given
    with what is accepted. `fetch` returns the rows of a query."""
    params: dict[str, Any] = {
        "kind": kind,
        "by": by,
        "reason": reason,
        "kept": kept_position,
        "lost": lost_position,
        "lost_hash": lost_hash,
        "last_found": last_found,
    }
    rows = await fetch(ADD, params)
    return rows[0] if rows else None
