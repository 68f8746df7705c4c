"""The history of one payment in words: its stored events and callbacks."""

from collections.abc import Iterator
from datetime import UTC, datetime
from typing import Annotated
from uuid import UUID

import msgspec
from msgspec import UnsetType

from payments.clients import DISPATCHER
from payments.database.connections import Database
from payments.errors import PaymentUnreadable
from payments.event_store import fold_stored
from payments.events.facts import (
    Fact,
    LateCaptureFound,
    LateCaptureReturned,
    Legacy,
    PaymentActionRequired,
    PaymentCharged,
    PaymentFailed,
    PaymentInitiated,
    PaymentReferenced,
    PaymentRefunded,
    RefundFailed,
    RefundInitiated,
    UndecodableEvent,
)
from payments.events.store import LOAD_ENTRIES, LogEntry, fact_of
from payments.legacy import key_of_none
from payments.money import amount_text
from payments.payment.state import Payment
from payments.queries.callbacks import Attempt, Delivery, attempts, deliveries_of_payment, text_of
from payments.queries.fulfilments import FulfilmentView, fulfilment_of
from payments.queries.payments import found


class Entry(msgspec.Struct, frozen=True, kw_only=True):
    """One entry of the history. `at`: for events the application's time, else the database's.

    `by`: the API client, `settling`, or for callbacks `dispatcher`; None if it cannot be read.
    `position` is that of the event; None for callbacks.
    """

    at: Annotated[datetime, msgspec.Meta(tz=True)]
    kind: str
    by: str | None
    text: str
    position: int | None = None
    request_id: str | None = None


class Explanation(msgspec.Struct, frozen=True):
    """The history of a payment, oldest first. `state` is the payment's state in words; `fulfilment`
    says why its order may not be fulfilled, None if there is no such reason."""

    payment_id: UUID
    state: str
    entries: list[Entry]
    fulfilment: FulfilmentView | None


async def explain(database: Database, payment_id: UUID) -> Explanation:
    """Raises PaymentNotFound or DatabaseUnavailable. Unreadable events are listed as such."""

    async def read(payment_id: UUID) -> list[LogEntry] | None:
        rows = await database.fetch(LOAD_ENTRIES, [payment_id])
        return [LogEntry(*row) for row in rows] or None

    events = await found(database, payment_id, None, read)
    payment_id = events[0].payment_id
    deliveries = await deliveries_of_payment(database, payment_id)
    made = await attempts(database, [delivery.event_id for delivery in deliveries])
    entries = [_of_event(event) for event in events]
    for delivery in deliveries:
        of_it = [attempt for attempt in made if attempt.event_id == delivery.event_id]
        entries += _of_delivery(delivery, of_it)
    entries.sort(key=lambda entry: entry.at)  # stable: events keep their order
    fulfilment = await fulfilment_of(database, payment_id)
    return Explanation(payment_id, _state(payment_id, events), entries, fulfilment)


def summary(event: LogEntry) -> str:
    """An event in a few words."""
    try:
        return _words(fact_of(event))
    except UndecodableEvent as error:
        return f"cannot be read: {error}"


def time_text(time: datetime | None) -> str:
    """UTC with microseconds, as in the log."""
    if time is None:
        return "-"
    return f"{time.astimezone(UTC):%Y-%m-%dT%H:%M:%S.%f}Z"


def fulfilment_text(found: FulfilmentView) -> str:
    """The known facts about the order, in a line."""
    parts = [
        f"order: {_FULFILMENTS[found.state]}",
        f"found {time_text(found.found_at)}",
        f"the response to its SUCCESS: {found.said}",
        None if found.order_status is None else f"status: {found.order_status}",
        None if found.problem is None else f"status not known: {found.problem}",
        "status not requested yet"
        if found.checked_at is None
        else f"status requested {time_text(found.checked_at)}",
        None if found.given_back_at is None else f"given back {time_text(found.given_back_at)}",
    ]
    return ", ".join(part for part in parts if part)


def _of_event(event: LogEntry) -> Entry:
    try:
        fact = fact_of(event)
    except UndecodableEvent as error:
        text = f"cannot be read: {error}"
        return Entry(
            at=event.recorded_at, kind=event.topic, by=None, text=text, position=event.position
        )
    return Entry(
        at=fact.occurred_at,
        kind=fact.TOPIC,
        by=fact.client,
        text=_words(fact),
        position=event.position,
        request_id=fact.request_id,
    )


def _words(fact: Fact) -> str:
    if (imported := _imported_words(fact)) is not None:
        return imported
    match fact:
        case PaymentInitiated():
            until = fact.hold_until
            held = "" if isinstance(until, UnsetType) else f", seats held until {time_text(until)}"
            reference = fact.provider_reference
            known = "" if isinstance(reference, UnsetType) else f", where it is {reference}"
            return (
                f"charge of {_amount(fact)} requested with the key {fact.idempotency_key}, for the "
                f"order {fact.merchant_order_id}, at the provider {fact.gateway}{known}{held}"
            )
        case PaymentCharged():
            return f"the provider captured {_amount(fact)} as {fact.provider_txn_id}"
        case PaymentFailed(reason="declined"):
            return f"the provider declined {_amount(fact)}: {fact.decline_code}"
        case PaymentFailed():
            return f"abandoned: the provider does not know the charge of {_amount(fact)}"
        case RefundInitiated():
            key = f"the key {fact.idempotency_key}" if fact.idempotency_key else "no key"
            whole = ", the remaining amount" if fact.whole else ""
            return f"refund {fact.refund_id} of {_amount(fact)}{whole} requested with {key}"
        case PaymentRefunded():
            given, captured = (
                amount_text(cents, fact.currency)
                for cents in (fact.refunded_cents, fact.captured_cents)
            )
            return (
                f"the provider refunded {_amount(fact)} as {fact.provider_refund_id}, for the "
                f"refund {fact.refund_id}; in total {given} of {captured}"
            )
        case RefundFailed():
            return (
                f"the provider declined the refund {fact.refund_id} of {_amount(fact)}: "
                f"{fact.decline_code}"
            )
        case PaymentReferenced():
            return f"the provider prepared the charge as {fact.provider_reference}"
        case PaymentActionRequired():
            return f"the customer has to act before the provider captures ({fact.kind})"
        case LateCaptureFound():
            return (
                f"the provider captured {_amount(fact)} after all, as {fact.provider_txn_id}; "
                f"it is returned as the refund {fact.refund_id}"
            )
        case LateCaptureReturned():
            return f"the provider returned {_amount(fact)} as {fact.provider_refund_id}"
    return fact.TOPIC


def _imported_words(fact: Fact) -> str | None:
    """The words for an imported event; None for other events."""
    match fact:
        case PaymentInitiated(legacy=Legacy(id=legacy_id)):
            key = fact.idempotency_key
            text = "no key" if key == key_of_none(legacy_id) else f"the key {key}"
            return (
                f"imported: charge of {_amount(fact)} with {text}, for the order "
                f"{fact.merchant_order_id}, at the provider {fact.gateway}; its id was {legacy_id}"
            )
        case PaymentCharged(imported=True, provider_txn_id=""):
            return f"imported: {_amount(fact)} captured, without the provider's id of it"
        case PaymentFailed(imported=True):
            return f"imported: {_amount(fact)} not captured; the reason is not on record"
        case PaymentRefunded(imported=True):
            return f"imported: {_amount(fact)} refunded, without the provider's id of it"
    return None


def _amount(fact: Fact) -> str:
    return amount_text(fact.amount_cents, fact.currency)  # type: ignore[attr-defined]


def _of_delivery(delivery: Delivery, made: list[Attempt]) -> Iterator[Entry]:
    status = f"callback {delivery.event_id} ({delivery.status})"
    yield Entry(
        at=delivery.enqueued_at,
        kind="callback",
        by=DISPATCHER,
        text=f"{status}: to be sent to Order Service",
    )
    for number, attempt in enumerate(made, 1):
        answer = text_of(attempt.answer)
        parts = [
            f"{status}: attempt {number}, {attempt.outcome}",
            None if attempt.status is None else f"HTTP {attempt.status}",
            None if attempt.seconds is None else f"after {attempt.seconds * 1000:.0f} ms",
            attempt.reason,
            None if not answer else f"response: {answer[:200]}",
        ]
        text = ", ".join(part for part in parts if part)
        yield Entry(at=attempt.started_at, kind="attempt", by=DISPATCHER, text=text)
    if delivery.state == "due":
        now = delivery.next_at or delivery.enqueued_at
        text = f"{status}: not delivered yet, next attempt at {time_text(now)}"
        yield Entry(at=datetime.now(UTC), kind="due", by=DISPATCHER, text=text)
    elif delivery.state != "delivered" and delivery.finished_at is not None:
        yield Entry(
            at=delivery.finished_at,
            kind=delivery.state,
            by=DISPATCHER,
            text=f"{status}: {_end(delivery)}",
        )


def _end(delivery: Delivery) -> str:
    if (delivery.status, delivery.state) == ("ACTION_REQUIRED", "superseded"):
        return "not sent, since its payment has an outcome or its order is paid"
    return _ENDS[delivery.state]


_ENDS = {
    "dead": "dead, until it is redriven with `payments callbacks redrive`",
    "superseded": "not sent, since its order was paid",
    "excluded": "not sent: not in ORDER_CALLBACK_STATUSES, refunded by the service itself, or "
    "imported",
}


_FULFILMENTS = {
    "suspect": "whether it was fulfilled is not known",
    "unfulfilled": "paid, but not fulfilled",
    "paid_twice": "fulfilled for another payment, but also paid by this one",
    "given_back": "not fulfilled, and the service refunded the payment",
}


def _state(payment_id: UUID, events: list[LogEntry]) -> str:
    try:
        payment = fold_stored(payment_id, (event[2:5] for event in events))
    except PaymentUnreadable as error:
        return str(error)
    return _state_of(payment)


def _state_of(payment: Payment) -> str:
    text = f"{payment.status}, {amount_text(payment.amount_cents, payment.currency)}"
    if payment.awaits_action:
        text += ", waiting for the customer to act"
    if payment.refunded_cents:
        text += f", {amount_text(payment.refunded_cents, payment.currency)} refunded"
    if payment.reserved_cents:
        text += f", {amount_text(payment.reserved_cents, payment.currency)} being refunded"
    return f"{text}, order {payment.merchant_order_id}"
