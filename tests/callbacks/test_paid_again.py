"""An order whose money went back whole is charged again: it is told of a FAILED like any other."""

import uuid
from itertools import product

import pytest

from payments.callbacks.outbox import prune, record, redrive
from payments.projections.callbacks import CallbacksProjection, backfill
from tests.callbacks.conftest import PlayedEndpoint, dispatching_to
from tests.callbacks.outbox import ALL, SENT, Outbox, claim_some, of, result_of
from tests.support import follow, until

pytestmark = [pytest.mark.anyio, pytest.mark.usefixtures("looks_often")]

A, B = uuid.uuid4(), uuid.uuid4()


def is_paid(outbox: Outbox, *orders: uuid.UUID) -> set[uuid.UUID]:
    row = outbox.connection.execute("SELECT paid_orders(%s)", [list(orders)]).fetchone()
    assert row is not None
    return set(row[0])


def set_status(outbox: Outbox, payment_id: uuid.UUID, status: str, order_id: uuid.UUID = A) -> None:
    """As the read model has it."""
    outbox.connection.execute(
        "INSERT INTO payments (id, merchant_order_id, status) VALUES (%s, %s, %s)"
        " ON CONFLICT (id) DO UPDATE SET status = excluded.status",
        [payment_id, order_id, status],
    )


@pytest.mark.parametrize("failing", ["declined", "abandoned"])
async def test_a_second_charge_that_fails_after_a_whole_refund_is_told(
    outbox: Outbox, endpoint: PlayedEndpoint, failing: str
) -> None:
    async with dispatching_to(endpoint, outbox):
        first = of(A, "first").charged()
        await outbox.log(*first.facts)
        await follow(outbox.database)
        await until(lambda: outbox.states() == ["delivered"])
        await outbox.log(*first.refunded().facts[2:])
        await follow(outbox.database)
        second = of(A, "second")
        await outbox.log(*second.facts)  # the charge is answered 202
        await outbox.log(getattr(second, failing)().facts[-1])
        await follow(outbox.database)
        await until(lambda: outbox.states() == ["delivered", "excluded", "delivered"])
    assert endpoint.told(A) == ["SUCCESS", "FAILED"]
    assert endpoint.bodies[-1]["payment_id"] == str(second.id)


# What becomes of the FAILED, by what comes after what: the SUCCESS and the REFUNDED of one payment,
# the FAILED of another.
ARRIVALS: dict[tuple[str, ...], str] = {
    ("SUCCESS", "REFUNDED", "FAILED"): "due",
    ("SUCCESS", "FAILED", "REFUNDED"): "superseded",
    ("FAILED", "SUCCESS", "REFUNDED"): "superseded",
}


@pytest.mark.parametrize("statuses", [SENT, ALL, ("FAILED",)], ids="+".join)
@pytest.mark.parametrize("arrival", ARRIVALS, ids=" ".join)
async def test_it_is_superseded_if_there_was_money_while_it_waited(
    outbox: Outbox, arrival: tuple[str, ...], statuses: tuple[str, ...]
) -> None:
    paid = of(A, "paid").charged().refunded()
    facts = {"SUCCESS": paid.facts[:2], "REFUNDED": paid.facts[2:]}
    facts["FAILED"] = of(A, "failed").declined().facts
    for status in arrival:
        await outbox.log(*facts[status], statuses=statuses)
    assert dict(outbox.rows("status", "state"))["FAILED"] == ARRIVALS[arrival]
    async with await outbox.database.connect("a") as own:  # superseded is final
        await claim_some(own, lease_s=10)
        await redrive(own, outbox.events())
    assert dict(outbox.rows("status", "state"))["FAILED"] == ARRIVALS[arrival]


@pytest.mark.parametrize("arrival", ARRIVALS, ids=" ".join)
async def test_what_is_written_together_is_judged_by_what_it_comes_to(
    outbox: Outbox, arrival: tuple[str, ...]
) -> None:
    paid = of(A, "paid").charged().refunded()
    facts = {"SUCCESS": paid.facts[:2], "REFUNDED": paid.facts[2:]}
    facts["FAILED"] = of(A, "failed").declined().facts
    await outbox.log(*(fact for status in arrival for fact in facts[status]))
    states = dict(outbox.rows("status", "state"))
    assert states == {"SUCCESS": "due", "REFUNDED": "excluded", "FAILED": "due"}


KNOWN = [(), ("SUCCESS",), ("REFUNDED",), ("SUCCESS", "REFUNDED")]
STATUSES = [None, "PENDING", "FAILED", "SUCCESS", "REFUNDED"]


@pytest.mark.parametrize("in_outbox", KNOWN, ids=lambda known: "+".join(known) or "nothing")
async def test_of_a_lagging_follower_and_a_pruned_outbox_each_knows_what_the_other_does_not(
    outbox: Outbox, in_outbox: tuple[str, ...]
) -> None:
    """Money stands if either has the SUCCESS, and neither the REFUNDED."""
    paid = of(A, "paid").charged().refunded()
    await outbox.log(*paid.facts)
    outbox.connection.execute(
        "DELETE FROM callback_deliveries WHERE status <> ALL (%s)", [list(in_outbox)]
    )
    for status in STATUSES:
        if status is not None:
            set_status(outbox, paid.id, status)
        known = {*in_outbox, status}
        stands = "SUCCESS" in known and "REFUNDED" not in known
        assert is_paid(outbox, A, B) == ({A} if stands else set()), status


async def test_of_several_payments_one_that_stands_is_enough(outbox: Outbox) -> None:
    paid: set[uuid.UUID] = set()
    unpaid: set[uuid.UUID] = set()
    for pair in product(STATUSES, repeat=2):
        order_id = uuid.uuid4()
        (paid if "SUCCESS" in pair else unpaid).add(order_id)
        for status in pair:
            if status is not None:
                set_status(outbox, uuid.uuid4(), status, order_id)
    assert is_paid(outbox, *paid, *unpaid) == paid


async def test_of_two_payments_that_were_captured_both_must_have_gone_back(outbox: Outbox) -> None:
    one, other = of(A, "one").charged(), of(A, "other").charged()
    await outbox.log(*one.facts, *other.facts)
    await outbox.log(*one.refunded().facts[2:])
    await outbox.log(*of(A, "third").declined().facts)
    await outbox.log(*other.refunded().facts[2:])
    await outbox.log(*of(A, "fourth").declined().facts)
    failed = [state for status, state in outbox.rows("status", "state") if status == "FAILED"]
    assert failed == ["superseded", "due"]


async def test_a_part_that_went_back_leaves_the_order_paid(outbox: Outbox) -> None:
    paid = of(A, "paid").charged().refunded("r", 500)
    await outbox.log(*paid.facts)
    await follow(outbox.database)
    await outbox.log(*of(A, "second").declined().facts)
    assert outbox.rows("status", "state") == [("SUCCESS", "due"), ("FAILED", "superseded")]
    await outbox.log(*paid.refunded().facts[4:])
    await outbox.log(*of(A, "third").declined().facts)
    assert outbox.states() == ["due", "superseded", "excluded", "due"]


async def test_a_refund_outlives_its_row(outbox: Outbox) -> None:
    """The SUCCESS is dead and stays on record, the REFUNDED was forgotten."""
    await outbox.log(*of(A, "paid").charged().refunded().facts)
    await follow(outbox.database)
    outbox.finish("dead", days_ago=99)
    outbox.connection.execute(
        "UPDATE callback_deliveries SET state = 'excluded' WHERE status = 'REFUNDED'"
    )
    async with await outbox.database.connect("a") as own:
        assert await prune(own, 90, 10) == 1
    await outbox.log(*of(A, "second").declined().facts)
    assert outbox.rows("status", "state") == [("SUCCESS", "dead"), ("FAILED", "due")]


async def test_a_failed_is_redriven_once_its_orders_money_went_back(outbox: Outbox) -> None:
    await outbox.log(*of(A, "first").declined().facts)
    outbox.finish("dead")
    paid = of(A, "second").charged()
    await outbox.log(*paid.facts)
    failed = outbox.events()[0]
    async with await outbox.database.connect("a") as own:
        assert await redrive(own, [failed]) == []
        await outbox.log(*paid.refunded().facts[2:])
        assert await redrive(own, [failed]) == [failed]


async def test_a_failed_that_is_under_way_while_money_comes_and_goes_is_tried_again(
    outbox: Outbox,
) -> None:
    await outbox.log(*of(A, "first").declined().facts)
    paid = of(A, "second").charged()
    async with await outbox.database.connect("a") as own:
        (claimed,) = await claim_some(own, lease_s=10)
        await outbox.log(*paid.facts)
        await outbox.log(*paid.refunded().facts[2:])
        failure = result_of(claimed, "due")._replace(outcome="http_error", status=500)
        assert await record(own, [failure]) == {claimed.claim}
        assert [each.event_id for each in await claim_some(own)] == [claimed.event_id]
    assert outbox.states() == ["due", "due", "excluded"]


@pytest.mark.parametrize("late", [False, True], ids=["followed", "backfilled"])
async def test_money_that_is_gone_ends_nobodys_pause(outbox: Outbox, late: bool) -> None:
    """A FAILED that is tried again waits for its time, whatever went back meanwhile."""
    await outbox.log(*of(A, "first").declined().facts)
    outbox.pause()
    paid = of(A, "second").charged().refunded()
    await outbox.log(*paid.facts)
    if late:
        async with await outbox.database.connect("b") as own:
            assert await backfill(own, CallbacksProjection(SENT), 1) == (0, [])
    assert (outbox.lanes(), outbox.paused()) == ([(A, True, None)], 1)


async def test_a_refund_ends_no_pause_of_a_failed(outbox: Outbox) -> None:
    paid = of(A, "paid").charged()
    await outbox.log(*paid.facts)
    outbox.connection.execute("DELETE FROM callback_deliveries")  # long ago
    await outbox.log(*of(A, "second").declined().facts)
    outbox.pause()
    await outbox.log(*paid.refunded().facts[2:])
    assert outbox.rows("status", "state") == [("FAILED", "due"), ("REFUNDED", "excluded")]
    assert (outbox.lanes(), outbox.paused()) == ([(A, True, None)], 1)


async def test_a_success_ends_no_pause_of_another_that_is_before_it(outbox: Outbox) -> None:
    """The FAILED that it supersedes has not had its turn yet."""
    await outbox.log(*of(A, "first").charged().refunded().facts, *of(A, "second").declined().facts)
    outbox.pause()
    await outbox.log(*of(A, "third").charged().facts)
    assert outbox.states() == ["due", "excluded", "superseded", "due"]
    assert (outbox.lanes(), outbox.paused()) == ([(A, True, None)], 1)


async def test_a_success_finds_a_lane_of_which_nothing_is_due(outbox: Outbox) -> None:
    outbox.connection.execute(
        "INSERT INTO callback_lanes (order_id, failing) VALUES (%s, true)", [A]
    )
    await outbox.log(*of(A, "paid").charged().facts)
    assert outbox.states() == ["due"]


async def test_orders_are_judged_one_by_one(outbox: Outbox) -> None:
    """One's refund is not the other's."""
    gone, kept = of(A, "gone").charged().refunded(), of(B, "kept").charged()
    await outbox.log(*gone.facts, *kept.facts)
    await outbox.log(*of(A, "a").declined().facts, *of(B, "b").declined().facts)
    failed = {
        order_id: state
        for order_id, status, state in outbox.rows("order_id", "status", "state")
        if status == "FAILED"
    }
    assert failed == {A: "due", B: "superseded"}


class TestRefunded:
    """A REFUNDED of one payment is not told while another of the order stands: to many receivers
    whatever is no SUCCESS means that the order failed."""

    async def test_of_an_order_paid_twice_only_the_last_refund_is_told(
        self, outbox: Outbox, endpoint: PlayedEndpoint
    ) -> None:
        one, other = of(A, "one").charged(), of(A, "other").charged()
        async with dispatching_to(endpoint, outbox):
            await outbox.log(*one.facts, *other.facts, statuses=ALL)
            await until(lambda: outbox.states() == ["delivered"] * 2)
            await outbox.log(*other.refunded().facts[2:], statuses=ALL)
            await outbox.log(*one.refunded().facts[2:], statuses=ALL)
            await until(lambda: outbox.states()[3] == "delivered")
        assert outbox.states()[2] == "superseded"
        assert endpoint.told(A) == ["SUCCESS", "SUCCESS", "REFUNDED"]
        assert endpoint.bodies[-1]["payment_id"] == str(one.id)

    async def test_a_refund_of_the_only_payment_is_told(self, outbox: Outbox) -> None:
        await outbox.log(*of(A, "paid").charged().refunded().facts, statuses=ALL)
        await outbox.log(*of(A, "declined").declined().facts, statuses=ALL)
        assert outbox.states() == ["due", "due", "due"]

    async def test_one_that_waits_is_overtaken_by_the_next_payment_at_once(
        self, outbox: Outbox
    ) -> None:
        await outbox.log(*of(A, "first").charged().facts)
        outbox.finish("delivered")
        first = of(A, "first").charged().refunded()
        await outbox.log(*first.facts[2:], statuses=ALL)
        outbox.pause()
        await outbox.log(*of(A, "second").charged().facts, statuses=ALL)
        assert outbox.states() == ["delivered", "superseded", "due"]
        assert (outbox.lanes(), outbox.paused()) == ([(A, False, None)], 0)

    async def test_it_is_asked_again_when_it_is_claimed(
        self, outbox: Outbox, endpoint: PlayedEndpoint
    ) -> None:
        """The read model alone knows the other payment."""
        await outbox.log(*of(A, "paid").charged().facts)
        outbox.finish("delivered")
        await outbox.log(*of(A, "paid").charged().refunded().facts[2:], statuses=ALL)
        set_status(outbox, uuid.uuid4(), "SUCCESS")
        async with dispatching_to(endpoint, outbox):
            await until(lambda: outbox.states()[-1] == "superseded")
        assert endpoint.bodies == []

    async def test_it_is_asked_again_when_it_comes_back(self, outbox: Outbox) -> None:
        paid = of(A, "paid").charged().refunded()
        await outbox.log(*paid.facts[:2])
        outbox.finish("delivered")
        await outbox.log(*paid.facts[2:], statuses=ALL)
        async with await outbox.database.connect("a") as own:
            (claimed,) = await claim_some(own, lease_s=10)
            await outbox.log(*of(A, "second").charged().facts, statuses=ALL)
            assert outbox.states()[1:] == ["due", "due"]
            failure = result_of(claimed, "due")._replace(outcome="http_error", delay_s=3600.0)
            await record(own, [failure])
            assert outbox.states()[1:] == ["superseded", "due"]
            assert [each.status for each in await claim_some(own)] == ["SUCCESS"]

    @pytest.mark.parametrize("state", ["dead", "delivered"])
    async def test_it_is_not_redriven(self, outbox: Outbox, state: str) -> None:
        await outbox.log(*of(A, "first").charged().refunded().facts, statuses=ALL)
        outbox.finish(state)
        await outbox.log(*of(A, "second").charged().facts, statuses=ALL)
        async with await outbox.database.connect("a") as own:
            assert await redrive(own, outbox.events()[1:2]) == []
        assert outbox.states() == [state, state, "due"]
