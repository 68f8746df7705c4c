"""scripts/sandbox-check, with a stand-in in place of a provider's test mode."""

import os
from typing import Any

import pytest
from click.testing import CliRunner, Result

from scripts.sandbox_check.__main__ import PROVIDERS, main
from tests.doubles.stand_in import Fault
from tests.doubles.stripe_server import SECRET_KEY, StripeProcess


def checked(stripe: StripeProcess, *arguments: str, **more: str) -> Result:
    given: dict[str, Any] = {name: None for name in os.environ if name.startswith("STRIPE_")}
    given |= {"STRIPE_API_BASE": stripe.url, "STRIPE_SECRET_KEY": SECRET_KEY} | more
    return CliRunner().invoke(main, arguments, env=given)


def test_all_of_it_holds(stripe: StripeProcess) -> None:
    done = checked(stripe, "stripe", "--currency", "INR")
    assert (done.exit_code, done.output.splitlines()[-1]) == (0, "all of it held")
    states = [line.split()[0] for line in done.output.splitlines()[:-1]]
    assert states.count("ok") >= 15
    assert states[-1] == "skip"  # webhooks, which have to be forwarded


def test_what_does_not_hold_is_said(stripe: StripeProcess) -> None:
    stripe.script(Fault("wrong_amount", "find_charge"))
    done = checked(stripe, "stripe")
    assert done.exit_code == 1
    assert [line for line in done.output.splitlines() if line.startswith("FAIL  it is found")]


@pytest.mark.parametrize(
    ("arguments", "given", "said"),
    [
        ((), {}, "Missing argument"),
        (("strype",), {}, "is not"),
        (("stripe", "--currency", "XXX"), {}, "ISO 4217"),
        (("stripe", "--currency", "BOB"), {}, "the account does not take it"),
        (("stripe", "--webhooks", "0"), {}, "--webhooks"),
        (("stripe",), {"STRIPE_SECRET_KEY": "sk_live_hidden"}, "live key"),
        (("stripe",), {"STRIPE_SECRET_KEY": "sk_test_hidden"}, "rejects the API key"),
        (("stripe",), {"STRIPE_API_BASE": "http://10.0.0.1"}, "STRIPE_API_BASE"),
    ],
)
def test_it_cannot_run(
    stripe: StripeProcess, arguments: tuple[str, ...], given: dict[str, str], said: str
) -> None:
    before = stripe.counts()["charge"]
    done = checked(stripe, *arguments, **given)
    assert done.exit_code == 2
    assert said in done.output
    assert "hidden" not in done.output
    assert stripe.counts()["charge"] == before


def test_its_providers() -> None:
    assert "stripe" in PROVIDERS
