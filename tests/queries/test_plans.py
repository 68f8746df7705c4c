"""How Postgres answers each query on 100,000 payments: from an index, and without reading on.

What is bounded is the number of rows that are looked at, as EXPLAIN ANALYZE counts them.
"""

import hashlib
import uuid
from collections.abc import Iterator
from datetime import UTC, datetime, timedelta
from itertools import combinations
from typing import Any

import psycopg
import pytest

from payments import hints, unsettled
from payments.database.arrays import doubles, texts, timestamps, uuids
from payments.database.connections import DatabaseAddress
from payments.events.store import (
    CAPTURE_POSITIONS,
    LOAD_STREAM,
    LOAD_STREAMS,
    PERHAPS_PAID,
    READ_ASKED_FOR,
)
from payments.fulfilment import table as fulfilments
from payments.payment.state import Status
from payments.queries.cursor import ListPlace, write_cursor
from payments.queries.history import HISTORY
from payments.queries.payments import (
    PaymentFilter,
    list_payments,
    orders_with_outcomes,
    payments_of_order,
)
from tests.conftest import Clones
from tests.queries.conftest import WatchedDatabase
from tests.queries.plans import Plan

pytestmark = pytest.mark.anyio

LIMIT = 50
# 20,000 webhooks, over 20 days.
HINTS = """
INSERT INTO provider_hints (gateway, event_id, payment_id, reference, received_at)
SELECT 'p', 'evt_' || n, CASE n % 2 WHEN 0 THEN gen_random_uuid() END,
       CASE n % 2 WHEN 1 THEN 'ref_' || n END, now() - n * interval '86.4 s'
  FROM generate_series(1, 20000) n;
INSERT INTO provider_references
SELECT 'p', 'ref_' || n, gen_random_uuid() FROM generate_series(1, 20000) n;
ANALYZE provider_hints, provider_references
"""

# A page, the one row more, and as many again that a filter or a join may pass over.
LOOKED_AT_MAX = 1_500

# Payments 1 s apart, the newest last. Of 100: 90 captured, 8 declined, 1 open, 1 refunded; 80 in
# INR, 15 in USD, 5 in JPY; 50 of a large client; two payments per order. 100 of a small client.
# Besides 60,000 of a client of two kinds: captured in INR, and declined in USD.
FILL = """
INSERT INTO payments
SELECT md5('p' || n)::uuid, md5('o' || n / 2)::uuid, 'key ' || n, 1500,
       CASE WHEN c < 80 THEN 'INR' WHEN c < 95 THEN 'USD' ELSE 'JPY' END,
       CASE WHEN s < 90 THEN 'SUCCESS' WHEN s < 98 THEN 'FAILED'
            WHEN s < 99 THEN 'PENDING' ELSE 'REFUNDED' END,
       'txn ' || n, t, t
  FROM generate_series(1, 100000) n,
       LATERAL (SELECT abs(hashint4(n)) % 100, abs(hashint4(n + 1000000)) % 100,
                       timestamp '2026-01-01' + n * interval '1 s') AS x (s, c, t);

INSERT INTO payment_clients
SELECT id, CASE WHEN n % 1000 = 1 THEN 'small' ELSE 'large' END, status, currency, created_at
  FROM (SELECT *, substr(idempotency_key, 5)::integer AS n FROM payments) AS p
 WHERE n % 1000 = 1 OR hashint4(n + 2000000) % 2 = 0;

INSERT INTO payments
SELECT md5('q' || n)::uuid, md5('two kinds' || n)::uuid, 'key of two kinds ' || n, 1500,
       CASE n % 2 WHEN 0 THEN 'INR' ELSE 'USD' END,
       CASE n % 2 WHEN 0 THEN 'SUCCESS' ELSE 'FAILED' END,
       'txn ' || n, t, t
  FROM generate_series(1, 60000) n,
       LATERAL (SELECT timestamp '2026-01-01' + n * interval '1 s') AS x (t);

INSERT INTO payment_clients
SELECT id, 'two kinds', status, currency, created_at
  FROM payments WHERE idempotency_key LIKE 'key of two kinds%';

INSERT INTO refunds
SELECT gen_random_uuid(), id, NULL, 1500, currency, 'SUCCESS', NULL, NULL, created_at, created_at
  FROM payments WHERE status = 'REFUNDED';

INSERT INTO unsettled_payments
SELECT id, 'charge', created_at, timestamptz '2030-01-01' + (created_at - timestamp '2026-01-01')
  FROM payments;

INSERT INTO payment_events
SELECT 2 * n + v, md5('p' || n)::uuid, v, 'PaymentInitiated', decode(repeat('61', 300), 'hex'),
       now()
  FROM generate_series(1, 50000) n, generate_series(1, 2) v;
"""

NEWEST = datetime(2026, 1, 1, tzinfo=UTC) + timedelta(seconds=100_000)
ORDER = uuid.UUID(hashlib.md5(b"o40000").hexdigest())
MIDDLE = write_cursor(ListPlace(NEWEST - timedelta(hours=15), ORDER))
CLIENT_INDEXES = {
    frozenset[str](): "payment_clients_newest",
    frozenset({"status"}): "payment_clients_by_status",
    frozenset({"currency"}): "payment_clients_by_currency",
    frozenset({"status", "currency"}): "payment_clients_by_status_and_currency",
}
FILTERS: dict[str, Any] = {
    "merchant_order_id": ORDER,
    "status": Status.PENDING,
    "currency": "USD",
    "created_from": NEWEST - timedelta(hours=20),
    "created_until": NEWEST - timedelta(hours=10),
}


@pytest.fixture(scope="module")
def big(clones: Clones) -> Iterator[DatabaseAddress]:
    address = clones.take()
    with psycopg.connect(address.conninfo("tests"), autocommit=True) as connection:
        connection.execute("SET statement_timeout = '60s'")
        connection.execute(FILL)
        connection.execute("VACUUM ANALYZE")
    yield address
    clones.drop(address)


@pytest.fixture
def on_big(big: DatabaseAddress) -> Iterator[psycopg.Connection[Any]]:
    with psycopg.connect(big.conninfo("tests"), autocommit=True) as opened:
        opened.execute("SET statement_timeout = '60s'")
        yield opened


async def plan_of_list(
    big: DatabaseAddress,
    connection: psycopg.Connection[Any],
    wanted: PaymentFilter,
    client: str | None,
    cursor: str | None,
) -> Plan:
    """The plan of the statement that list_payments sends."""
    async with WatchedDatabase(big, 1) as database:
        await list_payments(database, wanted, client, LIMIT, cursor)
    (statement,) = database.statements
    return Plan(connection, statement.query, statement.params)


@pytest.mark.parametrize("cursor", [None, MIDDLE])
@pytest.mark.parametrize("client", [None, "large", "small"])
@pytest.mark.parametrize(
    "names",
    [(), *((name,) for name in FILTERS), *combinations(FILTERS, 2), tuple(FILTERS)],
    ids="+".join,
)
async def test_a_page_stops_early(
    big: DatabaseAddress,
    on_big: psycopg.Connection[Any],
    names: tuple[str, ...],
    client: str | None,
    cursor: str | None,
) -> None:
    wanted = PaymentFilter(**{name: FILTERS[name] for name in names})
    plan = await plan_of_list(big, on_big, wanted, client, cursor)
    assert plan.scanned <= {"followers"}
    assert plan.looked_at <= LOOKED_AT_MAX
    if "merchant_order_id" in names:
        assert "payments_of_order" in plan.indexes
    elif client is not None:
        assert CLIENT_INDEXES[frozenset(names) & {"status", "currency"}] in plan.indexes
    elif "status" in names:
        assert "payments_by_status" in plan.indexes
    elif "currency" in names:
        assert {"payments_by_currency", "payments_newest"} & plan.indexes
    else:
        assert "payments_newest" in plan.indexes


@pytest.mark.parametrize("cursor", [None, MIDDLE])
@pytest.mark.parametrize(
    "wanted",
    [
        {"status": Status.PENDING},
        {"status": Status.REFUNDED},
        {"currency": "JPY"},
        {"currency": "XTS"},
        {"status": Status.SUCCESS, "currency": "USD"},
        {"status": Status.FAILED, "currency": "INR"},
        {"status": Status.PENDING, "currency": "INR"},
        {"status": Status.SUCCESS, "currency": "JPY"},
        {"merchant_order_id": ORDER},
        {"created_from": NEWEST + timedelta(seconds=1)},
        {"created_until": NEWEST - timedelta(seconds=100_000)},
    ],
    ids=lambda wanted: " ".join(f"{name}={value}" for name, value in wanted.items()),
)
async def test_what_a_client_has_none_of_is_not_searched_for(
    big: DatabaseAddress,
    on_big: psycopg.Connection[Any],
    wanted: dict[str, Any],
    cursor: str | None,
) -> None:
    """However many payments it has, and others have of what it wants."""
    plan = await plan_of_list(big, on_big, PaymentFilter(**wanted), "two kinds", cursor)
    assert plan.looked_at <= 10
    assert plan.scanned <= {"followers"}


@pytest.mark.parametrize("client", [None, "large"])
async def test_the_payments_of_an_order(
    big: DatabaseAddress, on_big: psycopg.Connection[Any], client: str | None
) -> None:
    async with WatchedDatabase(big, 1) as database:
        await payments_of_order(database, uuid.uuid4(), client, 6)
    plan = Plan(on_big, database.statements[0].query, database.statements[0].params)
    assert "payments_of_order" in plan.indexes
    assert plan.scanned == set()
    assert plan.looked_at < 10


def test_streams_are_read_by_their_key(on_big: psycopg.Connection[Any]) -> None:
    found = on_big.execute("SELECT id FROM payments LIMIT 256").fetchall()
    ids = [id for (id,) in found]
    for query, params, most in (
        (LOAD_STREAMS, [uuids(ids)], 2 * 2 * 256),
        (LOAD_STREAM, [ids[0]], 4),
        (READ_ASKED_FOR, {"payment_ids": ids}, 2 * 2 * 256),
        (HISTORY, [ids[0]], 4),
        (CAPTURE_POSITIONS, {"payment_ids": uuids(ids)}, 2 * 2 * 256),
    ):
        plan = Plan(on_big, query, params)
        assert plan.indexes == {"payment_events_stream"}
        assert plan.scanned == set()
        assert plan.looked_at <= most


@pytest.mark.parametrize(("behind", "most"), [(0, 10), (1_000, 2_010), (100_000, 4_010)])
def test_whether_an_order_is_paid_reads_no_more_than_the_newest_events(
    on_big: psycopg.Connection[Any], behind: int, most: int
) -> None:
    """However far the read model is behind. Each of them is looked at twice: in the log, and among
    those that were found there."""
    with on_big.transaction(force_rollback=True):
        on_big.execute(
            "UPDATE followers SET position = (SELECT max(notification_id) FROM payment_events) - %s"
            " WHERE name = 'payments'",
            [behind],
        )
        params = {"payment_id": uuid.uuid4(), "order_id": ORDER, "order": str(ORDER).encode()}
        plan = Plan(on_big, PERHAPS_PAID, params)
    assert "payments_of_order" in plan.indexes
    assert plan.scanned <= {"followers"}
    assert plan.looked_at <= most


@pytest.mark.parametrize("abandoned", [True, False])
@pytest.mark.parametrize("due", [0, 100, 100_000])
def test_claiming_what_is_due_reads_no_more_than_it_claims(
    on_big: psycopg.Connection[Any], due: int, abandoned: bool
) -> None:
    with on_big.transaction(force_rollback=True):
        on_big.execute(
            "UPDATE unsettled_payments SET due_at = now() - interval '1 s' WHERE payment_id IN"
            " (SELECT payment_id FROM unsettled_payments ORDER BY due_at LIMIT %s)",
            [due],
        )
        on_big.execute("ANALYZE unsettled_payments")
        params = unsettled.claim_params(20, 10, abandoned=abandoned)
        plan = Plan(on_big, unsettled.CLAIM, params)
        assert "unsettled_payments_due" in plan.indexes
        assert plan.scanned == set()
        assert plan.looked_at <= 200


@pytest.mark.parametrize("known", ["unsettled", "settled", "unknown", "duplicate"])
@pytest.mark.parametrize("by", ["payment_id", "reference"])
def test_a_hint_looks_at_its_payment_alone(
    on_big: psycopg.Connection[Any], known: str, by: str
) -> None:
    with on_big.transaction(force_rollback=True):
        on_big.execute(HINTS)
        table = "payments" if known == "settled" else "unsettled_payments"
        row = on_big.execute(
            f"SELECT {'id' if known == 'settled' else 'payment_id'} FROM {table} LIMIT 1".encode()
        ).fetchone()
        assert row is not None
        payment_id = uuid.uuid4() if known == "unknown" else row[0]
        if known != "unknown":
            on_big.execute(
                "INSERT INTO provider_references VALUES ('p', 'of it', %s)", [payment_id]
            )
        event_id = "evt_5000" if known == "duplicate" else "evt_new"
        params = {
            "gateway": "p",
            "event_id": event_id,
            "payment_id": payment_id if by == "payment_id" else None,
            "reference": "of it" if by == "reference" else None,
            "request_s": 7,
        }
        plan = Plan(on_big, hints.RECORD, params)
        assert plan.scanned == set()
        assert plan.looked_at <= 20


def test_old_hints_are_found_by_their_age(on_big: psycopg.Connection[Any]) -> None:
    with on_big.transaction(force_rollback=True):
        on_big.execute(HINTS)
        plan = Plan(on_big, hints.PURGE, {"days": hints.KEPT_DAYS, "limit": 100})
        assert "provider_hints_received" in plan.indexes
        assert plan.scanned == set()
        assert plan.looked_at <= 600


def test_listing_a_declined_payment_looks_up_its_hints(on_big: psycopg.Connection[Any]) -> None:
    with on_big.transaction(force_rollback=True):
        on_big.execute(HINTS)
        count = 100
        params = [
            *(uuids([uuid.uuid4() for _ in range(count)]), texts(["declined"] * count)),
            *(timestamps([NEWEST] * count), doubles([1000.0] * count)),
            *(texts(["p"] * count), texts(["of it"] * count)),
        ]
        plan = Plan(on_big, unsettled.ADD, params)
        assert {"provider_hints_payment", "provider_hints_reference"} <= plan.indexes
        assert plan.scanned == set()
        assert plan.looked_at <= 10 * count


def test_telling_of_a_payment_looks_at_one_row(on_big: psycopg.Connection[Any]) -> None:
    with on_big.transaction(force_rollback=True):
        row = on_big.execute("SELECT payment_id FROM unsettled_payments LIMIT 1").fetchone()
        assert row is not None
        params = {"payment_id": row[0], "level": 50, "again_s": 60}
        plan = Plan(on_big, unsettled.TELL, params)
        assert plan.indexes == {"unsettled_payments_pkey"}
        assert plan.scanned == set()
        assert plan.looked_at <= 4


@pytest.mark.parametrize("after", [None, ListPlace(NEWEST - timedelta(hours=15), ORDER)])
async def test_a_page_of_orders_to_be_reconciled_stops_early(
    big: DatabaseAddress, on_big: psycopg.Connection[Any], after: ListPlace | None
) -> None:
    async with WatchedDatabase(big, 1) as database:
        await orders_with_outcomes(database, NEWEST - timedelta(hours=20), NEWEST, after, LIMIT)
    plan = Plan(on_big, database.statements[0].query, database.statements[0].params)
    assert plan.scanned == set()
    assert plan.looked_at <= LOOKED_AT_MAX


SUSPECT = """
INSERT INTO fulfilments (payment_id, order_id, state, said, next_at)
SELECT id, merchant_order_id, 'suspect', 'nothing', now() + interval '1 minute'
  FROM payments WHERE status = 'SUCCESS' LIMIT 20000;
ANALYZE fulfilments
"""


@pytest.mark.parametrize("due", [0, 100, 20_000])
def test_suspects_are_found_by_their_index(on_big: psycopg.Connection[Any], due: int) -> None:
    with on_big.transaction(force_rollback=True):
        on_big.execute(SUSPECT)
        on_big.execute(
            "UPDATE fulfilments SET next_at = now() - interval '1 s' WHERE payment_id IN"
            " (SELECT payment_id FROM fulfilments ORDER BY next_at LIMIT %s)",
            [due],
        )
        on_big.execute("ANALYZE fulfilments")
        claim = {"most": 16, "lease_s": 15.0, "again_s": 3600.0}
        sweep = {"after": ORDER, "most": 100, "behind_s": 60.0}
        of_order = {"order_id": ORDER, "payment_id": ORDER, "most": 1000}
        for query, params, indexes, most in (
            (fulfilments.CLAIM, claim, {"fulfilments_next"}, 200),
            (fulfilments.SWEEP, sweep, {"fulfilments_pkey", "payments_pkey"}, 600),
            (fulfilments.PRUNE, {"days": 90, "most": 100}, {"fulfilments_found"}, 10),
            (fulfilments.CAPTURED_FOR, of_order, {"payments_of_order", "payments_pkey"}, 20),
        ):
            plan = Plan(on_big, query, params)
            assert indexes <= plan.indexes
            assert plan.scanned <= {"callback_deliveries"}  # it is empty
            assert plan.looked_at <= most
