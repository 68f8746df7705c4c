"""What may be running at Order Service is not repeated: nothing of its order is sent meanwhile."""

import asyncio
import uuid
from collections.abc import Awaitable, Callable
from datetime import timedelta
from typing import Any

import psycopg
import pytest

from payments.callbacks import lease_s
from payments.callbacks.breaker import Breaker
from payments.callbacks.outbox import make_due, record, redrive
from payments.order_service import TIMEOUT_S
from payments.order_service.endpoint import Exchange
from payments.settings import Settings
from tests.callbacks.conftest import PlayedEndpoint, answered, dispatching_to, failed, opened
from tests.callbacks.outbox import ALL, Outbox, claim_some, of, result_of
from tests.support import until

pytestmark = [pytest.mark.anyio, pytest.mark.usefixtures("looks_often")]

A = uuid.uuid4()
BUSY_S = 0.5
Connection = psycopg.AsyncConnection[Any]


async def is_redriven(outbox: Outbox, own: Connection) -> None:
    assert await redrive(own, outbox.events()[:1]) == outbox.events()[:1]


async def sees_the_end_of_an_outage(outbox: Outbox, own: Connection) -> None:
    assert await make_due(own, 60, 10) == 1


async def is_probed(outbox: Outbox, own: Connection) -> None:
    assert await claim_some(own, probing=True) == []


async def is_overtaken(outbox: Outbox, own: Connection) -> None:
    await outbox.log(*of(A, "paid at last").charged().facts)
    assert outbox.states() == ["superseded", "due"]


HURRIES = [is_redriven, sees_the_end_of_an_outage, is_probed, is_overtaken]


@pytest.mark.parametrize("hurry", HURRIES)
async def test_however_it_is_hurried_an_order_waits(
    outbox: Outbox, hurry: Callable[[Outbox, Connection], Awaitable[None]]
) -> None:
    await outbox.log(*of(A, "a").declined().facts)
    async with await outbox.database.connect("a") as own:
        (claimed,) = await claim_some(own, lease_s=10)
        timed_out = result_of(claimed, "due")._replace(outcome="timeout", away=True)
        await record(own, [timed_out._replace(delay_s=3600.0, busy_s=BUSY_S, asked_s=0.0)])
        began = asyncio.get_running_loop().time()
        await hurry(outbox, own)
        assert await claim_some(own) == []
        await asyncio.sleep(BUSY_S - (asyncio.get_running_loop().time() - began) + 0.02)
        if hurry is not is_probed:
            assert [each.order_id for each in await claim_some(own, lease_s=10)] == [A]
        else:
            assert [each.order_id for each in await claim_some(own, probing=True)] == [A]


async def test_a_success_waits_for_a_failed_that_came_back_without_an_end(outbox: Outbox) -> None:
    await outbox.log(*of(A, "a").declined().facts)
    async with await outbox.database.connect("a") as own:
        (claimed,) = await claim_some(own, lease_s=10)
        await outbox.log(*of(A, "b").charged().facts)
        timed_out = result_of(claimed, "due")._replace(outcome="timeout", delay_s=3600.0)
        await record(own, [timed_out._replace(busy_s=BUSY_S)])
        assert outbox.states() == ["superseded", "due"]
        assert await claim_some(own) == []
        await asyncio.sleep(BUSY_S + 0.02)
        assert [each.status for each in await claim_some(own)] == ["SUCCESS"]


async def test_what_died_of_it_waits_when_it_is_redriven(outbox: Outbox) -> None:
    await outbox.log(*of(A, "a").charged().facts)
    async with await outbox.database.connect("a") as own:
        (claimed,) = await claim_some(own, lease_s=10)
        dead = result_of(claimed, "dead")._replace(outcome="timeout", busy_s=BUSY_S)
        await record(own, [dead])
        await redrive(own, outbox.events())
        assert await claim_some(own) == []
        await asyncio.sleep(BUSY_S + 0.02)
        (claimed,) = await claim_some(own, lease_s=10)
        await record(own, [result_of(claimed, "dead")._replace(busy_s=0.1)])
        # Nobody redrives it: its lane goes by itself.
        await asyncio.sleep(0.12)
        assert await claim_some(own) == []
    assert outbox.lanes() == []


async def test_after_one_died_of_it_the_next_of_its_order_waits(outbox: Outbox) -> None:
    await outbox.log(*of(A, "a").charged().facts, *of(A, "b").charged().facts)
    async with await outbox.database.connect("a") as own:
        (claimed,) = await claim_some(own, lease_s=10)
        dead = result_of(claimed, "dead")._replace(outcome="timeout", busy_s=BUSY_S)
        await record(own, [dead])
        assert await claim_some(own) == []
        await asyncio.sleep(BUSY_S + 0.02)
        assert [each.event_id for each in await claim_some(own)] == outbox.events()[1:]


# The statements of the version before, which may run beside this one and knows no busy_until.
OLD_MAKE_DUE = """
UPDATE callback_lanes SET next_at = least(next_at, now()) WHERE failing AND in_flight IS NULL
"""
OLD_CLAIM = "SELECT claim, event_id FROM claim_callbacks(10, 10, %s, 10)"
OLD_RECORD = """
SELECT record_callbacks(ARRAY[%s]::bigint[], ARRAY[%s]::uuid[], ARRAY[%s]::uuid[],
                        ARRAY['delivered'], ARRAY[0]::float8[], ARRAY[1], ARRAY[0.1]::float8[],
                        ARRAY['delivered'], ARRAY[200], ARRAY['']::text[], ARRAY['']::bytea[])
"""


@pytest.mark.parametrize("probes", [False, True])
async def test_the_version_before_makes_nothing_due_that_may_be_running(
    outbox: Outbox, probes: bool
) -> None:
    """If it claims it all the same, as a probe, the lane is in nobody's way afterwards."""
    await outbox.log(*of(A, "a").charged().facts)
    async with await outbox.database.connect("a") as own:
        (claimed,) = await claim_some(own, lease_s=10)
        timed_out = result_of(claimed, "due")._replace(outcome="timeout", away=True)
        await record(own, [timed_out._replace(delay_s=3600.0, busy_s=BUSY_S, asked_s=0.0)])
        outbox.connection.execute(OLD_MAKE_DUE.encode())
        assert await claim_some(own) == []
        other = uuid.uuid4()
        held = outbox.connection.execute(OLD_CLAIM.encode(), [probes]).fetchall()
        assert len(held) == probes
        for claim, event_id in held:
            outbox.connection.execute(OLD_RECORD.encode(), [claim, A, event_id])
            assert outbox.states() == ["delivered"]
        await outbox.log(*of(other, "b").charged().facts)
        assert [each.order_id for each in await claim_some(own, lease_s=10)] == [other]
        await asyncio.sleep(BUSY_S + 0.02)
        assert [each.order_id for each in await claim_some(own)] == ([] if probes else [A])


async def test_what_was_asked_for_ends_with_a_redrive_and_with_nothing_else(
    outbox: Outbox,
) -> None:
    await outbox.log(*of(A, "a").charged().facts)
    async with await outbox.database.connect("a") as own:
        (claimed,) = await claim_some(own, lease_s=10)
        asked = result_of(claimed, "due")._replace(outcome="http_error", status=503, away=True)
        await record(own, [asked._replace(delay_s=3600.0, asked_s=3600.0)])
        assert await make_due(own, 60, 10) == 0
        assert await claim_some(own, probing=True) == []
        assert await claim_some(own) == []
        await redrive(own, outbox.events())
        assert [each.order_id for each in await claim_some(own, probing=True)] == [A]


def test_the_default_is_the_settings_one() -> None:
    assert Settings().callback_timeout_s == TIMEOUT_S


def wait_of(outbox: Outbox) -> timedelta:
    ((wait,),) = outbox.connection.execute("SELECT next_at - now() FROM callback_lanes").fetchall()
    assert isinstance(wait, timedelta)
    return wait


@pytest.mark.parametrize("exchange", [failed("timeout", sent=True), failed(sent=True)])
async def test_without_an_end_it_waits_as_long_again(outbox: Outbox, exchange: Exchange) -> None:
    endpoint = PlayedEndpoint(timeout_s=BUSY_S)
    await outbox.log(*of(A, "a").charged().facts)
    endpoint.answer = lambda _: exchange if len(endpoint.bodies) < 2 else answered(200)
    async with dispatching_to(endpoint, outbox):
        await until(lambda: outbox.states() == ["delivered"])
    started = "SELECT started_at FROM callback_attempts ORDER BY claim"
    first, second = (at for (at,) in outbox.connection.execute(started))
    assert second - first >= timedelta(seconds=BUSY_S)


async def test_a_lease_lasts_for_an_exchange_and_as_long_again(
    outbox: Outbox, endpoint: PlayedEndpoint
) -> None:
    endpoint.held = asyncio.Event()
    await outbox.log(*of(A, "a").charged().facts)
    async with dispatching_to(endpoint, outbox):
        await until(lambda: endpoint.under_way)
        assert wait_of(outbox) > timedelta(seconds=2 * endpoint.timeout_s)
        assert wait_of(outbox) < timedelta(seconds=lease_s(endpoint.timeout_s))
        endpoint.held.set()


@pytest.mark.parametrize(
    "exchange", [failed("timeout", sent=True), answered(503, retry_after="60")]
)
async def test_a_probe_that_came_before_its_time_makes_it_wait_as_well(
    outbox: Outbox, exchange: Exchange
) -> None:
    endpoint = PlayedEndpoint(timeout_s=60.0)
    await outbox.log(*of(A, "a").charged().facts)
    outbox.pause()
    outbox.connection.execute("UPDATE callback_lanes SET next_at = now() + interval '30 s'")
    endpoint.answer = lambda _: exchange
    async with dispatching_to(endpoint, outbox, breaker=opened()):
        await until(lambda: len(outbox.attempts()) == 1)
        assert wait_of(outbox) > timedelta(seconds=50)
        await asyncio.sleep(0.2)
    assert len(endpoint.bodies) == 1


@pytest.mark.parametrize("statuses", [("SUCCESS", "FAILED"), ALL], ids="+".join)
async def test_the_next_callback_of_the_order_waits_too(
    outbox: Outbox, statuses: tuple[str, ...]
) -> None:
    endpoint = PlayedEndpoint(timeout_s=BUSY_S)
    await outbox.log(*of(A, "a").charged().facts, *of(A, "b").charged().facts, statuses=statuses)
    endpoint.answer = lambda _: failed("timeout", sent=True)
    async with dispatching_to(endpoint, outbox, breaker=Breaker(orders_min=99)):
        await until(lambda: len(endpoint.bodies) == 2)
    assert endpoint.bodies[0]["event_id"] == endpoint.bodies[1]["event_id"]
