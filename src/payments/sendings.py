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

from payments.database import Database

AGE_MAX_S = 315_360_000.0  # ten years, for an age that nobody knows

# A note from before a loss of the log says nothing: what happened after it may be lost. Of two
# clocks that are far apart the earlier one counts, as in append_payment_events.
BEGIN = """
WITH clock AS (
    SELECT CASE WHEN told BETWEEN now - interval '60 s' AND now + interval '60 s' THEN now
                ELSE least(now, told) END AS now
      FROM (SELECT clock_timestamp() AS now, %(told)s::timestamptz AS told) AS clocks
), before AS (
    SELECT first_sent_at,
           noted_at > coalesce((SELECT max(at) FROM log_losses WHERE kind = 'found'), '-infinity')
           AS counts
      FROM refund_sendings WHERE refund_id = %(refund_id)s FOR UPDATE
)
INSERT INTO refund_sendings AS s (refund_id, payment_id, sendings, first_sent_at)
SELECT %(refund_id)s, %(payment_id)s, 1, now - make_interval(secs => %(age_s)s) FROM clock
    ON CONFLICT (refund_id) DO UPDATE
   SET sendings = s.sendings + 1,
       first_sent_at = CASE WHEN (SELECT counts FROM before)
                            THEN coalesce(s.first_sent_at, (SELECT now FROM clock))
                            ELSE excluded.first_sent_at END
RETURNING s.sendings,
          (SELECT first_sent_at IS NULL AND counts FROM before),
          extract(epoch FROM (SELECT now FROM clock) - s.first_sent_at)::float8
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

# From the projector: of payments with nothing left to settle.
REMOVE = """
DELETE FROM refund_sendings WHERE payment_id = ANY(%b::uuid[])
"""


class Sending(NamedTuple):
    """The `number`th sending of a refund. `never_before`: none before it can have arrived; None:
    there was no note. `age_s`: since the first one that may have arrived, infinite if it lies in
    the future: the clock was set back, and nobody knows how old it is.
    """

    number: int
    never_before: bool | None
    age_s: float


async def begin(database: Database, refund_id: UUID, payment_id: UUID, age_s: float) -> Sending:
    """To be called before a refund is sent again. `age_s`: how long ago it was accepted."""
    params = {
        "refund_id": refund_id,
        "payment_id": payment_id,
        "age_s": min(age_s, AGE_MAX_S),
        "told": datetime.now(UTC),
    }
    ((number, never_before, since_s),) = await database.fetch(BEGIN, params)
    return Sending(number, never_before, since_s if since_s >= 0 else math.inf)


async def note_never_sent(database: Database, refund_id: UUID, payment_id: UUID) -> None:
    """The first sending of a refund did not arrive; nothing changes if another one was begun."""
    await database.fetch(NOTE_NEVER_SENT, [refund_id, payment_id])


async def take_back(database: Database, refund_id: UUID, number: int) -> None:
    """This sending did not arrive either; nothing changes if another one was begun since."""
    await database.fetch(TAKE_BACK, [refund_id, number])
