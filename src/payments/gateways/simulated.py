"""The simulated provider: the default gateway, for development, demonstrations and tests.

It is deterministic: an amount whose last digit is 7 is declined, every other is captured; a partial
refund whose last digit is 9 is declined. It keeps its own ledger, as a real provider does: a file
that the processes of a host share, that only grows and that survives a kill -9 of any of them.
Faults can be scripted, and a payment method that begins with sim_ has it play another course of
events for one charge: docs/simulated-gateway.md.
"""

import asyncio
import re
import time
from pathlib import Path
from urllib.parse import quote

import msgspec

from payments.errors import StartError
from payments.gateways import (
    NeverSent,
    NextAction,
    Open,
    OutcomeUnknown,
    ProviderCharge,
    ProviderRefund,
    Refusal,
)
from payments.gateways.earlier_ledger import open_ledger
from payments.gateways.ledger_file import (
    BEGINNING,
    CHARGE,
    LOCK_WAIT_S,
    REFUND,
    Beginning,
    Decision,
    LedgerFile,
    Question,
)
from payments.gateways.simulated_ledger import Ledger
from payments.gateways.simulated_methods import (
    FAULTS,
    METHODS,
    PREPARED,
    STEPS,
    Method,
    UnknownMethod,
    parse_method,
    stage,
)
from payments.payment.state import Approved, Declined

DECLINED = "declined_by_simulation"

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
    knows_our_id = True
    charge_retry_s = refund_retry_s = 24 * 3600.0
    late_capture_s = 24 * 3600.0
    declines_may_turn_s = 0.0

    def __init__(
        self,
        ledger: Path | None,
        faults: str = "",
        *,
        name: str = "simulated",
        earlier: Path | None = None,
        lock_wait_s: float = LOCK_WAIT_S,
    ) -> None:
        """`ledger` is the file, None for memory only; `earlier` one of an earlier version, which
        is read in. Raises StartError if it cannot be opened."""
        self.name = name
        self._faults = parse_faults(faults)
        self._read_in = None
        if ledger is None:
            file = LedgerFile(None, _refund_outcome, lock_wait_s)
        else:
            file, self._read_in = open_ledger(ledger, _refund_outcome, lock_wait_s, earlier)
        self._ledger = Ledger(file)

    def refuses(self, charge: ProviderCharge) -> Refusal | None:
        try:
            method = parse_method(charge.payment_method)
        except UnknownMethod:
            return Refusal("payment_method", f"begins with sim_: must be one of {METHODS}")
        if method is not None and method.kind == "refuse":
            return Refusal("payment_method", "simulated: this provider does not take it")
        return None

    def reference(self, charge: ProviderCharge) -> str | None:
        method = _method_of(charge)
        return None if method is None else method.reference

    def needs_preparing(self, charge: ProviderCharge) -> bool:
        method = _method_of(charge)
        return method is not None and method.kind in PREPARED

    async def account(self, timeout_s: float) -> str | None:
        """The id that was made with its ledger; None for memory only."""
        file = self._ledger.file
        return None if file.path is None else str(file.id)

    async def prepare(self, charge: ProviderCharge, timeout_s: float) -> str:
        self._refuse_if_down("charge")
        await self._begin(charge)
        return f"simref_{charge.payment_id.hex}"

    async def charge(self, charge: ProviderCharge, timeout_s: float) -> Approved | Declined | Open:
        method = _method_of(charge)
        lost = await self._suffer("charge", timeout_s, method) == "answer_lost"
        beginning = await self._beginning_of(charge, method)
        outcome: Approved | Declined | Open | None
        if beginning is None:
            declines = method is not None and method.kind == "decline"
            outcome = await (self._decide(charge, DECLINED) if declines else self._capture(charge))
        else:
            outcome = await self._as_it_stands(charge, beginning)
            if isinstance(outcome, Open) and outcome.step in ("ready", "authorized"):
                outcome = await self._capture(charge)
        if lost or outcome is None:
            raise OutcomeUnknown("simulated: the response was lost")
        return outcome

    async def find_charge(
        self, charge: ProviderCharge, timeout_s: float
    ) -> Approved | Declined | Open | None:
        self._refuse_if_down("charge")
        if found := await self._ledger.ask(Question(CHARGE, charge.payment_id)):
            return _outcome(found, "sim")
        beginning = await self._ledger.ask(Question(BEGINNING, charge.payment_id))
        return None if beginning is None else await self._as_it_stands(charge, beginning)

    async def cancel(
        self, charge: ProviderCharge, timeout_s: float
    ) -> Approved | Declined | Open | None:
        found = await self.find_charge(charge, timeout_s)
        if isinstance(found, Open) and found.step != "processing":
            return await self._decide(charge, "cancelled")
        return found

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

    async def close(self) -> None:
        await self._ledger.close()
        if self._read_in is not None:
            self._read_in.close()

    async def _capture(self, charge: ProviderCharge) -> Approved | Declined:
        return await self._decide(charge, DECLINED if charge.amount_cents % 10 == 7 else "approved")

    async def _decide(self, charge: ProviderCharge, outcome: str) -> Approved | Declined:
        """What stands: this outcome, unless there was one before."""
        decision = Decision(
            id=charge.payment_id,
            amount_cents=charge.amount_cents,
            currency=charge.currency,
            outcome=outcome,
        )
        return _outcome(await self._ledger.ask(decision), "sim")

    async def _begin(self, charge: ProviderCharge) -> Beginning:
        """The charge in steps as it was begun: now, unless it was before."""
        assert charge.payment_method is not None
        begun: Beginning = await self._ledger.ask(
            Beginning(id=charge.payment_id, method=charge.payment_method, at=time.time())
        )
        return begun

    async def _beginning_of(
        self, charge: ProviderCharge, method: Method | None
    ) -> Beginning | None:
        if method is not None and method.kind in STEPS:
            return await self._begin(charge)
        if charge.payment_method is None and charge.reference is not None:
            # Settling completes it, which knows no payment method.
            found: Beginning | None = await self._ledger.ask(Question(BEGINNING, charge.payment_id))
            return found
        return None

    async def _as_it_stands(
        self, charge: ProviderCharge, beginning: Beginning
    ) -> Approved | Declined | Open | None:
        """None: the provider does not know of it yet."""
        if found := await self._ledger.ask(Question(CHARGE, charge.payment_id)):
            return _outcome(found, "sim")
        method = parse_method(beginning.method)
        assert method is not None
        where = stage(method, time.time() - beginning.at)
        match where:
            case "unknown":
                return None
            case "approved":
                return await self._capture(charge)
            case "declined":
                return await self._decide(charge, DECLINED)
            case "action":
                return Open(id=charge.payment_id, step="action", action=_action(charge))
        return Open(id=charge.payment_id, step=where)

    async def _suffer(
        self, operation: str, timeout_s: float, method: Method | None = None
    ) -> str | None:
        """Applies what is scripted for this call; returns the fault if it comes afterwards. Only
        SIMULATED_FAULTS makes an outage: a payment method plays one charge, and others go on."""
        if method is None and not self._faults:
            return None
        asked = method.kind if method is not None and method.kind in FAULTS else None
        delay = self._next_fault(operation, ("delay",))
        delay_s = delay.seconds if delay else 0.0
        if method is not None and asked == "delay":
            delay_s = method.seconds
        if delay_s:
            await asyncio.sleep(min(delay_s, timeout_s))
            if delay_s > timeout_s:
                raise OutcomeUnknown(
                    "simulated: slower than the timeout", is_outage=asked != "delay"
                )
        fault = self._next_fault(operation, ("timeout", "answer_lost", "down"))
        kind = fault.kind if fault else asked
        if kind == "down":
            raise NeverSent("simulated: the provider is down", is_outage=fault is not None)
        if kind == "timeout":
            await asyncio.sleep(timeout_s)
            raise OutcomeUnknown("simulated: no response", is_outage=fault is not None)
        return kind

    def _refuse_if_down(self, operation: str) -> None:
        """All that a question may suffer."""
        if self._next_fault(operation, ("down",)):
            raise NeverSent("simulated: the provider is down")

    def _next_fault(self, operation: str, kinds: tuple[str, ...]) -> Fault | None:
        for fault in self._faults:
            if fault.kind in kinds and fault.operation in (None, operation) and fault.take():
                return fault
        return None


def _method_of(charge: ProviderCharge) -> Method | None:
    """None also for one that `refuses` does not take: then its key is known, and it had begun."""
    try:
        return parse_method(charge.payment_method)
    except UnknownMethod:
        return None


def _action(charge: ProviderCharge) -> NextAction:
    """Nothing is there to be visited: the customer has acted when ACTION_S are over."""
    url = f"https://simulated.invalid/customer/{charge.payment_id}"
    if charge.return_url is not None:
        url += f"?return_url={quote(charge.return_url, safe='')}"
    return NextAction(
        type="redirect",
        fields={"url": url, "client_secret": f"simsecret_{charge.payment_id.hex}"},
    )


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
