"""The events of one payment, as they are stored."""

from datetime import datetime
from typing import Annotated
from uuid import UUID

import msgspec

from payments.database.connections import Database
from payments.events.store import belongs_to
from payments.queries.payments import found

# A whole stream, oldest first; `data` is the stored text, NULL if that is not JSON.
HISTORY = """
SELECT "position", version, type, recorded_at, data::text
  FROM payment_event_log WHERE payment_id = %s ORDER BY version
"""


class PaymentEvent(msgspec.Struct, frozen=True, kw_only=True):
    """One event; `position` is its place in the log, `version` its place in the payment.

    `data` is the event as it is stored: an object, unless it was damaged; null if it is not JSON.
    """

    position: int
    version: int
    type: str
    recorded_at: Annotated[datetime, msgspec.Meta(tz=True)]
    data: msgspec.Raw | None


class PaymentHistory(msgspec.Struct, frozen=True):
    """All events of a payment, oldest first."""

    events: list[PaymentEvent]


async def get_history(database: Database, payment_id: UUID, client: str | None) -> PaymentHistory:
    """The payment's events as of now, even if this version cannot fold them.

    `client` restricts the result to that API client's payments; None reads all. Raises
    PaymentNotFound or DatabaseUnavailable.
    """

    async def read(payment_id: UUID) -> PaymentHistory | None:
        rows = await database.fetch(HISTORY, [payment_id])
        if not rows or not belongs_to(client, payment_id, _stored(*rows[0])):
            return None
        return PaymentHistory([_event(*row) for row in rows])

    return await found(database, payment_id, client, read)


def _event(
    position: int, version: int, type: str, recorded_at: datetime, data: str | None
) -> PaymentEvent:
    return PaymentEvent(
        position=position, version=version, type=type, recorded_at=recorded_at, data=_raw(data)
    )


def _stored(
    position: int, version: int, type: str, recorded_at: datetime, data: str | None
) -> tuple[int, str, bytes]:
    """The version, type and bytes of the stored event."""
    return version, type, (data or "").encode()


def _raw(data: str | None) -> msgspec.Raw | None:
    """The text unchanged; None if it would make the whole response unreadable.

    Postgres accepts unpaired surrogates and deep nesting, which many decoders reject.
    """
    try:
        msgspec.json.decode(data or "")
    except (msgspec.MsgspecError, RecursionError):
        return None
    return msgspec.Raw((data or "").encode())
