"""Orders that were paid, and failed since the service was killed while they were charged.

It takes minutes: `--long`. The figures are printed.
"""

import random
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import psycopg
import pytest

from payments.database.connections import DatabaseAddress
from tests.callbacks.sales import PAID, Sale, new_orders
from tests.doubles.order_seats import Seating
from tests.doubles.order_service import Options, OrderServiceProcess
from tests.doubles.provider import ProviderProcess
from tests.doubles.stand_in import Fault
from tests.machine import Machine, bound
from tests.process import ServiceProcess, at
from tests.support import eventually

pytestmark = pytest.mark.timeout(500)

FOUND_WITHIN_S = 60.0
BUSY_S = 60.0
PER_S = 8.0
KILLS = 7

# Of the payments whose money stands: their orders, and how long after their callback was delivered
# the order was first read as failed.
FOUND = """
SELECT p.merchant_order_id::text, f.state, f.said,
       extract(epoch FROM f.failed_since - d.finished_at)::float8
  FROM payments p
  JOIN callback_deliveries d ON d.payment_id = p.id AND d.status = 'SUCCESS'
  LEFT JOIN fulfilments f ON f.payment_id = p.id
 WHERE p.status = 'SUCCESS'
"""


@pytest.fixture
def orders() -> Iterator[OrderServiceProcess]:
    with OrderServiceProcess(Options(seating=Seating(unanswered="FAILED"))) as running:
        yield running


@pytest.fixture
def provider(tmp_path: Path) -> Iterator[ProviderProcess]:
    with ProviderProcess(tmp_path / "provider.jsonl") as running:
        running.script(Fault("slow", operation="charge", count=None, seconds=0.4))
        yield running


def test_each_order_that_was_paid_and_failed_is_found(
    orders: OrderServiceProcess,
    provider: ProviderProcess,
    address: DatabaseAddress,
    connection: psycopg.Connection[Any],
    tmp_path: Path,
    long_run: bool,
    pytestconfig: pytest.Config,
    machine: Machine,
) -> None:
    """The provider answers 0.4 s after it captured; `--sold N` for more or fewer than 200."""
    if not long_run:
        pytest.skip("it takes minutes: --long")
    count = pytestconfig.getoption("--sold")
    service = ServiceProcess(
        tmp_path,
        ORDER_CALLBACK_URL=orders.url,
        ORDER_STATUS_URL=orders.orders_url,
        GATEWAY="tests.doubles.http_gateway:build",
        TEST_PROVIDER_URL=provider.url,
        **at(address),
    )
    sold, dice = new_orders(count), random.Random(7)
    with service:
        sale = Sale(service.url, orders, connection)
        for start in range(0, count, -(-count // KILLS)):
            for order_id in sold[start : start + -(-count // KILLS)]:
                sale.charge(order_id, "first", PAID)
                time.sleep(1 / PER_S)
            time.sleep(dice.uniform(0, 0.2))
            service.kill()
            service.start()
        captured = "SELECT count(*) FROM payments WHERE status IN ('SUCCESS', 'REFUNDED')"
        eventually(
            lambda: connection.execute(captured).fetchone() == (len(provider.captures()),), 90
        )
        sale.settle([*_paid(connection)], 90)
        failed = {id for id in _paid(connection) if orders.orders[id] == "FAILED"}
        eventually(lambda: _unfulfilled(connection) >= failed, FOUND_WITHIN_S + BUSY_S)
        eventually(lambda: _suspects(connection) == 0, BUSY_S)
    rows = connection.execute(FOUND).fetchall()
    delays = sorted(seconds for _, state, _, seconds in rows if state == "unfulfilled")
    said = [said for _, state, said, _ in rows if state == "unfulfilled"]
    sys.stdout.write(
        f"{len(rows)} of {count} captured, {len(failed)} of them failed: {len(delays)} unfulfilled,"
        f" {said.count('already_processed')} already_processed, {said.count('repeated')} repeated;"
        f" found after p50 {delays[len(delays) // 2]:.2f} s, max {delays[-1]:.2f} s\n"
    )
    assert failed
    assert _unfulfilled(connection) == failed
    bound(delays[-1], FOUND_WITHIN_S, machine)
    assert {state for _, state, _, _ in rows} <= {"unfulfilled", None}


def _paid(connection: psycopg.Connection[Any]) -> set[str]:
    return {order_id for order_id, *_ in connection.execute(FOUND)}


def _unfulfilled(connection: psycopg.Connection[Any]) -> set[str]:
    return {order_id for order_id, state, *_ in connection.execute(FOUND) if state == "unfulfilled"}


def _suspects(connection: psycopg.Connection[Any]) -> int:
    query = "SELECT count(*) FROM fulfilments WHERE state = 'suspect'"
    row = connection.execute(query).fetchone()
    assert row is not None
    return int(row[0])
