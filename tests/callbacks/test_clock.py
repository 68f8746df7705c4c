"""The database's clock was wrong for a while: nothing waits for a time that was stored then."""

import asyncio
import uuid
from typing import Any

import psycopg
import pytest

from payments.callbacks import dispatcher as dispatching
from payments.callbacks import lease_s
from payments.callbacks.outbox import claim, make_due, prune
from payments.callbacks.retry import WAIT_MAX_S
from payments.database.connections import Database
from payments.order_service import TIMEOUT_S
from payments.order_service.endpoint import Exchange
from payments.queries.callbacks import backlog, oldest_age_s
from tests.callbacks.conftest import PlayedEndpoint, answered, dispatching_to, failed, opened
from tests.callbacks.long_queue import ORDERS, fill
from tests.callbacks.outbox import Outbox, charges, claim_some, of
from tests.support import PATIENCE_S, until

pytestmark = [pytest.mark.anyio, pytest.mark.usefixtures("looks_often")]

A, B = uuid.uuid4(), uuid.uuid4()
RIGHT_S = WAIT_MAX_S + lease_s(TIMEOUT_S)  # the latest time that a lane may rightly have
WRONG = ("71 min", "1 day", "900 years")  # after a jump of the clock


def set_ahead(outbox: Outbox, ahead: str, *, failing: bool = False) -> None:
    """As if all lanes had been written while the clock was ahead by so much."""
    outbox.connection.execute(
        "UPDATE callback_lanes SET failing = %s, next_at = now() + %s::interval", [failing, ahead]
    )


def ahead_s(outbox: Outbox) -> list[float]:
    """How far ahead the lanes' times are."""
    query = "SELECT extract(epoch FROM next_at - now())::float8 FROM callback_lanes ORDER BY 1"
    return [seconds for (seconds,) in outbox.connection.execute(query)]


@pytest.mark.parametrize("failing", [False, True])
@pytest.mark.parametrize("ahead", WRONG)
async def test_a_time_that_no_pause_allows_has_come(
    outbox: Outbox, ahead: str, failing: bool
) -> None:
    await outbox.log(*charges([A, B]))
    set_ahead(outbox, ahead, failing=failing)
    async with await outbox.database.connect("a") as own:
        claims = await claim_some(own, lease_s=10)
    assert {each.order_id for each in claims} == {A, B}
    # It is its turn, and no probe before it: else it would wait for that time again.
    assert [(each.failing, each.due_in_s <= 0) for each in claims] == [(failing, True)] * 2
    assert max(ahead_s(outbox)) < 11


@pytest.mark.parametrize("failing", [False, True])
async def test_the_longest_pause_is_kept(outbox: Outbox, failing: bool) -> None:
    await outbox.log(*charges([A]))
    set_ahead(outbox, f"{RIGHT_S} s", failing=failing)
    async with await outbox.database.connect("a") as own:
        assert await claim_some(own) == []
    assert ahead_s(outbox)[0] > WAIT_MAX_S


async def test_a_lease_that_ends_too_late_ends_after_a_lease(outbox: Outbox) -> None:
    """Not at once: its sender may still be at it, and an order is told one thing at a time."""
    await outbox.log(*charges([A]))
    async with await outbox.database.connect("a") as one, await outbox.database.connect("b") as two:
        (frozen,) = await claim_some(one, lease_s=10)
        set_ahead(outbox, "1 day")
        for probing in (False, True):
            assert await claim_some(two, lease_s=0.3, probing=probing) == []
        assert ahead_s(outbox)[0] < 1
        await asyncio.sleep(0.35)
        (again,) = await claim_some(two, lease_s=10)
    assert (again.event_id, again.attempt) == (frozen.event_id, 2)
    assert outbox.attempts() == [("interrupted", None)]


async def test_orders_that_fail_take_no_more_places_than_before(outbox: Outbox) -> None:
    bad, good = ([uuid.uuid4() for _ in range(20)] for _ in range(2))
    await outbox.log(*charges(bad))
    set_ahead(outbox, "1 day", failing=True)
    await outbox.log(*charges(good))
    async with await outbox.database.connect("a") as own:
        for failing_max, most in ((0, 3), (3, 8)):
            claims = await claim(own, most=most, failing_max=failing_max, lease_s=10)
            assert len(claims) == most
            assert sum(each.failing for each in claims) == failing_max


async def test_who_was_due_before_is_before(outbox: Outbox) -> None:
    await outbox.log(*charges([A]))
    set_ahead(outbox, "1 day")
    await outbox.log(*charges([B]))
    async with await outbox.database.connect("a") as own:
        for order_id in (B, A):
            (claimed,) = await claim(own, most=1, failing_max=1, lease_s=10)
            assert claimed.order_id == order_id


async def test_a_lane_that_is_being_changed_is_not_waited_for(outbox: Outbox) -> None:
    await outbox.log(*charges([A, B]))
    set_ahead(outbox, "1 day")
    async with await outbox.database.connect("a") as one, await outbox.database.connect("b") as two:
        async with one.transaction():
            await one.execute("SELECT FROM callback_lanes WHERE order_id = %s FOR UPDATE", [A])
            async with asyncio.timeout(PATIENCE_S):
                assert [each.order_id for each in await claim_some(two)] == [B]
        assert [each.order_id for each in await claim_some(two, lease_s=10)] == [A]


@pytest.mark.parametrize("failing", [False, True])
async def test_after_the_clock_was_set_back_all_is_sent_and_counted(
    outbox: Outbox, endpoint: PlayedEndpoint, failing: bool
) -> None:
    """However many: and what is refused waits for its usual pause."""
    orders = [uuid.uuid4() for _ in range(250)]
    await outbox.log(*charges([*orders, A]))
    set_ahead(outbox, "1 year", failing=failing)
    endpoint.answer = lambda body: answered(400 if body["order_id"] == str(A) else 200)
    async with dispatching_to(endpoint, outbox, rng=lambda: 0.999):
        await until(lambda: outbox.states().count("delivered") == len(orders))
        await until(lambda: len(outbox.attempts()) > len(orders))
        assert len(endpoint.told(A)) == 1
    assert outbox.rows("attempts") == [(1,)] * (len(orders) + 1)
    assert ahead_s(outbox)[0] < 1


async def test_probes_go_round_whatever_the_clock_said_at_the_last_ones(
    outbox: Outbox, endpoint: PlayedEndpoint, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Those that are always in vain must not be the only ones that are tried."""
    monkeypatch.setattr(dispatching, "POLL_S", 0.005)
    orders = [uuid.uuid4() for _ in range(25)]  # 20 are looked at for each probe
    await outbox.log(*charges(orders))
    async with await outbox.database.connect("a") as own:
        assert len(await claim(own, most=25, failing_max=0, lease_s=0)) == 25
    outbox.connection.execute(
        "UPDATE callback_lanes SET claimed_at = now() + interval '1 year', in_flight = NULL"
    )
    probed: set[str] = set()

    def answer(body: dict[str, Any]) -> Exchange:
        probed.add(body["order_id"])
        return answered(200) if len(probed) == len(orders) else failed()

    endpoint.answer = answer
    async with dispatching_to(endpoint, outbox, breaker=opened(0.005), rng=lambda: 0.999):
        await until(lambda: "delivered" in outbox.states())
    assert len(endpoint.bodies) >= len(orders)


async def test_when_the_endpoint_is_back_a_wrong_time_is_due(outbox: Outbox) -> None:
    await outbox.log(*charges([A, B]))
    set_ahead(outbox, "1 year", failing=True)
    outbox.connection.execute(
        "UPDATE callback_deliveries SET due_since = now() + interval '1 year';"
        "UPDATE callback_lanes SET away_at = now()"
    )
    async with await outbox.database.connect("b") as own:
        assert await make_due(own, 60, 10) == 2
    assert max(ahead_s(outbox)) <= 0


async def test_what_was_finished_in_the_future_goes_with_what_is_behind_it(outbox: Outbox) -> None:
    """Its own time would come with the end of the jump, and the 90 days after that."""
    orders = [uuid.uuid4() for _ in range(5)]
    await outbox.log(*charges(orders))
    outbox.finish("delivered")
    finished = (
        "UPDATE callback_deliveries SET finished_at = now() + %s::interval WHERE order_id = %s"
    )
    for order_id, ago in zip(
        orders, ("1 year", "1 year", "-91 days", "1 year", "0 s"), strict=True
    ):
        outbox.connection.execute(finished, [ago, order_id])
    outbox.connection.execute(
        "UPDATE callback_deliveries SET state = 'dead' WHERE order_id = %s", [orders[0]]
    )
    async with await outbox.database.connect("a") as own:
        assert await prune(own, 92, 10) == 0
        assert await prune(own, 90, 10) == 2
        assert await prune(own, 90, 10) == 0
    assert outbox.rows("order_id") == [(orders[0],), (orders[3],), (orders[4],)]


async def test_what_was_finished_this_moment_is_not_in_the_future(outbox: Outbox) -> None:
    """By the time of a transaction that began before; an old one that was sent again."""
    await outbox.log(*charges([A, B]))
    outbox.finish("delivered", days_ago=99)
    async with await outbox.database.connect("a") as own, own.transaction():
        await own.execute("SELECT 1")
        outbox.connection.execute(
            "UPDATE callback_deliveries SET finished_at = clock_timestamp() WHERE order_id = %s",
            [A],
        )
        assert await prune(own, 90, 10) == 1
    assert outbox.rows("order_id") == [(A,)]


async def test_a_clock_that_is_behind_for_a_while_loses_no_record(outbox: Outbox) -> None:
    """All that is finished then seems to have been so in the future."""
    await outbox.log(*charges([A, B]))
    outbox.finish("delivered")
    outbox.connection.execute("UPDATE callback_deliveries SET finished_at = now() + interval '9 d'")
    async with await outbox.database.connect("a") as own:
        assert await prune(own, 1, 10) == 0
    assert len(outbox.rows("finished_at > now() + interval '8 d'")) == 2


async def test_no_age_is_negative(outbox: Outbox) -> None:
    await outbox.log(*charges([A]))
    outbox.connection.execute("UPDATE callback_deliveries SET due_since = now() + interval '1 h'")
    assert (await backlog(outbox.database)).oldest_age_s == 0
    assert await oldest_age_s(outbox.database, 5) == 0
    await outbox.log(*of(B, "b").charged().facts)
    outbox.connection.execute(
        "UPDATE callback_deliveries SET due_since = now() - interval '1 h' WHERE order_id = %s", [B]
    )
    assert 3600 <= (await backlog(outbox.database)).oldest_age_s < 3660
    assert 3600 <= await oldest_age_s(outbox.database, 5) < 3660


READ = """
SELECT relname, seq_tup_read, idx_tup_fetch FROM pg_stat_xact_user_tables
 WHERE relname IN ('callback_lanes', 'callback_deliveries')
"""


@pytest.fixture
def long_queue(connection: psycopg.Connection[Any]) -> psycopg.Connection[Any]:
    """All in it wait for their time."""
    connection.execute("SET statement_timeout = 0")
    fill(connection, 1, ORDERS)
    connection.execute("UPDATE callback_lanes SET next_at = now() + interval '1 h'")
    connection.execute("ANALYZE callback_lanes, callback_deliveries")
    return connection


@pytest.mark.usefixtures("long_queue")
@pytest.mark.parametrize("ahead", [None, "1 day"], ids=["all wait", "all are ahead"])
async def test_claiming_reads_only_what_it_claims(
    database: Database, outbox: Outbox, ahead: str | None
) -> None:
    """Of 60,000 lanes: the index leads to those that are due, and to those too far ahead."""
    if ahead is not None:
        outbox.connection.execute(
            "UPDATE callback_lanes SET next_at = now() + %s::interval", [ahead]
        )
    async with await database.connect("a") as own, own.transaction():
        claims = await claim(own, most=32, failing_max=16, lease_s=10)
        cursor = await own.execute(READ)
        read = {table: (scanned, fetched) for table, scanned, fetched in await cursor.fetchall()}
    assert len(claims) == (0 if ahead is None else 32)
    assert all(scanned == 0 for scanned, _ in read.values()), read
    assert sum(fetched for _, fetched in read.values()) < (10 if ahead is None else 2000), read


async def test_pruning_reads_only_what_it_prunes(
    database: Database, long_queue: psycopg.Connection[Any]
) -> None:
    long_queue.execute(
        "UPDATE callback_deliveries SET state = 'delivered',"
        " finished_at = now() + (position - 30000) * interval '1 min'"
    )
    long_queue.execute("ANALYZE callback_deliveries")
    async with await database.connect("a") as own, own.transaction():
        assert await prune(own, 90, 100) == 0
        cursor = await own.execute(READ)
        read = {table: (scanned, fetched) for table, scanned, fetched in await cursor.fetchall()}
    assert read["callback_deliveries"][0] == 0, read
    assert read["callback_deliveries"][1] < 500, read
