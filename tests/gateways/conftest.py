"""What the tests of one provider share: its stand-in, and a gateway to it.

What holds exchanges to the providers' own files is imported where it is used: it takes half a
second, which quick tests need not wait for.
"""

from collections.abc import AsyncIterator, Iterator
from typing import Any

import pytest

from payments.gateways.http import ProviderHttp
from payments.gateways.paypal import PayPalGateway
from payments.gateways.razorpay import RazorpayGateway
from payments.gateways.stripe import StripeGateway
from tests.doubles.paypal_server import CLIENT_SECRET, TOKEN_S, PayPalProcess
from tests.doubles.razorpay_ledger import WEBHOOK_SECRET
from tests.doubles.razorpay_server import AUTHORIZATION, KEY_ID, RazorpayProcess
from tests.doubles.stripe_server import RESTRICTED_KEY, SECRET_KEY, StripeProcess
from tests.gateways.conformance import tls


@pytest.fixture(scope="module")
def running_razorpay(tmp_path_factory: pytest.TempPathFactory) -> Iterator[RazorpayProcess]:
    with RazorpayProcess(tmp_path_factory.mktemp("razorpay") / "ledger.jsonl") as process:
        yield process


@pytest.fixture
def razorpay(running_razorpay: RazorpayProcess) -> Iterator[RazorpayProcess]:
    """Shared, as every test has its own ids; its faults and settings are this test's alone."""
    yield running_razorpay
    running_razorpay.script()
    running_razorpay.listen()
    running_razorpay.as_at_first()


@pytest.fixture
async def razorpay_gateway(razorpay: RazorpayProcess) -> AsyncIterator[RazorpayGateway]:
    http = ProviderHttp(razorpay.url, {"Authorization": AUTHORIZATION}, keep_alive=False, tls=tls())
    gateway = RazorpayGateway(http, KEY_ID, ("the one before", WEBHOOK_SECRET))
    yield gateway
    await gateway.close()


@pytest.fixture(scope="module")
def running_stripe(tmp_path_factory: pytest.TempPathFactory) -> Iterator[StripeProcess]:
    with StripeProcess(tmp_path_factory.mktemp("stripe") / "ledger.jsonl") as running:
        yield running


@pytest.fixture
def stripe(running_stripe: StripeProcess) -> Iterator[StripeProcess]:
    """Its faults and API keys are this test's alone."""
    yield running_stripe
    running_stripe.script()
    running_stripe.listen()
    running_stripe.busy(0)
    running_stripe.fail_inside(0)
    running_stripe.accept_keys(SECRET_KEY, RESTRICTED_KEY)


@pytest.fixture(scope="module")
def running_paypal(tmp_path_factory: pytest.TempPathFactory) -> Iterator[PayPalProcess]:
    with PayPalProcess(tmp_path_factory.mktemp("paypal") / "ledger.jsonl") as running:
        yield running


@pytest.fixture
def paypal(running_paypal: PayPalProcess) -> Iterator[PayPalProcess]:
    """Shared, as every test has its own ids; its faults and settings are this test's alone."""
    yield running_paypal
    running_paypal.script()
    running_paypal.listen()
    given = {"approves": True, "conflicts": 0, "makes_not": ""}
    running_paypal.set(**given, secret=CLIENT_SECRET, token_s=TOKEN_S)


@pytest.fixture(scope="module")
def paypal_counts() -> Iterator[list[Any]]:
    from tests.gateways.official_paypal import Counts, told

    counts: list[Counts] = []
    yield counts
    print(f"\n{told(counts)}")  # noqa: T201


@pytest.fixture
async def paypal_gateway(
    paypal: PayPalProcess, paypal_counts: list[Any]
) -> AsyncIterator[PayPalGateway]:
    from tests.gateways.official_paypal import checked_gateway

    async with checked_gateway(paypal.url, paypal_counts) as opened:
        yield opened


@pytest.fixture
async def stripe_gateway(stripe: StripeProcess) -> AsyncIterator[StripeGateway]:
    from tests.gateways.stripes import opened_gateway

    async with opened_gateway(stripe.url) as opened:
        yield opened
