"""Charge a payment exactly once per idempotency key.

    intent appended -> provider asked -> outcome appended -> answered

A run is one passage through these steps. It is a task of the service, not of the request: a client
that goes away, or a deadline that passes, cancels neither an append nor a provider call, and a late
outcome is still appended. Once the provider may have been asked, the answer is the outcome or
PENDING, never an error: an error would make the caller drop an order that was paid for.
"""

import asyncio
import math
import time
import uuid
from collections.abc import Awaitable, Callable
from datetime import UTC, datetime
from typing import Any

import msgspec
from loguru import logger

from payments.database import Database
from payments.errors import (
    DatabaseUnavailable,
    GatewayUnavailable,
    IdempotencyKeyReused,
    PaymentsError,
    PaymentUnreadable,
    TooBusy,
)
from payments.events import facts
from payments.events.appender import Appender, StreamConflict
from payments.events.facts import PaymentInitiated, UndecodableEvent
from payments.events.store import load_payment, to_stored_event
from payments.gateways import Gateway, NeverSent, OutcomeUnknown, ProviderCharge
from payments.payment import (
    Approved,
    Cause,
    ChargeRequest,
    Declined,
    OutcomeMismatch,
    Payment,
    Status,
    UnexpectedEvent,
    differing_fields,
    evolve,
    initiate,
    payment_id_for,
    record_outcome,
)
from payments.settings import Settings
from payments.telemetry import Telemetry

# How long an answer waits for its outcome to be stored, after which it is PENDING: design, "with
# Postgres down or frozen each request is answered in under 3 s".
OUTCOME_STORE_PATIENCE_S = 2.0
# How often it is looked whether a request's time is up.
WATCH_S = 0.05
# How often a request looks whether another process has finished its run.
OTHER_RUN_POLL_S = 0.1


class ChargePayment(msgspec.Struct, frozen=True):
    """The command: the request, and where it came from (for the events' metadata)."""

    request: ChargeRequest
    request_id: str | None = None
    traceparent: str | None = None


class Charged(msgspec.Struct, frozen=True):
    """The answer: the payment with its first outcome, or PENDING.

    `replayed` says that an earlier request began it, finished or not.
    """

    payment: Payment
    replayed: bool = False


class _Run:
    """A charge under way in this process, and everyone who waits for its answer."""

    def __init__(self, command: ChargePayment, deadline: float) -> None:
        self.command = command
        self.deadline = deadline
        # When whoever waits gets an answer in any case: the deadline, or sooner.
        self.answer_by = self.deadline
        self.answer: Charged | Exception | None = None
        # The payment as it is stored, and stored for this very request.
        self.payment: Payment | None = None
        # The provider may have been asked for it, by this run or by an earlier one.
        self.asked = False
        # The intent was stored by an earlier request, this long ago.
        self.replayed = False
        self.age_s = 0.0
        self.task: asyncio.Task[None] | None = None
        self._waiters: list[asyncio.Future[Charged]] = []

    async def wait(self) -> Charged:
        """The answer. Each request waits on a future of its own, so one that goes away takes
        nobody with it."""
        waiter: asyncio.Future[Charged] = asyncio.get_running_loop().create_future()
        self._waiters.append(waiter)
        self._tell()
        return await waiter

    def finish(self, payment: Payment) -> None:
        if self.answer is None:
            self.answer = Charged(payment, self.replayed)
            self._tell()

    def fail(self, error: Exception) -> None:
        """Tells waiting requests of an error, or PENDING if the provider may have been asked."""
        if self.asked and self.payment is not None:
            self.finish(self.payment)
        elif self.answer is None:
            self.answer = error
            self._tell()

    def _tell(self) -> None:
        if self.answer is None:
            return
        for waiter in self._waiters:
            if waiter.done():
                continue
            if isinstance(self.answer, Exception):
                waiter.set_exception(self.answer)
            else:
                waiter.set_result(self.answer)
        self._waiters.clear()

    def may_ask(self) -> bool:
        """Looked at immediately before each provider call: a process that was frozen must not send
        late, and nothing may be sent for a request that was told 503."""
        return self.answer is None and time.monotonic() < self.deadline

    def cause(self) -> Cause:
        return Cause(
            event_id=uuid.uuid4(),
            occurred_at=datetime.now(UTC),
            client=self.command.request.client,
            request_id=self.command.request_id,
            traceparent=self.command.traceparent,
        )

    def log(self) -> Any:
        payment_id = payment_id_for(self.command.request.idempotency_key)
        return logger.bind(payment_id=payment_id, request_id=self.command.request_id)


class Charging:
    """Runs charges. One instance per process; any number of processes may share the store."""

    def __init__(
        self,
        appender: Appender,
        database: Database,
        gateway: Gateway,
        telemetry: Telemetry,
        settings: Settings,
    ) -> None:
        self._appender = appender
        self._database = database
        self._gateway = gateway
        self._telemetry = telemetry
        self._deadline_s = settings.charge_deadline_s
        self._gateway_timeout_s = settings.gateway_timeout_s
        self._gateway_slots = asyncio.Semaphore(settings.gateway_concurrency_max)
        # By the whole request: another request with the same key is another run, and the store's
        # version check decides between them.
        self._runs: dict[ChargeRequest, _Run] = {}
        # As many as may be with the provider, and a queue before it.
        self._runs_max = settings.gateway_concurrency_max + settings.intent_queue_max
        self._stop_by = math.inf
        self._tasks: set[asyncio.Task[None]] = set()
        self._watching: asyncio.TimerHandle | None = None

    async def charge(self, command: ChargePayment) -> Charged:
        """Charges, or joins or repeats the charge that this key already began.

        Raises IdempotencyKeyReused, or Unavailable if the provider was surely not asked.
        """
        try:
            charged = await self._charge(command, time.monotonic() + self._deadline_s)
        except PaymentsError as error:
            refused = isinstance(error, IdempotencyKeyReused)
            self._telemetry.charges["refused" if refused else "unavailable"].inc()
            raise
        pending = charged.payment.status is Status.PENDING
        outcome = "replayed" if charged.replayed and not pending else charged.payment.status.lower()
        self._telemetry.charges[outcome].inc()
        return charged

    async def _charge(self, command: ChargePayment, deadline: float) -> Charged:
        run = self._runs.get(command.request)
        while run is not None and run.answer is not None and run.task is not None:
            # Its requests were told PENDING, but it still goes on: this one waits for its end.
            left_s = min(deadline, self._stop_by) - time.monotonic()
            done, _ = await asyncio.wait({run.task}, timeout=max(0, left_s))
            if not done:
                break
            run = self._runs.get(command.request)
        if run is None:
            if len(self._runs) >= self._runs_max:
                raise TooBusy("Too many charges are under way.")
            return await self._start(command, deadline).wait()
        return Charged((await run.wait()).payment, replayed=True)

    def hurry(self, within_s: float) -> None:
        """Every request, of now or to come, is answered by then: the service is stopping."""
        self._stop_by = time.monotonic() + within_s
        for run in self._runs.values():
            run.answer_by = min(run.answer_by, self._stop_by)

    async def drain(self, timeout_s: float) -> None:
        """Waits for the runs that go on although their requests were answered."""
        if self._tasks:
            await asyncio.wait(self._tasks, timeout=timeout_s)
        for task in self._tasks:
            task.cancel()
        if self._tasks:
            logger.bind(charges=len(self._tasks)).warning("stopping with unfinished charges")
            await asyncio.wait(self._tasks, timeout=0.5)

    def _start(self, command: ChargePayment, deadline: float) -> _Run:
        run = self._runs[command.request] = _Run(command, deadline)
        run.answer_by = min(run.answer_by, self._stop_by)
        run.task = asyncio.create_task(self._run(run), name="charge")
        self._tasks.add(run.task)
        run.task.add_done_callback(self._tasks.discard)
        if self._watching is None:
            self._watch()
        return run

    def _watch(self) -> None:
        """Answers the requests whose time is up; one timer for all runs."""
        now = time.monotonic()
        for run in self._runs.values():
            if now >= run.answer_by:
                run.fail(TooBusy("The charge did not get its turn in time."))
        loop = asyncio.get_running_loop()
        self._watching = loop.call_later(WATCH_S, self._watch) if self._runs else None

    async def _run(self, run: _Run) -> None:
        try:
            payment = await self._begin(run)
            if payment is not None:
                await self._record(run, payment, await self._ask(run, payment))
        except (PaymentsError, OutcomeUnknown) as error:
            run.fail(error)
        except OutcomeMismatch as error:
            self._telemetry.gateway_calls["charge", "mismatch"].inc()
            run.log().bind(reason=str(error)).critical("the provider's answer does not fit")
            run.fail(error)
        except asyncio.CancelledError:
            run.fail(DatabaseUnavailable("The service is stopping."))
            raise
        except Exception as error:  # noqa: BLE001 - whoever waits must hear of it, whatever it is
            run.log().exception("charge failed")
            run.fail(error)
        finally:
            # Whatever way the run ended, nobody waits for ever.
            run.fail(TooBusy("The charge did not get its turn in time."))
            del self._runs[run.command.request]

    async def _begin(self, run: _Run) -> Payment | None:
        """Makes the intent durable; the payment to charge, None if there is nothing left to do."""
        intent = initiate(run.command.request, self._gateway.name, run.cause())
        payment = evolve(None, intent)
        try:
            await self._appender.append_intent(to_stored_event(intent))
        except StreamConflict as conflict:
            begun = _begun(conflict.first_state)
            if differing := differing_fields(begun, run.command.request):
                raise IdempotencyKeyReused(differing) from None
            # An earlier run may have asked: from here on errors are answered with PENDING.
            run.payment, run.asked, run.replayed = begun, True, True
            return await self._resume(run, payment.id)
        run.payment = payment
        return payment

    async def _resume(self, run: _Run, payment_id: uuid.UUID) -> Payment | None:
        """Finds what an earlier request with this key came to; the payment if its run is over.

        A run is over when its intent is older than the deadline, by the database's clock.
        """
        while True:
            loaded = await load_payment(self._database, payment_id)
            if loaded is None:
                raise RuntimeError("the store reported a conflict in a stream without events")
            run.payment, run.age_s = loaded.payment, loaded.age_s
            if loaded.payment.status is not Status.PENDING:
                run.finish(loaded.payment)
                return None
            if loaded.age_s > self._deadline_s:
                return loaded.payment
            if not run.may_ask():
                run.finish(loaded.payment)
                return None
            await asyncio.sleep(OTHER_RUN_POLL_S)

    async def _ask(self, run: _Run, payment: Payment) -> Approved | Declined:
        """The provider's outcome. Raises OutcomeUnknown, or Unavailable if it was not asked."""
        if payment.gateway != self._gateway.name:
            run.log().bind(gateway=payment.gateway).critical("begun with another provider")
            raise OutcomeUnknown("only the provider that was asked knows")
        async with self._gateway_slots:
            if run.replayed:
                # An earlier run may have charged: look before sending again.
                found = await self._call(
                    run, "find_charge", lambda left_s: self._gateway.find_charge(payment.id, left_s)
                )
                if found is not None:
                    return found
                if run.age_s > self._gateway.safe_retry_s:
                    raise OutcomeUnknown("too old to be sent again under the same provider key")
            order = ProviderCharge(
                payment.id,
                payment.amount_cents,
                payment.currency,
                run.command.request.payment_method,
            )
            outcome = await self._call(
                run, "charge", lambda left_s: self._gateway.charge(order, left_s)
            )
            assert outcome is not None
            return outcome

    async def _call(
        self,
        run: _Run,
        operation: str,
        call: Callable[[float], Awaitable[Approved | Declined | None]],
    ) -> Approved | Declined | None:
        """One call of the provider, counted and timed, with what is left of the deadline."""
        if not run.may_ask():
            raise TooBusy("The charge did not get its turn in time.")
        timeout_s = min(self._gateway_timeout_s, run.deadline - time.monotonic())
        run.asked = True
        outcome = "unknown"
        try:
            started = time.perf_counter()
            answer = await call(timeout_s)
            self._telemetry.gateway_seconds[operation].observe(time.perf_counter() - started)
            outcome = _OUTCOME_LABELS[type(answer)]
        except NeverSent as error:
            outcome = "never_sent"
            run.asked = run.replayed
            raise GatewayUnavailable("The payment provider cannot be reached.") from error
        finally:
            self._telemetry.gateway_calls[operation, outcome].inc()
        return answer

    async def _record(self, run: _Run, payment: Payment, outcome: Approved | Declined) -> None:
        """Appends the outcome, however long that takes; the requests wait only a while for it."""
        run.answer_by = min(run.answer_by, time.monotonic() + OUTCOME_STORE_PATIENCE_S)
        while fact := record_outcome(payment, outcome, run.cause()):
            try:
                await self._appender.append([to_stored_event(fact)])
            except StreamConflict:
                payment = await self._reload(payment)
            else:
                payment = evolve(payment, fact)
                break
        run.finish(payment)

    async def _reload(self, payment: Payment) -> Payment:
        """The payment as it is stored now; waits out an outage of the database."""
        while True:
            try:
                loaded = await load_payment(self._database, payment.id)
            except DatabaseUnavailable:
                await asyncio.sleep(OTHER_RUN_POLL_S)
                continue
            assert loaded is not None
            return loaded.payment


def _begun(first_state: bytes | None) -> Payment:
    """The payment as its first event began it."""
    try:
        return evolve(None, facts.decode(PaymentInitiated.TOPIC, first_state or b""))
    except (UndecodableEvent, UnexpectedEvent) as error:
        raise PaymentUnreadable("The payment of this key cannot be read.") from error


_OUTCOME_LABELS = {Approved: "approved", Declined: "declined", type(None): "not_found"}
