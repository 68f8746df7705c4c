"""Settling: whatever was left open comes to its end once the provider answers."""

import asyncio
import uuid
from contextlib import suppress
from typing import Any, ClassVar

import msgspec
import psycopg
import pytest

from payments import sendings
from payments.commands.settle import CALLS_MAX
from payments.commands.settling_loop import ABANDONED_MAX, pause_s
from payments.errors import ClientGone, TooBusy
from payments.gateways import NeverSent, OutcomeUnknown, ProviderCharge
from payments.payment.identity import payment_id_for
from payments.payment.state import Approved, Status
from payments.service import Service
from payments.unsettled import CLAIM, claim, claim_params, forget, postpone
from tests.commands.conftest import Make
from tests.commands.looking import PAYMENT, begin, capture, gateway_of, topics
from tests.commands.refunding import refund_of
from tests.commands.settling import (
    FAST,
    SOON,
    abandoned,
    age,
    capture_late,
    due_in_s,
    project,
    settle,
    unsettled,
)
from tests.doubles.gateway import (
    Failure,
    ScriptedGateway,
    answer_lost,
    approve,
    decline,
    never_sent,
    no_answer,
)
from tests.machine import Machine, bound
from tests.support import charge_of, elapse, until

pytestmark = pytest.mark.anyio


@pytest.mark.parametrize(
    ("step", "becomes"),
    [(answer_lost, "PaymentCharged"), (decline, "PaymentFailed")],
    ids=["captured", "declined"],
)
async def test_a_pending_payment_gets_the_providers_outcome(
    make: Make, connection: psycopg.Connection[Any], step: Any, becomes: str
) -> None:
    def lost(gateway: ScriptedGateway, charge: Any) -> Any:
        step(gateway, charge)
        no_answer(gateway, charge)

    service = await make(ScriptedGateway(lost if step is decline else step), **FAST)
    charged = await service.charging.charge(charge_of("k"))
    assert charged.payment.status is Status.PENDING
    await project(service)
    assert unsettled(connection) == [("charge", 0)]
    assert await settle(service, connection) == 1
    assert topics(connection, PAYMENT) == ["PaymentInitiated", becomes]
    assert unsettled(connection) == []
    assert len(gateway_of(service).charges) == 1


async def test_settling_only_asks_about_charges(
    make: Make, connection: psycopg.Connection[Any]
) -> None:
    service = await make(ScriptedGateway(never_sent), **FAST)
    with pytest.raises(Exception, match="is unavailable"):
        await service.charging.charge(charge_of("k"))
    for attempts in (1, 2, 3):
        assert await settle(service, connection) == 1
        assert unsettled(connection) == [("charge", attempts)]
    gateway = gateway_of(service)
    assert (len(gateway.charges), len(gateway.questions)) == (1, 3)
    assert topics(connection, PAYMENT) == ["PaymentInitiated"]


async def test_a_row_is_not_due_before_the_requests_deadline(
    make: Make, connection: psycopg.Connection[Any], machine: Machine
) -> None:
    service = await make(ScriptedGateway(no_answer))
    await begin(service)
    await project(service)
    left_s = due_in_s(connection)
    assert left_s <= 7
    bound(7 - left_s, 2, machine)
    assert await service.settling.run_once() == 0


async def test_a_payment_the_provider_does_not_know_is_abandoned(
    make: Make, connection: psycopg.Connection[Any]
) -> None:
    service = await make(ScriptedGateway(no_answer), **FAST)
    await begin(service)
    await age(connection, 599)
    await settle(service, connection)
    assert topics(connection, PAYMENT) == ["PaymentInitiated"]
    await age(connection, 1)
    await settle(service, connection)
    assert topics(connection, PAYMENT) == ["PaymentInitiated", "PaymentFailed"]
    assert unsettled(connection)[0][0] == "abandoned"
    charged = await service.charging.charge(charge_of("k"))
    assert (charged.payment.status, charged.payment.failure) == (Status.FAILED, "abandoned")


async def test_a_late_capture_goes_back(make: Make, connection: psycopg.Connection[Any]) -> None:
    service = await abandoned(make, connection)
    capture_late(service)
    await settle(service, connection)
    assert topics(connection, PAYMENT)[2:] == ["LateCaptureFound", "LateCaptureReturned"]
    assert unsettled(connection) == []
    gateway = gateway_of(service)
    (back,) = gateway.refunds
    assert (back.amount_cents, back.provider_txn_id) == (1500, f"txn-{PAYMENT}")
    assert gateway.given_back == [back.refund_id]
    assert (await service.charging.charge(charge_of("k"))).payment.status is Status.FAILED


@pytest.mark.parametrize("step", [answer_lost, no_answer, never_sent], ids=lambda s: s.__name__)
async def test_a_late_capture_goes_back_once_whatever_happens(
    make: Make, connection: psycopg.Connection[Any], step: Any
) -> None:
    service = await abandoned(make, connection, step)
    capture_late(service)
    await settle(service, connection)
    assert topics(connection, PAYMENT)[2:] == ["LateCaptureFound"]
    assert unsettled(connection)[0][0] == "late_capture"
    await settle(service, connection)
    assert topics(connection, PAYMENT)[2:] == ["LateCaptureFound", "LateCaptureReturned"]
    assert len(gateway_of(service).given_back) == 1


async def test_a_late_capture_that_the_provider_keeps_is_an_alarm(
    make: Make, connection: psycopg.Connection[Any]
) -> None:
    service = await abandoned(make, connection, decline)
    capture_late(service)
    await settle(service, connection)
    assert topics(connection, PAYMENT)[2:] == ["LateCaptureFound"]
    assert service.telemetry.settling["abandoned", "mismatch"]._value.get() == 1
    assert unsettled(connection)[0][0] == "late_capture"


async def test_an_abandoned_payment_is_asked_about_for_a_day(
    make: Make, connection: psycopg.Connection[Any]
) -> None:
    service = await abandoned(make, connection)
    asked = len(gateway_of(service).questions)
    await age(connection, 23.9 * 3600)
    await settle(service, connection)
    assert len(gateway_of(service).questions) == asked + 1
    assert unsettled(connection)[0][0] == "abandoned"
    await age(connection, 0.2 * 3600)
    await settle(service, connection)  # it is not dropped without being asked once more
    assert len(gateway_of(service).questions) == asked + 2
    assert unsettled(connection) == []


async def test_the_watch_begins_with_the_abandonment(
    make: Make, connection: psycopg.Connection[Any]
) -> None:
    """However late that came: here the provider could not be asked for two days."""
    service = await make(ScriptedGateway(no_answer), **SOON)
    await begin(service)
    await age(connection, 48 * 3600)
    await settle(service, connection)
    assert topics(connection, PAYMENT) == ["PaymentInitiated", "PaymentFailed"]
    await settle(service, connection)
    assert unsettled(connection)[0][0] == "abandoned"
    capture_late(service)
    await settle(service, connection)
    assert topics(connection, PAYMENT)[2:] == ["LateCaptureFound", "LateCaptureReturned"]


async def test_an_abandoned_payment_that_was_declined_is_not_asked_about_again(
    make: Make, connection: psycopg.Connection[Any]
) -> None:
    service = await abandoned(make, connection)
    decline(gateway_of(service), gateway_of(service).charges[0])
    await settle(service, connection)
    assert unsettled(connection) == []


async def test_a_late_capture_of_another_amount_stays_an_alarm(
    make: Make, connection: psycopg.Connection[Any]
) -> None:
    service = await abandoned(make, connection)
    capture_late(service)
    outcomes = gateway_of(service).outcomes
    outcomes[PAYMENT] = msgspec.structs.replace(outcomes[PAYMENT], amount_cents=1)
    await age(connection, 48 * 3600)
    await settle(service, connection)
    assert unsettled(connection)[0][0] == "abandoned"
    assert service.telemetry.mismatches["charge"]._value.get() == 1


async def test_a_gateway_may_ask_for_a_longer_watch(
    make: Make, connection: psycopg.Connection[Any]
) -> None:
    gateway = ScriptedGateway(no_answer, late_capture_s=48 * 3600)
    service = await make(gateway, **SOON)
    await begin(service)
    await age(connection, 1)
    await settle(service, connection)
    await age(connection, 47 * 3600)
    asked = len(gateway.questions)
    await settle(service, connection)
    assert len(gateway.questions) == asked + 1


async def test_a_capture_that_comes_while_it_is_abandoned_goes_back(
    make: Make, connection: psycopg.Connection[Any]
) -> None:
    """The slow run of the request itself brings the provider's yes after the abandonment."""
    go_on = asyncio.Event()

    async def slow(gateway: ScriptedGateway, charge: Any) -> Any:
        await go_on.wait()
        return approve(gateway, charge)

    service = await make(ScriptedGateway(slow), **SOON)
    assert (await service.charging.charge(charge_of("k"))).payment.status is Status.PENDING
    await age(connection, 1)
    await settle(service, connection)
    assert topics(connection, PAYMENT) == ["PaymentInitiated", "PaymentFailed"]
    go_on.set()
    await service.runs.drain(2)
    assert topics(connection, PAYMENT)[2:] == ["LateCaptureFound"]
    await settle(service, connection)
    assert topics(connection, PAYMENT)[3:] == ["LateCaptureReturned"]


async def test_a_retry_does_not_send_what_is_about_to_be_abandoned(
    make: Make, connection: psycopg.Connection[Any]
) -> None:
    service = await make(ScriptedGateway(no_answer), **FAST)
    await begin(service)
    await age(connection, 599.9)
    assert (await service.charging.charge(charge_of("k"))).payment.status is Status.PENDING
    assert len(gateway_of(service).charges) == 1


@pytest.mark.parametrize("step", [answer_lost, no_answer, never_sent], ids=lambda s: s.__name__)
async def test_an_open_refund_is_sent_again_while_that_is_safe(
    make: Make, connection: psycopg.Connection[Any], step: Any
) -> None:
    service = await make(ScriptedGateway(refund_script=[step]), **FAST)
    await capture(service)
    await service.refunding.refund(refund_of(300, "a"))
    await age(connection, 1)
    await settle(service, connection)
    assert topics(connection, PAYMENT)[2:] == ["RefundInitiated", "PaymentRefunded"]
    assert len(gateway_of(service).given_back) == 1
    assert unsettled(connection) == []


async def test_an_open_refund_is_never_given_up_and_only_asked_about_when_too_old(
    make: Make, connection: psycopg.Connection[Any]
) -> None:
    service = await make(ScriptedGateway(refund_script=[no_answer]), **FAST)
    await capture(service)
    refund = (await service.refunding.refund(refund_of(300, "a"))).refund
    await age(connection, 30 * 24 * 3600)
    for _ in range(3):
        await settle(service, connection)
    gateway = gateway_of(service)
    assert (len(gateway.refunds), len(gateway.refund_questions)) == (1, 3)
    assert topics(connection, PAYMENT)[2:] == ["RefundInitiated"]
    gateway.give_back(gateway.refunds[0])
    await settle(service, connection)
    assert topics(connection, PAYMENT)[2:] == ["RefundInitiated", "PaymentRefunded"]
    assert gateway.given_back == [refund.id]


async def test_a_refund_that_nobody_knows_of_does_not_hold_up_the_next(
    make: Make, connection: psycopg.Connection[Any]
) -> None:
    service = await make(ScriptedGateway(refund_script=[no_answer]), **FAST)
    await capture(service)
    await service.refunding.refund(refund_of(300, "a"))
    await age(connection, 30 * 24 * 3600)
    gateway_of(service).refund_script = [no_answer]
    await service.refunding.refund(refund_of(200, "b"))
    await age(connection, 1)
    await settle(service, connection)
    assert topics(connection, PAYMENT)[2:] == [
        "RefundInitiated",
        "RefundInitiated",
        "PaymentRefunded",
    ]


async def test_a_refund_under_way_is_left_to_its_request(
    make: Make, connection: psycopg.Connection[Any]
) -> None:
    service = await make(ScriptedGateway(refund_script=[no_answer]))
    await capture(service)
    await service.refunding.refund(refund_of(300, "a"))
    await settle(service, connection)
    assert gateway_of(service).refund_questions == []
    assert unsettled(connection) == [("refund", 1)]


@pytest.mark.parametrize(
    "changed", [{"amount_cents": 1}, {"currency": "USD"}, {"id": uuid.UUID(int=1)}]
)
async def test_an_answer_about_something_else_settles_nothing(
    make: Make, connection: psycopg.Connection[Any], changed: dict[str, Any]
) -> None:
    service = await make(ScriptedGateway(answer_lost), **FAST)
    await begin(service)
    gateway = gateway_of(service)
    sound = gateway.outcomes[PAYMENT]
    gateway.outcomes[PAYMENT] = msgspec.structs.replace(sound, **changed)
    await settle(service, connection)
    assert topics(connection, PAYMENT) == ["PaymentInitiated"]
    assert service.telemetry.settling["charge", "mismatch"]._value.get() == 1
    gateway.outcomes[PAYMENT] = sound
    await settle(service, connection)
    assert topics(connection, PAYMENT) == ["PaymentInitiated", "PaymentCharged"]


async def test_a_payment_of_another_provider_is_never_asked_about(
    make: Make, connection: psycopg.Connection[Any]
) -> None:
    await begin(await make(ScriptedGateway(no_answer), **FAST))
    other = ScriptedGateway()
    other.name = "other"
    service = await make(other, **SOON)
    await age(connection, 10_000)
    await settle(service, connection)
    assert other.questions == []
    assert service.telemetry.settling["charge", "other_gateway"]._value.get() == 1
    assert topics(connection, PAYMENT) == ["PaymentInitiated"]


async def test_a_provider_that_is_away(make: Make, connection: psycopg.Connection[Any]) -> None:
    """Nothing is decided while it cannot be asked, not even an abandonment."""
    service = await make(ScriptedGateway(answer_lost), **SOON)
    await begin(service)
    gateway_of(service).reachable = False
    await age(connection, 10_000)
    await settle(service, connection)
    assert topics(connection, PAYMENT) == ["PaymentInitiated"]
    gateway_of(service).reachable = True
    await settle(service, connection)
    assert topics(connection, PAYMENT) == ["PaymentInitiated", "PaymentCharged"]


unanswered = pytest.mark.parametrize(
    "failure", [OutcomeUnknown, NeverSent], ids=lambda failure: failure.__name__
)


@unanswered
async def test_a_question_without_an_answer_is_no_outcome_of_a_charge(
    make: Make, connection: psycopg.Connection[Any], failure: Failure
) -> None:
    service = await make(ScriptedGateway(answer_lost), **SOON)
    await begin(service)
    await age(connection, 10_000)
    gateway = gateway_of(service)
    gateway.reachable, gateway.failure = False, failure
    await settle(service, connection)
    assert len(gateway.questions) == 1
    assert topics(connection, PAYMENT) == ["PaymentInitiated"]
    assert unsettled_kinds(connection) == {"charge"}
    gateway.reachable = True
    await settle(service, connection)
    assert topics(connection, PAYMENT) == ["PaymentInitiated", "PaymentCharged"]


@unanswered
async def test_a_question_without_an_answer_ends_no_watch(
    make: Make, connection: psycopg.Connection[Any], failure: Failure
) -> None:
    """However long the abandonment is over: a capture that nobody saw would stay with us."""
    service = await abandoned(make, connection)
    capture_late(service)
    await age(connection, 48 * 3600)
    gateway = gateway_of(service)
    gateway.reachable, gateway.failure = False, failure
    await settle(service, connection)
    assert topics(connection, PAYMENT) == ["PaymentInitiated", "PaymentFailed"]
    assert unsettled_kinds(connection) == {"abandoned"}
    gateway.reachable = True
    await settle(service, connection)
    assert topics(connection, PAYMENT)[2:] == ["LateCaptureFound", "LateCaptureReturned"]


@unanswered
async def test_a_question_without_an_answer_is_no_outcome_of_a_refund(
    make: Make, connection: psycopg.Connection[Any], failure: Failure
) -> None:
    """Neither a refusal nor a reason to send it again."""
    service = await make(ScriptedGateway(refund_script=[answer_lost]), **FAST)
    await capture(service)
    await service.refunding.refund(refund_of(300, "a"))
    await age(connection, 1)
    gateway = gateway_of(service)
    gateway.reachable, gateway.failure = False, failure
    await settle(service, connection)
    assert len(gateway.refund_questions) == len(gateway.refunds) == 1
    assert topics(connection, PAYMENT)[2:] == ["RefundInitiated"]
    assert unsettled_kinds(connection) == {"refund"}
    gateway.reachable = True
    await settle(service, connection)
    assert topics(connection, PAYMENT)[2:] == ["RefundInitiated", "PaymentRefunded"]


@unanswered
async def test_a_question_without_an_answer_is_no_outcome_of_sending_a_late_capture_back(
    make: Make, connection: psycopg.Connection[Any], failure: Failure
) -> None:
    service = await abandoned(make, connection, answer_lost)
    capture_late(service)
    await settle(service, connection)
    gateway = gateway_of(service)
    gateway.reachable, gateway.failure = False, failure
    await settle(service, connection)
    assert len(gateway.refunds) == 1
    assert topics(connection, PAYMENT)[2:] == ["LateCaptureFound"]
    assert unsettled_kinds(connection) == {"late_capture"}
    gateway.reachable = True
    await settle(service, connection)
    assert topics(connection, PAYMENT)[2:] == ["LateCaptureFound", "LateCaptureReturned"]


@pytest.mark.parametrize("step", [no_answer, answer_lost, never_sent], ids=lambda s: s.__name__)
async def test_a_refund_that_is_sent_again_without_an_answer_stays_open(
    make: Make, connection: psycopg.Connection[Any], step: Any
) -> None:
    service = await make(ScriptedGateway(refund_script=[no_answer, step]), **FAST)
    await capture(service)
    await service.refunding.refund(refund_of(300, "a"))
    await age(connection, 1)
    await settle(service, connection)
    assert len(gateway_of(service).refunds) == 2
    assert topics(connection, PAYMENT)[2:] == ["RefundInitiated"]
    assert unsettled_kinds(connection) == {"refund"}
    await settle(service, connection)
    assert topics(connection, PAYMENT)[2:] == ["RefundInitiated", "PaymentRefunded"]
    assert len(gateway_of(service).given_back) == 1


async def test_nothing_is_sent_when_an_attempt_has_taken_too_long(
    make: Make, connection: psycopg.Connection[Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    """By then another process may be at it. What the provider said is recorded all the same."""
    service = await abandoned(make, connection)
    capture_late(service)
    gateway = gateway_of(service)

    async def answered_late(charge: ProviderCharge, timeout_s: float) -> Any:
        await elapse(CALLS_MAX * FAST["gateway_timeout_s"] + 0.1, frozen=True)
        return gateway.outcomes[charge.payment_id]

    with monkeypatch.context() as patched:
        patched.setattr(gateway, "find_charge", answered_late)
        await settle(service, connection)
    assert gateway.refunds == []
    assert topics(connection, PAYMENT)[2:] == ["LateCaptureFound"]
    await settle(service, connection)
    assert topics(connection, PAYMENT)[2:] == ["LateCaptureFound", "LateCaptureReturned"]


@pytest.mark.parametrize("slow", ["the provider's answer", "the note"])
async def test_no_refund_is_sent_again_when_an_attempt_has_taken_too_long(
    make: Make, connection: psycopg.Connection[Any], monkeypatch: pytest.MonkeyPatch, slow: str
) -> None:
    """However much was done in between, the clock is looked at last."""
    begin = sendings.begin
    too_long_s = CALLS_MAX * FAST["gateway_timeout_s"] + 0.1
    service = await make(ScriptedGateway(refund_script=[no_answer]), **FAST)
    await capture(service)
    await service.refunding.refund(refund_of(300, "a"))
    await age(connection, 1)
    gateway = gateway_of(service)

    async def answered_late(refund: Any, timeout_s: float) -> None:
        await elapse(too_long_s, frozen=True)

    async def noted_late(*note: Any) -> Any:
        noted = await begin(*note)
        await elapse(too_long_s, frozen=True)
        return noted

    with monkeypatch.context() as patched:
        if slow == "the note":
            patched.setattr(sendings, "begin", noted_late)
        else:
            patched.setattr(gateway, "find_refund", answered_late)
        await settle(service, connection)
    assert len(gateway.refunds) == 1
    assert topics(connection, PAYMENT)[2:] == ["RefundInitiated"]
    await settle(service, connection)
    assert topics(connection, PAYMENT)[2:] == ["RefundInitiated", "PaymentRefunded"]


async def test_one_process_at_a_time_asks_about_a_payment(
    make: Make, connection: psycopg.Connection[Any]
) -> None:
    first = await make(ScriptedGateway(*[no_answer] * 20), **FAST)
    others = [await make(ScriptedGateway(), **FAST) for _ in range(3)]
    for number in range(20):
        await first.charging.charge(charge_of(f"k{number}"))
    await project(first)
    connection.execute("UPDATE unsettled_payments SET due_at = clock_timestamp()")
    tried = await asyncio.gather(*(s.settling.run_once() for s in (first, *others)))
    assert sum(tried) == 20
    asked = [question for s in (first, *others) for question in gateway_of(s).questions]
    assert len(asked) == len(set(asked)) == 20


async def test_a_claim_that_came_too_late_changes_nothing(
    make: Make, connection: psycopg.Connection[Any]
) -> None:
    """A process that was frozen past its lease must not forget or postpone another's row."""
    service = await make(ScriptedGateway(no_answer), **FAST)
    await begin(service)
    frozen, go_on = asyncio.Event(), asyncio.Event()

    async def freeze(charge: ProviderCharge, timeout_s: float) -> None:
        frozen.set()
        await go_on.wait()

    gateway_of(service).find_charge = freeze  # type: ignore[method-assign]
    attempt = asyncio.create_task(settle(service, connection))
    await frozen.wait()
    connection.execute("UPDATE unsettled_payments SET due_at = clock_timestamp()")
    connection.execute(CLAIM, claim_params(1, 1000))
    before = connection.execute("SELECT * FROM unsettled_payments").fetchall()
    go_on.set()
    await attempt
    assert connection.execute("SELECT * FROM unsettled_payments").fetchall() == before


async def test_a_new_reason_to_ask_survives_an_attempt_that_saw_none(
    make: Make, connection: psycopg.Connection[Any]
) -> None:
    """A refund begins while settling finds that nothing else is left to ask about."""
    service = await make(ScriptedGateway(answer_lost, refund_script=[no_answer]), **FAST)
    await capture(service)
    await project(service)
    connection.execute("UPDATE unsettled_payments SET due_at = clock_timestamp()")
    (claimed,) = await claim(service.database, 1, lease_s=0.1)
    await age(connection, 1)
    assert (await service.charging.charge(charge_of("k"))).payment.status is Status.SUCCESS
    await service.refunding.refund(refund_of())
    await project(service)
    await forget(service.database, claimed)
    await postpone(service.database, claimed, 1000)
    assert unsettled(connection) == [("refund", 0)]


async def test_the_pauses_grow_also_after_the_abandonment_was_due(
    make: Make, connection: psycopg.Connection[Any]
) -> None:
    """The provider answers about another amount, for hours."""
    service = await make(ScriptedGateway(answer_lost), **SOON)
    await begin(service)
    outcomes = gateway_of(service).outcomes
    outcomes[PAYMENT] = msgspec.structs.replace(outcomes[PAYMENT], amount_cents=1)
    await age(connection, 10_000)
    await project(service)
    connection.execute("UPDATE unsettled_payments SET attempts = 20, due_at = clock_timestamp()")
    await service.settling.run_once()
    assert 50 < due_in_s(connection) <= 60


async def test_an_abandonment_is_not_late_for_a_pause(
    make: Make, connection: psycopg.Connection[Any]
) -> None:
    service = await make(ScriptedGateway(no_answer), **FAST)
    await begin(service)
    await age(connection, 590)
    await project(service)
    connection.execute("UPDATE unsettled_payments SET attempts = 20, due_at = clock_timestamp()")
    await service.settling.run_once()
    assert 5 < due_in_s(connection) <= 10


async def both_clocks_ahead(connection: psycopg.Connection[Any], seconds: float) -> None:
    """As if every event had been decided and recorded by clocks that were set back since."""
    await age(connection, -seconds)
    connection.execute("ALTER TABLE payment_events DISABLE TRIGGER payment_events_append_only")
    connection.execute(
        "UPDATE payment_events SET state = convert_to(regexp_replace(convert_from(state, 'UTF8'),"
        ' \'"occurred_at":"[^"]*"\', \'"occurred_at":"\' || to_char(now()'
        " + make_interval(secs => %s), 'YYYY-MM-DD\"T\"HH24:MI:SS\"Z\"') || '\"'), 'UTF8')",
        [seconds],
    )
    connection.execute(
        "ALTER TABLE payment_events ENABLE ALWAYS TRIGGER payment_events_append_only"
    )


async def test_refunds_from_the_future_are_asked_about_and_not_sent(
    make: Make, connection: psycopg.Connection[Any]
) -> None:
    """By both clocks: nobody knows how old they are."""
    service = await make(ScriptedGateway(refund_script=[answer_lost, no_answer]), **FAST)
    await capture(service)
    await service.refunding.refund(refund_of(300, "a"))
    await service.refunding.refund(refund_of(200, "b"))
    await both_clocks_ahead(connection, 24 * 3600)
    await settle(service, connection)
    assert topics(connection, PAYMENT)[4:] == ["PaymentRefunded"]
    assert len(gateway_of(service).refunds) == 2


class TestTheDatabasesClockWasAhead:
    """By an hour, when everything so far was recorded; the application's was right."""

    async def test_a_pending_payment_is_as_old_as_the_application_says(
        self, make: Make, connection: psycopg.Connection[Any]
    ) -> None:
        service = await make(ScriptedGateway(no_answer), **SOON)
        await begin(service)
        await age(connection, -3600)
        await asyncio.sleep(SOON["pending_abandon_after_s"])
        await settle(service, connection)
        assert topics(connection, PAYMENT) == ["PaymentInitiated", "PaymentFailed"]

    async def test_a_repetition_is_sent_on(
        self, make: Make, connection: psycopg.Connection[Any]
    ) -> None:
        service = await make(ScriptedGateway(no_answer), **FAST)
        await begin(service)
        await age(connection, -3600)
        await asyncio.sleep(FAST["charge_deadline_s"])
        charged = await service.charging.charge(charge_of("k"))
        assert charged.payment.status is Status.SUCCESS

    async def test_a_refund_is_sent_again(
        self, make: Make, connection: psycopg.Connection[Any]
    ) -> None:
        service = await make(ScriptedGateway(refund_script=[no_answer]), **FAST)
        await capture(service)
        await service.refunding.refund(refund_of())
        await age(connection, -3600)
        await asyncio.sleep(FAST["charge_deadline_s"])
        await settle(service, connection)
        assert topics(connection, PAYMENT)[-1] == "PaymentRefunded"

    @pytest.mark.parametrize("kind", ["charge", "abandoned", "declined"])
    async def test_what_is_due_later_than_any_pause_lasts_is_due(
        self, make: Make, connection: psycopg.Connection[Any], kind: str
    ) -> None:
        service = await make(ScriptedGateway(no_answer, declines_may_turn_s=7200), **FAST)
        await begin(service)
        await project(service)
        for due_in, tried in (("50 min", 0), ("400 days", 1)):
            connection.execute(
                "UPDATE unsettled_payments SET kind = %s, due_at = now() + %s::interval",
                [kind, due_in],
            )
            assert await service.settling.run_once() == tried

    async def test_a_declined_payment_may_be_due_in_days(
        self, make: Make, connection: psycopg.Connection[Any]
    ) -> None:
        service = await make(ScriptedGateway(no_answer, declines_may_turn_s=7 * 86_400), **FAST)
        await begin(service)
        await project(service)
        connection.execute(
            "UPDATE unsettled_payments SET kind = 'declined', due_at = now() + interval '7 days'"
        )
        assert await service.settling.run_once() == 0


class TestDeclinesThatMayTurn:
    TURNING: ClassVar[dict[str, Any]] = {"declines_may_turn_s": 1000}

    async def declined(self, make: Make, **gateway: Any) -> Service:
        service = await make(ScriptedGateway(decline, **gateway), **FAST)
        await begin(service)
        await project(service)
        return service

    async def test_without_the_gateways_word_they_are_not_watched(
        self, make: Make, connection: psycopg.Connection[Any]
    ) -> None:
        await self.declined(make)
        assert unsettled(connection) == []

    async def test_they_are_asked_about_once_when_no_decline_can_turn_any_more(
        self, make: Make, connection: psycopg.Connection[Any]
    ) -> None:
        service = await self.declined(make, **self.TURNING)
        assert unsettled(connection) == [("declined", 0)]
        assert 990 < due_in_s(connection) <= 1000
        await settle(service, connection)
        assert gateway_of(service).questions == []
        assert 900 < due_in_s(connection) <= 1000
        await age(connection, 1000)
        await settle(service, connection)
        assert len(gateway_of(service).questions) == 1
        assert unsettled(connection) == []
        assert topics(connection, PAYMENT) == ["PaymentInitiated", "PaymentFailed"]

    async def test_one_that_the_provider_has_forgotten_is_not_watched_on(
        self, make: Make, connection: psycopg.Connection[Any]
    ) -> None:
        service = await self.declined(make, **self.TURNING)
        gateway_of(service).outcomes.clear()
        await age(connection, 1000)
        await settle(service, connection)
        assert unsettled(connection) == []

    async def test_what_was_captured_after_all_goes_back(
        self, make: Make, connection: psycopg.Connection[Any]
    ) -> None:
        service = await self.declined(make, **self.TURNING)
        gateway = gateway_of(service)
        gateway.outcomes[PAYMENT] = Approved(
            id=PAYMENT, amount_cents=1500, currency="INR", provider_txn_id="txn-late"
        )
        await age(connection, 1000)
        await settle(service, connection)
        assert topics(connection, PAYMENT)[2:] == ["LateCaptureFound", "LateCaptureReturned"]
        assert unsettled(connection) == []

    async def test_an_unknown_answer_is_asked_for_again(
        self, make: Make, connection: psycopg.Connection[Any]
    ) -> None:
        service = await self.declined(make, **self.TURNING)
        gateway_of(service).reachable = False
        await age(connection, 1000)
        await settle(service, connection)
        assert unsettled(connection) == [("declined", 1)]

    async def test_they_are_watched_with_the_abandoned_ones(
        self, make: Make, connection: psycopg.Connection[Any]
    ) -> None:
        service = await self.declined(make, **self.TURNING)
        connection.execute("UPDATE unsettled_payments SET due_at = clock_timestamp()")
        assert await claim(service.database, 10, 1.0, abandoned=False) == []
        assert len(await claim(service.database, 10, 1.0, abandoned=True)) == 1


class TestOneCaptureOnePayment:
    """The provider names a capture that another payment has."""

    async def taken(self, make: Make, *script: Any, **changed: Any) -> Service:
        service = await make(ScriptedGateway(approve, *script), **changed)
        await service.charging.charge(charge_of("first"))
        return service

    async def test_a_charge_is_pending_and_a_mismatch(
        self, make: Make, connection: psycopg.Connection[Any]
    ) -> None:
        service = await self.taken(make, self._same, **FAST)
        charged = await service.charging.charge(charge_of("k"))
        assert charged.payment.status is Status.PENDING
        assert topics(connection, PAYMENT) == ["PaymentInitiated"]
        assert service.telemetry.mismatches["charge"]._value.get() == 1
        await settle(service, connection)
        assert topics(connection, PAYMENT) == ["PaymentInitiated"]
        assert service.telemetry.mismatches["charge"]._value.get() == 2

    async def test_it_is_never_returned_as_a_late_capture_of_the_second(
        self, make: Make, connection: psycopg.Connection[Any]
    ) -> None:
        service = await self.taken(make, no_answer, **SOON)
        await begin(service)
        await age(connection, 10)
        await settle(service, connection)
        assert topics(connection, PAYMENT)[-1] == "PaymentFailed"
        gateway = gateway_of(service)
        first = gateway.outcomes[payment_id_for("first")]
        gateway.outcomes[PAYMENT] = msgspec.structs.replace(first, id=PAYMENT)
        await settle(service, connection)
        assert topics(connection, PAYMENT)[-1] == "PaymentFailed"
        assert gateway.refunds == []
        assert service.telemetry.mismatches["charge"]._value.get() == 1

    @staticmethod
    def _same(gateway: ScriptedGateway, charge: Any) -> Any:
        first = gateway.outcomes[payment_id_for("first")]
        gateway.outcomes[charge.payment_id] = msgspec.structs.replace(first, id=charge.payment_id)
        return gateway.outcomes[charge.payment_id]


async def test_abandoned_payments_do_not_keep_others_waiting(
    make: Make, connection: psycopg.Connection[Any]
) -> None:
    """Many of them, and the provider takes long over each."""
    service = await make(ScriptedGateway(*[no_answer] * 61), **SOON)
    for number in range(60):
        await service.charging.charge(charge_of(f"k{number}"))
    await age(connection, 1)
    while await settle(service, connection) and unsettled_kinds(connection) != {"abandoned"}:
        pass
    await service.charging.charge(charge_of("waiting"))
    await project(service)
    gateway, never = gateway_of(service), asyncio.Event()

    async def slow(charge: ProviderCharge, timeout_s: float) -> None:
        gateway.questions.append(charge.payment_id)
        if charge.payment_id != payment_id_for("waiting"):
            await never.wait()

    gateway.find_charge = slow  # type: ignore[method-assign]
    gateway.questions.clear()
    connection.execute("UPDATE unsettled_payments SET due_at = clock_timestamp()")
    attempt = asyncio.create_task(service.settling.run_once())
    await until(lambda: len(gateway.questions) >= 1 + ABANDONED_MAX)
    await asyncio.sleep(0.1)  # more would come now
    assert len(gateway.questions) == 1 + ABANDONED_MAX
    assert payment_id_for("waiting") in gateway.questions
    attempt.cancel()
    await asyncio.wait({attempt})


def unsettled_kinds(connection: psycopg.Connection[Any]) -> set[str]:
    return {kind for kind, _ in unsettled(connection)}


async def test_what_is_due_is_settled_as_fast_as_the_provider_answers(
    make: Make, connection: psycopg.Connection[Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Not so many each time it looks for work."""
    monkeypatch.setattr("payments.commands.settling_loop.POLL_S", 30.0)
    service = await make(ScriptedGateway(*[answer_lost] * 400), **FAST)

    async def charge(number: int) -> None:
        with suppress(ClientGone, TooBusy):  # answered late; its intent is stored, or never
            await service.charging.charge(charge_of(f"k{number}"))

    for first in range(0, 400, 50):  # all at once they would not all get their turn in time
        await asyncio.gather(*(charge(number) for number in range(first, first + 50)))
    await service.runs.drain(30)
    initiated = "SELECT count(*) FROM payment_events WHERE topic = 'PaymentInitiated'"
    ((begun,),) = connection.execute(initiated).fetchall()
    assert begun > 300
    await project(service)
    connection.execute("UPDATE unsettled_payments SET due_at = clock_timestamp()")
    service.settling.start()
    charged = "SELECT count(*) FROM payment_events WHERE topic = 'PaymentCharged'"
    await until(lambda: connection.execute(charged).fetchone() == (begun,))


async def test_a_row_that_came_anew_is_not_taken_for_the_one_before(
    make: Make, connection: psycopg.Connection[Any]
) -> None:
    """A process is frozen while its row goes, another comes, and another process claims that."""
    service = await make(ScriptedGateway(answer_lost, refund_script=[no_answer]), **FAST)
    await capture(service)
    await project(service)
    connection.execute("UPDATE unsettled_payments SET due_at = clock_timestamp()")
    (frozen,) = await claim(service.database, 1, lease_s=100)
    await age(connection, 1)
    assert (await service.charging.charge(charge_of("k"))).payment.status is Status.SUCCESS
    await project(service)
    assert unsettled(connection) == []
    await service.refunding.refund(refund_of())
    await project(service)
    connection.execute("UPDATE unsettled_payments SET due_at = clock_timestamp()")
    (other,) = await claim(service.database, 1, lease_s=100)
    await forget(service.database, frozen)
    await postpone(service.database, frozen, 1000)
    assert unsettled(connection) == [("refund", 1)]
    await postpone(service.database, other, 1000)
    assert 990 < due_in_s(connection) <= 1000


async def test_it_runs_by_itself(make: Make, connection: psycopg.Connection[Any]) -> None:
    """Two services follow and settle, as `serve` and `work` do."""
    gateway = ScriptedGateway(*[answer_lost] * 20)
    services = [await make(gateway, work=True, **FAST) for _ in range(2)]
    for number in range(20):
        charged = await services[number % 2].charging.charge(charge_of(f"k{number}"))
        assert charged.payment.status is Status.PENDING
    charged_count = "SELECT count(*) FROM payments WHERE status = 'SUCCESS'"
    await until(lambda: connection.execute(charged_count).fetchone() == (20,))
    await until(lambda: unsettled(connection) == [])
    assert len(gateway.charges) == len(gateway.captures) == 20


async def test_the_events_say_who_asked(make: Make, connection: psycopg.Connection[Any]) -> None:
    service = await make(ScriptedGateway(answer_lost), **FAST)
    await service.charging.charge(charge_of("k", client="orders"))
    await settle(service, connection)
    rows = connection.execute(
        "SELECT data ->> 'client' FROM payment_event_log ORDER BY position"
    ).fetchall()
    assert rows == [("orders",), ("settling",)]


def test_the_pauses() -> None:
    assert [pause_s(attempts, "charge") for attempts in range(1, 9)] == [
        1,
        2,
        4,
        8,
        16,
        32,
        60,
        60,
    ]
    assert [pause_s(attempts, "refund") for attempts in (1, 10, 11, 5000)] == [1, 512, 900, 900]
