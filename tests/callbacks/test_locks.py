"""Several who change the same orders at once: nobody waits in a circle, and nothing is lost."""

import asyncio
import random
import uuid
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager, suppress
from typing import Any

import psycopg
import pytest

from payments.callbacks.outbox import claim, prune, record, redrive
from payments.projections.callbacks import CallbacksProjection, backfill
from tests.callbacks.outbox import SENT, Outbox, charges, claim_some, of, result_of
from tests.support import PATIENCE_S, append, until

pytestmark = pytest.mark.anyio

Connection = psycopg.AsyncConnection[Any]

HOLD = """
INSERT INTO callback_lanes (order_id) VALUES (%s)
    ON CONFLICT (order_id) DO UPDATE SET order_id = excluded.order_id
"""

# So that a statement without an order of its own finds the lanes in the wrong one.
TURN_AROUND = """
CREATE TEMP TABLE lanes AS SELECT * FROM callback_lanes;
DELETE FROM callback_lanes;
INSERT INTO callback_lanes SELECT * FROM lanes ORDER BY order_id DESC
"""

WAITING = """
SELECT count(*) FROM pg_stat_activity
 WHERE datname = current_database() AND wait_event_type = 'Lock'
"""


@asynccontextmanager
async def connections(outbox: Outbox) -> AsyncIterator[tuple[Connection, Connection]]:
    async with await outbox.database.connect("a") as one, await outbox.database.connect("b") as two:
        for each in (one, two):
            # A deadlock is known as such; on a busy machine any other lock only takes longer.
            await each.execute("SET lock_timeout = 0")
        yield one, two


def free_lanes(connection: psycopg.Connection[Any], orders: list[uuid.UUID]) -> list[uuid.UUID]:
    """Those that nobody holds, be it that they are there or that they could be made."""
    free: list[uuid.UUID] = []
    connection.execute("SET lock_timeout = '100ms'")
    for order_id in orders:
        with suppress(psycopg.errors.LockNotAvailable), connection.transaction(force_rollback=True):
            connection.execute(HOLD, [order_id])
            free.append(order_id)
    return free


@pytest.mark.parametrize(
    ("writer", "lanes"),
    [
        *((writer, "there") for writer in ("follower", "backfill", "redrive", "record")),
        *((writer, "missing") for writer in ("follower", "backfill", "redrive")),
    ],
)
async def test_lanes_are_locked_in_the_order_of_their_ids(
    outbox: Outbox, writer: str, lanes: str
) -> None:
    """Whatever order they are named in: two who take the same ones in opposite orders would wait
    for each other. While the first one is held by somebody else, none behind it is taken."""
    first, *others = orders = sorted(uuid.uuid4() for _ in range(10))
    await outbox.log(*charges(reversed(orders)))
    connection = outbox.connection
    async with connections(outbox) as (one, two):
        claims = await claim_some(one, lease_s=10) if writer == "record" else []
        claims.sort(key=lambda claimed: claimed.order_id, reverse=True)
        write: dict[str, Callable[[], Awaitable[Any]]] = {
            "follower": outbox.follow,
            "backfill": lambda: backfill(one, CallbacksProjection(SENT), 1),
            "redrive": lambda: redrive(one, outbox.events()),
            "record": lambda: record(one, [result_of(each, "due") for each in claims]),
        }
        if writer == "follower":
            new = (of(order_id, f"{order_id} again").declined() for order_id in reversed(orders))
            append(connection, [fact for history in new for fact in history.facts])
        connection.execute(TURN_AROUND)
        if lanes == "missing":
            connection.execute("DELETE FROM callback_lanes")
        async with two.transaction():
            await two.execute(HOLD.encode(), [first])
            writing = asyncio.ensure_future(write[writer]())
            await until(lambda: writing.done() or connection.execute(WAITING).fetchone() == (1,))
            assert not writing.done()
            assert free_lanes(connection, others) == others
        await writing


async def test_all_who_change_the_same_orders_at_once_get_through(outbox: Outbox) -> None:
    """The follower, redriving, sending and pruning; then each order that is owed has a lane."""
    dice = random.Random(5)
    orders = [uuid.uuid4() for _ in range(100)]
    await outbox.log(*charges(orders))

    async def log() -> None:
        for number in range(8):
            new = [of(each, f"{each} {number}") for each in dice.sample(orders, len(orders))]
            told = [each.charged() if dice.random() < 0.7 else each.declined() for each in new]
            await outbox.log(*(fact for history in told for fact in history.facts))

    async def redrive_all(own: Connection) -> None:
        for _ in range(8):
            events = outbox.events()
            await redrive(own, dice.sample(events, len(events)))

    async def send(own: Connection) -> None:
        for _ in range(20):
            claims = await claim(own, most=32, failing_max=16, lease_s=10)
            states = dice.choices(("delivered", "due", "dead"), k=len(claims))
            await record(own, [result_of(*each) for each in zip(claims, states, strict=True)])

    async def prune_all(own: Connection) -> None:
        for _ in range(20):
            await prune(own, 0, 20)

    async with connections(outbox) as (one, two), connections(outbox) as (three, four):
        await asyncio.gather(
            log(), redrive_all(one), redrive_all(two), send(three), prune_all(four)
        )
    owed = "SELECT DISTINCT order_id FROM callback_deliveries WHERE state = 'due' ORDER BY 1"
    found = outbox.connection.execute(owed).fetchall()
    assert found == [(order_id,) for order_id, *_ in outbox.lanes()]


async def test_pruning_does_not_wait_for_what_is_redriven(outbox: Outbox) -> None:
    await outbox.log(*charges(uuid.uuid4() for _ in range(3)))
    outbox.finish("delivered", days_ago=99)
    redriven, *others = outbox.events()
    async with connections(outbox) as (one, two):
        async with two.transaction():
            await redrive(two, [redriven])
            async with asyncio.timeout(PATIENCE_S):
                assert await prune(one, 90, 10) == len(others)
        assert await prune(one, 90, 10) == 0
    assert outbox.rows("event_id", "state") == [(redriven, "due")]
