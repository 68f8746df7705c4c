"""The table of refunds that were sent, or were not, and all of its SQL.

A refund may be sent again under the same id for as long as the provider surely remembers that id:
from the first sending on that may have arrived. The log says when a refund was accepted, not when
that was. So it is noted before each repetition, and taken back when the provider was provably not
reached. Without a note a refund counts as sent when it was accepted.
"""

import math
from datetime import UTC, datetime
from typing import NamedTuple
from uuid import UUID

from payments.database.connections import Database

AGE_MAX_S = 315_360_000.0  # ten years, for an age that nobody knows

# A note from before a loss of the log says nothing: what happened after it may be lost. Of the two
# clocks the one counts that makes a refund older. `unsent`: without a note it was never sent, if it
# was accepted since notes are made (migration 0009).
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

# From the projector: of refunds that have an outcome.
REMOVE = """
DELETE FROM refund_sendings WHERE refund_id = ANY(%b::uuid[])
"""


class Sending(NamedTuple):
    """The `number`th sending of a refund. `never_before`: none before it can have arrived. `age_s`:
    since the first one that may have arrived, infinite if it lies in the future: the clock was set
    back, and nobody knows how old it is.
    """

    number: int
    never_before: bool
    age_s: float


async def begin(
    database: Database, refund_id: UUID, payment_id: UUID, age_s: float, *, unsent: bool = False
) -> Sending:
    """To be called before a refund is sent again. `age_s`: how long ago it was accepted, at the
    most. `unsent`: whoever sends it first notes that, so without a note it was never sent."""
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
    """The first sending of a refund did not arrive; nothing changes if another one was begun."""
    await database.fetch(NOTE_NEVER_SENT, [refund_id, payment_id])


async def take_back(database: Database, refund_id: UUID, number: int) -> None:
    """This sending did not arrive either; nothing changes if another one was begun since."""
    await database.fetch(TAKE_BACK, [refund_id, number])
