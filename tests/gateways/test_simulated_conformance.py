"""The simulated gateway passes the conformance suite; it cannot be told to have every fault."""

from collections.abc import AsyncIterator
from pathlib import Path
from uuid import UUID

import pytest

from payments.gateways import Gateway
from payments.gateways.simulated import SimulatedGateway
from tests.gateways.conformance import GatewayConformance
from tests.support import ledger_rows

pytestmark = pytest.mark.anyio

FAULTS = {"refused": "down", "timeout": "timeout", "slow": "delay=5", "answer_lost": "answer_lost"}


class SimulatedHarness:
    """Every script opens another gateway on the same ledger."""

    declined_cents = 1507

    def __init__(self, ledger: Path) -> None:
        self._ledger = ledger
        self._opened = [SimulatedGateway(ledger)]

    @property
    def gateway(self) -> Gateway:
        return self._opened[-1]

    def can(self, fault: str, operation: str) -> bool:
        """Questions meet only `down`."""
        return fault in FAULTS and (fault == "refused" or not operation.startswith("find_"))

    async def script(self, fault: str, operation: str) -> None:
        text = f"{operation.removeprefix('find_')}:{FAULTS[fault]}*1"
        self._opened.append(SimulatedGateway(self._ledger, text))

    async def recover(self) -> None:
        self._opened.append(SimulatedGateway(self._ledger))

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
async def harness(tmp_path: Path) -> AsyncIterator[SimulatedHarness]:
    opened = SimulatedHarness(tmp_path / "ledger.sqlite")
    yield opened
    await opened.close()


class TestSimulatedGatewayConforms(GatewayConformance):
    pass
