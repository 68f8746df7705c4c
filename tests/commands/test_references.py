"""A provider that knows a charge by its own id alone: that is stored before anything is captured,
and so a payment without one was not captured."""

import asyncio
from datetime import timedelta
from typing import Any

import pytest

from payments.commands import runs
from payments.commands.runs import Caller, cause
from payments.errors import GatewayUnavailable, InvalidRequest, PaymentMethodReused
from payments.gateways import NeverSent, ProviderCharge, ReferenceNotFound, breaker
from payments.payment.decisions import abandon
from payments.payment.identity import payment_id_for
from payments.payment.state import Declined, Status
from tests.commands.conftest import Make
from tests.commands.looking import PAYMENT, Connection, as_stored, begin, topics
from tests.commands.preparing import (
    PREPARED,
    charge,
    charge_pending,
    preparing,
)
from tests.commands.settling import age, project, settle, unsettled
from tests.doubles.gateway import (
    PreparingGateway,
    ScriptedGateway,
    answer_lost,
    approve,
    give_reference,
    never_sent,
    no_answer,
    opens,
    reference_lost,
)
from tests.lost_log import lose_after
from tests.support import PATIENCE_S, append, charge_of

pytestmark = pytest.mark.anyio

CHARGED = [*PREPARED, "PaymentCharged"]


def unknown(gateway: ScriptedGateway, charge: ProviderCharge) -> None:
    raise ReferenceNotFound("the provider does not know the reference")


def events(connection: Connection) -> int:
    ((count,),) = connection.execute("SELECT count(*) FROM payment_events").fetchall()
    return int(count)


class TestBeforeACapture:
    async def test_the_reference_is_durable(self, make: Make, connection: Connection) -> None:
        seen: list[tuple[list[str], str | None]] = []

        def look(gateway: ScriptedGateway, charge: ProviderCharge) -> Any:
            seen.append((topics(connection, charge.payment_id), charge.reference))
            return approve(gateway, charge)

        service = await make(PreparingGateway(look))
        charged = await charge(service)
        assert charged.payment.status is Status.SUCCESS
        assert seen == [(PREPARED, f"pi_{PAYMENT.hex}")]
        assert topics(connection, PAYMENT) == CHARGED
        assert preparing(service).questions == []

    @pytest.mark.parametrize("step", [never_sent, no_answer, reference_lost])
    async def test_what_was_not_prepared_is_not_sent(
        self, make: Make, connection: Connection, step: Any
    ) -> None:
        """The client is told so, whatever became of the preparation: it captures nothing."""
        service = await make(PreparingGateway(prepare_script=[step]))
        with pytest.raises(GatewayUnavailable, match=r"unavailable\. Nothing was") as told:
            await charge(service)
        assert told.value.retry_after_s == 7
        gateway = preparing(service)
        assert (topics(connection, PAYMENT), gateway.charges) == (PREPARED[:1], [])
        await age(connection, 10)
        assert (await charge(service)).payment.status is Status.SUCCESS
        assert topics(connection, PAYMENT) == CHARGED
        assert (len(gateway.preparations), len(gateway.captures)) == (2, 1)
        assert gateway.questions == []  # nothing was captured without a reference

    @pytest.mark.parametrize("step", [never_sent, no_answer, answer_lost])
    async def test_what_was_prepared_is_asked_about_and_not_prepared_again(
        self, make: Make, connection: Connection, step: Any
    ) -> None:
        service = await make(PreparingGateway(step))
        if step is never_sent:
            with pytest.raises(GatewayUnavailable):
                await charge(service)
        else:
            await charge_pending(service)
        assert topics(connection, PAYMENT) == PREPARED
        await age(connection, 10)
        assert (await charge(service)).payment.status is Status.SUCCESS
        gateway = preparing(service)
        assert (len(gateway.preparations), len(gateway.captures)) == (1, 1)
        assert gateway.questions == [PAYMENT]

    async def test_what_is_declined_when_it_is_prepared_fails(
        self, make: Make, connection: Connection
    ) -> None:
        """As an amount below the provider's least one, which only the provider knows."""
        service = await make(PreparingGateway(prepare_script=[lambda *_: Declined("too_small")]))
        for replayed in (False, True):
            charged = await charge(service)
            assert (charged.payment.status, charged.replayed) == (Status.FAILED, replayed)
            assert charged.payment.decline_code == "too_small"
        gateway = preparing(service)
        assert (len(gateway.preparations), gateway.charges) == (1, [])
        assert topics(connection, PAYMENT) == ["PaymentInitiated", "PaymentFailed"]

    async def test_nothing_is_sent_for_a_payment_that_got_an_outcome(
        self, make: Make, connection: Connection
    ) -> None:
        def slow(gateway: ScriptedGateway, asked: ProviderCharge) -> str:
            abandonment = abandon(as_stored(connection), cause("settling"))
            assert abandonment is not None
            append(connection, [abandonment])
            return give_reference(gateway, asked)

        service = await make(PreparingGateway(prepare_script=[slow]))
        assert (await charge(service)).payment.status is Status.FAILED
        assert preparing(service).charges == []
        assert topics(connection, PAYMENT) == ["PaymentInitiated", "PaymentFailed"]

    async def test_nothing_is_sent_for_a_client_that_left(
        self, make: Make, connection: Connection
    ) -> None:
        caller = Caller()

        def leave(gateway: ScriptedGateway, asked: ProviderCharge) -> str:
            caller.is_gone = True
            return give_reference(gateway, asked)

        service = await make(PreparingGateway(prepare_script=[leave]))
        charged = await service.charging.charge(charge_of("k"), caller)
        assert charged.payment.status is Status.PENDING
        assert preparing(service).charges == []
        assert topics(connection, PAYMENT) == PREPARED
        await age(connection, 10)
        assert (await charge(service)).payment.status is Status.SUCCESS

    async def test_a_database_that_does_not_answer_keeps_nobody_waiting(
        self, make: Make, connection: Connection, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        """And what was answered is not sent when it answers again."""
        monkeypatch.setattr(runs, "OUTCOME_STORE_PATIENCE_S", 0.2)

        def lock(gateway: ScriptedGateway, asked: ProviderCharge) -> str:
            connection.execute("BEGIN")
            connection.execute("LOCK TABLE append_lock IN EXCLUSIVE MODE")
            return give_reference(gateway, asked)

        service = await make(PreparingGateway(prepare_script=[lock]), charge_deadline_s=60)
        async with asyncio.timeout(PATIENCE_S):
            await charge_pending(service)
        connection.execute("ROLLBACK")
        await service.runs.drain(30)
        assert topics(connection, PAYMENT) == PREPARED
        assert preparing(service).charges == []

    async def test_a_provider_that_gives_two_payments_one_reference(
        self, make: Make, connection: Connection, critical: list[str]
    ) -> None:
        service = await make(PreparingGateway(prepare_script=[give_reference, lambda *_: "pi_1"]))
        preparing(service).references[payment_id_for("first")] = "pi_1"
        await charge(service, "first")
        await charge_pending(service)
        assert topics(connection, PAYMENT) == PREPARED[:1]
        assert len(preparing(service).charges) == 1
        assert len(critical) == 1

    async def test_it_is_prepared_whatever_the_gateway_says(
        self, make: Make, connection: Connection
    ) -> None:
        """Settling takes a payment without a reference for one that was not captured."""

        class Careless(PreparingGateway):
            def needs_preparing(self, charge: ProviderCharge) -> bool:
                return False

        await charge(await make(Careless()))
        assert topics(connection, PAYMENT) == CHARGED

    async def test_it_is_not_asked_about_until_it_is_abandoned(
        self, make: Make, connection: Connection
    ) -> None:
        """Then it is prepared: a restore may have taken its reference away, and nobody knows."""
        service = await make(PreparingGateway(prepare_script=[no_answer, never_sent]))
        with pytest.raises(GatewayUnavailable):
            await charge(service)
        gateway = preparing(service)
        await settle(service, connection)
        assert (len(gateway.preparations), gateway.questions) == (1, [])
        await age(connection, 700)
        await settle(service, connection)
        assert topics(connection, PAYMENT) == PREPARED[:1]
        await settle(service, connection)
        assert topics(connection, PAYMENT) == [*PREPARED, "PaymentFailed"]
        assert (gateway.cancellations, gateway.charges) == ([PAYMENT], [])
        assert unsettled(connection) == []

    async def test_one_that_cannot_be_prepared_again_is_abandoned(
        self, make: Make, connection: Connection
    ) -> None:
        """The provider has no idempotency keys, or not for so long."""
        service = await make(PreparingGateway(prepare_script=[no_answer], retry_s=100))
        with pytest.raises(GatewayUnavailable):
            await charge(service)
        await age(connection, 700)
        await settle(service, connection)
        assert topics(connection, PAYMENT) == ["PaymentInitiated", "PaymentFailed"]
        gateway = preparing(service)
        assert (len(gateway.preparations), gateway.cancellations) == (1, [])


class TestThatTheClientSupplies:
    async def test_it_is_stored_with_the_intent(self, make: Make, connection: Connection) -> None:
        service = await make(PreparingGateway())
        charged = await charge(service, method="pay_1")
        assert charged.payment.provider_reference == "pay_1"
        assert topics(connection, PAYMENT) == ["PaymentInitiated", "PaymentCharged"]
        gateway = preparing(service)
        assert (gateway.preparations, gateway.charges[0].reference) == ([], "pay_1")

    async def test_a_second_key_with_it_stores_nothing(
        self, make: Make, connection: Connection
    ) -> None:
        service = await make(PreparingGateway())
        await charge(service, "first", "pay_1")
        with pytest.raises(PaymentMethodReused) as refused:
            await charge(service, method="pay_1")
        assert (refused.value.status, refused.value.code) == (422, "payment_method_reused")
        assert events(connection) == 2
        assert len(preparing(service).charges) == 1
        again = await charge(service, "first", "pay_1")
        assert (again.payment.status, again.replayed) == (Status.SUCCESS, True)
        assert (await charge(service, method="pay_2")).payment.status is Status.SUCCESS

    async def test_of_two_processes_one_charges(self, make: Make, connection: Connection) -> None:
        gateway = PreparingGateway()
        services = [await make(gateway) for _ in range(2)]
        told = await asyncio.gather(
            *(charge(services[n % 2], f"k{n}", "pay_1") for n in range(6)), return_exceptions=True
        )
        assert sum(isinstance(each, PaymentMethodReused) for each in told) == 5
        assert len(gateway.captures) == 1
        assert events(connection) == 2

    @pytest.mark.parametrize("method", ['pay_"', "pay_\\", "pay_é", "pay_" + "x" * 252])
    async def test_one_that_cannot_be_compared_is_refused(
        self, make: Make, connection: Connection, method: str
    ) -> None:
        service = await make(PreparingGateway())
        with pytest.raises(InvalidRequest) as refused:
            await charge(service, method=method)
        assert [error.field for error in refused.value.errors] == ["payment_method"]
        assert events(connection) == 0

    async def test_one_that_the_provider_does_not_know_is_a_decline(
        self, make: Make, connection: Connection, critical: list[str]
    ) -> None:
        """Of the first call that is certain: nobody can have had it captured before."""
        service = await make(PreparingGateway(unknown))
        charged = await charge(service, method="pay_mistyped")
        assert charged.payment.status is Status.FAILED
        assert charged.payment.decline_code == "reference_not_found"
        assert critical == []

    async def test_but_not_once_it_was_charged(
        self, make: Make, connection: Connection, critical: list[str]
    ) -> None:
        service = await make(PreparingGateway(opens("ready"), unknown))
        await charge(service, method="pay_1")
        await age(connection, 10)
        assert (await charge(service, method="pay_1")).payment.status is Status.PENDING
        assert len(critical) == 1

    async def test_nor_one_that_was_prepared(
        self, make: Make, connection: Connection, critical: list[str]
    ) -> None:
        service = await make(PreparingGateway(unknown))
        await charge_pending(service)
        assert len(critical) == 1


class TestWhatIsNotBegun:
    async def test_what_the_provider_refuses(self, make: Make, connection: Connection) -> None:
        service = await make(PreparingGateway())
        with pytest.raises(InvalidRequest) as refused:
            await charge(service, method="refused")
        assert [error.field for error in refused.value.errors] == ["payment_method"]
        assert events(connection) == 0
        assert (await charge(service, method="another")).payment.status is Status.SUCCESS

    async def test_what_was_begun_gets_its_outcome(
        self, make: Make, connection: Connection
    ) -> None:
        """The provider took it then."""
        gateway = PreparingGateway()
        gateway.refuses = lambda charge: None  # type: ignore[method-assign]
        await charge(await make(gateway), method="refused")
        charged = await charge(await make(PreparingGateway()), method="refused")
        assert (charged.payment.status, charged.replayed) == (Status.SUCCESS, True)

    async def test_while_the_provider_is_down(
        self, make: Make, connection: Connection, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setattr(breaker, "PAUSE_MIN_S", 60.0)

        def down(gateway: ScriptedGateway, asked: Any) -> None:
            raise NeverSent("refused")

        service = await make(PreparingGateway(prepare_script=[give_reference, *[down] * 5]))
        await charge(service, "known")
        for number in range(5):
            with pytest.raises(GatewayUnavailable):
                await charge(service, f"k{number}")
        before, asked = events(connection), len(preparing(service).preparations)
        with pytest.raises(GatewayUnavailable) as refused:
            await charge(service, "new")
        assert 50 < (refused.value.retry_after_s or 0) <= 60
        assert (events(connection), len(preparing(service).preparations)) == (before, asked)
        assert (await charge(service, "known")).payment.status is Status.SUCCESS
        await age(connection, 60)
        assert (await charge(service, "k0")).payment.status is Status.PENDING  # it is known


class TestAfterALossOfTheLog:
    async def lost(self, make: Make, connection: Connection, **gateway: Any) -> Any:
        """It was captured, and the log lost its reference."""
        service = await make(PreparingGateway(answer_lost, **gateway))
        await charge_pending(service)
        lose_after(connection, 1)
        return service

    def note_loss(self, connection: Connection, after_s: float = 0) -> None:
        connection.execute(
            "INSERT INTO log_losses (kind, at, by, reason, kept_position, lost_position,"
            " head_position) SELECT 'found', recorded_at + %s, 'a process', 'failover', 1, 2, 1"
            "   FROM payment_events WHERE originator_version = 1",
            [timedelta(seconds=after_s)],
        )

    @pytest.mark.parametrize("after_s", [0.1, -50])
    async def test_it_is_prepared_again_and_found(
        self, make: Make, connection: Connection, after_s: float
    ) -> None:
        """Also if the clock of the server that found the loss is behind."""
        service = await self.lost(make, connection)
        self.note_loss(connection, after_s)
        await age(connection, 10)
        await settle(service, connection)
        assert topics(connection, PAYMENT) == CHARGED
        gateway = preparing(service)
        assert (len(gateway.preparations), len(gateway.captures)) == (2, 1)
        assert gateway.preparations[1].payment_method is None
        assert as_stored(connection).provider_reference == gateway.references[PAYMENT]

    async def test_by_its_repetition_as_well(self, make: Make, connection: Connection) -> None:
        service = await self.lost(make, connection)
        await age(connection, 10)
        assert (await charge(service)).payment.status is Status.SUCCESS
        assert topics(connection, PAYMENT) == CHARGED
        assert len(preparing(service).captures) == 1

    async def test_later_it_waits_and_is_told(
        self, make: Make, connection: Connection, critical: list[str]
    ) -> None:
        """Another preparation would not be the same one."""
        service = await self.lost(make, connection, retry_s=100)
        self.note_loss(connection)
        await age(connection, 1000)
        for _ in range(2):
            await settle(service, connection)
        assert topics(connection, PAYMENT) == PREPARED[:1]
        assert len(preparing(service).preparations) == 1
        assert critical == ["the log may have lost the provider's id of the charge"]
        assert unsettled(connection) == [("charge", 2)]
        assert (await charge(service)).payment.status is Status.PENDING
        assert len(preparing(service).charges) == 1

    @pytest.mark.parametrize("step", [never_sent, no_answer])
    async def test_what_cannot_be_prepared_is_not_abandoned(
        self, make: Make, connection: Connection, step: Any
    ) -> None:
        service = await self.lost(make, connection)
        self.note_loss(connection)
        preparing(service).prepare_script = [step]
        await age(connection, 1000)
        await settle(service, connection)
        assert topics(connection, PAYMENT) == PREPARED[:1]
        await settle(service, connection)
        assert topics(connection, PAYMENT) == CHARGED

    async def test_one_that_began_after_the_loss_is_abandoned(
        self, make: Make, connection: Connection
    ) -> None:
        service = await make(PreparingGateway(prepare_script=[no_answer], retry_s=100))
        with pytest.raises(GatewayUnavailable):
            await charge(service)
        await age(connection, 700)
        self.note_loss(connection, -61)
        await settle(service, connection)
        assert topics(connection, PAYMENT) == ["PaymentInitiated", "PaymentFailed"]
        assert len(preparing(service).preparations) == 1

    async def test_that_nobody_has_noticed(self, make: Make, connection: Connection) -> None:
        """As of a restore as another database."""
        service = await self.lost(make, connection)
        await age(connection, 1000)
        await settle(service, connection)
        assert topics(connection, PAYMENT) == CHARGED
        assert len(preparing(service).captures) == 1


class TestAReferenceThatTheProviderDoesNotKnow:
    async def unknown(self, make: Make) -> Any:
        service = await make(PreparingGateway(answer_lost))
        await charge_pending(service)
        await project(service)

        async def find(charge: ProviderCharge, timeout_s: float) -> None:
            raise ReferenceNotFound("the provider does not know the reference")

        preparing(service).find_charge = find  # type: ignore[method-assign]
        return service

    async def test_is_an_alarm_and_never_an_outcome(
        self, make: Make, connection: Connection, critical: list[str]
    ) -> None:
        service = await self.unknown(make)
        await age(connection, 10_000)
        for _ in range(3):
            await settle(service, connection)
        assert topics(connection, PAYMENT) == PREPARED
        assert preparing(service).cancellations == []
        assert critical == ["the provider does not know the reference"]
        assert service.telemetry.mismatches["charge"]._value.get() == 3
        assert service.telemetry.settling["charge", "mismatch"]._value.get() == 3

    async def test_for_a_repetition_too(
        self, make: Make, connection: Connection, critical: list[str]
    ) -> None:
        service = await self.unknown(make)
        await age(connection, 10)
        await charge_pending(service)
        assert len(preparing(service).charges) == 1
        assert critical == ["the provider does not know the reference"]
        assert service.telemetry.mismatches["charge"]._value.get() == 1


async def test_a_charge_that_the_provider_finds_by_our_id_stores_no_reference(
    make: Make, connection: Connection
) -> None:
    await begin(await make(ScriptedGateway()))
    assert topics(connection, PAYMENT) == ["PaymentInitiated", "PaymentCharged"]
    assert connection.execute("SELECT count(*) FROM provider_references").fetchone() == (0,)
