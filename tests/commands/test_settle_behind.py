"""Settling while the projector is behind: its rows stay until it comes to what settled them."""

import asyncio
from collections.abc import Callable
from typing import Any

import psycopg
import pytest
from click.testing import Result

from payments.database.connections import DatabaseAddress
from payments.payment.state import Status
from payments.service import Service
from payments.unsettled import claim
from tests.commands.conftest import Make
from tests.commands.looking import PAYMENT, begin, gateway_of, topics
from tests.commands.refunding import refund_of
from tests.commands.settling import (
    FAST,
    abandoned,
    age,
    due_in_s,
    project,
    settle,
    unsettled,
)
from tests.doubles.gateway import ScriptedGateway, answer_lost, decline
from tests.machine import Machine, bound
from tests.support import charge_of

pytestmark = pytest.mark.anyio

Operator = Callable[..., Result]
HOLD = "SELECT FROM followers WHERE name = 'payments' FOR UPDATE"


async def audit_finds_nothing(operator: Operator) -> None:
    for command in (("audit", "verify"), ("rebuild", "--dry-run")):
        done = await asyncio.to_thread(operator, *command)
        assert done.exit_code == 0, done.output


async def with_a_charge(make: Make) -> Service:
    service = await make(ScriptedGateway(answer_lost), **FAST)
    await begin(service)
    return service


async def with_a_refund(make: Make) -> Service:
    service = await make(ScriptedGateway(refund_script=[answer_lost]), **FAST)
    await begin(service)
    await service.refunding.refund(refund_of(300, "a"))
    return service


@pytest.mark.parametrize(
    ("begin", "settled_by"),
    [(with_a_charge, "PaymentCharged"), (with_a_refund, "PaymentRefunded")],
    ids=["charge", "refund"],
)
async def test_what_is_settled_stays_listed_until_the_projector_comes_there(
    make: Make,
    address: DatabaseAddress,
    connection: psycopg.Connection[Any],
    operator: Operator,
    begin: Callable[[Make], Any],
    settled_by: str,
    machine: Machine,
) -> None:
    service = await begin(make)
    await age(connection, 1)
    await project(service)
    listed = unsettled(connection)
    with psycopg.connect(address.conninfo("tests")) as holding:
        holding.execute(HOLD)
        assert await settle(service, connection) == 1
        assert topics(connection, PAYMENT)[-1] == settled_by
        assert unsettled(connection) == [(listed[0][0], 1)]
        await audit_finds_nothing(operator)
        # Nor is it claimed again and again, and the provider is not asked any more.
        left_s = due_in_s(connection)
        assert left_s <= 1
        bound(1 - left_s, 1, machine)
        gateway = gateway_of(service)
        asked = len(gateway.questions) + len(gateway.refund_questions)
        for attempts in (2, 3, 4):
            assert await settle(service, connection) == 1
            pause_s, left_s = 2 ** (attempts - 1), due_in_s(connection)
            assert left_s <= pause_s
            bound(pause_s - left_s, 1, machine)
        assert len(gateway.questions) + len(gateway.refund_questions) == asked
        await audit_finds_nothing(operator)
    await project(service)
    assert unsettled(connection) == []
    await audit_finds_nothing(operator)


async def test_a_row_that_the_projector_removes_meanwhile_is_no_error(
    make: Make, connection: psycopg.Connection[Any]
) -> None:
    service = await with_a_charge(make)
    await project(service)
    connection.execute("UPDATE unsettled_payments SET due_at = clock_timestamp()")
    (claimed,) = await claim(service.database, 1, lease_s=100)
    await age(connection, 1)
    assert (await service.charging.charge(charge_of("k"))).payment.status is Status.SUCCESS
    await project(service)
    assert unsettled(connection) == []
    await service.settling._settle(claimed)
    assert unsettled(connection) == []


async def test_what_was_watched_to_its_end_stays_while_it_is_listed_as_something_else(
    make: Make,
    address: DatabaseAddress,
    connection: psycopg.Connection[Any],
    operator: Operator,
) -> None:
    """The projector has not come to the abandonment in all the time of the watch."""
    with psycopg.connect(address.conninfo("tests")) as holding:
        service = await with_a_charge(make)
        gateway_of(service).outcomes.clear()
        await project(service)
        holding.execute(HOLD)
        await age(connection, 1000)
        await settle(service, connection)
        assert topics(connection, PAYMENT)[-1] == "PaymentFailed"
        await age(connection, 25 * 3600)
        await settle(service, connection)
        assert unsettled(connection) == [("charge", 2)]
        assert due_in_s(connection) > 800
        await audit_finds_nothing(operator)
    await project(service)
    await settle(service, connection)
    assert unsettled(connection) == []


async def test_a_late_capture_of_a_watched_payment_is_not_forgotten(
    make: Make, connection: psycopg.Connection[Any]
) -> None:
    """It is found by another process, in the moment in which the watch ends."""
    service = await abandoned(make, connection)
    await age(connection, 25 * 3600)
    gateway = gateway_of(service)
    gateway.capture(gateway.charges[0])
    assert await service.settling.run_once() == 0
    connection.execute("UPDATE unsettled_payments SET due_at = clock_timestamp()")
    assert await service.settling.run_once() == 1
    assert topics(connection, PAYMENT)[2:] == ["LateCaptureFound", "LateCaptureReturned"]
    assert unsettled(connection) == [("abandoned", 1)]
    await project(service)
    assert unsettled(connection) == []


async def test_a_row_without_a_payment_is_left_to_the_audit(
    make: Make, connection: psycopg.Connection[Any], operator: Operator
) -> None:
    service = await make(ScriptedGateway(), **FAST)
    await begin(service)
    connection.execute(
        "INSERT INTO unsettled_payments (payment_id, kind, since, due_at)"
        " VALUES (gen_random_uuid(), 'charge', now(), now())"
    )
    assert await settle(service, connection) == 1
    assert due_in_s(connection) > 800
    done = await asyncio.to_thread(operator, "audit", "verify")
    assert done.exit_code == 1
    assert "not in the log" in done.stdout


async def with_a_decline(make: Make, turning_s: float = 3600.0) -> Service:
    gateway = ScriptedGateway(decline)
    gateway.declines_may_turn_s = turning_s
    service = await make(gateway, **FAST)
    await begin(service)
    await project(service)
    return service


async def test_a_declined_payment_may_be_listed_or_not(
    make: Make, connection: psycopg.Connection[Any], operator: Operator
) -> None:
    """The log does not tell whether its gateway's declines may turn."""
    service = await with_a_decline(make)
    assert unsettled(connection) == [("declined", 0)]
    await audit_finds_nothing(operator)
    connection.execute("UPDATE unsettled_payments SET since = since - interval '1 s'")
    done = await asyncio.to_thread(operator, "audit", "verify")
    assert (done.exit_code, done.stdout.count("not in the log")) == (1, 1)
    connection.execute("UPDATE unsettled_payments SET since = since + interval '1 s'")
    await age(connection, 3700)
    await settle(service, connection)
    assert unsettled(connection) == []
    await audit_finds_nothing(operator)


async def test_a_declined_payment_is_let_go_by_a_gateway_whose_declines_stand(
    make: Make, connection: psycopg.Connection[Any]
) -> None:
    await with_a_decline(make)
    other = await with_a_decline(make, turning_s=0.0)
    assert unsettled(connection) == [("declined", 0)]
    await settle(other, connection)
    assert unsettled(connection) == []
    assert gateway_of(other).questions == []
