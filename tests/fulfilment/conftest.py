"""Payments, their rows in `fulfilments`, and an Order Service that says what a test likes."""

import asyncio
import uuid
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple
from uuid import UUID

import psycopg
import pytest

from payments.database.connections import Database
from payments.fulfilment import table
from payments.fulfilment.checking import Checking, GiveBack
from payments.fulfilment.status import OrderStatus
from payments.order_service.responses import Reading
from tests.support import History, append, follow

CONFIRMED = Reading(verdict="confirmed", order_status="CONFIRMED", problem=None)
FAILED = Reading(verdict="failed", order_status="FAILED", problem=None)
PENDING = Reading(verdict="unknown", order_status="PENDING", problem=None)
MISSING = Reading(verdict="unknown", order_status=None, problem="404")


class PlayedStatus(OrderStatus):
    """Says `reading`, of any order."""

    def __init__(self) -> None:
        self.reading = CONFIRMED
        self.asked: list[UUID] = []
        self.held: asyncio.Event | None = None  # who asks meanwhile waits for it

    async def open(self) -> None:
        pass

    async def close(self) -> None:
        pass

    async def ask(self, order_id: UUID) -> Reading:
        self.asked.append(order_id)
        reading = self.reading
        if self.held is not None:
            await self.held.wait()
        return reading


class Row(NamedTuple):
    state: str
    said: str
    order_status: str | None
    problem: str | None
    attempts: int
    failed_s: float | None  # since failed_since
    due_in_s: float


ROWS = """
SELECT payment_id, state, said, order_status, problem, attempts,
       extract(epoch FROM clock_timestamp() - failed_since)::float8,
       extract(epoch FROM next_at - clock_timestamp())::float8
  FROM fulfilments
"""


class Suspects:
    """The log, its read model, and the rows of `fulfilments`."""

    def __init__(self, database: Database, connection: psycopg.Connection[Any]) -> None:
        self.database = database
        self.connection = connection
        self.status = PlayedStatus()

    async def paid(self, order_id: UUID, payments: int = 1, *, followed: bool = True) -> list[UUID]:
        """So many payments of the order that were captured, one after another."""
        made = [History(str(uuid.uuid4()), order_id=order_id).charged() for _ in range(payments)]
        append(self.connection, [fact for each in made for fact in each.facts])
        if followed:
            await follow(self.database)
        return [each.id for each in made]

    def suspect(self, order_id: UUID, payment_ids: Sequence[UUID]) -> None:
        for payment_id in payment_ids:
            self.connection.execute(
                "INSERT INTO fulfilments (payment_id, order_id, state, said)"
                " VALUES (%s, %s, 'suspect', 'already_processed') ON CONFLICT DO NOTHING",
                [payment_id, order_id],
            )

    async def paid_suspect(self) -> UUID:
        order_id = uuid.uuid4()
        (payment_id,) = await self.paid(order_id)
        self.suspect(order_id, [payment_id])
        return payment_id

    def checking(self, give_back: GiveBack | None = None) -> Checking:
        return Checking(self.database, self.status, 90, give_back=give_back)

    async def read(self, reading: Reading, give_back: GiveBack | None = None) -> int:
        """Whatever is due is asked about, and this is what is said."""
        self.status.reading = reading
        return await self.checking(give_back).run_once()

    def rows(self) -> dict[UUID, Row]:
        return {row[0]: Row(*row[1:]) for row in self.connection.execute(ROWS)}

    def state(self, payment_id: UUID) -> str | None:
        row = self.rows().get(payment_id)
        return row and row.state

    def pass_time(self, seconds: float) -> None:
        """As if all that happened had happened so much earlier."""
        self.connection.execute(
            "UPDATE fulfilments SET next_at = next_at - make_interval(secs => %(s)s),"
            " failed_since = failed_since - make_interval(secs => %(s)s),"
            " given_back_at = given_back_at - make_interval(secs => %(s)s),"
            " found_at = found_at - make_interval(secs => %(s)s)",
            {"s": seconds},
        )


@pytest.fixture
def suspects(database: Database, connection: psycopg.Connection[Any]) -> Suspects:
    return Suspects(database, connection)


@pytest.fixture
def short_lease(monkeypatch: pytest.MonkeyPatch) -> Callable[[], None]:
    """From when it is called on, whoever claims something has it for a moment only."""
    claim = table.claim

    async def claim_shortly(
        database: Database, most: int, lease_s: float
    ) -> list[table.ClaimedFulfilment]:
        return await claim(database, most, 0.0)

    return lambda: monkeypatch.setattr(table, "claim", claim_shortly)
