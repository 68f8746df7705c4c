"""Well-formed requests that went wrong by a few bytes: random, but the same for the same seed.

pytest tests/edge/test_mutations.py --mutations 20000
"""

import random
from collections import Counter
from typing import Any

import psycopg
import pytest

from tests.edge.raw import Answer, Connection, NotHttp, code_of
from tests.edge.requests import (
    BODY,
    CHUNKED,
    IN_TWO_CHUNKS,
    ORDER,
    charge,
    chunked,
    get,
)
from tests.process import ROOT, ServiceProcess
from web.problems import UnreadableRequest

SEED = 20260101
UNREADABLE = {(error.status, error.code) for error in UnreadableRequest.__subclasses__()}

# Ends whatever is being read, so that nothing waits for the rest: no byte of a head or of a chunk's
# size is NUL, and more than a body may have.
END = bytes(20_000)

TOKENS = (
    *(b"\r\n", b"\n", b"\r", b"\0", b" ", b"\t", b":", b",", b'"', b"\\", b"{", b"[", b"}", b"0"),
    *(b"\xff", b"\xc3", b"\xed\xa0\x80", b"%00", b"%ff", b"/", b"..", b"?", b"#", b"&", b"=", b";"),
    *(b"9" * 20, b"-", b"+", b"e400", b"null", b"NaN", rb"\u0000", rb"\ud800", b"HTTP/1.0"),
    *(b"\r\n\r\n", CHUNKED, b"Content-Length: 5\r\n", b"Content-Length: 0\r\n", b"0\r\n\r\n"),
    *(b"Expect: 100-continue\r\n", b"Connection: close\r\n", b"Host: y\r\n", b"X" * 70_000),
    *(b"Idempotency-Key: t\r\n", b"Content-Type: text/plain\r\n", b'"amount_cents": 1, '),
)


def requests(number: int, payment_id: bytes) -> list[bytes]:
    """One of each kind, with keys of this number."""
    refund = b'{"payment_id": "%s", "amount_cents": 1}' % payment_id
    key = b"Idempotency-Key: mutated-%d\r\n" % number
    return [
        charge(key=key),
        charge(key=key, more=b"Expect: 100-continue\r\n"),
        chunked(IN_TWO_CHUNKS, key=key),
        charge(refund, key=key, line=b"POST /v1/refund HTTP/1.1\r\n"),
        get(b"/v1/payments?status=SUCCESS&limit=2&created_from=2026-01-01T00:00:00Z"),
        get(b"/v1/payments?merchant_order_id=" + ORDER),
        get(b"/v1/payments/" + payment_id),
        get(b"/v1/payments/%s/events" % payment_id),
        get(b"/health", more=b"X-Request-ID: abc\r\n"),
    ]


def mutated(data: bytes, other: bytes, dice: random.Random) -> bytes:
    at, end = sorted((dice.randrange(len(data) + 1), dice.randrange(len(data) + 1)))
    near = min(end, at + dice.randrange(1, 9))
    kind = dice.randrange(10)
    if kind == 0:  # flip a bit
        at = min(at, len(data) - 1)
        return data[:at] + bytes([data[at] ^ 1 << dice.randrange(8)]) + data[at + 1 :]
    if kind == 1:  # random bytes
        return data[:at] + dice.randbytes(dice.randrange(1, 9)) + data[near:]
    if kind == 2:
        return data[:at] + dice.choice(TOKENS) + data[at:]
    if kind == 3:
        return data[:at] + dice.choice(TOKENS) + data[near:]
    if kind == 4:  # delete
        return data[:at] + data[near:]
    if kind == 5:  # duplicate
        return data[:end] + data[at:end] * dice.choice((1, 1, 2, 50)) + data[end:]
    if kind == 6:  # splice
        return data[:at] + other[dice.randrange(len(other)) :]
    if kind == 7:  # one behind the other
        return data[:at] + other + data[at:] if dice.random() < 0.3 else data + other
    if kind == 8:  # cut short
        return data[:at]
    lines = data.split(b"\r\n")  # a line again, somewhere
    lines.insert(dice.randrange(len(lines) + 1), dice.choice(lines))
    return b"\r\n".join(lines)


class Documented:
    """Which errors may be answered."""

    def __init__(self) -> None:
        self._page = (ROOT / "docs" / "errors.md").read_text()

    def check(self, answer: Answer) -> None:
        code = code_of(answer)
        if answer.status >= 400:
            assert f"| {answer.status} | `{code}` |" in self._page
        if answer.status >= 500:
            assert answer.status == 503 or (answer.status, code) in UNREADABLE


@pytest.mark.timeout(1200)
def test_requests_that_went_wrong_by_a_few_bytes(
    edge: ServiceProcess, store: psycopg.Connection[Any], pytestconfig: pytest.Config
) -> None:
    dice = random.Random(SEED)
    documented = Documented()
    with Connection(edge.port) as connection:
        connection.send(charge(BODY.replace(b"1500", b"100000"), key=b"Idempotency-Key: r\r\n"))
        first = connection.answer()
    assert first is not None
    captured = {first.json()["id"]}
    heard = Counter[str]()
    for number in range(pytestconfig.getoption("--mutations")):
        kinds = requests(number, first.json()["id"].encode())
        data = dice.choice(kinds)
        for _ in range(dice.choice((1, 1, 1, 2, 3))):
            data = mutated(data, dice.choice(kinds), dice) or b"\0"
        try:
            with Connection(edge.port, 4) as connection:
                connection.send(data, END)
                answers = connection.answers()
            for answer in answers:
                documented.check(answer)
        except (NotHttp, TimeoutError, AssertionError, LookupError, ValueError) as error:
            error.add_note(f"mutation {number}: {data!r}")
            raise
        heard.update(str(answer.status) for answer in answers)
        captured |= {
            answer.json()["id"]
            for answer in answers
            if answer.status == 201 and "refund_id" not in answer.json()
        }
    assert min(heard["200"], heard["201"], heard["400"]) > 10, heard
    stored = store.execute(
        "SELECT originator_id::text, array_agg(topic ORDER BY originator_version) FROM"
        " payment_events WHERE topic NOT LIKE '%Refund%' GROUP BY 1"
    ).fetchall()
    outcomes = {tuple(topics) for _, topics in stored}
    assert outcomes <= {("PaymentInitiated", last) for last in ("PaymentCharged", "PaymentFailed")}
    assert {payment_id for payment_id, _ in stored} == captured
