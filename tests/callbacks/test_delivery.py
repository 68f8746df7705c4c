"""Callbacks through the real thing: dispatchers, HTTP, and an Order Service in another process.

`--outcomes N` for more of them than 400; the seed is fixed.
"""

import asyncio
import base64
import random
import sys
import time
import uuid
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager
from itertools import accumulate
from pathlib import Path
from typing import Any, get_args

import httpx
import psycopg
import pytest

from payments.callbacks import dispatcher as dispatching
from payments.callbacks.breaker import Breaker
from payments.callbacks.dispatcher import Dispatcher
from payments.database.connections import Database, DatabaseAddress
from payments.http_url import parse_http_url
from payments.observability.metrics import Telemetry
from payments.order_service.endpoint import Endpoint
from payments.order_service.target import Target
from payments.projections.callbacks import CallbacksProjection, begin_at_the_end
from payments.projections.follower import Follower
from tests.callbacks.raw_server import Server, serving
from tests.doubles.order_faults import FaultKind
from tests.doubles.order_service import Fault, Options, OrderServiceProcess, Request
from tests.invariants.callbacks import check_callbacks, is_followed, nothing_due
from tests.machine import Machine, bound
from tests.process import ServiceProcess, at, run, working
from tests.support import History, append, until

pytestmark = pytest.mark.anyio

SEED = 21
TIMEOUT_S = 1.0  # of an exchange: what hangs is soon over
NOTICED_WITHIN_S = 0.02  # that a client is gone, once the receiver has the CPU


@pytest.fixture
def orders() -> Iterator[OrderServiceProcess]:
    with OrderServiceProcess(Options(issue_takes_s=0)) as running:
        yield running


@pytest.fixture(autouse=True)
def looks_often(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(dispatching, "POLL_S", 0.05)


def dispatcher_to(
    url: str, database: Database, *, timeout_s: float = TIMEOUT_S, **options: Any
) -> Dispatcher:
    """Retries come after some milliseconds, unless `rng` says otherwise."""
    defaults: dict[str, Any] = {
        "telemetry": Telemetry(),
        "retention_days": 90,
        "rng": lambda: random.uniform(0.02, 0.04),
        "breaker": Breaker(open_min_s=0.05, open_max_s=0.2),
    }
    endpoint = Endpoint(Target(url=parse_http_url(url)), timeout_s=timeout_s)
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


# What becomes of an order's payments, in this order: Success, Failed, success that is Refunded.
PATTERNS = ["S", "S", "F", "FS", "SF", "FS", "SF", "FF", "SS", "R", "FSF", "FRF", "RF", "RSF"]
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
        *(Fault("410", order_id=str(order_id), count=None) for order_id in dying),
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
    there = {"ORDER_CALLBACK_URL": orders.url, "CALLBACK_TIMEOUT_S": 2 * TIMEOUT_S}
    with working(SIMULATED_LEDGER="", **at(address), **there):
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
            await until(lambda: nothing_due(connection), 60)
    received = orders.requests
    note_who_left_in_time(received)
    report = check_callbacks(connection, received=received)
    sys.stdout.write(f"{report}, {len(received)} requests of {len(order_ids)} orders\n")
    dead = connection.execute("SELECT order_id FROM callback_deliveries WHERE state = 'dead'")
    assert {order_id for (order_id,) in dead} == set(dying)
    assert {request.fault for request in received} == {None, "410", *kinds}


def note_who_left_in_time(received: list[Request]) -> None:
    """Who gives a request up closes its connection, and only then may the order's next one be sent.
    A receiver that had no CPU meanwhile finds both at once, and the new request maybe first."""
    last: dict[Any, Request] = {}
    for request in received:  # in the order of arrival
        left = last.get(request.order_id)
        if left is not None and left.finished is not None:
            noticed_late_s = left.finished - request.arrived
            if 0 < noticed_late_s < NOTICED_WITHIN_S:
                left.finished = request.arrived
        last[request.order_id] = request


async def test_a_sender_that_was_frozen_past_its_lease_changes_nothing(
    orders: OrderServiceProcess,
    database: Database,
    connection: psycopg.Connection[Any],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Its result comes while another sends the same: that one's, and no other, opens the lane."""
    order_id = uuid.uuid4()
    late, other = (dispatcher_to(orders.url, database) for _ in range(2))
    orders.script(Fault("slow", seconds=0.5), Fault("slow", seconds=0.8))
    monkeypatch.setattr(dispatching, "lease_s", lambda timeout_s: 0.2)
    async with calling_back(database, late):
        append(connection, History("a", order_id=order_id).charged().facts)
        append(connection, History("b", order_id=order_id).charged().facts)
        await asyncio.to_thread(orders.wait_for, 1, "arrived")
        late.finish()
        monkeypatch.setattr(dispatching, "lease_s", lambda timeout_s: 10.0)
        await other.start()
        await asyncio.to_thread(orders.wait_for, 3)
        await until(lambda: nothing_due(connection))
        await other.stop(2)
    first, again, second = orders.requests
    assert first.get("event_id") == again.get("event_id") != second.get("event_id")
    assert again.arrived < first.finished < again.finished  # type: ignore[operator]
    assert second.arrived > again.finished  # type: ignore[operator]
    assert check_callbacks(connection) == ({"delivered": 2}, 3)


@pytest.mark.parametrize("kind", ["500", "hang"])
async def test_orders_in_trouble_delay_nobody(
    orders: OrderServiceProcess,
    database: Database,
    connection: psycopg.Connection[Any],
    kind: FaultKind,
    machine: Machine,
) -> None:
    """One, or a hundred: once they were tried, others wait at most twice as long as without them.

    Without the breaker, which takes a hundred orders that hang for an outage.
    """
    bad = [uuid.uuid4() for _ in range(100)]
    orders.script(*(Fault(kind, order_id=str(order_id), count=None) for order_id in bad))
    breaker = Breaker(orders_min=10_000)
    dispatcher = dispatcher_to(orders.url, database, timeout_s=0.3, breaker=breaker)
    async with calling_back(database, dispatcher):
        p99s_s = [await p99_of_good_ones_s(connection)]
        for these in (bad[:1], bad[1:]):
            append(connection, [fact for order_id in these for fact in charge_of(order_id).facts])
            await until(lambda: none_is_new(connection))
            p99s_s.append(await p99_of_good_ones_s(connection))
    usual_s, *delayed_s = p99s_s
    shown = ", ".join(f"{seconds * 1000:.0f}" for seconds in p99s_s)
    sys.stdout.write(f"p99 in ms with 0, 1 and 100 orders in trouble: {shown}\n")
    bound(max(delayed_s), max(2 * usual_s, 0.25), machine)
    check_callbacks(connection, settled=False)


def none_is_new(connection: psycopg.Connection[Any]) -> bool:
    """All were tried at least once."""
    new = "SELECT count(*) = 0 FROM callback_deliveries WHERE state = 'due' AND attempts = 0"
    return is_followed(connection) and connection.execute(new).fetchone() == (True,)


def charge_of(order_id: uuid.UUID) -> History:
    return History(str(order_id), order_id=order_id).charged()


async def p99_of_good_ones_s(connection: psycopg.Connection[Any]) -> float:
    """How long orders, one after another, wait for their callbacks."""
    good = [uuid.uuid4() for _ in range(100)]
    for order_id in good:
        append(connection, charge_of(order_id).facts)
        await asyncio.sleep(0.005)
    query = (
        "SELECT extract(epoch FROM finished_at - enqueued_at)::float8 FROM callback_deliveries"
        " WHERE state = 'delivered' AND order_id = ANY (%s) ORDER BY 1"
    )

    def waited_s() -> list[float]:
        return [seconds for (seconds,) in connection.execute(query.encode(), [good])]

    await until(lambda: len(waited_s()) == len(good))
    return waited_s()[98]


async def test_after_an_outage_all_comes_at_once_but_not_all_at_the_same_time(
    orders: OrderServiceProcess,
    database: Database,
    connection: psycopg.Connection[Any],
    pytestconfig: pytest.Config,
) -> None:
    """Whatever pauses had been made, and without another wave of failures."""
    many = max(300, pytestconfig.getoption("--outcomes") // 2)
    # Nothing hangs here, and on a busy machine a second is soon over.
    dispatcher = dispatcher_to(orders.url, database, timeout_s=20)
    orders.refuse()
    async with calling_back(database, dispatcher):
        append(connection, [fact for _ in range(many) for fact in charge_of(uuid.uuid4()).facts])
        await until(lambda: dispatcher.state != "closed")
        # It has lasted long: those that were tried have long pauses by now.
        connection.execute(
            "UPDATE callback_lanes SET next_at = now() + interval '1 h' WHERE failing"
        )
        orders.script(Fault("slow", count=None, seconds=0.05))
        orders.listen()
        began = time.monotonic()
        await until(lambda: nothing_due(connection))
        took_s = time.monotonic() - began
        assert dispatcher.state == "closed"
    received = orders.requests
    report = check_callbacks(connection, received=received)
    under_way = most_at_once(received)
    sys.stdout.write(
        f"{report}: {took_s:.1f} s, {orders.connections} connections, {under_way} at once\n"
    )
    assert report.states == {"delivered": many}
    assert len(received) == many, "some were sent twice"
    assert under_way <= orders.connections <= dispatching.CONCURRENCY_MAX
    failed_since = connection.execute(
        "SELECT count(*) FROM callback_attempts WHERE outcome <> 'delivered' AND started_at >"
        "       (SELECT min(started_at) FROM callback_attempts WHERE outcome = 'delivered')"
    )
    assert failed_since.fetchone() == (0,)


def most_at_once(received: list[Request]) -> int:
    moments = [(request.arrived, 1) for request in received]
    moments += [(request.finished or 0.0, -1) for request in received]
    return max(accumulate(change for _, change in sorted(moments)))


CANARY = b"canary in the secret, 24 bytes and more"
SECRET = "whsec_" + base64.b64encode(CANARY).decode()
TOKEN = "canary-in-the-query"


async def test_neither_the_secret_nor_the_token_in_the_url_is_ever_shown(
    address: DatabaseAddress, connection: psycopg.Connection[Any], tmp_path: Path
) -> None:
    """The receiver fails first, tells in its answers what headers came, and then is gone."""

    async def echo(server: Server, writer: asyncio.StreamWriter) -> None:
        head, _, _ = server.requests[-1].partition(b"\r\n\r\n")
        _, _, headers = head.partition(b"\r\n")
        status = b"200 OK" if len(server.requests) > 1 else b"500 Internal Server Error"
        start = b"HTTP/1.1 %b\r\nContent-Length: %d\r\n\r\n" % (status, len(headers))
        await server.write(writer, start + headers)

    settings = {**at(address), "ORDER_CALLBACK_SECRET": SECRET, "LOG_LEVEL": "DEBUG"}
    async with serving(echo) as server:
        settings["ORDER_CALLBACK_URL"] = f"{server.url}/callback?token={TOKEN}"
        service = ServiceProcess(tmp_path, **settings)
        await asyncio.to_thread(service.start)
        with httpx.Client() as client:
            paid = (await asyncio.to_thread(service.charge, client, "paid")).json()
        await until(lambda: len(server.requests) == 2 and nothing_due(connection))
    assert TOKEN.encode() in server.requests[0]
    with httpx.Client() as client:
        assert service.charge(client, "nobody listens").status_code == 201
        pages = (f"/v1/payments/{paid['id']}/callbacks", "/metrics", "/health")
        attempts = (
            "SELECT event_id::text, outcome, reason, convert_from(answer, 'UTF8')"
            "  FROM callback_attempts ORDER BY claim"
        )
        await until(lambda: len(connection.execute(attempts).fetchall()) >= 3)
        tried = connection.execute(attempts).fetchall()
        assert [outcome for _, outcome, *_ in tried[:3]] == [
            "http_error",
            "delivered",
            "unreachable",
        ]
        assert "webhook-signature: v1," in tried[0][-1]
        shown = [str(tried), *(client.get(f"{service.url}{page}").text for page in pages)]
    assert service.terminate() == 0
    show = ("show", tried[0][0])
    for command in (("list", "--format", "json"), show, (*show, "--format", "json")):
        done = run("callbacks", *command, **settings)
        assert done.returncode == 0
        shown += [done.stdout, done.stderr]
    shown.append(service.log.read_text())
    assert "unreachable" in shown[0]
    told = "\n".join(shown)
    assert SECRET not in told
    assert SECRET.removeprefix("whsec_") not in told
    assert CANARY.decode() not in told
    assert TOKEN not in told
