"""A payment as it was at a moment: folded from the events that were recorded by then."""

from datetime import datetime
from uuid import UUID

from payments.database.connections import Database
from payments.errors import PaymentNotFound
from payments.event_store import fold_stored
from payments.events.store import LOAD_STREAM_AS_OF, belongs_to
from payments.queries.payments import PaymentView, found, view_of

Moment = int | datetime  # a position of the log, or a time

STREAM_EXISTS = """
SELECT 1 FROM payment_event_log WHERE payment_id = %s LIMIT 1
"""


async def get_payment_as_of(
    database: Database, payment_id: UUID, moment: Moment, client: str | None
) -> PaymentView:
    """The payment after the event at this position, or after what was recorded by this time.

    A moment that is still to come is now. `client` and errors are those of get_payment; the
    PaymentNotFound of a payment that began later says so.
    """

    async def read(payment_id: UUID) -> PaymentView | None:
        params = {
            "payment_id": payment_id,
            "position": moment if isinstance(moment, int) else None,
            "time": moment if isinstance(moment, datetime) else None,
        }
        rows = await database.fetch(LOAD_STREAM_AS_OF, params)
        if rows and belongs_to(client, payment_id, rows[0]):
            return view_of(fold_stored(payment_id, rows))
        if not rows and client is None and await database.fetch(STREAM_EXISTS, [payment_id]):
            raise PaymentNotFound(f"Payment {payment_id} did not exist yet {_text(moment)}.")
        return None

    return await found(database, payment_id, client, read)


def _text(moment: Moment) -> str:
    if isinstance(moment, int):
        return f"at position {moment}"
    return f"at {moment.isoformat().replace('+00:00', 'Z')}"
