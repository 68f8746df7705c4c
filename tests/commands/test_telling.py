"""What is logged of payments that stay open: at once, and then rarely, whoever comes upon them."""

import asyncio
import uuid
from collections.abc import Iterator
from typing import Any

import msgspec
import psycopg
import pytest
from loguru import logger

from payments.commands.settle import Settler
from payments.commands.telling import tell
from payments.database.connections import Database, DatabaseAddress
from payments.event_store import EventStore
from payments.gateways import Open, OutcomeUnknown, Step
from payments.service import Service
from tests.commands.conftest import Make
from tests.commands.looking import PAYMENT, begin, gateway_of, topics
from tests.commands.refunding import refund_of
from tests.commands.settling import FAST, abandoned, age, capture_late, settle
from tests.doubles.gateway import PreparingGateway, ScriptedGateway, answer_lost, decline, no_answer
from tests.process import free_port
from tests.support import charge_of

pytestmark = pytest.mark.anyio

MISMATCH = ("CRITICAL", "provider response contradicts the recorded events")
ELSEWHERE = ("CRITICAL", "begun with another provider")
TOO_LONG = ("WARNING", "open for too long")
GOES_BACK = ("WARNING", "a late capture is returned")
DAY = "1 day"

Connection = psycopg.Connection[Any]


@pytest.fixture
def told() -> Iterator[list[tuple[str, str]]]:
    """Level and message of the lines that a person should read, about payments."""
    lines: list[tuple[str, str]] = []

    def note(record: Any) -> bool:
        if "payment_id" in record["extra"]:
            lines.append((record["level"].name, record["message"]))
        return False

    sink = logger.add(lambda _: None, level="WARNING", filter=note)
    yield lines
    logger.remove(sink)


def pass_by(connection: Connection, time: str) -> None:
    """As if what was told had been told so long before."""
    connection.execute("UPDATE unsettled_payments SET told_at = told_at - %s::interval", [time])


def answer_for_another_amount(service: Service) -> None:
    outcomes = gateway_of(service).outcomes
    outcomes[PAYMENT] = msgspec.structs.replace(outcomes[PAYMENT], amount_cents=1)


async def mismatching(make: Make, **settings: Any) -> Service:
    service = await make(ScriptedGateway(answer_lost), **FAST, **settings)
    await begin(service)
    answer_for_another_amount(service)
    return service


async def test_a_mismatch_is_told_once_and_counted_each_time(
    make: Make, connection: Connection, told: list[tuple[str, str]]
) -> None:
    service = await mismatching(make)
    for _ in range(5):
        await settle(service, connection)
    assert told == [MISMATCH]
    assert service.telemetry.mismatches["charge"]._value.get() == 5
    assert service.telemetry.settling["charge", "mismatch"]._value.get() == 5


async def test_once_for_all_processes_and_over_restarts(
    make: Make, connection: Connection, told: list[tuple[str, str]]
) -> None:
    first = await mismatching(make)
    others = [await make(gateway_of(first), **FAST) for _ in range(3)]
    for service in (first, *others):
        await settle(service, connection)
    assert told == [MISMATCH]


async def test_once_a_day(make: Make, connection: Connection, told: list[tuple[str, str]]) -> None:
    service = await mismatching(make)
    await settle(service, connection)
    for after, lines in (("23 hours", 1), ("1 hour", 2), ("23 hours", 2), ("1 hour", 3)):
        pass_by(connection, after)
        await settle(service, connection)
        assert told == [MISMATCH] * lines


async def test_a_clock_that_was_ahead_silences_nothing(
    make: Make, connection: Connection, told: list[tuple[str, str]]
) -> None:
    service = await mismatching(make)
    await settle(service, connection)
    pass_by(connection, "-400 days")
    for _ in range(2):
        await settle(service, connection)
    assert told == [MISMATCH] * 2


async def test_a_mismatch_that_its_own_request_found(
    make: Make, connection: Connection, told: list[tuple[str, str]]
) -> None:
    """Neither the same request again nor settling tells it a second time."""

    def other_amount(gateway: ScriptedGateway, charge: Any) -> Any:
        gateway.capture(charge)
        gateway.outcomes[PAYMENT] = msgspec.structs.replace(
            gateway.outcomes[PAYMENT],
            amount_cents=1,
        )
        return gateway.outcomes[PAYMENT]

    async def listed(gateway: ScriptedGateway, charge: Any) -> Any:
        while await service.followers[0].run_once():
            pass
        return other_amount(gateway, charge)

    service = await make(ScriptedGateway(listed), **FAST)
    await begin(service)
    assert told == [MISMATCH]
    for _ in range(2):
        await asyncio.sleep(FAST["charge_deadline_s"])
        await service.charging.charge(charge_of("k"))
        await settle(service, connection)
    assert told == [MISMATCH]
    assert service.telemetry.mismatches["charge"]._value.get() == 5


async def test_a_payment_that_is_not_listed_yet_is_told(
    make: Make, told: list[tuple[str, str]], connection: psycopg.Connection[Any]
) -> None:
    service = await mismatching(make)
    await age(connection, 1)
    await begin(service)
    assert told == [MISMATCH]


@pytest.mark.parametrize("operation", ["charge", "refund"])
async def test_a_payment_of_another_provider(
    make: Make, connection: Connection, told: list[tuple[str, str]], operation: str
) -> None:
    if operation == "charge":
        service = await make(ScriptedGateway(no_answer), **FAST)
    else:
        service = await make(ScriptedGateway(refund_script=[no_answer]), **FAST)
    await begin(service)
    if operation == "refund":
        await service.refunding.refund(refund_of(300, "a"))
    other = ScriptedGateway()
    other.name = "other"
    service = await make(other, **FAST)
    await settle(service, connection)
    await age(connection, 1)
    if operation == "charge":
        await service.charging.charge(charge_of("k"))
    else:
        await service.refunding.refund(refund_of(300, "a"))
    await settle(service, connection)
    assert told == [ELSEWHERE]
    assert service.telemetry.settling[operation, "other_gateway"]._value.get() == 2


async def test_a_refund_mismatch_of_its_request_and_of_settling(
    make: Make, connection: Connection, told: list[tuple[str, str]]
) -> None:
    service = await make(ScriptedGateway(refund_script=[answer_lost]), **FAST)
    await begin(service)
    refund = (await service.refunding.refund(refund_of(300, "a"))).refund
    outcomes = gateway_of(service).refund_outcomes
    outcomes[refund.id] = msgspec.structs.replace(outcomes[refund.id], amount_cents=1)
    await age(connection, 1)
    for _ in range(3):
        await settle(service, connection)
        await service.refunding.refund(refund_of(300, "a"))
    assert told == [MISMATCH]
    assert service.telemetry.mismatches["refund"]._value.get() == 6


async def test_a_late_capture_that_the_provider_keeps(
    make: Make, connection: Connection, told: list[tuple[str, str]]
) -> None:
    service = await abandoned(make, connection, *[decline] * 4)
    capture_late(service)
    for _ in range(4):
        await settle(service, connection)
    assert [line for line in told if line != GOES_BACK] == [MISMATCH]
    assert told.count(GOES_BACK) == 2  # when it is found, and at the first attempt of its own
    assert service.telemetry.mismatches["charge"]._value.get() == 1  # as it was found
    assert service.telemetry.mismatches["refund"]._value.get() == 3


@pytest.mark.parametrize(
    ("kind", "limit_s", "again"),
    [("charge", 120, "1 hour"), ("refund", 3600, DAY), ("late_capture", 3600, DAY)],
)
async def test_what_is_open_for_too_long_is_told_when_it_becomes_so(
    make: Make,
    connection: Connection,
    told: list[tuple[str, str]],
    kind: str,
    limit_s: int,
    again: str,
) -> None:
    service = await open_for(kind, make, connection)
    gateway_of(service).reachable, gateway_of(service).failure = False, OutcomeUnknown
    told.clear()
    await age(connection, limit_s - 10)
    await settle(service, connection)
    assert told == []
    await age(connection, 20)
    for _ in range(3):
        await settle(service, connection)
    assert told == [TOO_LONG]
    pass_by(connection, again)
    for _ in range(3):
        await settle(service, connection)
    assert told == [TOO_LONG] * 2


@pytest.mark.parametrize(
    ("step", "reason"),
    [
        (None, "unknown to the provider"),
        ("ready", "waits for the client's retry"),
        ("action", "waits for the customer"),
        ("authorized", "waits for the client's retry"),
        ("processing", "the provider is processing it"),
    ],
)
async def test_what_is_open_for_too_long_says_what_it_waits_for(
    make: Make, connection: Connection, step: Step | None, reason: str
) -> None:
    gateway = PreparingGateway(no_answer)
    service = await make(gateway, **FAST)
    await begin(service)
    gateway.open = {} if step is None else {PAYMENT: Open(id=PAYMENT, step=step)}
    await age(connection, 130)
    reasons: list[str] = []

    def note(record: Any) -> bool:
        reasons.append(record["extra"].get("reason"))
        return False

    sink = logger.add(lambda _: None, level="WARNING", filter=note)
    await settle(service, connection)
    logger.remove(sink)
    assert reasons == [reason]


async def open_for(kind: str, make: Make, connection: Connection) -> Service:
    if kind == "charge":
        service = await make(ScriptedGateway(no_answer), **FAST)
        await service.charging.charge(charge_of("k"))
    elif kind == "refund":
        service = await make(ScriptedGateway(refund_script=[no_answer]), **FAST)
        await service.charging.charge(charge_of("k"))
        await service.refunding.refund(refund_of(300, "a"))
    else:
        service = await abandoned(make, connection, no_answer, no_answer)
        capture_late(service)
        await settle(service, connection)
        await settle(service, connection)
        assert topics(connection, PAYMENT)[2:] == ["LateCaptureFound"]
    return service


async def test_a_refund_that_is_asked_about_for_ever(
    make: Make, connection: Connection, told: list[tuple[str, str]]
) -> None:
    """It may have arrived, the provider does not know it, and nothing may be sent any more."""
    service = await make(ScriptedGateway(refund_script=[no_answer]), **FAST)
    await begin(service)
    await service.refunding.refund(refund_of(300, "a"))
    await age(connection, 30 * 24 * 3600)
    for _ in range(4):
        await settle(service, connection)
    assert told == [TOO_LONG]


async def test_an_abandoned_payment_is_nothing_that_a_person_waits_for(
    make: Make, connection: Connection, told: list[tuple[str, str]]
) -> None:
    service = await abandoned(make, connection)
    await age(connection, 20 * 3600)
    await settle(service, connection)
    assert told == []


async def test_a_mismatch_comes_at_once_and_is_not_followed_by_less(
    make: Make, connection: Connection, told: list[tuple[str, str]]
) -> None:
    service = await make(ScriptedGateway(answer_lost), **FAST)
    await begin(service)
    gateway = gateway_of(service)
    answer_for_another_amount(service)
    await age(connection, 1000)
    for reachable in (False, True, False, True, False):
        gateway.reachable = reachable
        await settle(service, connection)
    assert told == [TOO_LONG, MISMATCH]


async def test_a_payment_that_cannot_be_read_or_is_not_in_the_log(
    make: Make, connection: Connection, told: list[tuple[str, str]]
) -> None:
    service = await make(ScriptedGateway(no_answer), **FAST)
    await begin(service)
    await settle(service, connection)
    connection.execute("ALTER TABLE payment_events DISABLE TRIGGER payment_events_append_only")
    connection.execute("UPDATE payment_events SET state = '{'")
    connection.execute(
        "INSERT INTO unsettled_payments (payment_id, kind, since, due_at)"
        " VALUES (gen_random_uuid(), 'charge', now(), now())"
    )
    for _ in range(3):
        await settle(service, connection)
    assert sorted(told) == [
        ("ERROR", "unsettled, but not in the log: `payments audit verify`"),
        ("WARNING", "cannot be settled now"),
    ]


async def test_a_defect_is_told_once_with_its_traceback(
    make: Make,
    connection: Connection,
    told: list[tuple[str, str]],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    service = await make(ScriptedGateway(no_answer), **FAST)
    await begin(service)
    monkeypatch.setattr(Settler, "settle", lambda *_, **__: 1 // 0)
    errors: list[Any] = []

    def note(record: Any) -> bool:
        errors.append(record["exception"])
        return False

    sink = logger.add(lambda _: None, level="ERROR", filter=note)
    for _ in range(3):
        await settle(service, connection)
    logger.remove(sink)
    assert told == [("ERROR", "cannot be settled now")]
    assert [error.type for error in errors] == [ZeroDivisionError]


async def test_without_the_database_everything_is_told(told: list[tuple[str, str]]) -> None:
    nowhere = DatabaseAddress(
        host="127.0.0.1", port=free_port(), user="postgres", password=None, dbname="none"
    )
    async with Database(nowhere, 1) as database:
        store = EventStore(database, appender=None)  # type: ignore[arg-type]
        for _ in range(2):
            await tell(store, uuid.uuid4(), "CRITICAL", "so it is")
    assert told == [("CRITICAL", "so it is")] * 2
