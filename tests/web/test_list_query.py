"""The query of the list: what is taken, and what every refusal says."""

import re
from datetime import UTC, datetime, timedelta
from typing import Any
from uuid import UUID

import pytest

from payments.errors import InvalidRequest
from payments.payment.state import Status
from payments.queries.cursor import ListPlace, write_cursor
from payments.queries.payments import PaymentFilter
from payments.times import TIME_PATTERN
from web.list_query import read_list_query

ORDER = "f50d9fa2-5d3e-4e49-9a02-218ad32ef4a9"
CURSOR = write_cursor(ListPlace(datetime(2026, 1, 1, tzinfo=UTC), UUID(ORDER)))
NOON = datetime(2026, 1, 31, 12, tzinfo=UTC)


def errors_of(query: bytes) -> dict[str, str]:
    with pytest.raises(InvalidRequest) as raised:
        read_list_query(query)
    assert str(raised.value) == "Correct the query parameters listed in errors."
    return {error.field: error.message for error in raised.value.errors}


@pytest.mark.parametrize("query", [b"", b"&", b"&&&"])
def test_nothing_asked_for(query: bytes) -> None:
    assert read_list_query(query) == (PaymentFilter(), 50, None)


@pytest.mark.parametrize(
    ("query", "expected"),
    [
        (f"merchant_order_id={ORDER}", {"merchant_order_id": UUID(ORDER)}),
        (f"merchant_order_id={ORDER.upper()}", {"merchant_order_id": UUID(ORDER)}),
        ("status=REFUNDED", {"status": Status.REFUNDED}),
        ("%73tatus=%53UCCESS", {"status": Status.SUCCESS}),
        ("currency=JPY", {"currency": "JPY"}),
        ("created_from=2026-01-31T12:00:00Z", {"created_from": NOON}),
        ("created_from=2026-01-31t12:00:00z", {"created_from": NOON}),
        ("created_from=2026-01-31T17:30:00%2B05:30", {"created_from": NOON}),
        ("created_until=2026-01-31T04:00:00-08:00", {"created_until": NOON}),
        ("created_until=2026-01-31T12:00:00-00:00", {"created_until": NOON}),
        ("created_from=2026-01-31T12:00:00.0Z", {"created_from": NOON}),
        (
            "created_until=2026-01-31T12:00:00.000001Z",
            {"created_until": NOON + timedelta(microseconds=1)},
        ),
        (
            # As Go and Java write it; Postgres keeps microseconds.
            "created_from=2026-01-31T12:00:00.000001999Z",
            {"created_from": NOON + timedelta(microseconds=1)},
        ),
        (f"created_from=2026-01-31T12:00:00.{'0' * 5000}1Z", {"created_from": NOON}),
        (
            "created_from=2026-01-31T12:00:00Z&created_until=2026-01-31T12:00:00Z",
            {"created_from": NOON, "created_until": NOON},
        ),
    ],
)
def test_filters(query: str, expected: dict[str, Any]) -> None:
    found = read_list_query(query.encode()).filter
    assert found == PaymentFilter(**expected)
    for time in (found.created_from, found.created_until):
        assert time is None or time.tzinfo is UTC


@pytest.mark.parametrize(("text", "limit"), [("1", 1), ("200", 200), ("007", 7)])
def test_limit_and_cursor(text: str, limit: int) -> None:
    query = read_list_query(f"limit={text}&cursor={CURSOR}".encode())
    assert (query.limit, query.cursor) == (limit, CURSOR)


@pytest.mark.parametrize(
    ("name", "values"),
    [
        ("merchant_order_id", ["", "x", ORDER[:-1], ORDER.replace("-", ""), f"{{{ORDER}}}"]),
        ("merchant_order_id", [ORDER + "%0A", ORDER[:-1] + "%EF%BC%99", ORDER + "%00"]),
        ("status", ["", "success", "PAID", "SUCCESS,FAILED", "SUCCESS%20", "SUCCESS%0A"]),
        ("currency", ["", "inr", "XXX", "INR%0A", "I%4eR2"]),
        ("created_from", ["", "2026-01-31", "2026-01-31T12:00:00", "2026-02-30T12:00:00Z"]),
        ("created_from", ["2026-01-31T12:00:00%20Z", "2026-01-31T24:00:00Z", "now", "1769860800"]),
        ("created_from", ["2026-01-31T12:00:60Z", "2026-01-31T12:00:00.Z", "2026-01-31T12:00Z"]),
        ("created_from", ["2026-01-31T12:00:00.5", "2026-01-31T12:00:00%2B0530"]),
        ("created_from", ["20260131T120000Z", "2026-W05-6T12:00:00Z", "2026-01-31T12:00:00,5Z"]),
        ("created_until", ["0001-01-01T00:00:00%2B01:00", "9999-12-31T23:59:59-01:00"]),
        ("created_until", ["0000-01-01T00:00:00Z", "2026-01-31T12:00:00%2B24:00"]),
        ("created_until", ["2026-01-31T12:00:00Z%0A", "%D9%A22026-01-31T12:00:00Z"]),
        ("limit", ["", "0", "201", "-1", "%2B5", "5.0", "1e2", "%D9%A2", "9" * 5000, "5%0A"]),
        ("cursor", ["", "x", CURSOR[:-1], CURSOR + "A", "%FF", CURSOR + "%0A"]),
    ],
)
def test_wrong_values(name: str, values: list[str]) -> None:
    for value in values:
        errors = errors_of(f"{name}={value}".encode())
        assert set(errors) == {name}
        assert errors[name].startswith("must be ")


@pytest.mark.parametrize(
    "text",
    [
        *("2026-01-31T24:00:00Z", "2026-01-31T12:60:00Z", "2026-01-31T12:00:60Z"),
        *("2026-13-31T12:00:00Z", "2026-01-32T12:00:00Z", "0000-01-01T00:00:00Z"),
        *("2026-01-31T12:00:00+24:00", "2026-01-31T12:00:00-00:60"),
    ],
)
def test_the_documented_pattern_takes_no_time_that_is_none(text: str) -> None:
    """Whatever the Python: from 3.13 on it reads 24:00 as midnight."""
    assert not re.search(TIME_PATTERN, text)


@pytest.mark.parametrize("query", [b"created_from=\xff", b"status=%ff", b"\xff=1", b"limit"])
def test_what_is_not_utf_8_or_has_no_value(query: bytes) -> None:
    assert errors_of(query)


def test_a_lost_plus_is_explained() -> None:
    errors = errors_of(b"created_from=2026-01-31T17:30:00+05:30&created_until=a+b&status=a+b")
    assert errors["created_from"].endswith("encode it as %2B, or use Z")
    assert "%2B" not in errors["created_until"] + errors["status"]


def test_every_wrong_one_is_named() -> None:
    query = b"limit=0&status=x&page=2&currency=INR&currency=&cursor=x&created_from=x&sort=a&sort="
    assert errors_of(query) == {
        "limit": "must be a whole number from 1 to 200",
        "status": "must be one of PENDING, SUCCESS, FAILED, REFUNDED",
        "page": "is not a parameter of this request; remove it",
        "currency": "is present 2 times; send it once",
        "cursor": "must be the next_cursor of an earlier response, unchanged",
        "created_from": "must be a time with its offset from UTC (RFC 3339), "
        "like 2026-01-31T18:30:00Z",
        "sort": "is not a parameter of this request; remove it",
    }


def test_an_end_before_the_beginning() -> None:
    query = b"created_from=2026-01-31T12:00:00Z&created_until=2026-01-31T12:00:00%2B01:00"
    assert errors_of(query) == {"created_until": "must not be before created_from"}


def test_no_answer_grows_with_the_number_of_mistakes() -> None:
    query = "&".join(f"{'n' * 1000}{number}=1" for number in range(100)).encode()
    with pytest.raises(InvalidRequest) as raised:
        read_list_query(query)
    assert len(raised.value.errors) == 20
    assert max(len(error.field) for error in raised.value.errors) == 64
