"""No charge is begun for a client that is gone, or has waited too long; what was begun goes on."""

import asyncio
import time
from typing import Any

import psycopg
import pytest

from payments.commands.runs import Caller
from payments.errors import ClientGone, IdempotencyKeyReused, TooBusy
from payments.event_store import load_charge
from payments.gateways import ProviderCharge
from payments.payment.identity import payment_id_for
from payments.payment.state import Status
from tests.commands.conftest import Make
from tests.commands.looking import first_answer, topics
from tests.doubles.gateway import ScriptedGateway, after, no_answer
from tests.events.commits import lock_held, waits_for_lock
from tests.support import charge_of, elapse, stored_event, until

pytestmark = pytest.mark.anyio

K = payment_id_for("k")


def stale(age_s: float = 60) -> Caller:
    return Caller(time.monotonic() - age_s)


def gone() -> Caller:
    caller = Caller()
    caller.is_gone = True
    return caller


@pytest.mark.parametrize("caller", [stale, gone])
async def test_nothing_is_begun_for_it(
    make: Make, connection: psycopg.Connection[Any], caller: Any
) -> None:
    gateway = ScriptedGateway()
    service = await make(gateway)
    with pytest.raises(ClientGone):
        await service.charging.charge(charge_of("k"), caller())
    assert (topics(connection, K), gateway.charges, gateway.questions) == ([], [], [])
    assert service.telemetry.charges["client_gone"]._value.get() == 1
    charged = await service.charging.charge(charge_of("k"), Caller())  # its key is not used up
    assert first_answer(charged) == (Status.SUCCESS, False)


async def test_the_deadline_is_the_border(make: Make) -> None:
    service = await make(ScriptedGateway(), charge_deadline_s=5, gateway_timeout_s=4)
    assert first_answer(await service.charging.charge(charge_of("a"), stale(3))) == (
        Status.SUCCESS,
        False,
    )
    with pytest.raises(ClientGone):
        await service.charging.charge(charge_of("b"), stale(5))


@pytest.mark.parametrize("first", [stale, gone, Caller])
@pytest.mark.parametrize("second", [stale, gone, Caller])
async def test_one_of_two_that_still_waits_is_enough(
    make: Make, connection: psycopg.Connection[Any], first: Any, second: Any
) -> None:
    gateway = ScriptedGateway()
    service = await make(gateway)
    answers = await asyncio.gather(
        *(service.charging.charge(charge_of("k"), caller()) for caller in (first, second)),
        return_exceptions=True,
    )
    if Caller in (first, second):
        assert {answer.payment.status for answer in answers} == {Status.SUCCESS}  # type: ignore[union-attr]
        assert topics(connection, K) == ["PaymentInitiated", "PaymentCharged"]
    else:
        assert [type(answer) for answer in answers] == [ClientGone, ClientGone]
        assert topics(connection, K) == []


async def test_one_that_comes_while_it_is_looked_whether_the_key_is_known(
    make: Make, monkeypatch: pytest.MonkeyPatch
) -> None:
    gateway = ScriptedGateway()
    service = await make(gateway)
    joined = []

    async def slow(*arguments: Any) -> Any:
        joined.append(asyncio.create_task(service.charging.charge(charge_of("k"), Caller())))
        await asyncio.sleep(0.05)
        return await load_charge(*arguments)

    monkeypatch.setattr("payments.event_store.load_charge", slow)
    charged = await service.charging.charge(charge_of("k"), stale())
    assert charged.payment.status is Status.SUCCESS
    assert (await joined[0]).payment.status is Status.SUCCESS
    assert len(gateway.captures) == 1


@pytest.mark.parametrize("caller", [stale, gone])
async def test_a_known_key_is_answered(make: Make, caller: Any) -> None:
    gateway = ScriptedGateway()
    service = await make(gateway)
    await service.charging.charge(charge_of("k"))
    charged = await service.charging.charge(charge_of("k"), caller())
    assert first_answer(charged) == (Status.SUCCESS, True)
    with pytest.raises(IdempotencyKeyReused):
        await service.charging.charge(charge_of("k", 1501), caller())
    assert len(gateway.charges) == 1


@pytest.mark.parametrize("caller", [stale, gone])
async def test_a_charge_that_was_left_open_is_not_sent_again_for_it(
    make: Make, caller: Any
) -> None:
    """That it did not reach the provider may be found out; a fresh request then sends it."""
    gateway = ScriptedGateway(no_answer)
    service = await make(gateway, charge_deadline_s=0.4, gateway_timeout_s=0.3)
    await service.charging.charge(charge_of("k"))
    await asyncio.sleep(0.5)
    charged = await service.charging.charge(charge_of("k"), caller())
    assert first_answer(charged) == (Status.PENDING, True)
    assert len(gateway.charges) == 1
    charged = await service.charging.charge(charge_of("k"), Caller())
    assert first_answer(charged) == (Status.SUCCESS, True)
    assert len(gateway.charges) == 2


async def test_an_intent_that_still_waits_to_be_written_is_dropped(
    make: Make, connection: psycopg.Connection[Any]
) -> None:
    gateway = ScriptedGateway()
    service = await make(gateway)
    leaving, staying = Caller(), Caller()
    with lock_held(connection):
        first = service.appender.append([stored_event()])
        await waits_for_lock(connection)
        requests = [
            asyncio.create_task(service.charging.charge(charge_of(key), caller))
            for key, caller in (("k", leaving), ("stays", staying))
        ]
        await until(lambda: len(service.appender._waiting) == 2)
        leaving.is_gone = True
    await first
    with pytest.raises(ClientGone):
        await requests[0]
    assert (await requests[1]).payment.status is Status.SUCCESS
    assert (topics(connection, K), len(gateway.charges)) == ([], 1)


async def test_an_intent_that_waited_while_the_process_was_stopped_is_dropped(
    make: Make, connection: psycopg.Connection[Any]
) -> None:
    gateway = ScriptedGateway()
    service = await make(gateway, charge_deadline_s=0.5, gateway_timeout_s=0.4)
    with lock_held(connection):
        first = service.appender.append([stored_event()])
        await waits_for_lock(connection)
        request = asyncio.create_task(service.charging.charge(charge_of("k"), Caller()))
        await until(lambda: len(service.appender._waiting) == 1)
        await elapse(0.6, frozen=True)
    await first
    with pytest.raises((ClientGone, TooBusy)):
        await request
    await service.runs.drain(2)
    assert (topics(connection, K), gateway.charges) == ([], [])


async def test_what_was_begun_goes_on_when_the_client_leaves(
    make: Make, connection: psycopg.Connection[Any]
) -> None:
    answered, caller = asyncio.Event(), Caller()
    gateway = ScriptedGateway(after(answered))
    service = await make(gateway)
    request = asyncio.create_task(service.charging.charge(charge_of("k"), caller))
    await until(lambda: gateway.charges)
    caller.is_gone = True
    answered.set()
    assert (await request).payment.status is Status.SUCCESS
    assert topics(connection, K) == ["PaymentInitiated", "PaymentCharged"]


async def test_what_was_read_late_has_what_is_left_of_its_deadline(
    make: Make, monkeypatch: pytest.MonkeyPatch
) -> None:
    gateway = ScriptedGateway()
    service = await make(gateway)
    charge, given_s = gateway.charge, []

    async def look(asked: ProviderCharge, timeout_s: float) -> Any:
        given_s.append(timeout_s)
        return await charge(asked, timeout_s)

    monkeypatch.setattr(gateway, "charge", look)
    await service.charging.charge(charge_of("k"), stale(3))
    assert 0 < given_s[0] < 7 - 3


async def test_each_of_several_is_answered_by_its_own_deadline(make: Make) -> None:
    """The provider has until that of the one that came last before the intent was stored."""
    answered = asyncio.Event()
    gateway = ScriptedGateway(after(answered))
    service = await make(gateway, charge_deadline_s=3, gateway_timeout_s=2.9)
    requests = [
        asyncio.create_task(service.charging.charge(charge_of("k"), caller))
        for caller in (stale(2), Caller())
    ]
    assert (await requests[0]).payment.status is Status.PENDING
    assert not requests[1].done()
    answered.set()
    assert (await requests[1]).payment.status is Status.SUCCESS
    assert service.admission.requests.taken == 0
