"""The simulated provider: the default gateway, for development, demonstrations and tests.

It is deterministic: an amount whose last digit is 7 is declined, every other is captured; a partial
refund whose last digit is 9 is declined. It keeps its own ledger, as a real provider does: a file
that the processes of a host share, that only grows and that survives a kill -9 of any of them.
Faults can be scripted: docs/simulated-gateway.md.
"""

import asyncio
import re
from pathlib import Path
from uuid import UUID

import msgspec

from payments.errors import StartError
from payments.gateways import NeverSent, OutcomeUnknown, ProviderCharge, ProviderRefund
from payments.gateways.earlier_ledger import open_ledger
from payments.gateways.ledger_file import (
    CHARGE,
    LOCK_WAIT_S,
    REFUND,
    Decision,
    LedgerFile,
    Question,
)
from payments.gateways.simulated_ledger import Ledger
from payments.payment.state import Approved, Declined

_FAULT = re.compile(
    r"(?:(?P<operation>charge|refund):)?"
    r"(?:delay=(?P<seconds>[0-9]{1,4}(?:\.[0-9]{1,4})?)|(?P<kind>timeout|answer_lost|down))"
    r"(?:\*(?P<count>[0-9]{1,6}))?"
)


class Fault(msgspec.Struct, kw_only=True):
    """One scripted fault; `left` is how many calls it still applies to, None for all.

    `operation` is `charge` or `refund`, None for both.
    """

    kind: str
    seconds: float
    left: int | None
    operation: str | None = None

    def take(self) -> bool:
        if self.left is None:
            return True
        self.left -= 1
        return self.left >= 0


def parse_faults(text: str) -> list[Fault]:
    """`[operation:]kind[=seconds][*count]`, separated by commas; raises StartError.

    delay=S       the answer takes S seconds longer
    timeout       nothing is captured or given back, and no answer comes
    answer_lost   the charge or refund is decided, but its answer never arrives
    down          the provider cannot be reached, for questions neither
    """
    faults = []
    for entry in filter(None, (part.strip() for part in text.split(","))):
        if not (match := _FAULT.fullmatch(entry)):
            raise StartError(
                f"SIMULATED_FAULTS: {entry!r} must be delay=SECONDS, timeout, answer_lost or down, "
                "optionally followed by *COUNT (for the first calls only) and preceded by charge: "
                "or refund: (for one operation only)"
            )
        operation, seconds, kind, count = match.group("operation", "seconds", "kind", "count")
        left = int(count) if count else None
        faults.append(
            Fault(kind=kind or "delay", seconds=float(seconds or 0), left=left, operation=operation)
        )
    return faults


class SimulatedGateway:
    name = "simulated"
    safe_retry_s = 24 * 3600.0
    late_capture_s = 24 * 3600.0
    declines_may_turn_s = 0.0

    def __init__(
        self,
        ledger: Path | None,
        faults: str = "",
        *,
        earlier: Path | None = None,
        lock_wait_s: float = LOCK_WAIT_S,
    ) -> None:
        """`ledger` is the file, None for memory only; `earlier` one of an earlier version, which
        is read in. Raises StartError if it cannot be opened."""
        self._faults = parse_faults(faults)
        self._read_in = None
        if ledger is None:
            file = LedgerFile(None, _refund_outcome, lock_wait_s)
        else:
            file, self._read_in = open_ledger(ledger, _refund_outcome, lock_wait_s, earlier)
        self._ledger = Ledger(file)

    async def charge(self, charge: ProviderCharge, timeout_s: float) -> Approved | Declined:
        fault = await self._suffer("charge", timeout_s)
        outcome = "declined_by_simulation" if charge.amount_cents % 10 == 7 else "approved"
        decided = await self._ledger.ask(
            Decision(
                id=charge.payment_id,
                amount_cents=charge.amount_cents,
                currency=charge.currency,
                outcome=outcome,
            )
        )
        if fault == "answer_lost":
            raise OutcomeUnknown("simulated: the response was lost")
        return _outcome(decided, "sim")

    async def find_charge(self, payment_id: UUID, timeout_s: float) -> Approved | Declined | None:
        self._refuse_if_down("charge")
        found = await self._ledger.ask(Question(CHARGE, payment_id))
        return _outcome(found, "sim") if found else None

    async def refund(self, refund: ProviderRefund, timeout_s: float) -> Approved | Declined:
        fault = await self._suffer("refund", timeout_s)
        decided = await self._ledger.ask(refund)
        if fault == "answer_lost":
            raise OutcomeUnknown("simulated: the response was lost")
        return _outcome(decided, "simre")

    async def find_refund(
        self, refund: ProviderRefund, timeout_s: float
    ) -> Approved | Declined | None:
        self._refuse_if_down("refund")
        found = await self._ledger.ask(Question(REFUND, refund.refund_id))
        return _outcome(found, "simre") if found else None

    @property
    def ledger(self) -> tuple[Path, UUID] | None:
        """The file, and the id that was made with it; None for memory only."""
        file = self._ledger.file
        return None if file.path is None else (file.path, file.id)

    async def close(self) -> None:
        await self._ledger.close()
        if self._read_in is not None:
            self._read_in.close()

    async def _suffer(self, operation: str, timeout_s: float) -> str | None:
        """Applies what is scripted for this call; returns the fault if it comes afterwards."""
        if not self._faults:
            return None
        if delay := self._next_fault(operation, ("delay",)):
            await asyncio.sleep(min(delay.seconds, timeout_s))
            if delay.seconds > timeout_s:
                raise OutcomeUnknown("simulated: slower than the timeout")
        fault = self._next_fault(operation, ("timeout", "answer_lost", "down"))
        if fault is None:
            return None
        if fault.kind == "down":
            raise NeverSent("simulated: the provider is down")
        if fault.kind == "timeout":
            await asyncio.sleep(timeout_s)
            raise OutcomeUnknown("simulated: no response")
        return fault.kind

    def _refuse_if_down(self, operation: str) -> None:
        """All that a question may suffer."""
        if self._next_fault(operation, ("down",)):
            raise NeverSent("simulated: the provider is down")

    def _next_fault(self, operation: str, kinds: tuple[str, ...]) -> Fault | None:
        for fault in self._faults:
            if fault.kind in kinds and fault.operation in (None, operation) and fault.take():
                return fault
        return None


def _refund_outcome(refund: ProviderRefund, charge: Decision | None, given_back: int) -> str:
    """`approved` or a decline code. The capture is found by the provider's own id of it."""
    capture = (f"sim_{refund.payment_id.hex}", "approved", refund.currency)
    if charge is None or (refund.provider_txn_id, charge.outcome, charge.currency) != capture:
        return "not_captured"
    if not 0 < refund.amount_cents <= charge.amount_cents - given_back:
        return "refund_exceeds_capture"
    if refund.amount_cents % 10 == 9 and refund.amount_cents < charge.amount_cents:
        return "refund_declined_by_simulation"
    return "approved"


def _outcome(decision: Decision, prefix: str) -> Approved | Declined:
    """`prefix` tells the provider's own ids of captures from those of refunds."""
    if decision.outcome == "approved":
        txn_id = f"{prefix}_{decision.id.hex}"
        return Approved(
            id=decision.id,
            amount_cents=decision.amount_cents,
            currency=decision.currency,
            provider_txn_id=txn_id,
        )
    return Declined(decision.outcome)
