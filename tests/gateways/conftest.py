"""Failed asserts of the conformance suite show their values, as those of test modules do. And what
the tests of one provider share."""

import ssl
from collections.abc import AsyncIterator, Iterator

import pytest

from payments.gateways.http import ProviderHttp
from payments.gateways.razorpay import RazorpayGateway
from tests.doubles.razorpay_ledger import WEBHOOK_SECRET
from tests.doubles.razorpay_server import AUTHORIZATION, KEY_ID, RazorpayProcess
from tests.doubles.stripe_server import RESTRICTED_KEY, SECRET_KEY, StripeProcess

pytest.register_assert_rewrite("tests.gateways.conformance")

TLS = ssl.create_default_context()  # slow to make, and not used on loopback


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
    http = ProviderHttp(razorpay.url, {"Authorization": AUTHORIZATION}, keep_alive=False, tls=TLS)
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
