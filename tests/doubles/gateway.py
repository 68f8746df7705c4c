"""A payment provider inside the test: it captures once per id, and does as it is told."""

import asyncio
from collections.abc import Callable
from typing import Any
from uuid import UUID

from payments.gateways import NeverSent, OutcomeUnknown, ProviderCharge
from payments.payment import Approved, Declined

Step = Callable[["ScriptedGateway", ProviderCharge], Any]


class ScriptedGateway:
    """`script` holds what happens at the next charges, one entry each; then they are approved.

    An entry is a function of the gateway and the charge; it may return an outcome, raise, or be a
    coroutine function. `captures` lists every capture, so a doubled one shows.
    """

    name = "scripted"

    def __init__(self, *script: Step, safe_retry_s: float = 3600) -> None:
        self.script = list(script)
        self.safe_retry_s = safe_retry_s
        self.charges: list[ProviderCharge] = []
        self.questions: list[UUID] = []
        self.captures: list[UUID] = []
        self.outcomes: dict[UUID, Approved | Declined] = {}
        self.reachable = True

    async def charge(self, charge: ProviderCharge, timeout_s: float) -> Approved | Declined:
        self.charges.append(charge)
        if self.script:
            result = self.script.pop(0)(self, charge)
            return await result if asyncio.iscoroutine(result) else result  # type: ignore[no-any-return]
        return self.capture(charge)

    async def find_charge(self, payment_id: UUID, timeout_s: float) -> Approved | Declined | None:
        self.questions.append(payment_id)
        if not self.reachable:
            raise NeverSent("scripted")
        return self.outcomes.get(payment_id)

    async def close(self) -> None:
        pass

    def capture(self, charge: ProviderCharge) -> Approved | Declined:
        """What a sound provider does: the first outcome of an id stands."""
        if charge.payment_id not in self.outcomes:
            self.captures.append(charge.payment_id)
            self.outcomes[charge.payment_id] = Approved(
                charge.payment_id, charge.amount_cents, charge.currency, f"txn-{charge.payment_id}"
            )
        return self.outcomes[charge.payment_id]


def approve(gateway: ScriptedGateway, charge: ProviderCharge) -> Approved | Declined:
    return gateway.capture(charge)


def decline(gateway: ScriptedGateway, charge: ProviderCharge) -> Declined:
    declined = Declined("insufficient_funds")
    gateway.outcomes[charge.payment_id] = declined
    return declined


def never_sent(gateway: ScriptedGateway, charge: ProviderCharge) -> None:
    raise NeverSent("scripted")


def no_answer(gateway: ScriptedGateway, charge: ProviderCharge) -> None:
    raise OutcomeUnknown("scripted")


def answer_lost(gateway: ScriptedGateway, charge: ProviderCharge) -> None:
    gateway.capture(charge)
    raise OutcomeUnknown("scripted")


def after(event: asyncio.Event, then: Step = approve) -> Step:
    """Goes on with `then` once the event is set."""

    async def wait(gateway: ScriptedGateway, charge: ProviderCharge) -> Any:
        await event.wait()
        return then(gateway, charge)

    return wait
