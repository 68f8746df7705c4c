"""Appending what a provider did: refused never, decided again when the stream has moved on."""

import asyncio
from collections.abc import Callable

from payments.database import Database
from payments.errors import DatabaseUnavailable
from payments.events.appender import Appender, StreamConflict
from payments.events.facts import PaymentCharged, PaymentRefunded, ProviderOutcome
from payments.events.store import load_payment, to_stored_event
from payments.logs import log_money
from payments.payment import Payment, evolve
from payments.telemetry import Telemetry
from payments.tracing import span

RELOAD_PAUSE_S = 0.1


class Recorder:
    """Writes outcomes to the store, however long that takes."""

    def __init__(self, appender: Appender, database: Database, telemetry: Telemetry) -> None:
        self._appender = appender
        self._database = database
        self._telemetry = telemetry

    async def record(
        self, payment: Payment, decide: Callable[[Payment], ProviderOutcome | None]
    ) -> Payment:
        """Appends what `decide` says of the payment; the payment afterwards.

        `decide` is asked again whenever another append came first; None means that it is recorded
        already. Raises what `decide` raises.
        """
        while fact := decide(payment):
            try:
                with span("append", event=fact.TOPIC):
                    await self._appender.append([to_stored_event(fact)])
            except StreamConflict:
                payment = await self._reload(payment)
            else:
                self._count(fact)
                _log(fact)
                return evolve(payment, fact)
        return payment

    def _count(self, fact: ProviderOutcome) -> None:
        if isinstance(fact, PaymentCharged):
            self._telemetry.amounts["captured", fact.currency].inc(fact.amount_cents)
        elif isinstance(fact, PaymentRefunded):
            self._telemetry.amounts["refunded", fact.currency].inc(fact.amount_cents)

    async def _reload(self, payment: Payment) -> Payment:
        """The payment as it is stored now; waits out an outage of the database."""
        while True:
            try:
                loaded = await load_payment(self._database, payment.id)
            except DatabaseUnavailable:
                await asyncio.sleep(RELOAD_PAUSE_S)
                continue
            assert loaded is not None
            return loaded.payment


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
