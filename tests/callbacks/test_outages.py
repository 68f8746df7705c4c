"""The dispatcher while Order Service is away, refuses, and comes back."""

import asyncio
import math
import time
import uuid
from collections.abc import Sequence
from typing import Any

import psycopg
import pytest

from payments.callbacks import dispatcher as dispatching
from payments.callbacks import endpoint_health
from payments.callbacks import outbox as statements
from payments.callbacks.breaker import ORDERS_MIN, PROBES_MAX, Breaker
from payments.callbacks.outbox import Result
from payments.callbacks.retry import ATTEMPTS_MAX
from payments.order_service.endpoint import Exchange
from tests.callbacks.conftest import (
    Line,
    PlayedEndpoint,
    answered,
    dispatching_to,
    failed,
    opened,
)
from tests.callbacks.outbox import Outbox, charges, of
from tests.machine import within
from tests.support import until

pytestmark = [pytest.mark.anyio, pytest.mark.usefixtures("looks_often")]

A, B = uuid.uuid4(), uuid.uuid4()


async def test_while_the_breaker_is_open_nothing_is_sent_or_used_up(
    outbox: Outbox, endpoint: PlayedEndpoint
) -> None:
    await outbox.log(*charges(uuid.uuid4() for _ in range(100)))
    endpoint.answer = lambda _: failed()
    breaker = Breaker(orders_min=5, open_min_s=0.3, open_max_s=0.3)
    most_used = dispatching.CLAIM_MAX + 3 * PROBES_MAX
    async with dispatching_to(endpoint, outbox, breaker=breaker, rng=lambda: 0.999) as dispatcher:
        await until(lambda: dispatcher.state == "open")
        sent = len(endpoint.bodies)
        assert sent <= dispatching.CONCURRENCY_MAX
        used = sum(n for (n,) in outbox.rows("attempts"))
        await until(lambda: len(endpoint.bodies) >= sent + 3 * PROBES_MAX)
        probed = [body["order_id"] for body in endpoint.bodies[sent : sent + 3 * PROBES_MAX]]
        assert len(set(probed)) == len(probed), "an order is probed twice, and others never"
        assert sum(n for (n,) in outbox.rows("attempts")) <= max(used, most_used)
        endpoint.answer = lambda _: answered(200)
        with within(3):
            await until(lambda: set(outbox.states()) == {"delivered"})
        assert dispatcher.state == "closed"


@pytest.mark.parametrize(
    ("exchange", "is_outage"),
    [
        (failed(), True),
        (answered(500, content_type="application/json"), True),
        (answered(502), True),
        (answered(502, content_type="application/json"), False),
        (answered(404), False),
    ],
)
async def test_an_outage_is_three_orders_that_fail_at_the_endpoint(
    outbox: Outbox, endpoint: PlayedEndpoint, exchange: Exchange, is_outage: bool
) -> None:
    endpoint.answer = lambda _: exchange
    async with dispatching_to(endpoint, outbox, rng=lambda: 0.999) as dispatcher:
        for _ in range(3):
            assert dispatcher.state == "closed"
            await outbox.log(*charges([uuid.uuid4()]))
            dispatcher.wake()
            await until(lambda: all(tried for (tried,) in outbox.rows("attempts > 0")))
        assert (dispatcher.state != "closed") is is_outage


async def test_orders_that_failed_before_make_no_outage(
    outbox: Outbox, endpoint: PlayedEndpoint
) -> None:
    """Else each end of one, which makes them due, would be the beginning of the next."""
    await outbox.log(*charges(uuid.uuid4() for _ in range(20)))
    outbox.connection.execute("UPDATE callback_deliveries SET attempts = 1")
    endpoint.answer = lambda _: failed()
    async with dispatching_to(endpoint, outbox, rng=lambda: 0.999) as dispatcher:
        await until(lambda: len(endpoint.bodies) >= 20)
        assert dispatcher.state == "closed"
        endpoint.answer = lambda body: answered(200) if body["order_id"] == str(A) else failed()
        await outbox.log(*charges([A]))
        await until(lambda: outbox.states()[-1] == "delivered")


async def test_what_the_end_of_an_outage_causes_does_not_count(
    outbox: Outbox, endpoint: PlayedEndpoint
) -> None:
    await outbox.log(*charges([A]))
    outbox.connection.execute("UPDATE callback_deliveries SET attempts = 7")
    outbox.connection.execute("UPDATE callback_lanes SET failing = true, excused = true")
    endpoint.answer = lambda _: answered(404)
    async with dispatching_to(endpoint, outbox, rng=lambda: 0.999):
        for attempts in (7, 8, 9):
            outbox.make_all_due()
            await until(lambda n=attempts: len(outbox.attempts()) == n - 6)
            assert outbox.rows("attempts") == [(attempts,)]


@pytest.mark.usefixtures("looks_often")
@pytest.mark.parametrize("delivered_before", [False, True])
async def test_what_failed_before_the_process_began_may_be_of_the_same_outage(
    outbox: Outbox, endpoint: PlayedEndpoint, delivered_before: bool
) -> None:
    """Unless that process has seen the endpoint well since."""
    await outbox.log(*charges([A]))
    outbox.pause()
    outbox.connection.execute("UPDATE callback_lanes SET away_at = now() - interval '50 minutes'")
    breaker = opened(60)  # nothing is sent before all is as it is to be
    async with dispatching_to(endpoint, outbox, breaker=breaker) as dispatcher:
        dispatcher._health._first_delivered_at = 0.0 if delivered_before else math.inf
        await outbox.log(*charges([uuid.uuid4()]))
        breaker._probe_at = time.monotonic()
        await until(lambda: dispatcher.state == "closed")
        await until(lambda: "delivered" in outbox.states())
        if delivered_before:
            await asyncio.sleep(0.3)
            assert outbox.states() == ["due", "delivered"]
        else:
            await until(lambda: outbox.states() == ["delivered", "delivered"])


async def test_an_endpoint_that_only_refuses_ends_nobodys_pause(
    outbox: Outbox, endpoint: PlayedEndpoint
) -> None:
    """Each refusal would close the breaker, and all others would pay for it with an attempt."""
    await outbox.log(*of(A, "refused").charged().facts)
    await outbox.log(*charges(uuid.uuid4() for _ in range(10)))
    outbox.pause()
    endpoint.answer = lambda body: answered(400) if body["order_id"] == str(A) else failed()
    async with dispatching_to(endpoint, outbox, breaker=opened()) as dispatcher:
        await until(lambda: dispatcher.state == "closed")
        await asyncio.sleep(0.2)
    assert outbox.paused() == 11


async def test_a_probe_before_its_time_costs_the_delivery_nothing(
    outbox: Outbox, endpoint: PlayedEndpoint
) -> None:
    await outbox.log(*of(A, "a").charged().facts)
    outbox.pause(failing=False)
    outbox.connection.execute("UPDATE callback_deliveries SET attempts = %s", [ATTEMPTS_MAX - 1])
    endpoint.answer = lambda _: failed()
    async with dispatching_to(endpoint, outbox, breaker=opened(0.02)):
        await until(lambda: len(outbox.attempts()) >= 5)
    assert outbox.states() == ["due"]
    assert outbox.rows("attempts") == [(ATTEMPTS_MAX - 1,)]
    assert outbox.paused() == 1


async def test_when_the_endpoint_is_back_all_pauses_end_however_many(
    outbox: Outbox, endpoint: PlayedEndpoint, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(dispatching, "REOPEN_LANES", 3)
    await outbox.log(*charges(uuid.uuid4() for _ in range(20)))
    outbox.pause()
    async with dispatching_to(endpoint, outbox, breaker=opened()):
        await until(lambda: set(outbox.states()) == {"delivered"})


class Stored:
    """The statements of the outbox, with something before each that the test says."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self._make_due, self._record = statements.make_due, statements.record
        self.ends = 0  # how often pauses were ended
        self.before_end_s: list[float | Exception] = []  # of each, first to last
        self.recording = asyncio.Event()  # until it is set nothing is recorded
        self.recording.set()
        monkeypatch.setattr(statements, "make_due", self.make_due)
        monkeypatch.setattr(statements, "record", self.record)

    async def make_due(self, *args: Any, **options: Any) -> int:
        self.ends += 1
        before = self.before_end_s.pop(0) if self.before_end_s else 0.0
        if isinstance(before, Exception):
            raise before
        await asyncio.sleep(before)
        return await self._make_due(*args, **options)

    async def record(
        self, connection: psycopg.AsyncConnection[Any], results: Sequence[Result]
    ) -> set[int]:
        await self.recording.wait()
        return await self._record(connection, results)


@pytest.fixture
async def stored(monkeypatch: pytest.MonkeyPatch) -> Stored:
    return Stored(monkeypatch)


async def test_what_failed_first_is_due_as_well_although_the_database_counts_back_late(
    outbox: Outbox, endpoint: PlayedEndpoint, stored: Stored
) -> None:
    """It is recorded within the time that the statement takes to begin."""
    stored.before_end_s = [0.5]
    async with dispatching_to(endpoint, outbox, rng=lambda: 0.999) as dispatcher:
        await outbox.log(*charges([A]))
        dispatcher.wake()
        await until(lambda: outbox.states() == ["delivered"])
        endpoint.answer = lambda _: failed()
        await outbox.log(*charges(uuid.uuid4() for _ in range(ORDERS_MIN)))
        dispatcher.wake()
        await until(lambda: all(tried for (tried,) in outbox.rows("attempts > 0")))
        assert dispatcher.state != "closed"
        in_an_hour = "UPDATE callback_lanes SET next_at = now() + interval '1 h'"
        outbox.connection.execute(in_an_hour)
        endpoint.answer = lambda _: answered(200)
        await until(lambda: set(outbox.states()) == {"delivered"})


@pytest.mark.parametrize("exchange", [failed(), answered(404)])
async def test_a_probe_that_fails_once_the_outage_is_over_is_due_as_the_others(
    outbox: Outbox, endpoint: PlayedEndpoint, exchange: Exchange
) -> None:
    """Unless it is the order's own failure."""
    await outbox.log(*charges([A, B]))
    outbox.pause()
    endpoint.held = held = asyncio.Event()
    breaker = opened(60)
    async with dispatching_to(endpoint, outbox, breaker=breaker, rng=lambda: 0.999) as dispatcher:
        breaker._probe_at = time.monotonic()
        await until(lambda: endpoint.under_way)
        (probed,) = endpoint.under_way
        endpoint.held = None
        breaker._probe_at = time.monotonic()
        await until(lambda: "delivered" in outbox.states())
        await until(lambda: dispatcher._health.over_since is None)
        assert outbox.states().count("due") == 1
        endpoint.answer = lambda _: (
            exchange if endpoint.orders.count(probed) == 1 else answered(200)
        )
        held.set()
        await until(lambda: len(outbox.attempts()) >= 2)
        if exchange.status is None:
            await until(lambda: set(outbox.states()) == {"delivered"})
            assert set(outbox.rows("attempts")) == {(0,), (1,)}, "an early one counts"
        else:
            assert outbox.paused() == 1


async def test_a_failure_that_was_not_recorded_when_the_outage_ended_is_due_as_well(
    outbox: Outbox, endpoint: PlayedEndpoint, stored: Stored
) -> None:
    await outbox.log(*charges([A, B, uuid.uuid4()]))
    outbox.pause()
    holds = [asyncio.Event(), asyncio.Event()]
    breaker = opened(60)
    async with dispatching_to(endpoint, outbox, breaker=breaker) as dispatcher:
        for n, held in enumerate(holds, 1):
            endpoint.held = held
            breaker._probe_at = time.monotonic()
            await until(lambda n=n: len(endpoint.under_way) == n)
        endpoint.held = None
        endpoint.answer = lambda _: failed()
        stored.recording.clear()
        breaker._probe_at = time.monotonic()
        await until(lambda: len(endpoint.orders) == 3 and len(endpoint.under_way) == 2)
        holds[0].set()
        await until(lambda: len(endpoint.under_way) == 1)
        assert dispatcher.state != "closed"
        endpoint.answer = lambda _: answered(200)
        holds[1].set()
        await until(lambda: dispatcher.state == "closed")
        stored.recording.set()
        await until(lambda: set(outbox.states()) == {"delivered"})


async def test_pauses_end_also_if_the_database_is_lost_meanwhile_or_another_outage_ends(
    outbox: Outbox, endpoint: PlayedEndpoint, stored: Stored
) -> None:
    await outbox.log(*charges([A, B]))
    outbox.pause()
    stored.before_end_s = [psycopg.OperationalError("played"), 0.5]
    async with dispatching_to(endpoint, outbox, breaker=opened()) as dispatcher:
        await until(lambda: stored.ends == 2)
        dispatcher._health.over_since = time.monotonic()
        await until(lambda: set(outbox.states()) == {"delivered"})
        await until(lambda: stored.ends == 3)
        await until(lambda: dispatcher._health.over_since is None)


async def test_pauses_end_at_the_first_delivery_also_when_the_probe_is_refused(
    outbox: Outbox, endpoint: PlayedEndpoint
) -> None:
    await outbox.log(*charges(uuid.uuid4() for _ in range(20)))
    outbox.connection.execute("UPDATE callback_lanes SET claim = nextval('callback_claims')")
    await outbox.log(*of(A, "probed first").charged().facts)
    outbox.pause()
    endpoint.answer = lambda body: answered(404 if body["order_id"] == str(A) else 200)
    async with dispatching_to(endpoint, outbox, breaker=opened(), rng=lambda: 0.999) as dispatcher:
        await until(lambda: outbox.attempts() == [("http_error", 404)])
        assert dispatcher.state == "closed"
        assert outbox.paused() == 21
        await outbox.log(*of(B, "new").charged().facts)
        await until(lambda: outbox.states().count("delivered") == 21)
    assert outbox.paused() == 1, "the one that was refused waits for that"


async def test_a_probe_that_was_not_sent_gives_its_permit_back(
    outbox: Outbox, endpoint: PlayedEndpoint, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(dispatching, "BEGIN_WITHIN_S", -1.0)
    await outbox.log(*of(A, "a").charged().facts)
    async with dispatching_to(endpoint, outbox, breaker=opened()) as dispatcher:
        await until(outbox.claimed)
        await asyncio.sleep(0.1)  # until it was given up
        monkeypatch.setattr(dispatching, "BEGIN_WITHIN_S", 4.0)
        await outbox.log(*of(B, "b").charged().facts)
        await until(lambda: "delivered" in outbox.states())
        assert dispatcher.state == "closed"


async def test_a_probe_is_sent_however_many_orders_have_nothing_to_send(
    outbox: Outbox, endpoint: PlayedEndpoint
) -> None:
    """They are superseded, and none of them was ever tried: their turn is before the other's."""
    await outbox.log(*of(A, "a").charged().facts)
    outbox.connection.execute("UPDATE callback_lanes SET claim = nextval('callback_claims')")
    orders = [uuid.uuid4() for _ in range(100)]
    await outbox.log(*(fact for o in orders for fact in of(o, str(o)).declined().facts))
    outbox.connection.execute(
        "INSERT INTO payments (id, merchant_order_id, status)"
        " SELECT gen_random_uuid(), id, 'SUCCESS' FROM unnest(%s) AS id",
        [orders],
    )
    async with dispatching_to(endpoint, outbox, breaker=opened()):
        await until(lambda: "delivered" in outbox.states())
    assert endpoint.told() == ["SUCCESS"]


async def test_an_outage_is_told_once_and_its_end_as_well(
    outbox: Outbox, endpoint: PlayedEndpoint, lines: list[Line], monkeypatch: pytest.MonkeyPatch
) -> None:
    """One that is over at once is not: orders of a part that is down may look like it."""
    breaker = Breaker(open_min_s=0.01, open_max_s=0.01)
    async with dispatching_to(endpoint, outbox, breaker=breaker) as dispatcher:
        for told_after_s in (5.0, 0.1):
            monkeypatch.setattr(endpoint_health, "TOLD_AFTER_S", told_after_s)
            endpoint.answer = lambda _: failed()
            await outbox.log(*charges(uuid.uuid4() for _ in range(3)))
            dispatcher.wake()
            await until(lambda: dispatcher.state != "closed")
            await asyncio.sleep(0.3)
            endpoint.answer = lambda _: answered(200)
            await until(lambda: set(outbox.states()) == {"delivered"})
            assert bool(lines) is (told_after_s < 1)
    assert lines == [
        ("WARNING", "Order Service is unavailable: callbacks wait", {"reason": "ConnectError"}),
        ("INFO", "Order Service is available again", {}),
    ]


async def test_many_refusals_that_are_over_soon_are_not_told(
    outbox: Outbox, endpoint: PlayedEndpoint, lines: list[Line]
) -> None:
    """They are a matter of these orders."""
    endpoint.answer = lambda body: answered(200 if body["order_id"] == str(A) else 404)
    async with dispatching_to(endpoint, outbox) as dispatcher:
        await outbox.log(*charges(uuid.uuid4() for _ in range(3 * endpoint_health.REFUSED_MAX)))
        dispatcher.wake()
        await until(lambda: len(endpoint.bodies) > 3 * endpoint_health.REFUSED_MAX)
        await outbox.log(*charges([A]))
        dispatcher.wake()
        await until(lambda: "delivered" in outbox.states())
    assert lines == []


async def test_refusals_with_deliveries_between_are_not_told(
    outbox: Outbox, endpoint: PlayedEndpoint, lines: list[Line], monkeypatch: pytest.MonkeyPatch
) -> None:
    """A few that are refused are a matter of theirs; many in a row, of Order Service."""
    monkeypatch.setattr(endpoint_health, "TOLD_AFTER_S", 0.0)
    refused_first = endpoint_health.REFUSED_MAX - 1
    endpoint.answer = lambda body: answered(
        404 if len(endpoint.told(uuid.UUID(body["order_id"]))) <= refused_first else 200
    )
    async with dispatching_to(endpoint, outbox) as dispatcher:
        for order_id in (A, B):
            await outbox.log(*of(order_id, str(order_id)).charged().facts)
            dispatcher.wake()
            await until(lambda: set(outbox.states()) == {"delivered"})
    assert len(endpoint.bodies) == 2 * (refused_first + 1)
    assert lines == []
