"""SECOND_CHARGE: a charge with a new key for an order that another payment has paid."""

import asyncio
import uuid
from typing import Any

import psycopg
import pytest

from payments.commands import runs
from payments.commands.refund import RefundPayment
from payments.database.connections import Database
from payments.errors import DatabaseUnavailable, IdempotencyKeyReused, OrderAlreadyPaid
from payments.payment.identity import RefundRequest, payment_id_for
from payments.payment.state import Status
from payments.service import Service
from tests.commands.conftest import Make
from tests.commands.looking import topics
from tests.doubles.gateway import ScriptedGateway, after, decline, no_answer
from tests.support import History, append, charge_of, follow, until

pytestmark = pytest.mark.anyio

OTHER_ORDER = uuid.UUID(int=4)
SEEN_MAX = 2000  # events behind the read model


async def outcome(service: Service, key: str, **changed: Any) -> tuple[Status, bool]:
    charged = await service.charging.charge(charge_of(key, **changed))
    return charged.payment.status, charged.replayed


async def is_refused(service: Service, key: str, **changed: Any) -> str:
    """The error's detail."""
    with pytest.raises(OrderAlreadyPaid) as refused:
        await service.charging.charge(charge_of(key, **changed))
    return str(refused.value)


async def give_back(service: Service, key: str, amount_cents: int | None = None) -> None:
    refund = RefundRequest(
        payment_id=payment_id_for(key),
        amount_cents=amount_cents,
        idempotency_key="r",
        client="default",
    )
    await service.refunding.refund(RefundPayment(request=refund))


async def test_it_is_allowed_unless_told_otherwise_and_nothing_is_read(
    make: Make, monkeypatch: pytest.MonkeyPatch
) -> None:
    service = await make(ScriptedGateway())

    async def never(*_: Any, **__: Any) -> None:
        raise AssertionError("it was read")

    monkeypatch.setattr(service.database, "fetch", never)
    for key in ("k1", "k2"):
        assert await outcome(service, key) == (Status.SUCCESS, False)


@pytest.mark.parametrize("followed", [True, False], ids=["read model", "log"])
async def test_a_capture_is_seen_at_once_and_nothing_is_stored(
    make: Make, connection: psycopg.Connection[Any], database: Database, followed: bool
) -> None:
    """No follower runs: what it has not written is in the log."""
    gateway = ScriptedGateway()
    service = await make(gateway, second_charge="refuse")
    assert await outcome(service, "k1") == (Status.SUCCESS, False)
    if followed:
        await follow(database)
    detail = await is_refused(service, "k2")
    assert f"paid by payment {payment_id_for('k1')}" in detail
    assert topics(connection, payment_id_for("k2")) == []
    assert len(gateway.charges) == 1
    assert service.telemetry.charges["refused"]._value.get() == 1
    assert await outcome(service, "k3", order_id=OTHER_ORDER) == (Status.SUCCESS, False)


async def test_a_known_key_has_its_outcome(make: Make) -> None:
    """Also one of two payments from the time when both were allowed."""
    allowing = await make(ScriptedGateway())
    for key in ("k1", "k2"):
        await outcome(allowing, key)
    service = await make(ScriptedGateway(), second_charge="refuse")
    for key in ("k1", "k2"):
        assert await outcome(service, key) == (Status.SUCCESS, True)
        with pytest.raises(IdempotencyKeyReused):
            await service.charging.charge(charge_of(key, 999))


@pytest.mark.parametrize("shown", ["charged", "refunded", "nothing"])
async def test_an_order_whose_money_went_back_is_charged_with_the_key_that_was_refused(
    make: Make, database: Database, shown: str
) -> None:
    service = await make(ScriptedGateway(), second_charge="refuse")
    await outcome(service, "k1")
    if shown == "charged":
        await follow(database)
    await is_refused(service, "k2")
    await give_back(service, "k1", 500)
    await is_refused(service, "k2")
    refund = RefundRequest(
        payment_id=payment_id_for("k1"), amount_cents=None, idempotency_key="rest", client="default"
    )
    await service.refunding.refund(RefundPayment(request=refund))
    if shown == "refunded":
        await follow(database)
    assert await outcome(service, "k2") == (Status.SUCCESS, False)
    await is_refused(service, "k3")


@pytest.mark.parametrize("followed", [True, False], ids=["read model", "log"])
async def test_what_was_declined_or_is_open_pays_nothing(
    make: Make, database: Database, followed: bool
) -> None:
    gateway = ScriptedGateway(decline, no_answer)
    service = await make(gateway, second_charge="refuse")
    assert await outcome(service, "k1") == (Status.FAILED, False)
    assert await outcome(service, "k2") == (Status.PENDING, False)
    if followed:
        await follow(database)
    assert await outcome(service, "k3") == (Status.SUCCESS, False)


async def test_of_two_at_once_both_go_through(make: Make) -> None:
    answered = asyncio.Event()
    gateway = ScriptedGateway(after(answered))
    service = await make(gateway, second_charge="refuse")
    first = asyncio.create_task(outcome(service, "k1"))
    await until(lambda: gateway.charges)
    assert await outcome(service, "k2") == (Status.SUCCESS, False)
    answered.set()
    assert await first == (Status.SUCCESS, False)
    await is_refused(service, "k3")


async def test_a_parked_payment_counts_if_its_beginning_is_shown(
    make: Make, connection: psycopg.Connection[Any], database: Database
) -> None:
    """The follower is past its capture, and its row says PENDING for ever."""
    history = History("k1")
    append(connection, history.facts)
    await follow(database)
    append(connection, history.charged().facts[1:])
    connection.execute("UPDATE followers SET position = 2 WHERE name = 'payments'")
    service = await make(ScriptedGateway(), second_charge="refuse")
    await is_refused(service, "k2")


@pytest.mark.parametrize("later", [SEEN_MAX - 1, SEEN_MAX])
async def test_of_a_read_model_that_is_far_behind_the_newest_events_are_looked_at(
    make: Make, connection: psycopg.Connection[Any], later: int
) -> None:
    append(connection, History("k1").charged().facts)
    connection.execute(
        "INSERT INTO payment_events SELECT n + 2, gen_random_uuid(), 1, 'PaymentInitiated', '', "
        "now() FROM generate_series(1, %s) n",
        [later],
    )
    service = await make(ScriptedGateway(), second_charge="refuse")
    if later < SEEN_MAX:
        await is_refused(service, "k2")
    else:
        assert await outcome(service, "k2") == (Status.SUCCESS, False)


async def test_an_order_that_is_named_elsewhere_in_an_event_is_not_paid(make: Make) -> None:
    service = await make(ScriptedGateway(), second_charge="refuse")
    command = charge_of("k1", order_id=OTHER_ORDER)
    named = type(command)(
        request=command.request, request_id=str(charge_of("k2").request.merchant_order_id)
    )
    await service.charging.charge(named)
    assert await outcome(service, "k2") == (Status.SUCCESS, False)


async def test_another_clients_payment_counts_and_is_not_named(make: Make) -> None:
    service = await make(ScriptedGateway(), second_charge="refuse")
    await outcome(service, "k1", client="shop")
    detail = await is_refused(service, "k2", client="kiosk")
    assert "paid by another client's payment" in detail
    assert str(payment_id_for("k1")) not in detail


async def test_without_an_answer_of_the_database_nothing_is_charged(
    make: Make, monkeypatch: pytest.MonkeyPatch
) -> None:
    gateway = ScriptedGateway()
    service = await make(gateway, second_charge="refuse")

    async def away(*_: Any, **__: Any) -> None:
        raise DatabaseUnavailable("away")

    with monkeypatch.context() as patched:
        patched.setattr(service.database, "fetch", away)
        with pytest.raises(DatabaseUnavailable):
            await service.charging.charge(charge_of("k1"))
    assert gateway.charges == []
    assert await outcome(service, "k1") == (Status.SUCCESS, False)


async def test_an_answer_that_comes_too_late_uses_no_key_up(
    make: Make, connection: psycopg.Connection[Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(runs, "INTENT_PATIENCE_S", 0.1)
    service = await make(ScriptedGateway(), second_charge="refuse")
    told = asyncio.Event()

    async def late(*_: Any, **__: Any) -> list[Any]:
        await told.wait()
        return []

    monkeypatch.setattr(service.database, "fetch", late)
    with pytest.raises(DatabaseUnavailable):
        await service.charging.charge(charge_of("k1"))
    told.set()
    await service.runs.drain(5)
    assert topics(connection, payment_id_for("k1")) == []
