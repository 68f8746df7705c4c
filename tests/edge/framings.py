"""How a request is put into bytes: lengths, codings, request lines, headers, several at once."""

from tests.edge.requests import (
    BAD_KEY,
    BODY,
    CHUNKED,
    IN_TWO_CHUNKS,
    INVALID,
    JSON,
    LAST_CHUNK,
    MALFORMED,
    NOT_ALLOWED,
    NOT_FOUND,
    NOT_JSON,
    ORDER,
    TOO_LARGE,
    charge,
    chunk,
    chunked,
    get,
    row,
)


def of_length(value: bytes) -> bytes:
    return charge(length=b"Content-Length: %s\r\n" % value)


LENGTHS = [
    row(f"Content-Length: {value!r}", of_length(value), *answers)
    for answers, values in {
        ("201",): (b"%d" % len(BODY), b"  %d\t" % len(BODY), b"000%d" % len(BODY)),
        (MALFORMED,): (
            *(b"-1", b"-0", b"+%d" % len(BODY), b"%d, %d" % (len(BODY), len(BODY)), b""),
            *(b"0x4e", b"%d.0" % len(BODY), b"7e1", b"7 1", b"7_1", b"ten", b"\xb2", b"'70'"),
            *(b"%d" % (2**64 + len(BODY)), b"9" * 30, b"%d;" % len(BODY), b"%d\0" % len(BODY)),
        ),
    }.items()
    for value in values
] + [
    row("two equal ones", charge(length=b"Content-Length: %d\r\n" % len(BODY) * 2), MALFORMED),
    row("two", charge(length=b"Content-Length: 5\r\nContent-Length: 6\r\n"), MALFORMED),
    row("a space before the colon", charge(length=b"Content-Length : 5\r\n"), MALFORMED),
    row("NUL in the name", charge(length=b"Content-Length\0: 5\r\n"), MALFORMED),
    row("a folded line", charge(length=b"Content-Length:\r\n %d\r\n" % len(BODY)), MALFORMED),
]

CODINGS = [
    row(f"Transfer-Encoding: {value!r}", chunked(IN_TWO_CHUNKS, coding=coding), answer)
    for answer, values in {
        "201": (b"chunked", b"CHUNKED", b"  chunked  "),
        MALFORMED: (
            *(b"chunked, chunked", b"xchunked", b"gzip", b"identity", b"chunked, gzip", b""),
            *(b"chunked, identity", b"chunkedx", b"chunked;q=1", b'"chunked"', b"\x0bchunked"),
            *(b"chun ked", b"chunked\0", b"chunked\xa0", b"chunked\t", b"\r\n chunked"),
        ),
    }.items()
    for value in values
    for coding in (b"Transfer-Encoding: %s\r\n" % value,)
] + [
    row("twice", chunked(IN_TWO_CHUNKS, coding=CHUNKED * 2), MALFORMED),
    row(
        "and gzip",
        chunked(IN_TWO_CHUNKS, coding=CHUNKED + b"Transfer-Encoding: gzip\r\n"),
        MALFORMED,
    ),
    row(
        "and a length", chunked(IN_TWO_CHUNKS, coding=CHUNKED + b"Content-Length: 5\r\n"), MALFORMED
    ),
    row(
        "after a length",
        chunked(IN_TWO_CHUNKS, coding=b"Content-Length: 5\r\n" + CHUNKED),
        MALFORMED,
    ),
    row(
        "and no length", chunked(IN_TWO_CHUNKS, coding=CHUNKED + b"Content-Length:\r\n"), MALFORMED
    ),
    row(
        "a space before the colon",
        chunked(IN_TWO_CHUNKS, coding=b"Transfer-Encoding : chunked\r\n"),
        MALFORMED,
    ),
    row(
        "a tab before the colon",
        chunked(IN_TWO_CHUNKS, coding=b"Transfer-Encoding\t: chunked\r\n"),
        MALFORMED,
    ),
    row(
        "a space before the name",
        chunked(IN_TWO_CHUNKS, coding=b" Transfer-Encoding: chunked\r\n"),
        MALFORMED,
    ),
]

SIZE, END = b"%x" % len(BODY), b"\r\n" + LAST_CHUNK
CHUNKS = [
    row(
        "a byte each", chunked(b"".join(chunk(bytes([byte])) for byte in BODY) + LAST_CHUNK), "201"
    ),
    row("zeros before a size", chunked(b"000" + SIZE + b"\r\n" + BODY + END), "201"),
    row("a size in capitals", chunked(SIZE.upper() + b"\r\n" + BODY + END), "201"),
    row("an extension", chunked(SIZE + b";a=b\r\n" + BODY + b"\r\n0;c\r\n\r\n"), "201"),
    row("a quoted extension", chunked(SIZE + b';a="b;c"\r\n' + BODY + END), "201"),
    row("a trailer", chunked(chunk(BODY) + b"0\r\nX-Sum: 1\r\n\r\n"), "201"),
    row("17,000 of a byte", chunked(chunk(b" ") * 17_000 + LAST_CHUNK), TOO_LARGE),
    row("one that is too large", chunked(chunk(b" " * 17_000) + LAST_CHUNK), TOO_LARGE),
    row("only the last one", chunked(LAST_CHUNK), INVALID),
    *(
        row(name, chunked(raw), MALFORMED)
        for name, raw in {
            "a size that is none": b"xyz\r\n" + BODY + END,
            "no size": b"\r\n" + BODY + END,
            "a negative size": b"-5\r\n" + BODY + END,
            "a size with +": b"+" + SIZE + b"\r\n" + BODY + END,
            "a size with 0x": b"0x" + SIZE + b"\r\n" + BODY + END,
            "a size with _": b"4_e\r\n" + BODY + END,
            "a size of 2**68": b"1" + b"0" * 17 + b"\r\n" + BODY + END,
            "a space before a size": b" " + SIZE + b"\r\n" + BODY + END,
            "a space behind a size": SIZE + b" \r\n" + BODY + END,
            "line feeds alone": SIZE + b"\n" + BODY + b"\n0\n\n",
            "a line feed alone": SIZE + b"\n" + BODY + END,
            "a carriage return alone": SIZE + b"\r" + BODY + END,
            "a line feed in an extension": SIZE + b";a\nb\r\n" + BODY + END,
            "a carriage return in an extension": SIZE + b";a\rb\r\n" + BODY + END,
            "NUL in an extension": SIZE + b";a\0b\r\n" + BODY + END,
            "nothing behind the data": SIZE + b"\r\n" + BODY + LAST_CHUNK,
            "longer than its size": b"5\r\n" + BODY + END,
            "a trailer that is none": chunk(BODY) + b"0\r\nno trailer\r\n\r\n",
            "Content-Length as a trailer": chunk(BODY) + b"0\r\nContent-Length: 5\r\n\r\n",
            "Transfer-Encoding as a trailer": chunk(BODY) + b"0\r\n" + CHUNKED + b"\r\n",
            "a folded trailer": chunk(BODY) + b"0\r\nX: a\r\n b\r\n\r\n",
        }.items()
    ),
]

METHODS = [
    row(f"{method} {target.decode()}", get(target, method=method.encode()), answer)
    for method, answers in {
        "POST": ("415 unsupported_media_type", NOT_ALLOWED),
        "GET": (NOT_ALLOWED, "200"),
        "OPTIONS": ("204", "204"),
        **dict.fromkeys(("PUT", "PATCH", "DELETE", "TRACE", "PROPFIND"), (NOT_ALLOWED,) * 2),
        **dict.fromkeys(
            ("post", "get", "FOO", "A" * 60_000, "G", "GETT", "P\0ST"), (MALFORMED,) * 2
        ),
    }.items()
    for target, answer in zip((b"/v1/charge", b"/health/live"), answers, strict=True)
] + [
    row("none", b" /health/live HTTP/1.1\r\nHost: x\r\n\r\n", MALFORMED),
    row("HTTP/2", b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n", MALFORMED),
    row("TLS", bytes.fromhex("16030100c8010000c40303") + bytes(200), MALFORMED),
    row("SSH", b"SSH-2.0-OpenSSH_9.9\r\n", MALFORMED),
    row("SMTP", b"EHLO x\r\n", MALFORMED),
    row("zeros", bytes(100), MALFORMED),
    row("a body with GET", charge(line=b"GET /health/live HTTP/1.1\r\n"), "200"),
]

TARGETS = [
    row(f"{name or target.decode()}", get(target), answer)
    for name, target, answer in (
        ("", b"http://x/health/live", "200"),
        ("", b"HTTP://x/health/live", "200"),
        ("an empty query", b"/health/live?", "200"),
        ("", b"*", NOT_FOUND),
        ("", b"/", "302"),
        ("", b"/?", "302"),
        ("", b"http://x/", "302"),
        ("", b"//", NOT_FOUND),
        ("", b"/health/../health/live", NOT_FOUND),
        ("", b"/./health/live", NOT_FOUND),
        ("", b"/v1/%2e%2e/health/live", NOT_FOUND),
        ("", b"/health/live%00", NOT_FOUND),
        ("", b"/health/live%0d%0aX: y".replace(b" ", b"%20"), NOT_FOUND),
        ("", b"/%ff", NOT_FOUND),
        ("", b"/%", NOT_FOUND),
        ("", b"/%zz", NOT_FOUND),
        ("", b"/%u0041", NOT_FOUND),
        ("", b"/%ed%a0%80", NOT_FOUND),
        ("", b"/health/live;a=b", NOT_FOUND),
        ("", b"/HEALTH/LIVE", NOT_FOUND),
        *(
            ("", path, NOT_FOUND)
            for path in (
                *(b"//metrics", b"/metrics/", b"/%6detrics", b"/metrics//", b"/metrics%2f"),
                *(b"/./metrics", b"/health/../metrics", b"/v1%2Fpayments", b"//v1/payments"),
                *(b"/v1/payments/", b"/v1//payments", b"/v1/payments/%2f", b"/v1/payments//"),
                *(b"/v1/payments/x/events/", b"/v1/payments//events", b"/v1/payments/x%2fevents"),
                *(b"http://x//metrics", b"http://x/metrics/", b"/schema/", b"/metrics;", b"/;"),
            )
        ),
        ("", b"/metrics?x=%2f", "200"),
        ("", b"/v1/payments/a%20b", INVALID),
        ("", b"/v1/payments/x/events", INVALID),
        ("", b'/"<>`{}|^', NOT_FOUND),
        ("8,000 bytes", b"/" + b"a" * 8_000, NOT_FOUND),
        ("no slash", b"health/live", MALFORMED),
        ("no path", b"http://x", MALFORMED),
        ("a port that is none", b"http://x:99999/health/live", MALFORMED),
        ("a backslash", b"\\health\\live", MALFORMED),
        ("UTF-8", "/é".encode(), MALFORMED),
        ("ISO 8859-1", b"/\xe9", MALFORMED),
        ("a tab", b"/health\tlive", MALFORMED),
        ("a space", b"/health live", MALFORMED),
        ("NUL", b"/health\0live", MALFORMED),
        ("a control character", b"/health\x01live", MALFORMED),
        ("DEL", b"/health\x7flive", MALFORMED),
        ("", b"/v1/payments/%00", INVALID),
        ("", b"/v1/payments/%ff", INVALID),
        ("", b"/v1/payments/%ed%a0%80", INVALID),
        ("", b"/v1/payments/..%2fcharge", NOT_FOUND),
        ("", b"/v1/payments?status=%00", INVALID),
        ("", b"/v1/payments?status=%ff", INVALID),
        ("", b"/v1/payments?status=%", INVALID),
        ("", b"/v1/payments?%00=%00", INVALID),
        ("", b"/v1/payments?limit=1&limit=1", INVALID),
        ("", b"/v1/payments?limit=1;limit=2", INVALID),
        ("", b"/v1/payments?limit=%EF%BC%91", INVALID),
        ("", b"/v1/payments?limit=" + b"9" * 5_000, INVALID),
        ("", b"/v1/payments?cursor=" + b"A" * 5_000, INVALID),
        ("", b"/v1/payments?=1&=2&&&", INVALID),
        ("", b"/v1/payments?&&&", "200"),
        ("", b"/v1/payments?created_from=0000-00-00T00:00:00Z", INVALID),
        ("", b"/v1/payments?created_from=0001-01-01T00:00:00%2b14:00", INVALID),
        (
            "1,000 parameters",
            b"/v1/payments?" + b"&".join(b"a%d" % n for n in range(1_000)),
            INVALID,
        ),
        ("one 1,000 times", b"/v1/payments?" + b"limit=1&" * 1_000, INVALID),
        ("UTF-8 in a query", "/v1/payments?status=é".encode(), MALFORMED),
    )
]

VERSIONS = [
    row("HTTP/1.0", get(version=b"HTTP/1.0"), "200 closed"),
    row("HTTP/1.0 without a host", get(version=b"HTTP/1.0", host=b""), "200 closed"),
    row(
        "HTTP/1.0 and keep-alive",
        get(version=b"HTTP/1.0", more=b"Connection: keep-alive\r\n"),
        "200 closed",
    ),
    row("a charge by HTTP/1.0", charge(line=b"POST /v1/charge HTTP/1.0\r\n"), "201 closed"),
    row(
        "HTTP/1.0 without a length",
        charge(line=b"POST /v1/charge HTTP/1.0\r\n", length=b""),
        "400 invalid_request closed",
    ),
    *(
        row(f"version {version!r}", get(version=version), MALFORMED)
        for version in (
            *(b"HTTP/1.2", b"HTTP/2", b"HTTP/3.0", b"HTTP/9.9", b"HTTP/1.10", b"HTTP/01.1"),
            *(b"HTTP/11", b"HTTP/1.", b"HTTP/.1", b"HTTP/1,1", b"HTTP/1.1x", b"HTTP/ 1.1"),
            *(b"http/1.1", b"HTTP/1.1 ", b"HTTPS/1.1", b"ICE/1.0", b"", b"HTTP/-1.1", b"\0"),
        )
    ),
]

HEADS = [
    row("empty lines before it", b"\r\n\r\n" + get(), "200"),
    row("100 headers", get(more=b"".join(b"X-%d: y\r\n" % n for n in range(99))), "200"),
    row("a header of 60,000 bytes", get(more=b"X: " + b"y" * 60_000 + b"\r\n"), "200"),
    row("a name of 60,000 bytes", get(more=b"X" * 60_000 + b": y\r\n"), "200"),
    row("bytes beyond ASCII in a header", get(more=b"X: \xff\xfe\r\n"), "200"),
    row("a request id that cannot be logged", get(more=b"X-Request-ID: a\xff b\r\n"), "200"),
    row("a trace that is none", charge(more=b"traceparent: 00-\xff\r\n"), "201"),
    *(
        row(name, raw, MALFORMED)
        for name, raw in {
            "line feeds alone": get().replace(b"\r\n", b"\n"),
            "a line feed alone": get(host=b"Host: x\n"),
            "a line feed at the end": get()[:-2] + b"\n",
            "carriage returns alone": get().replace(b"\r\n", b"\r"),
            "two carriage returns": get().replace(b"\r\n", b"\r\r\n"),
            "a space before the line": b" " + get(),
            "a tab in the line": get().replace(b" ", b"\t", 1),
            "a space before the colon": get(more=b"X : y\r\n"),
            "a tab before the colon": get(more=b"X\t: y\r\n"),
            "a space before the name": get(more=b" X: y\r\n"),
            "a space before the first name": get(host=b" Host: x\r\n"),
            "a folded header": get(more=b"X: y\r\n z\r\n"),
            "a header without a colon": get(more=b"nothing\r\n"),
            "a header without a name": get(more=b": y\r\n"),
            **{
                f"{c!r} in a name": get(more=b"X%cY: z\r\n" % c)
                for c in b'\0\x01 "(),/;<=>?@[]{}\x7f\xe9'
            },
            **{
                f"{c!r} in a header": get(more=b"X: y%cz\r\n" % c)
                for c in b"\0\x01\x0b\r\n\x1f\x7f"
            },
        }.items()
    ),
]

TO_EXPECT = {
    b"100-continue": ("100", "201"),
    b"100-Continue": ("100", "201"),
    b"something else": ("201",),
    b"100-continue, other": ("201",),
    b"": ("201",),
}
EXPECTATIONS = [
    row(f"Expect: {value!r}", charge(more=b"Expect: %s\r\n" % value), *answers)
    for value, answers in TO_EXPECT.items()
] + [
    row("twice", charge(more=b"Expect: 100-continue\r\n" * 2), "100", "201"),
    row(
        "a bad media type",
        charge(media_type=b"", more=b"Expect: 100-continue\r\n"),
        "100",
        NOT_JSON,
    ),
]

CLOSING = b"Connection: close\r\n"
PIPELINES = [
    row("two charges", charge() + charge(), "201", "201"),
    row("ten", charge() * 10, *["201"] * 10),  # of one key
    row(
        "a bad one between",
        charge() + charge(b"{}") + charge(key=b"") + charge(),
        "201",
        INVALID,
        BAD_KEY,
        "201",
    ),
    row("one behind the last", charge(more=CLOSING) + charge(), "201 closed"),
    row("one behind a body too large", charge(b" " * 17_000) + charge(), TOO_LARGE),
    row(
        "a payment that is not there yet",
        get(b"/v1/payments/" + ORDER) + charge(),
        "404 payment_not_found",
        "201",
    ),
    row("a request as a body", charge(charge()), INVALID),
    row("a request in a chunk", chunked(chunk(get()) + LAST_CHUNK), INVALID),
    row("keep-alive and close", get(more=b"Connection: keep-alive, close\r\n"), "200 closed"),
    row("Connection: upgrade alone", charge(more=b"Connection: upgrade\r\n"), "201"),
    row("Upgrade alone", charge(more=b"Upgrade: h2c\r\n"), "201"),
]

# ---- paste into tests/edge/framings.py before FRAMINGS (import JSON too); and add to FRAMINGS:
#      "refused by us": REFUSED_BY_US, "trailer": TRAILERS, "upgrade": UPGRADES, "behind": BEHIND
NO_HOST = MALFORMED
CODING = "501 not_implemented closed"
VERSION = "505 version_not_supported closed"
TOO_LONG = "414 target_too_long closed"
HEAD_TOO_LARGE = "431 head_too_large closed"

REFUSED_BY_US = [
    # RFC 9112 section 3.2
    row("no host", get(host=b""), NO_HOST),
    row("two hosts", get(host=b"Host: x\r\nHost: y\r\n"), NO_HOST),
    row("the same host twice", get(host=b"Host: x\r\n" * 2), NO_HOST),
    row("two hosts in HTTP/1.0", get(version=b"HTTP/1.0", host=b"Host: x\r\n" * 2), NO_HOST),
    *(
        row(f"Host: {value!r}", get(host=b"Host: %s\r\n" % value), answer)
        for answer, values in {
            "200": (
                b"",
                b"x",
                b"x:4004",
                b"x:",
                b"127.0.0.1:4004",
                b"[::1]:4004",
                b"a%20b",
                b"X_y.z",
            ),
            NO_HOST: (
                b"a b",
                b"x/y",
                b"a, b",
                b"u@x",
                b"x:y",
                b"x:1:2",
                b"[::1",
                b"\xff",
                b"x?y",
                b"x#y",
            ),
        }.items()
        for value in values
    ),
    # RFC 9112 section 6.1
    *(
        row(
            f"Transfer-Encoding: {value!r}",
            chunked(IN_TWO_CHUNKS, coding=b"Transfer-Encoding: %s\r\n" % value),
            CODING,
        )
        for value in (b"gzip, chunked", b"identity, chunked", b"xchunked, chunked", b",chunked")
    ),
    row(
        "gzip and chunked apart",
        chunked(IN_TWO_CHUNKS, coding=b"Transfer-Encoding: gzip\r\n" + CHUNKED),
        CODING,
    ),
    row(
        "chunked by HTTP/1.0",
        charge(IN_TWO_CHUNKS, line=b"POST /v1/charge HTTP/1.0\r\n", length=CHUNKED),
        MALFORMED,
    ),
    # RFC 9110 sections 10.1.1 and 15.2: nothing is announced to HTTP/1.0
    row(
        "Expect by HTTP/1.0",
        charge(line=b"POST /v1/charge HTTP/1.0\r\n", more=b"Expect: 100-continue\r\n"),
        "201 closed",
    ),
    # RFC 9110 section 15.6.6
    *(
        row(f"version {version!r}", get(version=version), VERSION)
        for version in (b"HTTP/0.9", b"HTTP/2.0")
    ),
    row("no version", b"GET /health/live\r\n\r\n", VERSION),
    # RFC 9112 section 3 and 3.2
    row("a target of 16 KiB", get(b"/" + b"a" * (16 * 1024 - 1)), NOT_FOUND),
    row("a target of one byte more", get(b"/" + b"a" * (16 * 1024)), TOO_LONG),
    row("a target of 70,000 bytes", get(b"/" + b"a" * 70_000), TOO_LONG),
    row(
        "10,000 parameters",
        get(b"/v1/payments?" + b"&".join(b"a%d=1" % n for n in range(10_000))),
        TOO_LONG,
    ),
    row("a fragment", get(b"/health/live#x"), MALFORMED),
    # RFC 6585 section 5, however the bytes arrive
    row("a header of 70,000 bytes", get(more=b"X: " + b"y" * 70_000 + b"\r\n"), HEAD_TOO_LARGE),
    row("13,000 headers", get(more=b"a: b\r\n" * 13_000), HEAD_TOO_LARGE),
    row("101 headers", get(more=b"a: b\r\n" * 100), HEAD_TOO_LARGE),
    row("101 headers of a charge", charge(more=b"a: b\r\n" * 97), HEAD_TOO_LARGE),
    row("CONNECT", get(b"x:443", method=b"CONNECT"), CODING),
]

# RFC 9110 section 6.5.1: a trailer is no header.
TRAILERS = [
    row(
        "the only key",
        charge(b"", key=b"", length=CHUNKED) + chunk(BODY) + b"0\r\nIdempotency-Key: t\r\n\r\n",
        BAD_KEY,
    ),
    row("a second key", chunked(chunk(BODY) + b"0\r\nIdempotency-Key: t\r\n\r\n"), "201"),
    row(
        "the media type",
        charge(b"", media_type=b"", length=CHUNKED) + chunk(BODY) + b"0\r\n" + JSON + b"\r\n",
        NOT_JSON,
    ),
    row("close", chunked(chunk(BODY) + b"0\r\nConnection: close\r\n\r\n"), "201 closed"),
    row(
        "Upgrade", chunked(chunk(BODY) + b"0\r\nConnection: upgrade\r\nUpgrade: h2c\r\n\r\n"), "201"
    ),
]

# RFC 9110 section 7.8: we go on as if it was not asked for.
H2C = b"Connection: Upgrade, HTTP2-Settings\r\nUpgrade: h2c\r\nHTTP2-Settings: AAMAAABkAAQAAP__\r\n"
WEBSOCKET = b"Connection: Upgrade\r\nUpgrade: websocket\r\nSec-WebSocket-Version: 13\r\n"
UPGRADES = [
    row("a charge that would be HTTP/2", charge(more=H2C), "201"),
    row("the same in chunks", chunked(IN_TWO_CHUNKS, coding=H2C + CHUNKED), "201"),
    row("a charge that would be a websocket", charge(more=WEBSOCKET), "201"),
    row("GET", get(more=H2C), "200"),
    row("a request as a body", charge(get(), more=H2C), INVALID),
    row("behind another", charge() + charge(more=H2C) + charge(), "201", "201", "201"),
    row("and close", charge(more=H2C + b"Connection: close\r\n"), "201 closed"),
    row("and two lengths", charge(more=H2C + b"Content-Length: 1\r\n"), MALFORMED),
    row(
        "and a length and chunks",
        chunked(IN_TWO_CHUNKS, coding=H2C + CHUNKED + b"Content-Length: 1\r\n"),
        MALFORMED,
    ),
]

_LIST = b"/v1/payments?limit=1"

# What cannot be read is answered after what could: the answers have the order of the requests.
BEHIND = [
    row("garbage", charge() + b"garbage\r\n\r\n", "201", MALFORMED),
    row(
        "what is not there, and garbage", charge() + get(b"/x") + b"\0", "201", NOT_FOUND, MALFORMED
    ),
    row("half a head that is wrong", charge() + get(more=b"no colon\r\n"), "201", MALFORMED),
    row("a bad length", charge() + charge(length=b"Content-Length: x\r\n"), "201", MALFORMED),
    row("bad chunks", charge() + chunked(b"xyz\r\n"), "201", MALFORMED),
    row("two good ones and garbage", charge() * 2 + b"\0", "201", "201", MALFORMED),
    row(
        "a head that is too large",
        charge() + get(more=b"X: " + b"y" * 70_000 + b"\r\n"),
        "201",
        HEAD_TOO_LARGE,
    ),
    row("no length", charge(length=b""), INVALID, MALFORMED),
    row("a length of 0", charge(length=b"Content-Length: 0\r\n"), INVALID, MALFORMED),
    row("a length of 1", charge(length=b"Content-Length: 1\r\n"), INVALID, MALFORMED),
    row(
        "a length one too short",
        charge(length=b"Content-Length: %d\r\n" % (len(BODY) - 1)),
        INVALID,
        MALFORMED,
    ),
    row("Content_Length", charge(length=b"Content_Length: 5\r\n"), INVALID, MALFORMED),
    row("more than may wait", get(_LIST) * 40, *["200"] * 17, "503 too_busy closed"),
    row("what is answered at once", get() * 40, *["200"] * 40),
    row("what is not there", charge() + get(b"/x") + charge(), "201", NOT_FOUND, "201"),
]

FRAMINGS = {
    "refused by us": REFUSED_BY_US,
    "trailer": TRAILERS,
    "upgrade": UPGRADES,
    "behind": BEHIND,
    "length": LENGTHS,
    "coding": CODINGS,
    "chunks": CHUNKS,
    "method": METHODS,
    "target": TARGETS,
    "version": VERSIONS,
    "head": HEADS,
    "expect": EXPECTATIONS,
    "pipeline": PIPELINES,
}
