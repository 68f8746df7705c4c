"""Bodies as raw bytes: what is read, and every way of being refused."""

import json
from typing import Any

import msgspec
import pytest

from payments.errors import InvalidRequest
from web.problems import UnsupportedMediaType
from web.requests import ERRORS_MAX, check_json, check_not_encoded, read_body
from web.schema.operations.charges import ChargeBody

ORDER_ID = "f50d9fa2-5d3e-4e49-9a02-218ad32ef4a9"
GOOD: dict[str, Any] = {"merchant_order_id": ORDER_ID, "amount_cents": 1500, "currency": "INR"}


def body(**changes: Any) -> bytes:
    return json.dumps(GOOD | changes).encode()


def with_amount(literal: str) -> bytes:
    """JSON with this text for the amount, which json.dumps might not write."""
    return f'{{"merchant_order_id": "{ORDER_ID}", "amount_cents": {literal}}}'.encode()


def refusal(raw: bytes) -> InvalidRequest:
    with pytest.raises(InvalidRequest) as caught:
        read_body(raw, ChargeBody)
    error = caught.value
    assert error.status == 400
    # What goes into an answer must be encodable, whatever came in.
    assert msgspec.json.encode([str(error), error.errors])
    return error


def fields_refused(raw: bytes) -> list[str]:
    return [error.field for error in refusal(raw).errors]


class TestGood:
    @pytest.mark.parametrize(
        ("raw", "expected"),
        [
            (body(), ("INR", 1500, None)),
            (body(currency="JPY"), ("JPY", 1500, None)),
            (with_amount("1"), ("INR", 1, None)),
            (with_amount("2147483647"), ("INR", 2_147_483_647, None)),
            # Integers to JSON Schema, and so to the API's description.
            (with_amount("1500.0"), ("INR", 1500, None)),
            (with_amount("1500." + "0" * 10_000), ("INR", 1500, None)),
            (with_amount("1.5e3"), ("INR", 1500, None)),
            (with_amount("150000E-2"), ("INR", 1500, None)),
            (with_amount("2147483647.0"), ("INR", 2_147_483_647, None)),
            (body(payment_method="tok_visa"), ("INR", 1500, "tok_visa")),
            (body(payment_method="~" * 255), ("INR", 1500, "~" * 255)),
            (body(payment_method=None), ("INR", 1500, None)),
            (b" \t\r\n" + body() + b"\n", ("INR", 1500, None)),
            (body().replace(b"amount_cents", b"\\u0061mount_cents"), ("INR", 1500, None)),
        ],
    )
    def test_it_is_read(self, raw: bytes, expected: tuple[str, int, str | None]) -> None:
        read = read_body(raw, ChargeBody)
        assert read.merchant_order_id == ORDER_ID
        assert (read.currency, read.amount_cents, read.payment_method) == expected

    def test_upper_case_is_a_spelling_of_a_uuid(self) -> None:
        assert read_body(body(merchant_order_id=ORDER_ID.upper()), ChargeBody)


class TestNotAnObjectOfJson:
    @pytest.mark.parametrize(
        ("raw", "detail"),
        [
            (b"", "not valid JSON"),
            (b" ", "not valid JSON"),
            (b"{", "not valid JSON"),
            (b"{}{}", "not valid JSON"),
            (b"{'a': 1}", "not valid JSON"),
            (b'{"a": 1,}', "not valid JSON"),
            (b"amount_cents=1500", "not valid JSON"),
            (b"\x00", "not valid JSON"),
            (b'{"a": "\x00"}', "not valid JSON"),
            (b'{"a": "\n"}', "not valid JSON"),
            (with_amount("01"), "not valid JSON"),
            (with_amount("+1"), "not valid JSON"),
            (with_amount("0x1"), "not valid JSON"),
            (with_amount("1_500"), "not valid JSON"),
            (with_amount("9" * 10_000), "not valid JSON"),
            (b"[" * 15_000, "not valid JSON"),
            (b"\xef\xbb\xbf" + body(), "byte order mark"),
            (body().decode().encode("utf-16"), "not valid UTF-8"),
            (body().decode().encode("utf-16-le"), "not valid JSON"),
            (b"\xff", "not valid UTF-8"),
            (body(payment_method="?").replace(b"?", b"\xc3\x28"), "not valid UTF-8"),
            (body(payment_method="?").replace(b"?", b"\xed\xa0\x80"), "not valid UTF-8"),
            (body(payment_method="?").replace(b"?", b"\xc0\xaf"), "not valid UTF-8"),
            (b"null", "must be a JSON object"),
            (b"[]", "must be a JSON object"),
            (b"1500", "must be a JSON object"),
            (b'"text"', "must be a JSON object"),
            (with_amount("NaN"), "NaN"),
            (with_amount("Infinity"), "Infinity"),
            (with_amount("-Infinity"), "Infinity"),
            (b'{"amount_cents": 1, "amount_cents": 2}', "twice"),
            (b'{"amount_cents": 1, "\\u0061mount_cents": 1}', "twice"),
            (b'{"more": [{"a": 1, "b": 2, "a": 1}]}', "twice"),
        ],
    )
    def test_it_is_refused_as_a_whole(self, raw: bytes, detail: str) -> None:
        error = refusal(raw)
        assert detail in str(error)
        assert error.errors == ()

    @pytest.mark.parametrize(("begin", "end"), [(b"[", b"]"), (b'{"a":', b"}")])
    def test_it_is_refused_however_deep(self, begin: bytes, end: bytes) -> None:
        """How deep JSON may be depends on the version of Python."""
        for levels in (2_000, 50_000, 500_000):
            refusal(begin * levels + b"1" + end * levels)


class TestFields:
    @pytest.mark.parametrize(
        "literal",
        [
            *("0", "-0", "-1", "2147483648", "9223372036854775808", f"{10**40}", f"-{10**40}"),
            *("1.5", "1500.5", "0.0", "-0.0", "-1.0", "2147483648.0", "1e10", "1e999", "-1e999"),
            *("1500.0000000000000000001", "1e-999999999", "1e999999999", f"1e{10**30}"),
            *('"1500"', '""', "true", "false", "null", "[]", "[1500]", "{}"),
        ],
    )
    def test_amount_cents(self, literal: str) -> None:
        assert fields_refused(with_amount(literal)) == ["amount_cents"]

    @pytest.mark.parametrize(
        "currency",
        [
            *("inr", "Inr", "USD\n", "USD ", " USD", "", "US", "USDD", "ABC", "XXX", "XAU"),
            *("USD\x00", "ＵＳＤ", "İNR", "\ud800", "INR\udfff", None, 356, True, ["INR"], {}),
        ],
    )
    def test_currency(self, currency: Any) -> None:
        assert fields_refused(body(currency=currency)) == ["currency"]

    @pytest.mark.parametrize(
        "order_id",
        [
            f"{{{ORDER_ID}}}",
            f"urn:uuid:{ORDER_ID}",
            ORDER_ID.replace("-", ""),
            ORDER_ID.replace("f50d", "ｆ５０ｄ"),
            ORDER_ID.replace("50", "٥٠"),
            f"{ORDER_ID}\n",
            f"{ORDER_ID}\r\n",
            f"\n{ORDER_ID}",
            f" {ORDER_ID}",
            f"{ORDER_ID} ",
            f"{ORDER_ID}\x00",
            f"{ORDER_ID}a",
            ORDER_ID[:-1],
            f"{ORDER_ID[:-1]}g",
            f"{ORDER_ID[:-1]}\n",
            f"{ORDER_ID[:-1]}\ud800",
            ORDER_ID.replace("-", "‐"),
            "f50d-9fa25d3e-4e49-9a02-218ad32ef4a9",
            "",
            "1",
            None,
            1,
            True,
            [ORDER_ID],
            {"id": ORDER_ID},
        ],
    )
    def test_merchant_order_id(self, order_id: Any) -> None:
        assert fields_refused(body(merchant_order_id=order_id)) == ["merchant_order_id"]

    @pytest.mark.parametrize(
        "method",
        [
            *("", "x" * 256, "a b", "a\n", "\na", "a\x00b", "a\x7f", "é", "\ud800", "a\udc00"),
            *(1, True, [], {}),
        ],
    )
    def test_payment_method(self, method: Any) -> None:
        assert fields_refused(body(payment_method=method)) == ["payment_method"]

    @pytest.mark.parametrize(
        "until",
        [
            *("", "tomorrow", "2026-01-31", "2026-01-31T18:30:00", "2026-01-31 18:30:00Z"),
            *("2026-13-31T18:30:00Z", "2026-01-31T24:00:00Z", "0000-01-01T00:00:00Z"),
            *(1769884200, True, [], {}),
        ],
    )
    def test_hold_until(self, until: Any) -> None:
        assert fields_refused(body(hold_until=until)) == ["hold_until"]

    @pytest.mark.parametrize(
        "name",
        ["status", "Currency", "amount_cents ", "", "\x00", "a\nb", "é", "\ud800", "a\udfff"],
    )
    def test_an_unknown_field(self, name: str) -> None:
        (error,) = refusal(body(**{name: 1})).errors
        assert "not a field" in error.message

    def test_a_long_unknown_name_is_cut(self) -> None:
        assert fields_refused(body(**{"x" * 10_000: 1})) == ["x" * 64]

    @pytest.mark.parametrize("name", ["merchant_order_id", "amount_cents"])
    def test_a_missing_field(self, name: str) -> None:
        given = {field: value for field, value in GOOD.items() if field != name}
        (error,) = refusal(json.dumps(given).encode()).errors
        assert error.field == name
        assert error.message.startswith("is required: ")

    def test_all_errors_are_reported_at_once(self) -> None:
        raw = b'{"amount_cents": 0, "currency": "inr", "payment_method": "", "more": 1, "id": 2}'
        assert fields_refused(raw) == [
            "merchant_order_id",
            "amount_cents",
            "currency",
            "payment_method",
            "id",
            "more",
        ]

    def test_an_empty_object_lacks_all_that_is_required(self) -> None:
        assert fields_refused(b"{}") == ["merchant_order_id", "amount_cents"]

    def test_there_are_at_most_twenty_errors(self) -> None:
        many = {f"field_{number:03}": 1 for number in range(500)}
        refused = fields_refused(body(amount_cents=0, **many))
        assert ERRORS_MAX == 20
        assert len(refused) == ERRORS_MAX
        assert refused[:2] == ["amount_cents", "field_000"]

    def test_a_message_says_what_is_allowed(self) -> None:
        amount, currency = refusal(body(amount_cents=0, currency="inr")).errors
        assert "1 to 2147483647" in amount.message
        assert "ISO 4217" in currency.message

    def test_values_are_not_repeated(self) -> None:
        errors = refusal(body(currency="canary7391", amount_cents="canary7391")).errors
        assert "canary7391" not in str(errors)

    def test_a_deep_value_is_only_a_wrong_one(self) -> None:
        assert fields_refused(with_amount("[" * 500 + "]" * 500)) == ["amount_cents"]


class TestContentType:
    @pytest.mark.parametrize(
        "content_type",
        [
            b"application/json",
            b"Application/JSON",
            b"application/json; charset=utf-8",
            b"application/json;charset=UTF-8",
            b" application/json ;",
        ],
    )
    def test_json_is_supported(self, content_type: bytes) -> None:
        check_json([content_type])

    @pytest.mark.parametrize(
        "content_types",
        [
            [],
            [b""],
            [b"text/plain"],
            [b"text/json"],
            [b"application/jsonp"],
            [b"application/json-patch+json"],
            [b"application/problem+json"],
            [b"application/json, text/plain"],
            [b"application/x-www-form-urlencoded"],
            [b"multipart/form-data; boundary=x"],
            [b"text/plain; application/json"],
            [b"application/\xefson"],
            [b"application/json", b"application/json"],
            [b"application/json", b"text/plain"],
        ],
    )
    def test_anything_else_is_not(self, content_types: list[bytes]) -> None:
        with pytest.raises(UnsupportedMediaType) as caught:
            check_json(content_types)
        assert caught.value.status == 415

    @pytest.mark.parametrize(
        "charset", [b"iso-8859-1", b'"utf-16"', b"us-ascii", b"", b"utf-8; charset=latin1"]
    )
    def test_other_charsets(self, charset: bytes) -> None:
        with pytest.raises(UnsupportedMediaType, match="UTF-8"):
            check_json([b"application/json; charset=" + charset])

    @pytest.mark.parametrize("parameters", [b'; charset="utf-8"', b"; v=1", b'; a="b;c"; d=e'])
    def test_other_parameters(self, parameters: bytes) -> None:
        check_json([b"application/json" + parameters])

    @pytest.mark.parametrize("codings", [[], [b""], [b"identity"], [b" Identity , ", b"identity"]])
    def test_a_body_as_it_is(self, codings: list[bytes]) -> None:
        check_not_encoded(codings)

    @pytest.mark.parametrize(
        "codings", [[b"gzip"], [b"identity, GZIP"], [b"identity", b"br"], [b"utf-8"], [b"\xff"]]
    )
    def test_a_body_that_is_encoded(self, codings: list[bytes]) -> None:
        with pytest.raises(UnsupportedMediaType, match="Content-Encoding"):
            check_not_encoded(codings)
