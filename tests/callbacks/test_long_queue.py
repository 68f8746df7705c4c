"""After a long outage the queue is long: what is claimed and recorded must not depend on that.

The best of a few runs is compared with a bound that reading the queue once per row is far beyond.
"""

import asyncio
import time
from typing import Any, Literal

import psycopg
import pytest

from payments.callbacks.outbox import ClaimedDelivery, Result, claim, make_due, record
from payments.database.connections import Database
from tests.callbacks.long_queue import ORDERS, fill
from tests.machine import Machine, bound

pytestmark = pytest.mark.anyio

BEST_S = 0.05


@pytest.fixture
def queue(connection: psycopg.Connection[Any]) -> psycopg.Connection[Any]:
    fill(connection, 1, ORDERS)
    return connection


@pytest.mark.usefixtures("queue")
async def test_claiming_recording_and_ending_pauses_read_only_what_they_need(
    database: Database,
    machine: Machine,
) -> None:
    took: dict[str, list[float]] = {"claim": [], "record": [], "make_due": []}
    async with await database.connect("queue") as own:
        for number in range(5):
            began = time.perf_counter()
            claims = await claim(own, most=64, failing_max=32, lease_s=10)
            took["claim"].append(time.perf_counter() - began)
            assert len(claims) == 64
            results = [_result(claimed, sent=number % 2 == 0) for claimed in claims]
            began = time.perf_counter()
            assert len(await record(own, results)) == 64
            took["record"].append(time.perf_counter() - began)
            began = time.perf_counter()
            assert await make_due(own, 60, 100) == 100
            took["make_due"].append(time.perf_counter() - began)
    best = {step: min(times) for step, times in took.items()}
    bound(max(best.values()), BEST_S, machine)


# Entries of the queue's indexes that were read.
READ = """
SELECT sum(idx_tup_read)::bigint FROM pg_stat_user_indexes
 WHERE relname IN ('callback_deliveries', 'callback_lanes')
"""


async def test_plans_that_were_made_while_the_queue_was_empty_stay_right(
    database: Database, connection: psycopg.Connection[Any]
) -> None:
    """They are kept until the tables' statistics are new: in a minute, or when vacuum comes by."""
    for table in ("callback_deliveries", "callback_lanes"):
        connection.execute(f"ALTER TABLE {table} SET (autovacuum_enabled = off)".encode())
    async with await database.connect("queue") as own:

        async def take(most: int) -> None:
            claims = await claim(own, most=most, failing_max=most // 2, lease_s=10)
            assert len(claims) == most
            await record(own, [_result(claimed, sent=True) for claimed in claims])
            await own.execute("SELECT pg_stat_force_next_flush()")

        def read() -> int:
            ((entries,),) = connection.execute(READ).fetchall()
            return int(entries)

        fill(connection, 1, 2)
        await take(2)
        await asyncio.to_thread(fill, connection, 3, 20_000)
        before = read()
        await take(64)
        assert read() - before < 64 * 30


def _result(claimed: ClaimedDelivery, *, sent: bool) -> Result:
    state: Literal["due", "delivered"] = "delivered" if sent else "due"
    return Result(
        claimed=claimed,
        state=state,
        delay_s=60.0,
        counts=True,
        seconds=0.01,
        outcome="delivered",
        status=200,
        reason="",
        answer=b"ok",
        away=not sent,
    )
