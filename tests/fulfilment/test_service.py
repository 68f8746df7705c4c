"""The whole service at an Order Service that fails orders which are paid for."""

import time
import uuid
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import psycopg
import pytest

from payments.database.connections import DatabaseAddress
from tests.callbacks.sales import PAID, Sale
from tests.doubles.order_seats import Seating
from tests.doubles.order_service import Fault, Options, OrderServiceProcess
from tests.machine import Machine, bound
from tests.process import ServiceProcess, at, invoke, run
from tests.support import eventually

STATES = "SELECT payment_id::text, state, said FROM fulfilments"
TOKEN = "canary-in-the-query"


@pytest.fixture
def orders() -> Iterator[OrderServiceProcess]:
    with OrderServiceProcess(Options(seating=Seating())) as running:
        yield running


def settings_of(orders: OrderServiceProcess, address: DatabaseAddress) -> dict[str, object]:
    urls = {"ORDER_CALLBACK_URL": orders.url, "ORDER_STATUS_URL": orders.orders_url}
    return {**at(address), **urls}


def order_that_failed(orders: OrderServiceProcess) -> str:
    """Its charge's response was lost, and it is FAILED before anything is called back."""
    order_id = str(uuid.uuid4())
    told = {"order_id": order_id, "payment_id": str(uuid.uuid4()), "status": "FAILED"}
    assert httpx.post(orders.url, json=told).status_code == 200
    assert orders.orders[order_id] == "FAILED"
    return order_id


def charge(service: ServiceProcess, order_id: str) -> str:
    with httpx.Client() as client:
        paid = service.charge(client, str(uuid.uuid4()), merchant_order_id=order_id)
    assert paid.status_code == 201
    return str(paid.json()["id"])


def test_a_paid_order_that_failed_is_found_within_seconds(
    orders: OrderServiceProcess,
    address: DatabaseAddress,
    connection: psycopg.Connection[Any],
    tmp_path: Path,
    machine: Machine,
) -> None:
    """And a good one leaves nothing behind."""
    with ServiceProcess(tmp_path, **settings_of(orders, address)) as service:
        order_id = order_that_failed(orders)
        began = time.monotonic()
        payment_id = charge(service, order_id)
        good = str(uuid.uuid4())
        Sale(service.url, orders, connection).charge(good, "good", PAID)
        found = [(payment_id, "unfulfilled", "already_processed")]
        eventually(lambda: connection.execute(STATES).fetchall() == found)
        bound(time.monotonic() - began, 5, machine)
        eventually(lambda: orders.orders.get(good) == "CONFIRMED")
    assert good not in orders.lookups
    assert "an order is paid, but failed" in service.log.read_text()


def test_killed_between_the_response_and_its_record(
    orders: OrderServiceProcess,
    address: DatabaseAddress,
    connection: psycopg.Connection[Any],
    tmp_path: Path,
) -> None:
    """Nobody recorded what the first response said; the second one says as much."""
    settings = settings_of(orders, address) | {"CALLBACK_TIMEOUT_S": 1}
    service = ServiceProcess(tmp_path, **settings)
    order_id = order_that_failed(orders)
    with service:
        # The record waits for the order's lane, and the service is killed meanwhile.
        orders.script(Fault("slow", seconds=1.0, order_id=order_id))
        payment_id = charge(service, order_id)
        orders.wait_for(2, "arrived")
        with connection.transaction():
            connection.execute("SELECT FROM callback_lanes FOR UPDATE")
            orders.wait_for(2, "finished")
            time.sleep(0.3)
            service.kill()
    assert connection.execute(STATES).fetchall() == []
    with service:
        found = [(payment_id, "unfulfilled", "repeated")]
        eventually(lambda: connection.execute(STATES).fetchall() == found)


def test_a_status_url_that_can_never_work_refuses_the_start(address: DatabaseAddress) -> None:
    url = f"http://203.0.113.7/{TOKEN}/{{order_id}}"
    for command in (("serve",), ("work",), ("reconcile", "orders")):
        refused = run(*command, **at(address), ORDER_STATUS_URL=url)
        assert refused.returncode == (2 if command[0] == "reconcile" else 1)
        assert refused.stderr.count("ORDER_STATUS_URL: http://203.0.113.7 has no loopback") == 1
        assert TOKEN not in refused.stderr


def test_payments_are_reconciled_with_their_orders(
    orders: OrderServiceProcess,
    address: DatabaseAddress,
    connection: psycopg.Connection[Any],
    tmp_path: Path,
) -> None:
    """Those that were captured while nobody looked: neither callbacks nor status were set up."""
    with ServiceProcess(tmp_path, **at(address)) as service:
        failed = order_that_failed(orders)
        lost = charge(service, failed)
        missing = str(uuid.uuid4())
        unknown = charge(service, missing)
        sale = Sale(service.url, orders, connection)
        good, twice, unpaid = (str(uuid.uuid4()) for _ in range(3))
        for order_id in (good, twice, unpaid):
            sale.charge(order_id, "first", PAID)
        eventually(lambda: all(orders.book[each].payments for each in (good, twice, unpaid)))
        for order_id in (good, twice, unpaid):
            told = {"order_id": order_id, "payment_id": orders.book[order_id].payments[0]}
            assert httpx.post(orders.url, json=told | {"status": "SUCCESS"}).status_code == 200
        second = charge(service, twice)
        refund = {"payment_id": orders.book[unpaid].payments[0]}
        assert httpx.post(f"{service.url}/v1/refund", json=refund).status_code == 201
        settled = "SELECT count(*) FROM payments WHERE status = %s"
        eventually(lambda: connection.execute(settled, ["SUCCESS"]).fetchone() == (5,))
        eventually(lambda: connection.execute(settled, ["REFUNDED"]).fetchone() == (1,))
    asked = at(address) | {"ORDER_STATUS_URL": orders.orders_url}
    done = invoke("reconcile", "orders", "--format", "csv", **asked)
    assert done.returncode == 1, done.stderr
    header, *lines = done.stdout.splitlines()
    assert header == "kind,order_id,payment_id,order_status,problem"
    assert set(lines) == {
        f"unfulfilled,{failed},{lost},FAILED,",
        f"not_known,{missing},{unknown},,404",
        f"paid_twice,{twice},{second},CONFIRMED,",
        f"unpaid,{unpaid},,CONFIRMED,",
    }
    assert "orders: 5 checked; findings: 4" in done.stderr
    assert sorted(orders.lookups) == sorted([failed, missing, good, twice, unpaid])
    watched = {(payment_id, "suspect", "not_asked") for payment_id in (lost, unknown, second)}
    assert set(connection.execute(STATES).fetchall()) == watched
    for form in ("table", "json"):
        done = invoke("reconcile", "orders", "--format", form, **asked)
        assert done.returncode == 1
        assert done.stdout.count("paid_twice") == 1
    none = invoke("reconcile", "orders", "--until", "2020-01-01T00:00:00Z", **asked)
    assert (none.returncode, none.stderr) == (0, "orders: 0 checked; findings: 0\n")
    with ServiceProcess(tmp_path, **asked):
        expected = {lost: "unfulfilled", unknown: "suspect", second: "paid_twice"}

        def states() -> dict[str, str]:
            return {id: state for id, state, _ in connection.execute(STATES)}

        eventually(lambda: states() == expected)


def test_who_cannot_be_asked_is_exit_code_2(address: DatabaseAddress) -> None:
    unset = invoke("reconcile", "orders", **at(address))
    assert unset.returncode == 2
    assert unset.stderr.count("\n") == 1
    assert "ORDER_STATUS_URL is not set" in unset.stderr
    asked = at(address) | {"ORDER_STATUS_URL": "http://127.0.0.1:1/{order_id}"}
    for wrong in (
        ("--since", "2026-02-01T00:00:00Z", "--until", "2026-01-01T00:00:00Z"),
        ("--limit-per-second", "0"),
        ("--format", "xml"),
    ):
        assert invoke("reconcile", "orders", *wrong, **asked).returncode == 2
