"""The limits of an amount, and the closed set of currencies."""

import re

import pytest

from payments.money import (
    DECIMALS,
    DEFAULT_CURRENCY,
    MAX_AMOUNT_CENTS,
    MIN_AMOUNT_CENTS,
    decimal_text,
)


@pytest.mark.parametrize(
    ("amount_cents", "allowed"),
    [
        (-1, False),
        (0, False),
        (1, True),
        (2, True),
        (2_147_483_646, True),
        (2_147_483_647, True),
        (2_147_483_648, False),
        (10**40, False),
    ],
)
def test_amount_limits(amount_cents: int, allowed: bool) -> None:
    assert (MIN_AMOUNT_CENTS <= amount_cents <= MAX_AMOUNT_CENTS) is allowed


def test_the_largest_amount_is_the_largest_postgres_int() -> None:
    assert MAX_AMOUNT_CENTS == 2**31 - 1


def test_every_code_is_three_capital_letters() -> None:
    assert all(re.fullmatch(r"[A-Z]{3}", code) for code in DECIMALS)


def test_the_set_is_complete() -> None:
    """List one of 2026: 178 codes, 13 of them without a minor unit."""
    assert len(DECIMALS) == 165


def test_the_default_is_the_documented_one() -> None:
    assert DEFAULT_CURRENCY == "INR"
    assert DEFAULT_CURRENCY in DECIMALS


@pytest.mark.parametrize(
    ("code", "decimals"),
    [
        ("INR", 2),
        ("USD", 2),
        ("EUR", 2),
        ("GBP", 2),
        ("CHF", 2),
        ("XCG", 2),
        ("ZWG", 2),
        ("XAD", 2),
        ("JPY", 0),
        ("KRW", 0),
        ("ISK", 0),
        ("VND", 0),
        ("XOF", 0),
        ("KWD", 3),
        ("BHD", 3),
        ("TND", 3),
        ("CLF", 4),
        ("UYW", 4),
    ],
)
def test_decimals(code: str, decimals: int) -> None:
    assert DECIMALS[code] == decimals


@pytest.mark.parametrize(
    ("decimals", "count"), [(0, 17), (3, 7), (4, 2)], ids=["none", "three", "four"]
)
def test_how_many_currencies_do_not_have_two_decimals(decimals: int, count: int) -> None:
    assert list(DECIMALS.values()).count(decimals) == count


@pytest.mark.parametrize(
    "code",
    [
        *("XAU", "XAG", "XPT", "XPD"),  # metals
        *("XTS", "XXX"),  # for tests, and no currency
        *("XBA", "XBB", "XBC", "XBD", "XDR", "XSU", "XUA"),  # units of account without a minor one
        *("ANG", "BGN", "CUC", "DEM", "HRK", "SLL", "VEF", "ZWL"),  # withdrawn
        *("inr", "INR ", "INR\n", "IN", "", "ABC", "BTC"),
    ],
)
def test_what_cannot_be_charged(code: str) -> None:
    assert code not in DECIMALS


@pytest.mark.parametrize(
    ("amount_cents", "currency", "text"),
    [
        (1500, "INR", "15.00"),
        (1, "INR", "0.01"),
        (1500, "JPY", "1500"),
        (1500, "KWD", "1.500"),
        (1, "UYW", "0.0001"),
        (MAX_AMOUNT_CENTS, "JPY", "2147483647"),
        (MAX_AMOUNT_CENTS, "USD", "21474836.47"),
    ],
)
def test_an_amount_as_a_decimal(amount_cents: int, currency: str, text: str) -> None:
    assert decimal_text(amount_cents, currency) == text


def test_no_decimal_is_guessed() -> None:
    with pytest.raises(KeyError):
        decimal_text(1, "XXX")
