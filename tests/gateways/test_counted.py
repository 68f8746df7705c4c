"""What a gateway that errs may and may not do to the service."""

import asyncio
from typing import Any

import pytest

from payments.gateways import NeverSent, OutcomeUnknown, ProviderCharge
from payments.gateways import counted as module
from payments.gateways.counted import CountedGateway
from payments.observability.metrics import Telemetry
from payments.payment.state import Approved, Declined
from tests.doubles.gateway import ScriptedGateway, after, decline, never_sent, no_answer
from tests.support import ORDER_ID

pytestmark = pytest.mark.anyio

CHARGE = ProviderCharge(payment_id=ORDER_ID, amount_cents=1500, currency="INR")


def counted(telemetry: Telemetry) -> dict[str, float]:
    return {
        outcome: child._value.get()
        for (operation, outcome), child in telemetry.gateway_calls.items()
        if operation == "charge" and child._value.get()
    }


def answers(answer: Any) -> Any:
    return lambda gateway, charge: answer


@pytest.mark.parametrize(
    ("step", "raised", "label"),
    [
        (decline, None, "declined"),
        (never_sent, NeverSent, "never_sent"),
        (no_answer, OutcomeUnknown, "unknown"),
        (lambda gateway, charge: 1 / 0, OutcomeUnknown, "unknown"),
        (
            answers(
                Approved(id=ORDER_ID, amount_cents=1500, currency="INR", provider_txn_id="txn\x00")
            ),
            OutcomeUnknown,
            "unknown",
        ),
        (
            answers(Approved(id=ORDER_ID, amount_cents=1500, currency="INR", provider_txn_id="")),
            OutcomeUnknown,
            "unknown",
        ),
        (
            answers(
                Approved(id=ORDER_ID, amount_cents=1500, currency="INR", provider_txn_id="x" * 256)
            ),
            OutcomeUnknown,
            "unknown",
        ),
        (answers(Declined("\ud800")), OutcomeUnknown, "unknown"),
    ],
)
async def test_every_call_is_counted_by_what_came_of_it(step: Any, raised: Any, label: str) -> None:
    telemetry = Telemetry()
    gateway = CountedGateway(ScriptedGateway(step), telemetry)
    if raised is None:
        assert await gateway.charge(CHARGE, 1) == Declined("insufficient_funds")
    else:
        with pytest.raises(raised):
            await gateway.charge(CHARGE, 1)
    assert counted(telemetry) == {label: 1}


async def test_one_that_hangs_is_given_up(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "GRACE_S", 0.05)
    telemetry = Telemetry()
    gateway = CountedGateway(ScriptedGateway(after(asyncio.Event())), telemetry)
    with pytest.raises(OutcomeUnknown, match="does not return"):
        await gateway.charge(CHARGE, 0.05)
    assert counted(telemetry) == {"unknown": 1}
