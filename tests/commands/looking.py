"""What the tests of commands look at: what is stored, and what the provider was asked."""

from typing import Any
from uuid import UUID

import psycopg

from payments.service import Service
from tests.doubles.gateway import ScriptedGateway


def topics(connection: psycopg.Connection[Any], payment_id: UUID) -> list[str]:
    """The stored events of a payment, by their names."""
    rows = connection.execute(
        "SELECT topic FROM payment_events WHERE originator_id = %s ORDER BY originator_version",
        [payment_id],
    ).fetchall()
    return [topic for (topic,) in rows]


def gateway_of(service: Service) -> ScriptedGateway:
    gateway = service.gateway._gateway
    assert isinstance(gateway, ScriptedGateway)
    return gateway
