"""A webhook makes its payment due now, once, and decides nothing."""

import asyncio
import uuid
from typing import Any, ClassVar

import pytest
from loguru import logger

from payments import hints
from payments.commands.settling_loop import pause_s
from payments.payment.identity import payment_id_for
from payments.payment.state import Status
from payments.service import Service
from tests.commands.conftest import Make
from tests.commands.hinting import HintingGateway, send, wait_long
from tests.commands.looking import PAYMENT, Connection, gateway_of, topics
from tests.commands.preparing import PREPARED, charge, charge_pending
from tests.commands.settling import FAST, SOON, age, due_in_s, project, settle, unsettled
from tests.doubles.gateway import (
    after,
    answer_lost,
    approve,
    asking,
    decline,
    no_answer,
)
from tests.support import until

pytestmark = pytest.mark.anyio

REFERENCE = f"pi_{PAYMENT.hex}"
CHARGED = [*PREPARED, "PaymentCharged"]


async def pending(make: Make, connection: Connection, *script: Any, **options: Any) -> Service:
    """A payment without an outcome, which is asked about again in a minute."""
    service = await make(HintingGateway(*(script or (no_answer,)), **options), **FAST)
    await charge_pending(service)
    await project(service)
    wait_long(connection)
    return service


def stored(connection: Connection) -> list[tuple[str, uuid.UUID | None, str | None]]:
    return connection.execute(
        "SELECT event_id, payment_id, reference FROM provider_hints ORDER BY received_at"
    ).fetchall()


class TestAnUnsettledPayment:
    @pytest.mark.parametrize("about", [{"reference": REFERENCE}, {"payment_id": PAYMENT}])
    async def test_it_is_due_at_once_and_its_pauses_are_short_again(
        self, make: Make, connection: Connection, about: dict[str, Any]
    ) -> None:
        service = await pending(make, connection)
        assert await service.settling.run_once() == 0
        assert await send(service, **about) == ("accepted", PAYMENT)
        assert unsettled(connection) == [("charge", 0)]
        assert due_in_s(connection) <= 0
        assert await service.settling.run_once() == 1
        assert due_in_s(connection) <= pause_s(1, "charge")

    async def test_what_it_says_is_not_believed(self, make: Make, connection: Connection) -> None:
        service = await pending(make, connection)
        await send(service, reference=REFERENCE)
        await service.settling.run_once()
        assert topics(connection, PAYMENT) == PREPARED  # the provider has captured nothing
        gateway_of(service).capture(asking(PAYMENT))
        await send(service, "evt_2", reference=REFERENCE)
        await service.settling.run_once()
        assert topics(connection, PAYMENT) == CHARGED

    async def test_an_event_counts_once(self, make: Make, connection: Connection) -> None:
        service = await pending(make, connection)
        both = await asyncio.gather(*(send(service, reference=REFERENCE) for _ in range(2)))
        assert sorted(each.result for each in both) == ["accepted", "duplicate"]
        await service.settling.run_once()
        wait_long(connection)
        assert (await send(service, reference=REFERENCE)).result == "duplicate"
        assert due_in_s(connection) > 50
        assert len(stored(connection)) == 1

    async def test_the_order_of_events_does_not_matter(
        self, make: Make, connection: Connection
    ) -> None:
        service = await pending(make, connection, answer_lost)
        for event_id in ("evt_2_captured", "evt_1_processing"):
            assert (await send(service, event_id, reference=REFERENCE)).result == "accepted"
        await settle(service, connection)
        assert topics(connection, PAYMENT) == CHARGED
        assert (await send(service, "evt_0_created", reference=REFERENCE)).result == "ignored"
        assert await service.settling.run_once() == 0

    async def test_an_event_of_another_provider_with_the_same_id_is_another_one(
        self, make: Make, connection: Connection
    ) -> None:
        service = await pending(make, connection)
        connection.execute(
            "INSERT INTO provider_hints (gateway, event_id, reference)"
            " VALUES ('other', 'evt_1', %s)",
            [REFERENCE],
        )
        assert (await send(service, reference=REFERENCE)).result == "accepted"

    async def test_one_during_an_attempt_is_asked_about_once_more(
        self, make: Make, connection: Connection
    ) -> None:
        """The provider's response may be older than what the webhook tells of."""
        service = await pending(make, connection)
        gateway, asked, go_on = gateway_of(service), asyncio.Event(), asyncio.Event()
        find = gateway.find_charge

        async def slow(*args: Any) -> Any:
            found = await find(*args)
            asked.set()
            await go_on.wait()
            return found

        gateway.find_charge = slow  # type: ignore[assignment, method-assign]
        await send(service, "evt_1", reference=REFERENCE)
        attempt = asyncio.create_task(service.settling.run_once())
        await asked.wait()
        gateway.capture(asking(PAYMENT))
        await send(service, "evt_2", reference=REFERENCE)
        go_on.set()
        await attempt
        assert topics(connection, PAYMENT) == PREPARED
        assert due_in_s(connection) <= 0
        await service.settling.run_once()
        assert topics(connection, PAYMENT) == CHARGED


class TestBesideARequest:
    async def test_a_payment_is_left_to_the_request_that_began_it(
        self, make: Make, connection: Connection
    ) -> None:
        """Also if the webhook comes before the provider's response: one outcome, no question."""
        captured, go_on = asyncio.Event(), asyncio.Event()

        async def slow(gateway: Any, asked: Any) -> Any:
            approved = gateway.capture(asked)
            captured.set()
            await go_on.wait()
            return approved

        service = await make(
            HintingGateway(slow),
            charge_deadline_s=30,
            gateway_timeout_s=20,
            pending_abandon_after_s=60,
        )
        running = asyncio.create_task(charge(service))
        await captured.wait()
        await project(service)
        assert await send(service, reference=REFERENCE) == ("accepted", PAYMENT)
        assert 20 < due_in_s(connection) <= 30
        assert await service.settling.run_once() == 0
        go_on.set()
        assert (await running).payment.status is Status.SUCCESS
        await project(service)
        assert unsettled(connection) == []
        assert topics(connection, PAYMENT) == CHARGED
        assert gateway_of(service).questions == []

    async def test_a_retry_and_settling_at_once_come_to_one_outcome(
        self, make: Make, connection: Connection
    ) -> None:
        go_on = asyncio.Event()
        service = await pending(make, connection, no_answer, after(go_on, approve))
        gateway = gateway_of(service)
        await age(connection, 10)
        retry = asyncio.create_task(charge(service))
        await until(lambda: len(gateway.charges) == 2)
        gateway.capture(asking(PAYMENT))
        await send(service, reference=REFERENCE)
        assert await service.settling.run_once() == 1
        assert topics(connection, PAYMENT) == CHARGED
        go_on.set()
        assert (await retry).payment.status is Status.SUCCESS
        await service.runs.drain(30)
        assert topics(connection, PAYMENT) == CHARGED
        assert gateway.captures == [PAYMENT]


class TestAnUnknownPayment:
    async def test_it_is_kept(self, make: Make, connection: Connection) -> None:
        service = await make(HintingGateway(), **FAST)
        other = uuid.uuid4()
        assert await send(service, "evt_1", reference="pay_1") == ("unknown", None)
        assert await send(service, "evt_2", payment_id=other) == ("unknown", other)
        assert stored(connection) == [("evt_1", None, "pay_1"), ("evt_2", other, None)]
        assert (await send(service, "evt_1", reference="pay_1")).result == "duplicate"

    async def test_once_known_it_is_due_when_its_request_is_over(
        self, make: Make, connection: Connection
    ) -> None:
        """So whatever came before is asked about as soon as that is of use."""
        service = await make(HintingGateway(answer_lost), **FAST)
        assert (await send(service, reference="pay_1")).result == "unknown"
        await charge(service, method="pay_1")
        await project(service)
        assert due_in_s(connection) <= FAST["charge_deadline_s"]
        await until(service.settling.run_once)
        assert topics(connection, PAYMENT) == ["PaymentInitiated", "PaymentCharged"]

    @pytest.mark.parametrize("about", [{"reference": "pay_1"}, {"payment_id": PAYMENT}])
    async def test_one_that_was_declined_meanwhile_is_asked_about_once(
        self, make: Make, connection: Connection, about: dict[str, Any]
    ) -> None:
        """Its row would be due in days."""
        service = await make(HintingGateway(decline, declines_may_turn_s=1000), **FAST)
        assert (await send(service, **about)).result == "unknown"
        await charge(service, method="pay_1")
        await project(service)
        assert due_in_s(connection) <= 0
        assert await service.settling.run_once() == 1
        assert gateway_of(service).questions == [PAYMENT]
        assert 900 < due_in_s(connection) <= 1000
        connection.execute("UPDATE unsettled_payments SET due_at = clock_timestamp()")
        assert await service.settling.run_once() == 1
        assert gateway_of(service).questions == [PAYMENT]

    async def test_of_a_settled_payment_there_is_nothing_to_do(
        self, make: Make, connection: Connection
    ) -> None:
        service = await make(HintingGateway(), **FAST)
        await charge(service)
        await project(service)
        assert await send(service, reference=REFERENCE) == ("ignored", PAYMENT)
        assert unsettled(connection) == []


class TestWhatIsWatched:
    TURNING: ClassVar[dict[str, Any]] = {"declines_may_turn_s": 1000}

    async def declined(self, make: Make, connection: Connection) -> Service:
        service = await make(HintingGateway(decline, **self.TURNING), **FAST)
        await charge(service)
        await project(service)
        connection.execute("UPDATE unsettled_payments SET since = since - interval '1 hour'")
        assert due_in_s(connection) > 990
        return service

    async def test_a_declined_payment_that_turned_is_given_back_now(
        self, make: Make, connection: Connection
    ) -> None:
        service = await self.declined(make, connection)
        gateway = gateway_of(service)
        gateway.outcomes.clear()
        gateway.capture(asking(PAYMENT))
        assert (await send(service, reference=REFERENCE)).result == "accepted"
        assert await service.settling.run_once() == 1
        assert topics(connection, PAYMENT)[-2:] == ["LateCaptureFound", "LateCaptureReturned"]
        assert len(gateway.given_back) == 1

    async def test_one_that_did_not_is_asked_about_at_the_end_as_well(
        self, make: Make, connection: Connection
    ) -> None:
        service = await self.declined(make, connection)
        await send(service, reference=REFERENCE)
        assert await service.settling.run_once() == 1
        assert len(gateway_of(service).questions) == 1
        assert 900 < due_in_s(connection) <= 1000
        await age(connection, 1000)
        await settle(service, connection)
        assert len(gateway_of(service).questions) == 2
        assert unsettled(connection) == []

    async def test_a_provider_that_does_not_respond_is_asked_again_soon(
        self, make: Make, connection: Connection
    ) -> None:
        service = await self.declined(make, connection)
        gateway_of(service).reachable = False
        await send(service, reference=REFERENCE)
        for asked in (1, 2):
            assert await service.settling.run_once() == 1
            assert len(gateway_of(service).questions) == asked
            assert due_in_s(connection) <= pause_s(2, "settled")
            connection.execute("UPDATE unsettled_payments SET due_at = clock_timestamp()")
        gateway_of(service).reachable = True
        assert await service.settling.run_once() == 1
        assert due_in_s(connection) > 900

    async def test_an_abandoned_payment_is_asked_about_now(
        self, make: Make, connection: Connection
    ) -> None:
        service = await make(HintingGateway(no_answer, cancel_script=[lambda *_: None]), **SOON)
        gateway = gateway_of(service)
        await charge_pending(service)
        await age(connection, 1)
        await settle(service, connection)
        assert unsettled(connection)[0][0] == "abandoned"
        wait_long(connection, "abandoned")
        gateway.capture(asking(PAYMENT))
        assert (await send(service, reference=REFERENCE)).result == "accepted"
        assert await service.settling.run_once() == 1
        assert topics(connection, PAYMENT)[-2:] == ["LateCaptureFound", "LateCaptureReturned"]


class TestOldOnes:
    async def test_they_are_removed_some_at_a_time(
        self, make: Make, connection: Connection, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setattr(hints, "PURGE_MAX", 3)
        connection.execute(
            "INSERT INTO provider_hints (gateway, event_id, payment_id, received_at)"
            " SELECT 'p', 'evt_' || n, gen_random_uuid(), now() - n * interval '1 day'"
            "   FROM generate_series(0.5, 11.5) n"
        )
        service = await make(HintingGateway(), work=True, **FAST)
        service.settling._purge_at = 0.0
        await until(lambda: len(stored(connection)) == hints.KEPT_DAYS)
        assert {event_id for event_id, *_ in stored(connection)} == {
            f"evt_{n}.5" for n in range(hints.KEPT_DAYS)
        }

    async def test_what_cannot_be_removed_keeps_nothing_from_being_settled(
        self, make: Make, connection: Connection
    ) -> None:
        connection.execute("ALTER TABLE provider_hints RENAME COLUMN received_at TO at")
        told: list[str] = []
        sink = logger.add(told.append, format="{message}", level="WARNING")
        service = await make(HintingGateway(answer_lost), work=True, **FAST)
        service.settling._purge_at = 0.0
        await charge(service)
        await until(lambda: topics(connection, PAYMENT) == CHARGED)
        await until(lambda: "old webhooks of providers cannot be removed\n" in told)
        logger.remove(sink)
        assert "unsettled payments cannot be read\n" not in told


async def test_among_a_thousand_unsettled_payments(make: Make, connection: Connection) -> None:
    """Only the payment of the webhook is asked about, and by indexes alone."""
    service = await pending(make, connection)
    connection.execute(
        "INSERT INTO unsettled_payments (payment_id, kind, since, due_at)"
        " SELECT gen_random_uuid(), 'charge', now() - interval '2 min', now() + interval '60 s'"
        "   FROM generate_series(1, 1000)"
    )
    gateway_of(service).capture(asking(PAYMENT))
    await send(service, reference=REFERENCE)
    assert await service.settling.run_once() == 1
    assert topics(connection, PAYMENT) == CHARGED


async def test_the_version_before_works_beside_this_one(make: Make, connection: Connection) -> None:
    """It knows neither the table nor the column: what it writes is complete without them."""
    service = await pending(make, connection)
    await send(service, reference=REFERENCE)
    connection.execute(  # as its follower and its settling do
        "INSERT INTO unsettled_payments AS u (payment_id, kind, since, due_at)"
        " VALUES (%s, 'charge', now(), now()) ON CONFLICT (payment_id) DO UPDATE SET attempts = 0,"
        " change = excluded.change",
        [payment_id_for("other")],
    )
    row = connection.execute(
        "SELECT hinted FROM unsettled_payments WHERE payment_id = %s", [payment_id_for("other")]
    ).fetchone()
    assert row == (False,)
