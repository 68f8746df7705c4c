"""Amounts in the providers' units: exact both ways, or refused."""

from collections.abc import Callable
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from payments.gateways.units import (
    from_paypal,
    from_razorpay,
    from_stripe,
    to_paypal,
    to_razorpay,
    to_stripe,
)
from payments.money import DECIMALS, MAX_AMOUNT_CENTS

PROVIDERS: dict[str, tuple[Callable[[int, str], Any], Callable[[Any, str], int]]] = {
    "stripe": (to_stripe, from_stripe),
    "razorpay": (to_razorpay, from_razorpay),
    "paypal": (to_paypal, from_paypal),
}

amounts = st.integers(1, MAX_AMOUNT_CENTS) | st.integers(1, MAX_AMOUNT_CENTS // 1000).map(
    lambda n: n * 1000
)


@pytest.mark.parametrize("provider", PROVIDERS)
@given(amount_cents=amounts, currency=st.sampled_from(sorted(DECIMALS)))
def test_there_and_back(provider: str, amount_cents: int, currency: str) -> None:
    to, back = PROVIDERS[provider]
    try:
        sent = to(amount_cents, currency)
    except ValueError:
        return
    assert back(sent, currency) == amount_cents


@pytest.mark.parametrize(
    ("provider", "amount_cents", "currency", "sent"),
    [
        ("stripe", 1500, "INR", 1500),
        ("stripe", 1500, "JPY", 1500),
        ("stripe", 5, "ISK", 500),
        ("stripe", 5, "UGX", 500),
        ("stripe", 1500, "MGA", 15),
        ("stripe", 1510, "KWD", 1510),
        ("stripe", 1550, "HUF", 1550),
        ("razorpay", 1510, "KWD", 1510),
        ("razorpay", 1500, "JPY", 1500),
        ("paypal", 1500, "USD", "15.00"),
        ("paypal", 1500, "JPY", "1500"),
        ("paypal", 1500, "HUF", "15"),
        ("paypal", 1500, "TWD", "15"),
    ],
)
def test_what_is_sent(provider: str, amount_cents: int, currency: str, sent: object) -> None:
    assert PROVIDERS[provider][0](amount_cents, currency) == sent


@pytest.mark.parametrize(
    ("provider", "amount_cents", "currency"),
    [
        ("stripe", 1510, "MGA"),
        ("stripe", 1511, "KWD"),
        ("razorpay", 1511, "BHD"),
        ("paypal", 1550, "HUF"),
        ("paypal", 1500, "KWD"),
    ],
)
def test_what_cannot_be_sent_exactly_is_refused(
    provider: str, amount_cents: int, currency: str
) -> None:
    with pytest.raises(ValueError, match=r"^(must|is)"):
        PROVIDERS[provider][0](amount_cents, currency)


@pytest.mark.parametrize("value", ["", "x", "15.005", "NaN", "Infinity", "1e99999", "15,00"])
def test_what_paypal_states_inexactly_is_no_amount(value: str) -> None:
    with pytest.raises(ValueError, match=r"^(is no amount|has more)"):
        from_paypal(value, "USD")
