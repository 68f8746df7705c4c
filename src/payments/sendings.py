"""The table of the sendings of refunds, and all of its SQL.

A refund may be resent under the same id only while the provider certainly remembers that id: from
the first sending that may have arrived. The log records when a refund was accepted, not when it was
sent. So each repetition is noted before it is sent, and the note is revoked if the provider
certainly was not reached. Without a note a refund counts as sent when it was accepted.
"""

import math
from datetime import UTC, datetime
from typing import NamedTuple
from uuid import UUID

from payments.database.connections import Database

AGE_MAX_S = 315_360_000.0  # ten years, for an unknown age

# A note from before a loss of the log does not count: later notes may be lost. Of the two clocks
# the one that makes the refund older counts. `unsent`: a refund without a note was never sent, if
# it was accepted after migration 0009, which introduced notes.
BEGIN = """
WITH clock AS (
    SELECT least(clock_timestamp(), %(told)s::timestamptz) AS earlier,
           greatest(clock_timestamp(), %(told)s::timestamptz) AS later
), age AS (
    SELECT make_interval(secs => %(age_s)s) AS accepted,
           %(unsent)s AND clock_timestamp() - make_interval(secs => %(age_s)s)
               > coalesce((SELECT applied_at FROM schema_versions WHERE number = 9), 'infinity')
           AS unsent
), before AS (
    SELECT first_sent_at,
           noted_at > coalesce((SELECT max(at) FROM log_losses WHERE kind = 'found'), '-infinity')
           AS counts
      FROM refund_sendings WHERE refund_id = %(refund_id)s FOR UPDATE
)
INSERT INTO refund_sendings AS s (refund_id, payment_id, sendings, first_sent_at)
SELECT %(refund_id)s, %(payment_id)s, 1,
       earlier - CASE WHEN age.unsent THEN interval '0' ELSE age.accepted END
  FROM clock, age
    ON CONFLICT (refund_id) DO UPDATE
   SET sendings = s.sendings + 1,
       first_sent_at = CASE WHEN (SELECT counts FROM before)
                            THEN coalesce(s.first_sent_at, (SELECT earlier FROM clock))
                            ELSE (SELECT earlier - accepted FROM clock, age) END
RETURNING s.sendings,
          coalesce((SELECT first_sent_at IS NULL AND counts FROM before),
                   s.sendings = 1 AND (SELECT unsent FROM age)),
          extract(epoch FROM (SELECT later FROM clock) - s.first_sent_at)::float8,
          s.first_sent_at > clock_timestamp()
"""

NOTE_NEVER_SENT = """
INSERT INTO refund_sendings (refund_id, payment_id, sendings) VALUES (%s, %s, 1)
    ON CONFLICT (refund_id) DO NOTHING
RETURNING refund_id
"""

TAKE_BACK = """
UPDATE refund_sendings SET first_sent_at = NULL, noted_at = clock_timestamp()
 WHERE refund_id = %s AND sendings = %s
RETURNING refund_id
"""

# Used by the projector, for refunds with an outcome.
REMOVE = """
DELETE FROM refund_sendings WHERE refund_id = ANY(%b::uuid[])
"""


class Sending(NamedTuple):
    """The `number`th sending of a refund. `never_before`: no earlier one can have arrived. `age_s`:
    seconds since the first one that may have arrived; infinite if its time is in the future, since
    the clock was set back and the age is unknown.
    """

    number: int
    never_before: bool
    age_s: float


async def begin(
    database: Database, refund_id: UUID, payment_id: UUID, age_s: float, *, unsent: bool = False
) -> Sending:
    """Must be called before a refund is resent. `age_s`: the maximum time since it was accepted.
    `unsent`: its first sending is noted too, so without a note it was never sent."""
    params = {
        "refund_id": refund_id,
        "payment_id": payment_id,
        "age_s": min(age_s, AGE_MAX_S),
        "unsent": unsent,
        "told": datetime.now(UTC),
    }
    ((number, never_before, since_s, in_the_future),) = await database.fetch(BEGIN, params)
    return Sending(number, never_before, math.inf if in_the_future else since_s)


async def note_never_sent(database: Database, refund_id: UUID, payment_id: UUID) -> None:
    """Notes that the first sending did not arrive; no effect if another one has begun since."""
    await database.fetch(NOTE_NEVER_SENT, [refund_id, payment_id])


async def take_back(database: Database, refund_id: UUID, number: int) -> None:
    """Revokes the note of a sending that did not arrive; no effect if another one has begun."""
    await database.fetch(TAKE_BACK, [refund_id, number])
