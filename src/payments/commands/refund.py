"""Give back a captured payment, or a part of it.

    amount reserved by an event -> provider asked -> outcome appended -> answered

The stream's version check keeps the sum of all refunds within the capture: of two that are decided
at once one conflicts, and is decided again. Once its amount is reserved a refund is never given up:
the answer is its outcome or PENDING, and settling goes on with it (settle.py).
"""

import asyncio
import math

import msgspec
from eventsourcing.persistence import StoredEvent

from payments.commands.asking import own_gateway, provider_refund
from payments.commands.giving_back import GivingBack
from payments.commands.outcomes import Outcomes
from payments.commands.runs import OTHER_RUN_POLL_S, Run, Runs, cause
from payments.commands.telling import MISMATCHES, count_mismatch
from payments.errors import (
    PaymentNotFound,
    PaymentNotRefundable,
    PaymentsError,
    RefundDeclined,
    Unavailable,
)
from payments.event_store import EventStore, LoadedPayment
from payments.events.appender import StreamConflict
from payments.gateways import Gateway, NeverSent, OutcomeUnknown
from payments.gateways.chosen import Gateways
from payments.observability.logs import LogFields
from payments.observability.metrics import Telemetry
from payments.observability.tracing import span
from payments.payment.decisions import (
    Cause,
    initiate_refund,
    known_refund,
    refund_outcome,
)
from payments.payment.identity import RefundRequest
from payments.payment.state import Approved, Declined, Payment, Refund, Status, evolve
from payments.settings import Settings


class RefundPayment(msgspec.Struct, frozen=True, kw_only=True):
    """The command. `may_read` is the client whose payments are in reach, None for everyone's."""

    request: RefundRequest
    may_read: str | None = None
    request_id: str | None = None
    traceparent: str | None = None


class Refunded(msgspec.Struct, frozen=True):
    """The answer: a refund that went through, or is PENDING, and its payment.

    `replayed` says that an earlier request began it, finished or not.
    """

    payment: Payment
    refund: Refund
    replayed: bool = False


class _BegunRefund(msgspec.Struct, frozen=True):
    """A refund that the provider is to make, and its payment's events as stored; `age_s` if an
    earlier request reserved it."""

    payment: Payment
    events: tuple[StoredEvent, ...]
    refund: Refund
    age_s: float | None = None


class Refunding:
    """Refunds. One instance per process; any number of processes may share the store."""

    def __init__(
        self,
        runs: Runs,
        store: EventStore,
        gateways: Gateways[Gateway],
        giving_back: GivingBack,
        telemetry: Telemetry,
        settings: Settings,
    ) -> None:
        self._runs = runs
        self._store = store
        self._outcomes = Outcomes(store, telemetry)
        self._gateways = gateways
        self._giving_back = giving_back
        self._telemetry = telemetry
        self._deadline_s = settings.charge_deadline_s
        self._gateway_timeout_s = settings.gateway_timeout_s

    async def refund(self, command: RefundPayment) -> Refunded:
        """Refunds, or joins or repeats the refund that this request already began.

        Raises PaymentNotFound, IdempotencyKeyReused, PaymentNotRefundable, PaymentAlreadyRefunded,
        RefundExceedsCapture, RefundDeclined, or Unavailable if the provider was surely not asked.
        """

        async def work(run: Run[Refunded]) -> None:
            with span("refund"):
                await self._refund(run, command)

        try:
            refunded, joined = await self._runs.answer(command.request, self._deadline_s, work)
        except PaymentsError as error:
            self._telemetry.refunds[_error_label(error)].inc()
            raise
        if joined:
            refunded = Refunded(refunded.payment, refunded.refund, replayed=True)
        finished = refunded.refund.status is not Status.PENDING
        label = "replayed" if finished and refunded.replayed else refunded.refund.status.lower()
        self._telemetry.refunds[label].inc()
        return refunded

    def check_refundable(self, payment: Payment) -> None:
        """Raises PaymentNotRefundable if another provider has the money, or cannot be asked for it:
        the capture of an imported payment may have no id."""
        if self._gateways.of(payment.gateway) is None:
            configured = ", ".join(gateway.name for gateway in self._gateways)
            raise PaymentNotRefundable(
                f"It was captured by the provider {payment.gateway}, which is not configured; this "
                f"service uses {configured}."
            )
        if payment.status is Status.SUCCESS and payment.provider_txn_id is None:
            raise PaymentNotRefundable(
                "It was imported without the provider's id of the capture: refund it at the "
                "provider."
            )

    async def _refund(self, run: Run[Refunded], command: RefundPayment) -> None:
        with LogFields(payment_id=command.request.payment_id):
            begun = await self._begin(run, command)
            if begun is not None:
                await self._make(run, command, begun)

    async def _make(self, run: Run[Refunded], command: RefundPayment, begun: _BegunRefund) -> None:
        # Its amount is reserved: whatever happens now, the refund goes on.
        run.pending_answer = Refunded(begun.payment, begun.refund, begun.age_s is not None)
        gateway = await own_gateway(self._store, begun.payment, self._gateways, "refund")
        try:
            outcome = await self._ask(run, gateway, begun)
            run.limit_storing()
            payment, _ = await self._outcomes.append(
                begun.payment,
                begun.events,
                lambda payment: refund_outcome(payment, begun.refund, outcome, _cause(command)),
            )
        except NeverSent as error:
            raise OutcomeUnknown("the provider cannot be reached") from error
        except MISMATCHES as error:
            await count_mismatch(self._store, self._telemetry, begun.payment.id, "refund", error)
            raise
        _answer(run, payment, begun.refund, begun.age_s is not None)

    async def _begin(self, run: Run[Refunded], command: RefundPayment) -> _BegunRefund | None:
        """Reserves the amount; None if an earlier request like this one has an answer."""
        while True:
            loaded = await self._load(command)
            known = known_refund(loaded.payment, command.request)
            if known is not None:
                return await self._resume(run, command, loaded, known)
            await self._giving_back.check_allowed()  # a refusal would rest on what is left as well
            self.check_refundable(loaded.payment)
            fact = initiate_refund(loaded.payment, command.request, _cause(command))
            run.check_may_call_provider()
            run.take_provider_call()
            try:
                event = await self._store.append_intent(fact, after=loaded.events[-1])
            except StreamConflict:
                run.intent_conflicted()  # another refund of this payment came first
                continue
            run.intent_is_durable()
            payment = evolve(loaded.payment, fact)
            return _BegunRefund(payment, (*loaded.events, event), payment.refunds[-1])

    async def _resume(
        self, run: Run[Refunded], command: RefundPayment, loaded: LoadedPayment, refund: Refund
    ) -> _BegunRefund | None:
        """Waits for what an earlier request comes to; the refund if its run is over.

        A run is over when its reservation is older than the deadline, by the database's clock.
        """
        run.release_provider_call()
        run.intent_is_durable()
        while True:
            payment, stored = loaded.payment, loaded.payment.refund(refund.id)
            if stored is None:  # the log lost it
                run.pending_answer = None
                return await self._begin(run, command)
            refund = stored
            if refund.status is not Status.PENDING:
                _answer(run, payment, refund, replayed=True)
                return None
            run.pending_answer = Refunded(payment, refund, replayed=True)
            age_s = loaded.age_at_most_s(refund.version)
            if self._deadline_s < age_s < math.inf:
                return _BegunRefund(payment, loaded.events, refund, age_s)
            if not run.may_call_provider():
                run.finish(run.pending_answer)
                return None
            await asyncio.sleep(OTHER_RUN_POLL_S)
            loaded = await self._load(command)

    async def _load(self, command: RefundPayment) -> LoadedPayment:
        payment_id = command.request.payment_id
        loaded = await self._store.load(payment_id, command.may_read)
        if loaded is None:
            loaded = await self._store.load_imported(payment_id, command.may_read)
        if loaded is None:
            await self._giving_back.check_allowed()
            raise PaymentNotFound(f"Payment {payment_id} does not exist.")
        return loaded

    async def _ask(
        self, run: Run[Refunded], gateway: Gateway, begun: _BegunRefund
    ) -> Approved | Declined:
        def timeout_s() -> float:
            run.check_may_call_provider()
            return run.left_s(self._gateway_timeout_s)

        order = provider_refund(begun.payment, begun.refund)
        run.take_provider_call()
        try:
            if begun.age_s is not None:
                return await self._giving_back.send_again(gateway, order, begun.age_s, timeout_s)
            return await self._giving_back.send(gateway, order, timeout_s)
        finally:
            run.release_provider_call()


def _answer(run: Run[Refunded], payment: Payment, refund: Refund, replayed: bool) -> None:
    """Ends the run with what became of the refund."""
    # Not in the log any more: it lost the refund, and the provider has refused it.
    refund = payment.refund(refund.id) or msgspec.structs.replace(refund, status=Status.FAILED)
    if refund.status is Status.FAILED:
        run.pending_answer = None  # this error is the outcome
        raise RefundDeclined(
            f"The provider refused the refund {refund.id} ({refund.decline_code}). Nothing was "
            "refunded; the remaining amount can still be refunded."
        )
    run.finish(Refunded(payment, refund, replayed))


def _cause(command: RefundPayment) -> Cause:
    return cause(command.request.client, command.request_id, command.traceparent)


def _error_label(error: PaymentsError) -> str:
    if isinstance(error, RefundDeclined):
        return "failed"
    return "unavailable" if isinstance(error, Unavailable) else "refused"
