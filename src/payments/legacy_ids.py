"""The ids that imported payments had in the earlier service, and all SQL of their table.

An id that no payment has may be one of these. (Payments without an idempotency key kept their id,
and are listed too: a repeated import reads this table.)
"""

from uuid import UUID

from payments.database.connections import Database

# Delays only requests that would otherwise get a 404.
TIMEOUT_S = 0.4

FIND = """
SELECT payment_id FROM legacy_payment_ids WHERE legacy_id = %s
"""

ADD = """
INSERT INTO legacy_payment_ids (legacy_id, payment_id) SELECT * FROM unnest(%b::uuid[], %b::uuid[])
"""


async def find(database: Database, legacy_id: UUID) -> UUID | None:
    """The payment that had this id, None if there is none. Raises DatabaseUnavailable."""
    rows = await database.fetch(FIND, [legacy_id], timeout_s=TIMEOUT_S)
    return rows[0][0] if rows else None
