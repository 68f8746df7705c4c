"""The simulated provider: the default gateway, for development, demonstrations and tests.

It is deterministic: an amount whose last digit is 7 is declined, every other is captured. It keeps
its own ledger, as a real provider does: a file that all processes share, that only grows and that
survives a kill -9 of any of them. Faults can be scripted: docs/simulated-gateway.md.
"""

import asyncio
import re
from pathlib import Path
from uuid import UUID

import msgspec

from payments.errors import StartError
from payments.gateways import NeverSent, OutcomeUnknown, ProviderCharge
from payments.gateways.simulated_ledger import Decision, Ledger
from payments.payment import Approved, Declined

_FAULT = re.compile(
    r"(?:delay=(?P<seconds>[0-9]{1,4}(?:\.[0-9]{1,4})?)|(?P<kind>timeout|answer_lost|down))"
    r"(?:\*(?P<count>[0-9]{1,6}))?"
)


class Fault(msgspec.Struct):
    """One scripted fault; `left` is how many calls it still applies to, None for all."""

    kind: str
    seconds: float
    left: int | None

    def take(self) -> bool:
        if self.left is None:
            return True
        self.left -= 1
        return self.left >= 0


def parse_faults(text: str) -> list[Fault]:
    """`kind[=seconds][*count]`, separated by commas; raises StartError.

    delay=S       the answer takes S seconds longer
    timeout       nothing is captured, and no answer comes
    answer_lost   the charge is decided, but its answer never arrives
    down          the provider cannot be reached, for charges and for questions
    """
    faults = []
    for entry in filter(None, (part.strip() for part in text.split(","))):
        if not (match := _FAULT.fullmatch(entry)):
            raise StartError(
                f"SIMULATED_FAULTS: {entry!r} must be delay=SECONDS, timeout, answer_lost or down, "
                "each with *COUNT behind it if it is for the first calls only"
            )
        seconds, kind, count = match["seconds"], match["kind"], match["count"]
        faults.append(Fault(kind or "delay", float(seconds or 0), int(count) if count else None))
    return faults


class SimulatedGateway:
    name = "simulated"
    safe_retry_s = 24 * 3600.0

    def __init__(self, ledger: Path | None, faults: str = "") -> None:
        """`ledger` is the file, None for memory only. Raises StartError if it cannot be opened."""
        self._faults = parse_faults(faults)
        self._ledger = Ledger(ledger)

    async def charge(self, charge: ProviderCharge, timeout_s: float) -> Approved | Declined:
        fault = await self._suffer(timeout_s)
        outcome = "declined_by_simulation" if charge.amount_cents % 10 == 7 else "approved"
        decided = await self._ledger.decide(
            Decision(charge.payment_id, charge.amount_cents, charge.currency, outcome)
        )
        if fault == "answer_lost":
            raise OutcomeUnknown("simulated: the answer was lost")
        return _outcome(decided)

    async def find_charge(self, payment_id: UUID, timeout_s: float) -> Approved | Declined | None:
        if self._next_fault(("down",)):
            raise NeverSent("simulated: the provider is down")
        found = await self._ledger.find(payment_id)
        return _outcome(found) if found else None

    async def close(self) -> None:
        await self._ledger.close()

    async def _suffer(self, timeout_s: float) -> str | None:
        """Applies what is scripted for this charge; returns the fault if it comes afterwards."""
        if delay := self._next_fault(("delay",)):
            await asyncio.sleep(min(delay.seconds, timeout_s))
            if delay.seconds > timeout_s:
                raise OutcomeUnknown("simulated: slower than the timeout")
        fault = self._next_fault(("timeout", "answer_lost", "down"))
        if fault is None:
            return None
        if fault.kind == "down":
            raise NeverSent("simulated: the provider is down")
        if fault.kind == "timeout":
            await asyncio.sleep(timeout_s)
            raise OutcomeUnknown("simulated: no answer")
        return fault.kind

    def _next_fault(self, kinds: tuple[str, ...]) -> Fault | None:
        return next((f for f in self._faults if f.kind in kinds and f.take()), None)


def _outcome(decision: Decision) -> Approved | Declined:
    if decision.outcome == "approved":
        txn_id = f"sim_{decision.payment_id.hex}"
        return Approved(decision.payment_id, decision.amount_cents, decision.currency, txn_id)
    return Declined(decision.outcome)
