"""The PayPal gateway against the stand-in: the conformance suite, each exchange of it held to
PayPal's own files."""

import asyncio
import json
from collections.abc import AsyncIterator, Iterator
from decimal import Decimal
from uuid import UUID

import msgspec
import pytest

from payments.gateways import ProviderCharge, Step
from payments.gateways.oauth import OAuthHttp
from payments.gateways.paypal import TOKEN_PATH, PayPalGateway
from payments.gateways.units import from_paypal
from tests.doubles import paypal_server
from tests.doubles.paypal_server import CLIENT_ID, CLIENT_SECRET, WEBHOOK_ID, PayPalProcess, signed
from tests.doubles.stand_in import Fault
from tests.gateways.conformance import FAILURES, MISMATCHES, WAIT_S, GatewayConformance, charge_of
from tests.gateways.official_paypal import Counts, RecordedHttp, check, directory

pytestmark = pytest.mark.anyio

SECONDS = {"slow": 5.0, "drip": 0.05}
READ = {"find_refund": "find_charge"}  # both read the order


class PayPalHarness:
    declined_cents = 1507
    amounts = ((1, "INR"), (500, "JPY"), (150_000, "HUF"), (2_147_483_640, "USD"))
    prepares = True
    method_to_prepare: str | None = None
    refused_method = "pm_of another"
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


@pytest.fixture(scope="module")
def running_paypal(tmp_path_factory: pytest.TempPathFactory) -> Iterator[PayPalProcess]:
    with PayPalProcess(tmp_path_factory.mktemp("paypal") / "ledger.jsonl") as running:
        yield running


@pytest.fixture
def paypal(running_paypal: PayPalProcess) -> Iterator[PayPalProcess]:
    """Shared, as every test has its own ids; its faults are this test's alone."""
    yield running_paypal
    running_paypal.script()
    running_paypal.listen()


@pytest.fixture(scope="module")
def counted() -> Iterator[list[Counts]]:
    counts: list[Counts] = []
    yield counts
    total = Counts()
    for each in counts:
        total = total.plus(each)
    print(f"\nexchanges with PayPal's stand-in: {total}")  # noqa: T201


@pytest.fixture
async def gateway(paypal: PayPalProcess, counted: list[Counts]) -> AsyncIterator[PayPalGateway]:
    http = RecordedHttp(paypal.url)
    oauth = OAuthHttp(http, TOKEN_PATH, CLIENT_ID, CLIENT_SECRET)
    opened = PayPalGateway(oauth, environment="sandbox", webhook_id=WEBHOOK_ID)
    yield opened
    await opened.close()
    if (specs := directory()) is not None:
        counted.append(await asyncio.to_thread(check, http.exchanges, specs))


@pytest.fixture
async def harness(gateway: PayPalGateway, paypal: PayPalProcess) -> PayPalHarness:
    return PayPalHarness(gateway, paypal)


class TestPayPalConforms(GatewayConformance):
    async def test_its_exchanges_are_held_to_the_official_files(self) -> None:
        if directory() is None:
            pytest.skip("PROVIDER_SPECS names no directory with PayPal's own OpenAPI files")
