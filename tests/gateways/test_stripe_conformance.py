"""The Stripe gateway against a stand-in in its own process: the conformance suite.

Where PROVIDER_SPECS is set, each exchange is held to Stripe's own schema (official.py).
"""

import time
from uuid import UUID

import msgspec
import pytest

from payments.gateways import Gateway, ProviderCharge, Step
from payments.gateways.stripe import StripeGateway
from tests.doubles.stand_in import Fault
from tests.doubles.stripe_server import StripeProcess, signed
from tests.gateways.conformance import (
    FAILURES,
    MISMATCHES,
    SECONDS,
    WAIT_S,
    GatewayConformance,
    begun,
    charge_of,
)
from tests.gateways.stripes import RETURN_URL, SECRETS, check_official

pytestmark = pytest.mark.anyio

METHODS: dict[Step, str] = {
    "ready": "pm_card_visa",
    "action": "pm_card_threeDSecure2Required",
    "processing": "pm_usBankAccount_success",
}


class StripeHarness:
    declined_cents = 1500
    method: str | None = "pm_card_visa"
    declined_method: str | None = "pm_card_chargeDeclinedInsufficientFunds"
    amounts: tuple[tuple[int, str], ...] = (
        *((50, "INR"), (500, "JPY"), (2_147_483_640, "USD")),
        *((5, "ISK"), (5, "UGX"), (15_000, "MGA"), (1510, "KWD"), (1550, "HUF")),
    )
    prepares = True
    method_to_prepare: str | None = "pm_card_visa"
    refused_method: str | None = "tok_visa"
    steps: frozenset[Step] = frozenset(METHODS)
    cancels: frozenset[Step] = frozenset({"ready", "action"})
    sends_webhooks = dates_webhooks = True

    def __init__(self, gateway: Gateway, stripe: StripeProcess) -> None:
        self.gateway = gateway
        self._stripe = stripe

    def can(self, fault: str, operation: str) -> bool:
        """A refund is found by our id: stated with another, it is not found."""
        return fault in (*FAILURES, *MISMATCHES) and (fault, operation) != (
            "wrong_id",
            "find_refund",
        )

    async def script(self, fault: str, operation: str) -> None:
        if fault == "refused":
            self._stripe.refuse()
        else:
            seconds = SECONDS.get(fault, 0)
            self._stripe.script(Fault(fault, operation, seconds=seconds, location="/"))  # type: ignore[arg-type]

    async def recover(self) -> None:
        self._stripe.listen()

    async def captured(self, payment_id: UUID) -> list[int]:
        return self._amounts(payment_id)

    async def given_back(self, refund_id: UUID) -> list[int]:
        return self._amounts(refund_id)

    def _amounts(self, our_id: UUID) -> list[int]:
        """In our units, worked out again."""
        times = {"isk": (1, 100), "ugx": (1, 100), "mga": (100, 1)}
        found = []
        for each in self._stripe.moved(our_id):
            by, of = times.get(each["currency"], (1, 1))
            found.append(each["amount"] * by // of)
        return found

    async def open(self, step: Step) -> ProviderCharge:
        charge = charge_of(payment_method=METHODS[step])
        charge = msgspec.structs.replace(charge, return_url=RETURN_URL)
        charge = await begun(self.gateway, charge)
        if step != "ready":
            await self.gateway.charge(charge, WAIT_S)
        return charge

    async def customer_acts(self, charge: ProviderCharge) -> None:
        self._stripe.customer_acts(charge.reference)

    async def finish(self, charge: ProviderCharge) -> None:
        self._stripe.finish(charge.reference)

    async def made_by_customer(self, amount_cents: int) -> str | None:
        return None

    def webhook(
        self, charge: ProviderCharge | None, *, age_s: float = 0, secret: str | None = None
    ) -> tuple[dict[str, str], bytes]:
        about = {"object": "balance"}
        if charge is not None:
            about = {"object": "payment_intent", "id": charge.reference or ""}
        event = {"id": "evt_1", "object": "event", "data": {"object": about}}
        body = msgspec.json.encode(event)
        return signed(body, time.time() - age_s, secret or SECRETS[1]), body

    def redated(self, old: tuple[dict[str, str], bytes], headers: dict[str, str]) -> dict[str, str]:
        return {
            name: headers[name].split(",")[0] + "," + value.split(",")[1]
            for name, value in old[0].items()
        }


@pytest.fixture
def gateway(stripe_gateway: StripeGateway) -> StripeGateway:
    return stripe_gateway


@pytest.fixture
def harness(gateway: StripeGateway, stripe: StripeProcess) -> StripeHarness:
    return StripeHarness(gateway, stripe)


class TestStripeGatewayConforms(GatewayConformance):
    pass


def test_all_of_it_is_as_stripe_describes_it(pytestconfig: pytest.Config) -> None:
    """The last test of the module: what the others have exchanged."""
    check_official(
        pytestconfig,
        *("POST /v1/payment_intents", "GET /v1/payment_intents/{intent}", "POST /v1/refunds"),
        *("POST /v1/payment_intents/{intent}/confirm", "GET /v1/refunds"),
        "POST /v1/payment_intents/{intent}/cancel",
    )
