"""Finding out what became of payments and refunds that were left open.

A crash, a silent provider or a missed deadline leaves a payment PENDING, or a refund under way. The
projector lists them (unsettled.py); this asks the provider, one process at a time per payment, and
appends what it says. Charges are only asked about, never sent; refunds are sent again while that is
safe. docs/decisions/settling.md has the rules and why.
"""

import asyncio
import time
from collections.abc import Callable

from loguru import logger

from payments.commands.recording import Recorder
from payments.commands.refund import ask_again, provider_refund
from payments.commands.runs import cause
from payments.database import Database
from payments.deciding import (
    Cause,
    OutcomeMismatch,
    abandon,
    record_outcome,
    record_refund,
    record_return,
)
from payments.errors import DatabaseUnavailable, PaymentUnreadable
from payments.events.appender import Appender
from payments.events.store import LoadedPayment, load_payment
from payments.gateways import Gateway, NeverSent, OutcomeUnknown, ProviderRefund
from payments.payment import Payment, Refund, Status
from payments.settings import Settings
from payments.telemetry import Telemetry
from payments.unsettled import Claim, claim, forget, postpone

CLIENT = "settling"  # who asks, in the events that settling causes
CONCURRENCY_MAX = 32  # payments asked about at once, by one process
CALLS_MAX = 3  # an attempt has the time of so many calls that all time out; then it sends no more
LEASE_MARGIN_S = 2.0  # for reading and appending; after a crash another process waits for the lease
POLL_S = 0.5
# Between two attempts: 1 s, doubling. A customer waits for a PENDING payment.
CHARGE_PAUSE_MAX_S = 60.0
PAUSE_MAX_S = 900.0
LATE_CAPTURE_S = 24 * 3600.0  # however soon a gateway says that no capture can come any more


def pause_s(attempts: int, kind: str) -> float:
    """How long to wait after so many attempts."""
    most = CHARGE_PAUSE_MAX_S if kind == "charge" else PAUSE_MAX_S
    return min(2.0 ** min(attempts - 1, 20), most)


class Settling:
    """Settles what is due. Several processes share the work."""

    def __init__(
        self,
        appender: Appender,
        database: Database,
        gateway: Gateway,
        telemetry: Telemetry,
        settings: Settings,
    ) -> None:
        self._recorder = Recorder(appender, database)
        self._database = database
        self._gateway = gateway
        self._telemetry = telemetry
        self._deadline_s = settings.charge_deadline_s
        self._gateway_timeout_s = settings.gateway_timeout_s
        self._attempt_s = CALLS_MAX * settings.gateway_timeout_s
        self._abandon_after_s = settings.pending_abandon_after_s
        self._late_capture_s = max(LATE_CAPTURE_S, gateway.late_capture_s)
        self._tasks: set[asyncio.Task[None]] = set()
        self._loop: asyncio.Task[None] | None = None

    def start(self) -> None:
        self._loop = asyncio.create_task(self._run(), name="settling")

    async def stop(self, timeout_s: float) -> None:
        """Claims nothing more and waits a while for what is under way. What is cut off then is
        asked about again once its lease is over."""
        if self._loop is not None:
            self._loop.cancel()
            await asyncio.wait({self._loop})
        if self._tasks:
            await asyncio.wait(self._tasks, timeout=timeout_s)
        for task in self._tasks:
            task.cancel()
        if self._tasks:
            await asyncio.wait(self._tasks, timeout=0.5)

    async def run_once(self) -> int:
        """Settles what is due; returns how many payments it tried."""
        tasks = await self._begin_due()
        await asyncio.gather(*tasks)
        return len(tasks)

    async def _run(self) -> None:
        while True:
            try:
                begun = await self._begin_due()
            except DatabaseUnavailable:
                begun = []
            except Exception:  # noqa: BLE001 - whatever it is, payments must not stay open for it
                logger.exception("settling could not look for work")
                begun = []
            free = len(self._tasks) < CONCURRENCY_MAX
            await asyncio.sleep(0 if begun and free else POLL_S)

    async def _begin_due(self) -> list[asyncio.Task[None]]:
        free = CONCURRENCY_MAX - len(self._tasks)
        claims = await claim(self._database, free, self._attempt_s + LEASE_MARGIN_S) if free else []
        tasks = [asyncio.create_task(self._settle(each), name="settle") for each in claims]
        for task in tasks:
            self._tasks.add(task)
            task.add_done_callback(self._tasks.discard)
        return tasks

    async def _settle(self, claimed: Claim) -> None:
        """One attempt; afterwards the row is due again, or gone."""
        log = logger.bind(payment_id=claimed.payment_id, attempts=claimed.attempts)
        wait_s: float | None = pause_s(claimed.attempts, "refund")
        try:
            loaded = await load_payment(self._database, claimed.payment_id)
            wait_s = loaded and await self._attempt(loaded, claimed.attempts)
        except (DatabaseUnavailable, PaymentUnreadable) as error:
            log.bind(reason=error.code).warning("cannot be settled now")
        except Exception:
            log.exception("cannot be settled now")
        try:
            if wait_s is None:
                await forget(self._database, claimed)
            else:
                await postpone(self._database, claimed, wait_s)
        except DatabaseUnavailable:
            pass  # then it is due when its lease is over

    async def _attempt(self, loaded: LoadedPayment, attempts: int) -> float | None:
        """How long to wait for the next attempt; None if nothing is left to ask about."""
        payment = loaded.payment
        unsettled = payment.unsettled
        if unsettled is None:
            return None
        if unsettled.kind == "abandoned" and loaded.age_s() > self._late_capture_s:
            return None
        log = logger.bind(payment_id=payment.id, kind=unsettled.kind, attempts=attempts)
        wait_s = pause_s(attempts, unsettled.kind)
        if payment.gateway != self._gateway.name:
            log.bind(gateway=payment.gateway).critical("begun with another provider")
            return wait_s
        outcome = "unknown"
        try:
            payment = await self._ask(loaded, attempts)
            outcome = "settled" if payment.unsettled is None else "open"
        except (OutcomeUnknown, NeverSent) as error:
            log.bind(reason=str(error)).info("the provider's outcome is not known yet")
        except OutcomeMismatch as error:
            outcome = "mismatch"
            log.bind(reason=str(error)).critical("the provider's answer does not fit")
        self._telemetry.settling[unsettled.kind, outcome].inc()
        if unsettled.kind == "charge" and payment.status is Status.PENDING:
            until_abandoned = self._abandon_after_s - loaded.age_s()
            wait_s = min(wait_s, max(1.0, until_abandoned))
        if payment.version > loaded.payment.version:
            log.bind(status=payment.status, failure=payment.failure).info("settled")
        return wait_s

    async def _ask(self, loaded: LoadedPayment, attempts: int) -> Payment:
        """Asks about everything that is open; the payment afterwards."""
        give_up_at = time.monotonic() + self._attempt_s

        def timeout_s() -> float:
            """Looked at before each call: a process that was frozen must not send late."""
            if time.monotonic() > give_up_at:
                raise OutcomeUnknown("this attempt has taken too long")
            return self._gateway_timeout_s

        payment = loaded.payment
        if payment.provider_txn_id is None and payment.late_capture is None:
            payment = await self._find_capture(loaded, timeout_s)
        if payment.late_capture is not None:
            payment = await self._return_late_capture(loaded, payment, timeout_s)
        under_way = [
            refund
            for refund in loaded.payment.refunds
            if refund.status is Status.PENDING and loaded.age_s(refund.version) > self._deadline_s
        ]
        # One refund that nobody knows of must not hold up the others, nor use up their time.
        first = attempts % len(under_way) if under_way else 0
        failure: Exception | None = None
        for refund in under_way[first:] + under_way[:first]:
            try:
                payment = await self._settle_refund(loaded, payment, refund, timeout_s)
            except (OutcomeUnknown, NeverSent, OutcomeMismatch) as error:
                failure = error
        if failure is not None:
            raise failure
        return payment

    async def _find_capture(self, loaded: LoadedPayment, timeout_s: Callable[[], float]) -> Payment:
        payment = loaded.payment
        found = await self._gateway.find_charge(payment.id, timeout_s())
        if found is not None:
            return await self._recorder.record(
                payment, lambda payment: record_outcome(payment, found, _cause())
            )
        if loaded.age_s() < self._abandon_after_s:
            return payment
        return await self._recorder.record(payment, lambda payment: abandon(payment, _cause()))

    async def _return_late_capture(
        self, loaded: LoadedPayment, payment: Payment, timeout_s: Callable[[], float]
    ) -> Payment:
        found = payment.late_capture
        assert found is not None
        if found.provider_refund_id is not None:
            return payment
        logger.bind(payment_id=payment.id).warning("a late capture goes back")
        order = ProviderRefund(
            found.refund_id,
            payment.id,
            found.provider_txn_id,
            payment.amount_cents,
            payment.currency,
        )
        age_s = _age_s(loaded, found.version)
        outcome = await ask_again(self._gateway, order, age_s, timeout_s)
        return await self._recorder.record(
            payment, lambda payment: record_return(payment, outcome, _cause())
        )

    async def _settle_refund(
        self,
        loaded: LoadedPayment,
        payment: Payment,
        refund: Refund,
        timeout_s: Callable[[], float],
    ) -> Payment:
        age_s = _age_s(loaded, refund.version)
        order = provider_refund(payment, refund)
        outcome = await ask_again(self._gateway, order, age_s, timeout_s)
        return await self._recorder.record(
            payment, lambda payment: record_refund(payment, refund, outcome, _cause())
        )


def _age_s(loaded: LoadedPayment, version: int) -> float:
    """How old an event is; one that was appended since the stream was read is new."""
    return loaded.age_s(version) if version <= len(loaded.recorded_at) else 0.0


def _cause() -> Cause:
    return cause(CLIENT)
