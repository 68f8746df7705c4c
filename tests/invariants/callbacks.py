"""What must always hold of callbacks, checked from outside: the log, the outbox, what arrived.

Every outcome is delivered, superseded or dead, each order's in order, and never two at once. As
checker.py, for every scenario.
"""

from collections import Counter, defaultdict
from collections.abc import Collection, Iterable, Iterator
from datetime import datetime
from typing import Any, NamedTuple
from uuid import UUID

import psycopg
from eventsourcing.persistence import StoredEvent

from payments.events.facts import PaymentCharged, PaymentFailed, PaymentRefunded, UndecodableEvent
from payments.events.store import to_fact
from tests.doubles.order_requests import Request, findings
from tests.invariants.checker import LOG, expect_none

PARKED = "SELECT payment_id FROM parked_streams WHERE follower = 'callbacks'"

POSITION = "SELECT position FROM followers WHERE name = 'callbacks'"

DELIVERIES = """
SELECT event_id, position, order_id, payment_id, sequence, status, amount_cents, currency,
       occurred_at, state, attempts, finished_at, enqueued_at
  FROM callback_deliveries
"""

# One of which nothing is due stays while something of it may be running at Order Service.
LANES = """
SELECT order_id, in_flight,
       next_at <= clock_timestamp() OR coalesce(busy_until > clock_timestamp(), false)
  FROM callback_lanes
"""

ATTEMPTS = "SELECT event_id, outcome, status FROM callback_attempts ORDER BY claim"


class Outcome(NamedTuple):
    """What Order Service is to be told."""

    event_id: UUID
    position: int
    order_id: UUID
    payment_id: UUID
    sequence: int
    status: str
    amount_cents: int
    currency: str
    occurred_at: datetime

    @property
    def body(self) -> dict[str, Any]:
        return {
            "order_id": str(self.order_id),
            "payment_id": str(self.payment_id),
            "status": self.status,
            "event_id": str(self.event_id),
            "sequence": self.sequence,
            "occurred_at": self.occurred_at.isoformat().replace("+00:00", "Z"),
            "amount_cents": self.amount_cents,
            "currency": self.currency,
        }


class Row(NamedTuple):
    outcome: Outcome
    state: str
    attempts: int  # that count
    finished_at: datetime | None
    enqueued_at: datetime


class Lane(NamedTuple):
    order_id: UUID
    in_flight: UUID | None
    may_be_claimed: bool


class Attempt(NamedTuple):
    event_id: UUID
    outcome: str
    status: int | None


class CallbackReport(NamedTuple):
    """How many rows there are in each state, and how many exchanges are on record."""

    states: Counter[str]
    attempts: int


class _Stored(NamedTuple):
    """The database as of one moment. `outcomes` are those of the whole log."""

    outcomes: list[Outcome]
    head: int
    position: int  # of the follower; 0 if it never began
    parked: set[UUID]
    rows: dict[UUID, Row]
    lanes: list[Lane]
    attempts: dict[UUID, list[Attempt]]


def is_followed(connection: psycopg.Connection[Any]) -> bool:
    """Whether the outbox has all of the log."""
    row = connection.execute(
        "SELECT (SELECT position FROM followers WHERE name = 'callbacks')"
        "       = (SELECT coalesce(max(notification_id), 0) FROM payment_events)"
    ).fetchone()
    return row == (True,)


def nothing_due(connection: psycopg.Connection[Any]) -> bool:
    """Whether all of the log was sent, or is not to be sent. What a test waits for."""
    if not is_followed(connection):
        return False
    lanes = connection.execute("SELECT count(*) FROM callback_lanes").fetchone()
    return lanes == (0,)


def check_callbacks(
    connection: psycopg.Connection[Any],
    *,
    first_position: int = 1,
    statuses: Collection[str] = ("SUCCESS", "FAILED"),
    received: Iterable[Request] | None = None,
    settled: bool = True,
) -> CallbackReport:
    """Raises InvariantBroken with all findings.

    Outcomes count from `first_position` on: where the outbox began. `statuses` are those that Order
    Service wants. `received` is all that came to it; without it nothing is compared with that.
    `settled`: nothing may be due or under way; else the outbox is compared as of its position.
    """
    stored = _read(connection)
    found = [
        *_one_row_each(stored, first_position, statuses),
        *_states(stored),
        *_money(stored),
        *_attempts(stored),
        *_lanes(stored),
        *(_open(stored) if settled else ()),
    ]
    if received is not None:
        requests = sorted(received, key=lambda request: request.arrived)
        refunded = {str(each.payment_id) for each in stored.outcomes if each.status == "REFUNDED"}
        found += [*_received(stored, requests, settled), *findings(requests, refunded)]
    expect_none(found)
    return CallbackReport(
        Counter(row.state for row in stored.rows.values()),
        sum(map(len, stored.attempts.values())),
    )


def _read(connection: psycopg.Connection[Any]) -> _Stored:
    with connection.transaction():
        connection.execute("SET TRANSACTION ISOLATION LEVEL REPEATABLE READ, READ ONLY")
        connection.execute("SET LOCAL statement_timeout = '30s'")
        log = connection.execute(LOG).fetchall()
        position = connection.execute(POSITION).fetchone()
        attempts = defaultdict(list)
        for each in map(Attempt._make, connection.execute(ATTEMPTS)):
            attempts[each.event_id].append(each)
        return _Stored(
            list(_outcomes(log)),
            log[-1][0] if log else 0,
            position[0] if position else 0,
            {payment_id for (payment_id,) in connection.execute(PARKED)},
            {row[0]: Row(Outcome(*row[:9]), *row[9:]) for row in connection.execute(DELIVERIES)},
            [Lane(*row) for row in connection.execute(LANES)],
            attempts,
        )


def _outcomes(log: Iterable[tuple[int, UUID, int, str, bytes]]) -> Iterator[Outcome]:
    """By the events; what cannot be read is not known to be one."""
    captured: Counter[UUID] = Counter()
    refunded: Counter[UUID] = Counter()
    for position, stream, version, topic, state in log:
        try:
            fact = to_fact(StoredEvent(stream, version, topic, state))
        except UndecodableEvent:
            continue
        if isinstance(fact, PaymentCharged):
            status, amount_cents = "SUCCESS", fact.amount_cents
            captured[stream] += amount_cents
        elif isinstance(fact, PaymentFailed):
            status, amount_cents = "FAILED", fact.amount_cents
        elif isinstance(fact, PaymentRefunded):
            refunded[stream] += fact.amount_cents
            if refunded[stream] < captured[stream]:
                continue
            status, amount_cents = "REFUNDED", captured[stream]
        else:
            continue
        yield Outcome(
            fact.event_id,
            position,
            fact.merchant_order_id,
            stream,
            version,
            status,
            amount_cents,
            fact.currency,
            fact.occurred_at,
        )


def _one_row_each(stored: _Stored, first_position: int, statuses: Collection[str]) -> Iterator[str]:
    """An event id is the key, so there are never two."""
    owed = {
        outcome.event_id: outcome
        for outcome in stored.outcomes
        if first_position <= outcome.position <= stored.position
    }
    for event_id, outcome in owed.items():
        row = stored.rows.get(event_id)
        if row is None:
            if outcome.payment_id not in stored.parked:
                yield f"there is no callback for {outcome}"
        elif row.outcome != outcome:
            yield f"the callback is {row.outcome}, the events say {outcome}"
        elif (row.state == "excluded") != (outcome.status not in statuses):
            yield f"it is {row.state}, and {', '.join(statuses)} are wanted: {outcome}"
    for event_id in stored.rows.keys() - owed.keys():
        yield f"the events say nothing of {stored.rows[event_id]}"


def _states(stored: _Stored) -> Iterator[str]:
    for outcome, state, _, finished_at, _ in stored.rows.values():
        if (finished_at is None) != (state == "due"):
            yield f"{outcome.event_id} is {state} and was finished at {finished_at}"


def _money(stored: _Stored) -> Iterator[str]:
    """A FAILED or REFUNDED is superseded if, and only if, its order had money while it waited to be
    sent: a payment with a SUCCESS whose whole amount had not gone back.

    What was superseded stays so, whatever goes back later. When the money came, and whether it went
    back, is not known to the moment: of a SUCCESS it is certain that it was there if it was written
    down before the FAILED and never went back.
    """
    refunded = {
        outcome.payment_id: outcome.position
        for outcome in stored.outcomes
        if outcome.status == "REFUNDED"
    }
    paid = defaultdict(list)
    for outcome in stored.outcomes:
        if outcome.status == "SUCCESS":
            paid[outcome.order_id].append(outcome)
    for row in stored.rows.values():
        undoing = row.outcome
        if row.state == "superseded" and not (
            undoing.status != "SUCCESS"
            and any(
                refunded.get(each.payment_id, undoing.position + 1) > undoing.position
                for each in paid[undoing.order_id]
            )
        ):
            yield f"{undoing.status} of order {undoing.order_id} is superseded by nothing"
        if undoing.status == "SUCCESS" or row.state in ("superseded", "excluded"):
            continue
        for each in paid[undoing.order_id]:
            written = stored.rows.get(each.event_id)
            if (
                each.payment_id not in refunded
                and written is not None
                and written.enqueued_at <= row.enqueued_at
            ):
                yield (
                    f"{undoing.status} of order {undoing.order_id} is {row.state}, "
                    f"and {each} is its money"
                )


def _attempts(stored: _Stored) -> Iterator[str]:
    """What is on record of the exchanges bears the states out."""
    for event_id in stored.attempts.keys() - stored.rows.keys():
        yield f"{event_id} was tried, and is no callback"
    for event_id, row in stored.rows.items():
        made = stored.attempts.get(event_id, [])
        taken = [each for each in made if each.outcome == "delivered"]
        if row.attempts > len(made):
            yield f"{event_id} had {row.attempts} attempts, {len(made)} are on record"
        if any(each.status is None or not 200 <= each.status < 300 for each in taken):
            yield f"{event_id} was delivered without a 2xx: {taken}"
        match row.state:
            case "delivered" if not taken:
                yield f"{event_id} is delivered, but by none of its attempts: {made}"
            case "superseded" if taken:
                yield f"{event_id} is superseded, but was delivered: {taken}"
            case "excluded" if made:
                yield f"{event_id} is excluded, but was tried: {made}"
            case "dead" if len(made) == len(taken):
                yield f"{event_id} is dead, but no attempt of it failed: {made}"


def _lanes(stored: _Stored) -> Iterator[str]:
    """An order has one if and only if it has due rows; a superfluous one is gone at its turn."""
    due = {row.outcome.order_id for row in stored.rows.values() if row.state == "due"}
    for order_id in due - {lane.order_id for lane in stored.lanes}:
        yield f"order {order_id} has due callbacks and no lane"
    for lane in stored.lanes:
        if lane.order_id not in due and not lane.may_be_claimed:
            yield f"order {lane.order_id} has a lane and no due callbacks"
        row = stored.rows.get(lane.in_flight) if lane.in_flight else None
        if lane.in_flight and (row is None or row.outcome.order_id != lane.order_id):
            yield f"in the lane of order {lane.order_id} another's callback is under way: {row}"


def _open(stored: _Stored) -> Iterator[str]:
    """Nothing is left to be done."""
    if stored.position != stored.head:
        yield f"the outbox is at {stored.position}, the log's end is {stored.head}"
    for row in stored.rows.values():
        if row.state == "due":
            yield f"it is still due: {row}"
    for lane in stored.lanes:
        yield f"there is still a lane: {lane}"


def _received(stored: _Stored, requests: list[Request], settled: bool) -> Iterator[str]:
    """What came to Order Service is what the outbox says, and came in order."""
    came: defaultdict[UUID, list[Request]] = defaultdict(list)
    for request in requests:
        row = stored.rows.get(_uuid(request.get("event_id")))
        if row is None or request.content != row.outcome.body:
            yield f"request {request.number} tells of nothing known: {request.content}, {row}"
        else:
            came[row.outcome.event_id].append(request)
    for event_id, row in stored.rows.items():
        sent = came.get(event_id, [])
        if row.state == "delivered" and not any(request.accepted for request in sent):
            yield f"{event_id} is delivered, and was never accepted: {len(sent)} came"
        if row.state == "excluded" and sent:
            yield f"{event_id} is excluded, and came {len(sent)} times"
        # What is under way, or was when its sender died, comes on record later.
        if settled and len(sent) > len(stored.attempts.get(event_id, [])):
            made = stored.attempts.get(event_id, [])
            yield f"{event_id} came {len(sent)} times, of which are on record: {made}"
    last: dict[UUID, Outcome] = {}
    for event_id in came:  # in the order of first arrivals
        outcome = stored.rows[event_id].outcome
        before = last.setdefault(outcome.order_id, outcome)
        if before.position > outcome.position:
            yield f"order {outcome.order_id}: {outcome.status} first came after {before.status}"
        last[outcome.order_id] = max(before, outcome, key=lambda each: each.position)


def _uuid(text: Any) -> UUID:
    try:
        return UUID(text)
    except (ValueError, TypeError, AttributeError):
        return UUID(int=0)
