"""The outbox of a test, written by its follower and looked at with SQL."""

from typing import Any

import psycopg

from payments.database import Database
from payments.events.facts import Fact
from payments.projections.callbacks import CallbacksProjection
from payments.projections.follower import Follower
from payments.telemetry import Telemetry
from tests.support import append


class Outbox:
    """The tables of the outbox, and the follower that writes them."""

    def __init__(self, database: Database, connection: psycopg.Connection[Any]) -> None:
        self.database = database
        self.connection = connection

    async def log(self, *facts: Fact, statuses: tuple[str, ...] = ("SUCCESS", "FAILED")) -> None:
        """Appends the facts and follows them."""
        append(self.connection, list(facts))
        await self.follow(statuses)

    async def follow(self, statuses: tuple[str, ...] = ("SUCCESS", "FAILED")) -> None:
        projection = CallbacksProjection(statuses)
        follower = Follower(self.database.connect, projection, Telemetry())
        try:
            while await follower.run_once():
                pass
        finally:
            await follower.close()

    def rows(self, *columns: str) -> list[tuple[Any, ...]]:
        """Of all deliveries, in the order of the log."""
        query = f"SELECT {', '.join(columns)} FROM callback_deliveries ORDER BY position"
        return self.connection.execute(query.encode()).fetchall()

    def states(self) -> list[str]:
        return [state for (state,) in self.rows("state")]

    def lanes(self) -> list[tuple[Any, ...]]:
        query = "SELECT order_id, failing, in_flight FROM callback_lanes ORDER BY order_id"
        return self.connection.execute(query).fetchall()

    def attempts(self) -> list[tuple[Any, ...]]:
        """(outcome, status) in order."""
        query = "SELECT outcome, status FROM callback_attempts ORDER BY claim"
        return self.connection.execute(query).fetchall()

    def make_all_due(self) -> None:
        """As if all pauses were over, those of leases as well."""
        self.connection.execute("UPDATE callback_lanes SET next_at = now() - interval '1 s'")
