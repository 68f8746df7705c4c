"""Paid, and the order failed: with UNFULFILLED=refund each such payment goes back exactly once,
whoever dies, and no other one does."""

import uuid
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import psycopg
import pytest

from payments.database.connections import DatabaseAddress
from payments.fulfilment import table
from payments.payment.identity import payment_id_for, unfulfilled_refund_id
from tests.callbacks.sales import PAID, Sale
from tests.crash.money import nothing_open, records, settings, settled
from tests.doubles.order_seats import Seating
from tests.doubles.order_service import Options, OrderServiceProcess
from tests.doubles.provider import ProviderProcess
from tests.doubles.stand_in import Fault
from tests.invariants.checker import check
from tests.invariants.orders import broken_orders
from tests.process import ServiceProcess
from tests.support import eventually

Connection = psycopg.Connection[Any]

ALL = "SUCCESS,FAILED,REFUNDED"
# As if the time between the readings had passed.
LATER = """
UPDATE fulfilments SET next_at = now(), failed_since = failed_since - make_interval(secs => %s)
 WHERE state <> 'given_back' AND claim IS NULL
"""


@pytest.fixture
def orders() -> Iterator[OrderServiceProcess]:
    """A client that marks an order as failed whose charge got no response, and never asks again."""
    with OrderServiceProcess(Options(seating=Seating(unanswered="FAILED"))) as running:
        yield running


@pytest.fixture
def given(
    address: DatabaseAddress, provider: ProviderProcess, orders: OrderServiceProcess
) -> dict[str, Any]:
    return settings(
        address,
        provider,
        ORDER_CALLBACK_URL=orders.url,
        ORDER_STATUS_URL=orders.orders_url,
        ORDER_CALLBACK_STATUSES=ALL,
        UNFULFILLED="refund",
    )


def later(connection: Connection) -> None:
    connection.execute(LATER, [table.CONFIRMED_AFTER_S])


def states(connection: Connection) -> Counter[str]:
    return Counter(state for (state,) in connection.execute("SELECT state FROM fulfilments"))


def read_twice(connection: Connection, expected: int) -> None:
    """Each suspect is read as failed, and again after the time that must pass."""
    eventually(lambda: states(connection) == {"unfulfilled": expected})
    later(connection)
    eventually(lambda: states(connection) == {"given_back": expected})


def sold_and_lost(
    sale: Sale, service: ServiceProcess, provider: ProviderProcess, order_id: str, key: str
) -> None:
    """The service dies when the provider has captured, before it answers."""
    provider.script(Fault("slow", operation="charge", seconds=2))
    sale.charge(order_id, key, PAID)
    eventually(lambda: provider.captures(payment_id_for(f"{order_id}-{key}")))
    service.kill()


def paid_and_failed(connection: Connection, orders: OrderServiceProcess) -> list[str]:
    return broken_orders(connection, orders.book).get("paid_and_failed", [])


def told(connection: Connection, status: str) -> set[str]:
    query = "SELECT DISTINCT state FROM callback_deliveries WHERE status = %s"
    return {state for (state,) in connection.execute(query, [status])}


@pytest.mark.timeout(300)
def test_the_paid_and_failed_orders_of_a_kill_loop(
    connection: Connection,
    provider: ProviderProcess,
    orders: OrderServiceProcess,
    given: dict[str, Any],
    tmp_path: Path,
    request: pytest.FixtureRequest,
) -> None:
    """And nobody else's: every second order is left alone, and has its ticket."""
    if not request.config.getoption("--long"):
        pytest.skip("it takes a minute: --long")
    kills: int = request.config.getoption("--kills")
    service = ServiceProcess(tmp_path, **given)
    sold = [str(uuid.uuid4()) for _ in range(2 * kills)]
    for good, lost in zip(sold[::2], sold[1::2], strict=True):
        with service:
            sale = Sale(service.url, orders, connection)
            sale.charge(good, "pay", PAID)
            eventually(lambda: orders.selling == 0)
            sold_and_lost(sale, service, provider, lost, "pay")
    provider.script()
    with service, ServiceProcess(tmp_path, **given) as another:
        Sale(service.url, orders, connection).settle(sold, 30)
        settled(connection)
        lost_ones = paid_and_failed(connection, orders)
        assert lost_ones
        assert set(lost_ones) <= set(sold[1::2])
        read_twice(connection, len(lost_ones))
        later(connection)
        settled(connection)
        assert (service.terminate(), another.terminate()) == (0, 0)
    expected = {payment_id_for(f"{order_id}-pay") for order_id in lost_ones}
    assert {uuid.UUID(line.id) for line in provider.refunds()} == {
        unfulfilled_refund_id(payment_id) for payment_id in expected
    }
    assert len(provider.refunds()) == len(expected)
    assert told(connection, "REFUNDED") == {"excluded"}
    assert "REFUNDED" not in [each.outcome for each in orders.requests]
    assert broken_orders(connection, orders.book) == {}
    check(connection, records(provider), settled=True)


@pytest.mark.timeout(120)
@pytest.mark.parametrize("kind", ["timeout", "answer_lost"])
def test_kill_9_between_the_event_and_the_providers_answer(
    connection: Connection,
    provider: ProviderProcess,
    orders: OrderServiceProcess,
    given: dict[str, Any],
    tmp_path: Path,
    kind: Any,
    long_run: bool,
) -> None:
    """The provider has not made the refund then, or (`--long`) has."""
    if kind == "answer_lost" and not long_run:
        pytest.skip("the other one is enough for every day: --long")
    given |= {"CHARGE_DEADLINE_S": 3, "GATEWAY_TIMEOUT_S": 2.5}
    order_id = str(uuid.uuid4())
    service = ServiceProcess(tmp_path, **given)
    with service:
        sale = Sale(service.url, orders, connection)
        sold_and_lost(sale, service, provider, order_id, "pay")
    provider.script(Fault(kind, operation="refund"))
    with service:
        eventually(lambda: states(connection) == {"unfulfilled": 1})
        later(connection)
        eventually(lambda: begun(connection) == 1)
        eventually(lambda: provider.counts()["refund"] == 1)
        service.kill()
    assert paid_and_failed(connection, orders) == [order_id]
    with service:
        eventually(lambda: begun(connection) == 1 and nothing_open(connection))
        assert service.terminate() == 0
    payment_id = payment_id_for(f"{order_id}-pay")
    assert [line.id for line in provider.refunds()] == [str(unfulfilled_refund_id(payment_id))]
    assert paid_and_failed(connection, orders) == []
    assert told(connection, "REFUNDED") == {"excluded"}
    check(connection, records(provider), settled=True)


def asked(connection: Connection) -> int:
    """How often ORDER_STATUS_URL was, about all that is watched."""
    row = connection.execute("SELECT sum(attempts) FROM fulfilments").fetchone()
    assert row is not None
    return int(row[0])


def begun(connection: Connection) -> int:
    """How many refunds were."""
    query = "SELECT count(*) FROM payment_events WHERE topic = 'RefundInitiated'"
    row = connection.execute(query).fetchone()
    assert row is not None
    return int(row[0])


@pytest.mark.timeout(120)
def test_an_order_that_is_paid_twice_is_left_to_a_person(
    connection: Connection,
    provider: ProviderProcess,
    orders: OrderServiceProcess,
    given: dict[str, Any],
    tmp_path: Path,
) -> None:
    order_id = str(uuid.uuid4())
    with ServiceProcess(tmp_path, **given) as service:
        sale = Sale(service.url, orders, connection)
        sale.charge(order_id, "pay", PAID)
        sale.settle([order_id], 30)
        with httpx.Client(timeout=10) as client:
            service.charge(client, f"{order_id}-again", merchant_order_id=order_id)
        eventually(lambda: states(connection) == {"paid_twice": 1})
        for _ in range(3):
            before = asked(connection)
            later(connection)
            eventually(lambda: asked(connection) > before)  # noqa: B023
        assert service.terminate() == 0
    assert states(connection) == {"paid_twice": 1}
    assert provider.refunds() == []
    assert begun(connection) == 0
