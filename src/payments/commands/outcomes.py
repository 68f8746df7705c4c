"""Appending what a provider did: refused never, decided again when the stream has moved on.

A failover to a standby that lagged, or a restore, may take back what was acknowledged. A process
never discards what it knows: where the stream is shorter than what it has seen of it, the missing
events are appended again, byte for byte. Where something else stands there by now, it is decided
again what follows, and never forced.
"""

import asyncio
from collections.abc import Callable, Sequence
from functools import cache
from typing import NamedTuple

from eventsourcing.persistence import StoredEvent
from loguru import logger

from payments.errors import DatabaseUnavailable
from payments.event_store import EventStore, LoadedPayment
from payments.events.appender import CaptureTaken, ReferenceTaken, StreamConflict
from payments.events.facts import (
    PaymentActionRequired,
    PaymentCharged,
    PaymentReferenced,
    PaymentRefunded,
    ProviderOutcome,
    RefundFailed,
    RefundInitiated,
)
from payments.observability.logs import Repeats, log_money
from payments.observability.metrics import Telemetry
from payments.payment.decisions import OutcomeMismatch
from payments.payment.identity import is_of_unfulfilled
from payments.payment.state import Payment, evolve

RELOAD_PAUSE_S = 0.1

# What moves no money, and is no outcome yet.
_STEPS = (PaymentReferenced, PaymentActionRequired)

# What follows in a stream, None if all of it is recorded already; or it raises OutcomeMismatch.
Decide = Callable[[Payment], ProviderOutcome | RefundInitiated | None]


class Recorded(NamedTuple):
    """A payment, and the events that it was made from, as stored."""

    payment: Payment
    events: Sequence[StoredEvent]


class Outcomes:
    """Writes outcomes to the store, however long that takes."""

    def __init__(self, store: EventStore, telemetry: Telemetry) -> None:
        self._store = store
        # Looking up labels takes longer than counting.
        self._amounts = cache(telemetry.amounts.labels)

    async def append(
        self, payment: Payment, known: Sequence[StoredEvent], decide: Decide
    ) -> Recorded:
        """Appends what `decide` says of the payment, up to an outcome; the payment afterwards.

        `known` are the events that `payment` was made from. `decide` is asked again whenever
        another append came first, or the log went back. Raises what it raises; OutcomeMismatch also
        if another request stands under the payment's key by now, or another payment names the
        capture.
        """
        repeats = Repeats()
        while fact := decide(payment):
            try:
                event = await self._store.append(fact, after=known[-1])
            except (CaptureTaken, ReferenceTaken):
                raise _taken() from None
            except StreamConflict:
                payment, known = await self._as_it_stands(payment, known, repeats)
                continue
            payment, known = evolve(payment, fact), (*known, event)
            if isinstance(fact, _STEPS):
                break
            if not isinstance(fact, RefundInitiated):
                self._count(fact)
                _log(fact)
                break
        return Recorded(payment, known)

    async def _as_it_stands(
        self, payment: Payment, known: Sequence[StoredEvent], repeats: Repeats
    ) -> tuple[Payment, Sequence[StoredEvent]]:
        """The payment and its events in the log, with what the log lost of them appended again."""
        while True:
            loaded = await self._load(payment)
            stored = loaded.events if loaded is not None else ()
            if loaded is not None:
                if loaded.payment.fingerprint != payment.fingerprint:
                    raise OutcomeMismatch("the log holds another request under the same key")
                if len(stored) >= len(known) or stored != tuple(known[: len(stored)]):
                    return loaded.payment, stored
            missing = known[len(stored) :]
            message = "the log lacks acknowledged events; they are appended again"
            repeats.tell("CRITICAL", message, payment_id=payment.id, events=len(missing))
            try:
                await self._store.append_again(missing, after=stored[-1] if stored else None)
            except (CaptureTaken, ReferenceTaken):
                raise _taken() from None
            except StreamConflict:
                await asyncio.sleep(RELOAD_PAUSE_S)

    async def _load(self, payment: Payment) -> LoadedPayment | None:
        """The payment as it is stored now; waits out an outage of the database."""
        while True:
            try:
                return await self._store.load(payment.id)
            except DatabaseUnavailable:
                await asyncio.sleep(RELOAD_PAUSE_S)

    def _count(self, fact: ProviderOutcome) -> None:
        if isinstance(fact, PaymentCharged):
            self._amounts("captured", fact.currency).inc(fact.amount_cents)
        elif isinstance(fact, PaymentRefunded):
            self._amounts("refunded", fact.currency).inc(fact.amount_cents)


def _taken() -> OutcomeMismatch:
    return OutcomeMismatch("the provider's transaction or reference belongs to another payment")


def _log(fact: ProviderOutcome) -> None:
    """What the provider did or did not do is in the log, whatever the access log leaves out."""
    request = {} if fact.request_id is None else {"request_id": fact.request_id}
    log_money(
        fact.TOPIC,
        fact.traceparent,
        **request,
        payment_id=fact.payment_id,
        order_id=fact.merchant_order_id,
        event_id=fact.event_id,
        amount_cents=fact.amount_cents,
        currency=fact.currency,
    )
    if isinstance(fact, RefundFailed) and is_of_unfulfilled(fact.payment_id, fact.refund_id):
        logger.bind(payment_id=fact.payment_id, decline_code=fact.decline_code).error(
            "the provider declined an automatic refund, which is not retried: refund the payment "
            "manually, or return the money in another way"
        )
