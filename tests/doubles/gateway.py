"""A payment provider inside the test: it moves money once per id, and does as it is told."""

import asyncio
from collections.abc import Callable, Iterable
from typing import Any
from uuid import UUID

from payments.gateways import NeverSent, OutcomeUnknown, ProviderCharge, ProviderRefund
from payments.payment.state import Approved, Declined

Asked = ProviderCharge | ProviderRefund
Step = Callable[["ScriptedGateway", Any], Any]  # of a charge, of a refund, or of both


class ScriptedGateway:
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
        safe_retry_s: float = 3600,
        late_capture_s: float = 24 * 3600,
        declines_may_turn_s: float = 0,
    ) -> None:
        self.script = list(script)
        self.refund_script = list(refund_script)
        self.safe_retry_s = safe_retry_s
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
        self.failure: type[Exception] = NeverSent  # of questions while it is not reachable

    async def charge(self, charge: ProviderCharge, timeout_s: float) -> Approved | Declined:
        self.charges.append(charge)
        return await self._play(self.script, charge)

    async def find_charge(self, payment_id: UUID, timeout_s: float) -> Approved | Declined | None:
        self.questions.append(payment_id)
        if not self.reachable:
            raise self.failure("scripted")
        return self.outcomes.get(payment_id)

    async def refund(self, refund: ProviderRefund, timeout_s: float) -> Approved | Declined:
        self.refunds.append(refund)
        return await self._play(self.refund_script, refund)

    async def find_refund(
        self, refund: ProviderRefund, timeout_s: float
    ) -> Approved | Declined | None:
        self.refund_questions.append(refund.refund_id)
        if not self.reachable:
            raise self.failure("scripted")
        return self.refund_outcomes.get(refund.refund_id)

    async def close(self) -> None:
        pass

    async def _play(self, script: list[Step], asked: Asked) -> Approved | Declined:
        step: Step = script.pop(0) if script else approve
        result = step(self, asked)
        return await result if asyncio.iscoroutine(result) else result  # type: ignore[no-any-return]

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
    raise NeverSent("scripted")


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
