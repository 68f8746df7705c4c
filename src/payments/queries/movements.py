"""Movements of money: each capture and refund that the provider carried out, from the log."""

from collections.abc import Iterator, Sequence
from datetime import datetime
from typing import Literal, NamedTuple
from uuid import UUID

from payments.events.facts import (
    Fact,
    LateCaptureFound,
    LateCaptureReturned,
    PaymentCharged,
    PaymentInitiated,
    PaymentRefunded,
    RefundInitiated,
    UndecodableEvent,
)
from payments.events.store import fact_at, fact_of
from payments.queries.log import Replay, Sealed

Moved = PaymentCharged | LateCaptureFound | PaymentRefunded | LateCaptureReturned
MOVEMENTS = [fact.TOPIC for fact in (PaymentCharged, LateCaptureFound)]
MOVEMENTS += [fact.TOPIC for fact in (PaymentRefunded, LateCaptureReturned)]

# A charge by its payment's id, a refund by its own id too.
Asked = dict[tuple[UUID, UUID | None], PaymentInitiated | RefundInitiated]


class Movement(NamedTuple):
    """A capture or a refund. `client` and `key` are those of its request, None if that cannot be
    read, or if there is none: the return of a late capture. `provider_id` is the provider's id."""

    recorded_at: datetime | None
    order_id: UUID
    payment_id: UUID
    kind: Literal["charge", "refund"]
    amount_cents: int
    currency: str
    provider_id: str
    refund_id: UUID | None
    client: str | None
    key: str | None


class UnreadableMovement(NamedTuple):
    """An unreadable event that moved money."""

    position: int


def movements(log: Replay) -> Iterator[list[Movement | UnreadableMovement]]:
    """The movements of a replay that wants MOVEMENTS, part by part.

    Imported events are left out: their money moved in another service.
    """
    for part in log.parts():
        asked = _asked_for(log, list({event.payment_id for event, _ in part}))
        moved = (_movement(found, asked) for found in part)
        yield [movement for movement in moved if movement is not None]


def _asked_for(log: Replay, payment_ids: Sequence[UUID]) -> Asked:
    asked: Asked = {}
    for row in log.asked_for(payment_ids):
        try:
            fact = fact_at(*row)
        except UndecodableEvent:
            continue
        if isinstance(fact, PaymentInitiated):
            asked[fact.payment_id, None] = fact
        elif isinstance(fact, RefundInitiated):
            asked[fact.payment_id, fact.refund_id] = fact
    return asked


def _movement(found: Sealed, asked: Asked) -> Movement | UnreadableMovement | None:
    event = found.event
    try:
        fact: Fact = fact_of(event)
    except UndecodableEvent:
        return UnreadableMovement(event.position)
    assert isinstance(fact, Moved)
    if fact.imported is True:
        return None
    kind: Literal["charge", "refund"] = "charge"
    refund_id = None
    if isinstance(fact, PaymentCharged | LateCaptureFound):
        provider_id = fact.provider_txn_id
    else:
        kind, refund_id, provider_id = "refund", fact.refund_id, fact.provider_refund_id
    request = asked.get((fact.payment_id, refund_id))
    client = request.client if request is not None else None
    if isinstance(fact, LateCaptureReturned):
        client = fact.client
    return Movement(
        recorded_at=event.recorded_at,
        order_id=fact.merchant_order_id,
        payment_id=fact.payment_id,
        kind=kind,
        amount_cents=fact.amount_cents,
        currency=fact.currency,
        provider_id=provider_id,
        refund_id=refund_id,
        client=client,
        key=request.idempotency_key if request is not None else None,
    )
