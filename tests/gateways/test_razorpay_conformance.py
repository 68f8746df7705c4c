"""The Razorpay gateway against its stand-in: the conformance suite.

A charge of the suite is one that its customer paid at Checkout: `begun` gives it the payment as
payment method, failed if it is to be declined. Before it is charged it is authorized, not ready.
What only orders have, which wait for their customers, is tested here beside the suite.
"""

import asyncio
from uuid import UUID

import msgspec
import pytest

from payments.gateways import Gateway, Open, OutcomeUnknown, ProviderCharge, Step
from payments.gateways.razorpay import RazorpayGateway
from payments.payment.state import Approved
from tests.doubles.razorpay_ledger import WEBHOOK_SECRET, signed, webhook
from tests.doubles.razorpay_server import RazorpayProcess
from tests.doubles.stand_in import Fault
from tests.gateways import conformance
from tests.gateways.conformance import (
    MISMATCHES,
    SECONDS,
    TIMEOUT_S,
    WAIT_S,
    GatewayConformance,
    charge_of,
    fails,
    timeout_for,
)

pytestmark = pytest.mark.anyio

DECLINED_CENTS = 1507
NOWHERE = "http://127.0.0.1:9"
OPERATIONS = ("charge", "refund", "find_charge", "find_refund", "prepare", "cancel")
# The exchange that meets the fault: a charge that is captured is not sent again, but read.
READS_FIRST = (*MISMATCHES, "timeout")


class RazorpayHarness:
    declined_cents = DECLINED_CENTS
    amounts: tuple[tuple[int, str], ...] = (
        (100, "INR"),
        (500, "JPY"),
        (1510, "KWD"),
        (2_147_483_640, "USD"),
    )
    method: str | None = None  # each charge has one of its own: see `begun`
    declined_method: str | None = None
    prepares = True
    method_to_prepare: str | None = None
    refused_method = "pm_card_visa"
    steps: frozenset[Step] = frozenset({"action", "authorized"})
    cancels: frozenset[Step] = frozenset()
    sends_webhooks = True
    dates_webhooks = False

    def __init__(self, gateway: Gateway, razorpay: RazorpayProcess) -> None:
        self.gateway = gateway
        self._razorpay = razorpay

    def can(self, fault: str, operation: str) -> bool:
        return operation in OPERATIONS

    async def script(self, fault: str, operation: str) -> None:
        if fault == "refused":
            self._razorpay.refuse()
            return
        reads = operation == "cancel" or (operation == "charge" and fault in READS_FIRST)
        operation = "find_charge" if reads else operation
        self._razorpay.script(fault_of(fault, operation))

    async def recover(self) -> None:
        self._razorpay.script()
        self._razorpay.listen()

    async def captured(self, payment_id: UUID) -> list[int]:
        return [each["amount"] for each in self._razorpay.captures(payment_id)]

    async def given_back(self, refund_id: UUID) -> list[int]:
        return [each["amount"] for each in self._razorpay.refunds(refund_id)]

    async def open(self, step: Step) -> ProviderCharge:
        if step == "action":
            charge = charge_of()
            order_id = await self.gateway.prepare(charge, WAIT_S)
            return msgspec.structs.replace(charge, reference=order_id)
        return await conformance.begun(self.gateway, charge_of())

    async def customer_acts(self, charge: ProviderCharge) -> None:
        self._razorpay.pay(charge.amount_cents, charge.currency, order_id=charge.reference)

    async def finish(self, charge: ProviderCharge) -> None:
        raise NotImplementedError

    async def made_by_customer(self, amount_cents: int) -> str | None:
        return self._razorpay.pay(amount_cents)

    def webhook(
        self, charge: ProviderCharge | None, *, age_s: float = 0, secret: str | None = None
    ) -> tuple[dict[str, str], bytes]:
        body = webhook("settlement.processed", settlement={"id": "setl_1", "entity": "settlement"})
        if charge is not None:
            body = webhook(
                "payment.authorized", payment=self._razorpay.entity(charge.reference or "")
            )
        return signed(body, secret or WEBHOOK_SECRET), body

    def redated(self, old: tuple[dict[str, str], bytes], headers: dict[str, str]) -> dict[str, str]:
        raise NotImplementedError


@pytest.fixture
def harness(razorpay_gateway: RazorpayGateway, razorpay: RazorpayProcess) -> RazorpayHarness:
    return RazorpayHarness(razorpay_gateway, razorpay)


def fault_of(kind: str, operation: str) -> Fault:
    seconds = SECONDS.get(kind, 0)
    return Fault(kind, operation, seconds=seconds, location=NOWHERE)  # type: ignore[arg-type]


class TestRazorpayConforms(GatewayConformance):
    @pytest.fixture(autouse=True)
    def paid_at_checkout(self, monkeypatch: pytest.MonkeyPatch, razorpay: RazorpayProcess) -> None:
        plainly_begun, is_open_at = conformance.begun, conformance.is_open

        async def begun(gateway: Gateway, charge: ProviderCharge) -> ProviderCharge:
            if charge.payment_method is None:
                status = "failed" if charge.amount_cents == DECLINED_CENTS else "authorized"
                paid = razorpay.pay(charge.amount_cents, charge.currency, status=status)
                charge = msgspec.structs.replace(charge, payment_method=paid)
            return await plainly_begun(gateway, charge)

        def is_open(found: object, gateway: Gateway, *steps: Step) -> bool:
            return is_open_at(found, gateway, *(steps or ("authorized",)))

        monkeypatch.setattr(conformance, "begun", begun)
        monkeypatch.setattr(conformance, "is_open", is_open)

    async def test_preparing_captures_nothing_and_gives_one_reference(
        self, harness: conformance.Harness
    ) -> None:
        """As in the suite, but the order waits for its customer."""
        gateway, charge = harness.gateway, charge_of()
        asked = [msgspec.structs.replace(charge, return_url="https://shop.example/paid"), charge]
        references = await asyncio.gather(*(gateway.prepare(each, WAIT_S) for each in asked * 4))
        assert set(references) == {references[0]}
        assert await gateway.prepare(charge_of(), WAIT_S) not in references
        prepared = msgspec.structs.replace(charge, reference=references[0])
        found = await gateway.find_charge(prepared, WAIT_S)
        assert isinstance(found, Open)
        assert (found.id, found.step) == (charge.payment_id, "action")
        assert await harness.captured(charge.payment_id) == []


# What a call meets in each of its exchanges, with the operations of the stand-in.
EXCHANGES = {
    "charge of a payment": ("find_charge", "mark", "charge"),
    "charge of an order": ("find_order", "find_charge", "charge"),
    "prepare": ("find_order", "prepare"),
}


class TestEachExchange:
    @pytest.mark.parametrize("fault", ["500", "timeout", "answer_lost", "garbage"])
    @pytest.mark.parametrize(
        ("kind", "operation"),
        [(kind, operation) for kind, operations in EXCHANGES.items() for operation in operations],
    )
    async def test_that_fails(
        self,
        harness: RazorpayHarness,
        razorpay: RazorpayProcess,
        kind: str,
        operation: str,
        fault: str,
    ) -> None:
        """Nothing is done twice, and the same call completes it afterwards."""
        gateway, charge = harness.gateway, charge_of()
        if kind == "charge of a payment":
            charge = msgspec.structs.replace(charge, reference=razorpay.pay(1500))
        elif kind == "charge of an order":
            charge = await harness.open("action")
            await harness.customer_acts(charge)
        asking = gateway.prepare if kind == "prepare" else gateway.charge
        await harness.script(fault, operation)
        if operation == "charge":  # READS_FIRST is about the suite's calls
            razorpay.script(fault_of(fault, operation))
        await fails(asking(charge, timeout_for(fault)), fault)
        await harness.recover()
        again = await asking(charge, WAIT_S)
        assert await asking(charge, WAIT_S) == again
        if kind == "prepare":
            receipt = str(charge.payment_id)
            assert [o["id"] for o in razorpay.entities("order") if o["receipt"] == receipt] == [
                again
            ]
        else:
            assert isinstance(again, Approved)
            assert await harness.captured(charge.payment_id) == [1500]

    async def test_nothing_is_said_to_be_unsent_after_the_capture_was_sent(
        self, harness: RazorpayHarness, razorpay: RazorpayProcess
    ) -> None:
        """The time is over when the capture is rejected as done already: looking is not sent."""
        charge = msgspec.structs.replace(charge_of(), reference=razorpay.pay(1500))
        gateway = harness.gateway
        assert isinstance(gateway, RazorpayGateway)
        api = gateway._api
        sent = api.send

        async def send(method: str, path: str, until: float, *more: object) -> object:
            response = await sent(method, path, until, *more)  # type: ignore[arg-type]
            if path.endswith("/capture"):
                await asyncio.sleep(TIMEOUT_S)
                return response._replace(status=400, body=b"{}")
            return response

        api.send = send  # type: ignore[assignment, method-assign]
        with pytest.raises(OutcomeUnknown):
            await gateway.charge(charge, TIMEOUT_S)
        assert await harness.captured(charge.payment_id) == [1500]
