"""The ids that imported payments had in the service before this one, and all SQL of their table.

Where an id is asked for that no payment has, it may be one of these. (What had no idempotency key
there kept its id, and is listed with it: the import goes by this table when it is run again.)
"""

from uuid import UUID

from payments.database.connections import Database

# Only who is about to be told that there is no such payment waits for it.
TIMEOUT_S = 0.4

FIND = """
SELECT payment_id FROM legacy_payment_ids WHERE legacy_id = %s
"""

ADD = """
INSERT INTO legacy_payment_ids (legacy_id, payment_id) SELECT * FROM unnest(%b::uuid[], %b::uuid[])
"""


async def find(database: Database, legacy_id: UUID) -> UUID | None:
    """The payment that had this id; None if none had. DatabaseUnavailable."""
    rows = await database.fetch(FIND, [legacy_id], timeout_s=TIMEOUT_S)
    return rows[0][0] if rows else None
