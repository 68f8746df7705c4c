"""The situations of a refund: what is answered, what is stored, what the provider was asked."""

import asyncio
import uuid
from contextlib import suppress
from typing import Any

import msgspec
import psycopg
import pytest
from eventsourcing.persistence import StoredEvent

from payments.commands import runs
from payments.commands.refund import Refunded
from payments.errors import (
    DatabaseUnavailable,
    IdempotencyKeyReused,
    PaymentAlreadyRefunded,
    PaymentNotFound,
    PaymentNotRefundable,
    RefundDeclined,
    RefundExceedsCapture,
    TooBusy,
)
from payments.events.appender import StreamConflict
from payments.gateways import NeverSent, OutcomeUnknown
from payments.payment.decisions import REFUNDS_MAX
from payments.payment.identity import payment_id_for
from payments.payment.state import Status
from tests.commands.conftest import Make
from tests.commands.looking import PAYMENT, counted, gateway_of, topics
from tests.commands.refunding import FAST, charged, refund_of
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
from tests.machine import within
from tests.support import charge_of, elapse, until

pytestmark = pytest.mark.anyio


def summary(refunded: Refunded) -> tuple[Status, int, int, Status, bool]:
    """Refund status and amount, given back in all, payment status, replayed."""
    payment, refund = refunded.payment, refunded.refund
    return (
        refund.status,
        refund.amount_cents,
        payment.refunded_cents,
        payment.status,
        refunded.replayed,
    )


async def test_the_whole_amount(make: Make, connection: psycopg.Connection[Any]) -> None:
    service = await charged(make)
    refunded = await service.refunding.refund(refund_of())
    assert summary(refunded) == (Status.SUCCESS, 1000, 1000, Status.REFUNDED, False)
    (asked,) = gateway_of(service).refunds
    assert asked.payment_id == PAYMENT
    assert asked.provider_txn_id == f"txn-{PAYMENT}"
    assert (asked.amount_cents, asked.currency) == (1000, "INR")
    assert topics(connection, PAYMENT)[2:] == ["RefundInitiated", "PaymentRefunded"]


async def test_the_amount_is_reserved_before_the_provider_is_asked(
    make: Make, connection: psycopg.Connection[Any]
) -> None:
    stored_when_asked: list[str] = []

    def look(gateway: ScriptedGateway, refund: Any) -> Any:
        stored_when_asked.extend(topics(connection, PAYMENT))
        return approve(gateway, refund)

    service = await charged(make, look)
    await service.refunding.refund(refund_of())
    assert stored_when_asked[2:] == ["RefundInitiated"]


async def test_parts_add_up(make: Make) -> None:
    service = await charged(make)
    first = await service.refunding.refund(refund_of(300, "a"))
    assert summary(first) == (Status.SUCCESS, 300, 300, Status.SUCCESS, False)
    with pytest.raises(RefundExceedsCapture, match="at most 700"):
        await service.refunding.refund(refund_of(701, "b"))
    rest = await service.refunding.refund(refund_of())
    assert summary(rest) == (Status.SUCCESS, 700, 1000, Status.REFUNDED, False)
    with pytest.raises(PaymentAlreadyRefunded):
        await service.refunding.refund(refund_of())
    assert len(gateway_of(service).given_back) == 2


async def test_a_key_means_one_refund(make: Make) -> None:
    service = await charged(make)
    first = await service.refunding.refund(refund_of(300, "a"))
    again = await service.refunding.refund(refund_of(300, "a"))
    assert again.refund == first.refund
    assert again.replayed
    with pytest.raises(IdempotencyKeyReused) as reused:
        await service.refunding.refund(refund_of(301, "a"))
    assert [error.field for error in reused.value.errors] == ["amount_cents"]
    assert len(gateway_of(service).given_back) == 1


async def test_a_replay_tells_the_first_outcome_also_after_later_refunds(make: Make) -> None:
    service = await charged(make)
    first = await service.refunding.refund(refund_of(300, "a"))
    await service.refunding.refund(refund_of())
    again = await service.refunding.refund(refund_of(300, "a"))
    assert again.refund.refunded_cents == first.refund.refunded_cents == 300


@pytest.mark.parametrize("key", [None, "a"])
async def test_what_was_not_captured_cannot_be_refunded(make: Make, key: str | None) -> None:
    service = await make(ScriptedGateway(decline, no_answer), **FAST)
    await service.charging.charge(charge_of("k"))
    await service.charging.charge(charge_of("open"))
    for payment_id in (PAYMENT, payment_id_for("open")):
        with pytest.raises(PaymentNotRefundable):
            await service.refunding.refund(refund_of(key=key, payment_id=payment_id))
    assert gateway_of(service).refunds == []


async def test_unknown_and_foreign_payments(make: Make) -> None:
    service = await charged(make)
    with pytest.raises(PaymentNotFound):
        await service.refunding.refund(refund_of(payment_id=uuid.uuid4()))
    with pytest.raises(PaymentNotFound):
        await service.refunding.refund(refund_of(client="other", may_read="other"))
    refunded = await service.refunding.refund(refund_of(client="staff", may_read=None))
    assert refunded.refund.client == "staff"


@pytest.mark.parametrize("step", [approve, decline, no_answer], ids=lambda s: s.__name__)
async def test_another_clients_key_says_nothing_of_its_refund(make: Make, step: Any) -> None:
    """Whatever became of it: that another client has the key is all that is told."""
    service = await charged(make, step)
    with suppress(RefundDeclined):
        await service.refunding.refund(refund_of(300, "a", client="staff"))
    for amount_cents in (300, 301, None):
        with pytest.raises(IdempotencyKeyReused) as reused:
            await service.refunding.refund(refund_of(amount_cents, "a"))
        assert [error.field for error in reused.value.errors] == ["client"]
    assert len(gateway_of(service).refunds) == 1


async def test_a_payment_of_another_provider(make: Make) -> None:
    await charged(make)
    other = ScriptedGateway()
    other.name = "other"
    with pytest.raises(PaymentNotRefundable, match="scripted"):
        await (await make(other)).refunding.refund(refund_of())
    assert other.refunds == []


async def test_an_open_refund_of_another_provider_stays_open(
    make: Make, connection: psycopg.Connection[Any]
) -> None:
    """The first provider may have made it: another must neither be asked nor be sent it."""
    first = await charged(make, answer_lost, **FAST)
    await first.refunding.refund(refund_of(300, "a"))
    await age(connection, 1)
    other = ScriptedGateway(refund_script=[decline])
    other.name = "other"
    service = await make(other, **FAST)
    again = await service.refunding.refund(refund_of(300, "a"))
    assert summary(again) == (Status.PENDING, 300, 0, Status.SUCCESS, True)
    assert other.refunds == other.refund_questions == []


async def test_a_payment_may_have_a_hundred_refunds(make: Make) -> None:
    """More would make its stream slow to read for everyone."""
    service = await charged(make)
    for number in range(REFUNDS_MAX):
        await service.refunding.refund(refund_of(1, f"r{number}"))
    with pytest.raises(PaymentNotRefundable, match="100 refunds"):
        await service.refunding.refund(refund_of(1, "one more"))
    again = await service.refunding.refund(refund_of(1, "r7"))
    assert again.replayed


async def test_a_refusal_of_the_provider_is_an_error_and_frees_the_amount(
    make: Make, connection: psycopg.Connection[Any]
) -> None:
    service = await charged(make, decline)
    for _ in range(2):  # the second time it is replayed
        with pytest.raises(RefundDeclined, match="refund_refused"):
            await service.refunding.refund(refund_of(1000, "a"))
    assert topics(connection, PAYMENT)[2:] == ["RefundInitiated", "RefundFailed"]
    assert len(gateway_of(service).refunds) == 1
    refunded = await service.refunding.refund(refund_of(1000, "b"))
    assert refunded.payment.status is Status.REFUNDED


@pytest.mark.parametrize("step", [no_answer, answer_lost, never_sent], ids=lambda s: s.__name__)
async def test_an_unknown_outcome_is_pending_and_stays_reserved(make: Make, step: Any) -> None:
    """Also if the provider was surely not reached: the refund goes on by itself."""
    service = await charged(make, step)
    pending = await service.refunding.refund(refund_of(600, "a"))
    assert summary(pending) == (Status.PENDING, 600, 0, Status.SUCCESS, False)
    with pytest.raises(RefundExceedsCapture, match="600 are being refunded: at most 400"):
        await service.refunding.refund(refund_of(500, "b"))


@pytest.mark.parametrize("step", [no_answer, answer_lost, never_sent], ids=lambda s: s.__name__)
@pytest.mark.parametrize("key", [None, "a"])
async def test_a_retry_after_its_run_finds_out(
    make: Make, step: Any, key: str | None, connection: psycopg.Connection[Any]
) -> None:
    service = await charged(make, step, **FAST)
    assert (await service.refunding.refund(refund_of(key=key))).refund.status is Status.PENDING
    await age(connection, 1)
    again = await service.refunding.refund(refund_of(key=key))
    assert summary(again) == (Status.SUCCESS, 1000, 1000, Status.REFUNDED, True)
    gateway = gateway_of(service)
    assert len(gateway.refund_questions) == 1
    assert len(gateway.given_back) == 1


async def test_a_retry_that_is_too_late_to_send_again_only_asks(
    make: Make, connection: psycopg.Connection[Any]
) -> None:
    service = await charged(make, no_answer, **FAST)
    gateway_of(service).refund_retry_s = counted(service).refund_retry_s = 0.1
    await service.refunding.refund(refund_of(300, "a"))
    await age(connection, 1)
    again = await service.refunding.refund(refund_of(300, "a"))
    assert summary(again) == (Status.PENDING, 300, 0, Status.SUCCESS, True)
    assert len(gateway_of(service).refunds) == 1


@pytest.mark.parametrize("failure", [NeverSent, OutcomeUnknown], ids=lambda f: f.__name__)
async def test_a_retry_that_learns_nothing_is_still_pending_and_sends_nothing(
    make: Make, failure: Failure, connection: psycopg.Connection[Any]
) -> None:
    service = await charged(make, no_answer, **FAST)
    await service.refunding.refund(refund_of(300, "a"))
    await age(connection, 1)
    gateway = gateway_of(service)
    gateway.reachable, gateway.failure = False, failure
    again = await service.refunding.refund(refund_of(300, "a"))
    assert summary(again) == (Status.PENDING, 300, 0, Status.SUCCESS, True)
    assert len(gateway.refund_questions) == len(gateway.refunds) == 1


@pytest.mark.parametrize("frozen", [True, False], ids=["frozen", "answered late"])
async def test_nothing_is_sent_after_the_deadline(
    make: Make,
    connection: psycopg.Connection[Any],
    monkeypatch: pytest.MonkeyPatch,
    frozen: bool,
) -> None:
    """The amount is reserved too late. The refund goes on when it is asked for again."""
    service = await charged(make, **FAST)
    append_intent = service.appender.append_intent

    async def answered_late(event: StoredEvent, **options: Any) -> int:
        position = await append_intent(event, **options)
        await elapse(0.5, frozen=frozen)
        return position

    with monkeypatch.context() as patched:
        patched.setattr(service.appender, "append_intent", answered_late)
        with suppress(TooBusy):
            pending = await service.refunding.refund(refund_of(300, "a"))
            assert pending.refund.status is Status.PENDING
        await service.runs.drain(2)
    assert gateway_of(service).refunds == []
    assert topics(connection, PAYMENT)[2:] == ["RefundInitiated"]
    await age(connection, 1)
    again = await service.refunding.refund(refund_of(300, "a"))
    assert summary(again) == (Status.SUCCESS, 300, 300, Status.SUCCESS, True)
    assert len(gateway_of(service).given_back) == 1


async def test_nothing_is_sent_for_a_request_that_was_told_503(
    make: Make, connection: psycopg.Connection[Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its amount is reserved after all: settling, or a repetition, goes on with it."""
    service = await charged(make)
    monkeypatch.setattr(runs, "INTENT_PATIENCE_S", 0.2)
    append_intent = service.appender.append_intent

    async def answered_late(event: StoredEvent, **options: Any) -> int:
        position = await append_intent(event, **options)
        await elapse(0.5, frozen=False)
        return position

    monkeypatch.setattr(service.appender, "append_intent", answered_late)
    with pytest.raises(DatabaseUnavailable):
        await service.refunding.refund(refund_of(300, "a"))
    await service.runs.drain(2)
    assert topics(connection, PAYMENT)[2:] == ["RefundInitiated"]
    assert gateway_of(service).refunds == []


@pytest.mark.parametrize("frozen", [True, False], ids=["frozen", "answered late"])
async def test_a_retry_sends_nothing_after_its_deadline(
    make: Make, monkeypatch: pytest.MonkeyPatch, frozen: bool, connection: psycopg.Connection[Any]
) -> None:
    """The provider took so long to say that it does not know of the refund."""
    service = await charged(make, no_answer, **FAST)
    await service.refunding.refund(refund_of(300, "a"))
    await age(connection, 1)

    async def answered_late(refund: Any, timeout_s: float) -> None:
        await elapse(0.5, frozen=frozen)

    monkeypatch.setattr(gateway_of(service), "find_refund", answered_late)
    again = await service.refunding.refund(refund_of(300, "a"))
    assert summary(again) == (Status.PENDING, 300, 0, Status.SUCCESS, True)
    await service.runs.drain(2)
    assert len(gateway_of(service).refunds) == 1


async def test_a_slow_provider_is_answered_pending_and_recorded_late(make: Make) -> None:
    answered = asyncio.Event()
    service = await charged(make, after(answered), **FAST)
    pending = await service.refunding.refund(refund_of(300, "a"))
    assert pending.refund.status is Status.PENDING
    answered.set()
    await service.runs.drain(2)
    again = await service.refunding.refund(refund_of(300, "a"))
    assert summary(again) == (Status.SUCCESS, 300, 300, Status.SUCCESS, True)
    assert len(gateway_of(service).refunds) == 1


@pytest.mark.parametrize("changed", [{"amount_cents": 1}, {"currency": "USD"}, {"id": PAYMENT}])
async def test_an_answer_about_something_else_is_never_success(
    make: Make, connection: psycopg.Connection[Any], changed: dict[str, Any]
) -> None:
    def mutate(gateway: ScriptedGateway, refund: Any) -> Any:
        return msgspec.structs.replace(approve(gateway, refund), **changed)

    service = await charged(make, mutate)
    assert (await service.refunding.refund(refund_of())).refund.status is Status.PENDING
    assert topics(connection, PAYMENT)[2:] == ["RefundInitiated"]
    assert service.telemetry.mismatches["refund"]._value.get() == 1


async def test_eight_parallel_refunds_of_300_on_1000(make: Make) -> None:
    """Three go through; the conflicts of the others are decided again inside."""
    service = await charged(make)
    results = await asyncio.gather(
        *(service.refunding.refund(refund_of(300, f"r{n}")) for n in range(8)),
        return_exceptions=True,
    )
    assert sum(isinstance(result, Refunded) for result in results) == 3
    assert sum(isinstance(result, RefundExceedsCapture) for result in results) == 5
    assert len(gateway_of(service).given_back) == 3


@pytest.mark.parametrize("key", [None, "a"])
async def test_parallel_repetitions_are_one_refund(make: Make, key: str | None) -> None:
    """In one process and in another: all get the same answer."""
    first, second = await charged(make), await make(ScriptedGateway())
    go_on = asyncio.Event()
    gateway_of(first).refund_script = [after(go_on)]
    tasks = [
        asyncio.create_task(service.refunding.refund(refund_of(key=key)))
        for service in (first, first, second, second)
    ]
    await until(lambda: gateway_of(first).refunds or gateway_of(second).refunds)
    await asyncio.sleep(0.1)
    go_on.set()
    answers = await asyncio.gather(*tasks)
    assert len({answer.refund.id for answer in answers}) == 1
    assert {answer.refund.status for answer in answers} == {Status.SUCCESS}
    given_back = gateway_of(first).given_back + gateway_of(second).given_back
    assert len(given_back) == 1


async def test_a_client_that_goes_away_cancels_nothing(make: Make) -> None:
    go_on = asyncio.Event()
    service = await charged(make, after(go_on))
    request = asyncio.create_task(service.refunding.refund(refund_of(300, "a")))
    await until(lambda: gateway_of(service).refunds)
    request.cancel()
    go_on.set()
    await service.runs.drain(2)
    assert (await service.refunding.refund(refund_of(300, "a"))).refund.status is Status.SUCCESS


async def test_too_many_intents_are_refused_before_anything(
    make: Make, connection: psycopg.Connection[Any]
) -> None:
    service = await charged(make)
    service.appender._intent_queue_max = 0
    with pytest.raises(TooBusy):
        await service.refunding.refund(refund_of())
    assert len(topics(connection, PAYMENT)) == 2
    assert gateway_of(service).refunds == []


async def test_refunds_that_race_are_decided_again_however_long_that_takes(
    make: Make, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Each conflict shows that the store answers; only its silence is answered with 503."""
    monkeypatch.setattr(runs, "INTENT_PATIENCE_S", 1.0)  # each of them has CONFLICT_PATIENCE_S more
    service = await charged(make)
    append = service.appender.append_intent

    async def append_slowly(event: StoredEvent, **options: Any) -> int:
        await asyncio.sleep(0.25)
        return await append(event, **options)

    monkeypatch.setattr(service.appender, "append_intent", append_slowly)
    requests = [service.refunding.refund(refund_of(1, f"r{number}")) for number in range(6)]
    outcomes = await asyncio.gather(*requests)  # one more goes through each 0.25 s
    assert {outcome.refund.status for outcome in outcomes} == {Status.SUCCESS}


async def test_a_store_that_falls_silent_after_a_conflict_is_503_as_soon_as_without_one(
    make: Make, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(runs, "INTENT_PATIENCE_S", 1.0)
    monkeypatch.setattr(runs, "CONFLICT_PATIENCE_S", 0.2)
    service = await charged(make)
    silent = asyncio.Event()

    async def conflict_once(event: StoredEvent, **options: Any) -> int:
        if silent.is_set():
            await asyncio.sleep(2)
        silent.set()
        await asyncio.sleep(0.7)
        raise StreamConflict(None)

    monkeypatch.setattr(service.appender, "append_intent", conflict_once)
    with within(1.4), pytest.raises(DatabaseUnavailable):
        await service.refunding.refund(refund_of(1, "r"))
    assert silent.is_set()


async def test_no_database_is_503_within_the_bound(make: Make) -> None:
    service = await charged(make)
    await service.database.close()
    with within(3), pytest.raises(DatabaseUnavailable):
        await service.refunding.refund(refund_of())
    assert gateway_of(service).refunds == []


async def test_outcomes_are_counted(make: Make) -> None:
    service = await charged(make, decline, approve, no_answer)
    for request in (refund_of(1, "a"), refund_of(2, "b"), refund_of(2, "b"), refund_of(3, "c")):
        with suppress(RefundDeclined):
            await service.refunding.refund(request)
    with pytest.raises(RefundExceedsCapture):
        await service.refunding.refund(refund_of(5000, "d"))
    counted = {name: child._value.get() for name, child in service.telemetry.refunds.items()}
    assert counted == {
        "success": 1,
        "failed": 1,
        "pending": 1,
        "replayed": 1,
        "refused": 1,
        "unavailable": 0,
    }
