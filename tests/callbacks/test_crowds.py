"""Much at once: outcomes of one order, callbacks to send, and callbacks to forget."""

import asyncio
import time
import uuid
from typing import Any

import psycopg
import pytest

from payments.callbacks import dispatcher as dispatching
from payments.callbacks import outbox as statements
from payments.callbacks.outbox import record
from payments.database.connections import Database
from tests.callbacks.conftest import PlayedEndpoint, dispatching_to
from tests.callbacks.long_queue import DELIVERIES
from tests.callbacks.outbox import Outbox, charges, claim_some, result_of
from tests.machine import Machine, bound
from tests.support import until

pytestmark = pytest.mark.anyio

ORDER = uuid.uuid4()
OTHERS, CARDS = 20_000, 3_000
MOST_S = 0.25  # looking at all of an order's outcomes for each of them takes seconds

DECLINED_CARDS = """
INSERT INTO callback_deliveries (event_id, position, order_id, payment_id, sequence, status,
                                 amount_cents, currency, occurred_at, state)
SELECT md5('f' || n)::uuid, 1000000 + n, %(order)s, md5('x' || n)::uuid, 2, 'FAILED', 1500, 'INR',
       now(), 'due'
  FROM generate_series(1, %(cards)s) n
"""

# Each was captured, and went back.
REFUNDED_CARDS = """
INSERT INTO callback_deliveries (event_id, position, order_id, payment_id, sequence, status,
                                 amount_cents, currency, occurred_at, state, finished_at)
SELECT md5(status || n)::uuid, 1000000 + 2 * n + place, %(order)s, md5('r' || n)::uuid, 2, status,
       1500, 'INR', now(), 'excluded', now()
  FROM generate_series(1, %(cards)s) n,
       (VALUES (0, 'SUCCESS'), (1, 'REFUNDED')) AS outcome (place, status)
"""

PAYMENTS = """
INSERT INTO payments (id, merchant_order_id, status)
SELECT md5('p' || n)::uuid, md5('o' || n)::uuid, 'SUCCESS' FROM generate_series(1, %(others)s) n
 UNION ALL
SELECT md5('x' || n)::uuid, %(order)s, 'FAILED' FROM generate_series(1, %(cards)s) n
"""


@pytest.mark.parametrize("paid", [False, True])
async def test_an_order_with_thousands_of_declined_cards_holds_nobody_up(
    database: Database, connection: psycopg.Connection[Any], paid: bool, machine: Machine
) -> None:
    """All that is claimed and recorded together with it would wait."""
    connection.execute("SET statement_timeout = 0")
    connection.execute(DELIVERIES.encode(), {"first": 1, "last": OTHERS})
    connection.execute("UPDATE callback_deliveries SET state = 'delivered', finished_at = now()")
    for fill in (DECLINED_CARDS, PAYMENTS):
        connection.execute(fill.encode(), {"order": ORDER, "cards": CARDS, "others": OTHERS})
    connection.execute("INSERT INTO callback_lanes (order_id) VALUES (%s)", [ORDER])
    connection.execute("ANALYZE callback_deliveries, callback_lanes, payments")
    async with await database.connect("a") as own:
        began = time.perf_counter()
        (claimed,) = await claim_some(own, lease_s=10)
        claimed_s = time.perf_counter() - began
        if paid:
            connection.execute(
                "UPDATE payments SET status = 'SUCCESS' WHERE id = md5('x' || %s)::uuid", [CARDS]
            )
        began = time.perf_counter()
        assert await record(own, [result_of(claimed, "delivered")]) == {claimed.claim}
        recorded_s = time.perf_counter() - began
    due = connection.execute("SELECT count(*) FROM callback_deliveries WHERE state = 'due'")
    assert due.fetchone() == (0 if paid else CARDS - 1,)
    bound(max(claimed_s, recorded_s), MOST_S, machine)


READ = """
SELECT sum(seq_tup_read)::bigint, sum(idx_tup_fetch)::bigint FROM pg_stat_xact_user_tables
 WHERE relname IN ('callback_deliveries', 'payments')
"""


@pytest.mark.parametrize("stands", [False, True])
async def test_an_order_that_was_paid_and_refunded_thousands_of_times_is_judged_at_once(
    database: Database, connection: psycopg.Connection[Any], stands: bool, machine: Machine
) -> None:
    """Its payments are read once, and nobody else's."""
    connection.execute("SET statement_timeout = 0")
    connection.execute(DELIVERIES.encode(), {"first": 1, "last": OTHERS})
    connection.execute(REFUNDED_CARDS.encode(), {"order": ORDER, "cards": CARDS})
    connection.execute(
        "INSERT INTO payments (id, merchant_order_id, status)"
        " SELECT payment_id, order_id, status FROM callback_deliveries WHERE status <> 'REFUNDED'"
    )
    connection.execute("ANALYZE callback_deliveries, payments")
    if stands:
        connection.execute(
            "DELETE FROM callback_deliveries WHERE event_id = md5('REFUNDED' || %s)::uuid", [CARDS]
        )
    async with await database.connect("a") as own, own.transaction():
        began = time.perf_counter()
        cursor = await own.execute("SELECT paid_orders(%s)", [[ORDER]])
        took_s = time.perf_counter() - began
        assert await cursor.fetchone() == ([ORDER] if stands else [],)
        cursor = await own.execute(READ)
        ((scanned, fetched),) = await cursor.fetchall()
    bound(took_s, MOST_S, machine)
    assert scanned == 0
    assert fetched <= 3 * CARDS + 100


async def test_as_many_as_may_be_are_claimed_in_parts_without_a_wait_and_never_more(
    outbox: Outbox, endpoint: PlayedEndpoint, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Nothing is answered yet that would wake the dispatcher."""
    monkeypatch.setattr(dispatching, "POLL_S", 60.0)
    real = statements.claim
    asked: list[int] = []

    async def noted(connection: Any, *, most: int, **options: Any) -> Any:
        asked.append(most)
        return await real(connection, most=most, **options)

    monkeypatch.setattr(statements, "claim", noted)
    endpoint.held = asyncio.Event()
    await outbox.log(*charges(uuid.uuid4() for _ in range(100)))
    async with dispatching_to(endpoint, outbox) as dispatcher:
        await until(lambda: len(endpoint.under_way) == dispatching.CONCURRENCY_MAX)
        for _ in range(5):
            dispatcher.wake()
            await asyncio.sleep(0.02)
        assert len(endpoint.under_way) == dispatching.CONCURRENCY_MAX
        endpoint.held.set()
        await until(lambda: set(outbox.states()) == {"delivered"})
    assert max(asked) == dispatching.CLAIM_MAX < dispatching.CONCURRENCY_MAX


@pytest.mark.usefixtures("looks_often")
async def test_it_prunes_on_while_there_is_more(
    outbox: Outbox, endpoint: PlayedEndpoint, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The pause that follows is far longer than this test."""
    await outbox.log(*charges(uuid.uuid4() for _ in range(9)))
    outbox.finish("delivered", days_ago=2)
    monkeypatch.setattr(dispatching, "PRUNE_ROWS", 2)
    monkeypatch.setattr(dispatching, "PRUNE_EVERY_S", 0.0)
    async with dispatching_to(endpoint, outbox, retention_days=1):
        monkeypatch.setattr(dispatching, "PRUNE_EVERY_S", 60.0)
        await until(lambda: outbox.states() == [])
