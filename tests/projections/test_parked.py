"""What is parked without a reason, and what is parked for one."""

import uuid
from typing import Any

import psycopg
import pytest

from payments.database.connections import Database, DatabaseAddress
from payments.observability.metrics import Telemetry
from payments.projections.callbacks import CallbacksProjection, begin_at_the_end
from payments.projections.follower import Follower
from payments.projections.parked import needlessly_parked
from payments.projections.payments import PaymentsProjection
from payments.snapshot import Reader
from tests.support import History, append, append_stored, follow, stored_event

pytestmark = pytest.mark.anyio

Connection = psycopg.Connection[Any]
RETRY = "`payments parked retry {}`"


def found(address: DatabaseAddress) -> list[str]:
    with Reader(address, "tests") as reader:
        return [str(each) for each in needlessly_parked(reader)]


def park(connection: Connection, follower: str, payment_id: uuid.UUID, position: int) -> None:
    query = "INSERT INTO parked_streams VALUES (%s, %s, %s, 'because')"
    connection.execute(query, [follower, payment_id, position])


@pytest.fixture
async def callbacks(database: Database) -> Follower:
    await begin_at_the_end(database)
    return Follower(database.connect, CallbacksProjection(["SUCCESS"]), Telemetry())


async def test_a_payment_that_can_be_read_is_named_with_each_follower_that_leaves_it_out(
    address: DatabaseAddress, connection: Connection, database: Database, callbacks: Follower
) -> None:
    one, other = sorted((History("k"), History("l").charged()), key=lambda each: each.id)
    append(connection, [*one.facts, *other.facts])
    await follow(database)
    await callbacks.run_once()
    await callbacks.close()
    park(connection, "payments", other.id, 1)
    park(connection, "payments", one.id, 1)
    park(connection, "callbacks", one.id, 1)
    assert found(address) == [
        f"payment {payment_id}: parked by {follower} although its events can be read: "
        + RETRY.format(payment_id)
        for follower, payment_id in (
            ("callbacks", one.id),
            ("payments", one.id),
            ("payments", other.id),
        )
    ]


@pytest.mark.parametrize("topic", ["PaymentCharged", "SomethingNewer"])
async def test_what_cannot_be_read_is_rightly_parked(
    address: DatabaseAddress,
    connection: Connection,
    database: Database,
    callbacks: Follower,
    topic: str,
) -> None:
    """By both, and with sound events before and behind the one that cannot be read."""
    history = History("k").charged().refunded()
    append(connection, history.facts[:3])
    append_stored(connection, [stored_event(history.id, 4, b"{", topic)])
    append_stored(connection, [stored_event(history.id, 5, b"{}", "PaymentRefunded")])
    await follow(database)
    await callbacks.run_once()
    await callbacks.close()
    parked = connection.execute("SELECT follower FROM parked_streams ORDER BY 1").fetchall()
    assert parked == [("callbacks",), ("payments",)]
    assert found(address) == []


async def test_a_follower_that_is_behind_has_parked_for_what_it_has_seen(
    address: DatabaseAddress, connection: Connection, database: Database
) -> None:
    """An event behind its position is no reason, nor does one take the reason away."""
    damaged, sound = History("k"), History("l")
    append(connection, [*damaged.facts, *sound.facts])
    append_stored(connection, [stored_event(damaged.id, 2, b"{", "PaymentCharged")])
    await follow(database)
    append_stored(connection, [stored_event(sound.id, 2, b"{", "PaymentCharged")])
    append(connection, History("later").facts)
    assert found(address) == []
    park(connection, "payments", sound.id, 2)
    (line,) = found(address)
    assert line.startswith(f"payment {sound.id}: parked by payments although")


async def test_a_payment_that_the_log_does_not_know_may_not_be_parked_ahead(
    address: DatabaseAddress, connection: Connection, database: Database
) -> None:
    """Its id follows from its key: it would be missing from the tables once it is there."""
    history = History("k")
    park(connection, "payments", history.id, 1)
    (line,) = found(address)
    retry = RETRY.format(history.id)
    assert line == f"payment {history.id}: parked by payments although it has no events: {retry}"
    follower = Follower(database.connect, PaymentsProjection(7), Telemetry())
    assert await follower.retry_parked() == []
    await follower.close()
    assert found(address) == []


async def test_nothing_is_parked_by_the_seals(
    address: DatabaseAddress, connection: Connection
) -> None:
    append_stored(connection, [bad := stored_event(None, 1, b"{")])
    assert isinstance(bad.originator_id, uuid.UUID)
    park(connection, "seals", bad.originator_id, 1)
    assert found(address) == [
        f"payment {bad.originator_id}: parked by seals although this read model parks nothing"
    ]
