"""Some orders fail, in each way there is, and others do not: any of it, at any time.

Two dispatchers with breakers of their own run on the real tables. How much time passes is drawn:
the dispatchers' clock is set ahead, and all that is stored is set back by as much.
"""

import asyncio
import time
import uuid
from collections import defaultdict
from math import ceil
from types import SimpleNamespace
from typing import Any, Literal
from unittest.mock import patch

import msgspec
import psycopg
import pytest
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st

from payments.callbacks import dispatcher as dispatching
from payments.callbacks import lease_s
from payments.callbacks.breaker import OPEN_MAX_S, PROBES_MAX
from payments.callbacks.dispatcher import Dispatcher
from payments.callbacks.retry import ATTEMPTS_MAX, RETRY_FOR_S
from payments.database.connections import Database, DatabaseAddress
from payments.observability.metrics import Telemetry
from payments.order_service.endpoint import Exchange
from tests.callbacks.conftest import PlayedEndpoint, answered, failed

Kind = Literal["good", "503", "asked", "500", "refused", "502 json", "hang", "cut"]
KINDS: tuple[Kind, ...] = ("good", "503", "asked", "500", "refused", "502 json", "hang", "cut")

TIMEOUT_S, ASKED_S, ANSWER_S, TICK_S = 25.0, 600.0, 0.05, 0.5
DAYS_S = 80 * 3600.0  # longer than anything is tried for
SLACK_S = 0.02  # between the dispatchers' clock and the database's

ARRIVE = """
WITH delivery AS (
    INSERT INTO callback_deliveries (event_id, position, order_id, payment_id, sequence, status,
                                     amount_cents, currency, occurred_at, state, attempts)
    SELECT gen_random_uuid(), coalesce(max(position), 0) + 1, %(order)s, gen_random_uuid(), 2,
           'SUCCESS', 1500, 'INR', now(), 'due', %(attempts)s FROM callback_deliveries)
INSERT INTO callback_lanes (order_id) VALUES (%(order)s)
"""

PASS = """
UPDATE callback_lanes
   SET next_at = next_at - t, busy_until = busy_until - t, not_before = not_before - t,
       away_at = away_at - t, excused_at = excused_at - t, claimed_at = claimed_at - t
  FROM make_interval(secs => %(seconds)s) AS t;
UPDATE callback_deliveries SET due_since = due_since - make_interval(secs => %(seconds)s)
"""

EMPTY = "TRUNCATE callback_deliveries, callback_lanes, callback_attempts"
NEVER_TRIED = "SELECT count(*) FROM callback_lanes WHERE NOT failing AND in_flight IS NULL"
DEAD = """
SELECT order_id, extract(epoch FROM clock_timestamp() - due_since)::float8, attempts
  FROM callback_deliveries WHERE state = 'dead'
"""


class Endpoint(PlayedEndpoint):
    """Each exchange ends when the world says so."""

    def __init__(self, world: "World") -> None:
        super().__init__(TIMEOUT_S)
        self._world = world

    async def post(self, message_id: str, body: bytes, *_: Any) -> Exchange:
        return await self._world.send(uuid.UUID(msgspec.json.decode(body)["order_id"]))


class World:
    """Orders, and what becomes of each when it is sent."""

    def __init__(self, connection: psycopg.Connection[Any], database: Database) -> None:
        self.connection = connection
        self.offset_s = 0.0
        self.kinds: dict[uuid.UUID, Kind] = {}
        self.under_way: dict[uuid.UUID, tuple[float, asyncio.Future[Exchange]]] = {}
        self.not_before: defaultdict[uuid.UUID, float] = defaultdict(float)
        self.waiting: dict[uuid.UUID, float] = {}  # good ones that were not sent yet; until when
        self.findings: list[str] = []
        telemetry = Telemetry()
        self.dispatchers = [
            Dispatcher(database.connect, Endpoint(self), telemetry, 90, rng=lambda: 0.5)
            for _ in range(2)
        ]

    def now(self) -> float:
        return time.monotonic() + self.offset_s

    def arrive(self, kind: Kind, *, worn: bool) -> None:
        """`worn`: it was tried often enough to be dead, were it not for the time."""
        order_id = uuid.uuid4()
        self.kinds[order_id] = kind
        ((ahead,),) = self.connection.execute(NEVER_TRIED).fetchall()
        attempts = ATTEMPTS_MAX if worn else 0
        self.connection.execute(ARRIVE.encode(), {"order": order_id, "attempts": attempts})
        if kind == "good":
            # At most one pause for each few in front of it that were never tried either.
            at_most_s = OPEN_MAX_S * ceil((ahead + 1) / PROBES_MAX) + 2 * TICK_S
            self.waiting[order_id] = self.now() + at_most_s

    async def send(self, order_id: uuid.UUID) -> Exchange:
        now, kind = self.now(), self.kinds[order_id]
        if order_id in self.under_way:
            self.findings.append(f"{kind}: two at once")
        if now < self.not_before[order_id] - SLACK_S:
            self.findings.append(f"{kind}: {self.not_before[order_id] - now:.3f} s too early")
        if now > self.waiting.pop(order_id, now):
            self.findings.append("it waited for others")
        ends = now + (TIMEOUT_S if kind == "hang" else ANSWER_S)
        future: asyncio.Future[Exchange] = asyncio.get_running_loop().create_future()
        self.under_way[order_id] = (ends, future)
        return await future

    def end(self, order_id: uuid.UUID, ended: float) -> Exchange:
        match self.kinds[order_id]:
            case "good":
                return answered(200)
            case "asked":
                # Whoever was frozen until the lease expired may come too late to tell the other.
                if self.now() < ended - ANSWER_S + lease_s(TIMEOUT_S):
                    self.not_before[order_id] = self.now() + ASKED_S
                return answered(503, retry_after=f"{ASKED_S:.0f}")
            case "503" | "500" as status:
                return answered(int(status))
            case "502 json":
                return answered(502, content_type="application/json")
            case "refused":
                return failed()
            case "hang" | "cut" as kind:
                # As the receiver sees it: whoever was frozen meanwhile found out later.
                self.not_before[order_id] = ended + TIMEOUT_S
                return failed("timeout" if kind == "hang" else "unreachable", sent=True)

    async def tick(self, seconds: float) -> None:
        """So much time passes, and both dispatchers have a turn."""
        self.connection.execute(PASS.replace("%(seconds)s", str(seconds)).encode())
        self.offset_s += seconds
        for order_id, (ends, future) in list(self.under_way.items()):
            if ends <= self.now():
                del self.under_way[order_id]
                future.set_result(self.end(order_id, ends))
        for dispatcher in self.dispatchers:
            for _ in range(3):
                await asyncio.sleep(0)
            await dispatcher._turn()
        for _ in range(3):
            await asyncio.sleep(0)
        assert not self.findings, self.findings
        for order_id, age_s, attempts in self.connection.execute(DEAD.encode()):
            assert age_s >= RETRY_FOR_S, f"{self.kinds[order_id]} died early"
            assert attempts > ATTEMPTS_MAX

    async def sleep(self, seconds: float) -> None:
        """The dispatchers have no turn meanwhile: nobody's wait counts."""
        self.waiting = {order_id: until + seconds for order_id, until in self.waiting.items()}
        await self.tick(seconds)


Step = tuple[list[tuple[Kind, bool]], int, float]
arrivals = st.lists(st.tuples(st.sampled_from(KINDS), st.booleans()), max_size=6)
steps = st.tuples(
    arrivals, st.integers(1, 12), st.sampled_from([0.0, 0.0, TIMEOUT_S, 300.0, 3600.0, DAYS_S])
)
BAD: list[tuple[Kind, bool]] = [(kind, True) for kind in KINDS if kind != "good"]


@settings(
    max_examples=20,
    suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow],
)
@given(st.lists(steps, min_size=1, max_size=6))
@example([([(kind, False)] * 6, 8, 60.0) for kind in ("hang", "503", "500")])
@example([(BAD, 6, 0.0), (BAD, 12, 600.0), (BAD, 12, DAYS_S), ([("good", False)], 12, DAYS_S)])
@example([([("503", False)] * 3, 1, 0.0), ([("asked", False)], 1, 300.0)])
@pytest.mark.timeout(300)
def test_others_do_not_wait_and_nobody_is_hurried_or_given_up_early(
    address: DatabaseAddress, connection: psycopg.Connection[Any], story: list[Step]
) -> None:
    connection.execute(EMPTY)
    asyncio.run(tell(story, Database(address, 1), connection))


async def tell(story: list[Step], database: Database, connection: psycopg.Connection[Any]) -> None:
    world = World(connection, database)
    with patch.object(dispatching, "time", SimpleNamespace(monotonic=world.now, time=time.time)):
        try:
            for coming, ticks, sleep_s in story:
                for kind, worn in coming:
                    world.arrive(kind, worn=worn)
                for _ in range(ticks):
                    await world.tick(TICK_S)
                if sleep_s:
                    await world.sleep(sleep_s)
            world.arrive("good", worn=False)
            while world.waiting:
                assert min(world.waiting.values()) >= world.now(), "it waits for others"
                await world.tick(TICK_S)
        finally:
            for dispatcher in world.dispatchers:
                for task in list(dispatcher._sending):
                    task.cancel()
                await asyncio.gather(*dispatcher._sending, return_exceptions=True)
                await dispatcher._close()
