"""What the tests of commands begin with, and look at: what is stored, what the provider got."""

from contextlib import suppress
from typing import Any
from uuid import UUID

import psycopg

from payments.commands.charge import Charged
from payments.errors import ClientGone, TooBusy
from payments.events.store import LOAD_ENTRIES, LogEntry, fact_of
from payments.gateways.counted import CountedGateway
from payments.payment.identity import payment_id_for
from payments.payment.state import Payment, Status, fold
from payments.service import Service
from tests.doubles.gateway import ScriptedGateway
from tests.support import charge_of

Connection = psycopg.Connection[Any]

PAYMENT = payment_id_for("k")


def topics(connection: psycopg.Connection[Any], payment_id: UUID) -> list[str]:
    """The stored events of a payment, by their names."""
    rows = connection.execute(
        "SELECT topic FROM payment_events WHERE originator_id = %s ORDER BY originator_version",
        [payment_id],
    ).fetchall()
    return [topic for (topic,) in rows]


def gateway_of(service: Service) -> ScriptedGateway:
    gateway = counted(service)._gateway
    assert isinstance(gateway, ScriptedGateway)
    return gateway


def counted(service: Service) -> CountedGateway:
    """The one gateway, as the commands see it."""
    (gateway,) = service.gateways
    return gateway


async def begin(service: Service, amount_cents: int = 1500) -> None:
    """Charges `k` until its intent is stored; on a slow machine it may be refused before."""
    while True:
        with suppress(ClientGone, TooBusy):
            await service.charging.charge(charge_of("k", amount_cents))
            return


async def capture(service: Service, amount_cents: int = 1500) -> None:
    """Charges `k`; the outcome is stored then, also if the machine took longer than a deadline."""
    await begin(service, amount_cents)
    await service.runs.drain(30)


def as_stored(connection: Connection, payment_id: UUID = PAYMENT) -> Payment:
    rows = connection.execute(LOAD_ENTRIES.encode(), [payment_id]).fetchall()
    payment = fold(fact_of(LogEntry(*row)) for row in rows)
    assert payment is not None
    return payment


def first_answer(charged: Charged) -> tuple[Status, bool]:
    return charged.payment.status, charged.replayed
