"""Failed asserts of the conformance suite show their values, as those of test modules do. And the
stand-in for Stripe, which the tests of a module share: each has its own ids."""

from collections.abc import Iterator

import pytest

from tests.doubles.stripe_server import RESTRICTED_KEY, SECRET_KEY, StripeProcess

pytest.register_assert_rewrite("tests.gateways.conformance")


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
