"""A log made for measuring, and the projector let loose on it."""

import time
import uuid
from collections.abc import Iterator
from datetime import UTC, datetime, timedelta
from typing import Any

import psycopg

from payments.database.connections import Database, DatabaseAddress
from payments.events import facts
from payments.events.facts import Fact
from payments.observability.metrics import Telemetry
from payments.payment.decisions import (
    Cause,
    charge_outcome,
    initiate,
    initiate_refund,
    refund_outcome,
)
from payments.payment.identity import ChargeRequest, RefundRequest
from payments.payment.state import Approved, Declined, Payment, evolve
from payments.projections.follower import Follower
from payments.service import build_followers
from payments.settings import Settings

BEGIN = datetime(2026, 1, 1, tzinfo=UTC)


def fill_log(connection: psycopg.Connection[Any], payments: int) -> list[uuid.UUID]:
    """Writes the events of so many payments: 3 % declined, 2 % refunded, the rest just charged.

    The two events of a charge stand about 30 positions apart, as under load. Returns the ids.
    """
    ids = []
    query = (
        "COPY payment_events (notification_id, originator_id, originator_version, topic, state,"
        " recorded_at) FROM STDIN (FORMAT BINARY)"
    )
    connection.execute("SET statement_timeout = 0")
    with connection.cursor() as cursor, cursor.copy(query) as copy:
        copy.set_types(["int8", "uuid", "int8", "text", "bytea", "timestamptz"])
        for position, fact in enumerate(_interleaved(payments), 1):
            state = facts.encode(fact)
            row = (position, fact.payment_id, fact.version, fact.TOPIC, state, fact.occurred_at)
            copy.write_row(row)
            if fact.version == 1:
                ids.append(fact.payment_id)
    connection.execute("ANALYZE payment_events")
    connection.commit()
    return ids


def _interleaved(payments: int) -> Iterator[Fact]:
    """All first events, each 16 payments ahead of the rest of its stream."""
    waiting: list[list[Fact]] = []
    for number in range(payments):
        first, *rest = _history(number)
        yield first
        waiting.append(rest)
        if len(waiting) > 16:
            yield from waiting.pop(0)
    for rest in waiting:
        yield from rest


def _history(number: int) -> list[Fact]:
    cause = Cause(
        event_id=uuid.UUID(int=number),
        occurred_at=BEGIN + timedelta(milliseconds=number),
        client="default",
        request_id="benchmark",
    )
    request = ChargeRequest(
        idempotency_key=f"benchmark-{number}",
        merchant_order_id=uuid.uuid4(),
        amount_cents=1500,
        currency="INR",
        client="default",
    )
    events: list[Fact] = [initiate(request, "simulated", cause)]
    payment = evolve(None, events[0])
    if number % 100 < 3:
        outcome: Approved | Declined = Declined("declined_by_simulation")
    else:
        outcome = Approved(
            id=payment.id,
            amount_cents=1500,
            currency="INR",
            provider_txn_id=f"sim_{payment.id.hex}",
        )
    fact = charge_outcome(payment, outcome, cause)
    assert fact is not None
    events.append(fact)
    if number % 100 >= 98:
        events += _refund(evolve(payment, fact), cause)
    return events


def _refund(payment: Payment, cause: Cause) -> list[Fact]:
    request = RefundRequest(
        payment_id=payment.id, amount_cents=500, idempotency_key="r", client="default"
    )
    begun = initiate_refund(payment, request, cause)
    payment = evolve(payment, begun)
    refund = payment.refunds[-1]
    outcome = Approved(
        id=refund.id, amount_cents=500, currency="INR", provider_txn_id=f"simre_{refund.id.hex}"
    )
    done = refund_outcome(payment, refund, outcome, cause)
    assert done is not None
    return [begun, done]


async def project(address: DatabaseAddress, events: int = 1 << 62) -> list[tuple[int, float]]:
    """Runs the projector until it has applied `events`, or all; (events, seconds) of each batch."""
    projector, _ = build_followers(Settings(), Database(address, 1), Telemetry())
    return await _follow(projector, events)


async def seal_log(address: DatabaseAddress) -> None:
    """Seals all events."""
    _, sealer = build_followers(Settings(), Database(address, 1), Telemetry())
    await _follow(sealer, 1 << 62)


async def _follow(follower: Follower, events: int) -> list[tuple[int, float]]:
    batches = []
    done = 0
    while done < events:
        started = time.perf_counter()
        moved = await follower.run_once()
        if not moved:
            break
        batches.append((moved, time.perf_counter() - started))
        done += moved
    await follower.close()
    return batches
