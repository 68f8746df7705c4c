"""Several providers: a payment stays with the one that it was begun with."""

from typing import Any

import pytest

from payments.errors import PaymentNotRefundable
from payments.payment.state import Status
from payments.service import Service
from tests.commands.conftest import Make
from tests.commands.looking import PAYMENT, Connection, begin, topics
from tests.commands.refunding import refund_of
from tests.commands.settling import age, due_in_s, project, settle, unsettled
from tests.doubles.gateway import (
    PreparingGateway,
    ScriptedGateway,
    answer_lost,
    decline,
    no_answer,
    opens,
)
from tests.support import charge_of

pytestmark = pytest.mark.anyio

DAY_S = 86_400.0
CRITICAL = 50


def level(connection: Connection) -> int | None:
    ((told_level,),) = connection.execute("SELECT told_level FROM unsettled_payments").fetchall()
    return None if told_level is None else int(told_level)


async def began_at(make: Make, gateway: ScriptedGateway) -> Service:
    """The payment is that of `gateway`; another provider is the default by now."""
    await begin(await make(gateway))
    return await make(PreparingGateway(), gateway)


def default(service: Service) -> ScriptedGateway:
    gateway = service.gateways.for_new("INR")._gateway
    assert isinstance(gateway, PreparingGateway)
    return gateway


def untouched(service: Service) -> bool:
    gateway = default(service)
    return not (gateway.charges or gateway.questions or gateway.refunds)


async def test_new_payments_go_to_the_default(make: Make, connection: Connection) -> None:
    earlier = ScriptedGateway()
    service = await began_at(make, earlier)
    charged = await service.charging.charge(charge_of("new"))
    assert (charged.payment.status, charged.payment.gateway) == (Status.SUCCESS, "preparing")
    assert (len(default(service).captures), len(earlier.captures)) == (1, 1)


async def test_refunds_go_where_the_payment_began(make: Make, connection: Connection) -> None:
    earlier = ScriptedGateway()
    service = await began_at(make, earlier)
    refunded = await service.refunding.refund(refund_of(300))
    assert refunded.refund.status is Status.SUCCESS
    assert len(earlier.given_back) == 1
    assert untouched(service)


async def test_with_the_reference_of_the_charge(make: Make, connection: Connection) -> None:
    service = await make(PreparingGateway())
    await begin(service)
    await service.refunding.refund(refund_of(300))
    (back,) = default(service).refunds
    assert back.reference == f"pi_{PAYMENT.hex}"


async def test_repetitions_do(make: Make, connection: Connection) -> None:
    earlier = ScriptedGateway(no_answer)
    service = await began_at(make, earlier)
    await age(connection, 10)
    charged = await service.charging.charge(charge_of("k"))
    assert (charged.payment.status, charged.payment.gateway) == (Status.SUCCESS, "scripted")
    assert (len(earlier.charges), len(earlier.captures)) == (2, 1)
    assert untouched(service)


async def test_settling_does(make: Make, connection: Connection) -> None:
    service = await began_at(make, ScriptedGateway(answer_lost))
    await settle(service, connection)
    assert topics(connection, PAYMENT) == ["PaymentInitiated", "PaymentCharged"]
    assert untouched(service)


async def test_late_captures_do(make: Make, connection: Connection) -> None:
    earlier = ScriptedGateway(no_answer)
    service = await began_at(make, earlier)
    await age(connection, 700)
    await settle(service, connection)
    earlier.capture(earlier.charges[0])
    await settle(service, connection)
    assert topics(connection, PAYMENT)[2:] == ["LateCaptureFound", "LateCaptureReturned"]
    assert len(earlier.given_back) == 1
    assert untouched(service)


class TestOneThatIsNotConfiguredAnyMore:
    async def gone(self, make: Make, *script: Any) -> Service:
        await begin(await make(ScriptedGateway(*script)))
        return await make(PreparingGateway())

    async def test_a_refund_is_refused_before_anything_is_reserved(
        self, make: Make, connection: Connection
    ) -> None:
        service = await self.gone(make)
        with pytest.raises(PaymentNotRefundable, match="scripted") as refused:
            await service.refunding.refund(refund_of(300))
        assert refused.value.status == 409
        assert topics(connection, PAYMENT) == ["PaymentInitiated", "PaymentCharged"]

    async def test_a_refund_under_way_stays_pending(
        self, make: Make, connection: Connection
    ) -> None:
        first = await make(ScriptedGateway(refund_script=[no_answer]))
        await begin(first)
        await first.refunding.refund(refund_of(300, "a"))
        service = await make(PreparingGateway())
        await age(connection, 10)
        again = await service.refunding.refund(refund_of(300, "a"))
        assert (again.refund.status, again.replayed) == (Status.PENDING, True)
        assert untouched(service)

    async def test_an_outcome_is_still_the_answer(self, make: Make, connection: Connection) -> None:
        service = await self.gone(make)
        charged = await service.charging.charge(charge_of("k"))
        assert (charged.payment.status, charged.replayed) == (Status.SUCCESS, True)

    @pytest.mark.parametrize("follower", ["its own", "the other"])
    async def test_a_decline_that_may_turn_is_still_watched(
        self, make: Make, connection: Connection, follower: str
    ) -> None:
        """Whichever process lists it, and whichever comes to it first."""
        gateway = ScriptedGateway(decline, declines_may_turn_s=3 * DAY_S)
        own = await make(gateway)
        await begin(own)
        other = await make(PreparingGateway())
        await project(own if follower == "its own" else other)
        assert [kind for kind, _ in unsettled(connection)] == ["declined"]
        for _ in range(2):
            await other.settling.run_once()
            await settle(other, connection)
        assert 0 < due_in_s(connection) < 3600
        await settle(own, connection)
        assert 2 * DAY_S < due_in_s(connection) < 3 * DAY_S
        assert gateway.questions == []
        gateway.outcomes.clear()
        gateway.capture(gateway.charges[0])
        await age(connection, 3 * DAY_S)
        await settle(own, connection)
        assert topics(connection, PAYMENT)[2:] == ["LateCaptureFound", "LateCaptureReturned"]
        assert unsettled(connection) == []

    async def test_but_not_for_ever(self, make: Make, connection: Connection) -> None:
        own = await make(ScriptedGateway(decline, declines_may_turn_s=3 * DAY_S))
        await begin(own)
        await project(own)
        await age(connection, 31 * DAY_S)
        await settle(await make(PreparingGateway()), connection)
        assert unsettled(connection) == []

    async def test_one_that_is_configured_again_needs_nobody_any_more(
        self, make: Make, connection: Connection
    ) -> None:
        gateway = PreparingGateway(opens("processing"))
        own = await make(gateway)
        await begin(own)
        await settle(await make(ScriptedGateway()), connection)
        assert level(connection) == CRITICAL
        gateway.reachable = False
        await settle(own, connection)
        gateway.reachable = True
        await settle(own, connection)
        assert level(connection) is None
        assert [kind for kind, _ in unsettled(connection)] == ["charge"]

    async def test_a_pending_payment_waits_and_is_told(
        self, make: Make, connection: Connection
    ) -> None:
        service = await self.gone(make, answer_lost)
        await age(connection, 10_000)
        charged = await service.charging.charge(charge_of("k"))
        assert charged.payment.status is Status.PENDING
        await settle(service, connection)
        assert topics(connection, PAYMENT) == ["PaymentInitiated"]
        assert service.telemetry.settling["charge", "other_gateway"]._value.get() == 1
        assert untouched(service)
