"""Amounts in the units of the providers, which are not always the minor units of ISO 4217.

Both directions are exact: what a provider cannot take exactly, or states inexactly, is a
ValueError. Its text is the end of a sentence about `amount_cents`.
"""

import re
from decimal import Decimal

from payments.money import DECIMALS

# docs.stripe.com/currencies, "Special cases": kept with two decimals, though they have none; and
# without decimals, though it has two.
_STRIPE_TIMES_100 = frozenset({"ISK", "UGX"})
_STRIPE_BY_100 = frozenset({"MGA"})
STRIPE_MAX = 999_999_999_999  # 12 digits, for cards

# Without decimals at PayPal: JPY as everywhere, and these two.
_PAYPAL_BY_100 = frozenset({"HUF", "TWD"})


def to_stripe(amount_cents: int, currency: str) -> int:
    """The `amount` of an API request."""
    if currency in _STRIPE_TIMES_100:
        return amount_cents * 100
    if currency in _STRIPE_BY_100:
        return _divided(amount_cents, 100)
    _check_thousandths(amount_cents, currency)
    return amount_cents


def from_stripe(amount: int, currency: str) -> int:
    if currency in _STRIPE_TIMES_100:
        return _divided(amount, 100)
    if currency in _STRIPE_BY_100:
        return amount * 100
    _check_thousandths(amount, currency)
    return amount


def to_razorpay(amount_cents: int, currency: str) -> int:
    """The `amount` of an API request: the minor unit."""
    _check_thousandths(amount_cents, currency)
    return amount_cents


def from_razorpay(amount: int, currency: str) -> int:
    _check_thousandths(amount, currency)
    return amount


def to_paypal(amount_cents: int, currency: str) -> str:
    """The `value` of an amount, with as many decimals as PayPal wants."""
    if currency in _PAYPAL_BY_100:
        return str(_divided(amount_cents, 100))
    decimals = DECIMALS[currency]
    if decimals > 2:
        raise ValueError("is in a currency with more than two decimals, which PayPal has not")
    return str(Decimal(amount_cents).scaleb(-decimals))


def from_paypal(value: str, currency: str) -> int:
    """Of 15.00, 15.0 and 15 alike."""
    if currency not in DECIMALS or not re.fullmatch(r"[0-9]{1,12}(\.[0-9]{1,3})?", value):
        raise ValueError("is no amount")
    cents = Decimal(value).scaleb(DECIMALS[currency])
    whole = int(cents)
    if whole != cents:
        raise ValueError("has more decimals than the currency")
    return whole


def _check_thousandths(amount: int, currency: str) -> None:
    """Both Stripe and Razorpay take three decimals, of which the last is 0."""
    if DECIMALS.get(currency) == 3 and amount % 10:
        raise ValueError("must end in 0 in a currency with three decimals")


def _divided(amount: int, by: int) -> int:
    whole, rest = divmod(amount, by)
    if rest:
        raise ValueError(f"must be a multiple of {by} in this currency")
    return whole
