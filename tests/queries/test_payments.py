"""The list of payments: its filters, its order, and pages that miss nothing."""

import random
import uuid
from datetime import UTC, datetime, timedelta
from itertools import combinations
from typing import Any

import msgspec
import psycopg
import pytest

from payments.database.connections import Database, DatabaseAddress
from payments.errors import InvalidRequest
from payments.payment.state import Status
from payments.queries.cursor import ListPlace, read_cursor, write_cursor
from payments.queries.payments import (
    PaymentFilter,
    PaymentPage,
    PaymentView,
    list_payments,
    not_found,
)
from tests.queries.rows import insert, insert_refund, view

pytestmark = pytest.mark.anyio

Connection = psycopg.Connection[Any]

NOON = datetime(2026, 1, 31, 12, tzinfo=UTC)
ORDERS = [uuid.uuid4() for _ in range(3)]
FILTERS: dict[str, Any] = {
    "merchant_order_id": ORDERS[0],
    "status": Status.FAILED,
    "currency": "JPY",
    "created_from": NOON + timedelta(seconds=5),
    "created_until": NOON + timedelta(seconds=15),
}


def some_payments(count: int = 300) -> list[PaymentView]:
    """Payments of every kind; about a dozen share each created_at."""
    drawn = random.Random(7)
    return [
        view(
            NOON + timedelta(seconds=drawn.randrange(25)),
            id=uuid.UUID(int=drawn.getrandbits(128), version=4),
            merchant_order_id=drawn.choice(ORDERS),
            status=drawn.choice(list(Status)),
            currency=drawn.choice(["INR", "JPY", "USD"]),
        )
        for _ in range(count)
    ]


def fits(payment: PaymentView, wanted: PaymentFilter) -> bool:
    first = wanted.created_from or datetime.min.replace(tzinfo=UTC)
    end = wanted.created_until or datetime.max.replace(tzinfo=UTC)
    return (
        wanted.merchant_order_id in (None, payment.merchant_order_id)
        and wanted.status in (None, payment.status)
        and wanted.currency in (None, payment.currency)
        and first <= payment.created_at < end
    )


def newest_first(payments: list[PaymentView]) -> list[PaymentView]:
    return sorted(payments, key=lambda each: (each.created_at, each.id.bytes), reverse=True)


async def all_pages(
    database: Database, wanted: PaymentFilter, client: str | None, limit: int
) -> list[PaymentView]:
    listed: list[PaymentView] = []
    cursor = None
    while True:
        page = await list_payments(database, wanted, client, limit, cursor)
        assert len(page.payments) == limit or page.next_cursor is None
        listed += page.payments
        cursor = page.next_cursor
        if cursor is None:
            return listed


@pytest.mark.parametrize("client", [None, "shop"])
@pytest.mark.parametrize(
    "names",
    [(), *((name,) for name in FILTERS), *combinations(FILTERS, 2), tuple(FILTERS)],
    ids="+".join,
)
async def test_filters(
    database: Database, connection: Connection, names: tuple[str, ...], client: str | None
) -> None:
    wanted = PaymentFilter(**{name: FILTERS[name] for name in names})
    payments = some_payments()
    insert(connection, payments, client)
    expected = newest_first([payment for payment in payments if fits(payment, wanted)])
    assert expected
    assert await all_pages(database, wanted, client, limit=7) == expected
    assert await all_pages(database, wanted, client, limit=200) == expected[:200] + expected[200:]


async def test_times_are_those_of_any_offset(database: Database, connection: Connection) -> None:
    payment = view(NOON)
    insert(connection, [payment])
    kolkata = NOON.astimezone(datetime.fromisoformat("2026-01-31T00:00:00+05:30").tzinfo)
    page = await list_payments(database, PaymentFilter(created_from=kolkata), None)
    assert page.payments == [payment]
    page = await list_payments(database, PaymentFilter(created_until=kolkata), None)
    assert page.payments == []
    times = msgspec.json.decode(msgspec.json.encode(payment))["created_at"]
    page = await list_payments(database, PaymentFilter(), None)
    assert msgspec.json.decode(msgspec.json.encode(page))["payments"][0]["created_at"] == times
    assert times == "2026-01-31T12:00:00Z"


@pytest.mark.parametrize("client", [None, "shop"])
async def test_nothing_is_repeated_or_dropped_while_payments_arrive(
    database: Database, connection: Connection, client: str | None
) -> None:
    """Newer ones, older ones, and some of the same microsecond as the end of a page."""
    before = some_payments(100)
    insert(connection, before, client)
    listed: list[PaymentView] = []
    cursor = None
    while True:
        page = await list_payments(database, PaymentFilter(), client, 9, cursor)
        listed += page.payments
        cursor = page.next_cursor
        if cursor is None:
            break
        edge = page.payments[-1].created_at
        arriving = [view(edge + timedelta(hours=1)), view(edge - timedelta(microseconds=1))]
        arriving += [view(edge) for _ in range(4)]
        insert(connection, arriving, client)
        connection.execute("UPDATE payments SET updated_at = now(), status = 'REFUNDED'")
    ids = [payment.id for payment in listed]
    assert len(set(ids)) == len(ids)
    assert {payment.id for payment in before} <= set(ids)
    assert newest_first(listed) == listed


async def test_payments_of_one_moment_are_all_listed(
    database: Database, connection: Connection
) -> None:
    payments = [view(NOON) for _ in range(50)]
    insert(connection, payments)
    for limit in (1, 7, 49, 50):
        listed = await all_pages(database, PaymentFilter(), None, limit)
        assert listed == newest_first(payments)


async def test_microseconds_count(database: Database, connection: Connection) -> None:
    payments = [view(NOON + timedelta(microseconds=number)) for number in range(20)]
    insert(connection, payments)
    assert await all_pages(database, PaymentFilter(), None, 3) == newest_first(payments)
    wanted = PaymentFilter(
        created_from=NOON + timedelta(microseconds=3),
        created_until=NOON + timedelta(microseconds=5),
    )
    page = await list_payments(database, wanted, None)
    assert [each.created_at.microsecond for each in page.payments] == [4, 3]


async def test_a_full_page_may_be_the_last(database: Database, connection: Connection) -> None:
    insert(connection, [view(NOON) for _ in range(50)])
    page = await list_payments(database, PaymentFilter(), None)
    assert (len(page.payments), page.next_cursor) == (50, None)
    insert(connection, [view(NOON)])
    page = await list_payments(database, PaymentFilter(), None)
    assert len(page.payments) == 50
    assert page.next_cursor is not None


@pytest.mark.parametrize("client", [None, "shop"])
async def test_only_refunds_that_went_through_count(
    database: Database, connection: Connection, client: str | None
) -> None:
    refunded, other = view(NOON, refunded_cents=900), view(NOON - timedelta(days=1))
    insert(connection, [refunded, other], client)
    for amount, status in ((400, "SUCCESS"), (500, "SUCCESS"), (30, "PENDING"), (7, "FAILED")):
        insert_refund(connection, refunded, amount, status)
    page = await list_payments(database, PaymentFilter(), client)
    assert page.payments == [refunded, other]


@pytest.mark.parametrize("client", [None, "shop"])
async def test_the_position_is_the_projectors(
    database: Database, connection: Connection, client: str | None
) -> None:
    empty = await list_payments(database, PaymentFilter(), client)
    assert empty == PaymentPage([], None, 0)
    connection.execute("UPDATE followers SET position = 42 WHERE name = 'payments'")
    connection.execute("INSERT INTO followers VALUES ('other', 43)")
    insert(connection, [view(NOON)], client)
    page = await list_payments(database, PaymentFilter(), client)
    assert (len(page.payments), page.position) == (1, 42)


async def test_a_client_sees_its_own_payments_only(
    database: Database, connection: Connection
) -> None:
    own, others, nobodys = (view(NOON, merchant_order_id=ORDERS[0]) for _ in range(3))
    insert(connection, [own], "shop")
    insert(connection, [others], "other")
    insert(connection, [nobodys])
    for wanted in (
        PaymentFilter(),
        PaymentFilter(merchant_order_id=ORDERS[0]),
        PaymentFilter(status=Status.SUCCESS),
        PaymentFilter(currency="INR"),
        PaymentFilter(status=Status.SUCCESS, currency="INR"),
    ):
        assert await all_pages(database, wanted, "shop", 1) == [own]
        assert await all_pages(database, wanted, "third", 1) == []
        assert len(await all_pages(database, wanted, None, 1)) == 3


def damaged(cursor: str) -> list[str]:
    other = "A" if cursor[0] != "A" else "B"
    return [
        "",
        "x",
        "%00",
        "🙂",
        "A" * 36,
        "A" * 38,
        cursor[:-1],
        cursor + "A",
        cursor + "==",
        cursor + "\n",
        other + cursor[1:],
        cursor[:5] + cursor[6:] + "A",
        cursor.swapcase(),
        " " + cursor,
    ]


async def test_cursors_that_are_not_ours(database: Database) -> None:
    cursor = write_cursor(ListPlace(NOON, ORDERS[0]))
    assert read_cursor(cursor) == (NOON, ORDERS[0])
    for wrong in damaged(cursor):
        with pytest.raises(InvalidRequest) as raised:
            await list_payments(database, PaymentFilter(), None, cursor=wrong)
        assert [error.field for error in raised.value.errors] == ["cursor"]


@pytest.mark.parametrize(
    "time",
    [
        datetime.min.replace(tzinfo=UTC),
        datetime(1969, 12, 31, 23, 59, 59, 999_999, tzinfo=UTC),
        datetime.max.replace(tzinfo=UTC),
    ],
)
def test_cursors_of_any_time(time: datetime) -> None:
    assert read_cursor(write_cursor(ListPlace(time, ORDERS[0]))) == (time, ORDERS[0])


async def test_an_unknown_id_that_is_an_orders(database: Database, connection: Connection) -> None:
    order = uuid.uuid4()
    plain = f"Payment {order} does not exist."
    assert str(await not_found(database, order, None)) == plain
    failed = view(NOON, merchant_order_id=order, status=Status.FAILED, currency="JPY")
    charged = view(NOON + timedelta(seconds=1), merchant_order_id=order, amount_cents=5)
    insert(connection, [failed, charged], "shop")
    expected = (
        f"{plain} It is the id of an order with the payments {charged.id} (SUCCESS, 0.05 INR), "
        f"{failed.id} (FAILED, 1500 JPY): use one of these ids."
    )
    for client in (None, "shop"):
        assert str(await not_found(database, order, client)) == expected
    assert str(await not_found(database, order, "other")) == plain
    insert(connection, [view(NOON, merchant_order_id=order) for _ in range(4)])
    detail = str(await not_found(database, order, None))
    assert detail.count("INR") + detail.count("JPY") == 5
    assert detail.endswith(" and older ones: use one of these ids.")


async def test_the_error_is_certain_without_the_list(address: DatabaseAddress) -> None:
    async with Database(msgspec.structs.replace(address, host="/nowhere"), 1) as gone:
        told = str(await not_found(gone, ORDERS[0], None))
    assert told == f"Payment {ORDERS[0]} does not exist."
