"""The outbox: claims, results, sending again and pruning."""

import asyncio
import uuid
from datetime import timedelta

import pytest

from payments.callbacks import dispatcher as dispatching
from payments.callbacks.dispatcher import FAILING_MAX, _released
from payments.callbacks.outbox import claim, make_due, prune, record, redrive
from payments.projections.callbacks import CallbacksProjection, backfill
from tests.callbacks.conftest import (
    PlayedEndpoint,
    answered,
    dispatching_to,
)
from tests.callbacks.outbox import SENT, Outbox, charges, claim_some, of, result_of
from tests.support import append, until

pytestmark = [pytest.mark.anyio, pytest.mark.usefixtures("looks_often")]

A, B = uuid.uuid4(), uuid.uuid4()


async def test_a_late_result_waits_for_a_claim_that_is_being_made(outbox: Outbox) -> None:
    await outbox.log(*of(A, "a").charged().facts)
    async with await outbox.database.connect("a") as one, await outbox.database.connect("b") as two:
        (old,) = await claim_some(one, lease_s=0)
        async with two.transaction():
            assert await claim_some(two, lease_s=10)
            late = asyncio.create_task(record(one, [result_of(old, "delivered")]))
            await asyncio.sleep(0.2)
            assert not late.done()
        assert await late == set()
    assert outbox.states() == ["due"]


async def test_what_was_released_is_as_it_was_before_its_claim(outbox: Outbox) -> None:
    await outbox.log(*of(A, "a").charged().facts)
    lane = "SELECT failing, in_flight, next_at > now() + interval '59 min' FROM callback_lanes"
    async with await outbox.database.connect("a") as own:
        for later in (False, True):
            if later:
                outbox.pause(failing=False)
            (claimed,) = await claim_some(own, lease_s=10, probing=later)
            released = _released(claimed, max(0.0, claimed.due_in_s))
            assert await record(own, [released]) == {claimed.claim}
            assert outbox.connection.execute(lane).fetchall() == [(False, None, later)]
    assert outbox.rows("state", "attempts") == [("due", 0)]
    assert outbox.attempts() == []


async def test_a_failed_that_comes_back_when_a_success_waits_frees_its_lane_at_once(
    outbox: Outbox,
) -> None:
    await outbox.log(*of(A, "a").declined().facts)
    async with await outbox.database.connect("a") as own:
        (claimed,) = await claim_some(own, lease_s=10)
        await outbox.log(*of(A, "b").charged().facts)
        await record(
            own,
            [result_of(claimed, "due")._replace(delay_s=3600.0, outcome="http_error", status=500)],
        )
        assert outbox.states() == ["superseded", "due"]
        assert outbox.lanes() == [(A, False, None)]
        assert [c.status for c in await claim_some(own)] == ["SUCCESS"]


async def test_a_refund_alone_on_record_supersedes_nothing(outbox: Outbox) -> None:
    """Its SUCCESS was before the outbox, and the read model does not know it."""
    charged = of(A, "a").charged()
    await outbox.log(*charged.facts)
    outbox.connection.execute("DELETE FROM callback_deliveries")
    refund = charged.refunded().facts[2:]
    await outbox.log(*refund)
    await outbox.log(*of(A, "b").declined().facts)
    assert outbox.rows("status", "state") == [("REFUNDED", "excluded"), ("FAILED", "due")]


async def test_a_success_that_is_not_wanted_supersedes_what_waits_at_once(outbox: Outbox) -> None:
    await outbox.log(*of(A, "a").declined().facts, statuses=("FAILED",))
    await outbox.log(*of(A, "b").charged().facts, statuses=("FAILED",))
    assert outbox.states() == ["superseded", "excluded"]


async def test_backfill_leaves_to_the_follower_what_is_its_own(outbox: Outbox) -> None:
    await outbox.log(*of(A, "a").charged().facts)
    append(outbox.connection, of(B, "b").charged().facts)
    async with await outbox.database.connect("b") as own:
        assert (await backfill(own, CallbacksProjection(("SUCCESS",)), 1)).enqueued == 0
    assert outbox.rows("order_id") == [(A,)]


async def test_the_end_of_an_outage_makes_nothing_due_that_never_failed(outbox: Outbox) -> None:
    await outbox.log(*of(A, "a").charged().facts)
    outbox.pause(failing=False)
    async with await outbox.database.connect("b") as own:
        assert await make_due(own, 60, 10) == 0
        outbox.pause()
        assert await make_due(own, 60, 10) == 1


async def test_after_an_outage_who_has_waited_longest_is_first(outbox: Outbox) -> None:
    for order_id in (A, B):
        await outbox.log(*charges([order_id]))
    outbox.pause()
    later = "UPDATE callback_lanes SET next_at = now() + interval '2 h' WHERE order_id = %s"
    outbox.connection.execute(later, [A])
    async with await outbox.database.connect("b") as own:
        assert await make_due(own, 60, 10) == 2
    assert outbox.turns() == [A, B]


async def test_the_end_of_an_outage_makes_due_what_failed_in_it_once_and_as_it_was_asked(
    outbox: Outbox,
) -> None:
    """The others failed before it, or by themselves, or may be running, or were asked to wait."""
    before, refused, busy, asked = (uuid.uuid4() for _ in range(4))
    await outbox.log(*charges([A, before, refused, busy, asked]))
    outbox.pause()
    for order_id, change in (
        (before, "away_at = now() - interval '61 s'"),
        (refused, "away_at = NULL"),
        (busy, "busy_until = now() + interval '20 s'"),
        (asked, "not_before = now() + interval '1 h'"),
    ):
        change = f"UPDATE callback_lanes SET {change} WHERE order_id = %s"
        outbox.connection.execute(change.encode(), [order_id])
    async with await outbox.database.connect("b") as own:
        assert await make_due(own, 60, 10) == 2
        waits = "SELECT order_id, next_at > now() + interval '19 s', excused FROM callback_lanes"
        found = {each[0]: each[1:] for each in outbox.connection.execute(waits)}
        assert found.pop(A) == (False, True)
        assert found.pop(busy) == (True, True)
        assert set(found.values()) == {(True, False)}
        assert outbox.paused() == 3
        # It fails once more, which does not count; another process sees the end of the same outage.
        (claimed,) = await claim_some(own, lease_s=10)
        assert (claimed.order_id, claimed.excused) == (A, True)
        failed = result_of(claimed, "due")._replace(outcome="timeout", delay_s=3600.0, away=True)
        assert await record(own, [failed]) == {claimed.claim}
        assert await make_due(own, 60, 10) == 0
        # But that of the next one does.
        long_ago = "UPDATE callback_lanes SET excused_at = now() - interval '1 min'"
        outbox.connection.execute(f"{long_ago} WHERE order_id = %s".encode(), [A])
        assert await make_due(own, 59, 10) == 1


async def test_an_outcome_that_is_not_wanted_waits_for_its_orders_lane(outbox: Outbox) -> None:
    await outbox.log(*of(A, "a").declined().facts, statuses=("FAILED",))
    append(outbox.connection, of(A, "b").charged().facts)
    async with await outbox.database.connect("a") as one:
        async with one.transaction():
            await one.execute("SELECT FROM callback_lanes FOR UPDATE")
            following = asyncio.create_task(outbox.follow(("FAILED",)))
            await asyncio.sleep(0.3)
            assert not following.done()
        await following
    assert outbox.states() == ["superseded", "excluded"]


async def test_redrive_leaves_what_is_final_and_the_time_of_what_is_due(outbox: Outbox) -> None:
    paid = of(A, "a").charged()
    await outbox.log(*paid.facts, *of(A, "b").declined().facts)
    await outbox.log(*paid.refunded().facts[2:], *of(B, "c").charged().facts)
    c = outbox.connection
    c.execute("UPDATE callback_deliveries SET due_since = now() - interval '1 d'")
    c.execute(
        "UPDATE callback_deliveries SET state = 'dead', finished_at = now() WHERE order_id = %s",
        [B],
    )
    events = outbox.events()
    async with await outbox.database.connect("b") as own:
        assert set(await redrive(own, events)) == {events[0], events[3]}
    recent = "due_since > now() - interval '1 h'"
    assert outbox.rows("state", "finished_at IS NULL", recent) == [
        ("due", True, False),
        ("superseded", False, False),
        ("excluded", False, False),
        ("due", True, True),
    ]


async def test_what_was_finished_long_ago_is_pruned(
    outbox: Outbox, endpoint: PlayedEndpoint
) -> None:
    for number in range(4):
        await outbox.log(*of(uuid.uuid4(), str(number)).charged().facts)
    async with dispatching_to(endpoint, outbox):
        await until(lambda: set(outbox.states()) == {"delivered"})
    events = outbox.events()
    finish = (
        "UPDATE callback_deliveries SET state = %s, finished_at = now() - %s WHERE event_id = %s"
    )
    for event, state, days in zip(
        events, ("delivered", "dead", "superseded", "delivered"), (91, 91, 91, 89), strict=True
    ):
        outbox.connection.execute(finish, [state, timedelta(days=days), event])
    async with await outbox.database.connect("a") as own:
        assert await prune(own, 90, 1) == 1
        assert await prune(own, 90, 1000) == 1
    assert outbox.rows("event_id") == [(events[1],), (events[3],)]
    assert len(outbox.attempts()) == 2


async def test_it_prunes_by_itself(
    outbox: Outbox, endpoint: PlayedEndpoint, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(dispatching, "PRUNE_EVERY_S", 0.05)
    await outbox.log(*of(A, "a").charged().facts)
    async with dispatching_to(endpoint, outbox, retention_days=1):
        await until(lambda: outbox.states() == ["delivered"])
        outbox.connection.execute(
            "UPDATE callback_deliveries SET finished_at = now() - interval '25 h'"
        )
        await until(lambda: outbox.states() == [])


async def test_redriven_it_has_all_its_attempts_again(
    outbox: Outbox, endpoint: PlayedEndpoint
) -> None:
    await outbox.log(*of(A, "a").charged().facts)
    endpoint.answer = lambda _: answered(410)
    async with dispatching_to(endpoint, outbox):
        await until(lambda: outbox.states() == ["dead"])
        endpoint.answer = lambda _: answered(200)
        ((event,),) = outbox.rows("event_id")
        async with await outbox.database.connect("a") as own:
            assert await redrive(own, [event, uuid.uuid4()]) == [event]
        await until(lambda: outbox.states() == ["delivered"])
    assert outbox.rows("attempts") == [(1,)]
    assert outbox.attempts() == [("gone", 410), ("delivered", 200)]


async def test_a_probe_passes_over_lanes_with_nothing_to_send(outbox: Outbox) -> None:
    orders = sorted(uuid.uuid4() for _ in range(10))
    await outbox.log(*charges(orders))
    outbox.connection.execute(
        "UPDATE callback_deliveries SET state = 'delivered' WHERE order_id <> %s", [orders[-1]]
    )
    async with await outbox.database.connect("a") as own:
        assert [each.order_id for each in await claim_some(own, probing=True)] == [orders[-1]]
    assert [order for order, *_ in outbox.lanes()] == [orders[-1]]


async def test_probes_are_of_orders_that_never_failed_and_else_of_one_that_did(
    outbox: Outbox,
) -> None:
    failing, fresh = ([uuid.uuid4() for _ in range(3)] for _ in range(2))
    await outbox.log(*charges(failing))
    outbox.pause()
    await outbox.log(*charges(fresh))
    async with await outbox.database.connect("a") as own:
        claims = await claim(own, most=2, failing_max=0, lease_s=10, probing=True)
        assert [each.order_id for each in claims] == fresh[:2]
        probed = [await claim_some(own, lease_s=10, probing=True) for _ in range(4)]
        assert [each.order_id for each in probed[0]] == fresh[2:]
        assert {each.order_id for (each,) in probed[1:]} == set(failing)
        assert await claim_some(own, probing=True) == []


@pytest.mark.parametrize("column", ["busy_until", "not_before"])
async def test_a_probe_is_not_of_an_order_that_must_be_left_alone(
    outbox: Outbox, column: str
) -> None:
    await outbox.log(*charges([A, B]))
    outbox.pause()
    wait = f"UPDATE callback_lanes SET {column} = now() + interval '1 min' WHERE order_id = %s"
    outbox.connection.execute(wait.encode(), [A])
    async with await outbox.database.connect("a") as own:
        assert [each.order_id for each in await claim_some(own, probing=True)] == [B]
        assert await claim_some(own, probing=True) == []
        outbox.connection.execute(f"UPDATE callback_lanes SET {column} = now()".encode())
        assert [each.order_id for each in await claim_some(own, probing=True)] == [A]


async def test_what_is_backfilled_or_redriven_keeps_nothing_new_waiting(
    outbox: Outbox, endpoint: PlayedEndpoint
) -> None:
    """It takes the places of failing orders only."""
    late = [uuid.uuid4() for _ in range(2 * FAILING_MAX)]
    append(outbox.connection, charges(late))
    outbox.connection.execute(
        "UPDATE followers SET position = (SELECT max(notification_id) FROM payment_events)"
        " WHERE name = 'callbacks'"
    )
    async with await outbox.database.connect("a") as own:
        assert (await backfill(own, CallbacksProjection(SENT), 1)).enqueued == len(late)
        half = outbox.events()[:FAILING_MAX]
        outbox.connection.execute(
            "UPDATE callback_deliveries SET state = 'dead' WHERE event_id = ANY (%s)", [half]
        )
        outbox.connection.execute(
            "DELETE FROM callback_lanes l USING callback_deliveries d"
            " WHERE d.order_id = l.order_id AND d.state = 'dead'"
        )
        assert len(await redrive(own, half)) == FAILING_MAX
    assert {failing for _, failing, _ in outbox.lanes()} == {True}
    endpoint.held = asyncio.Event()
    async with dispatching_to(endpoint, outbox):
        await until(lambda: len(endpoint.under_way) == FAILING_MAX)
        await outbox.log(*of(A, "new").charged().facts)
        await until(lambda: str(A) in endpoint.under_way)
        endpoint.held.set()
        await until(lambda: set(outbox.states()) == {"delivered"})


@pytest.mark.parametrize("state", ["dead", "delivered"])
async def test_a_failed_of_a_paid_order_is_not_redriven(outbox: Outbox, state: str) -> None:
    for history in (of(A, "a").declined(), of(A, "b").charged()):
        await outbox.log(*history.facts)
        outbox.finish(state)
    failed, _ = outbox.events()
    async with await outbox.database.connect("a") as own:
        assert await redrive(own, [failed]) == []
    assert outbox.states() == [state, state]
    assert outbox.lanes() == []
