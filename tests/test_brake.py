"""The brake on giving back: how many in an hour, counted once for all processes."""

import asyncio
import uuid
from collections.abc import Callable
from typing import Any

import psycopg
import pytest
from click.testing import Result

from payments import brake
from payments.database.connections import Database, DatabaseAddress

pytestmark = pytest.mark.anyio

Connection = psycopg.Connection[Any]


def captured(connection: Connection, count: int, minutes_ago: int = 10) -> None:
    """So many payments in the read model."""
    connection.execute(
        "INSERT INTO payments (id, status, created_at)"
        " SELECT gen_random_uuid(), CASE WHEN n %% 2 = 0 THEN 'SUCCESS' ELSE 'REFUNDED' END,"
        "        now() AT TIME ZONE 'UTC' - make_interval(mins => %s)"
        "   FROM generate_series(1, %s) AS n",
        [minutes_ago, count],
    )


async def begin(database: Database, times: int) -> list[str]:
    """As many payments, one after another."""
    return [await brake.begin(database, uuid.uuid4()) for _ in range(times)]


def hours_pass(connection: Connection) -> None:
    connection.execute("UPDATE giving_back_begun SET begun_at = begun_at - interval '61 min'")


async def test_twenty_in_an_hour_however_few_were_captured(
    database: Database, connection: Connection
) -> None:
    assert await begin(database, 22) == ["begun"] * 20 + ["stops", "stopped"]
    assert await brake.begun(database) == 20
    stop = await brake.stopped(database)
    assert stop is not None
    assert stop.reason.startswith("20 were given back within an hour, in which 0 were captured")
    hours_pass(connection)
    assert await begin(database, 1) == ["stopped"]  # time alone lifts nothing


@pytest.mark.parametrize(("count", "most"), [(419, 20), (420, 21), (500, 25), (519, 25)])
async def test_or_five_per_cent_of_what_was_captured_in_it(
    database: Database, connection: Connection, count: int, most: int
) -> None:
    captured(connection, count)
    captured(connection, 1000, minutes_ago=61)
    connection.execute(
        "INSERT INTO payments (id, status, created_at)"
        " SELECT gen_random_uuid(), 'FAILED', now() AT TIME ZONE 'UTC'"
        "   FROM generate_series(1, 1000)"
    )
    assert await begin(database, most + 1) == ["begun"] * most + ["stops"]


async def test_what_is_an_hour_old_counts_no_more(
    database: Database, connection: Connection
) -> None:
    for _ in range(3):
        assert await begin(database, 20) == ["begun"] * 20
        hours_pass(connection)
    assert await brake.begun(database) == 0


async def test_a_payment_counts_once_within_an_hour(
    database: Database, connection: Connection
) -> None:
    payment_id = uuid.uuid4()
    for _ in range(30):
        assert await brake.begin(database, payment_id) == "begun"
    assert await begin(database, 19) == ["begun"] * 19
    assert await brake.begin(database, payment_id) == "begun"
    # Held back for hours, and then asked about with many others: it is one of them.
    hours_pass(connection)
    assert await begin(database, 20) == ["begun"] * 20
    assert await brake.begin(database, payment_id) == "stops"


async def test_several_processes_at_the_limit(address: DatabaseAddress) -> None:
    """Never one more, and one of them says that it stops."""
    async with Database(address, 4) as a, Database(address, 4) as b, Database(address, 4) as c:
        told = await asyncio.gather(*(begin(each, 4) for each in (a, b, c) for _ in range(4)))
    outcomes = sorted(outcome for each in told for outcome in each)
    assert outcomes == ["begun"] * 20 + ["stopped"] * 27 + ["stops"]


async def test_who_is_at_the_limit_waits_for_whoever_decides(
    database: Database, address: DatabaseAddress
) -> None:
    """What the other one is about to count is counted."""
    await begin(database, 19)
    async with await database.connect("another") as other, other.transaction():
        await other.execute(brake.BEGIN, {"payment_id": uuid.uuid4(), "fewest": 20, "one_in": 20})
        waiting = asyncio.create_task(brake.begin(database, uuid.uuid4()))
        await asyncio.sleep(0.2)
        assert not waiting.done()
    assert await waiting == "stops"


async def test_a_person_lifts_it_and_it_counts_anew(
    database: Database, connection: Connection
) -> None:
    assert await brake.lift(database, "ana", "nothing") is None
    await begin(database, 21)
    stop = await brake.stopped(database)
    assert await brake.lift(database, "ana", "a wrong database") == stop
    assert await brake.stopped(database) is None
    assert await begin(database, 21) == ["begun"] * 20 + ["stops"]
    rows = connection.execute(
        "SELECT lifted_by, lifted_reason, lifted_at > stopped_at FROM giving_back_stopped"
        " ORDER BY id"
    ).fetchall()
    assert rows == [("ana", "a wrong database", True), (None, None, None)]


async def test_nothing_to_lift_changes_nothing(database: Database) -> None:
    await begin(database, 5)
    assert await brake.lift(database, "ana", "nothing") is None
    assert await brake.begun(database) == 5


WHO = ("--by", "ana", "--reason", "orders were restored")


def test_the_command_lifts_it_and_says_why_it_had_stopped(
    operator: Callable[..., Result], connection: Connection
) -> None:
    done = operator("giving-back", "resume", *WHO)
    assert (done.exit_code, done.stdout) == (1, "")
    assert "automatic refunds have not stopped" in done.stderr
    connection.execute("INSERT INTO giving_back_stopped (reason) VALUES ('20 were given back')")
    done = operator("giving-back", "resume", *WHO)
    assert done.exit_code == 0
    assert "why: 20 were given back" in done.stdout
    assert connection.execute("SELECT lifted_by FROM giving_back_stopped").fetchall() == [("ana",)]
    assert operator("giving-back", "resume", *WHO).exit_code == 1


@pytest.mark.parametrize(
    "arguments", [(), ("--by", "ana"), ("--reason", "x"), ("--by", " ", "--reason", "x")]
)
def test_who_lifts_it_says_who_and_why(
    operator: Callable[..., Result], connection: Connection, arguments: tuple[str, ...]
) -> None:
    connection.execute("INSERT INTO giving_back_stopped (reason) VALUES ('20 were given back')")
    assert operator("giving-back", "resume", *arguments).exit_code == 2
    assert connection.execute("SELECT lifted_at FROM giving_back_stopped").fetchall() == [(None,)]


def test_doctor_says_how_the_brake_is(
    operator: Callable[..., Result], connection: Connection, monkeypatch: pytest.MonkeyPatch
) -> None:
    def line() -> str:
        return next(line for line in operator("doctor").stdout.splitlines() if " brake " in line)

    assert line().startswith("off ")
    monkeypatch.setenv("ORDER_STATUS_URL", "http://127.0.0.1:1/{order_id}")
    monkeypatch.setenv("UNFULFILLED", "refund")
    assert line().startswith("ok ")
    connection.execute("INSERT INTO giving_back_stopped (reason) VALUES ('20 were given back')")
    assert "20 were given back: `payments giving-back resume`" in line()
    assert line().startswith("FAIL ")
