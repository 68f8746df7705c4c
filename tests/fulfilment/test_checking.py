"""What readings of an order's status make of the payments that were captured for it."""

import asyncio
import uuid
from collections.abc import Callable
from uuid import UUID

import pytest

from payments.fulfilment import table
from payments.fulfilment.checking import CONCURRENCY_MAX, Checking
from payments.fulfilment.table import AGAIN_S, CONFIRMED_AFTER_S
from payments.order_service.responses import Reading
from tests.fulfilment.conftest import CONFIRMED, FAILED, MISSING, PENDING, Suspects
from tests.support import History, append, follow, until

pytestmark = pytest.mark.anyio


class GivesBack:
    def __init__(self, does: bool = True) -> None:
        self.does = does
        self.asked: list[UUID] = []

    async def __call__(self, payment_id: UUID) -> bool:
        self.asked.append(payment_id)
        return self.does


async def test_a_confirmed_order_is_no_suspect_any_more(suspects: Suspects) -> None:
    await suspects.paid_suspect()
    assert await suspects.read(CONFIRMED) == 1
    assert suspects.rows() == {}


async def test_a_failed_order_is_unfulfilled_and_asked_about_again(suspects: Suspects) -> None:
    payment_id = await suspects.paid_suspect()
    await suspects.read(FAILED)
    row = suspects.rows()[payment_id]
    assert row[:5] == ("unfulfilled", "already_processed", "FAILED", None, 1)
    assert CONFIRMED_AFTER_S - 30 < row.due_in_s <= CONFIRMED_AFTER_S
    assert await suspects.read(FAILED) == 0, "not before its time"
    suspects.pass_time(CONFIRMED_AFTER_S)
    assert await suspects.read(FAILED) == 1
    row = suspects.rows()[payment_id]
    assert row.attempts == 2
    assert row.failed_s is not None
    assert row.failed_s >= CONFIRMED_AFTER_S
    assert AGAIN_S - 30 < row.due_in_s <= AGAIN_S


async def test_an_order_that_recovers_is_no_suspect_any_more(suspects: Suspects) -> None:
    await suspects.paid_suspect()
    await suspects.read(FAILED)
    suspects.pass_time(CONFIRMED_AFTER_S)
    await suspects.read(CONFIRMED)
    assert suspects.rows() == {}


async def test_what_is_not_known_is_asked_again_and_again(suspects: Suspects) -> None:
    payment_id = await suspects.paid_suspect()
    pauses_s = []
    for _ in range(13):
        await suspects.read(MISSING)
        row = suspects.rows()[payment_id]
        assert row[:4] == ("suspect", "already_processed", None, "404")
        pauses_s.append(row.due_in_s)
        suspects.pass_time(row.due_in_s + 1)
    assert pauses_s[:4] == pytest.approx([2, 4, 8, 16], abs=1.9)
    assert pauses_s[-1] == pytest.approx(3600, abs=30)
    await suspects.read(PENDING)
    assert suspects.rows()[payment_id][:4] == ("suspect", "already_processed", "PENDING", None)


async def test_who_tells_nothing_interrupts_the_series_and_not_what_is_known(
    suspects: Suspects,
) -> None:
    payment_id = await suspects.paid_suspect()
    await suspects.read(FAILED)
    suspects.pass_time(CONFIRMED_AFTER_S)
    await suspects.read(MISSING)
    row = suspects.rows()[payment_id]
    assert row[:4] == ("unfulfilled", "already_processed", "FAILED", "404")
    assert row.failed_s is None
    suspects.pass_time(60)
    await suspects.read(PENDING)
    row = suspects.rows()[payment_id]
    assert row[:4] == ("suspect", "already_processed", "PENDING", None)


async def test_money_is_given_back_at_the_second_reading_of_an_unbroken_series(
    suspects: Suspects,
) -> None:
    payment_id = await suspects.paid_suspect()
    give_back = GivesBack()
    for reading in (FAILED, MISSING, FAILED, PENDING, FAILED):
        await suspects.read(reading, give_back)
        suspects.pass_time(CONFIRMED_AFTER_S + 1)
    assert give_back.asked == []
    await suspects.read(FAILED, give_back)
    assert give_back.asked == [payment_id]
    assert suspects.state(payment_id) == "given_back"
    suspects.pass_time(10 * AGAIN_S)
    assert await suspects.read(FAILED, give_back) == 0
    assert give_back.asked == [payment_id]


async def test_a_reading_that_comes_early_does_not_count(suspects: Suspects) -> None:
    payment_id = await suspects.paid_suspect()
    give_back = GivesBack()
    await suspects.read(FAILED, give_back)
    suspects.pass_time(CONFIRMED_AFTER_S - 60)
    suspects.connection.execute("UPDATE fulfilments SET next_at = now()")
    assert await suspects.read(FAILED, give_back) == 1
    assert give_back.asked == []
    assert suspects.rows()[payment_id].due_in_s <= 60


async def test_who_could_not_give_back_is_asked_again(suspects: Suspects) -> None:
    payment_id = await suspects.paid_suspect()
    give_back = GivesBack(does=False)
    for _ in range(3):
        await suspects.read(FAILED, give_back)
        suspects.pass_time(AGAIN_S + 1)
    assert give_back.asked == [payment_id] * 2
    assert suspects.state(payment_id) == "unfulfilled"

    async def break_down(_: UUID) -> bool:
        raise RuntimeError("a defect")

    await suspects.read(FAILED, break_down)
    assert suspects.state(payment_id) == "unfulfilled"
    assert suspects.connection.execute("SELECT claim FROM fulfilments").fetchall() == [(None,)]


@pytest.mark.parametrize("suspected", [[0, 1], [1], [0], [1, 0]])
async def test_of_two_payments_of_a_confirmed_order_the_second_is_paid_twice(
    suspects: Suspects, suspected: list[int]
) -> None:
    """Whichever of them is suspected, and judged first."""
    order_id = uuid.uuid4()
    payments = await suspects.paid(order_id, 2)
    give_back = GivesBack()
    for each in suspected:
        suspects.suspect(order_id, [payments[each]])
        await suspects.read(CONFIRMED, give_back)
    while await suspects.read(CONFIRMED, give_back):
        pass
    assert {id: row.state for id, row in suspects.rows().items()} == {payments[1]: "paid_twice"}
    for _ in range(3):
        suspects.pass_time(AGAIN_S + 1)
        assert await suspects.read(CONFIRMED, give_back) == 1
    assert suspects.state(payments[1]) == "paid_twice"
    assert give_back.asked == []


@pytest.mark.parametrize("suspected", [0, 1])
async def test_the_first_capture_counts_and_not_the_first_request(
    suspects: Suspects, suspected: int
) -> None:
    order_id = uuid.uuid4()
    # What was captured last has the lowest id, and was begun first.
    made = sorted((History(str(uuid.uuid4()), order_id=order_id) for _ in range(2)), key=_id)
    append(suspects.connection, [fact for each in made for fact in each.facts])
    for each in reversed(made):
        append(suspects.connection, each.charged().facts[-1:])
    await follow(suspects.database)
    suspects.suspect(order_id, [made[suspected].id])
    while await suspects.read(CONFIRMED):
        pass
    assert {id: row.state for id, row in suspects.rows().items()} == {made[0].id: "paid_twice"}


def _id(history: History) -> UUID:
    return history.id


@pytest.mark.parametrize("first", [0, 1])
async def test_a_payment_that_is_only_in_the_outbox_counts(suspects: Suspects, first: int) -> None:
    """The follower of `payments` is behind: it has one of the two."""
    order_id = uuid.uuid4()
    payments = await suspects.paid(order_id, 2)
    behind = payments[1 - first]
    suspects.connection.execute(
        "INSERT INTO callback_deliveries (event_id, position, order_id, payment_id, sequence,"
        " status, amount_cents, currency, occurred_at, state) VALUES (gen_random_uuid(), 1, %s,"
        " %s, 2, 'SUCCESS', 1500, 'INR', now(), 'delivered')",
        [order_id, behind],
    )
    suspects.connection.execute("DELETE FROM payments WHERE id = %s", [behind])
    suspects.suspect(order_id, [payments[first]])
    while await suspects.read(CONFIRMED):
        pass
    assert {id: row.state for id, row in suspects.rows().items()} == {payments[1]: "paid_twice"}


async def test_all_payments_of_a_failed_order_are_unfulfilled(suspects: Suspects) -> None:
    """Also the one whose callback was answered with CONFIRMED, before the order failed."""
    order_id = uuid.uuid4()
    payments = await suspects.paid(order_id, 2)
    suspects.suspect(order_id, payments[1:])
    while await suspects.read(FAILED):
        pass
    rows = suspects.rows()
    assert {id: row.state for id, row in rows.items()} == dict.fromkeys(payments, "unfulfilled")
    assert rows[payments[0]].said == "not_asked"


async def test_a_payment_that_no_read_model_knows_stays(suspects: Suspects) -> None:
    order_id = uuid.uuid4()
    (payment_id,) = await suspects.paid(order_id, followed=False)
    suspects.suspect(order_id, [payment_id])
    await suspects.read(CONFIRMED)
    assert suspects.rows()[payment_id][:4] == (
        "suspect",
        "already_processed",
        None,
        "payment is not known",
    )
    await follow(suspects.database)
    suspects.pass_time(60)
    await suspects.read(CONFIRMED)
    assert suspects.rows() == {}


@pytest.mark.parametrize("reading", [CONFIRMED, FAILED])
async def test_what_was_refunded_is_no_suspect_any_more(
    suspects: Suspects, reading: Reading
) -> None:
    order_id = uuid.uuid4()
    whole, part = (History(key, order_id=order_id).charged() for key in ("whole", "part"))
    append(suspects.connection, [*part.refunded("r1", 500).facts, *whole.refunded().facts])
    await follow(suspects.database)
    suspects.suspect(order_id, [whole.id, part.id])
    await suspects.read(reading)
    left = {part.id} if reading is FAILED else set()
    assert set(suspects.rows()) == left


async def test_who_was_refunded_goes_without_being_asked_about(suspects: Suspects) -> None:
    """Without ORDER_STATUS_URL, and before its next reading."""
    order_id = uuid.uuid4()
    refunded = History("refunded", order_id=order_id).charged().refunded()
    append(suspects.connection, refunded.facts)
    paid = await suspects.paid(order_id)
    suspects.suspect(order_id, [refunded.id, *paid])
    given_back = History("given back").charged().refunded()
    append(suspects.connection, given_back.facts)
    suspects.suspect(order_id, [given_back.id])
    suspects.connection.execute(
        "UPDATE fulfilments SET state = 'given_back', given_back_at = now() WHERE payment_id = %s",
        [given_back.id],
    )
    await follow(suspects.database)
    checking = Checking(suspects.database, None, 90)
    await checking.start()
    await until(lambda: set(suspects.rows()) == {given_back.id, *paid})
    await checking.stop(1)
    assert suspects.status.asked == []


async def test_a_sweep_looks_at_all_rows_and_leaves_claimed_ones(suspects: Suspects) -> None:
    order_id = uuid.uuid4()
    made = [History(str(key), order_id=order_id).charged().refunded() for key in range(5)]
    append(suspects.connection, [fact for each in made for fact in each.facts])
    await follow(suspects.database)
    suspects.suspect(order_id, [each.id for each in made])
    (claimed,) = await table.claim(suspects.database, 1, 60)
    after = table.FIRST
    for _ in range(3):
        after = await table.sweep(suspects.database, after, 2)
    assert after == table.FIRST
    assert set(suspects.rows()) == {claimed.payment_id}


@pytest.mark.parametrize(
    ("ended", "state"),
    [
        ("refused", "unfulfilled"),
        ("refused, and refunded in part by hand", "unfulfilled"),
        ("not yet", "given_back"),
        ("made", "given_back"),
    ],
)
async def test_what_was_on_its_way_back_and_then_refused_is_unfulfilled_again(
    suspects: Suspects, ended: str, state: str
) -> None:
    """The provider may say so long after giving back began."""
    made = History("k").charged().give_back_begun()
    match ended:
        case "refused":
            made.refund_failed()
        case "refused, and refunded in part by hand":
            made.refund_failed().refunded("by hand", 100)
        case "made":
            made.refund_succeeded()
    append(suspects.connection, made.facts)
    await follow(suspects.database)
    suspects.suspect(made.payment.merchant_order_id, [made.id])
    given_back = "UPDATE fulfilments SET state = 'given_back', given_back_at = now()"
    suspects.connection.execute(given_back)
    await table.sweep(suspects.database, table.FIRST, 10)  # `payments` may be behind
    assert suspects.rows()[made.id].state == "given_back"
    suspects.connection.execute("UPDATE fulfilments SET given_back_at = now() - interval '2 min'")
    await table.sweep(suspects.database, table.FIRST, 10)
    assert suspects.rows()[made.id].state == state


async def test_what_was_given_back_long_ago_is_forgotten(suspects: Suspects) -> None:
    ids = {name: await suspects.paid_suspect() for name in ("back", "never", "asked", "failed")}
    for name, change in (
        ("back", "state = 'given_back', given_back_at = now()"),
        ("never", "said = 'nothing'"),
        ("asked", "said = 'nothing', checked_at = now()"),
        ("failed", "said = 'failed'"),
    ):
        statement = f"UPDATE fulfilments SET {change} WHERE payment_id = %s"
        suspects.connection.execute(statement.encode(), [ids[name]])
    suspects.pass_time(89 * 86400)
    assert await table.prune(suspects.database, 90, 10) == 0
    suspects.pass_time(2 * 86400)
    assert await table.prune(suspects.database, 90, 10) == 2
    assert set(suspects.rows()) == {ids["asked"], ids["failed"]}


async def test_a_time_from_a_clock_that_was_ahead_keeps_nobody_waiting(suspects: Suspects) -> None:
    payment_id = await suspects.paid_suspect()
    await suspects.read(FAILED)
    suspects.pass_time(-7 * 86400)
    give_back = GivesBack()
    assert await suspects.read(FAILED, give_back) == 1
    row = suspects.rows()[payment_id]
    assert row.failed_s is not None
    assert 0 <= row.failed_s < 60
    assert give_back.asked == []


async def test_two_processes_share_the_work(suspects: Suspects) -> None:
    ids = [await suspects.paid_suspect() for _ in range(2 * CONCURRENCY_MAX)]
    suspects.status.reading = FAILED
    await asyncio.gather(*(suspects.checking().run_once() for _ in range(2)))
    assert len(suspects.status.asked) == len(set(suspects.status.asked)) == len(ids)
    assert {row.state for row in suspects.rows().values()} == {"unfulfilled"}


async def test_what_another_process_is_claiming_is_left_to_it(suspects: Suspects) -> None:
    first, second = await suspects.paid_suspect(), await suspects.paid_suspect()
    with suspects.connection.transaction():
        lock = "SELECT FROM fulfilments WHERE payment_id = %s FOR UPDATE"
        suspects.connection.execute(lock, [first])
        claimed = await table.claim(suspects.database, 2, 60)
    assert [each.payment_id for each in claimed] == [second]


@pytest.mark.parametrize("late", [CONFIRMED, FAILED, MISSING])
@pytest.mark.parametrize("mine", [0, 1])
async def test_who_was_frozen_past_its_lease_writes_nothing(
    suspects: Suspects, short_lease: Callable[[], None], late: Reading, mine: int
) -> None:
    """Nor does it give anything back, nor find others suspect."""
    order_id = uuid.uuid4()
    payment_id = (await suspects.paid(order_id, 2))[mine]
    suspects.suspect(order_id, [payment_id])
    suspects.connection.execute(
        "UPDATE fulfilments SET state = 'unfulfilled', failed_since = now() - interval '1 h'"
    )
    give_back = GivesBack()
    suspects.status.reading, suspects.status.held = late, asyncio.Event()
    short_lease()
    asking = asyncio.create_task(suspects.checking(give_back).run_once())
    await until(lambda: suspects.status.asked)
    held, suspects.status.held = suspects.status.held, None
    await suspects.read(PENDING)
    before = suspects.rows()
    assert before[payment_id].order_status == "PENDING"
    held.set()
    await asking
    assert {id: row[:6] for id, row in suspects.rows().items()} == {
        id: row[:6] for id, row in before.items()
    }
    assert give_back.asked == []


async def test_it_is_asked_about_as_soon_as_it_is_found(suspects: Suspects) -> None:
    checking = suspects.checking()
    suspects.status.reading = FAILED
    await checking.start()
    await asyncio.sleep(0.1)
    payment_id = await suspects.paid_suspect()
    checking.wake()
    await until(lambda: suspects.state(payment_id) == "unfulfilled")
    await checking.stop(1)
