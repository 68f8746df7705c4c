"""A payment provider inside the test: it moves money once per id, and does as it is told."""

import asyncio
from collections.abc import Callable, Iterable
from typing import Any
from uuid import UUID

from payments.gateways import (
    NeverSent,
    NextAction,
    Open,
    OutcomeUnknown,
    PlainGateway,
    ProviderCharge,
    ProviderRefund,
    Refusal,
)
from payments.gateways import Step as OpenStep
from payments.payment.state import Approved, Declined

Asked = ProviderCharge | ProviderRefund
Failure = type[NeverSent] | type[OutcomeUnknown]
Step = Callable[["ScriptedGateway", Any], Any]  # of a charge, of a refund, or of both


class ScriptedGateway(PlainGateway):
    """`script` holds what happens at the next charges, one entry each; then they are approved.

    An entry is a function of the gateway and the charge; it may return an outcome, raise, or be a
    coroutine function. `refund_script` is the same for refunds. `captures` lists every capture and
    `given_back` every refund that moved money, so a doubled one shows.
    """

    name = "scripted"

    def __init__(
        self,
        *script: Step,
        refund_script: Iterable[Step] = (),
        retry_s: float = 3600,
        late_capture_s: float = 24 * 3600,
        declines_may_turn_s: float = 0,
    ) -> None:
        self.script = list(script)
        self.refund_script = list(refund_script)
        self.charge_retry_s = self.refund_retry_s = retry_s
        self.late_capture_s = late_capture_s
        self.declines_may_turn_s = declines_may_turn_s
        self.charges: list[ProviderCharge] = []
        self.questions: list[UUID] = []
        self.captures: list[UUID] = []
        self.outcomes: dict[UUID, Approved | Declined] = {}
        self.refunds: list[ProviderRefund] = []
        self.refund_questions: list[UUID] = []  # refund ids
        self.given_back: list[UUID] = []  # refund ids
        self.refund_outcomes: dict[UUID, Approved | Declined] = {}  # by refund id
        self.reachable = True
        self.failure: Failure = NeverSent  # of questions while it is not reachable

    async def charge(self, charge: ProviderCharge, timeout_s: float) -> Approved | Declined | Open:
        self.charges.append(charge)
        return await self._play(self.script, charge)  # type: ignore[no-any-return]

    async def find_charge(
        self, charge: ProviderCharge, timeout_s: float
    ) -> Approved | Declined | Open | None:
        self.questions.append(charge.payment_id)
        if not self.reachable:
            raise self.failure("scripted", is_outage=False)
        return self.outcomes.get(charge.payment_id)

    async def refund(self, refund: ProviderRefund, timeout_s: float) -> Approved | Declined:
        self.refunds.append(refund)
        return await self._play(self.refund_script, refund)  # type: ignore[no-any-return]

    async def find_refund(
        self, refund: ProviderRefund, timeout_s: float
    ) -> Approved | Declined | None:
        self.refund_questions.append(refund.refund_id)
        if not self.reachable:
            raise self.failure("scripted", is_outage=False)
        return self.refund_outcomes.get(refund.refund_id)

    async def close(self) -> None:
        pass

    async def _play(self, script: list[Step], asked: Asked, otherwise: Step | None = None) -> Any:
        step: Step = script.pop(0) if script else otherwise or approve
        result = step(self, asked)
        return await result if asyncio.iscoroutine(result) else result

    def capture(self, charge: ProviderCharge) -> Approved | Declined:
        """What a sound provider does: the first outcome of an id stands."""
        if charge.payment_id not in self.outcomes:
            self.captures.append(charge.payment_id)
            self.outcomes[charge.payment_id] = Approved(
                id=charge.payment_id,
                amount_cents=charge.amount_cents,
                currency=charge.currency,
                provider_txn_id=f"txn-{charge.payment_id}",
            )
        return self.outcomes[charge.payment_id]

    def give_back(self, refund: ProviderRefund) -> Approved | Declined:
        """As `capture`. It gives back more than it captured: refusing that is the service's job."""
        refund_id = refund.refund_id
        if refund_id not in self.refund_outcomes:
            self.given_back.append(refund_id)
            self.refund_outcomes[refund_id] = Approved(
                id=refund_id,
                amount_cents=refund.amount_cents,
                currency=refund.currency,
                provider_txn_id=f"refund-txn-{refund_id}",
            )
        return self.refund_outcomes[refund_id]


class PreparingGateway(ScriptedGateway):
    """It gives each charge an id of its own before it captures, and knows the charge by that alone.

    `prepare_script` and `cancel_script` are as `script`; then the id is given, and the charge is
    cancelled. A payment method that begins with `pay_` is an id that the client supplies; `refused`
    is refused before anything is stored. `open` holds what is neither captured nor declined.
    """

    name = "preparing"
    knows_our_id = False

    def __init__(
        self,
        *script: Step,
        prepare_script: Iterable[Step] = (),
        cancel_script: Iterable[Step] = (),
        **options: Any,
    ) -> None:
        super().__init__(*script, **options)
        self.prepare_script = list(prepare_script)
        self.cancel_script = list(cancel_script)
        self.preparations: list[ProviderCharge] = []
        self.cancellations: list[UUID] = []
        self.references: dict[UUID, str] = {}
        self.open: dict[UUID, Open] = {}

    def refuses(self, charge: ProviderCharge) -> Refusal | None:
        refused = charge.payment_method == "refused"
        return Refusal("payment_method", "must be another one") if refused else None

    def reference(self, charge: ProviderCharge) -> str | None:
        method = charge.payment_method
        return method if method is not None and method.startswith("pay_") else None

    def needs_preparing(self, charge: ProviderCharge) -> bool:
        return charge.reference is None

    async def prepare(self, charge: ProviderCharge, timeout_s: float) -> str:
        self.preparations.append(charge)
        return await self._play(self.prepare_script, charge, give_reference)  # type: ignore[no-any-return]

    async def find_charge(
        self, charge: ProviderCharge, timeout_s: float
    ) -> Approved | Declined | Open | None:
        found = await super().find_charge(charge, timeout_s)
        return found or self.open.get(charge.payment_id)

    async def cancel(
        self, charge: ProviderCharge, timeout_s: float
    ) -> Approved | Declined | Open | None:
        self.cancellations.append(charge.payment_id)
        return await self._play(self.cancel_script, charge, cancel)  # type: ignore[no-any-return]


def give_reference(gateway: ScriptedGateway, charge: ProviderCharge) -> str:
    assert isinstance(gateway, PreparingGateway)
    payment_id = charge.payment_id
    gateway.open.setdefault(payment_id, Open(id=payment_id, step="ready"))
    return gateway.references.setdefault(payment_id, f"pi_{payment_id.hex}")


def reference_lost(gateway: ScriptedGateway, charge: ProviderCharge) -> None:
    give_reference(gateway, charge)
    raise OutcomeUnknown("scripted")


def opens(step: OpenStep, action: NextAction | None = None) -> Step:
    """The provider has not captured it yet."""

    def open_(gateway: ScriptedGateway, charge: ProviderCharge) -> Open:
        assert isinstance(gateway, PreparingGateway)
        found = Open(id=charge.payment_id, step=step, action=action)
        gateway.open[charge.payment_id] = found
        return found

    return open_


def cancel(gateway: ScriptedGateway, charge: ProviderCharge) -> Approved | Declined:
    return gateway.outcomes.setdefault(charge.payment_id, Declined("cancelled"))


def asking(payment_id: UUID) -> ProviderCharge:
    """For questions about a charge."""
    return ProviderCharge(payment_id=payment_id, amount_cents=1500, currency="INR")


def approve(gateway: ScriptedGateway, asked: Asked) -> Approved | Declined:
    if isinstance(asked, ProviderRefund):
        return gateway.give_back(asked)
    return gateway.capture(asked)


def decline(gateway: ScriptedGateway, asked: Asked) -> Declined:
    if isinstance(asked, ProviderRefund):
        refused = gateway.refund_outcomes[asked.refund_id] = Declined("refund_refused")
        return refused
    declined = gateway.outcomes[asked.payment_id] = Declined("insufficient_funds")
    return declined


def never_sent(gateway: ScriptedGateway, asked: Asked) -> None:
    raise NeverSent("scripted", is_outage=False)


def no_answer(gateway: ScriptedGateway, asked: Asked) -> None:
    raise OutcomeUnknown("scripted")


def answer_lost(gateway: ScriptedGateway, asked: Asked) -> None:
    approve(gateway, asked)
    raise OutcomeUnknown("scripted")


def after(event: asyncio.Event, then: Step = approve) -> Step:
    """Goes on with `then` once the event is set."""

    async def wait(gateway: ScriptedGateway, asked: Asked) -> Any:
        await event.wait()
        return then(gateway, asked)

    return wait
