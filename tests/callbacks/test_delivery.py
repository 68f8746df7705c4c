"""Callbacks through the real thing: dispatchers, HTTP, and an Order Service in another process.

`--outcomes N` for more of them than 400; the seed is fixed.
"""

import asyncio
import random
import time
import uuid
from collections.abc import AsyncIterator, Callable, Iterator, Sequence
from contextlib import asynccontextmanager
from typing import Any, NamedTuple, get_args

import psycopg
import pytest

from payments.callbacks import dispatcher as dispatching
from payments.callbacks.breaker import Breaker
from payments.callbacks.dispatcher import Dispatcher
from payments.callbacks.endpoint import Endpoint
from payments.database import Database, DatabaseAddress
from payments.projections.callbacks import CallbacksProjection, begin_at_the_end
from payments.projections.follower import Follower
from payments.telemetry import Telemetry
from tests.doubles.order_faults import FaultKind
from tests.doubles.order_service import Fault, Options, OrderServiceProcess
from tests.invariants.callbacks import check_callbacks
from tests.process import at, working
from tests.support import History, append, until

pytestmark = pytest.mark.anyio

SEED = 21
TIMEOUT_S = 1.0  # of an exchange: what hangs is soon over


@pytest.fixture
def orders() -> Iterator[OrderServiceProcess]:
    with OrderServiceProcess(Options(issue_takes_s=0)) as running:
        yield running


@pytest.fixture(autouse=True)
def looks_often(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(dispatching, "POLL_S", 0.05)


def dispatcher_to(url: str, database: Database, **options: Any) -> Dispatcher:
    """Retries come after some milliseconds, unless `rng` says otherwise."""
    defaults: dict[str, Any] = {
        "telemetry": Telemetry(),
        "retention_days": 90,
        "rng": lambda: random.uniform(0.02, 0.04),
        "breaker": Breaker(open_min_s=0.05, open_max_s=0.2),
    }
    endpoint = Endpoint(url, timeout_s=TIMEOUT_S)
    return Dispatcher(database.connect, endpoint, **defaults | options)


@asynccontextmanager
async def calling_back(database: Database, *dispatchers: Dispatcher) -> AsyncIterator[None]:
    """The outbox is written, and sent."""
    await begin_at_the_end(database)

    def wake() -> None:
        for dispatcher in dispatchers:
            dispatcher.wake()

    projection = CallbacksProjection(("SUCCESS", "FAILED"))
    follower = Follower(database.connect, projection, Telemetry(), applied=wake)
    follower.start()
    for dispatcher in dispatchers:
        await dispatcher.start()
    try:
        yield
    finally:
        await asyncio.gather(follower.stop(), *(each.stop(2) for each in dispatchers))


def nothing_due(connection: psycopg.Connection[Any]) -> bool:
    """The outbox has all of the log, and all of it is sent."""
    row = connection.execute(
        "SELECT (SELECT position FROM followers WHERE name = 'callbacks')"
        "       = (SELECT coalesce(max(notification_id), 0) FROM payment_events)"
        "   AND NOT EXISTS (SELECT FROM callback_lanes)"
    ).fetchone()
    assert row is not None
    return bool(row[0])


# What becomes of an order's payments, in this order: Success, Failed, success that is Refunded.
PATTERNS = ("S", "S", "F", "FS", "SF", "FS", "SF", "FF", "SS", "R", "FSF", "FRF")
SLOT_S = 0.02


def play(dice: random.Random, outcomes: int) -> tuple[list[list[History]], list[uuid.UUID]]:
    """What is appended in each slot of time, and all orders. An order's payments come at once, or
    one after another while the one before waits, is sent, or was delivered."""
    slots: list[list[History]] = [[] for _ in range(outcomes // 8 + 100)]
    orders: list[uuid.UUID] = []
    while outcomes > 0:
        order_id = uuid.UUID(int=dice.getrandbits(128), version=4)
        slot = dice.randrange(len(slots) - 100)
        for number, what in enumerate(dice.choice(PATTERNS)):
            history = History(f"{order_id}-{number}", 100 + number, order_id=order_id)
            slots[slot].append(history.declined() if what == "F" else history.charged())
            if what == "R":
                history.refunded()
            slot += dice.choice((0, 0, 1, 2, 4, 8, 20))
            outcomes -= 1
        orders.append(order_id)
    return slots, orders


async def test_each_outcome_arrives_in_order_whatever_goes_wrong(
    orders: OrderServiceProcess,
    address: DatabaseAddress,
    database: Database,
    connection: psycopg.Connection[Any],
    pytestconfig: pytest.Config,
) -> None:
    dice = random.Random(SEED)
    slots, order_ids = play(dice, pytestconfig.getoption("--outcomes"))
    dying = dice.sample(order_ids, len(order_ids) // 50)
    kinds = tuple(kind for kind in get_args(FaultKind) if kind not in ("refused", "410"))
    orders.script(
        *(Fault("410", order_id=str(order_id)) for order_id in dying),
        Fault(
            kinds,
            count=None,
            share=0.3,
            seed=SEED,
            seconds=0.05,
            retry_after="1",
            location=f"{orders.url}/elsewhere",
        ),
    )
    dispatchers = [dispatcher_to(orders.url, database) for _ in range(2)]
    t0=time.monotonic()
    with working(**at(address), ORDER_CALLBACK_URL=orders.url):
      print("work", time.monotonic()-t0)
      async with calling_back(database, *dispatchers):
        for number, histories in enumerate(slots):
            if histories:
                append(connection, [fact for history in histories for fact in history.facts])
            if number % 40 == 20:
                orders.refuse()
            if number % 40 == 30:
                orders.listen()
            await asyncio.sleep(SLOT_S)
        orders.listen()
        print("appended", time.monotonic()-t0)
        await until(lambda: nothing_due(connection), 60)
        print("done", time.monotonic()-t0)
    requests = orders.requests
    report = check_callbacks(connection, received=requests)
    print(report, len(requests), len(order_ids))
    assert orders.findings() == []
    assert report.states["dead"] == len(dying)
    assert {request.fault for request in requests} == {None, "410", *kinds}
