"""The log in parts: the same events whatever happens between two of them, and no part is large."""

import uuid
from collections.abc import Iterator
from datetime import UTC, datetime
from typing import Any

import psycopg
import pytest

from payments import snapshot
from payments.database import connections as database
from payments.database.connections import DatabaseAddress, connect
from payments.errors import StartError
from payments.events.store import READ_MATCHING_EVENTS, READ_PART_EVENTS
from payments.queries import log as module
from payments.queries.log import PART_BYTES, ROW_BYTES, Replay, Wanted
from tests.support import ORDER_ID, History, append

Connection = psycopg.Connection[Any]
PAYMENTS = 450
EVENTS = 2 * PAYMENTS  # some parts
OTHER_ORDER = uuid.UUID("0d2c7d5e-0f0f-4b64-9e0b-6cbb3a3c6d11")


@pytest.fixture
def filled(connection: Connection) -> Connection:
    """First the first events of all payments, every third of another order, then the second."""
    known = [
        History(f"k{n}", order_id=OTHER_ORDER if n % 3 else ORDER_ID).charged()
        for n in range(PAYMENTS)
    ]
    append(connection, [*(each.facts[0] for each in known), *(each.facts[1] for each in known)])
    return connection


def positions(parts: Iterator[list[module.Sealed]]) -> list[int]:
    return [each.event.position for part in parts for each in part]


def wanted_of(filled: Connection, where: str) -> list[int]:
    query = f"SELECT notification_id FROM payment_events WHERE {where} ORDER BY 1"
    return [position for (position,) in filled.execute(query.encode()).fetchall()]


OF_ORDER = f"convert_from(state, 'UTF8')::json ->> 'merchant_order_id' = '{ORDER_ID}'"


@pytest.mark.parametrize(
    ("wanted", "where"),
    [
        (Wanted(), "true"),
        (Wanted(first=199, last=602), "notification_id BETWEEN 199 AND 602"),
        (Wanted(limit=READ_PART_EVENTS), f"notification_id <= {READ_PART_EVENTS}"),
        (Wanted(limit=READ_PART_EVENTS + 1), f"notification_id <= {READ_PART_EVENTS + 1}"),
        (Wanted(types=["PaymentCharged"]), "topic = 'PaymentCharged'"),
        (Wanted(types=["PaymentFailed"]), "false"),
        (Wanted(order_id=ORDER_ID), OF_ORDER),
        (Wanted(order_id=ORDER_ID, limit=101), f"{OF_ORDER} ORDER BY 1 LIMIT 101) x WHERE (true"),
    ],
)
def test_parts_are_the_whole(
    filled: Connection,
    address: DatabaseAddress,
    monkeypatch: pytest.MonkeyPatch,
    wanted: Wanted,
    where: str,
) -> None:
    monkeypatch.setattr(module, "SEARCHED_EVENTS", 350)
    if ") x WHERE" in where:
        query = f"SELECT notification_id FROM (SELECT * FROM payment_events WHERE {where})"
        expected = [row[0] for row in filled.execute(query.encode()).fetchall()]
    else:
        expected = wanted_of(filled, where)
    with Replay(address, wanted) as log:
        parts = list(log.parts())
    assert positions(iter(parts)) == expected
    most = READ_PART_EVENTS if wanted.all else READ_MATCHING_EVENTS
    assert max((len(part) for part in parts), default=0) <= most
    assert all(parts)


def test_what_comes_meanwhile_is_left_out(filled: Connection, address: DatabaseAddress) -> None:
    """Also where an end was given as a time: the log ended when the reading began."""
    for wanted in (Wanted(), Wanted(last=datetime(2200, 1, 1, tzinfo=UTC))):
        with Replay(address, wanted) as log:
            head = filled.execute("SELECT max(notification_id) FROM payment_events").fetchone()
            assert head is not None
            parts = log.parts()
            first = next(parts)
            append(filled, History(f"late {wanted}").charged().facts)
            assert len(first) + len(positions(parts)) == head[0]


def test_what_is_followed_joins_what_was_there(
    filled: Connection, address: DatabaseAddress
) -> None:
    with Replay(address, Wanted()) as log:
        seen = positions(log.parts())
        append(filled, History("late").charged().facts)
        following = log.follow()
        seen += [each.event.position for each in next(following)]
        append(filled, History("later").facts)
        seen += [each.event.position for each in next(following)]
    assert seen == list(range(1, EVENTS + 4))


def test_a_part_fits_into_a_socket_whatever_the_size_of_events(
    connection: Connection, address: DatabaseAddress
) -> None:
    connection.execute(
        "INSERT INTO payment_events SELECT n, gen_random_uuid(), 1, 'PaymentInitiated',"
        " convert_to(repeat('x', CASE WHEN n <= 300 THEN 500 ELSE 4000 END), 'UTF8'), now()"
        "  FROM generate_series(1, 1000) n"
    )
    with Replay(address, Wanted()) as log:
        parts = list(log.parts())
    assert positions(iter(parts)) == list(range(1, 1001))
    assert len(parts[0]) == READ_PART_EVENTS
    # One part is read before it is known that events have become larger.
    sizes = [sum(len(each.event.state) + ROW_BYTES for each in part) for part in parts]
    assert sum(size > PART_BYTES for size in sizes) <= 1


@pytest.fixture
def damaged(filled: Connection) -> Connection:
    """Its triggers and constraints are off."""
    filled.execute("ALTER TABLE payment_events DROP CONSTRAINT payment_events_sane")
    filled.execute("ALTER TABLE payment_events DROP CONSTRAINT payment_events_position")
    filled.execute("CREATE INDEX ON payment_events (notification_id)")
    filled.execute("ALTER TABLE payment_events DISABLE TRIGGER ALL")
    return filled


@pytest.mark.parametrize("wanted", [Wanted(), Wanted(types=["PaymentInitiated", "PaymentCharged"])])
def test_damage_is_shown_and_does_not_hold_it_up(
    damaged: Connection, address: DatabaseAddress, wanted: Wanted
) -> None:
    """Several events at one position at the end of a part; gaps; one far away from all others."""
    last_but_one = (READ_PART_EVENTS if wanted.all else READ_MATCHING_EVENTS) - 1
    damaged.execute(
        "INSERT INTO payment_events SELECT notification_id, gen_random_uuid(), n, topic, state,"
        "  recorded_at FROM payment_events, generate_series(1, 3) n"
        " WHERE notification_id = %s",
        [last_but_one],
    )
    damaged.execute("DELETE FROM payment_events WHERE notification_id BETWEEN 301 AND 700")
    damaged.execute(
        "UPDATE payment_events SET notification_id = %s WHERE notification_id = %s",
        [2**62, EVENTS],
    )
    with Replay(address, wanted) as log:
        found = positions(log.parts())
    assert found == wanted_of(damaged, "true")
    assert found.count(last_but_one) == 4
    assert found[-1] == 2**62


KILL = """
SELECT pg_terminate_backend(pid) FROM pg_stat_activity
 WHERE datname = current_database() AND application_name = 'payments replay'
"""


def test_a_lost_connection_is_opened_again(filled: Connection, address: DatabaseAddress) -> None:
    with Replay(address, Wanted()) as log:
        found = []
        for part in log.parts():
            found += [each.event.position for each in part]
            assert filled.execute(KILL.encode()).rowcount == 1
    assert found == list(range(1, EVENTS + 1))


def test_another_server_that_lacks_events_is_no_shorter_log(
    filled: Connection, address: DatabaseAddress, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, "RETRY_FOR_S", 3)
    with Replay(address, Wanted()) as log:
        parts = log.parts()
        next(parts)
        filled.execute("ALTER TABLE payment_events DISABLE TRIGGER ALL")
        filled.execute("DELETE FROM payment_events WHERE notification_id > 500")
        filled.execute(KILL.encode())
        # Whoever notices it first: what connects again, or what reads.
        with pytest.raises(StartError, match=r"ends at position 500; (before|when).* at 900"):
            list(parts)


def test_a_database_that_stays_away_is_told(
    filled: Connection,
    address: DatabaseAddress,
    server: DatabaseAddress,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(module, "RETRY_FOR_S", 0.5)
    with connect(server, "tests") as maintenance, Replay(address, Wanted()) as log:
        parts = log.parts()
        next(parts)
        refuse = f'ALTER DATABASE "{address.dbname}" ALLOW_CONNECTIONS false'
        maintenance.execute(refuse.encode())
        filled.execute(KILL.encode())
        with pytest.raises(StartError, match="not currently accepting connections"):
            list(parts)


def test_what_a_standby_cancels_is_read_again(
    filled: Connection, address: DatabaseAddress, monkeypatch: pytest.MonkeyPatch
) -> None:
    real, asked = snapshot._fetch, []

    def cancelled(*arguments: Any) -> Any:
        asked.append(arguments)
        if len(asked) % 2:
            raise psycopg.errors.SerializationFailure
        return real(*arguments)

    monkeypatch.setattr(snapshot, "_fetch", cancelled)
    monkeypatch.setattr(database, "CONFLICT_PAUSE_S", 0)
    with Replay(address, Wanted()) as log:
        assert positions(log.parts()) == list(range(1, EVENTS + 1))
