"""Settling one payment without waiting for its time to come."""

from datetime import UTC, datetime, timedelta
from typing import Any

import psycopg

from payments.service import Service
from tests.commands.conftest import Make
from tests.commands.looking import PAYMENT, capture, gateway_of, topics
from tests.doubles.gateway import ScriptedGateway, no_answer

FAST: dict[str, Any] = {"charge_deadline_s": 0.3, "gateway_timeout_s": 0.2}
SOON: dict[str, Any] = {**FAST, "pending_abandon_after_s": 0.3}


async def project(service: Service) -> None:
    while await service.followers[0].run_once():
        pass


async def settle(service: Service, connection: psycopg.Connection[Any]) -> int:
    """Lets the time pass that a row waits for, and settles; how many payments were tried."""
    await project(service)
    connection.execute("UPDATE unsettled_payments SET due_at = clock_timestamp()")
    tried = await service.settling.run_once()
    await project(service)
    return tried


def unsettled(connection: psycopg.Connection[Any]) -> list[tuple[str, int]]:
    return connection.execute("SELECT kind, attempts FROM unsettled_payments").fetchall()


def due_in_s(connection: psycopg.Connection[Any]) -> float:
    row = connection.execute(
        "SELECT extract(epoch FROM due_at - clock_timestamp())::float8 FROM unsettled_payments"
    ).fetchone()
    assert row is not None
    return float(row[0])


async def age(connection: psycopg.Connection[Any], seconds: float) -> None:
    """Makes all events older, as only a superuser without the trigger can."""
    connection.execute("ALTER TABLE payment_events DISABLE TRIGGER payment_events_append_only")
    connection.execute(
        "UPDATE payment_events SET recorded_at = recorded_at - make_interval(secs => %s)", [seconds]
    )
    connection.execute(
        "ALTER TABLE payment_events ENABLE ALWAYS TRIGGER payment_events_append_only"
    )


def hold_ends_in(connection: psycopg.Connection[Any], seconds: float) -> None:
    """Of all payments that have a hold."""
    connection.execute("ALTER TABLE payment_events DISABLE TRIGGER ALL")
    connection.execute(
        "UPDATE payment_events SET state = convert_to(regexp_replace("
        'convert_from(state, \'UTF8\'), \'"hold_until":"[^"]*"\','
        " '\"hold_until\":\"' || %s || '\"'), 'UTF8') WHERE originator_version = 1",
        [(datetime.now(UTC) + timedelta(seconds=seconds)).isoformat().replace("+00:00", "Z")],
    )
    connection.execute(
        "ALTER TABLE payment_events ENABLE ALWAYS TRIGGER payment_events_append_only"
    )


async def abandoned(make: Make, connection: psycopg.Connection[Any], *script: Any) -> Service:
    service = await make(ScriptedGateway(no_answer, refund_script=script), **SOON)
    await capture(service)
    await age(connection, 1)
    await settle(service, connection)
    assert topics(connection, PAYMENT) == ["PaymentInitiated", "PaymentFailed"]
    return service


def capture_late(service: Service) -> None:
    gateway = gateway_of(service)
    gateway.capture(gateway.charges[0])
