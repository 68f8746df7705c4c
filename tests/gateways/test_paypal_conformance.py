"""The PayPal gateway against the stand-in: the conformance suite, each exchange of it held to
PayPal's own files."""

import asyncio
import json
from decimal import Decimal
from uuid import UUID

import msgspec
import pytest
from openapi_core.exceptions import OpenAPIError

from payments.gateways import ProviderCharge, Step
from payments.gateways.http import ProviderResponse
from payments.gateways.paypal import PayPalGateway
from payments.gateways.units import from_paypal
from tests.doubles import paypal_server
from tests.doubles.paypal_server import PayPalProcess, signed
from tests.doubles.stand_in import Fault
from tests.gateways.conformance import (
    FAILURES,
    MISMATCHES,
    SECONDS,
    WAIT_S,
    GatewayConformance,
    Harness,
    begun,
    captured,
    charge_of,
)
from tests.gateways.official_paypal import (
    Counts,
    Exchange,
    check,
    directory,
)

pytestmark = pytest.mark.anyio

READ = {"find_refund": "find_charge"}  # both read the order


class PayPalHarness:
    declined_cents = 1507
    amounts: tuple[tuple[int, str], ...] = (
        (1, "INR"),
        (500, "JPY"),
        (150_000, "HUF"),
        (2_147_483_640, "USD"),
    )
    prepares = True
    method: str | None = None
    declined_method: str | None = None
    method_to_prepare: str | None = None
    refused_method: str | None = "pm_of another"
    steps: frozenset[Step] = frozenset({"ready", "action", "processing"})
    cancels: frozenset[Step] = frozenset({"ready", "action"})
    sends_webhooks, dates_webhooks = True, False

    def __init__(self, gateway: PayPalGateway, paypal: PayPalProcess) -> None:
        self.gateway = gateway
        self._paypal = paypal

    def can(self, fault: str, operation: str) -> bool:
        no_body = operation == "cancel" and fault == "huge"
        return fault in (*FAILURES, *MISMATCHES) and not no_body

    async def script(self, fault: str, operation: str) -> None:
        if fault == "refused":
            return self._paypal.refuse()
        operation = READ.get(operation, operation)
        if fault in MISMATCHES and operation == "charge":
            operation = "find_charge"  # what is captured is read, not captured again
        seconds = SECONDS.get(fault, 0)
        made = Fault(fault, operation, seconds=seconds, location="https://127.0.0.1:9")  # type: ignore[arg-type]
        return self._paypal.script(made)

    async def recover(self) -> None:
        self._paypal.listen()
        self._paypal.script()

    async def captured(self, payment_id: UUID) -> list[int]:
        found = self._paypal.captures(payment_id)
        return [from_paypal(each.value, each.currency) for each in found]

    async def given_back(self, refund_id: UUID) -> list[int]:
        found = self._paypal.refunds(refund_id)
        return [from_paypal(each.value, each.currency) for each in found]

    async def open(self, step: Step) -> ProviderCharge:
        self._paypal.set(approves=step != "action")
        charge = charge_of()
        reference = await self.gateway.prepare(charge, WAIT_S)
        assert isinstance(reference, str)
        charge = msgspec.structs.replace(charge, reference=reference)
        self._paypal.set(approves=True)
        if step == "processing":
            self._paypal.change(reference, outcome="PENDING")
            await self.gateway.charge(charge, WAIT_S)
        return charge

    async def customer_acts(self, charge: ProviderCharge) -> None:
        assert charge.reference is not None
        self._paypal.approve(charge.reference)

    async def finish(self, charge: ProviderCharge) -> None:
        assert charge.reference is not None
        self._paypal.finish(charge.reference)

    async def made_by_customer(self, amount_cents: int) -> str | None:
        value = str(Decimal(amount_cents).scaleb(-2))
        return self._paypal.make_order(value, "INR", custom_id="their own")

    def webhook(
        self, charge: ProviderCharge | None, *, age_s: float = 0, secret: str | None = None
    ) -> tuple[dict[str, str], bytes]:
        resource = {"id": "4N3Y6Z0DM2"} if charge is None else {"id": charge.reference}
        kind = "identity" if charge is None else "checkout-order"
        event = {"id": "WH-1", "event_type": "X.Y", "resource_type": kind, "resource": resource}
        body = json.dumps(event, separators=(",", ":")).encode()
        return signed(body, secret or paypal_server.WEBHOOK_SECRET), body

    def redated(self, old: tuple[dict[str, str], bytes], headers: dict[str, str]) -> dict[str, str]:
        name = "paypal-transmission-time"
        return old[0] | {name: headers[name]}


@pytest.fixture
def gateway(paypal_gateway: PayPalGateway) -> PayPalGateway:
    return paypal_gateway


@pytest.fixture
async def harness(gateway: PayPalGateway, paypal: PayPalProcess) -> PayPalHarness:
    return PayPalHarness(gateway, paypal)


class TestPayPalConforms(GatewayConformance):
    @pytest.mark.parametrize("operation", ["refund", "find_charge", "find_refund"])
    async def test_a_cancelled_call_harms_no_other(self, harness: Harness, operation: str) -> None:
        await super().test_a_cancelled_call_harms_no_other(harness, operation)

    async def test_a_cancelled_capture_harms_no_other(self, harness: PayPalHarness) -> None:
        charge = await begun(harness.gateway, charge_of())
        await harness.script("timeout", "charge")
        running = asyncio.create_task(harness.gateway.charge(charge, WAIT_S))
        await asyncio.sleep(0.05)
        running.cancel()
        with pytest.raises(asyncio.CancelledError):
            await running
        await harness.recover()
        await captured(harness)

    async def test_its_exchanges_are_held_to_the_official_files(self) -> None:
        specs = directory()
        if specs is None:
            pytest.skip("PROVIDER_SPECS names no directory with PayPal's own OpenAPI files")
        unit = {"amount": {"currency_code": "USD", "value": "15.00"}}
        sent = {"intent": "CAPTURE", "purchase_units": [unit]}
        stated = {"id": "ORDER1", "status": "CREATED", "purchase_units": [unit]}
        assert check([order_made(sent, stated)], specs) == Counts(validated=1)
        for wrong in ({"intent": "CAPTUR"}, {"purchase_units": [{"amount": 15.0}]}):
            with pytest.raises(OpenAPIError):
                check([order_made(sent | wrong, stated)], specs)
        with pytest.raises(OpenAPIError):
            check([order_made(sent, stated | {"status": "DONE"})], specs)


def order_made(sent: object, stated: object) -> Exchange:
    response = ProviderResponse(201, json.dumps(stated).encode())
    return Exchange("POST", "/v2/checkout/orders", {}, json.dumps(sent).encode(), response)
