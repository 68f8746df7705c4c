"""A failure that goes on is told when it is new, and then rarely: never a line for each attempt."""

import asyncio
import logging
from collections.abc import Callable, Iterator
from types import SimpleNamespace
from typing import Any

import psycopg
import pytest
from loguru import logger

from payments.callbacks.dispatcher import Dispatcher
from payments.commands import outcomes as recording
from payments.commands.outcomes import Outcomes
from payments.database.connections import Database, DatabaseAddress
from payments.event_store import EventStore
from payments.events.appender import Appender, StreamConflict
from payments.events.store import to_stored_event
from payments.events.watch import LogWatch
from payments.gateways import OutcomeUnknown, ProviderCharge
from payments.gateways.counted import CountedGateway
from payments.observability import logs
from payments.observability.logs import Repeats
from payments.observability.metrics import Telemetry
from payments.payment.decisions import charge_outcome
from payments.payment.state import Approved
from payments.projections.follower import Follower
from payments.projections.payments import PaymentsProjection
from tests.doubles.gateway import ScriptedGateway
from tests.support import ORDER_ID, History, stored_event, until

Lines = list[dict[str, Any]]


@pytest.fixture
def told() -> Iterator[Lines]:
    """What is told: the message, and its fields."""
    lines: Lines = []

    def note(record: Any) -> bool:
        lines.append({"message": record["message"]} | record["extra"])
        return False

    sink = logger.add(lambda _: None, level="WARNING", filter=note)
    yield lines
    logger.remove(sink)


def test_once_and_then_rarely_with_how_often_it_came_unsaid(told: Lines) -> None:
    now = 1000.0
    repeats = Repeats(lambda: now)
    for _ in range(100):
        repeats.tell("ERROR", "it failed", payment_id="p1")
    repeats.tell("ERROR", "it failed", of="something else")
    now += logs.REPEAT_S
    for _ in range(100):
        repeats.tell("ERROR", "it failed", payment_id="p2")
    assert told == [
        {"message": "it failed", "payment_id": "p1"},
        {"message": "it failed"},
        {"message": "it failed", "payment_id": "p2", "unsaid": 99},
    ]


@pytest.mark.anyio
async def test_a_gateway_that_fails(told: Lines) -> None:
    errors = iter([*[KeyError("k")] * 50, *[ValueError("v")] * 50])

    def fails(*_: object) -> Any:
        raise next(errors)

    gateway = CountedGateway(ScriptedGateway(*[fails] * 100), Telemetry())
    for _ in range(100):
        with pytest.raises(OutcomeUnknown):
            await gateway.charge(
                ProviderCharge(payment_id=ORDER_ID, amount_cents=1500, currency="INR"), 1
            )
    assert told == [{"message": "the gateway failed", "operation": "charge"}] * 2


@pytest.mark.anyio
async def test_a_loss_whose_repair_conflicts(
    told: Lines, database: Database, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What the log lost is appended again every RELOAD_PAUSE_S, until it fits."""
    monkeypatch.setattr(recording, "RELOAD_PAUSE_S", 0)
    history = History("k")
    intent = to_stored_event(history.facts[0])
    errors = iter([*[StreamConflict(None)] * 20, LookupError("enough")])

    async def append(events: Any, *, after: Any) -> int:
        raise next(errors)

    store = EventStore(database, SimpleNamespace(append=append))  # type: ignore[arg-type]
    outcomes = Outcomes(store, Telemetry())
    approved = Approved(id=history.id, amount_cents=1500, currency="INR", provider_txn_id="txn")

    async def as_it_stands(*_: object) -> None:  # it is lost again and again
        return None

    monkeypatch.setattr(outcomes, "_load", as_it_stands)
    cause = history._cause()
    with pytest.raises(LookupError):
        await outcomes.append(
            history.payment, [intent], lambda payment: charge_outcome(payment, approved, cause)
        )
    message = "the log lacks acknowledged events; they are appended again"
    assert [line["message"] for line in told] == [message]


async def _refused(_: str) -> Any:
    raise psycopg.OperationalError("away")


class Waiting:
    """Something that tries to connect again and again, with a database that is away."""

    def __init__(self) -> None:
        self.tries = 0

    async def connect(self, name: str) -> Any:
        self.tries += 1
        return await _refused(name)


async def follow(waiting: Waiting) -> Callable[[], Any]:
    follower = Follower(waiting.connect, PaymentsProjection(7), Telemetry())
    follower.start()
    return lambda: follower.stop(1)


async def append(waiting: Waiting) -> Callable[[], Any]:
    appender = Appender(waiting.connect, Telemetry(), 10)
    appender.start()
    appending = asyncio.ensure_future(appender.append([stored_event()], after=None))

    async def stop() -> None:
        appending.cancel()
        await appender.stop(0.1)

    return stop


async def dispatch(waiting: Waiting) -> Callable[[], Any]:
    async def nothing() -> None: ...

    endpoint: Any = SimpleNamespace(open=nothing, close=nothing)
    dispatcher = Dispatcher(waiting.connect, endpoint, Telemetry(), 30)
    await dispatcher.start()
    return lambda: dispatcher.stop(1)


@pytest.mark.anyio
@pytest.mark.parametrize("start", [follow, append, dispatch])
async def test_a_database_that_is_away(told: Lines, start: Any) -> None:
    waiting = Waiting()
    stop = await start(waiting)

    async def has_tried() -> bool:
        return waiting.tries >= 4

    await until(has_tried)
    await stop()
    assert len(told) == 1
    assert told[0]["reason"] == "OperationalError"


def test_a_pool_that_cannot_connect(told: Lines) -> None:
    """Its library tells of each attempt. Others are told each time."""
    handler = logs._ToLoguru()
    for number in range(10):
        for name, template in (("psycopg.pool", "error connecting in %r: %s"), ("other", "%s %s")):
            handler.emit(
                logging.LogRecord(name, logging.WARNING, "", 1, template, ("pool-1", number), None)
            )
    pool = [line for line in told if line["logger"] == "psycopg.pool"]
    assert [line["message"] for line in pool] == ["error connecting in 'pool-1': 0"]
    assert len(told) == 11


def test_a_log_that_cannot_be_watched(told: Lines, address: DatabaseAddress) -> None:
    watch = LogWatch(Database(address, 1), Telemetry())
    for _ in range(10):
        watch._log_failure(psycopg.ProgrammingError())
    assert told == [
        {"message": "the log cannot be checked for losses", "reason": "ProgrammingError"}
    ]
