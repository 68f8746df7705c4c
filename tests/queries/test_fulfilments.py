"""Which payments are listed and counted as unfulfilled, and from which index."""

import time
import uuid
from collections.abc import Iterator
from datetime import UTC, datetime, timedelta
from typing import Any

import psycopg
import pytest

from payments.database.connections import Database, DatabaseAddress
from payments.errors import InvalidRequest
from payments.payment.state import Status
from payments.queries import fulfilments
from payments.queries.cursor import ListPlace, write_cursor
from payments.queries.fulfilments import (
    OPEN_STATES,
    Unfulfilled,
    UnfulfilledFilter,
    UnfulfilledPage,
    counts,
    fulfilment_of,
    list_unfulfilled,
    unfulfilled,
)
from payments.queries.payments import PaymentView
from tests.conftest import Clones
from tests.queries.plans import Plan
from tests.queries.rows import insert, insert_fulfilment, view

pytestmark = pytest.mark.anyio

Connection = psycopg.Connection[Any]

NOW = datetime.now(UTC)


def row(
    connection: Connection,
    state: str,
    said: str = "nothing",
    *,
    status: Status = Status.SUCCESS,
    client: str | None = None,
    **columns: Any,
) -> PaymentView:
    """A payment that is listed so."""
    payment = view(NOW, status=status)
    insert(connection, [payment], client)
    insert_fulfilment(connection, payment, state, said, **columns)
    return payment


async def ids(database: Database, **asked: Any) -> list[uuid.UUID]:
    found = await unfulfilled(database, asked.pop("states", OPEN_STATES), 100, **asked)
    return [each.payment_id for each in found]


async def numbers(database: Database) -> dict[str, int]:
    return {state: count.payments for state, count in (await counts(database)).items()}


async def test_nothing(database: Database) -> None:
    assert await unfulfilled(database, OPEN_STATES, 10) == []
    assert await counts(database) == dict.fromkeys((*OPEN_STATES, "silent"), (0, 0))
    assert await fulfilment_of(database, uuid.uuid4()) is None


async def test_what_is_shown(database: Database, connection: Connection) -> None:
    payment = row(
        *(connection, "unfulfilled", "already_processed"),
        order_status="FAILED",
        found_at=NOW - timedelta(hours=1),
        checked_at=NOW,
        next_at=NOW + timedelta(hours=1),
    )
    (found,) = await unfulfilled(database, OPEN_STATES, 10)
    assert found == Unfulfilled(
        payment_id=payment.id,
        order_id=payment.merchant_order_id,
        amount_cents=1500,
        currency="INR",
        state="unfulfilled",
        said="already_processed",
        order_status="FAILED",
        problem=None,
        found_at=NOW - timedelta(hours=1),
        checked_at=NOW,
        next_at=NOW + timedelta(hours=1),
        given_back_at=None,
    )
    of_it = await fulfilment_of(database, payment.id)
    assert of_it is not None
    assert (of_it.state, of_it.order_status) == ("unfulfilled", "FAILED")
    count = (await counts(database))["unfulfilled"]
    assert count.payments == 1
    assert count.oldest_age_s - 3600 == pytest.approx(time.time() - NOW.timestamp(), abs=60)


@pytest.mark.parametrize("status", [Status.REFUNDED, Status.FAILED, Status.PENDING])
async def test_what_does_not_stand_is_not_shown(
    database: Database, connection: Connection, status: Status
) -> None:
    """Somebody refunded it a moment ago. What the service gave back itself is asked for."""
    gone = [row(connection, state, "failed", status=status) for state in OPEN_STATES]
    silent = row(connection, "suspect", status=status)
    returned = row(connection, "given_back", "failed", status=status, given_back_at=NOW)
    assert await ids(database) == []
    assert set((await numbers(database)).values()) == {0}
    for payment in (*gone, silent):
        assert await fulfilment_of(database, payment.id) is None
    assert await ids(database, states=["given_back"]) == [returned.id]
    of_it = await fulfilment_of(database, returned.id)
    assert of_it is not None
    assert of_it.given_back_at == NOW


@pytest.mark.parametrize(
    ("said", "asked", "is_silent"),
    [
        ("nothing", False, True),
        ("repeated", False, True),
        ("nothing", True, False),
        ("repeated", True, False),
        ("already_processed", False, False),
        ("failed", False, False),
        ("not_asked", False, False),
    ],
)
async def test_a_silent_one_is_no_suspect(
    database: Database, connection: Connection, said: str, asked: bool, is_silent: bool
) -> None:
    payment = row(connection, "suspect", said, checked_at=NOW if asked else None)
    assert await ids(database) == ([] if is_silent else [payment.id])
    found = await numbers(database)
    assert (found["silent"], found["suspect"]) == (is_silent, not is_silent)
    assert await fulfilment_of(database, payment.id) is not None


async def test_the_oldest_first_whatever_its_state(
    database: Database, connection: Connection
) -> None:
    made = [
        row(connection, state, "failed", found_at=NOW - timedelta(minutes=minutes))
        for minutes, state in ((1, "suspect"), (3, "paid_twice"), (2, "unfulfilled"))
    ]
    assert await ids(database) == [made[1].id, made[2].id, made[0].id]
    assert await ids(database, states=["paid_twice"]) == [made[1].id]
    assert await ids(database, order_id=made[2].merchant_order_id) == [made[2].id]
    assert await ids(database, order_id=uuid.uuid4()) == []


async def pages(database: Database, wanted: UnfulfilledFilter, client: str | None) -> list[Any]:
    cursor, found = None, list[Unfulfilled]()
    while True:
        page: UnfulfilledPage = await list_unfulfilled(
            database, wanted, client, 2, cursor, asked=False
        )
        assert len(page.payments) <= 2
        assert not page.order_status_asked
        found += page.payments
        if (cursor := page.next_cursor) is None:
            return [each.payment_id for each in found]


async def test_paging_and_whose_they_are(database: Database, connection: Connection) -> None:
    """Equal times do not hide any; what comes meanwhile does not move others."""
    made = [
        row(
            *(connection, OPEN_STATES[number % 3], "failed"),
            client="shop" if number % 2 else None,
            found_at=NOW - timedelta(minutes=9 - number // 4),
        )
        for number in range(9)
    ]
    every = [payment.id for payment in made]
    assert sorted(await pages(database, UnfulfilledFilter(), None)) == sorted(every)
    assert (await pages(database, UnfulfilledFilter(), None))[-1] == made[-1].id
    assert sorted(await pages(database, UnfulfilledFilter(), "shop")) == sorted(every[1::2])
    assert await pages(database, UnfulfilledFilter(), "other") == []
    twice = UnfulfilledFilter(state="paid_twice")
    assert sorted(await pages(database, twice, None)) == sorted(every[2::3])
    of_order = UnfulfilledFilter(merchant_order_id=made[1].merchant_order_id)
    assert await pages(database, of_order, "shop") == [made[1].id]


async def test_a_cursor_of_another_list(database: Database) -> None:
    with pytest.raises(InvalidRequest):
        await list_unfulfilled(
            *(database, UnfulfilledFilter(), None, 2, write_cursor(ListPlace(NOW, uuid.uuid4()))),
            asked=True,
        )


async def test_counting_ends(
    database: Database, connection: Connection, monkeypatch: pytest.MonkeyPatch
) -> None:
    """And the age is the oldest one's all the same."""
    monkeypatch.setattr(fulfilments, "COUNTED_MAX", 2)
    for said in ("failed", "nothing"):
        for hours in range(1, 4):
            row(connection, "suspect", said, found_at=NOW - timedelta(hours=hours))
    found = await counts(database)
    assert (found["suspect"].payments, found["silent"].payments) == (2, 2)
    assert found["suspect"].oldest_age_s > 10_000
    assert found["silent"].oldest_age_s > 10_000


# Of 40,000 payments 20,000 are silent; 200 wait for somebody, and were found last.
FILL = """
INSERT INTO payments
SELECT md5('p' || n)::uuid, md5('o' || n)::uuid, 'key ' || n, 1500, 'INR', 'SUCCESS', 'txn ' || n,
       now(), now()
  FROM generate_series(1, 40000) n;
INSERT INTO fulfilments (payment_id, order_id, state, said, found_at)
SELECT md5('p' || n)::uuid, md5('o' || n)::uuid,
       CASE WHEN n <= 20000 THEN 'suspect' WHEN n % 2 = 0 THEN 'unfulfilled' ELSE 'paid_twice' END,
       CASE WHEN n <= 20000 THEN 'nothing' ELSE 'failed' END, now() - (50000 - n) * interval '1 s'
  FROM generate_series(1, 20200) n;
"""


@pytest.fixture(scope="module")
def big(clones: Clones) -> Iterator[DatabaseAddress]:
    address = clones.take()
    with psycopg.connect(address.conninfo("tests"), autocommit=True) as connection:
        connection.execute("SET statement_timeout = '60s'")
        connection.execute(FILL)
        connection.execute("VACUUM ANALYZE payments, fulfilments")
    yield address
    clones.drop(address)


async def test_silent_ones_are_not_read_for_the_list(big: DatabaseAddress) -> None:
    params = {
        "states": list(OPEN_STATES),
        **dict.fromkeys(("order_id", "client", "after", "after_id")),
        "limit": 51,
    }
    with psycopg.connect(big.conninfo("tests"), autocommit=True) as connection:
        plan = Plan(connection, fulfilments.PAGE, params)
        assert "fulfilments_shown" in plan.indexes
        assert plan.scanned == set()
        assert plan.looked_at < 1_500
        counted = Plan(connection, fulfilments.COUNTS, {"states": list(OPEN_STATES), "most": 500})
        assert "fulfilments_shown" in counted.indexes
        assert counted.scanned == set()
        assert counted.looked_at < 4_000
