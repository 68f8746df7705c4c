"""The checker itself: it passes what is right, and finds each kind of wrong."""

import asyncio
import uuid
from collections.abc import Iterable, Iterator
from typing import Any

import msgspec
import psycopg
import pytest

from payments.database.connections import Database, DatabaseAddress, connect
from payments.events.facts import Fact, RefundInitiated
from payments.events.store import to_stored_event
from tests.conftest import Clones
from tests.invariants.checker import (
    ChargeAnswer,
    InvariantBroken,
    ProviderRecord,
    RefundAnswer,
    check,
)
from tests.support import History, append, append_stored, follow, histories, stored_event

pytestmark = pytest.mark.anyio


def provider_records(of: Iterable[History]) -> list[ProviderRecord]:
    """What an honest provider has on record for these payments."""
    records = []
    for history in of:
        payment = history.payment
        about = (payment.id, payment.amount_cents, payment.currency, f"txn-{payment.id}")
        if payment.provider_txn_id or payment.late_capture:
            records.append(ProviderRecord("capture", payment.id, *about))
        if (late := payment.late_capture) and late.provider_refund_id:
            back = (payment.amount_cents, payment.currency, late.provider_refund_id)
            records.append(ProviderRecord("refund", late.refund_id, payment.id, *back))
        for refund in payment.refunds:
            if refund.provider_refund_id:
                back = (refund.amount_cents, payment.currency, refund.provider_refund_id)
                records.append(ProviderRecord("refund", refund.id, payment.id, *back))
    return records


@pytest.fixture(scope="module")
def known() -> dict[str, History]:
    """A payment of every kind."""
    return histories(client="order")


@pytest.fixture(scope="module")
def filled(clones: Clones, known: dict[str, History]) -> Iterator[DatabaseAddress]:
    """A database with all of them in the log and in the read model."""
    address = clones.take()
    with connect(address, "tests") as connection:
        append(connection, all_facts(known))
    asyncio.run(bring_up_to_date(address))
    yield address
    clones.drop(address)


@pytest.fixture
def draft(filled: DatabaseAddress) -> Iterator[psycopg.Connection[Any]]:
    """A connection to it; what a test changes is undone."""
    with psycopg.connect(filled.conninfo("tests"), autocommit=True) as connection:
        connection.isolation_level = psycopg.IsolationLevel.REPEATABLE_READ
        with connection.transaction(force_rollback=True):
            yield connection


async def bring_up_to_date(address: DatabaseAddress) -> None:
    database = Database(address, 1)
    await follow(database)
    await database.close()


def all_facts(known: dict[str, History]) -> list[Fact]:
    return [fact for history in known.values() for fact in history.facts]


def rewrite_log(connection: psycopg.Connection[Any], change: str) -> None:
    connection.execute("ALTER TABLE payment_events DISABLE TRIGGER ALL")
    connection.execute(change.encode())


def refund_ids(history: History) -> list[uuid.UUID]:
    return [refund.id for refund in history.payment.refunds]


def test_all_is_well(known: dict[str, History], draft: psycopg.Connection[Any]) -> None:
    charges = [
        ChargeAnswer(known["charged"].id, 201, "SUCCESS"),
        ChargeAnswer(known["refunded"].id, 201, "SUCCESS"),
        ChargeAnswer(known["declined"].id, 201, "FAILED"),
        ChargeAnswer(known["late capture returned"].id, 202, "PENDING"),
        ChargeAnswer(uuid.uuid4(), 503, ""),
    ]
    (done,), (under_way,) = refund_ids(known["refunded"]), refund_ids(known["refund under way"])
    refunds = [
        RefundAnswer(known["refunded"].id, done, 201, 1500),
        RefundAnswer(known["refund under way"].id, under_way, 202, 500),
        RefundAnswer(known["charged"].id, uuid.uuid4(), 409, 1500),
    ]
    report = check(draft, provider_records(known.values()), charges, refunds)
    assert report == (sum(len(history.facts) for history in known.values()), len(known), {})


async def test_an_empty_database_is_well(connection: psycopg.Connection[Any]) -> None:
    assert check(connection, [], settled=True) == (0, 0, {})


@pytest.mark.parametrize(
    ("change", "finding"),
    [
        ("DELETE FROM payments WHERE status = 'PENDING'", "payments .* is None"),
        ("INSERT INTO payments DEFAULT VALUES", "payments .* no such row"),
        ("UPDATE payments SET merchant_order_id = gen_random_uuid()", "payments"),
        ("UPDATE payments SET idempotency_key = id::text", "payments"),
        ("UPDATE payments SET amount_cents = amount_cents + 1", "payments"),
        ("UPDATE payments SET currency = 'EUR'", "payments"),
        ("UPDATE payments SET status = 'FAILED' WHERE status = 'SUCCESS'", "payments"),
        ("UPDATE payments SET provider_txn_id = NULL", "payments"),
        ("UPDATE payments SET created_at = created_at + interval '5.5 h'", "payments"),
        ("UPDATE payments SET updated_at = created_at WHERE status = 'SUCCESS'", "payments"),
        ("UPDATE refunds SET status = 'PENDING' WHERE status = 'SUCCESS'", "refunds"),
        ("UPDATE refunds SET decline_code = ''", "refunds"),
        ("DELETE FROM refunds", "refunds .* is None"),
        ("DELETE FROM payment_clients", "payment_clients .* is None"),
        ("UPDATE payment_clients SET client = 'other'", "payment_clients"),
        ("UPDATE payment_clients SET status = 'PENDING'", "payment_clients"),
        ("UPDATE payment_clients SET currency = 'XTS'", "payment_clients"),
        ("UPDATE payment_clients SET created_at = created_at + interval '1s'", "payment_clients"),
        ("DELETE FROM unsettled_payments WHERE kind = 'refund'", "unsettled_payments"),
        ("UPDATE unsettled_payments SET kind = 'charge'", "unsettled_payments"),
        ("UPDATE unsettled_payments SET since = since + interval '1s'", "unsettled_payments"),
        (
            "INSERT INTO unsettled_payments SELECT id, 'charge', now(), now() FROM payments"
            " WHERE status = 'REFUNDED'",
            "unsettled_payments .* no such row",
        ),
        ("UPDATE followers SET position = position + 1", "past the end of the log"),
    ],
)
def test_a_read_model_that_is_not_the_fold(
    known: dict[str, History], draft: psycopg.Connection[Any], change: str, finding: str
) -> None:
    draft.execute(change.encode())
    with pytest.raises(InvariantBroken, match=finding):
        check(draft)


def test_what_settling_moves_is_not_compared(
    known: dict[str, History], draft: psycopg.Connection[Any]
) -> None:
    draft.execute("UPDATE unsettled_payments SET due_at = now(), attempts = 7")
    draft.execute("DELETE FROM unsettled_payments WHERE kind = 'abandoned'")
    check(draft)


def test_a_gap_in_the_log(known: dict[str, History], draft: psycopg.Connection[Any]) -> None:
    rewrite_log(draft, "UPDATE payment_events SET notification_id = 1000 WHERE 3 = notification_id")
    with pytest.raises(InvariantBroken, match="position 4 stands where 3 should"):
        check(draft)


def test_a_follower_that_is_behind(connection: psycopg.Connection[Any]) -> None:
    append(connection, History("next").charged().facts)
    check(connection, caught_up=False)
    with pytest.raises(InvariantBroken, match="the follower is at"):
        check(connection)


def test_a_skipped_event(connection: psycopg.Connection[Any]) -> None:
    position = append(connection, History("next").facts)
    connection.execute("UPDATE followers SET position = %s", [position])
    with pytest.raises(InvariantBroken, match=r"payments .* is None"):
        check(connection)


async def test_an_unreadable_stream_must_be_parked(
    database: Database, connection: psycopg.Connection[Any]
) -> None:
    event = stored_event()
    position = append_stored(connection, [event])
    check(connection, caught_up=False)
    await follow(database)
    report = check(connection)
    assert list(report.parked) == [event.originator_id]
    connection.execute("DELETE FROM parked_streams")
    with pytest.raises(InvariantBroken, match="cannot be folded and is not parked"):
        check(connection)
    assert position == report.events


def test_a_parked_stream_is_left_out(
    known: dict[str, History], draft: psycopg.Connection[Any]
) -> None:
    id = known["refunded"].id
    draft.execute("INSERT INTO parked_streams VALUES ('payments', %s, 1, 'a bug')", [id])
    draft.execute("DELETE FROM payments WHERE id = %s", [id])
    draft.execute("DELETE FROM refunds WHERE payment_id = %s", [id])
    assert check(draft).parked == {id: "a bug"}


def changed(records: list[ProviderRecord], number: int, **values: Any) -> list[ProviderRecord]:
    return [*records[:number], records[number]._replace(**values), *records[number + 1 :]]


@pytest.mark.parametrize("kind", ["capture", "refund"])
@pytest.mark.parametrize(
    "values",
    [{"amount_cents": 1}, {"currency": "EUR"}, {"txn_id": "other"}, {"our_id": uuid.UUID(int=1)}],
)
def test_a_provider_that_did_something_else(
    known: dict[str, History],
    draft: psycopg.Connection[Any],
    kind: str,
    values: dict[str, Any],
) -> None:
    records = provider_records(known.values())
    number = next(n for n, record in enumerate(records) if record.kind == kind)
    with pytest.raises(InvariantBroken) as failure:
        check(draft, changed(records, number, **values))
    assert "the provider has no such record" in str(failure.value)
    assert "the events do not say so" in str(failure.value)


def test_a_provider_without_a_record(
    known: dict[str, History], draft: psycopg.Connection[Any]
) -> None:
    records = provider_records(known.values())
    for missing in range(len(records)):
        with pytest.raises(InvariantBroken, match="the provider has no such record"):
            check(draft, records[:missing] + records[missing + 1 :])


def test_a_second_capture(known: dict[str, History], draft: psycopg.Connection[Any]) -> None:
    records = provider_records(known.values())
    with pytest.raises(InvariantBroken, match="was captured 2 times"):
        check(draft, [*records, records[0]._replace(txn_id="another")])


def test_a_refund_given_back_twice(
    known: dict[str, History], draft: psycopg.Connection[Any]
) -> None:
    records = provider_records(known.values())
    refund = next(record for record in records if record.kind == "refund")
    with pytest.raises(InvariantBroken) as failure:
        check(draft, [*records, refund._replace(txn_id="another")])
    assert "was given back 2 times" in str(failure.value)


def test_a_provider_that_gave_back_more_than_it_captured(
    known: dict[str, History], draft: psycopg.Connection[Any]
) -> None:
    id = known["partly refunded"].id
    excess = ProviderRecord("refund", uuid.uuid4(), id, 1001, "INR", "re")
    with pytest.raises(InvariantBroken, match="1 more refunded than captured, at the provider"):
        check(draft, [*provider_records(known.values()), excess])


@pytest.mark.parametrize("kind", ["pending", "abandoned"])
def test_a_capture_that_the_events_do_not_say_yet(
    known: dict[str, History], draft: psycopg.Connection[Any], kind: str
) -> None:
    ahead = ProviderRecord("capture", known[kind].id, known[kind].id, 1500, "INR", "txn")
    records = [*provider_records(known.values()), ahead]
    check(draft, records)
    with pytest.raises(InvariantBroken, match="the events do not say so"):
        check(draft, records, settled=True)
    with pytest.raises(InvariantBroken, match="the events do not say so"):
        check(draft, changed(records, -1 % len(records), amount_cents=1))


@pytest.mark.parametrize("kind", ["refund under way", "late capture found"])
def test_a_refund_that_the_events_do_not_say_yet(
    known: dict[str, History], draft: psycopg.Connection[Any], kind: str
) -> None:
    payment = known[kind].payment
    refund_id = payment.late_capture.refund_id if payment.late_capture else payment.refunds[0].id
    amount_cents = 1500 if payment.late_capture else 500
    ahead = ProviderRecord("refund", refund_id, payment.id, amount_cents, "INR", "re")
    records = [*provider_records(known.values()), ahead]
    check(draft, records)
    with pytest.raises(InvariantBroken, match="the events do not say so"):
        check(draft, records, settled=True)


@pytest.mark.parametrize("kind", ["charged", "declined", "nobody's"])
def test_money_that_moved_without_an_open_payment(
    known: dict[str, History], draft: psycopg.Connection[Any], kind: str
) -> None:
    id = known[kind].id if kind in known else uuid.uuid4()
    refund = ProviderRecord("refund", uuid.uuid4(), id, 100, "INR", "re")
    capture = ProviderRecord("capture", id, id, 1500, "INR", "txn")
    records = provider_records(known.values())
    with pytest.raises(InvariantBroken, match="the events do not say so"):
        check(draft, [*records, refund])
    with pytest.raises(InvariantBroken, match="the events do not say so"):
        check(draft, [*records, capture])


@pytest.mark.parametrize(
    ("kind", "status_code", "status", "finding"),
    [
        ("nobody's", 201, "SUCCESS", "not in the log"),
        ("nobody's", 202, "PENDING", "not in the log"),
        ("charged", 201, "FAILED", "the first outcome in the log is"),
        ("refunded", 201, "REFUNDED", "the first outcome in the log is"),
        ("pending", 201, "SUCCESS", "the first outcome in the log is"),
        ("late capture returned", 201, "SUCCESS", "the first outcome in the log is"),
        ("charged", 202, "SUCCESS", "not PENDING"),
    ],
)
def test_an_answer_to_a_charge_that_was_not_true(
    known: dict[str, History],
    draft: psycopg.Connection[Any],
    kind: str,
    status_code: int,
    status: str,
    finding: str,
) -> None:
    id = known[kind].id if kind in known else uuid.uuid4()
    with pytest.raises(InvariantBroken, match=finding):
        check(draft, charges=[ChargeAnswer(id, status_code, status)])


@pytest.mark.parametrize(
    ("kind", "status_code", "amount_cents", "finding"),
    [
        ("refund under way", 201, 500, "PaymentRefunded is not in the log"),
        ("refund failed", 201, 1500, "PaymentRefunded is not in the log"),
        ("refunded", 201, 1499, "an amount of 1500"),
        ("charged", 202, 1500, "RefundInitiated is not in the log"),
        ("charged", 201, 1500, "PaymentRefunded is not in the log"),
    ],
)
def test_an_answer_to_a_refund_that_was_not_true(
    known: dict[str, History],
    draft: psycopg.Connection[Any],
    kind: str,
    status_code: int,
    amount_cents: int,
    finding: str,
) -> None:
    refund_id = next(iter(refund_ids(known[kind])), uuid.uuid4())
    answer = RefundAnswer(known[kind].id, refund_id, status_code, amount_cents)
    with pytest.raises(InvariantBroken, match=finding):
        check(draft, refunds=[answer])


async def test_refunds_over_the_capture_by_the_events(
    database: Database, known: dict[str, History], connection: psycopg.Connection[Any]
) -> None:
    append(connection, all_facts(known))

    def another(facts: list[Fact]) -> Fact:
        begun = next(fact for fact in facts if isinstance(fact, RefundInitiated))
        values = {"version": len(facts) + 1, "refund_id": uuid.uuid4(), "amount_cents": 1001}
        return msgspec.structs.replace(begun, **values)

    for kind in ("refund under way", "partly refunded"):
        append_stored(connection, [to_stored_event(another(known[kind].facts))])
    await follow(database)
    with pytest.raises(InvariantBroken, match="1501 refunded of 1500 captured") as failure:
        check(connection)
    assert str(failure.value).startswith("2 findings")


async def test_something_is_still_open(
    database: Database, known: dict[str, History], connection: psycopg.Connection[Any]
) -> None:
    under_way = ["pending", "refund under way", "two refunds at once", "late capture found"]
    append(connection, all_facts({k: v for k, v in known.items() if k not in under_way}))
    await follow(database)
    check(connection, settled=True)
    for count, kind in enumerate(under_way, 1):
        append(connection, known[kind].facts)
        await follow(database)
        check(connection)
        with pytest.raises(InvariantBroken, match="is not settled") as failure:
            check(connection, settled=True)
        assert str(failure.value).startswith(f"{count} findings")


def test_many_findings_are_listed_and_cut_short(connection: psycopg.Connection[Any]) -> None:
    append(connection, [History(f"more {n}").facts[0] for n in range(40)])
    connection.execute("UPDATE followers SET position = 40")
    with pytest.raises(InvariantBroken) as failure:
        check(connection)
    lines = str(failure.value).splitlines()
    assert lines[0] == "80 findings"
    assert len(lines) == 32
    assert lines[-1] == "- and 50 more"
