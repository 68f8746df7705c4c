"""What becomes of orders at an Order Service that is as slow, as broken and as strict as the real
one: none of them may end badly, and the trouble of some keeps nobody else waiting.

Most of it takes minutes: `--long`. The figures are printed.
"""

import sys
import time
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from pathlib import Path
from typing import Any, Literal

import psycopg
import pytest

from payments.database.connections import DatabaseAddress
from tests.callbacks.sales import PAID, PER_S, Sale, new_orders
from tests.doubles.order_faults import shard_of
from tests.doubles.order_seats import Seating
from tests.doubles.order_service import Fault, Options, OrderServiceProcess
from tests.invariants.orders import check_orders
from tests.machine import Machine, bound
from tests.process import ServiceProcess, at, run

pytestmark = pytest.mark.timeout(400)

LATER_S = 2.0  # at most, for whoever has no trouble, while others have
BUSY_S = 15.0

Selling = Callable[..., AbstractContextManager[Sale]]


@pytest.fixture
def orders() -> Iterator[OrderServiceProcess]:
    with OrderServiceProcess(Options(seating=Seating())) as running:
        yield running


@pytest.fixture
def selling(
    address: DatabaseAddress,
    connection: psycopg.Connection[Any],
    orders: OrderServiceProcess,
    tmp_path: Path,
) -> Selling:
    @contextmanager
    def begin(**settings: object) -> Iterator[Sale]:
        callbacks = {"ORDER_CALLBACK_URL": orders.url}
        with ServiceProcess(tmp_path, **at(address), **callbacks, **settings) as service:
            yield Sale(service.url, orders, connection)

    return begin


@pytest.fixture
def for_long(long_run: bool) -> None:
    if not long_run:
        pytest.skip("it takes minutes: --long")


def say(text: object) -> None:
    sys.stdout.write(f"{text}\n")


def in_time(took_s: float, seconds: float, machine: Machine) -> None:
    """A busy machine may be late, but not as late as callbacks that wait for others."""
    assert took_s < seconds + BUSY_S
    bound(took_s, seconds, machine)


def test_without_trouble_each_order_has_its_ticket(
    selling: Selling, connection: psycopg.Connection[Any], machine: Machine
) -> None:
    with selling() as sale:
        sold = new_orders(6)
        sale.sell(sold)
        sale.settle(sold, 20)
        check_orders(connection, sale.book())
        delays = sale.delays(sold)
        assert (delays.delivered, sale.repeated_early()) == (6, [])
        in_time(delays.max_s, LATER_S, machine)


@pytest.mark.usefixtures("for_long")
@pytest.mark.parametrize("allocates", ["last", "first"])
def test_seats_that_take_6_s(
    selling: Selling,
    connection: psycopg.Connection[Any],
    orders: OrderServiceProcess,
    allocates: Literal["last", "first"],
    pytestconfig: pytest.Config,
) -> None:
    """`--sold N` for more or fewer than 200 orders. The card of every third is declined: what is
    told of those is answered at once."""
    orders.seat(Seating(takes_s=6, allocates=allocates))
    with selling() as sale:
        sold = new_orders(pytestconfig.getoption("--sold"))
        sale.sell(sold, declined=sold[2::3])
        took_s = sale.settle(sold, 110)
        say(f"{allocates}: {sale.broken()}; {sale.delays(sold)}; settled in {took_s:.1f} s")
        assert sale.repeated_early() == []
        check_orders(connection, sale.book())


DEAD_SHARDS = {
    "503": Fault("503", count=None, proxy=True, shards=2, shard=1),
    "503, Retry-After: 3600": Fault(
        "503", count=None, proxy=True, retry_after="3600", shards=2, shard=1
    ),
    "hang": Fault("hang", count=None, shards=2, shard=1),
    "502 of the application": Fault("502", count=None, shards=2, shard=1),
}


@pytest.mark.usefixtures("for_long")
@pytest.mark.parametrize("how", DEAD_SHARDS)
def test_a_dead_shard_keeps_the_orders_of_the_other_not_waiting(
    selling: Selling, orders: OrderServiceProcess, how: str, machine: Machine
) -> None:
    with selling() as sale:
        undisturbed, sold = new_orders(30), new_orders(150)
        sale.sell(undisturbed)
        sale.settle(undisturbed, 20)
        orders.script(DEAD_SHARDS[how])
        sale.sell(sold)
        alive = [order_id for order_id in sold if shard_of(order_id, 2) == 0]
        dead = [order_id for order_id in sold if shard_of(order_id, 2) == 1]
        took_s = sale.settle(alive, 60)
        before, others = sale.delays(undisturbed), sale.delays(alive)
        say(f"undisturbed: {before}")
        say(f"{how}: the others: {others}; all in {took_s:.1f} s; theirs: {sale.delays(dead)}")
        assert sale.delays(dead).dead == others.dead == others.owed == 0
        in_time(others.p99_s, before.p99_s + LATER_S, machine)


@pytest.mark.usefixtures("for_long")
@pytest.mark.parametrize("again", [False, True])
def test_errors_about_single_orders_keep_no_other_waiting(
    selling: Selling,
    connection: psycopg.Connection[Any],
    orders: OrderServiceProcess,
    again: bool,
    machine: Machine,
) -> None:
    """Of 40 orders 12 in a row are refused their seats: `again` each time, or at first. Those are
    paid and FAILED, which no callback can mend."""
    orders.seat(Seating(takes_s=0.5))
    before, refused, after = new_orders(14), new_orders(12), new_orders(14)
    sold = before + after
    if again:
        orders.script(*(Fault("502", count=None, order_id=each) for each in refused))
    with selling() as sale:
        sale.sell(before)
        sale.settle(before, 20)
        if not again:
            orders.seat(Seating(takes_s=0.5, refuses=len(refused)))
        sale.sell(refused)
        sale.sell(after)
        sale.settle(sold, 60)
        delays = sale.delays(sold)
        say(f"again {again}: the others: {delays}; {sale.broken()}; {sale.delays(refused)}")
        check_orders(connection, sale.book(), but=refused)
        in_time(delays.p99_s, 0.5 + LATER_S, machine)


@pytest.mark.usefixtures("for_long")
def test_an_order_that_is_paid_twice_stays_confirmed_when_one_payment_goes_back(
    selling: Selling, connection: psycopg.Connection[Any], orders: OrderServiceProcess
) -> None:
    """And of an order whose only payment goes back, Order Service is told."""
    with selling(ORDER_CALLBACK_STATUSES="SUCCESS,FAILED,REFUNDED") as sale:
        twice, once = new_orders(20), new_orders(5)
        sale.sell(twice + once)
        sale.settle(twice + once, 20)
        for order_id in twice:
            sale.charge(order_id, "second", PAID)
            time.sleep(1 / PER_S)
        sale.settle(twice, 20)
        url, book = sale.url, sale.book()
        for order_id in twice + once:
            assert orders.refund(url, order_id, book[order_id].payments[-1]) == "REFUNDED"
        sale.settle(twice + once, 30)
        say(f"paid twice, refunded once: {sale.broken()} of {len(twice)}")
        check_orders(connection, sale.book())
        told = {each.order_id for each in orders.requests if each.outcome == "REFUNDED"}
        assert set(once) <= told
        assert {orders.orders[order_id] for order_id in once} == {"REFUNDED"}


@pytest.mark.usefixtures("for_long")
def test_its_database_is_away_for_25_s(
    selling: Selling,
    connection: psycopg.Connection[Any],
    orders: OrderServiceProcess,
    machine: Machine,
) -> None:
    """It answers 500 to everything, and is told soon after that is over."""
    with selling() as sale:
        sold = new_orders(15 + round(25 * PER_S))
        sale.sell(sold[:15])
        orders.script(Fault("500", count=None))
        sale.sell(sold[15:])
        orders.script()
        took_s = sale.settle(sold, 90)
        say(f"500s for 25 s: all delivered {took_s:.1f} s after; {sale.delays(sold)}")
        check_orders(connection, sale.book())
        in_time(took_s, 12, machine)


@pytest.mark.usefixtures("for_long")
@pytest.mark.parametrize("host", ["34.118.224.10", "100.64.0.10"])
def test_plain_http_may_go_to_the_networks_that_are_named(
    address: DatabaseAddress, tmp_path: Path, host: str
) -> None:
    """Service ranges of managed Kubernetes, for instance. Nothing is sent there."""
    settings = {"ORDER_CALLBACK_URL": f"http://{host}:9000/v1/payments/callback", **at(address)}
    refused = run("serve", **settings)
    say(f"{host}, not named: {refused.returncode}, {refused.stderr.strip()}")
    assert refused.returncode != 0
    named = {"HTTP_CALLBACK_NETWORKS": "34.118.224.0/20,100.64.0.0/10"}
    with ServiceProcess(tmp_path, **settings, **named) as service:
        assert service.terminate() == 0


@pytest.mark.usefixtures("for_long")
def test_plain_http_never_goes_to_link_local_addresses(address: DatabaseAddress) -> None:
    url = "http://169.254.169.254:9000/v1/payments/callback"
    named = {"HTTP_CALLBACK_NETWORKS": "169.254.0.0/16"}
    assert run("serve", **at(address), ORDER_CALLBACK_URL=url, **named).returncode != 0
