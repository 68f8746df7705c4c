"""The situations of a charge: what is answered, what is stored, what the provider was asked."""

import asyncio
import time
import uuid
from contextlib import suppress
from typing import Any

import msgspec
import psycopg
import pytest
from eventsourcing.persistence import StoredEvent

from payments.commands import runs
from payments.commands.charge import Charged
from payments.commands.refund import RefundPayment
from payments.commands.runs import Caller
from payments.errors import (
    ClientGone,
    DatabaseUnavailable,
    GatewayUnavailable,
    IdempotencyKeyReused,
    PaymentUnreadable,
    TooBusy,
    Unavailable,
)
from payments.gateways import NeverSent, OutcomeUnknown, ProviderCharge
from payments.payment.identity import RefundRequest, payment_id_for
from payments.payment.state import Status
from payments.queries.payments import get_payment
from tests.commands.conftest import Make
from tests.commands.looking import begin, first_answer, topics
from tests.commands.settling import age
from tests.doubles.gateway import (
    Failure,
    ScriptedGateway,
    after,
    answer_lost,
    approve,
    decline,
    never_sent,
    no_answer,
)
from tests.events.commits import LOCK, UNLOCK, waits_for_lock
from tests.machine import Machine, bound, within
from tests.support import ORDER_ID, charge_of, elapse, stored_event, until

pytestmark = pytest.mark.anyio


async def test_captured(make: Make, connection: psycopg.Connection[Any]) -> None:
    gateway = ScriptedGateway()
    service = await make(gateway)
    charged = await service.charging.charge(charge_of("k", 1500, payment_method="tok_1"))
    assert first_answer(charged) == (Status.SUCCESS, False)
    assert charged.payment.provider_txn_id == f"txn-{payment_id_for('k')}"
    assert gateway.charges == [
        ProviderCharge(
            payment_id=payment_id_for("k"),
            amount_cents=1500,
            currency="INR",
            payment_method="tok_1",
            order_id=charge_of("k").request.merchant_order_id,
            idempotency_key="k",
        )
    ]
    assert topics(connection, payment_id_for("k")) == ["PaymentInitiated", "PaymentCharged"]


async def test_the_intent_is_durable_before_the_provider_is_asked(
    make: Make, connection: psycopg.Connection[Any]
) -> None:
    stored_when_asked: list[str] = []

    def look(gateway: ScriptedGateway, charge: ProviderCharge) -> Any:
        stored_when_asked.extend(topics(connection, payment_id_for("k")))
        return approve(gateway, charge)

    service = await make(ScriptedGateway(look))
    await begin(service)
    assert stored_when_asked == ["PaymentInitiated"]


async def test_the_payment_method_is_never_stored(
    make: Make, connection: psycopg.Connection[Any]
) -> None:
    service = await make(ScriptedGateway())
    await service.charging.charge(charge_of("k", payment_method="tok_canary"))
    states = connection.execute("SELECT convert_from(state, 'UTF8') FROM payment_events").fetchall()
    assert "tok_canary" not in str(states)


async def test_declined(make: Make, connection: psycopg.Connection[Any]) -> None:
    service = await make(ScriptedGateway(decline))
    charged = await service.charging.charge(charge_of("k"))
    assert first_answer(charged) == (Status.FAILED, False)
    assert charged.payment.decline_code == "insufficient_funds"
    assert topics(connection, payment_id_for("k")) == ["PaymentInitiated", "PaymentFailed"]
    assert first_answer(await service.charging.charge(charge_of("k"))) == (Status.FAILED, True)


async def test_a_finished_charge_is_replayed_without_asking_again(make: Make) -> None:
    gateway = ScriptedGateway()
    service = await make(gateway)
    first = await service.charging.charge(charge_of("k"))
    again = await service.charging.charge(charge_of("k"))
    assert again == Charged(first.payment, replayed=True)
    assert len(gateway.charges) == 1
    assert gateway.questions == []


@pytest.mark.parametrize(
    ("other", "field"),
    [
        (charge_of("k", 1501), "amount_cents"),
        (charge_of("k", currency="USD"), "currency"),
        (charge_of("k", order_id=uuid.UUID(int=4)), "merchant_order_id"),
        (charge_of("k", client="else"), "client"),
        (charge_of("k", payment_method="tok_2"), "payment_method"),
    ],
)
async def test_the_key_with_another_request_is_refused(
    make: Make, connection: psycopg.Connection[Any], other: Any, field: str
) -> None:
    gateway = ScriptedGateway()
    service = await make(gateway)
    await begin(service)
    with pytest.raises(IdempotencyKeyReused) as refused:
        await service.charging.charge(other)
    assert [error.field for error in refused.value.errors] == [field]
    assert len(gateway.charges) == 1
    assert topics(connection, payment_id_for("k")) == ["PaymentInitiated", "PaymentCharged"]


async def test_the_key_with_another_request_while_the_first_is_running(make: Make) -> None:
    """The mismatch is refused at once; the first request and its repetition are not disturbed."""
    answered = asyncio.Event()
    gateway = ScriptedGateway(after(answered))
    service = await make(gateway)
    first = asyncio.create_task(service.charging.charge(charge_of("k")))
    await until(lambda: gateway.charges)
    with pytest.raises(IdempotencyKeyReused):
        await service.charging.charge(charge_of("k", 999))
    repeated = asyncio.create_task(service.charging.charge(charge_of("k")))
    answered.set()
    assert first_answer(await first) == (Status.SUCCESS, False)
    assert first_answer(await repeated) == (Status.SUCCESS, True)


async def test_another_client_is_told_at_once_that_the_key_is_taken(
    make: Make, monkeypatch: pytest.MonkeyPatch
) -> None:
    """While the charge is running, while it is open, and when it is done: its run is not waited
    for, and what became of the payment is not even read."""
    answered = asyncio.Event()
    gateway = ScriptedGateway(after(answered))
    service = await make(gateway, charge_deadline_s=1.0, gateway_timeout_s=0.5)
    other_process = await make(ScriptedGateway())
    first = asyncio.create_task(service.charging.charge(charge_of("k", client="shop")))
    await until(lambda: gateway.charges)

    async def never(*_: Any, **__: Any) -> None:
        raise AssertionError("it was read")

    async def is_refused() -> None:
        for asked in (service, other_process):
            with monkeypatch.context() as patched:
                patched.setattr(asked.database, "fetch", never)
                for amount_cents in (1500, 999):
                    with pytest.raises(IdempotencyKeyReused) as refused:
                        await asked.charging.charge(charge_of("k", amount_cents, client="else"))
                    assert [error.field for error in refused.value.errors] == ["client"]
                    assert str(refused.value).startswith("Another client has used this key.")

    await is_refused()
    assert (await first).payment.status is Status.PENDING
    await is_refused()
    answered.set()
    await service.runs.drain(2)
    await is_refused()
    again = await service.charging.charge(charge_of("k", client="shop"))
    assert first_answer(again) == (Status.SUCCESS, True)
    assert len(gateway.charges) == 1


async def test_32_at_once_with_one_key_are_one_capture(make: Make) -> None:
    gateway = ScriptedGateway()
    service = await make(gateway)
    answers = await asyncio.gather(*(service.charging.charge(charge_of("k")) for _ in range(32)))
    assert len({answer.payment for answer in answers}) == 1
    assert [answer.replayed for answer in answers].count(False) == 1
    assert len(gateway.charges) == 1


async def test_another_process_waits_for_the_run(make: Make) -> None:
    answered = asyncio.Event()
    gateway = ScriptedGateway(after(answered))
    one, two = await make(gateway), await make(gateway)
    first = asyncio.create_task(one.charging.charge(charge_of("k")))
    await until(lambda: gateway.charges)
    second = asyncio.create_task(two.charging.charge(charge_of("k")))
    await asyncio.sleep(0.3)  # several of its looks at the store
    assert not second.done()
    answered.set()
    assert first_answer(await first) == (Status.SUCCESS, False)
    assert first_answer(await second) == (Status.SUCCESS, True)
    assert len(gateway.captures) == 1


async def test_no_outcome_within_the_deadline_is_pending_and_the_late_one_is_stored(
    make: Make, connection: psycopg.Connection[Any]
) -> None:
    answered = asyncio.Event()
    gateway = ScriptedGateway(after(answered))
    service = await make(gateway, charge_deadline_s=0.4, gateway_timeout_s=0.3)
    started = time.monotonic()
    with within(2):
        charged = await service.charging.charge(charge_of("k"))
    assert time.monotonic() - started > 0.3
    assert first_answer(charged) == (Status.PENDING, False)
    answered.set()
    await until(
        lambda: topics(connection, payment_id_for("k")) == ["PaymentInitiated", "PaymentCharged"]
    )
    assert first_answer(await service.charging.charge(charge_of("k"))) == (Status.SUCCESS, True)


async def test_a_client_that_goes_away_cancels_nothing(
    make: Make, connection: psycopg.Connection[Any]
) -> None:
    answered = asyncio.Event()
    gateway = ScriptedGateway(after(answered))
    service = await make(gateway)
    request = asyncio.create_task(service.charging.charge(charge_of("k")))
    await until(lambda: gateway.charges)
    request.cancel()
    answered.set()
    await until(
        lambda: topics(connection, payment_id_for("k")) == ["PaymentInitiated", "PaymentCharged"]
    )


@pytest.mark.parametrize("lost", [answer_lost, no_answer])
async def test_an_unknown_outcome_is_pending_and_the_retry_settles_it(
    make: Make, lost: Any, connection: psycopg.Connection[Any]
) -> None:
    """The retry comes when the run is over: it asks first, and sends again only if it must."""
    gateway = ScriptedGateway(lost)
    service = await make(gateway, charge_deadline_s=0.4, gateway_timeout_s=0.3)
    assert first_answer(await service.charging.charge(charge_of("k"))) == (Status.PENDING, False)
    await age(connection, 1)
    assert first_answer(await service.charging.charge(charge_of("k"))) == (Status.SUCCESS, True)
    assert len(gateway.captures) == 1
    assert len(gateway.questions) == 1
    assert len(gateway.charges) == (1 if lost is answer_lost else 2)


async def test_a_retry_before_the_run_is_over_waits_then_settles(make: Make) -> None:
    gateway = ScriptedGateway(answer_lost)
    service = await make(gateway, charge_deadline_s=1.0, gateway_timeout_s=0.5)
    started = time.monotonic()
    with within(1.0):
        charged = await service.charging.charge(charge_of("k"))
    assert first_answer(charged) == (Status.PENDING, False)
    gateway_was_asked = len(gateway.questions)
    await asyncio.sleep(0.3)
    with within(2.5):
        charged = await service.charging.charge(charge_of("k"))
    assert first_answer(charged) == (Status.SUCCESS, True)
    assert time.monotonic() - started > 1.0
    assert len(gateway.questions) == gateway_was_asked + 1


async def test_past_the_safe_retry_window_it_only_asks(
    make: Make, connection: psycopg.Connection[Any]
) -> None:
    gateway = ScriptedGateway(no_answer, retry_s=0.1)
    service = await make(gateway, charge_deadline_s=0.4, gateway_timeout_s=0.3)
    await begin(service)
    await age(connection, 1)
    assert first_answer(await service.charging.charge(charge_of("k"))) == (Status.PENDING, True)
    assert (len(gateway.charges), len(gateway.questions)) == (1, 1)


async def test_a_retry_whose_provider_is_down_is_still_pending(
    make: Make, connection: psycopg.Connection[Any]
) -> None:
    """The first run may have charged: an error would make the caller drop a paid order."""
    gateway = ScriptedGateway(answer_lost)
    service = await make(gateway, charge_deadline_s=0.4, gateway_timeout_s=0.3)
    await begin(service)
    await age(connection, 1)
    gateway.reachable = False
    assert first_answer(await service.charging.charge(charge_of("k"))) == (Status.PENDING, True)


@pytest.mark.parametrize("failure", [NeverSent, OutcomeUnknown], ids=lambda f: f.__name__)
async def test_a_retry_that_learns_nothing_is_still_pending_and_sends_nothing(
    make: Make, failure: Failure, connection: psycopg.Connection[Any]
) -> None:
    gateway = ScriptedGateway(no_answer)
    service = await make(gateway, charge_deadline_s=0.4, gateway_timeout_s=0.3)
    await begin(service)
    await age(connection, 1)
    gateway.reachable, gateway.failure = False, failure
    assert first_answer(await service.charging.charge(charge_of("k"))) == (Status.PENDING, True)
    assert (len(gateway.charges), len(gateway.questions)) == (1, 1)


@pytest.mark.parametrize("frozen", [True, False], ids=["frozen", "answered late"])
async def test_nothing_is_sent_after_the_deadline(
    make: Make,
    connection: psycopg.Connection[Any],
    monkeypatch: pytest.MonkeyPatch,
    frozen: bool,
) -> None:
    """The store's answer comes too late: the request was, or is, told that nothing was sent."""
    gateway = ScriptedGateway()
    service = await make(gateway, charge_deadline_s=0.4, gateway_timeout_s=0.3)
    append_intent = service.appender.append_intent

    async def answered_late(event: StoredEvent, **_: Any) -> int:
        position = await append_intent(event)  # wanted or not
        await elapse(0.5, frozen=frozen)
        return position

    with monkeypatch.context() as patched:
        patched.setattr(service.appender, "append_intent", answered_late)
        with pytest.raises(Unavailable):
            await service.charging.charge(charge_of("k"))
        await service.runs.drain(2)
    assert gateway.charges == []
    assert topics(connection, payment_id_for("k")) == ["PaymentInitiated"]
    await age(connection, 1)
    assert first_answer(await service.charging.charge(charge_of("k"))) == (Status.SUCCESS, True)
    assert len(gateway.captures) == 1


async def test_nothing_is_sent_for_a_request_that_was_told_so(
    make: Make, connection: psycopg.Connection[Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Long before its deadline, since the store did not answer; then it does."""
    monkeypatch.setattr(runs, "INTENT_PATIENCE_S", 0.2)
    gateway = ScriptedGateway()
    service = await make(gateway)
    append_intent = service.appender.append_intent

    async def answered_late(event: StoredEvent, **_: Any) -> int:
        position = await append_intent(event)  # wanted or not
        await elapse(0.5, frozen=False)
        return position

    monkeypatch.setattr(service.appender, "append_intent", answered_late)
    with pytest.raises(DatabaseUnavailable):
        await service.charging.charge(charge_of("k"))
    await service.runs.drain(2)
    assert topics(connection, payment_id_for("k")) == ["PaymentInitiated"]
    assert gateway.charges == []


@pytest.mark.parametrize("frozen", [True, False], ids=["frozen", "answered late"])
async def test_a_retry_sends_nothing_after_its_deadline(
    make: Make, monkeypatch: pytest.MonkeyPatch, frozen: bool, connection: psycopg.Connection[Any]
) -> None:
    """The provider took so long to say that it does not know of the charge."""
    gateway = ScriptedGateway(no_answer)
    service = await make(gateway, charge_deadline_s=0.4, gateway_timeout_s=0.3)
    await begin(service)
    await age(connection, 1)

    async def answered_late(payment_id: uuid.UUID, timeout_s: float) -> None:
        await elapse(0.5, frozen=frozen)

    monkeypatch.setattr(gateway, "find_charge", answered_late)
    assert first_answer(await service.charging.charge(charge_of("k"))) == (Status.PENDING, True)
    await service.runs.drain(2)
    assert len(gateway.charges) == 1


async def test_the_provider_has_what_is_left_of_the_deadline(
    make: Make, monkeypatch: pytest.MonkeyPatch, machine: Machine
) -> None:
    gateway = ScriptedGateway()
    service = await make(gateway, charge_deadline_s=3, gateway_timeout_s=2)
    append_intent, charge, given_s = service.appender.append_intent, gateway.charge, []

    async def slow(event: StoredEvent, **options: Any) -> int:
        await asyncio.sleep(1.1)
        return await append_intent(event, **options)

    async def look(asked: ProviderCharge, timeout_s: float) -> Any:
        given_s.append(timeout_s)
        return await charge(asked, timeout_s)

    monkeypatch.setattr(gateway, "charge", look)
    await service.charging.charge(charge_of("at once"))
    monkeypatch.setattr(service.appender, "append_intent", slow)
    await service.charging.charge(charge_of("later"))
    bound(2 - given_s[0], 0.001, machine)
    assert given_s[1] <= 1.9


async def test_a_provider_that_was_never_reached_is_unavailable(
    make: Make, connection: psycopg.Connection[Any]
) -> None:
    gateway = ScriptedGateway(never_sent)
    service = await make(gateway, charge_deadline_s=0.4, gateway_timeout_s=0.3)
    with pytest.raises(GatewayUnavailable):
        await service.charging.charge(charge_of("k"))
    assert topics(connection, payment_id_for("k")) == ["PaymentInitiated"]
    await age(connection, 1)
    assert first_answer(await service.charging.charge(charge_of("k"))) == (Status.SUCCESS, True)
    assert len(gateway.captures) == 1


@pytest.mark.parametrize(
    "changed",
    [{"amount_cents": 1}, {"currency": "USD"}, {"id": uuid.UUID(int=1)}],
    ids=lambda changed: next(iter(changed)),
)
async def test_an_answer_about_something_else_is_never_success(
    make: Make, connection: psycopg.Connection[Any], changed: dict[str, Any]
) -> None:
    def mutate(gateway: ScriptedGateway, charge: ProviderCharge) -> Any:
        return msgspec.structs.replace(approve(gateway, charge), **changed)

    service = await make(ScriptedGateway(mutate))
    charged = await service.charging.charge(charge_of("k"))
    assert first_answer(charged) == (Status.PENDING, False)
    assert topics(connection, payment_id_for("k")) == ["PaymentInitiated"]
    mismatches = service.telemetry.mismatches["charge"]
    assert mismatches._value.get() == 1


async def test_a_gateway_with_a_bug_is_pending(make: Make) -> None:
    def fail(gateway: ScriptedGateway, charge: ProviderCharge) -> None:
        raise ZeroDivisionError

    service = await make(ScriptedGateway(fail))
    assert first_answer(await service.charging.charge(charge_of("k"))) == (Status.PENDING, False)


async def test_an_outcome_that_cannot_be_stored_is_pending_and_stored_later(
    make: Make, connection: psycopg.Connection[Any]
) -> None:
    """Between the provider's answer and the append the store stops: 202, never an error."""

    def then_stop(gateway: ScriptedGateway, charge: ProviderCharge) -> Any:
        connection.execute(LOCK)
        return approve(gateway, charge)

    service = await make(ScriptedGateway(then_stop))
    with within(3):
        charged = await service.charging.charge(charge_of("k"))
        assert first_answer(charged) == (Status.PENDING, False)
    connection.execute(UNLOCK)
    await until(
        lambda: topics(connection, payment_id_for("k")) == ["PaymentInitiated", "PaymentCharged"]
    )


async def test_without_a_store_nothing_is_asked(
    make: Make, connection: psycopg.Connection[Any]
) -> None:
    gateway = ScriptedGateway()
    service = await make(gateway)
    connection.execute(LOCK)
    with within(3), pytest.raises(DatabaseUnavailable):
        await service.charging.charge(charge_of("k"))
    connection.execute(UNLOCK)
    assert gateway.charges == []
    await service.charging.charge(charge_of("l"))


async def test_too_many_waiting_charges_are_refused_at_once(
    make: Make, connection: psycopg.Connection[Any]
) -> None:
    service = await make(ScriptedGateway(), intent_queue_max=3)
    connection.execute(LOCK)
    first = asyncio.create_task(service.charging.charge(charge_of("0")))
    await waits_for_lock(connection)
    waiting = [asyncio.create_task(service.charging.charge(charge_of(f"{n}"))) for n in (1, 2, 3)]
    await asyncio.sleep(0)
    await asyncio.sleep(0)
    with pytest.raises(TooBusy):
        await service.charging.charge(charge_of("4"))
    connection.execute(UNLOCK)
    answers = await asyncio.gather(first, *waiting)
    assert {answer.payment.status for answer in answers} == {Status.SUCCESS}
    assert topics(connection, payment_id_for("4")) == []


async def test_without_a_free_slot_a_charge_is_refused_at_once_and_nothing_is_stored(
    make: Make, connection: psycopg.Connection[Any]
) -> None:
    answered = asyncio.Event()
    gateway = ScriptedGateway(after(answered))
    service = await make(gateway, gateway_concurrency_max=1)
    first = asyncio.create_task(service.charging.charge(charge_of("a")))
    await until(lambda: gateway.charges)
    with within(1), pytest.raises(TooBusy):
        await service.charging.charge(charge_of("b"))
    assert topics(connection, payment_id_for("b")) == []
    answered.set()
    await first
    assert (await service.charging.charge(charge_of("b"))).payment.status is Status.SUCCESS


async def test_who_waits_for_another_run_takes_no_slot(make: Make) -> None:
    """Neither for one in the same process nor for one in another."""
    answered = asyncio.Event()
    asked = ScriptedGateway(after(answered))
    elsewhere = await make(asked)
    gateway = ScriptedGateway()
    service = await make(gateway, gateway_concurrency_max=1)
    charges = [asyncio.create_task(elsewhere.charging.charge(charge_of("a")))]
    await until(lambda: asked.charges)
    charges += [asyncio.create_task(service.charging.charge(charge_of("a"))) for _ in range(3)]
    await until(lambda: service.admission.requests.taken == -3)
    assert service.admission.provider_calls.taken == 0
    await service.charging.charge(charge_of("b"))
    answered.set()
    assert {(await charge).payment.status for charge in charges} == {Status.SUCCESS}
    assert gateway.charges[0].payment_id == payment_id_for("b")
    assert (service.admission.requests.taken, service.admission.provider_calls.taken) == (0, 0)


async def test_places_and_slots_are_free_again_however_a_run_ends(
    make: Make, connection: psycopg.Connection[Any]
) -> None:
    service = await make(
        ScriptedGateway(approve, decline, no_answer, never_sent, approve),
        charge_deadline_s=0.6,
        gateway_timeout_s=0.5,
    )
    for key in "abcd":
        with suppress(Unavailable):
            await service.charging.charge(charge_of(key))
    with pytest.raises(IdempotencyKeyReused):
        await service.charging.charge(charge_of("a", amount_cents=999))
    connection.execute(LOCK)
    with pytest.raises(Unavailable):
        await service.charging.charge(charge_of("e"))
    connection.execute(UNLOCK)
    request = asyncio.create_task(service.charging.charge(charge_of("f")))
    await asyncio.sleep(0)
    request.cancel()
    await service.runs.drain(3)
    assert (service.admission.requests.taken, service.admission.provider_calls.taken) == (0, 0)


async def test_an_outcome_found_by_another_process_first(
    make: Make, connection: psycopg.Connection[Any]
) -> None:
    """Both have the outcome; one append wins, the other reads the winner's."""
    answered = asyncio.Event()
    gateway = ScriptedGateway(after(answered))
    slow = await make(gateway, charge_deadline_s=0.4, gateway_timeout_s=0.3)
    other = await make(gateway, charge_deadline_s=0.4, gateway_timeout_s=0.3)
    first = asyncio.create_task(slow.charging.charge(charge_of("k")))
    assert first_answer(await first) == (Status.PENDING, False)
    await asyncio.sleep(0.1)
    assert first_answer(await other.charging.charge(charge_of("k"))) == (Status.SUCCESS, True)
    answered.set()
    await slow.runs.drain(2)
    assert topics(connection, payment_id_for("k")) == ["PaymentInitiated", "PaymentCharged"]
    assert len(gateway.captures) == 1


async def test_a_damaged_stream_with_this_key(
    make: Make, connection: psycopg.Connection[Any]
) -> None:
    """Nobody can tell whose it is or what became of it: 503, and nothing is sent."""
    gateway = ScriptedGateway()
    service = await make(gateway)
    event = stored_event(payment_id_for("k"), state=b"damaged")
    await service.appender.append([event])
    with pytest.raises(PaymentUnreadable):
        await service.charging.charge(charge_of("k"))
    assert gateway.charges == gateway.questions == []
    with pytest.raises(PaymentUnreadable):
        await get_payment(service.database, service.lookups, payment_id_for("k"), None)


async def test_draining_waits_for_charges_whose_requests_were_answered(
    make: Make, connection: psycopg.Connection[Any]
) -> None:
    answered = asyncio.Event()
    service = await make(
        ScriptedGateway(after(answered)), charge_deadline_s=0.3, gateway_timeout_s=0.2
    )
    await begin(service)
    asyncio.get_running_loop().call_later(0.2, answered.set)
    await service.runs.drain(5)
    assert topics(connection, payment_id_for("k")) == ["PaymentInitiated", "PaymentCharged"]


async def test_every_answer_is_counted(make: Make) -> None:
    service = await make(ScriptedGateway(approve, decline, no_answer, never_sent))
    for key in ("a", "b", "c", "a"):
        await service.charging.charge(charge_of(key))
    with pytest.raises(GatewayUnavailable):
        await service.charging.charge(charge_of("d"))
    with pytest.raises(IdempotencyKeyReused):
        await service.charging.charge(charge_of("a", 1))
    with pytest.raises(ClientGone):
        await service.charging.charge(charge_of("e"), Caller(since=0.0))
    counted = {
        outcome: counter._value.get() for outcome, counter in service.telemetry.charges.items()
    }
    assert counted == dict.fromkeys(counted, 1)


async def test_amounts_at_the_bounds(make: Make, connection: psycopg.Connection[Any]) -> None:
    service = await make(ScriptedGateway())
    for amount in (1, 2_147_483_647):
        charged = await service.charging.charge(charge_of(f"{amount}", amount))
        assert charged.payment.amount_cents == amount
        assert charged.payment.merchant_order_id == ORDER_ID


async def test_two_processes_begin_at_the_same_moment_and_nobody_waits_for_ever(
    make: Make, connection: psycopg.Connection[Any]
) -> None:
    """The store makes both wait, so the loser's deadline comes before the winner's run is over."""
    gateway = ScriptedGateway(no_answer)
    services = [await make(gateway, charge_deadline_s=0.4, gateway_timeout_s=0.3) for _ in range(2)]
    connection.execute(LOCK)
    charges = [asyncio.create_task(each.charging.charge(charge_of("k"))) for each in services]
    await asyncio.sleep(0.2)
    connection.execute(UNLOCK)
    with within(2):
        answers = await asyncio.gather(*charges, return_exceptions=True)
    for answer in answers:
        # On a busy machine the intent is not even stored in time.
        assert isinstance(answer, TooBusy) or (
            isinstance(answer, Charged)
            and answer.payment.status in (Status.PENDING, Status.SUCCESS)
        ), answer


async def test_dead_pooled_connections_are_nobodys_problem(
    make: Make, connection: psycopg.Connection[Any]
) -> None:
    """As after a failover: a replay is a replay, another request is 422."""
    service = await make(ScriptedGateway())
    await begin(service)
    terminate = (
        "SELECT pg_terminate_backend(pid) FROM pg_stat_activity"
        " WHERE application_name LIKE 'payments%' AND datname = current_database()"
    )
    connection.execute(terminate.encode())
    assert first_answer(await service.charging.charge(charge_of("k"))) == (Status.SUCCESS, True)
    connection.execute(terminate.encode())
    with pytest.raises(IdempotencyKeyReused):
        await service.charging.charge(charge_of("k", 999))


async def test_only_a_request_that_is_known_to_be_the_same_is_pending(
    make: Make, connection: psycopg.Connection[Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    """The stream can no longer be read when it is found to exist."""
    service = await make(ScriptedGateway())
    await begin(service)

    async def away(*_: Any) -> None:
        raise DatabaseUnavailable

    monkeypatch.setattr(service.database, "fetch", away)
    assert first_answer(await service.charging.charge(charge_of("k"))) == (Status.PENDING, True)
    with pytest.raises(IdempotencyKeyReused):
        await service.charging.charge(charge_of("k", 999))


async def test_another_provider_is_not_asked_to_charge_again(make: Make) -> None:
    old, new = ScriptedGateway(answer_lost), ScriptedGateway()
    new.name = "other"
    short: dict[str, Any] = {"charge_deadline_s": 0.3, "gateway_timeout_s": 0.2}
    await begin(await make(old, **short))
    await asyncio.sleep(0.3)
    service = await make(new, **short)
    assert first_answer(await service.charging.charge(charge_of("k"))) == (Status.PENDING, True)
    assert new.charges == new.questions == []


async def test_the_deadline_holds_for_storing_the_outcome_too(
    make: Make, connection: psycopg.Connection[Any]
) -> None:
    async def late_then_stop(gateway: ScriptedGateway, charge: ProviderCharge) -> Any:
        await asyncio.sleep(0.4)
        connection.execute(LOCK)
        return approve(gateway, charge)

    service = await make(
        ScriptedGateway(late_then_stop), charge_deadline_s=0.6, gateway_timeout_s=0.5
    )
    with within(1.5):  # the store alone would be waited for for 2 s
        charged = await service.charging.charge(charge_of("k"))
    assert first_answer(charged) == (Status.PENDING, False)
    connection.execute(UNLOCK)


async def test_stopping_answers_who_waits(make: Make) -> None:
    answered = asyncio.Event()
    gateway = ScriptedGateway(after(answered))
    service = await make(gateway)
    charge = asyncio.create_task(service.charging.charge(charge_of("k")))
    await until(lambda: gateway.charges)
    service.runs.answer_all_within(0.1)
    with within(1):
        assert first_answer(await charge) == (Status.PENDING, False)
    answered.set()


async def test_no_more_than_so_many_wait_for_runs_of_other_processes(make: Make) -> None:
    answered = asyncio.Event()
    asked = ScriptedGateway(*[after(answered)] * 3)
    elsewhere = await make(asked)
    service = await make(ScriptedGateway(), gateway_concurrency_max=1, intent_queue_max=1)
    charges = [asyncio.create_task(elsewhere.charging.charge(charge_of(key))) for key in "abc"]
    await until(lambda: len(asked.charges) == 3)
    for waiting, key in enumerate("ab", 1):  # in turn: for a moment each needs the only slot
        charges.append(asyncio.create_task(service.charging.charge(charge_of(key))))
        await until(lambda: service.admission.requests.taken == -waiting)  # noqa: B023
    with pytest.raises(TooBusy):
        await service.charging.charge(charge_of("c"))
    answered.set()
    assert {(await charge).payment.status for charge in charges} == {Status.SUCCESS}


async def test_a_repetition_waits_for_a_run_that_goes_on_after_its_answer(make: Make) -> None:
    answered = asyncio.Event()
    gateway = ScriptedGateway(after(answered))
    service = await make(gateway, charge_deadline_s=0.4, gateway_timeout_s=0.3)
    assert first_answer(await service.charging.charge(charge_of("k"))) == (Status.PENDING, False)
    repetitions = [asyncio.create_task(service.charging.charge(charge_of("k"))) for _ in range(3)]
    await asyncio.sleep(0.1)
    assert not any(repetition.done() for repetition in repetitions)
    answered.set()
    answers = await asyncio.gather(*repetitions)
    assert {first_answer(answer) for answer in answers} == {(Status.SUCCESS, True)}
    assert len(gateway.charges) == 1
    await service.runs.drain(1)
    assert service.runs._runs == {}


async def test_a_repetition_waits_no_longer_than_its_deadline(make: Make) -> None:
    answered = asyncio.Event()
    service = await make(
        ScriptedGateway(after(answered)), charge_deadline_s=0.4, gateway_timeout_s=0.3
    )
    await begin(service)
    started = time.monotonic()
    with within(2):
        assert first_answer(await service.charging.charge(charge_of("k"))) == (Status.PENDING, True)
    assert time.monotonic() - started > 0.3
    answered.set()


async def test_a_repetition_while_the_outcome_waits_for_the_database(
    make: Make, connection: psycopg.Connection[Any]
) -> None:
    """The provider has answered: who asks again waits no longer than who asked first."""

    def stop_the_store(gateway: ScriptedGateway, charge: ProviderCharge) -> Any:
        connection.execute(LOCK)
        return approve(gateway, charge)

    service = await make(ScriptedGateway(stop_the_store))
    for _ in range(2):
        with within(3):
            charged = await service.charging.charge(charge_of("k"))
            assert charged.payment.status is Status.PENDING
    connection.execute(UNLOCK)
    await service.runs.drain(5)
    assert first_answer(await service.charging.charge(charge_of("k"))) == (Status.SUCCESS, True)


async def test_the_first_outcome_is_replayed_after_a_refund(make: Make) -> None:
    service = await make(ScriptedGateway())
    await begin(service)
    await service.refunding.refund(
        RefundPayment(
            request=RefundRequest(
                payment_id=payment_id_for("k"),
                amount_cents=None,
                idempotency_key=None,
                client="default",
            )
        )
    )
    charged = await service.charging.charge(charge_of("k"))
    assert (charged.payment.outcome, charged.payment.status) == (Status.SUCCESS, Status.REFUNDED)


async def test_a_provider_that_was_away_is_asked_at_once_after_the_time_that_was_told(
    make: Make,
) -> None:
    service = await make(ScriptedGateway(never_sent), charge_deadline_s=0.6, gateway_timeout_s=0.5)
    with pytest.raises(GatewayUnavailable) as refused:
        await service.charging.charge(charge_of("k"))
    assert refused.value.retry_after_s == 1
    await asyncio.sleep(refused.value.retry_after_s)
    with within(0.6):
        assert first_answer(await service.charging.charge(charge_of("k"))) == (Status.SUCCESS, True)
