"""Refunds that provably never arrived are sent once the provider is back, however long that takes.

How long a refund may be sent again begins with the first sending that may have arrived.
"""

import time
from datetime import UTC, datetime, timedelta
from typing import Any

import psycopg
import pytest

from payments import sendings
from payments.commands.runs import cause
from payments.events.facts import Fact
from payments.payment.decisions import charge_outcome
from payments.payment.identity import payment_id_for
from payments.payment.state import Approved, Status
from payments.service import Service
from tests.commands.conftest import Make
from tests.commands.looking import as_stored, begin, capture, gateway_of, topics
from tests.commands.refunding import refund_of
from tests.commands.settling import FAST, SOON, age, settle
from tests.doubles.gateway import ScriptedGateway, answer_lost, approve, never_sent, no_answer
from tests.lost_log import accept_loss
from tests.support import append, stored_event

pytestmark = pytest.mark.anyio

PAYMENT = payment_id_for("k")
WINDOW_S = 60.0
Connection = psycopg.Connection[Any]


async def refunded(make: Make, *script: Any) -> Service:
    """A refund was asked for; its first sendings go as the script says."""
    gateway = ScriptedGateway(refund_script=script, retry_s=WINDOW_S)
    service = await make(gateway, **FAST)
    await capture(service)
    answered = await service.refunding.refund(refund_of())
    assert answered.refund.status is Status.PENDING
    return service


async def later(connection: Connection, seconds: float) -> None:
    """So much time passes."""
    await age(connection, seconds)
    connection.execute(
        "UPDATE refund_sendings SET first_sent_at = first_sent_at - make_interval(secs => %s),"
        "       noted_at = noted_at - make_interval(secs => %s)",
        [seconds, seconds],
    )


def given_back(connection: Connection) -> bool:
    return topics(connection, PAYMENT)[-1] == "PaymentRefunded"


def noted(connection: Connection) -> list[tuple[int, datetime | None]]:
    return connection.execute("SELECT sendings, first_sent_at FROM refund_sendings").fetchall()


async def test_a_provider_that_was_away_for_longer_than_it_remembers(
    make: Make, connection: Connection
) -> None:
    service = await refunded(make, *[never_sent] * 4)
    for _ in range(3):
        await later(connection, 10 * WINDOW_S)
        await settle(service, connection)
        assert not given_back(connection)
    await later(connection, 10 * WINDOW_S)
    await settle(service, connection)
    assert given_back(connection)
    assert len(gateway_of(service).given_back) == 1
    assert noted(connection) == []


async def test_one_that_may_have_arrived_is_only_asked_about_after_the_window(
    make: Make, connection: Connection
) -> None:
    service = await refunded(make, no_answer)
    await later(connection, 2 * WINDOW_S)
    await settle(service, connection)
    assert not given_back(connection)
    assert len(gateway_of(service).refunds) == 1


async def test_the_window_begins_with_the_first_that_may_have_arrived(
    make: Make, connection: Connection
) -> None:
    service = await refunded(make, never_sent, no_answer, no_answer)
    await later(connection, 10 * WINDOW_S)
    await settle(service, connection)  # the first that may have arrived
    await later(connection, WINDOW_S / 2)
    await settle(service, connection)
    assert len(gateway_of(service).refunds) == 3
    await later(connection, WINDOW_S)
    await settle(service, connection)
    assert len(gateway_of(service).refunds) == 3


async def test_never_sent_after_one_that_may_have_arrived_takes_nothing_back(
    make: Make, connection: Connection
) -> None:
    service = await refunded(make, no_answer, never_sent)
    await later(connection, WINDOW_S / 2)
    await settle(service, connection)
    await later(connection, WINDOW_S)
    await settle(service, connection)
    assert len(gateway_of(service).refunds) == 2


async def test_a_process_that_dies_while_it_sends_has_sent(
    make: Make, connection: Connection
) -> None:
    """The note is written before, and nobody takes it back."""

    def die(gateway: ScriptedGateway, asked: Any) -> None:
        raise KeyError("as good as killed: it becomes an unknown outcome")

    service = await refunded(make, never_sent, die)
    await later(connection, 10 * WINDOW_S)
    await settle(service, connection)
    ((number, first_sent_at),) = noted(connection)
    assert (number, first_sent_at is None) == (2, False)
    await later(connection, 2 * WINDOW_S)
    await settle(service, connection)
    assert len(gateway_of(service).refunds) == 2


async def test_a_turn_that_came_too_late_has_sent_nothing(
    make: Make, connection: Connection, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Noting it took so long that the attempt's time was up."""
    service = await refunded(make, never_sent)
    begin, clock = sendings.begin, time.monotonic

    async def begin_slowly(*arguments: Any) -> sendings.Sending:
        begun = await begin(*arguments)
        monkeypatch.setattr("payments.commands.settle.time.monotonic", lambda: clock() + 1000)
        return begun

    with monkeypatch.context() as slow:
        slow.setattr(sendings, "begin", begin_slowly)
        await later(connection, 10 * WINDOW_S)
        await settle(service, connection)
    monkeypatch.undo()
    assert [first_sent_at for _, first_sent_at in noted(connection)] == [None]
    await later(connection, 10 * WINDOW_S)
    await settle(service, connection)
    assert given_back(connection)


async def test_a_late_never_sent_does_not_hide_what_another_process_sent(
    make: Make, connection: Connection
) -> None:
    """A process was frozen between the provider's refusal and its note."""
    service = await refunded(make, no_answer, no_answer)
    await later(connection, WINDOW_S / 2)
    await settle(service, connection)
    refund = gateway_of(service).refunds[0]
    await sendings.note_never_sent(service.database, refund.refund_id, PAYMENT)
    await sendings.take_back(service.database, refund.refund_id, 0)
    ((_, first_sent_at),) = noted(connection)
    assert first_sent_at is not None


async def test_a_note_from_before_a_loss_of_the_log_does_not_count(
    make: Make, connection: Connection
) -> None:
    """What happened after it may be lost: the refund may have been sent."""
    service = await refunded(make, never_sent)
    await later(connection, 10 * WINDOW_S)
    connection.execute(
        "INSERT INTO log_losses (kind, by, reason, kept_position, lost_position, head_position)"
        " VALUES ('found', 'p', 'r', 0, 9, 1), ('accepted', 'p', 'r', 0, 9, 1)"
    )
    await settle(service, connection)
    assert len(gateway_of(service).refunds) == 1


async def test_a_repetition_of_the_request_sends_it_too(make: Make, connection: Connection) -> None:
    service = await refunded(make, never_sent)
    await later(connection, 10 * WINDOW_S)
    answered = await service.refunding.refund(refund_of())
    assert answered.refund.status is Status.SUCCESS


async def test_one_that_was_made_is_found_and_not_sent(make: Make, connection: Connection) -> None:
    service = await refunded(make, answer_lost)
    await later(connection, 10 * WINDOW_S)
    await settle(service, connection)
    assert given_back(connection)
    assert len(gateway_of(service).refunds) == 1


async def test_a_late_capture_waits_as_long(make: Make, connection: Connection) -> None:
    gateway = ScriptedGateway(no_answer, refund_script=[never_sent] * 3, retry_s=WINDOW_S)
    service = await make(gateway, **SOON)
    await capture(service)
    await age(connection, 10)
    await settle(service, connection)
    gateway.outcomes[PAYMENT] = Approved(
        id=PAYMENT, amount_cents=1500, currency="INR", provider_txn_id="txn-late"
    )
    for _ in range(3):
        await settle(service, connection)
        assert topics(connection, PAYMENT)[-1] == "LateCaptureFound"
        await later(connection, 10 * WINDOW_S)
    await settle(service, connection)
    assert topics(connection, PAYMENT)[-1] == "LateCaptureReturned"
    assert noted(connection) == []


async def test_a_late_capture_that_waited_for_a_loss_is_returned_whenever_it_may_be(
    make: Make, connection: Connection
) -> None:
    """It was never sent: whoever sends it first notes that."""
    gateway = ScriptedGateway(no_answer, retry_s=WINDOW_S)
    service = await make(gateway, **SOON)
    connection.execute("UPDATE schema_versions SET applied_at = '2020-01-01Z'")
    await begin(service)
    await age(connection, 10)
    await settle(service, connection)
    gateway.outcomes[PAYMENT] = Approved(
        id=PAYMENT, amount_cents=1500, currency="INR", provider_txn_id="txn-late"
    )
    service.watch.acknowledged(1000, stored_event())
    await settle(service, connection)
    assert topics(connection, PAYMENT)[-1] == "LateCaptureFound"
    await later(connection, 10 * WINDOW_S)
    accept_loss(connection)
    await settle(service, connection)
    assert topics(connection, PAYMENT)[-1] == "LateCaptureReturned"


async def test_a_late_capture_of_the_version_before_may_have_been_sent(
    make: Make, connection: Connection
) -> None:
    """That version makes no notes."""
    gateway = ScriptedGateway(no_answer, retry_s=WINDOW_S)
    service = await make(gateway, **SOON)
    await begin(service)
    await age(connection, 10)
    await settle(service, connection)
    append(connection, [_late_capture(connection)])
    await later(connection, 10 * WINDOW_S)
    await settle(service, connection)
    assert topics(connection, PAYMENT)[-1] == "LateCaptureFound"
    assert gateway.refunds == []


def _late_capture(connection: Connection) -> Fact:
    captured = Approved(id=PAYMENT, amount_cents=1500, currency="INR", provider_txn_id="txn-late")
    fact = charge_outcome(as_stored(connection), captured, cause("default"))
    assert fact is not None
    return fact


async def test_a_note_stays_while_its_refund_is_under_way(
    make: Make, connection: Connection
) -> None:
    """Another refund of the payment ended before the projector came to this one."""
    service = await refunded_partly(make)
    await later(connection, 10 * WINDOW_S)
    await settle(service, connection)
    assert topics(connection, PAYMENT)[-1] == "PaymentRefunded"


async def refunded_partly(make: Make) -> Service:
    gateway = ScriptedGateway(refund_script=[approve, never_sent], retry_s=WINDOW_S)
    service = await make(gateway, **FAST)
    await capture(service)
    await service.refunding.refund(refund_of(300, "a"))
    follower = service.followers[0]
    follower._limit = 4  # up to the end of the first refund
    assert (await service.refunding.refund(refund_of(200, "b"))).refund.status is Status.PENDING
    assert await follower.run_once() == 4
    return service


async def test_a_clock_of_the_application_that_is_behind_makes_nothing_young(
    make: Make, connection: Connection, monkeypatch: pytest.MonkeyPatch
) -> None:
    service = await refunded(make, never_sent, no_answer)
    await later(connection, 10 * WINDOW_S)
    await settle(service, connection)
    await later(connection, 2 * WINDOW_S)

    class Behind(datetime):
        @classmethod
        def now(cls, tz: Any = None) -> Any:
            return datetime.now(tz) - timedelta(seconds=1.5 * WINDOW_S)

    monkeypatch.setattr(sendings, "datetime", Behind)
    await settle(service, connection)
    assert len(gateway_of(service).refunds) == 2


async def test_a_clock_that_was_set_back_makes_nothing_young(
    make: Make, connection: Connection
) -> None:
    service = await refunded(make, never_sent, no_answer)
    await later(connection, 10 * WINDOW_S)
    await settle(service, connection)
    connection.execute("UPDATE refund_sendings SET first_sent_at = now() + interval '1 day'")
    await settle(service, connection)
    assert len(gateway_of(service).refunds) == 2
    assert datetime.now(UTC) < noted(connection)[0][1]  # type: ignore[operator]
