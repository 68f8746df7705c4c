"""The callback outbox: which outcomes are owed, once each, however they come."""

import uuid
from typing import Any

import psycopg
import pytest

from payments.callbacks.outbox import record, redrive
from payments.database.connections import Database
from payments.events.facts import Fact
from payments.observability.metrics import Telemetry
from payments.payment.decisions import Cause, refund_outcome
from payments.payment.state import Approved
from payments.projections.callbacks import CallbacksProjection, backfill, begin_at_the_end
from payments.projections.follower import Follower
from payments.queries.callbacks import deliveries_of_payment, ids_since
from tests.callbacks.outbox import ACTIONS, ALL, Outbox, charges, claim_some, of, result_of
from tests.support import History, append, append_stored, histories, stored_event

pytestmark = pytest.mark.anyio

A, B = uuid.uuid4(), uuid.uuid4()


@pytest.fixture
async def outbox(database: Database, connection: psycopg.Connection[Any]) -> Outbox:
    await begin_at_the_end(database)
    return Outbox(database, connection)


async def test_an_outcome_is_one_row_that_says_what_order_service_is_told(outbox: Outbox) -> None:
    charged = History("k", 1234, currency="EUR").charged()
    await outbox.log(*charged.facts)
    fact = charged.facts[1]
    columns = "event_id, position, order_id, payment_id, sequence, status, amount_cents, currency"
    assert outbox.rows(columns, "occurred_at", "state", "attempts") == [
        (
            *(fact.event_id, 2, charged.payment.merchant_order_id, charged.id, 2, "SUCCESS"),
            *(1234, "EUR", fact.occurred_at, "due", 0),
        )
    ]
    assert outbox.lanes() == [(charged.payment.merchant_order_id, False, None)]


# What each history has Order Service told, if it wants to hear of everything.
TOLD = {
    "pending": [],
    "charged": ["SUCCESS"],
    "declined": ["FAILED"],
    "abandoned": ["FAILED"],
    "refund under way": ["SUCCESS"],
    "partly refunded": ["SUCCESS"],
    "refunded in parts": ["SUCCESS", "REFUNDED"],
    "refunded": ["SUCCESS", "REFUNDED"],
    "refund failed": ["SUCCESS"],
    "refunded at last": ["SUCCESS", "REFUNDED"],
    "two refunds at once": ["SUCCESS"],
    "late capture found": ["FAILED"],
    "late capture returned": ["FAILED"],
    "declined, yet captured": ["FAILED"],
}


@pytest.mark.parametrize("kind", TOLD)
async def test_every_history_tells_its_outcomes_and_nothing_else(outbox: Outbox, kind: str) -> None:
    known = histories()
    assert known.keys() == TOLD.keys()
    await outbox.log(*known[kind].facts, statuses=ALL)
    assert [status for (status,) in outbox.rows("status")] == TOLD[kind]
    assert all(amount == 1500 for (amount,) in outbox.rows("amount_cents"))


async def test_what_order_service_does_not_want_is_on_record_and_not_due(outbox: Outbox) -> None:
    await outbox.log(*of(A, "a").charged().refunded().facts)
    assert outbox.rows("status", "state") == [("SUCCESS", "due"), ("REFUNDED", "excluded")]
    await outbox.log(*of(B, "b").declined().facts, statuses=("SUCCESS",))
    assert outbox.states() == ["due", "excluded", "excluded"]
    assert [order for order, *_ in outbox.lanes()] == [A]


@pytest.mark.parametrize("failed_first", [True, False])
@pytest.mark.parametrize("together", [True, False])
async def test_a_failed_payment_is_not_told_of_an_order_that_is_paid(
    outbox: Outbox, failed_first: bool, together: bool
) -> None:
    payments = [of(A, "a").declined(), of(A, "b").charged()]
    facts = [payment.facts for payment in (payments if failed_first else reversed(payments))]
    if together:
        await outbox.log(*facts[0], *facts[1])
    else:
        await outbox.log(*facts[0])
        await outbox.log(*facts[1])
    assert sorted(outbox.rows("status", "state")) == [("FAILED", "superseded"), ("SUCCESS", "due")]


async def test_a_success_that_is_not_wanted_supersedes_as_well(outbox: Outbox) -> None:
    await outbox.log(*of(A, "a").charged().facts, statuses=("FAILED",))
    await outbox.log(*of(A, "b").declined().facts, statuses=("FAILED",))
    assert outbox.states() == ["excluded", "superseded"]


async def test_a_success_from_before_the_outbox_began_supersedes(
    database: Database, connection: psycopg.Connection[Any]
) -> None:
    append(connection, of(A, "a").charged().facts)
    connection.execute(
        "INSERT INTO payments (id, merchant_order_id, status) VALUES (%s, %s, 'SUCCESS')",
        [uuid.uuid4(), A],
    )
    await begin_at_the_end(database)
    outbox = Outbox(database, connection)
    await outbox.log(*of(A, "b").declined().facts)
    assert outbox.rows("status", "state") == [("FAILED", "superseded")]


async def test_a_success_makes_an_order_that_waits_for_a_retry_due_at_once(
    outbox: Outbox,
) -> None:
    later = "UPDATE callback_lanes SET failing = true, next_at = now() + interval '1 h'"
    waiting = "SELECT next_at > now() + interval '1 min' FROM callback_lanes"
    await outbox.log(*of(A, "a").declined().facts)
    outbox.connection.execute(later)
    await outbox.log(*of(A, "b").declined().facts)
    assert outbox.connection.execute(waiting).fetchall() == [(True,)]
    await outbox.log(*of(A, "c").charged().facts)
    assert outbox.connection.execute(waiting).fetchall() == [(False,)]


async def test_a_success_takes_no_order_back_in_the_queue(outbox: Outbox) -> None:
    await outbox.log(*of(A, "a").declined().facts)
    outbox.connection.execute("UPDATE callback_lanes SET next_at = now() - interval '1 min'")
    await outbox.log(*of(B, "b").declined().facts)
    await outbox.log(*of(A, "c").charged().facts)
    assert outbox.turns() == [A, B]
    waiting = "SELECT next_at < now() - interval '50 s' FROM callback_lanes ORDER BY next_at"
    assert outbox.connection.execute(waiting).fetchall() == [(True,), (False,)]


async def test_what_is_written_together_has_its_turns_in_the_order_of_the_log(
    outbox: Outbox,
) -> None:
    """An order's turn is that of its first outcome; the ids of orders are in no order."""
    orders = [uuid.uuid4() for _ in range(50)]
    again = (of(order_id, f"{order_id} again").declined() for order_id in reversed(orders))
    await outbox.log(*charges(orders), *(fact for history in again for fact in history.facts))
    assert outbox.turns() == orders
    async with await outbox.database.connect("a") as own:
        claims = await claim_some(own, lease_s=10)
    assert {claimed.order_id for claimed in claims} == set(orders[:10])


async def test_a_delivery_in_flight_is_left_to_its_sender(outbox: Outbox) -> None:
    await outbox.log(*of(A, "a").declined().facts)
    outbox.connection.execute(
        "UPDATE callback_lanes SET next_at = now() + interval '10 s', in_flight ="
        " (SELECT event_id FROM callback_deliveries)"
    )
    await outbox.log(*of(A, "b").charged().facts)
    assert outbox.states() == ["due", "due"]
    soon = "SELECT next_at < now() + interval '5 s' FROM callback_lanes"
    assert outbox.connection.execute(soon).fetchall() == [(False,)]


async def test_it_begins_at_the_end_of_the_log_once(
    database: Database, connection: psycopg.Connection[Any]
) -> None:
    append(connection, of(A, "a").charged().facts)
    await begin_at_the_end(database)
    append(connection, of(B, "b").charged().facts)
    await begin_at_the_end(database)
    outbox = Outbox(database, connection)
    await outbox.follow()
    assert outbox.rows("order_id") == [(B,)]


async def test_without_a_beginning_it_follows_nothing(
    database: Database, connection: psycopg.Connection[Any]
) -> None:
    outbox = Outbox(database, connection)
    await outbox.log(*of(A, "a").charged().facts)
    assert outbox.rows("order_id") == []


async def test_an_event_that_might_be_an_outcome_parks_its_stream(outbox: Outbox) -> None:
    append_stored(outbox.connection, [stored_event(topic="PaymentWon")])
    append_stored(outbox.connection, [stored_event(topic="PaymentCharged")])
    await outbox.log(*of(A, "a").charged().facts)
    parked = outbox.connection.execute("SELECT follower, reason FROM parked_streams").fetchall()
    assert [follower for follower, _ in parked] == ["callbacks", "callbacks"]
    assert outbox.rows("order_id") == [(A,)]


def _theirs_last(history: History) -> History:
    """The younger one of two refunds goes through first."""
    payment, (theirs, ours) = history.payment, history.payment.refunds
    for refund in (ours, theirs):
        back = Approved(
            id=refund.id,
            amount_cents=refund.amount_cents,
            currency=payment.currency,
            provider_txn_id=f"re-{refund.id}",
        )
        cause = Cause(event_id=uuid.uuid4(), occurred_at=payment.updated_at, client="default")
        history._add(refund_outcome(history.payment, refund, back, cause))
    return history


# What the service gave back by itself, alone or beside somebody else's refund: which of the two
# comes to its end last makes the payment REFUNDED.
GIVEN_BACK = {
    "whole": of(A, "a").charged().give_back_begun().refund_succeeded(),
    "the rest": of(A, "a").charged().refunded("r", 500).give_back_begun().refund_succeeded(),
    "ours at last": (
        of(A, "a").charged().refund_begun("r", 500).give_back_begun().refund_succeeded()
    ).refund_succeeded(),
    "theirs at last": _theirs_last(of(A, "a").charged().refund_begun("r", 500).give_back_begun()),
    "refused, and asked for again by a client": (
        of(A, "a").charged().give_back_begun().refund_failed().refunded("r")
    ),
    "refused, and then refunded in parts": (
        of(A, "a").charged().give_back_begun().refund_failed().refunded("r", 500).refunded("s")
    ),
}


@pytest.mark.parametrize("together", [True, False])
@pytest.mark.parametrize("kind", GIVEN_BACK)
async def test_what_the_service_gave_back_by_itself_is_never_called_back(
    outbox: Outbox, kind: str, together: bool
) -> None:
    """Its order is known to have failed, and its seats may be somebody else's."""
    facts = [GIVEN_BACK[kind].facts] if together else [[fact] for fact in GIVEN_BACK[kind].facts]
    for some in facts:
        await outbox.log(*some, statuses=ALL)
    expected = "due" if "refused" in kind else "excluded"
    assert outbox.rows("status", "state") == [("SUCCESS", "due"), ("REFUNDED", expected)]


async def test_what_was_given_back_is_neither_backfilled_nor_redriven(
    database: Database, connection: psycopg.Connection[Any]
) -> None:
    append(connection, [*GIVEN_BACK["the rest"].facts, *of(B, "b").charged().refunded().facts])
    await begin_at_the_end(database)
    outbox = Outbox(database, connection)
    async with await database.connect("backfill") as own:
        assert (await backfill(own, CallbacksProjection(ALL), 1)).enqueued == 4
        refunded = outbox.events()[1::2]
        assert await redrive(own, refunded) == [refunded[1]]
    assert outbox.rows("order_id", "status", "state")[1::2] == [
        (A, "REFUNDED", "excluded"),
        (B, "REFUNDED", "due"),
    ]


async def test_backfill_enqueues_what_is_missing_and_nothing_twice(
    database: Database, connection: psycopg.Connection[Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("payments.projections.callbacks.BACKFILL_EVENTS", 3)
    facts: list[Fact] = [*of(A, "a").charged().facts, *of(B, "b").declined().facts]
    append(connection, facts)
    append_stored(connection, [stored_event(topic="PaymentWon")])
    await begin_at_the_end(database)
    outbox = Outbox(database, connection)
    await outbox.log(*of(B, "c").charged().facts)
    projection = CallbacksProjection(ALL)
    async with await database.connect("backfill") as own:
        for expected in (2, 0):
            done = await backfill(own, projection, 1)
            assert (done.enqueued, done.unreadable) == (expected, [5])
    assert outbox.rows("position", "status", "state") == [
        (2, "SUCCESS", "due"),
        (4, "FAILED", "superseded"),
        (7, "SUCCESS", "due"),
    ]


async def test_backfill_from_the_middle_leaves_out_what_is_before(
    database: Database, connection: psycopg.Connection[Any]
) -> None:
    append(connection, [*of(A, "a").charged().facts, *of(B, "b").charged().facts])
    await begin_at_the_end(database)
    async with await database.connect("backfill") as own:
        assert (await backfill(own, CallbacksProjection(ALL), 3)).enqueued == 1
    assert Outbox(database, connection).rows("order_id") == [(B,)]


async def test_backfill_of_what_is_known_changes_nothing(outbox: Outbox) -> None:
    """It leaves no empty lanes, each of which would take a turn before new callbacks."""
    await outbox.log(*charges(uuid.uuid4() for _ in range(20)))
    outbox.finish("delivered")
    await outbox.log(*of(A, "new").charged().facts)
    lane = "SELECT * FROM callback_lanes"
    before = outbox.connection.execute(lane).fetchall()
    async with await outbox.database.connect("backfill") as own:
        assert await backfill(own, CallbacksProjection(ALL), 1) == (0, [])
    assert outbox.connection.execute(lane).fetchall() == before


async def test_backfill_of_what_is_known_ends_nobodys_pause(outbox: Outbox) -> None:
    await outbox.log(*charges([A]))
    outbox.pause()
    async with await outbox.database.connect("backfill") as own:
        assert await backfill(own, CallbacksProjection(ALL), 1) == (0, [])
    assert outbox.lanes() == [(A, True, None)]
    assert outbox.paused() == 1


async def test_a_refund_does_not_end_the_pause_of_its_payments_success(outbox: Outbox) -> None:
    charged = of(A, "a").charged()
    await outbox.log(*charged.facts)
    outbox.pause()
    await outbox.log(*charged.refunded().facts[2:], statuses=ALL)
    assert outbox.states() == ["due", "due"]
    assert (outbox.lanes(), outbox.paused()) == ([(A, True, None)], 1)


async def test_what_backfill_adds_is_late_until_a_success_comes(outbox: Outbox) -> None:
    await outbox.log(*of(A, "a").declined().facts, *of(B, "b").declined().facts)
    outbox.connection.execute("DELETE FROM callback_deliveries")
    outbox.connection.execute("DELETE FROM callback_lanes")
    async with await outbox.database.connect("backfill") as own:
        assert await backfill(own, CallbacksProjection(ALL), 1) == (2, [])
    assert {failing for _, failing, _ in outbox.lanes()} == {True}
    await outbox.log(*of(A, "c").charged().facts)
    assert set(outbox.lanes()) == {(A, False, None), (B, True, None)}


async def test_it_tells_when_a_batch_is_committed(outbox: Outbox) -> None:
    told: list[int] = []
    follower = Follower(
        outbox.database.connect,
        CallbacksProjection(ALL),
        Telemetry(),
        applied=lambda: told.append(len(outbox.rows("event_id"))),
    )
    append(outbox.connection, of(A, "a").charged().facts)
    await follower.run_once()
    await follower.run_once()
    await follower.close()
    assert told == [1]


class TestActions:
    """ACTION_REQUIRED: asked for, in order, and given up once it means nothing any more."""

    async def test_it_has_no_row_unless_it_is_wanted(self, outbox: Outbox) -> None:
        await outbox.log(*of(A, "a").action_required().facts, statuses=ALL)
        assert outbox.rows("event_id") == []
        assert outbox.lanes() == []

    async def test_it_is_sent_as_any_other(self, outbox: Outbox) -> None:
        history = of(A, "a").action_required()
        await outbox.log(*history.facts, statuses=ACTIONS)
        async with await outbox.database.connect("a") as own:
            (claimed,) = await claim_some(own)
        assert claimed.status == "ACTION_REQUIRED"
        assert (claimed.payment_id, claimed.sequence, claimed.amount_cents) == (history.id, 2, 1500)
        (shown,) = await deliveries_of_payment(outbox.database, history.id)
        assert (shown.status, shown.state) == ("ACTION_REQUIRED", "due")

    @pytest.mark.parametrize("outcome", ["charged", "declined", "abandoned"])
    @pytest.mark.parametrize("wanted", [ACTIONS, ("ACTION_REQUIRED",)])
    async def test_a_later_outcome_of_the_payment_supersedes_it(
        self, outbox: Outbox, outcome: str, wanted: tuple[str, ...]
    ) -> None:
        """Also one that is not wanted, and nothing of another payment of the order."""
        history = of(A, "a").action_required()
        await outbox.log(*history.facts, *of(A, "b").action_required().facts, statuses=wanted)
        outbox.pause()
        ended = getattr(history, outcome)()
        await outbox.log(ended.facts[2], statuses=wanted)
        states = dict(outbox.rows("sequence::text || payment_id", "state"))
        assert states[f"2{history.id}"] == "superseded"
        assert states[f"3{history.id}"] == ("due" if wanted == ACTIONS else "excluded")
        of_other = "superseded" if outcome == "charged" else "due"  # the order is paid
        assert states[f"2{of(A, 'b').id}"] == of_other

    async def test_a_success_does_not_wait_for_its_pause(self, outbox: Outbox) -> None:
        history = of(A, "a").action_required()
        await outbox.log(*history.facts, statuses=ACTIONS)
        outbox.pause()
        await outbox.log(history.charged().facts[2], statuses=ACTIONS)
        async with await outbox.database.connect("a") as own:
            assert [each.status for each in await claim_some(own)] == ["SUCCESS"]

    async def test_one_in_flight_is_given_up_when_it_comes_back(self, outbox: Outbox) -> None:
        history = of(A, "a").action_required()
        await outbox.log(*history.facts, statuses=ACTIONS)
        async with await outbox.database.connect("a") as own:
            (claimed,) = await claim_some(own, lease_s=10)
            await outbox.log(history.charged().facts[2], statuses=ACTIONS)
            assert outbox.states() == ["due", "due"]
            assert await claim_some(own) == []
            await record(own, [result_of(claimed, "due")])
            assert outbox.states() == ["superseded", "due"]
            assert [each.status for each in await claim_some(own)] == ["SUCCESS"]

    async def test_it_makes_no_order_paid_or_unpaid(self, outbox: Outbox) -> None:
        """Neither for the FAILED of another payment, nor beside the payment's own SUCCESS."""
        await outbox.log(*of(A, "a").action_required().facts, statuses=ACTIONS)
        await outbox.log(*of(A, "b").declined().facts, statuses=ACTIONS)
        assert outbox.rows("coalesce(status, '')", "state") == [("", "due"), ("FAILED", "due")]
        await outbox.log(*of(B, "c").action_required().charged().facts, statuses=ACTIONS)
        await outbox.log(*of(B, "d").declined().facts, statuses=ACTIONS)
        assert outbox.states()[2:] == ["superseded", "due", "superseded"]

    async def test_redriving_since_a_time_leaves_it_out(self, outbox: Outbox) -> None:
        history = of(A, "a").action_required()
        await outbox.log(*history.facts, *of(B, "b").declined().facts, statuses=ACTIONS)
        outbox.finish("delivered")
        for failed in (False, True):
            async with await outbox.database.connect("a") as own:
                found = await ids_since(own, history.facts[0].occurred_at, failed=failed)
            assert found == outbox.events()[1:] * failed

    async def test_one_that_is_redriven_too_late_is_given_up(self, outbox: Outbox) -> None:
        history = of(A, "a").action_required()
        await outbox.log(*history.facts, statuses=ACTIONS)
        outbox.finish("dead")
        await outbox.log(history.declined().facts[2], statuses=ACTIONS)
        async with await outbox.database.connect("a") as own:
            await redrive(own, outbox.events()[:1])
            outbox.make_all_due()
            assert [each.status for each in await claim_some(own)] == ["FAILED"]
        assert outbox.states() == ["superseded", "due"]

    async def test_the_version_before_takes_it_for_no_capture(self, outbox: Outbox) -> None:
        """As that one asks which payments of an order stand: a SUCCESS beside it does."""
        history = of(A, "a").action_required()
        await outbox.log(*history.facts, statuses=ACTIONS)
        assert await standing(outbox) == []
        await outbox.log(history.charged().facts[2], statuses=ACTIONS)
        assert await standing(outbox) == [history.id]


async def standing(outbox: Outbox) -> list[uuid.UUID]:
    """By a part of what migrations up to 0021, and the version before, ask."""
    query = (
        "SELECT payment_id FROM callback_deliveries WHERE order_id = %s AND status <> 'FAILED'"
        " GROUP BY payment_id HAVING bool_and(status = 'SUCCESS')"
    )
    return [payment_id for (payment_id,) in outbox.connection.execute(query, [A])]
