"""Charges that a provider leaves open: until the customer has acted, or it has made up its mind."""

import asyncio
from collections.abc import Iterator
from io import StringIO
from typing import Any

import msgspec
import pytest
from loguru import logger

from payments.commands import settle as settling
from payments.commands.runs import cause
from payments.errors import GatewayUnavailable
from payments.gateways import Open
from payments.payment.decisions import referenced
from payments.payment.identity import payment_id_for
from payments.payment.state import Status
from payments.service import Service
from tests.commands.conftest import Make
from tests.commands.looking import PAYMENT, Connection, as_stored, topics
from tests.commands.preparing import ACTED, ACTION, PREPARED, SECRET, charge, preparing
from tests.commands.settling import (
    age,
    capture_late,
    due_in_s,
    hold_ends_in,
    project,
    settle,
    unsettled,
)
from tests.doubles.gateway import (
    PreparingGateway,
    ScriptedGateway,
    Step,
    answer_lost,
    approve,
    decline,
    never_sent,
    no_answer,
    opens,
)
from tests.machine import Machine, bound
from tests.support import append

pytestmark = pytest.mark.anyio

CHARGED = [*ACTED, "PaymentCharged"]
MUST_ACT = opens("action", ACTION)


async def acting(make: Make, *script: Step, **changed: Any) -> Service:
    """The client was told that its customer has to act."""
    cancel_script = changed.pop("cancel_script", ())
    gateway = PreparingGateway(MUST_ACT, *script, cancel_script=cancel_script)
    service = await make(gateway, **changed)
    charged = await charge(service)
    assert (charged.payment.status, charged.next_action) == (Status.PENDING, ACTION)
    return service


def now_open(service: Service, step: Any, id: Any = PAYMENT) -> None:
    """The customer has acted, or the provider went on by itself."""
    preparing(service).open[PAYMENT] = Open(id=id, step=step)


def nobody_cancels(gateway: ScriptedGateway, asked: Any) -> None:
    """The provider has captured nothing, and says so."""


class TestTheClient:
    async def test_is_told_what_the_customer_has_to_do(
        self, make: Make, connection: Connection
    ) -> None:
        await acting(make)
        assert topics(connection, PAYMENT) == ACTED
        row = connection.execute(
            "SELECT data ->> 'kind' FROM payment_event_log ORDER BY position DESC LIMIT 1"
        ).fetchone()
        assert row == (ACTION.type,)

    async def test_asks_again_and_is_told_at_once(
        self, make: Make, connection: Connection, machine: Machine
    ) -> None:
        """In another process, and long before the deadline of the first run."""
        service = await acting(make)
        fresh = msgspec.structs.replace(ACTION, fields={"client_secret": "another"})
        preparing(service).open[PAYMENT] = Open(id=PAYMENT, step="action", action=fresh)
        other = await make(preparing(service))
        began = asyncio.get_running_loop().time()
        charged = await charge(other)
        bound(asyncio.get_running_loop().time() - began, 2, machine)
        assert (charged.replayed, charged.next_action) == (True, fresh)
        assert topics(connection, PAYMENT) == ACTED
        assert len(preparing(service).charges) == 1

    async def test_goes_on_when_the_customer_has_acted(
        self, make: Make, connection: Connection
    ) -> None:
        service = await acting(make)
        now_open(service, "authorized")
        others = [await make(preparing(service)) for _ in range(3)]
        told = await asyncio.gather(*(charge(other) for other in (service, *others)))
        assert {each.payment.status for each in told} == {Status.SUCCESS}
        assert {each.next_action for each in told} == {None}
        assert topics(connection, PAYMENT) == CHARGED
        assert len(preparing(service).captures) == 1

    @pytest.mark.parametrize(("step", "status"), [(approve, "SUCCESS"), (decline, "FAILED")])
    async def test_learns_what_the_provider_did_by_itself(
        self, make: Make, connection: Connection, step: Any, status: str
    ) -> None:
        service = await acting(make)
        step(preparing(service), preparing(service).charges[0])
        charged = await charge(service)
        assert charged.payment.status == status
        assert len(preparing(service).charges) == 1

    async def test_waits_for_a_provider_that_works_on_it(
        self, make: Make, connection: Connection
    ) -> None:
        service = await make(PreparingGateway(opens("processing")))
        for seconds in (0, 10):
            await age(connection, seconds)
            charged = await charge(service)
            assert (charged.payment.status, charged.next_action) == (Status.PENDING, None)
        assert topics(connection, PAYMENT) == PREPARED
        assert len(preparing(service).charges) == 1
        approve(preparing(service), preparing(service).charges[0])
        await settle(service, connection)
        assert topics(connection, PAYMENT) == [*PREPARED, "PaymentCharged"]

    async def test_another_charge_of_the_provider_is_none_of_this_one(
        self, make: Make, connection: Connection, critical: list[str]
    ) -> None:
        service = await acting(make)
        now_open(service, "authorized", payment_id_for("other"))
        charged = await charge(service)
        assert (charged.payment.status, charged.next_action) == (Status.PENDING, None)
        assert len(preparing(service).charges) == 1
        assert len(critical) == 1


class TestSettling:
    async def test_completes_what_the_customer_authorized(
        self, make: Make, connection: Connection
    ) -> None:
        service = await acting(make)
        now_open(service, "authorized")
        await settle(service, connection)
        assert topics(connection, PAYMENT) == CHARGED
        gateway = preparing(service)
        assert (len(gateway.charges), len(gateway.captures)) == (2, 1)
        assert gateway.charges[1].payment_method is None
        assert unsettled(connection) == []

    @pytest.mark.parametrize("step", ["ready", "action", "processing"])
    async def test_leaves_the_rest_to_the_client(
        self, make: Make, connection: Connection, step: Any
    ) -> None:
        service = await acting(make)
        now_open(service, step)
        await settle(service, connection)
        assert topics(connection, PAYMENT) == ACTED
        assert len(preparing(service).charges) == 1

    async def test_what_nobody_was_told_to_act_on(self, make: Make, connection: Connection) -> None:
        service = await make(PreparingGateway(opens("authorized")))
        await charge(service)
        await settle(service, connection)
        assert topics(connection, PAYMENT) == PREPARED
        assert len(preparing(service).charges) == 1
        await age(connection, 10)
        assert (await charge(service)).payment.status is Status.SUCCESS

    async def test_what_is_not_held_for_long_enough(
        self, make: Make, connection: Connection
    ) -> None:
        service = await acting(make, seat_hold_s=900)
        hold_ends_in(connection, 10)
        now_open(service, "authorized")
        await project(service)
        connection.execute("UPDATE unsettled_payments SET attempts = 9")
        await settle(service, connection)
        assert topics(connection, PAYMENT) == ACTED
        gateway = preparing(service)
        assert (len(gateway.charges), gateway.cancellations) == (1, [])
        assert due_in_s(connection) < 10

    @pytest.mark.parametrize("step", ["ready", "action", "authorized"])
    async def test_cancels_what_could_be_captured_after_the_hold(
        self, make: Make, connection: Connection, step: Any
    ) -> None:
        """The customer still has the page, and the seats may be somebody else's."""
        service = await acting(make, seat_hold_s=900)
        hold_ends_in(connection, 0)
        now_open(service, step)
        await settle(service, connection)
        gateway = preparing(service)
        assert (len(gateway.charges), gateway.cancellations) == (1, [PAYMENT])
        assert as_stored(connection).failure == "declined"

    async def test_what_cannot_be_cancelled_after_the_hold_stays_pending(
        self, make: Make, connection: Connection
    ) -> None:
        service = await acting(make, cancel_script=[opens("processing")], seat_hold_s=900)
        hold_ends_in(connection, 0)
        for _ in range(2):
            await settle(service, connection)
        assert topics(connection, PAYMENT) == ACTED
        assert preparing(service).cancellations == [PAYMENT]

    @pytest.mark.parametrize("step", ["ready", "action", "authorized"])
    async def test_cancels_what_would_pay_an_order_twice(
        self, make: Make, connection: Connection, step: Any
    ) -> None:
        """The customer began anew, and paid; then they act in the first window as well."""
        service = await acting(make, second_charge="refuse")
        assert (await charge(service, "again")).payment.status is Status.SUCCESS
        now_open(service, step)
        assert (await charge(service)).payment.status is Status.PENDING
        await settle(service, connection)
        gateway = preparing(service)
        assert (len(gateway.captures), gateway.cancellations) == (1, [PAYMENT])
        assert as_stored(connection).failure == "declined"

    async def test_unless_an_order_may_have_two_payments(
        self, make: Make, connection: Connection
    ) -> None:
        service = await acting(make)
        assert (await charge(service, "again")).payment.status is Status.SUCCESS
        now_open(service, "authorized")
        await settle(service, connection)
        assert len(preparing(service).captures) == 2

    async def test_is_late_for_an_abandonment(self, make: Make, connection: Connection) -> None:
        """It is cancelled, not captured."""
        service = await acting(make)
        now_open(service, "authorized")
        await age(connection, 700)
        await settle(service, connection)
        gateway = preparing(service)
        assert (len(gateway.charges), gateway.cancellations) == (1, [PAYMENT])
        assert as_stored(connection).failure == "declined"

    @pytest.mark.parametrize("step", [never_sent, no_answer, answer_lost, opens("processing")])
    async def test_tries_again_what_it_does_not_know(
        self, make: Make, connection: Connection, step: Step
    ) -> None:
        service = await acting(make, step)
        now_open(service, "authorized")
        await settle(service, connection)
        assert topics(connection, PAYMENT) == ACTED
        if step not in (never_sent, no_answer, answer_lost):
            approve(preparing(service), preparing(service).charges[0])
        await settle(service, connection)
        assert topics(connection, PAYMENT) == CHARGED
        assert len(preparing(service).captures) == 1


class TestAbandonment:
    @pytest.mark.parametrize("step", ["ready", "action", "authorized", "processing"])
    async def test_cancels_first(self, make: Make, connection: Connection, step: Any) -> None:
        service = await acting(make)
        now_open(service, step)
        await age(connection, 700)
        await settle(service, connection)
        assert preparing(service).cancellations == [PAYMENT]
        assert topics(connection, PAYMENT) == [*ACTED, "PaymentFailed"]
        payment = as_stored(connection)
        assert (payment.failure, payment.decline_code) == ("declined", "cancelled")
        assert unsettled(connection) == []
        assert len(preparing(service).charges) == 1

    @pytest.mark.parametrize(
        ("step", "failure", "watched"),
        [
            (approve, None, False),
            (decline, "declined", False),
            (opens("processing"), "abandoned", True),
            (opens("authorized"), "abandoned", True),
            (nobody_cancels, "abandoned", True),
        ],
        ids=["captured", "declined", "processing", "authorized", "unknown"],
    )
    async def test_each_response(
        self, make: Make, connection: Connection, step: Step, failure: str | None, watched: bool
    ) -> None:
        service = await acting(make, cancel_script=[step])
        await age(connection, 700)
        await settle(service, connection)
        payment = as_stored(connection)
        assert (payment.status, payment.failure) == (
            Status.FAILED if failure else Status.SUCCESS,
            failure,
        )
        assert [kind for kind, _ in unsettled(connection)] == (["abandoned"] if watched else [])

    @pytest.mark.parametrize("step", [never_sent, no_answer])
    async def test_waits_until_it_was_cancelled(
        self, make: Make, connection: Connection, step: Step
    ) -> None:
        service = await acting(make, cancel_script=[step])
        await age(connection, 700)
        await settle(service, connection)
        assert topics(connection, PAYMENT) == ACTED
        await settle(service, connection)
        assert topics(connection, PAYMENT) == [*ACTED, "PaymentFailed"]
        assert preparing(service).cancellations == [PAYMENT] * 2

    async def test_a_late_capture_goes_back_with_its_reference(
        self, make: Make, connection: Connection
    ) -> None:
        service = await acting(make, cancel_script=[opens("processing")])
        await age(connection, 700)
        await settle(service, connection)
        capture_late(service)
        await settle(service, connection)
        assert topics(connection, PAYMENT)[-2:] == ["LateCaptureFound", "LateCaptureReturned"]
        (back,) = preparing(service).refunds
        assert back.reference == preparing(service).references[PAYMENT]

    async def test_what_is_processing_is_watched_to_its_end(
        self, make: Make, connection: Connection
    ) -> None:
        """However long that takes: it captures by itself."""
        service = await acting(make, cancel_script=[opens("processing")])
        await age(connection, 700)
        await settle(service, connection)
        await age(connection, 30 * 86_400)
        await settle(service, connection)
        assert [kind for kind, _ in unsettled(connection)] == ["abandoned"]
        capture_late(service)
        await settle(service, connection)
        assert topics(connection, PAYMENT)[-2:] == ["LateCaptureFound", "LateCaptureReturned"]
        assert unsettled(connection) == []

    async def test_what_opens_again_is_cancelled(self, make: Make, connection: Connection) -> None:
        service = await acting(make, cancel_script=[opens("processing")])
        await age(connection, 700)
        await settle(service, connection)
        now_open(service, "action")
        await settle(service, connection)
        assert preparing(service).cancellations == [PAYMENT] * 2
        assert unsettled(connection) == []

    async def test_a_reference_that_is_stored_meanwhile_is_asked_about_first(
        self, make: Make, connection: Connection, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        """A repetition goes on with it just then."""
        service = await make(PreparingGateway(prepare_script=[no_answer], retry_s=100))
        with pytest.raises(GatewayUnavailable):
            await charge(service)
        await age(connection, 700)

        async def find(*_: Any) -> None:
            fact = referenced(as_stored(connection), "pi_1", cause("default"))
            assert fact is not None
            append(connection, [fact])
            monkeypatch.undo()

        monkeypatch.setattr(settling, "find", find)
        await settle(service, connection)
        assert topics(connection, PAYMENT) == PREPARED
        await settle(service, connection)
        assert preparing(service).cancellations == [PAYMENT]
        assert as_stored(connection).failure == "declined"

    async def test_is_the_end_for_the_client(self, make: Make, connection: Connection) -> None:
        service = await acting(make)
        await age(connection, 700)
        await settle(service, connection)
        charged = await charge(service)
        assert (charged.payment.status, charged.next_action) == (Status.FAILED, None)


@pytest.fixture
def logged() -> Iterator[StringIO]:
    """All lines, with every field that was bound to them."""
    lines = StringIO()
    sink = logger.add(lines, level=0, serialize=True)
    yield lines
    logger.remove(sink)


async def test_what_the_customer_is_sent_is_neither_stored_nor_logged(
    make: Make, connection: Connection, logged: StringIO
) -> None:
    def names_another(gateway: ScriptedGateway, asked: Any) -> Any:
        return msgspec.structs.replace(MUST_ACT(gateway, asked), id=payment_id_for("other"))

    service = await acting(make, names_another)
    await charge(service)
    await charge(service, "mismatch")
    for _ in range(2):
        await settle(service, connection)
    await age(connection, 700)
    await settle(service, connection)
    tables = connection.execute(
        "SELECT c.oid::regclass::text FROM pg_class c"
        " WHERE c.relkind = 'r' AND c.relnamespace = current_schema()::regnamespace"
    ).fetchall()
    assert len(tables) > 10
    for (table,) in tables:
        found = connection.execute(
            f"SELECT count(*) FROM {table} t WHERE t::text LIKE %s"
            "    OR t::text LIKE '%%' || encode(convert_to(%s, 'UTF8'), 'hex') || '%%'".encode(),
            [f"%{SECRET}%", SECRET],
        ).fetchone()
        assert found == (0,), table
    assert "PaymentFailed" in logged.getvalue()
    assert SECRET not in logged.getvalue()
    assert SECRET not in repr(ACTION)
