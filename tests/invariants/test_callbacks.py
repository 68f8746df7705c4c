"""The checker of callbacks itself: it passes what is right, and finds each kind of wrong."""

import asyncio
import uuid
from collections import Counter
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import msgspec
import psycopg
import pytest

from payments.callbacks.dispatcher import Dispatcher
from payments.database.connections import Database, DatabaseAddress, connect
from payments.http_url import parse_http_url
from payments.observability.metrics import Telemetry
from payments.order_service.endpoint import Endpoint
from payments.order_service.target import Target
from payments.projections.callbacks import begin_at_the_end
from tests.callbacks.outbox import Outbox
from tests.conftest import Clones
from tests.doubles.order_requests import Request
from tests.doubles.order_service import Fault, OrderService
from tests.invariants.callbacks import CallbackReport, check_callbacks
from tests.invariants.checker import InvariantBroken
from tests.support import History, until

PAID, LOST, GONE, TWICE, BACK, KEPT, TOLD = (uuid.UUID(int=n, version=4) for n in range(7))


class Told(NamedTuple):
    """A database whose callbacks were all sent, and what came of them."""

    address: DatabaseAddress
    received: list[Request]


async def tell(address: DatabaseAddress) -> list[Request]:
    """One callback of every kind: delivered, dead, superseded after an attempt, excluded."""
    with connect(address, "tests") as connection:
        async with Database(address, 1) as database, OrderService() as orders:
            orders.script(
                Fault("410", order_id=str(GONE)),
                Fault("503", order_id=str(TWICE), retry_after="60"),
            )
            outbox = Outbox(database, connection)
            await begin_at_the_end(database)
            endpoint = Endpoint(Target(url=parse_http_url(orders.url)))
            dispatcher = Dispatcher(database.connect, endpoint, Telemetry(), 90)
            await dispatcher.start()
            try:
                await outbox.log(
                    *History("paid", order_id=PAID).charged().refunded().facts,
                    *History("lost", order_id=LOST).declined().facts,
                    *History("gone", order_id=GONE).charged().facts,
                    *History("first", order_id=TWICE).declined().facts,
                    *History("back", order_id=BACK).charged().refunded().facts,
                    *History("again", order_id=BACK).declined().facts,
                    *History("kept", order_id=KEPT).charged().refunded("r", 500).facts,
                    *History("other", order_id=KEPT).declined().facts,
                    *History("told", order_id=TOLD).declined().facts,
                )
                dispatcher.wake()
                await until(lambda: len(outbox.attempts()) == 8)
                await outbox.log(
                    *History("at last", order_id=TOLD).charged().facts,
                    *History("second", order_id=TWICE).charged().facts,
                    *History("third", order_id=TWICE).charged().facts,
                )
                dispatcher.wake()
                await until(lambda: outbox.lanes() == [])
            finally:
                await dispatcher.stop(2)
            return orders.requests


@pytest.fixture(scope="module")
def told(clones: Clones) -> Iterator[Told]:
    address = clones.take()
    yield Told(address, asyncio.run(tell(address)))
    clones.drop(address)


@pytest.fixture
def draft(told: Told) -> Iterator[psycopg.Connection[Any]]:
    """A connection to it; what a test changes is undone."""
    with psycopg.connect(told.address.conninfo("tests"), autocommit=True) as connection:
        connection.isolation_level = psycopg.IsolationLevel.REPEATABLE_READ
        with connection.transaction(force_rollback=True):
            yield connection


@pytest.fixture
def received(told: Told) -> list[Request]:
    """A copy, for the test to change."""
    return [msgspec.structs.replace(request) for request in told.received]


def test_all_is_well(draft: psycopg.Connection[Any], received: list[Request]) -> None:
    assert check_callbacks(draft, received=received) == CallbackReport(
        Counter(delivered=9, dead=1, superseded=2, excluded=2), 11
    )


def test_an_empty_database_is_well(connection: psycopg.Connection[Any]) -> None:
    assert check_callbacks(connection, received=[]) == CallbackReport(Counter(), 0)


def test_what_is_under_way_is_well_until_all_must_be_settled(
    draft: psycopg.Connection[Any],
) -> None:
    draft.execute(f"UPDATE callback_deliveries SET {DUE} WHERE status = 'SUCCESS'".encode())
    draft.execute(LANE.encode() + b" FROM callback_deliveries WHERE state = 'due'")
    draft.execute("UPDATE followers SET position = position - 1 WHERE name = 'callbacks'")
    last = "position = (SELECT max(position) FROM callback_deliveries)"
    draft.execute(f"DELETE FROM callback_attempts WHERE {attempt_of(last)}".encode())
    draft.execute(f"DELETE FROM callback_deliveries WHERE {last}".encode())
    check_callbacks(draft, settled=False)
    with pytest.raises(InvariantBroken, match="still due"):
        check_callbacks(draft)


DUE = "state = 'due', finished_at = NULL"
LANE = (
    "INSERT INTO callback_lanes (order_id, in_flight)"
    " SELECT DISTINCT ON (order_id) order_id, event_id"
)
DELIVERED, DEAD = "state = 'delivered'", "state = 'dead'"
OF_PAID = f"status = 'SUCCESS' AND order_id = '{PAID}'"
FAILED_OF = "status = 'FAILED' AND order_id ="
COLUMNS = (
    "position, order_id, payment_id, sequence, status, amount_cents, currency, occurred_at,"
    " state, attempts, finished_at"
)


def attempt_of(which: str) -> str:
    return f"event_id IN (SELECT event_id FROM callback_deliveries WHERE {which})"


def tried(state: str, outcome: str) -> str:
    return (
        "INSERT INTO callback_attempts (event_id, claim, started_at, outcome, status)"
        f" SELECT event_id, 99, now(), '{outcome}', 200 FROM callback_deliveries"
        f" WHERE state = '{state}'"
    )


@pytest.mark.parametrize(
    ("change", "finding"),
    [
        (f"DELETE FROM callback_deliveries WHERE {OF_PAID}", "there is no callback for"),
        (
            f"INSERT INTO callback_deliveries (event_id, {COLUMNS})"
            f" SELECT gen_random_uuid(), {COLUMNS} FROM callback_deliveries WHERE {OF_PAID}",
            "the events say nothing of",
        ),
        *(
            (f"UPDATE callback_deliveries SET {change} WHERE {OF_PAID}", "the events say Outcome")
            for change in (
                "position = position - 1",
                "order_id = gen_random_uuid()",
                "payment_id = gen_random_uuid()",
                "sequence = sequence + 1",
                "status = 'REFUNDED'",
                "amount_cents = amount_cents + 1",
                "currency = 'EUR'",
                "occurred_at = occurred_at + interval '1 us'",
            )
        ),
        (f"UPDATE callback_deliveries SET state = 'excluded' WHERE {OF_PAID}", "it is excluded"),
        (
            "UPDATE callback_deliveries SET state = 'delivered' WHERE state = 'excluded'",
            "it is delivered, and SUCCESS, FAILED are wanted",
        ),
        (
            f"UPDATE callback_deliveries SET finished_at = NULL WHERE {OF_PAID}",
            "is delivered and was finished at None",
        ),
        (
            "UPDATE callback_deliveries SET state = 'superseded' WHERE status = 'FAILED'",
            f"FAILED of order {LOST} is superseded by nothing",
        ),
        (
            f"UPDATE callback_deliveries SET state = 'superseded' WHERE {FAILED_OF} '{BACK}'",
            f"FAILED of order {BACK} is superseded by nothing",
        ),
        (
            f"UPDATE callback_deliveries SET state = 'dead' WHERE {FAILED_OF} '{KEPT}'",
            f"FAILED of order {KEPT} is dead, and Outcome.* is its money",
        ),
        (
            f"UPDATE callback_deliveries SET state = 'superseded' WHERE {OF_PAID}",
            f"SUCCESS of order {PAID} is superseded by nothing",
        ),
        ("UPDATE callback_attempts SET event_id = gen_random_uuid()", "and is no callback"),
        (
            f"UPDATE callback_deliveries SET attempts = 2 WHERE {OF_PAID}",
            "had 2 attempts, 1 are on record",
        ),
        (
            f"UPDATE callback_attempts SET status = 500 WHERE {attempt_of(DELIVERED)}",
            "was delivered without a 2xx",
        ),
        (
            f"DELETE FROM callback_attempts WHERE {attempt_of(DELIVERED)}",
            "is delivered, but by none of its attempts",
        ),
        (
            f"DELETE FROM callback_attempts WHERE {attempt_of(DEAD)}",
            "is dead, but no attempt of it failed",
        ),
        (tried("superseded", "delivered"), "is superseded, but was delivered"),
        (tried("excluded", "http_error"), "is excluded, but was tried"),
        (f"UPDATE callback_deliveries SET {DUE} WHERE {OF_PAID}", "has due callbacks and no lane"),
        (f"UPDATE callback_deliveries SET {DUE} WHERE {OF_PAID}", "it is still due"),
        (
            "INSERT INTO callback_lanes VALUES (gen_random_uuid(), now() + interval '1 h')",
            "has a lane and no due callbacks",
        ),
        ("INSERT INTO callback_lanes VALUES (gen_random_uuid())", "there is still a lane"),
        (
            "INSERT INTO callback_lanes (order_id, in_flight)"
            " SELECT gen_random_uuid(), event_id FROM callback_deliveries LIMIT 1",
            "another's callback is under way",
        ),
        ("UPDATE followers SET position = 1 WHERE name = 'callbacks'", "the outbox is at 1"),
    ],
)
def test_each_kind_of_damage_is_found(
    draft: psycopg.Connection[Any], change: str, finding: str
) -> None:
    draft.execute(change.encode())
    with pytest.raises(InvariantBroken, match=finding):
        check_callbacks(draft)


def test_what_came_before_the_outbox_began_is_not_called_back(
    draft: psycopg.Connection[Any],
) -> None:
    with pytest.raises(InvariantBroken, match="the events say nothing of"):
        check_callbacks(draft, first_position=3)
    draft.execute(f"DELETE FROM callback_attempts WHERE {attempt_of(OF_PAID)}".encode())
    draft.execute(f"DELETE FROM callback_deliveries WHERE {OF_PAID}".encode())
    check_callbacks(draft, first_position=3)


def test_other_statuses_may_be_wanted(draft: psycopg.Connection[Any]) -> None:
    every = ("SUCCESS", "FAILED", "REFUNDED")
    with pytest.raises(InvariantBroken, match="it is excluded"):
        check_callbacks(draft, statuses=every)


def test_who_is_parked_has_no_callback_yet(draft: psycopg.Connection[Any]) -> None:
    draft.execute(
        "INSERT INTO parked_streams (follower, payment_id, position, reason)"
        f" SELECT 'callbacks', payment_id, 1, '' FROM callback_deliveries WHERE {OF_PAID}".encode()
    )
    draft.execute(f"DELETE FROM callback_attempts WHERE {attempt_of(OF_PAID)}".encode())
    draft.execute(f"DELETE FROM callback_deliveries WHERE {OF_PAID}".encode())
    check_callbacks(draft)


Change = Callable[[list[Request]], object]


def of(received: list[Request], order_id: uuid.UUID) -> list[Request]:
    return [request for request in received if request.order_id == str(order_id)]


def rewrite(request: Request, **changed: Any) -> None:
    request.body = msgspec.json.encode(request.content | changed)
    del request.content


def repeat(received: list[Request], request: Request) -> Request:
    """It comes once more, after all others."""
    last = max(each.finished or 0 for each in received)
    again = msgspec.structs.replace(
        request, number=len(received), arrived=last + 1, finished=last + 2, effect="repeated"
    )
    received.append(again)
    return again


def swap(one: Request, other: Request) -> None:
    one.arrived, other.arrived = other.arrived, one.arrived
    one.finished, other.finished = other.finished, one.finished


@pytest.mark.parametrize(
    ("change", "finding"),
    [
        (lambda r: rewrite(of(r, PAID)[0], event_id="none"), "tells of nothing known"),
        (lambda r: rewrite(of(r, PAID)[0], amount_cents=1), "tells of nothing known"),
        (lambda r: rewrite(of(r, PAID)[0], sequence="2"), "tells of nothing known"),
        (lambda r: r.remove(of(r, PAID)[0]), "is delivered, and was never accepted: 0 came"),
        (lambda r: of(r, PAID)[0].__setattr__("accepted", False), "never accepted: 1 came"),
        (lambda r: repeat(r, of(r, PAID)[0]), "came 2 times, of which are on record"),
        (lambda r: repeat(r, of(r, TWICE)[0]), "is FAILED after"),
        (lambda r: swap(*of(r, TWICE)[1:]), "SUCCESS first came after SUCCESS"),
        (lambda r: of(r, TWICE)[1].__setattr__("finished", None), "came while .* was under way"),
        (lambda r: of(r, LOST)[0].headers.pop("accept-encoding"), "Accept-Encoding is None"),
    ],
)
def test_each_thing_that_may_not_come_is_found(
    draft: psycopg.Connection[Any], received: list[Request], change: Change, finding: str
) -> None:
    change(received)
    with pytest.raises(InvariantBroken, match=finding):
        check_callbacks(draft, received=received)


def test_what_is_excluded_must_not_come(
    draft: psycopg.Connection[Any], received: list[Request]
) -> None:
    ((event_id, sequence, occurred_at),) = draft.execute(
        "SELECT event_id, sequence, occurred_at FROM callback_deliveries"
        " WHERE state = 'excluded' AND order_id = %s",
        [PAID],
    )
    told = repeat(received, of(received, PAID)[0])
    happened = occurred_at.isoformat().replace("+00:00", "Z")
    changed = {"status": "REFUNDED", "sequence": sequence, "occurred_at": happened}
    rewrite(told, event_id=str(event_id), **changed)
    with pytest.raises(InvariantBroken, match="is excluded, and came 1 times"):
        check_callbacks(draft, received=received)
