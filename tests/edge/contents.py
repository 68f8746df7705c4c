"""What a request says: bodies, media types and keys that are good, odd or bad."""

import json
from urllib.parse import quote

from payments.money import MAX_AMOUNT_CENTS
from tests.edge.requests import (
    BAD_KEY,
    BODY,
    INVALID,
    JSON,
    MALFORMED,
    NOT_JSON,
    ORDER,
    TOO_LARGE,
    charge,
    get,
    row,
)


def amount(literal: bytes) -> bytes:
    """A body with these bytes as the amount."""
    return BODY.replace(b"1500", literal)


def with_field(name: bytes, value: bytes = b"1") -> bytes:
    return BODY[:-1] + b', "%s": %s}' % (name, value)


def key(value: bytes) -> bytes:
    return charge(key=b"Idempotency-Key: %s\r\n" % value)


BODIES = [
    row("a good one", charge(), "201"),
    row("white space around", charge(b" \t\r\n" + BODY + b" \t\r\n"), "201"),
    row("a name with an escape", charge(BODY.replace(b"amount", b"\\u0061mount")), "201"),
    row("as large as allowed", charge(BODY.ljust(16 * 1024)), "201"),
    row("one byte larger", charge(BODY.ljust(16 * 1024 + 1)), TOO_LARGE),
    row("100,000 arrays", charge(b"[" * 100_000), TOO_LARGE),
    row("8,000 arrays", charge(b"[" * 8_000 + b"]" * 8_000), INVALID),
    row("8,000 arrays as the amount", charge(amount(b"[" * 8_000 + b"]" * 8_000)), INVALID),
    row("500 arrays as the amount", charge(amount(b"[" * 500 + b"]" * 500)), INVALID),
    row("2,500 objects", charge(b'{"a":' * 2_500 + b"1" + b"}" * 2_500), INVALID),
    row("16,000 arrays without end", charge(b"[" * 16_000), INVALID),
    row("a string of 16,000 bytes", charge(with_field(b"x", b'"' + b"y" * 16_000 + b'"')), INVALID),
    row("16,000 backslashes", charge(with_field(b"x", b'"' + b"\\" * 16_000 + b'"')), INVALID),
    row(
        "1,500 fields", charge(with_field(b'":1,"'.join(b"%d" % n for n in range(1_500)))), INVALID
    ),
    row("nothing", charge(b""), INVALID),
    row("null", charge(b"null"), INVALID),
    row("an array", charge(b"[%s]" % BODY), INVALID),
    row("a string", charge(json.dumps(BODY.decode()).encode()), INVALID),
    row("NUL", charge(b"\0"), INVALID),
    row("NUL behind", charge(BODY + b"\0"), INVALID),
    row("NUL in a string", charge(with_field(b"payment_method", b'"a\0b"')), INVALID),
    row("escaped NUL in a string", charge(with_field(b"payment_method", rb'"a\u0000b"')), INVALID),
    row("escaped NUL in the order", charge(BODY.replace(b'9"', rb'9\u0000"')), INVALID),
    row("escaped NUL in a name", charge(with_field(rb"a\u0000b")), INVALID),
    row("two", charge(BODY + BODY), INVALID),
    row("garbage behind", charge(BODY + b"x"), INVALID),
    row("a comma behind the last field", charge(BODY[:-1] + b",}"), INVALID),
    row("a comment", charge(b"/* */" + BODY), INVALID),
    row("a comment in a line", charge(BODY + b"// x\n"), INVALID),
    row("single quotes", charge(BODY.replace(b'"', b"'")), INVALID),
    row("a form", charge(b"amount_cents=1500&merchant_order_id=" + ORDER), INVALID),
    row("byte order mark", charge(b"\xef\xbb\xbf" + BODY), INVALID),
    row("UTF-16", charge(BODY.decode().encode("utf-16")), INVALID),
    row("UTF-16 little endian", charge(BODY.decode().encode("utf-16-le")), INVALID),
    row("UTF-16 big endian", charge(BODY.decode().encode("utf-16-be")), INVALID),
    row("UTF-32", charge(BODY.decode().encode("utf-32")), INVALID),
    row("UTF-7", charge(b"+AHs-" + BODY[1:]), INVALID),
    row("0xFF", charge(with_field(b"x", b'"\xff"')), INVALID),
    row("a byte of UTF-8 is missing", charge(with_field(b"x", b'"\xe2\x82"')), INVALID),
    row("an overlong slash", charge(with_field(b"x", b'"\xc0\xaf"')), INVALID),
    row("a surrogate in UTF-8", charge(with_field(b"x", b'"\xed\xa0\x80"')), INVALID),
    row("beyond Unicode", charge(with_field(b"x", b'"\xf4\x90\x80\x80"')), INVALID),
    row("half a pair as order", charge(BODY.replace(b"f50d", rb"\ud800")), INVALID),
    row("half a pair as currency", charge(with_field(b"currency", rb'"\ud800"')), INVALID),
    row("half a pair as method", charge(with_field(b"payment_method", rb'"\udfff"')), INVALID),
    row("half a pair as amount", charge(amount(rb'"\ud800"')), INVALID),
    row("half a pair as name", charge(with_field(rb"\ud800")), INVALID),
    row("half a pair in a name", charge(with_field(rb"amount_cents\udc00")), INVALID),
    row("the other order of a pair", charge(with_field(rb"\udc00\ud800")), INVALID),
    row("an escape cut off", charge(with_field(rb"\ud8")), INVALID),
    row("a field twice", charge(with_field(b"amount_cents", b"1")), INVALID),
    row("a field twice, the same", charge(with_field(b"amount_cents", b"1500")), INVALID),
    row("a field twice by an escape", charge(with_field(rb"\u0061mount_cents")), INVALID),
    row("an unknown field twice", charge(with_field(b"x", b'1, "x": 1')), INVALID),
    row("a field twice inside", charge(with_field(b"x", b'[{"a": 1, "a": 1}]')), INVALID),
    row("an unknown field", charge(with_field(b"status", b'"SUCCESS"')), INVALID),
    row("__proto__", charge(with_field(b"__proto__", b'{"amount_cents": 1}')), INVALID),
    row("the largest amount", charge(amount(b"%d" % MAX_AMOUNT_CENTS)), "201"),
    row("an amount of 2**31", charge(amount(b"2147483648")), INVALID),
    row("2**63", charge(amount(b"9223372036854775808")), INVALID),
    row("2**64 + 1500", charge(amount(b"18446744073709553116")), INVALID),
    row("10**4000", charge(amount(b"1" + b"0" * 4_000)), INVALID),
    row("10**16000", charge(amount(b"1" + b"0" * 16_000)), INVALID),
    row("-10**4000", charge(amount(b"-1" + b"0" * 4_000)), INVALID),
    row("a fraction of 16,000 digits", charge(amount(b"0." + b"1" * 16_000)), INVALID),
    row("1e400", charge(amount(b"1e400")), INVALID),
    row("-1e400", charge(amount(b"-1e400")), INVALID),
    row("1e-400", charge(amount(b"1e-400")), INVALID),
    row("an exponent of 16,000 digits", charge(amount(b"1e" + b"9" * 16_000)), INVALID),
    row("0", charge(amount(b"0")), INVALID),
    row("-0", charge(amount(b"-0")), INVALID),
    row("-0.0", charge(amount(b"-0.0")), INVALID),
    row("-1500", charge(amount(b"-1500")), INVALID),
    row("+1500", charge(amount(b"+1500")), INVALID),
    row("01500", charge(amount(b"01500")), INVALID),
    row("1500.0", charge(amount(b"1500.0")), "201"),
    row("15e2", charge(amount(b"15e2")), "201"),
    row("1500.5", charge(amount(b"1500.5")), INVALID),
    row("1500.", charge(amount(b"1500.")), INVALID),
    row("0x5dc", charge(amount(b"0x5dc")), INVALID),
    row("1_500", charge(amount(b"1_500")), INVALID),
    row("1 500", charge(amount(b"1 500")), INVALID),
    row("full-width digits", charge(amount("１５００".encode())), INVALID),
    row("a text as amount", charge(amount(b'"1500"')), INVALID),
    row("true", charge(amount(b"true")), INVALID),
    row("NaN", charge(amount(b"NaN")), INVALID),
    row("Infinity", charge(amount(b"Infinity")), INVALID),
    row("-Infinity", charge(amount(b"-Infinity")), INVALID),
]

MEDIA_TYPES = [
    row(f"Content-Type: {value!r}", charge(media_type=b"Content-Type: %s\r\n" % value), answer)
    for answer, values in {
        "201": [
            *(b"application/json", b"Application/JSON", b"application/json ; charset=utf-8"),
            *(b"application/json;charset=UTF-8", b'application/json; charset="utf-8"'),
            *(b"application/json;", b"application/json; profile=x", b"\tapplication/json\t"),
        ],
        NOT_JSON: [
            *(b"", b"text/plain", b"text/json", b"json", b"application/", b"*/*"),
            *(b"application/jsonx", b"application/problem+json", b"application / json"),
            *(b"application/json, text/plain", b"application/json, application/json"),
            *(b"text/plain; application/json", b"application/json\xa0", b"application/js\xf6n"),
            *(b"application/json; charset=utf-16", b"application/json;charset=iso-8859-1"),
            *(b"application/json; charset=", b"application/json; charset=utf-8; charset=utf-7"),
            *(b"application/x-www-form-urlencoded", b"multipart/form-data; boundary=x"),
        ],
        MALFORMED: [b"application/json\x0b", b"\x0capplication/json", b"application/json\0"],
    }.items()
    for value in values
] + [
    row("no Content-Type", charge(media_type=b""), NOT_JSON),
    row("Content-Type twice", charge(media_type=JSON * 2), NOT_JSON),
    row("two media types", charge(media_type=JSON + b"Content-Type: text/plain\r\n"), NOT_JSON),
    row("a header in capitals", charge(media_type=JSON.upper()), "201"),
    row("Content_Type", charge(media_type=b"Content_Type: application/json\r\n"), NOT_JSON),
    row("gzip", charge(b"\x1f\x8b\x08\0", more=b"Content-Encoding: gzip\r\n"), NOT_JSON),
]

KEYS = [
    row("no key", charge(key=b""), BAD_KEY),
    row("an empty key", key(b""), BAD_KEY),
    row("a key of spaces", key(b"    "), BAD_KEY),
    row("a key of tabs", key(b"\t\t"), BAD_KEY),
    row("a key among spaces", key(b" \t padded \t "), "201"),
    row("a space within", key(b"with space"), "201"),
    row("a tab within", key(b"with\ttab"), BAD_KEY),
    row("one byte", key(b"k"), "201"),
    row("255 bytes", key(b"k" * 255), "201"),
    row("256 bytes", key(b"k" * 256), BAD_KEY),
    row("60,000 bytes", key(b"k" * 60_000), BAD_KEY),
    row("every printable character", key(bytes(range(0x21, 0x7F))), "201"),
    row("ISO 8859-1", key(b"caf\xe9"), BAD_KEY),
    row("UTF-8", key("café".encode()), BAD_KEY),
    row("NUL", key(b"a\0b"), MALFORMED),
    row("a control character", key(b"a\x01b"), MALFORMED),
    row("DEL", key(b"a\x7fb"), MALFORMED),
    row("CR", key(b"a\rb"), MALFORMED),
    row("LF", key(b"a\nb"), MALFORMED),
    row("a folded line", key(b"a\r\n b"), MALFORMED),
    row("a folded line after nothing", key(b"\r\n b"), MALFORMED),
    row("the same key twice", charge(key=b"Idempotency-Key: a\r\n" * 2), BAD_KEY),
    row("two", charge(key=b"Idempotency-Key: a\r\nidempotency-key: b\r\n"), BAD_KEY),
    row("two, one empty", charge(key=b"Idempotency-Key:\r\nIdempotency-Key: b\r\n"), BAD_KEY),
    row("Idempotency_Key", charge(key=b"Idempotency_Key: a\r\n"), BAD_KEY),
    row("after an empty header", charge(key=b"X-Empty:\r\nIdempotency-Key: behind\r\n"), "201"),
    row("a list", key(b"one, two"), "201"),
]

ODD_UUIDS = {
    "braces": "{" + ORDER.decode() + "}",
    "a URN": f"urn:uuid:{ORDER.decode()}",
    "no dashes": ORDER.decode().replace("-", ""),
    "dashes elsewhere": "f50d9-fa25d3e-4e49-9a02-218ad32ef4a9",
    "full-width letters": ORDER.decode().replace("f50d", "ｆ５０ｄ"),
    "Arabic digits": ORDER.decode().replace("50", "٥٠"),
    "a line feed behind": ORDER.decode() + "\n",
    "a space before": " " + ORDER.decode(),
    "NUL behind": ORDER.decode() + "\0",
    "too short": ORDER.decode()[:-1],
    "a g": ORDER.decode()[:-1] + "g",
}
UUIDS = [
    row("capitals in a body", charge(BODY.replace(ORDER, ORDER.upper())), "201"),
    row("capitals in a path", get(b"/v1/payments/" + ORDER.upper()), "404 payment_not_found"),
    row("capitals in a query", get(b"/v1/payments?merchant_order_id=" + ORDER.upper()), "200"),
]
for _name, _text in ODD_UUIDS.items():
    _body = json.dumps({"merchant_order_id": _text, "amount_cents": 1500}).encode()
    _quoted = quote(_text).encode()
    UUIDS += [
        row(f"{_name} in a body", charge(_body), INVALID),
        row(
            f"{_name} in a refund",
            charge(
                json.dumps({"payment_id": _text}).encode(), line=b"POST /v1/refund HTTP/1.1\r\n"
            ),
            INVALID,
        ),
        row(f"{_name} in a path", get(b"/v1/payments/" + _quoted), INVALID),
        row(f"{_name} in a path to events", get(b"/v1/payments/%s/events" % _quoted), INVALID),
        row(f"{_name} in a query", get(b"/v1/payments?merchant_order_id=" + _quoted), INVALID),
    ]

CONTENTS = {"body": BODIES, "media type": MEDIA_TYPES, "key": KEYS, "uuid": UUIDS}
