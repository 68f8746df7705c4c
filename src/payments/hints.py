"""The table of hints, the webhooks of providers that are about a payment, and all of its SQL but
for one look into it: unsettled.ADD.

A hint makes its payment due now, and that alone. It is kept for KEPT_DAYS: a provider delivers an
event again for up to three days, and a hint may come before the payment that it is about is known.
"""

from typing import Any, Literal, NamedTuple
from uuid import UUID

from payments.database.connections import Database

KEPT_DAYS = 7
PURGE_MAX = 500  # hints removed at once

Recorded = Literal["accepted", "duplicate", "unknown", "ignored"]

# In one statement, and so in one transaction. A payment is due no earlier than a deadline after it
# was opened: until then its request may be running, and would have asked anyway. An event that is
# delivered twice at once waits for the first delivery's transaction.
RECORD = """
WITH hint AS (
    INSERT INTO provider_hints (gateway, event_id, payment_id, reference)
    VALUES (%(gateway)s, %(event_id)s, %(payment_id)s, %(reference)s)
        ON CONFLICT DO NOTHING
    RETURNING event_id
), about AS MATERIALIZED (
    SELECT coalesce(%(payment_id)s::uuid,
                    (SELECT payment_id FROM provider_references
                      WHERE gateway = %(gateway)s AND reference = %(reference)s)) AS payment_id
), due AS (
    UPDATE unsettled_payments u
       SET due_at = least(u.due_at, greatest(clock_timestamp(),
                                             u.since + make_interval(secs => %(request_s)s))),
           attempts = 0, hinted = true, change = nextval('unsettled_payments_change_seq')
      FROM about, hint WHERE u.payment_id = about.payment_id
    RETURNING u.payment_id
)
SELECT CASE WHEN NOT EXISTS (SELECT FROM hint) THEN 'duplicate'
            WHEN EXISTS (SELECT FROM due) THEN 'accepted'
            WHEN EXISTS (SELECT FROM payments p, about WHERE p.id = about.payment_id) THEN 'ignored'
            ELSE 'unknown' END,
       (SELECT payment_id FROM about)
"""

PURGE = """
DELETE FROM provider_hints h
 USING (SELECT gateway, event_id FROM provider_hints
         WHERE received_at < now() - make_interval(days => %(days)s)
         ORDER BY received_at LIMIT %(limit)s
           FOR UPDATE SKIP LOCKED) AS old
 WHERE (h.gateway, h.event_id) = (old.gateway, old.event_id)
RETURNING 1
"""


class RecordedHint(NamedTuple):
    """What a hint came to. accepted: its payment is unsettled, and due now; ignored: nothing of it
    is unsettled; unknown: there is no such payment in the tables yet, and `payment_id` is None or
    what the provider says."""

    result: Recorded
    payment_id: UUID | None


async def record(
    database: Database, gateway: str, hint: dict[str, Any], request_s: float
) -> RecordedHint:
    """Durable when it returns. `hint` has the fields of gateways.Hint; `request_s`: for how long a
    payment is left to the request that opened it."""
    params = {**hint, "gateway": gateway, "request_s": request_s}
    ((result, about),) = await database.fetch(RECORD, params)
    return RecordedHint(result, about)


async def purge(database: Database) -> bool:
    """Removes some hints that are too old; whether there may be more."""
    params = {"days": KEPT_DAYS, "limit": PURGE_MAX}
    return len(await database.fetch(PURGE, params)) == PURGE_MAX
