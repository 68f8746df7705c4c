"""scripts/sandbox-check, with a stand-in in place of each provider's test mode."""

import os
from typing import Any

import pytest
from click.testing import CliRunner, Result

from scripts.sandbox_check.__main__ import PROVIDERS, main
from tests.doubles.paypal_server import CLIENT_ID, CLIENT_SECRET, WEBHOOK_ID, PayPalProcess
from tests.doubles.razorpay_ledger import WEBHOOK_SECRET
from tests.doubles.razorpay_server import KEY_ID, KEY_SECRET, RazorpayProcess
from tests.doubles.stand_in import Fault
from tests.doubles.stripe_server import SECRET_KEY, StripeProcess


def checked(stripe: StripeProcess, *arguments: str, **more: str) -> Result:
    given = {"STRIPE_API_BASE": stripe.url, "STRIPE_SECRET_KEY": SECRET_KEY} | more
    return run(*arguments, **given)


def run(*arguments: str, **given: str) -> Result:
    prefixes = ("STRIPE_", "RAZORPAY_", "PAYPAL_")
    env: dict[str, Any] = {name: None for name in os.environ if name.startswith(prefixes)}
    return CliRunner().invoke(main, arguments, env=env | given)


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
        (("stripe", "pm_card_visa"), {}, "PAYMENT must be left out"),
        (("stripe", "one", "two"), {}, "unexpected extra argument"),
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
    assert PROVIDERS == ["paypal", "razorpay", "stripe"]


def at_razorpay(razorpay: RazorpayProcess, *arguments: str, **more: str) -> Result:
    given = {
        "RAZORPAY_API_BASE": razorpay.url,
        "RAZORPAY_KEY_ID": KEY_ID,
        "RAZORPAY_KEY_SECRET": KEY_SECRET,
        "RAZORPAY_WEBHOOK_SECRETS": WEBHOOK_SECRET,
    }
    return run("razorpay", *arguments, "--currency", "INR", **given | more)


def test_razorpay_with_and_without_a_payment(razorpay: RazorpayProcess) -> None:
    done = at_razorpay(razorpay)
    assert (done.exit_code, done.output.splitlines()[-1]) == (0, "all of it held")
    assert "skip  capture and refund: give the id (pay_…)" in done.output
    payment = razorpay.pay(1500)
    for _ in range(2):  # the second time it is captured already
        done = at_razorpay(razorpay, payment)
        assert (done.exit_code, done.output.splitlines()[-1]) == (0, "all of it held")
        assert "skip  capture" not in done.output
    assert [each["amount"] for each in razorpay.refunds()] == [100]


@pytest.mark.parametrize(
    ("arguments", "given", "said"),
    [
        (("order_1",), {}, "PAYMENT must be the id of a payment at Razorpay"),
        (("pay_00000000000000",), {}, "razorpay gave no outcome"),
        ((), {"RAZORPAY_KEY_ID": "rzp_live_hidden"}, "live key"),
    ],
)
def test_razorpay_cannot_run(
    razorpay: RazorpayProcess, arguments: tuple[str, ...], given: dict[str, str], said: str
) -> None:
    done = at_razorpay(razorpay, *arguments, **given)
    assert done.exit_code == 2
    assert said in done.output
    assert "hidden" not in done.output


def test_razorpay_takes_no_order_of_this_currency(razorpay: RazorpayProcess) -> None:
    razorpay.makes_no_order(field="currency")
    done = at_razorpay(razorpay)
    assert (done.exit_code, "--currency: the account does not take it" in done.output) == (2, True)


def at_paypal(paypal: PayPalProcess, *arguments: str, **more: str) -> Result:
    given = {
        "PAYPAL_API_BASE": paypal.url,
        "PAYPAL_ENVIRONMENT": "sandbox",
        "PAYPAL_CLIENT_ID": CLIENT_ID,
        "PAYPAL_CLIENT_SECRET": CLIENT_SECRET,
        "PAYPAL_WEBHOOK_ID": WEBHOOK_ID,
    }
    return run("paypal", *arguments, **given | more)


def test_paypal_with_and_without_an_approved_order(paypal: PayPalProcess) -> None:
    paypal.set(approves=False)
    done = at_paypal(paypal)
    assert (done.exit_code, done.output.splitlines()[-1]) == (0, "all of it held")
    assert "skip  capture and refund: give the id of an order" in done.output
    order = paypal.make_order("12.00", "EUR")
    done = at_paypal(paypal, order)
    assert (done.exit_code, done.output.splitlines()[-1]) == (0, "all of it held")
    assert [(each.value, each.currency) for each in paypal.refunds()] == [("12.00", "EUR")]


@pytest.mark.parametrize(
    ("arguments", "given", "said"),
    [
        (("pay_1",), {}, "PAYMENT must be the id of a PayPal order"),
        (("0N0RDER",), {}, "paypal gave no outcome"),
        (("--currency", "XAF"), {}, "--currency: currency must be one that PayPal has"),
        ((), {"PAYPAL_ENVIRONMENT": "live"}, "live credentials are not checked"),
    ],
)
def test_paypal_cannot_run(
    paypal: PayPalProcess, arguments: tuple[str, ...], given: dict[str, str], said: str
) -> None:
    paypal.set(approves=False)
    done = at_paypal(paypal, *arguments, **given)
    assert done.exit_code == 2
    assert said in done.output
