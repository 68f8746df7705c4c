"""What a process still knows when the log went back is not thrown away, and nothing is forced."""

import uuid
from typing import Any

import pytest

from payments import event_store
from payments.commands.runs import cause
from payments.errors import LogRewound
from payments.event_store import load_charge, load_payment
from payments.events.facts import Fact
from payments.gateways import ProviderCharge
from payments.payment.decisions import abandon, initiate_refund
from payments.payment.identity import RefundRequest, payment_id_for
from payments.payment.state import Approved, Payment, Status
from payments.service import Service
from tests.commands.conftest import Make
from tests.commands.looking import (
    PAYMENT,
    Connection,
    as_stored,
    begin,
    capture,
    gateway_of,
    topics,
)
from tests.commands.refunding import charged, refund_of
from tests.commands.settling import FAST, SOON, age, project, settle, unsettled
from tests.doubles.gateway import (
    ScriptedGateway,
    Step,
    answer_lost,
    approve,
    decline,
    never_sent,
    no_answer,
)
from tests.lost_log import accept_loss, lose_after
from tests.support import History, append, charge_of, stored_event

pytestmark = pytest.mark.anyio


def losing(connection: Connection, position: int, *then: Any, step: Step = approve) -> Step:
    """While the provider works on it the log goes back, and gets these facts."""

    def lose(gateway: ScriptedGateway, asked: Any) -> Any:
        outcome = step(gateway, asked)
        lose_after(connection, position)
        for facts in then:
            append(connection, facts)
        return outcome

    return lose


def event_ids(connection: Connection) -> list[str]:
    rows = connection.execute(
        "SELECT convert_from(state, 'UTF8')::json ->> 'event_id' FROM payment_events"
        " ORDER BY notification_id"
    ).fetchall()
    return [event_id for (event_id,) in rows]


async def stored(service: Service) -> Payment:
    loaded = await load_payment(service.database, PAYMENT)
    assert loaded is not None
    return loaded.payment


class TestCharge:
    async def test_intent_and_outcome_are_appended_again(
        self, make: Make, connection: Connection
    ) -> None:
        known: list[str] = []

        def lose(gateway: ScriptedGateway, asked: Any) -> Any:
            known.extend(event_ids(connection))
            return losing(connection, 0)(gateway, asked)

        service = await make(ScriptedGateway(lose))
        answered = await service.charging.charge(charge_of("k"))
        assert answered.payment.status is Status.SUCCESS
        assert topics(connection, PAYMENT) == ["PaymentInitiated", "PaymentCharged"]
        assert event_ids(connection)[:1] == known  # byte for byte, so its id is the same

    async def test_a_decline_too(self, make: Make, connection: Connection) -> None:
        service = await make(ScriptedGateway(losing(connection, 0, step=decline)))
        answered = await service.charging.charge(charge_of("k"))
        assert answered.payment.status is Status.FAILED
        assert topics(connection, PAYMENT) == ["PaymentInitiated", "PaymentFailed"]

    async def test_the_same_request_that_began_again_meanwhile_gets_the_outcome(
        self, make: Make, connection: Connection
    ) -> None:
        facts = History("k", client="default").facts
        service = await make(ScriptedGateway(losing(connection, 0, facts)))
        answered = await service.charging.charge(charge_of("k"))
        assert answered.payment.status is Status.SUCCESS
        assert topics(connection, PAYMENT) == ["PaymentInitiated", "PaymentCharged"]

    @pytest.mark.parametrize("other", [{"amount_cents": 999}, {"order_id": uuid.uuid4()}])
    async def test_another_request_under_the_key_is_a_mismatch(
        self, make: Make, connection: Connection, other: dict[str, Any]
    ) -> None:
        """Nothing is forced upon it, and this one is never an error."""
        facts = History("k", client="default", **other).facts
        service = await make(ScriptedGateway(losing(connection, 0, facts)))
        answered = await service.charging.charge(charge_of("k"))
        assert answered.payment.status is Status.PENDING
        assert topics(connection, PAYMENT) == ["PaymentInitiated"]
        assert service.telemetry.mismatches["charge"]._value.get() == 1

    async def test_an_outcome_that_stands_there_is_the_outcome(
        self, make: Make, connection: Connection
    ) -> None:
        """Settling asked the provider after the failover, on another machine."""

        def found(gateway: ScriptedGateway, asked: Any) -> Any:
            outcome = approve(gateway, asked)
            lose_after(connection, 0)
            append(connection, History("k", client="default").charged().facts)
            return outcome

        service = await make(ScriptedGateway(found))
        answered = await service.charging.charge(charge_of("k"))
        assert answered.payment.status is Status.SUCCESS
        assert topics(connection, PAYMENT) == ["PaymentInitiated", "PaymentCharged"]

    async def test_a_stream_that_vanishes_before_it_was_read_begins_again(
        self, make: Make, connection: Connection, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        """The append met another request's intent; the log went back before that was read."""
        service = await make(ScriptedGateway())
        append(connection, History("k", client="default").facts)

        async def load(*arguments: Any) -> Any:
            monkeypatch.undo()
            lose_after(connection, 0)
            return await load_charge(*arguments)

        monkeypatch.setattr(event_store, "load_charge", load)
        answered = await service.charging.charge(charge_of("k"))
        assert answered.payment.status is Status.SUCCESS
        assert gateway_of(service).questions == [PAYMENT]  # the run that was lost may have charged
        assert topics(connection, PAYMENT) == ["PaymentInitiated", "PaymentCharged"]


class TestRefund:
    @pytest.mark.parametrize("kept", [0, 1, 2])
    async def test_whatever_was_lost_of_the_payment_is_appended_again(
        self, make: Make, connection: Connection, kept: int
    ) -> None:
        service = await charged(make, losing(connection, kept))
        refunded = await service.refunding.refund(refund_of(400))
        assert refunded.refund.status is Status.SUCCESS
        assert (await stored(service)).refunded_cents == 400
        assert topics(connection, PAYMENT) == [
            "PaymentInitiated",
            "PaymentCharged",
            "RefundInitiated",
            "PaymentRefunded",
        ]

    async def test_one_without_room_any_more_is_a_mismatch(
        self, make: Make, connection: Connection
    ) -> None:
        """Another refund of the whole amount was made after the failover."""

        def lose(gateway: ScriptedGateway, asked: Any) -> Any:
            outcome = approve(gateway, asked)
            lose_after(connection, 2)
            append(connection, [other_refund(connection, None)])
            return outcome

        service = await charged(make, lose)
        refunded = await service.refunding.refund(refund_of(400))
        assert refunded.refund.status is Status.PENDING
        assert (await stored(service)).reserved_cents == 1000
        assert service.telemetry.mismatches["refund"]._value.get() == 1

    async def test_one_that_fits_is_reserved_again_behind_what_came(
        self, make: Make, connection: Connection
    ) -> None:
        def lose(gateway: ScriptedGateway, asked: Any) -> Any:
            outcome = approve(gateway, asked)
            lose_after(connection, 2)
            append(connection, [other_refund(connection, 300)])
            return outcome

        service = await charged(make, lose)
        refunded = await service.refunding.refund(refund_of(400, "a"))
        assert refunded.refund.status is Status.SUCCESS
        payment = await stored(service)
        assert (payment.refunded_cents, payment.reserved_cents) == (400, 300)
        assert [refund.idempotency_key for refund in payment.refunds] == ["other", "a"]
        again = await service.refunding.refund(refund_of(400, "a"))
        assert (again.refund.id, again.replayed) == (refunded.refund.id, True)

    async def test_what_took_another_turn_is_not_forced_back(
        self, make: Make, connection: Connection
    ) -> None:
        """After the failover the charge began again, and was declined."""

        def lose(gateway: ScriptedGateway, asked: Any) -> Any:
            outcome = approve(gateway, asked)
            lose_after(connection, 0)
            append(connection, History("k", 1000, client="default").declined().facts)
            return outcome

        service = await charged(make, lose)
        refunded = await service.refunding.refund(refund_of(400))
        assert refunded.refund.status is Status.PENDING
        assert topics(connection, PAYMENT) == ["PaymentInitiated", "PaymentFailed"]
        assert service.telemetry.mismatches["refund"]._value.get() == 1

    async def test_nothing_is_reserved_on_what_came_meanwhile(
        self, make: Make, connection: Connection
    ) -> None:
        """It went back between reading and appending, and has as many events again."""
        service = await charged(make)
        real = service.appender.append_intent

        def append_intent(event: Any, **options: Any) -> Any:
            lose_after(connection, 0)
            append(connection, History("k", 1000, client="default").declined().facts)
            return real(event, **options)

        service.appender.append_intent = append_intent  # type: ignore[method-assign]
        with pytest.raises(LogRewound):
            await service.refunding.refund(refund_of(400))
        assert topics(connection, PAYMENT) == ["PaymentInitiated", "PaymentFailed"]

    async def test_a_refusal_of_a_lost_refund_records_nothing(
        self, make: Make, connection: Connection
    ) -> None:
        def lose(gateway: ScriptedGateway, asked: Any) -> Any:
            outcome = decline(gateway, asked)
            lose_after(connection, 2)
            append(connection, [other_refund(connection, 300)])
            return outcome

        service = await charged(make, lose)
        with pytest.raises(Exception, match="refused the refund"):
            await service.refunding.refund(refund_of(400, "a"))
        assert (await stored(service)).reserved_cents == 300


def other_refund(connection: Connection, amount_cents: int | None) -> Fact:
    """What another process would append to the payment as it stands."""
    request = RefundRequest(
        payment_id=PAYMENT, amount_cents=amount_cents, idempotency_key="other", client="default"
    )
    return initiate_refund(as_stored(connection), request, cause("default"))


class TestSettling:
    async def test_an_outcome_is_recorded_though_the_stream_is_gone(
        self, make: Make, connection: Connection
    ) -> None:
        service = await make(ScriptedGateway(answer_lost), **SOON)
        await begin(service)
        await project(service)
        gateway = gateway_of(service)

        async def find(charge: ProviderCharge, timeout_s: float) -> Any:
            lose_after(connection, 0)
            return gateway.outcomes[charge.payment_id]

        gateway.find_charge = find  # type: ignore[method-assign]
        connection.execute("UPDATE unsettled_payments SET due_at = clock_timestamp()")
        await service.settling.run_once()
        assert topics(connection, PAYMENT) == ["PaymentInitiated", "PaymentCharged"]

    async def test_a_late_capture_that_was_returned_is_found_again(
        self, make: Make, connection: Connection
    ) -> None:
        """The log went back to before it was abandoned, and it was abandoned anew."""

        def lose(gateway: ScriptedGateway, asked: Any) -> Any:
            outcome = approve(gateway, asked)
            lose_after(connection, 1)
            facts = connection.execute("SELECT originator_version FROM payment_events").fetchall()
            assert facts == [(1,)]
            abandonment = abandon(as_stored(connection), cause("default"))
            assert abandonment is not None
            append(connection, [abandonment])
            return outcome

        service = await make(ScriptedGateway(no_answer, refund_script=[lose]), **SOON)
        await capture(service)
        await age(connection, 10)
        await settle(service, connection)
        assert topics(connection, PAYMENT)[-1] == "PaymentFailed"
        gateway = gateway_of(service)
        gateway.outcomes[PAYMENT] = Approved(
            id=PAYMENT, amount_cents=1500, currency="INR", provider_txn_id="txn-late"
        )
        await settle(service, connection)
        assert topics(connection, PAYMENT)[-1] == "LateCaptureFound"
        await settle(service, connection)
        assert topics(connection, PAYMENT)[-1] == "LateCaptureReturned"
        assert len(gateway.given_back) == 1


def lose_something(service: Service) -> None:
    """An event that was acknowledged to this process and is not in the log."""
    service.watch.acknowledged(1000, stored_event())


class TestWhileALossIsOpen:
    async def test_nothing_is_given_back_and_charges_go_on(
        self, make: Make, connection: Connection
    ) -> None:
        service = await charged(make, **FAST)
        lose_after(connection, 1)
        with pytest.raises(LogRewound, match="accept-loss"):
            await service.refunding.refund(refund_of())
        assert gateway_of(service).refunds == []
        answered = await service.charging.charge(charge_of("another"))
        assert answered.payment.status is Status.SUCCESS
        accept_loss(connection)
        await service.charging.charge(charge_of("new"))
        refund = refund_of(payment_id=payment_id_for("new"))
        assert (await service.refunding.refund(refund)).refund.status is Status.SUCCESS

    async def test_a_refund_that_was_reserved_meanwhile_waits(
        self, make: Make, connection: Connection
    ) -> None:
        """The loss is found between the look and the append, by its connection."""
        service = await charged(make)
        real = service.appender.append_intent

        def append_intent(event: Any, **options: Any) -> Any:
            service.watch.lost = True
            return real(event, **options)

        service.appender.append_intent = append_intent  # type: ignore[method-assign]
        refunded = await service.refunding.refund(refund_of())
        assert refunded.refund.status is Status.PENDING
        assert gateway_of(service).refunds == []

    async def test_settling_sends_nothing_until_it_is_accepted(
        self, make: Make, connection: Connection
    ) -> None:
        service = await charged(make, never_sent, **SOON)
        assert (await service.refunding.refund(refund_of())).refund.status is Status.PENDING
        await age(connection, 10)
        lose_something(service)
        await settle(service, connection)
        assert len(gateway_of(service).refunds) == 1
        assert unsettled(connection) == [("refund", 1)]
        accept_loss(connection)
        await settle(service, connection)
        assert topics(connection, PAYMENT)[-1] == "PaymentRefunded"

    async def test_late_captures_wait_too(self, make: Make, connection: Connection) -> None:
        service = await make(ScriptedGateway(no_answer), **SOON)
        await begin(service)
        await age(connection, 10)
        await settle(service, connection)
        gateway = gateway_of(service)
        gateway.outcomes[PAYMENT] = Approved(
            id=PAYMENT, amount_cents=1500, currency="INR", provider_txn_id="txn-late"
        )
        lose_something(service)
        await settle(service, connection)
        assert topics(connection, PAYMENT)[-1] == "LateCaptureFound"
        assert gateway.refunds == []
        accept_loss(connection)
        await settle(service, connection)
        assert topics(connection, PAYMENT)[-1] == "LateCaptureReturned"

    async def test_what_was_given_back_already_is_recorded(
        self, make: Make, connection: Connection
    ) -> None:
        """Asking is no giving back."""
        service = await charged(make, answer_lost, **SOON)
        await service.refunding.refund(refund_of())
        await age(connection, 10)
        lose_something(service)
        await settle(service, connection)
        assert topics(connection, PAYMENT)[-1] == "PaymentRefunded"
