"""Charge a payment exactly once per idempotency key.

    intent appended -> provider asked -> outcome appended -> answered

Once the provider may have captured, the answer is the outcome or PENDING, never an error: an error
would make the caller drop an order that was paid for. Before, it is looked whether the caller
still waits: what is captured for one that has given up is paid and has no order. See runs.py for
what a run is.
"""

import asyncio
import math
from collections.abc import Sequence
from datetime import UTC, datetime, timedelta
from typing import TypeGuard
from uuid import UUID

import msgspec
from eventsourcing.persistence import StoredEvent
from loguru import logger

from payments.commands.asking import (
    Found,
    NewCharge,
    NewCharges,
    check_about,
    find,
    own_gateway,
    provider_charge,
)
from payments.commands.outcomes import Outcomes
from payments.commands.paid_orders import is_paid_otherwise, refuse_if_paid
from payments.commands.runs import OTHER_RUN_POLL_S, Caller, Run, Runs, cause
from payments.commands.telling import MISMATCHES, count_mismatch
from payments.errors import (
    ClientGone,
    GatewayUnavailable,
    IdempotencyKeyReused,
    InvalidRequest,
    OrderAlreadyPaid,
    PaymentMethodReused,
    PaymentsError,
    PaymentUnreadable,
)
from payments.event_store import EventStore
from payments.events.appender import ReferenceTaken, StreamConflict, Unwanted
from payments.events.facts import PaymentInitiated, ProviderOutcome, UndecodableEvent
from payments.events.store import fact_at
from payments.gateways import (
    Gateway,
    NeverSent,
    NextAction,
    Open,
    OutcomeUnknown,
    ProviderCharge,
    ReferenceNotFound,
)
from payments.gateways.chosen import Gateways
from payments.gateways.counted import CountedGateway
from payments.observability.logs import LogFields, Repeats
from payments.observability.metrics import Telemetry
from payments.observability.tracing import span
from payments.payment.decisions import (
    Cause,
    charge_outcome,
    initiate,
    is_held_for,
    referenced,
    require_action,
)
from payments.payment.identity import ChargeRequest, differing_fields
from payments.payment.state import Approved, Declined, Payment, Status, UnexpectedEvent, evolve
from payments.settings import HOLD_MARGIN_S, Settings


class ChargePayment(msgspec.Struct, frozen=True, kw_only=True):
    """The command: the request, and where it came from (for the events' metadata).

    `hold_until` is when the hold of the seats ends, if that was told; of all requests with a key
    the first one's counts. `return_url` is where the provider sends the customer who had to act.
    """

    request: ChargeRequest
    request_id: str | None = None
    traceparent: str | None = None
    hold_until: datetime | None = None
    return_url: str | None = None


class Charged(msgspec.Struct, frozen=True):
    """The answer: the payment with its first outcome, or PENDING.

    `replayed` says that an earlier request began it, finished or not. `next_action` is what the
    customer of a PENDING one has to do.
    """

    payment: Payment
    replayed: bool = False
    next_action: NextAction | None = None


class _BegunCharge(msgspec.Struct, frozen=True):
    """A payment that is to be charged, and its events as stored; `age_s` if an earlier request
    stored its intent."""

    payment: Payment
    events: Sequence[StoredEvent]
    age_s: float | None = None

    @property
    def replayed(self) -> bool:
        return self.age_s is not None


class _StreamGone(Exception):
    """The log holds nothing of a payment any more that it held a moment ago."""


class Charging:
    """Charges. One instance per process; any number of processes may share the store."""

    def __init__(
        self,
        runs: Runs,
        store: EventStore,
        gateways: Gateways[CountedGateway],
        telemetry: Telemetry,
        settings: Settings,
    ) -> None:
        self._runs = runs
        self._store = store
        self._outcomes = Outcomes(store, telemetry)
        self._gateways = gateways
        self._new_charges = NewCharges(gateways, settings)
        self._telemetry = telemetry
        self._deadline_s = settings.charge_deadline_s
        self._gateway_timeout_s = settings.gateway_timeout_s
        self._abandon_after_s = settings.pending_abandon_after_s
        self._second_is_refused = settings.second_charge == "refuse"
        self._seat_hold_s = settings.seat_hold_s

    async def charge(self, command: ChargePayment, caller: Caller | None = None) -> Charged:
        """Charges, or joins or repeats the charge that this key already began.

        Nothing is begun for a `caller` that is gone or too old; without one it has just asked.
        Raises IdempotencyKeyReused, OrderAlreadyPaid, PaymentMethodReused, InvalidRequest if a hold
        ends too early for a new charge, or the provider cannot take it, or Unavailable if the
        provider was surely not asked.
        """

        new = self._new_charges.of(command.request, command.return_url)

        async def work(run: Run[Charged]) -> None:
            with span("charge"):
                await self._charge(run, command, new)

        try:
            await self._check_new(command, new)
            charged, joined = await self._runs.answer(
                command.request, self._deadline_s, work, caller
            )
        except PaymentsError as error:
            self._telemetry.charges[_error_label(error)].inc()
            raise
        if joined:
            charged = msgspec.structs.replace(charged, replayed=True)
        outcome = charged.payment.outcome
        replayed = charged.replayed and outcome is not Status.PENDING
        self._telemetry.charges["replayed" if replayed else outcome.lower()].inc()
        return charged

    async def _check_new(self, command: ChargePayment, new: NewCharge) -> None:
        """For new keys only: what was begun is answered at any time."""
        refusal = self._new_charges.refusal(new, command.hold_until)
        if refusal is None or self._runs.has(command.request):
            return
        if await self._store.load_charge(new.charge.payment_id) is None:
            raise refusal

    async def _charge(self, run: Run[Charged], command: ChargePayment, new: NewCharge) -> None:
        begun = await self._begin(run, command, new)
        if begun is None:
            return
        payment = begun.payment
        with LogFields(payment_id=payment.id, order_id=payment.merchant_order_id):
            try:
                begun, outcome = await self._ask(run, command, begun)
                run.limit_storing()
                charged = await self._record(begun, outcome, command)
            except MISMATCHES as error:
                await count_mismatch(self._store, self._telemetry, payment.id, "charge", error)
                raise
        run.finish(charged)

    async def _record(self, begun: _BegunCharge, outcome: Found, command: ChargePayment) -> Charged:
        """What the provider said, in the log: its outcome, or that the customer has to act."""
        payment, action = begun.payment, None
        check_about(outcome, payment)
        if isinstance(outcome, Open) and outcome.step == "action" and _is_held(payment):
            action = outcome.action
        if isinstance(outcome, Approved | Declined) or action is not None:

            def decide(payment: Payment) -> ProviderOutcome | None:
                if isinstance(outcome, Approved | Declined):
                    return charge_outcome(payment, outcome, _cause(command))
                assert action is not None
                return require_action(payment, action.type, _cause(command))

            payment, _ = await self._outcomes.append(payment, begun.events, decide)
        if payment.status is not Status.PENDING:
            action = None  # it was abandoned meanwhile
        return Charged(payment, begun.replayed, action)

    async def _begin(
        self, run: Run[Charged], command: ChargePayment, new: NewCharge
    ) -> _BegunCharge | None:
        """Makes the intent durable; None if an earlier request with this key has an answer."""
        decided, hold_until = _cause(command), command.hold_until
        if hold_until is None and self._seat_hold_s is not None:
            hold_until = decided.occurred_at + timedelta(seconds=self._seat_hold_s)
        intent = initiate(command.request, new.gateway.name, decided, hold_until, new.reference)
        age_s, repeats = None, Repeats()
        if self._second_is_refused:
            await self._refuse_second(run, intent)
        while True:
            run.take_provider_call()
            try:
                event = await self._store.append_intent(intent, wanted=run.is_awaited)
            except ReferenceTaken:
                raise PaymentMethodReused(_REUSED) from None
            except StreamConflict as conflict:
                run.release_provider_call()
                first = _first(intent.payment_id, conflict.first_state)
            except Unwanted:
                run.release_provider_call()
                known = await self._store.load_charge(intent.payment_id)
                if known is None and run.is_awaited():
                    continue  # for a request that joined meanwhile
                if known is None:
                    raise ClientGone(_GONE) from None
                first = known.payment
            else:
                run.intent_is_durable()
                return _BegunCharge(evolve(None, intent), (event,), age_s)
            if differing := differing_fields(first, command.request):
                raise IdempotencyKeyReused(differing)
            # An earlier run may have asked: from here on errors are answered with PENDING.
            run.pending_answer = Charged(first, replayed=True)
            try:
                return await self._resume(run, intent)
            except _StreamGone:
                message = "the log lost an acknowledged payment; it is initiated again"
                repeats.tell("CRITICAL", message, payment_id=intent.payment_id)
                age_s = 0.0  # the run that is lost may have asked the provider

    async def _refuse_second(self, run: Run[Charged], intent: PaymentInitiated) -> None:
        run.take_provider_call()
        order_id, client = intent.merchant_order_id, intent.client
        await refuse_if_paid(self._store, intent.payment_id, order_id, client)
        # Else the key would be used up after its request was told otherwise.
        run.check_may_call_provider()

    async def _resume(self, run: Run[Charged], intent: PaymentInitiated) -> _BegunCharge | None:
        """Waits for what an earlier request with this key comes to; the payment if its run is over.

        A run is over when its intent is older than the deadline, by the database's clock, or has
        told its client that the customer has to act.
        """
        while True:
            loaded = await self._store.load_charge(intent.payment_id)
            if loaded is None:
                raise _StreamGone
            run.intent_is_durable()
            run.pending_answer = Charged(loaded.payment, replayed=True)
            # What an imported payment came to, only a person can find out: it is not sent again.
            open_here = loaded.payment.status is Status.PENDING and not loaded.payment.imported
            if not open_here or not run.may_call_provider():
                run.finish(run.pending_answer)
                return None
            if loaded.age_s() > self._deadline_s or loaded.payment.action_required:
                return _BegunCharge(loaded.payment, loaded.events, loaded.age_s())
            await asyncio.sleep(OTHER_RUN_POLL_S)

    async def _ask(
        self, run: Run[Charged], command: ChargePayment, begun: _BegunCharge
    ) -> tuple[_BegunCharge, Found]:
        """What the provider says; None if the payment has an outcome already. Raises
        OutcomeUnknown, or Unavailable if it was not asked to capture."""
        gateway = await own_gateway(self._store, begun.payment, self._gateways, "charge")
        run.take_provider_call()
        try:
            if begun.age_s is not None:
                # An earlier run may have charged: look before sending again.
                run.check_may_call_provider()
                timeout_s = run.left_s(self._gateway_timeout_s)
                # For the next action: its URL leads back to where this request says.
                charge = _charge_of(begun.payment, command)
                found = await find(gateway, begun.payment, timeout_s, charge)
                if found is not None and not _goes_on(found):
                    return begun, found
                await self._check_may_send_again(run, gateway, begun, found)
            charge = _charge_of(begun.payment, command)
            if _lacks_reference(gateway, charge):
                begun, declined = await self._prepare(run, gateway, begun, charge, _cause(command))
                if declined is not None or begun.payment.status is not Status.PENDING:
                    return begun, declined
                if not run.is_awaited():
                    raise OutcomeUnknown("no client waits for it any more")
                charge = _charge_of(begun.payment, command)
            run.check_may_call_provider()
            run.pending_answer = Charged(begun.payment, begun.replayed)
            return begun, await _capture(
                gateway, charge, begun, self._timeout_s(run, begun.payment)
            )
        except NeverSent as error:
            if not begun.replayed:
                run.pending_answer = None
            raise self._unavailable() from error
        finally:
            run.release_provider_call()

    async def _prepare(
        self,
        run: Run[Charged],
        gateway: Gateway,
        begun: _BegunCharge,
        charge: ProviderCharge,
        cause: Cause,
    ) -> tuple[_BegunCharge, Declined | None]:
        """Has the provider make its charge, and stores its id of it; or it declines right here."""
        run.check_may_call_provider()
        try:
            reference = await gateway.prepare(charge, run.left_s(self._gateway_timeout_s))
        except OutcomeUnknown as error:
            # Whatever became of it captures nothing, and nobody waits any more for what could.
            raise self._unavailable() from error
        run.pending_answer = Charged(begun.payment, begun.replayed)
        if isinstance(reference, Declined):
            return begun, reference
        with run.limited_storing():
            payment, events = await self._outcomes.append(
                begun.payment, begun.events, lambda payment: referenced(payment, reference, cause)
            )
        return msgspec.structs.replace(begun, payment=payment, events=events), None

    def _unavailable(self) -> GatewayUnavailable:
        message = "The payment provider is unavailable. Nothing was charged."
        unavailable = GatewayUnavailable(message)
        # Sooner, a repetition would take this run for one that is still under way.
        unavailable.retry_after_s = math.ceil(self._deadline_s)
        return unavailable

    def _timeout_s(self, run: Run[Charged], payment: Payment) -> float:
        """Of a call that may capture: it must end before the seats' hold does."""
        timeout_s = run.left_s(self._gateway_timeout_s)
        if not is_held_for(payment.hold_until, datetime.now(UTC), timeout_s + HOLD_MARGIN_S):
            raise OutcomeUnknown("the hold of its seats ends too soon for a capture")
        return timeout_s

    async def _check_may_send_again(
        self, run: Run[Charged], gateway: Gateway, begun: _BegunCharge, found: Open | None
    ) -> None:
        assert begun.age_s is not None
        if not run.is_awaited():
            raise OutcomeUnknown("no client waits for it any more")
        if found is None and begun.age_s > gateway.charge_retry_s:
            raise OutcomeUnknown("too old for a retry with the same provider key")
        if begun.age_s + self._deadline_s > self._abandon_after_s:
            raise OutcomeUnknown("about to be abandoned: a capture would come too late")
        if self._second_is_refused and await is_paid_otherwise(self._store, begun.payment):
            raise OutcomeUnknown("its order is paid by another payment")


async def _capture(
    gateway: Gateway, charge: ProviderCharge, begun: _BegunCharge, timeout_s: float
) -> Found:
    try:
        return await gateway.charge(charge, timeout_s)
    except ReferenceNotFound:
        # The client named it, and it was never charged before: nobody had it captured.
        if begun.replayed or begun.payment.version > 1:
            raise
        logger.warning("the provider does not know the reference that the client supplied")
        return Declined("reference_not_found")


def _goes_on(found: Approved | Declined | Open) -> TypeGuard[Open]:
    """Whether the provider waits for `charge` to be called again."""
    return isinstance(found, Open) and found.step in ("ready", "authorized")


def _lacks_reference(gateway: Gateway, charge: ProviderCharge) -> bool:
    """Whether the provider's own id has to be stored before it may capture: settling takes a
    charge without one for unsent, unless the provider finds it by our id."""
    unknown = charge.reference is None
    return unknown and (not gateway.knows_our_id or gateway.needs_preparing(charge))


def _is_held(payment: Payment) -> bool:
    """Whether a customer may still be told to act: a capture after the hold comes too late."""
    return is_held_for(payment.hold_until, datetime.now(UTC), HOLD_MARGIN_S)


_REUSED = (
    "Another charge was begun with this payment method, which can be used once. Nothing was "
    "charged: let the customer pay anew, and use the new payment method."
)
_GONE = "The client disconnected, or its deadline passed. Nothing was charged; retry."


def _error_label(error: PaymentsError) -> str:
    if isinstance(error, ClientGone):
        return "client_gone"
    refused = isinstance(
        error, IdempotencyKeyReused | InvalidRequest | OrderAlreadyPaid | PaymentMethodReused
    )
    return "refused" if refused else "unavailable"


def _charge_of(payment: Payment, command: ChargePayment) -> ProviderCharge:
    return provider_charge(payment, command.request.payment_method, command.return_url)


def _cause(command: ChargePayment) -> Cause:
    return cause(command.request.client, command.request_id, command.traceparent)


def _first(payment_id: UUID, first_state: bytes | None) -> Payment:
    """The payment as its first event began it."""
    try:
        return evolve(None, fact_at(payment_id, 1, PaymentInitiated.TOPIC, first_state or b""))
    except (UndecodableEvent, UnexpectedEvent) as error:
        raise PaymentUnreadable("The payment with this key cannot be read.") from error
