"""The simulated gateway passes the conformance suite; it cannot be told to have every fault."""

import time
from collections.abc import AsyncIterator
from pathlib import Path
from types import SimpleNamespace
from uuid import UUID, uuid4

import pytest

from payments.gateways import Gateway, ProviderCharge, Step, simulated
from payments.gateways.simulated import SimulatedGateway
from tests.gateways.conformance import WAIT_S, GatewayConformance, begun, charge_of
from tests.support import ledger_rows

pytestmark = pytest.mark.anyio

# The payment method that brings a charge there.
METHODS: dict[Step, str] = {
    "ready": "sim_prepare",
    "action": "sim_action",
    "authorized": "sim_authorized",
    "processing": "sim_pending_60",
}
LATER_S = 100.0  # the customer has acted, and what was processing is captured
FAULTS = {"refused": "down", "timeout": "timeout", "slow": "delay=5", "answer_lost": "answer_lost"}


class SimulatedHarness:
    """Every script opens another gateway on the same ledger."""

    declined_cents = 1507
    method: str | None = None
    declined_method: str | None = None
    amounts: tuple[tuple[int, str], ...] = ((1, "INR"), (500, "JPY"), (2_147_483_640, "USD"))
    prepares = True
    method_to_prepare = METHODS["ready"]
    refused_method = "sim_refuse"
    steps: frozenset[Step] = frozenset(METHODS)
    cancels: frozenset[Step] = frozenset({"ready", "action", "authorized"})
    sends_webhooks = dates_webhooks = False

    def __init__(self, ledger: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        self._ledger = ledger
        self._monkeypatch = monkeypatch
        self._opened = [SimulatedGateway(ledger)]

    @property
    def gateway(self) -> Gateway:
        return self._opened[-1]

    def can(self, fault: str, operation: str) -> bool:
        """Questions meet only `down`."""
        return fault in FAULTS and (
            operation in ("charge", "refund")
            or (fault == "refused" and operation in ("find_charge", "find_refund", "cancel"))
        )

    async def script(self, fault: str, operation: str) -> None:
        kind = "refund" if "refund" in operation else "charge"
        text = f"{kind}:{FAULTS[fault]}*1"
        self._opened.append(SimulatedGateway(self._ledger, text))

    async def recover(self) -> None:
        self._opened.append(SimulatedGateway(self._ledger))

    async def open(self, step: Step) -> ProviderCharge:
        charge = await begun(self.gateway, charge_of(payment_method=METHODS[step]))
        if step != "ready":
            await self.gateway.charge(charge, WAIT_S)
        if step == "authorized":
            await self.customer_acts(charge)
        return charge

    async def customer_acts(self, charge: ProviderCharge) -> None:
        """By waiting."""
        later = SimpleNamespace(time=lambda: time.time() + LATER_S)
        self._monkeypatch.setattr(simulated, "time", later)

    async def finish(self, charge: ProviderCharge) -> None:
        await self.customer_acts(charge)

    async def made_by_customer(self, amount_cents: int) -> str | None:
        return f"sim_ref_{uuid4().hex}"

    def webhook(
        self, charge: ProviderCharge | None, *, age_s: float = 0, secret: str | None = None
    ) -> tuple[dict[str, str], bytes]:
        raise NotImplementedError

    async def captured(self, payment_id: UUID) -> list[int]:
        return self._amounts(payment_id, refunds=False)

    async def given_back(self, refund_id: UUID) -> list[int]:
        return self._amounts(refund_id, refunds=True)

    def _amounts(self, asked: UUID, *, refunds: bool) -> list[int]:
        return [
            row.amount_cents
            for row in ledger_rows(self._ledger)
            if row.id == asked
            and row.outcome == "approved"
            and (row.payment_id is not None) is refunds
        ]

    async def close(self) -> None:
        for each in self._opened:
            await each.close()


@pytest.fixture
async def harness(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> AsyncIterator[SimulatedHarness]:
    opened = SimulatedHarness(tmp_path / "ledger.sqlite", monkeypatch)
    yield opened
    await opened.close()


class TestSimulatedGatewayConforms(GatewayConformance):
    pass
