"""Requests as bytes, good and bad, each with its answers, and what they leave behind.

Sources: RFC 9110 (HTTP semantics), RFC 9112 (HTTP/1.1), RFC 8259 (JSON), and the usual ways of
smuggling one request inside another. A server that frames a request otherwise than its client or
a proxy does takes a part of it for the next request. So each one is followed by one more on the
same connection, and that has to be answered as itself, or not at all if the connection is closed.
"""

import time
from contextlib import ExitStack
from typing import Any

import psycopg
import pytest

from tests.edge.contents import CONTENTS
from tests.edge.framings import FRAMINGS
from tests.edge.raw import Connection, said
from tests.edge.requests import BODY, charge, chunk, chunked, get
from tests.machine import within
from tests.process import ServiceProcess

NEXT = get(more=b"Connection: close\r\n")
EVENTS_OF_A_CHARGE = 2

ROWS = {
    f"{table}: {row.name}": row for table, rows in (CONTENTS | FRAMINGS).items() for row in rows
}


def stored_events(store: psycopg.Connection[Any]) -> int:
    found = store.execute("SELECT count(*) FROM payment_events").fetchone()
    assert found is not None
    return int(found[0])


def test_every_row_has_a_name_of_its_own() -> None:
    assert len(ROWS) == sum(len(rows) for rows in (CONTENTS | FRAMINGS).values())


@pytest.mark.parametrize("name", ROWS)
def test_a_request(name: str, edge: ServiceProcess, store: psycopg.Connection[Any]) -> None:
    row = ROWS[name]
    before = stored_events(store)
    with Connection(edge.port) as connection:
        connection.send(row.sent)
        connection.send(NEXT)
        answers = connection.answers()
    heard = [said(answer) for answer in answers]
    if not row.answers[-1].endswith("closed"):
        assert heard.pop() == "200 closed"
        assert answers[-1].json() == {"ok": True, "service": "payment-service"}
    assert heard == list(row.answers)
    charged = {answer.headers["location"] for answer in answers if answer.status == 201}
    assert stored_events(store) - before == EVENTS_OF_A_CHARGE * len(charged)


TOO_SLOW = "408 body_too_slow closed"
UNFINISHED = {
    "nothing": (b"", []),
    "an empty line": (b"\r\n", []),
    "half a request line": (b"GET /health", []),
    "half a head": (get()[:-2], []),
    "a length without a body": (charge(b"", length=b"Content-Length: 5\r\n"), [TOO_SLOW]),
    "a byte is missing": (charge()[:-1], [TOO_SLOW]),
    "a body of 10 GB to come": (charge(length=b"Content-Length: 9999999999\r\n"), [TOO_SLOW]),
    "a chunk of 2**64 - 1": (chunked(b"f" * 16 + b"\r\n" + BODY), [TOO_SLOW]),
    "no last chunk": (chunked(chunk(BODY)), [TOO_SLOW]),
    "a chunk size without end": (chunked(b"0" * 1_000), [TOO_SLOW]),
    "an extension without end": (chunked(b"5;" + b"a" * 1_000), [TOO_SLOW]),
    "half a trailer": (chunked(chunk(BODY) + b"0\r\nX: y\r\n"), [TOO_SLOW]),
    "a body that was asked for": (charge(more=b"Expect: 100-continue\r\n")[:-1], ["100", TOO_SLOW]),
    "one and a half": (charge() + charge()[:-1], ["201", TOO_SLOW]),
}


def test_a_request_that_never_ends(edge: ServiceProcess, store: psycopg.Connection[Any]) -> None:
    """All of them at once: each is cut, or refused and cut, after 5 s."""
    before = stored_events(store)
    started = time.monotonic()
    with within(7.5), ExitStack() as stack:
        connections = {name: stack.enter_context(Connection(edge.port, 8)) for name in UNFINISHED}
        answered = stack.enter_context(Connection(edge.port, 8))
        answered.send(get())
        assert answered.answer() is not None
        answered.send(b"\r\n")  # does not keep it open
        for name, connection in connections.items():
            connection.send(UNFINISHED[name][0])
        heard = {
            name: [said(answer) for answer in connection.answers()]
            for name, connection in connections.items()
        }
        assert answered.answers() == []
    assert heard == {name: expected for name, (_, expected) in UNFINISHED.items()}
    assert time.monotonic() - started > 4.5
    charged = sum(answers.count("201") for answers in heard.values())
    assert stored_events(store) - before == EVENTS_OF_A_CHARGE * charged
