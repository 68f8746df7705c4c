"""A payment's events are shown as they are stored, whatever they are."""

import uuid
from datetime import UTC
from typing import Any

import msgspec
import psycopg
import pytest

from payments.database.connections import Database
from payments.errors import PaymentNotFound
from payments.events.facts import encode
from payments.queries.history import get_history
from tests.queries.rows import insert, view
from tests.support import ORDER_ID, History, append, append_stored, histories, stored_event

pytestmark = pytest.mark.anyio

Connection = psycopg.Connection[Any]


async def test_every_kind_of_event(database: Database, connection: Connection) -> None:
    position = 0
    for history in histories().values():
        append(connection, history.facts)
        events = (await get_history(database, history.id, None)).events
        for event, fact in zip(events, history.facts, strict=True):
            position += 1
            assert (event.position, event.version) == (position, fact.version)
            assert event.type == fact.TOPIC
            assert event.data == msgspec.Raw(encode(fact))
            assert event.recorded_at.astimezone(UTC) == event.recorded_at


async def test_what_is_shown_is_the_stored_text(database: Database, connection: Connection) -> None:
    """Not what a decoder made of it: order, spaces and unknown fields stay."""
    odd = b'{ "z" : 1,\n "a": [1.50, "\\u0000"], "z": 2 }'
    stored = stored_event(state=odd)
    append_stored(connection, [stored])
    history = await get_history(database, uuid.UUID(str(stored.originator_id)), None)
    encoded = msgspec.json.encode(history)
    assert odd in encoded
    (event,) = msgspec.json.decode(encoded)["events"]
    assert set(event) == {"position", "version", "type", "recorded_at", "data"}
    assert event["recorded_at"].endswith("Z")


@pytest.mark.parametrize(
    "state",
    [
        b"\xff\xfe",
        b"",
        b"{",
        b"[" * 100_000,
        b"[" * 50_000 + b"]" * 50_000,
        b'{"a": "\\ud800"}',
        b'{"a": "\x00"}',
    ],
    ids=["not UTF-8", "empty", "cut short", "deep", "nested", "half a pair", "NUL"],
)
async def test_bytes_that_are_not_json_are_null(
    database: Database, connection: Connection, state: bytes
) -> None:
    history = History("k")
    append(connection, history.facts)
    append_stored(connection, [stored_event(history.id, 2, state, "Unheard of")])
    events = (await get_history(database, history.id, None)).events
    assert [(event.type, event.data is None) for event in events] == [
        ("PaymentInitiated", False),
        ("Unheard of", True),
    ]
    assert b'"data":null' in msgspec.json.encode(events)


async def test_a_client_sees_its_own_payments_only(
    database: Database, connection: Connection
) -> None:
    history = History("k", client="shop").charged()
    append(connection, history.facts)
    for client in (None, "shop"):
        assert len((await get_history(database, history.id, client)).events) == 2
    for client in ("other", "default", ""):
        with pytest.raises(PaymentNotFound):
            await get_history(database, history.id, client)


async def test_a_damaged_end_hides_nothing_from_its_client(
    database: Database, connection: Connection
) -> None:
    history = History("k", client="shop")
    append(connection, history.facts)
    append_stored(connection, [stored_event(history.id, 2, b"\xff")])
    assert len((await get_history(database, history.id, "shop")).events) == 2


async def test_a_beginning_that_names_nobody_is_for_the_unrestricted(
    database: Database, connection: Connection
) -> None:
    """Also one that names the client, but was written for another payment."""
    moved = encode(History("k", client="shop").facts[0])
    for state in (b"\xff", b'{"client": "shop"}', moved):
        stored = stored_event(state=state)
        append_stored(connection, [stored])
        id = uuid.UUID(str(stored.originator_id))
        assert len((await get_history(database, id, None)).events) == 1
        with pytest.raises(PaymentNotFound):
            await get_history(database, id, "shop")


async def test_unknown(database: Database, connection: Connection) -> None:
    payment = view(History("k").facts[0].occurred_at, merchant_order_id=ORDER_ID)
    insert(connection, [payment])
    with pytest.raises(PaymentNotFound, match=str(payment.id)):
        await get_history(database, ORDER_ID, None)
