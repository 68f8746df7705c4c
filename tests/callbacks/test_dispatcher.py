"""The dispatcher: what is sent, in which order, and what becomes of it."""

import asyncio
import uuid
from collections.abc import Callable
from datetime import timedelta
from typing import Any

import psycopg
import pytest

from payments.callbacks import dispatcher as dispatching
from payments.callbacks import outbox as statements
from payments.callbacks.breaker import Breaker
from payments.callbacks.dispatcher import Dispatcher
from payments.callbacks.outbox import make_due, record, redrive
from payments.callbacks.retry import ATTEMPTS_MAX
from payments.observability.metrics import Telemetry
from payments.order_service import TIMEOUT_S
from payments.order_service.endpoint import Exchange
from tests.callbacks.conftest import (
    PlayedEndpoint,
    answered,
    dispatching_to,
    failed,
)
from tests.callbacks.outbox import Outbox, claim_some, of, result_of
from tests.machine import Machine, bound, within
from tests.support import until

pytestmark = [pytest.mark.anyio, pytest.mark.usefixtures("looks_often")]

A, B = uuid.uuid4(), uuid.uuid4()
Make = Callable[..., Dispatcher]


def never_opening() -> Breaker:
    return Breaker(orders_min=10_000)


async def test_it_posts_the_documented_body_once(outbox: Outbox, endpoint: PlayedEndpoint) -> None:
    charged = of(A, "k").charged()
    await outbox.log(*charged.facts)
    async with dispatching_to(endpoint, outbox):
        await until(lambda: outbox.states() == ["delivered"])
        await asyncio.sleep(0.1)
    fact = charged.facts[1]
    assert endpoint.bodies == [
        {
            "order_id": str(A),
            "payment_id": str(charged.id),
            "status": "SUCCESS",
            "event_id": str(fact.event_id),
            "sequence": 2,
            "occurred_at": fact.occurred_at.isoformat().replace("+00:00", "Z"),
            "amount_cents": 1500,
            "currency": "INR",
        }
    ]
    assert outbox.attempts() == [("delivered", 200)]
    assert outbox.rows("attempts", "finished_at IS NOT NULL") == [(1, True)]
    assert outbox.lanes() == []


async def test_what_comes_while_it_runs_is_sent_at_once(
    outbox: Outbox, endpoint: PlayedEndpoint, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(dispatching, "POLL_S", 60.0)
    async with dispatching_to(endpoint, outbox) as dispatcher:
        await asyncio.sleep(0.1)
        await outbox.log(*of(A, "k").charged().facts)
        dispatcher.wake()
        await until(lambda: outbox.states() == ["delivered"])


async def test_an_order_is_told_in_order_and_one_at_a_time(
    outbox: Outbox, endpoint: PlayedEndpoint
) -> None:
    """The endpoint asserts that no order has two under way."""
    endpoint.held = asyncio.Event()
    every = ("SUCCESS", "FAILED", "REFUNDED")
    await outbox.log(*of(A, "a").charged().refunded().facts, statuses=every)
    await outbox.log(*of(B, "b").charged().facts, statuses=every)
    async with dispatching_to(endpoint, outbox):
        await until(lambda: len(endpoint.bodies) == 2)
        await asyncio.sleep(0.1)
        assert sorted(endpoint.under_way) == sorted([str(A), str(B)])
        endpoint.held.set()
        await until(lambda: set(outbox.states()) == {"delivered"})
    assert endpoint.told(A) == ["SUCCESS", "REFUNDED"]


async def test_several_dispatchers_share_the_work(outbox: Outbox) -> None:
    endpoints = [PlayedEndpoint() for _ in range(3)]
    orders = [uuid.uuid4() for _ in range(200)]
    await outbox.log(*(fact for o in orders for fact in of(o, str(o)).charged().facts))
    async with (
        dispatching_to(endpoints[0], outbox),
        dispatching_to(endpoints[1], outbox),
        dispatching_to(endpoints[2], outbox),
    ):
        await until(lambda: set(outbox.states()) == {"delivered"})
    told = [body["order_id"] for endpoint in endpoints for body in endpoint.bodies]
    assert sorted(told) == sorted(map(str, orders))
    assert sum(bool(endpoint.bodies) for endpoint in endpoints) > 1


@pytest.mark.parametrize(
    "exchange",
    [
        *(answered(status) for status in (100, 302, 400, 404, 429, 500, 503)),
        *(failed(error) for error in ("unreachable", "timeout", "protocol", "forbidden_address")),
    ],
    ids=lambda exchange: str(exchange.status or exchange.error),
)
async def test_what_is_not_taken_is_sent_again(
    outbox: Outbox, endpoint: PlayedEndpoint, exchange: Exchange
) -> None:
    await outbox.log(*of(A, "a").charged().facts)
    endpoint.answer = lambda _: exchange if len(endpoint.bodies) < 3 else answered(204)
    async with dispatching_to(endpoint, outbox):
        await until(lambda: outbox.states() == ["delivered"])
    assert len(outbox.attempts()) == 3
    assert outbox.attempts()[-1] == ("delivered", 204)
    assert [status for _, status in outbox.attempts()[:2]] == [exchange.status] * 2
    assert len({body["event_id"] for body in endpoint.bodies}) == 1


async def test_between_attempts_it_waits_longer_each_time(
    outbox: Outbox, endpoint: PlayedEndpoint, machine: Machine
) -> None:
    await outbox.log(*of(A, "a").charged().facts)
    endpoint.answer = lambda _: answered(500)
    pauses: list[float] = []
    pause = (
        "SELECT extract(epoch FROM next_at - (SELECT max(started_at) FROM callback_attempts))"
        "::float8, failing FROM callback_lanes"
    )
    async with dispatching_to(endpoint, outbox, rng=lambda: 0.999):
        for tried in range(1, 5):
            await until(lambda n=tried: len(outbox.attempts()) == n)
            ((pause_s, failing),) = outbox.connection.execute(pause.encode()).fetchall()
            assert failing
            pauses.append(pause_s)
            outbox.make_all_due()
    for n, pause_s in enumerate(pauses):
        assert pause_s > 2**n * 0.5
        bound(pause_s, 2**n + 0.25, machine)  # from the attempt's start


async def test_retry_after_is_waited_for(outbox: Outbox, endpoint: PlayedEndpoint) -> None:
    await outbox.log(*of(A, "a").charged().facts)
    endpoint.answer = lambda _: answered(503, retry_after="120")
    later = "SELECT next_at > now() + interval '110 s' FROM callback_lanes"
    async with dispatching_to(endpoint, outbox, breaker=never_opening()):
        await until(lambda: len(outbox.attempts()) == 1)
        await until(lambda: outbox.connection.execute(later).fetchone() == (True,))


async def test_410_ends_it(outbox: Outbox, endpoint: PlayedEndpoint) -> None:
    await outbox.log(*of(A, "a").charged().facts)
    endpoint.answer = lambda _: answered(410)
    async with dispatching_to(endpoint, outbox):
        await until(lambda: outbox.states() == ["dead"])
    assert outbox.attempts() == [("gone", 410)]
    assert outbox.lanes() == []


async def test_after_its_last_attempt_it_is_dead_and_frees_its_order(
    outbox: Outbox, endpoint: PlayedEndpoint
) -> None:
    every = ("SUCCESS", "FAILED", "REFUNDED")
    await outbox.log(*of(A, "a").charged().refunded().facts, statuses=every)
    outbox.connection.execute(
        "UPDATE callback_deliveries SET attempts = %s, due_since = now() - interval '72 h'"
        " WHERE status = 'SUCCESS'",
        [ATTEMPTS_MAX - 2],
    )
    endpoint.answer = lambda body: answered(500 if body["status"] == "SUCCESS" else 200)
    async with dispatching_to(endpoint, outbox):
        await until(lambda: outbox.states() == ["dead", "delivered"])
    assert endpoint.told() == ["SUCCESS", "SUCCESS", "REFUNDED"]
    assert outbox.rows("attempts")[0] == (ATTEMPTS_MAX,)


async def test_an_order_in_trouble_delays_nobody(outbox: Outbox, endpoint: PlayedEndpoint) -> None:
    """However many are: of the failing ones only a quarter as many as fit are under way."""
    bad = [uuid.uuid4() for _ in range(200)]
    await outbox.log(*(fact for o in bad for fact in of(o, str(o)).charged().facts))
    endpoint.answer = lambda body: answered(500)
    breaker = never_opening()
    async with dispatching_to(endpoint, outbox, rng=lambda: 0.999, breaker=breaker):
        await until(lambda: len(outbox.attempts()) >= 200)
        endpoint.held = asyncio.Event()
        outbox.make_all_due()
        await until(lambda: len(endpoint.under_way) >= dispatching.FAILING_MAX)
        endpoint.answer = lambda body: answered(200)
        await outbox.log(*of(A, "good").charged().facts)
        await until(lambda: str(A) in endpoint.under_way)
        assert len(endpoint.under_way) == dispatching.FAILING_MAX + 1
        endpoint.held.set()


async def test_a_failed_payment_that_waits_is_superseded_by_a_success(
    outbox: Outbox, endpoint: PlayedEndpoint
) -> None:
    await outbox.log(*of(A, "a").declined().facts)
    endpoint.answer = lambda body: answered(500 if body["status"] == "FAILED" else 200)
    async with dispatching_to(endpoint, outbox, rng=lambda: 0.999) as dispatcher:
        await until(lambda: len(outbox.attempts()) == 1)
        outbox.connection.execute("UPDATE callback_lanes SET next_at = now() + interval '1 h'")
        await outbox.log(*of(A, "b").charged().facts)
        dispatcher.wake()
        with within(1.5):
            await until(lambda: outbox.states() == ["superseded", "delivered"])


async def test_a_success_that_comes_while_a_failed_is_in_flight_is_not_kept_waiting(
    outbox: Outbox, endpoint: PlayedEndpoint
) -> None:
    endpoint.held = asyncio.Event()
    await outbox.log(*of(A, "a").declined().facts)
    endpoint.answer = lambda body: answered(500 if body["status"] == "FAILED" else 200)
    async with dispatching_to(endpoint, outbox, rng=lambda: 0.999):
        await until(lambda: endpoint.under_way)
        await outbox.log(*of(A, "b").charged().facts)
        endpoint.held.set()
        await until(lambda: outbox.states() == ["superseded", "delivered"])
    assert endpoint.told() == ["FAILED", "SUCCESS"]


async def test_a_failed_is_not_sent_once_the_read_model_knows_a_success(
    outbox: Outbox, endpoint: PlayedEndpoint
) -> None:
    await outbox.log(*of(A, "a").declined().facts)
    outbox.connection.execute(
        "INSERT INTO payments (id, merchant_order_id, status) VALUES (%s, %s, 'SUCCESS')",
        [uuid.uuid4(), A],
    )
    async with dispatching_to(endpoint, outbox):
        await until(lambda: outbox.states() == ["superseded"])
    assert endpoint.bodies == []
    assert outbox.lanes() == []


async def test_a_claim_holds_the_lane_until_its_lease_is_over(outbox: Outbox) -> None:
    every = ("SUCCESS", "FAILED", "REFUNDED")
    await outbox.log(*of(A, "a").charged().refunded().facts, statuses=every)
    async with await outbox.database.connect("a") as one, await outbox.database.connect("b") as two:
        (first,) = await claim_some(one)
        assert await claim_some(two) == []
        assert await claim_some(two, probing=True) == []
        await redrive(two, [first.event_id])
        await make_due(two, 60, 1000)
        assert await claim_some(two) == []
        await asyncio.sleep(0.35)
        (second,) = await claim_some(two)
        assert (second.event_id, second.attempt) == (first.event_id, 2)
        assert second.claim > first.claim
        # The first sender was frozen, and comes too late: only its attempt is noted.
        assert await record(one, [result_of(first, "delivered")]) == set()
        assert outbox.states() == ["due", "due"]
        assert outbox.attempts() == [("delivered", 200)]
        assert await record(two, [result_of(second, "delivered")]) == {second.claim}
        assert await record(two, [result_of(second, "delivered")]) == set()
        assert outbox.states() == ["delivered", "due"]
        assert outbox.attempts() == [("delivered", 200), ("delivered", 200)]


async def test_a_lane_that_went_and_came_again_takes_no_old_result(outbox: Outbox) -> None:
    await outbox.log(*of(A, "a").charged().facts)
    async with await outbox.database.connect("a") as own:
        (old,) = await claim_some(own, lease_s=0)
        (now,) = await claim_some(own, lease_s=10)
        await record(own, [result_of(now, "delivered")])
        assert outbox.lanes() == []
        assert await redrive(own, [now.event_id]) == [now.event_id]
        (again,) = await claim_some(own, lease_s=10)
        assert await record(own, [result_of(old, "dead"), result_of(now, "dead")]) == set()
        assert outbox.states() == ["due"]
        assert (again.attempt, again.event_id) == (1, old.event_id)


async def test_a_sender_that_died_leaves_an_attempt_behind(
    outbox: Outbox, endpoint: PlayedEndpoint
) -> None:
    await outbox.log(*of(A, "a").charged().facts)
    async with await outbox.database.connect("a") as own:
        await claim_some(own, lease_s=0.2)
    async with dispatching_to(endpoint, outbox):
        await asyncio.sleep(0.1)
        assert endpoint.bodies == []
        await until(lambda: outbox.states() == ["delivered"])
    assert outbox.attempts() == [("interrupted", None), ("delivered", 200)]
    assert outbox.rows("attempts") == [(2,)]


async def test_frozen_between_claim_and_exchange_it_sends_nothing(
    outbox: Outbox, endpoint: PlayedEndpoint, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(dispatching, "BEGIN_WITHIN_S", -1.0)
    await outbox.log(*of(A, "a").charged().facts)
    async with dispatching_to(endpoint, outbox):
        await until(outbox.claimed)
        await asyncio.sleep(0.1)
    assert endpoint.bodies == []
    assert outbox.states() == ["due"]


async def test_on_stop_it_finishes_what_is_under_way_and_claims_nothing_more(
    outbox: Outbox, endpoint: PlayedEndpoint
) -> None:
    endpoint.held = asyncio.Event()
    await outbox.log(*of(A, "a").charged().facts)
    async with dispatching_to(endpoint, outbox) as dispatcher:
        await until(lambda: endpoint.under_way)
        dispatcher.finish()
        await outbox.log(*of(B, "b").charged().facts)
        stopping = asyncio.create_task(dispatcher.stop(5))
        await asyncio.sleep(0.1)
        assert not stopping.done()
        endpoint.held.set()
        await stopping
    assert outbox.rows("order_id", "state") == [(A, "delivered"), (B, "due")]
    assert endpoint.told() == ["SUCCESS"]


async def test_what_is_cut_off_at_the_end_is_noted_and_waits_as_long_as_it_may_be_running(
    outbox: Outbox, endpoint: PlayedEndpoint
) -> None:
    telemetry = Telemetry()
    endpoint.held = asyncio.Event()
    await outbox.log(*of(A, "a").charged().facts)
    async with dispatching_to(endpoint, outbox, telemetry=telemetry) as dispatcher:
        await until(lambda: endpoint.under_way)
        with within(1.5):
            await dispatcher.stop(0.3)
    assert endpoint.under_way == []
    waits = "SELECT busy_until - now(), next_at = busy_until, in_flight FROM callback_lanes"
    ((busy, until_then, in_flight),) = outbox.connection.execute(waits).fetchall()
    assert timedelta(seconds=TIMEOUT_S - 5) < busy < timedelta(seconds=TIMEOUT_S)
    assert (until_then, in_flight) == (True, None)
    assert outbox.attempts() == [("end_unknown", None)]
    assert outbox.rows("state", "attempts") == [("due", 0)]
    shown = telemetry.exposition().decode()
    assert 'payments_callback_attempts_total{outcome="end_unknown"} 1.0' in shown


async def test_what_is_cut_off_while_the_database_is_away_keeps_its_lease(
    outbox: Outbox, endpoint: PlayedEndpoint, monkeypatch: pytest.MonkeyPatch
) -> None:
    async def away(connection: Any, results: Any) -> set[int]:
        raise psycopg.OperationalError("away")

    endpoint.held = asyncio.Event()
    await outbox.log(*of(A, "a").charged().facts)
    async with dispatching_to(endpoint, outbox) as dispatcher:
        await until(lambda: endpoint.under_way)
        monkeypatch.setattr(statements, "record", away)
        await dispatcher.stop(0.1)
    leased = "SELECT next_at - now(), in_flight IS NOT NULL FROM callback_lanes"
    ((lease, in_flight),) = outbox.connection.execute(leased).fetchall()
    assert lease > timedelta(seconds=2 * TIMEOUT_S)
    assert in_flight


async def test_it_outlives_its_database(outbox: Outbox, endpoint: PlayedEndpoint) -> None:
    """Every result is recorded in the end, and nothing is sent twice for it."""
    kill = (
        "SELECT pg_terminate_backend(pid) FROM pg_stat_activity"
        " WHERE application_name = 'payments callbacks' AND datname = current_database()"
    )
    orders = [uuid.uuid4() for _ in range(60)]
    async with dispatching_to(endpoint, outbox) as dispatcher:
        for number, o in enumerate(orders):
            await outbox.log(*of(o, str(o)).charged().facts)
            dispatcher.wake()
            if number % 10 == 0:
                outbox.connection.execute(kill)
        await until(lambda: set(outbox.states()) == {"delivered"})
    assert {body["order_id"] for body in endpoint.bodies} == set(map(str, orders))


async def test_the_metrics_say_what_came_of_attempts(
    outbox: Outbox, endpoint: PlayedEndpoint
) -> None:
    telemetry = Telemetry()
    await outbox.log(*of(A, "a").charged().facts)
    answers = [failed(), failed("timeout"), answered(500), answered(200)]
    endpoint.answer = lambda _: answers.pop(0)
    async with dispatching_to(endpoint, outbox, telemetry=telemetry):
        await until(lambda: outbox.states() == ["delivered"])
    shown = telemetry.exposition().decode()
    for outcome in ("unreachable", "timeout", "http_error", "delivered"):
        assert f'payments_callback_attempts_total{{outcome="{outcome}"}} 1.0' in shown
    assert "payments_callback_duration_seconds_count 4.0" in shown
