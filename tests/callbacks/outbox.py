"""The outbox of a test, written by its follower and looked at with SQL."""

import uuid
from collections.abc import Iterable
from typing import Any

import psycopg

from payments.callbacks.outbox import ClaimedDelivery, Result, claim
from payments.database.connections import Database
from payments.events.facts import Fact
from payments.observability.metrics import Telemetry
from payments.projections.callbacks import CallbacksProjection
from payments.projections.follower import Follower
from tests.support import History, append

SENT = ("SUCCESS", "FAILED")  # the statuses that Order Service wants to hear of
ALL = (*SENT, "REFUNDED")
ACTIONS = (*ALL, "ACTION_REQUIRED")


def of(order_id: uuid.UUID, key: str) -> History:
    return History(key, order_id=order_id)


def charges(orders: Iterable[uuid.UUID]) -> list[Fact]:
    """A payment for each order, in this order."""
    return [fact for order_id in orders for fact in of(order_id, str(order_id)).charged().facts]


async def claim_some(
    connection: psycopg.AsyncConnection[Any], *, lease_s: float = 0.3, probing: bool = False
) -> list[ClaimedDelivery]:
    return await claim(connection, most=10, failing_max=10, lease_s=lease_s, probing=probing)


def result_of(claimed: ClaimedDelivery, state: Any) -> Result:
    return Result(
        claimed=claimed,
        state=state,
        delay_s=0.0,
        counts=True,
        seconds=0.01,
        outcome="delivered",
        status=200,
        reason="",
        answer=b"ok",
    )


class Outbox:
    """The tables of the outbox, and the follower that writes them."""

    def __init__(self, database: Database, connection: psycopg.Connection[Any]) -> None:
        self.database = database
        self.connection = connection

    async def log(self, *facts: Fact, statuses: tuple[str, ...] = SENT) -> None:
        """Appends the facts and follows them."""
        append(self.connection, list(facts))
        await self.follow(statuses)

    async def follow(self, statuses: tuple[str, ...] = SENT) -> None:
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

    def events(self) -> list[uuid.UUID]:
        return [event_id for (event_id,) in self.rows("event_id")]

    def lanes(self) -> list[tuple[Any, ...]]:
        query = "SELECT order_id, failing, in_flight FROM callback_lanes ORDER BY order_id"
        return self.connection.execute(query).fetchall()

    def turns(self) -> list[uuid.UUID]:
        """The orders that have a lane, whose turn is first before the others."""
        query = "SELECT order_id FROM callback_lanes ORDER BY next_at"
        return [order_id for (order_id,) in self.connection.execute(query)]

    def paused(self) -> int:
        """How many lanes still wait, as `pause` left them."""
        query = "SELECT count(*) FROM callback_lanes WHERE next_at > now() + interval '59 min'"
        row = self.connection.execute(query).fetchone()
        assert row is not None
        return int(row[0])

    def claimed(self) -> int:
        """How many lanes have been claimed, whether or not something was sent."""
        row = self.connection.execute("SELECT count(claim) FROM callback_lanes").fetchone()
        assert row is not None
        return int(row[0])

    def attempts(self) -> list[tuple[Any, ...]]:
        """(outcome, status) in order."""
        query = "SELECT outcome, status FROM callback_attempts ORDER BY claim"
        return self.connection.execute(query).fetchall()

    def make_all_due(self) -> None:
        """As if all pauses were over, those of leases as well."""
        self.connection.execute("UPDATE callback_lanes SET next_at = now() - interval '1 s'")

    def pause(self, *, failing: bool = True) -> None:
        """As if all had failed often, and last in the outage to come: each waits for an hour."""
        pause = (
            "UPDATE callback_lanes SET failing = %s, next_at = now() + interval '1 h',"
            "       away_at = CASE WHEN %s THEN now() + interval '1 min' END"
        )
        self.connection.execute(pause, [failing, failing])

    def finish(self, state: str, *, days_ago: int = 0) -> None:
        """As if that had become of all."""
        finish = (
            "UPDATE callback_deliveries"
            "   SET state = %s, finished_at = now() - make_interval(days => %s)"
        )
        self.connection.execute(finish, [state, days_ago])
        self.connection.execute("DELETE FROM callback_lanes")
