"""Charges of seats that are held until some time: what may still be sent, and what is stored."""

import asyncio
from datetime import UTC, datetime, timedelta
from typing import Any

import msgspec
import psycopg
import pytest
from eventsourcing.persistence import StoredEvent

from payments.commands.charge import ChargePayment
from payments.errors import DatabaseUnavailable, IdempotencyKeyReused, InvalidRequest
from payments.payment.decisions import is_held_for
from payments.payment.identity import payment_id_for
from payments.payment.state import Status
from tests.commands.conftest import Make
from tests.commands.looking import first_answer, topics
from tests.commands.preparing import ACTION
from tests.doubles.gateway import (
    PreparingGateway,
    ScriptedGateway,
    after,
    answer_lost,
    no_answer,
    opens,
)
from tests.support import charge_of, until

pytestmark = pytest.mark.anyio

K = payment_id_for("k")
NOW = datetime(2026, 1, 31, 18, 30, tzinfo=UTC)
NEEDED_S = 2.5 + 6 + 5  # for the intent, GATEWAY_TIMEOUT_S, and the margin


class Clock:
    """Instead of `datetime` where charges look at the time."""

    def __init__(self) -> None:
        self.passed_s = 0.0

    def now(self, _: Any) -> datetime:
        return NOW + timedelta(seconds=self.passed_s)


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Clock:
    clock = Clock()
    for module in ("charge", "asking", "runs"):
        monkeypatch.setattr(f"payments.commands.{module}.datetime", clock)
    return clock


def held(seconds: float | None, key: str = "k", amount_cents: int = 1500) -> ChargePayment:
    """Seats that are held for so long."""
    until = None if seconds is None else NOW + timedelta(seconds=seconds)
    return msgspec.structs.replace(charge_of(key, amount_cents), hold_until=until)


def stored(connection: psycopg.Connection[Any], key: str = "k") -> str | None:
    row = connection.execute(
        "SELECT state FROM payment_events WHERE originator_id = %s AND originator_version = 1",
        [payment_id_for(key)],
    ).fetchone()
    assert row is not None
    until: str | None = msgspec.json.decode(row[0]).get("hold_until")
    return until


@pytest.mark.parametrize(
    ("left_us", "is_held"), [(10_000_000, True), (9_999_999, False), (0, False), (-1, False)]
)
def test_a_hold_is_long_enough_to_the_microsecond(left_us: int, is_held: bool) -> None:
    assert is_held_for(NOW + timedelta(microseconds=left_us), NOW, 10) is is_held
    assert is_held_for(None, NOW, 10)


@pytest.mark.parametrize(
    ("told_s", "seat_hold_s", "expected"),
    [
        (None, None, None),
        (600, None, "2026-01-31T18:40:00Z"),
        (None, 900, "2026-01-31T18:45:00Z"),
        (600, 900, "2026-01-31T18:40:00Z"),
        (1200, 900, "2026-01-31T18:50:00Z"),
    ],
)
@pytest.mark.usefixtures("clock")
async def test_it_is_stored_with_the_intent(
    make: Make,
    connection: psycopg.Connection[Any],
    told_s: float | None,
    seat_hold_s: float | None,
    expected: str | None,
) -> None:
    service = await make(ScriptedGateway(), seat_hold_s=seat_hold_s)
    charged = await service.charging.charge(held(told_s))
    assert first_answer(charged) == (Status.SUCCESS, False)
    assert stored(connection) == expected


async def test_the_first_one_counts(
    make: Make, connection: psycopg.Connection[Any], clock: Clock
) -> None:
    answered = asyncio.Event()
    gateway = ScriptedGateway(after(answered))
    service = await make(gateway)
    requests = [asyncio.create_task(service.charging.charge(held(600)))]
    await until(lambda: gateway.charges)
    requests += [asyncio.create_task(service.charging.charge(held(s))) for s in (900, None, -1)]
    await asyncio.sleep(0.05)
    answered.set()
    assert {(await each).payment.status for each in requests} == {Status.SUCCESS}
    clock.passed_s = 3600
    for seconds in (900, None, -1):
        charged = await service.charging.charge(held(seconds))
        assert first_answer(charged) == (Status.SUCCESS, True)
    assert stored(connection) == "2026-01-31T18:40:00Z"
    assert len(gateway.charges) == 1
    with pytest.raises(IdempotencyKeyReused):
        await service.charging.charge(held(-1, amount_cents=1501))


@pytest.mark.parametrize("seconds", [-3600, 0, NEEDED_S - 0.000001])
@pytest.mark.usefixtures("clock")
async def test_a_hold_that_ends_too_early_is_refused_and_the_key_not_used_up(
    make: Make, connection: psycopg.Connection[Any], seconds: float
) -> None:
    gateway = ScriptedGateway()
    service = await make(gateway, seat_hold_s=900)
    with pytest.raises(InvalidRequest) as caught:
        await service.charging.charge(held(seconds))
    assert [error.field for error in caught.value.errors] == ["hold_until"]
    assert "at least 13.5 s from now" in caught.value.errors[0].message
    assert (topics(connection, K), gateway.charges) == ([], [])
    assert service.telemetry.charges["refused"]._value.get() == 1
    charged = await service.charging.charge(held(NEEDED_S))
    assert first_answer(charged) == (Status.SUCCESS, False)


@pytest.mark.usefixtures("clock")
async def test_nothing_more_is_read_for_a_hold_that_is_long_enough(
    make: Make, monkeypatch: pytest.MonkeyPatch
) -> None:
    service = await make(ScriptedGateway())

    async def away(*_: Any, **__: Any) -> None:
        raise DatabaseUnavailable("scripted")

    monkeypatch.setattr(service.database, "fetch", away)
    charged = await service.charging.charge(held(NEEDED_S))
    assert charged.payment.status is Status.SUCCESS


@pytest.mark.parametrize(("took_s", "is_sent"), [(2.5, True), (2.500001, False), (3600, False)])
async def test_nothing_is_sent_that_may_end_after_the_hold(
    make: Make,
    connection: psycopg.Connection[Any],
    clock: Clock,
    monkeypatch: pytest.MonkeyPatch,
    took_s: float,
    is_sent: bool,
) -> None:
    """The intent took its time to be stored."""
    gateway = ScriptedGateway()
    service = await make(gateway)
    append_intent = service.appender.append_intent

    async def slow(event: StoredEvent, **options: Any) -> int:
        position = await append_intent(event, **options)
        clock.passed_s = took_s
        return position

    monkeypatch.setattr(service.appender, "append_intent", slow)
    charged = await service.charging.charge(held(NEEDED_S))
    outcome = Status.SUCCESS if is_sent else Status.PENDING
    assert first_answer(charged) == (outcome, False)
    assert len(gateway.charges) == is_sent
    assert topics(connection, K) == ["PaymentInitiated", "PaymentCharged"][: 1 + is_sent]


@pytest.mark.parametrize(
    ("passed_s", "outcome"), [(600 - 5.3, Status.SUCCESS), (600 - 5.2, Status.PENDING)]
)
async def test_a_repetition_is_not_sent_either(
    make: Make, clock: Clock, passed_s: float, outcome: Status
) -> None:
    gateway = ScriptedGateway(no_answer)
    service = await make(gateway, charge_deadline_s=0.4, gateway_timeout_s=0.3)
    await service.charging.charge(held(600))
    await asyncio.sleep(0.5)
    clock.passed_s = passed_s
    charged = await service.charging.charge(held(None))
    assert first_answer(charged) == (outcome, True)
    assert len(gateway.questions) == 1
    assert len(gateway.charges) == 1 + (outcome is Status.SUCCESS)


async def test_what_was_captured_counts_after_the_hold_too(make: Make, clock: Clock) -> None:
    gateway = ScriptedGateway(answer_lost)
    service = await make(gateway, charge_deadline_s=0.4, gateway_timeout_s=0.3)
    await service.charging.charge(held(600))
    await asyncio.sleep(0.5)
    clock.passed_s = 3600
    charged = await service.charging.charge(held(600))
    assert first_answer(charged) == (Status.SUCCESS, True)
    assert len(gateway.captures) == 1


@pytest.mark.parametrize(("left_s", "told"), [(5.1, True), (4.9, False)])
async def test_no_customer_is_told_to_act_after_the_hold(
    make: Make, connection: psycopg.Connection[Any], clock: Clock, left_s: float, told: bool
) -> None:
    """The provider took long over it; what it captures then comes too late."""

    def slow(gateway: ScriptedGateway, asked: Any) -> Any:
        clock.passed_s = 60 - left_s
        return opens("action", ACTION)(gateway, asked)

    service = await make(PreparingGateway(slow))
    charged = await service.charging.charge(held(60))
    assert charged.payment.status is Status.PENDING
    assert charged.next_action == (ACTION if told else None)
    assert ("PaymentActionRequired" in topics(connection, K)) is told
