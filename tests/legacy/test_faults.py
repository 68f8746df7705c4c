"""Rows that cannot be imported: each with its reason, and nothing is half done."""

from datetime import UTC, datetime
from typing import Any

import pytest

from payments.legacy import LegacyRow, facts_of, faults
from payments.payment.state import fold
from tests.legacy.conftest import Command, Node
from tests.legacy.node import LOOSE_TABLE, insert

AT = datetime(2025, 6, 1, 12, tzinfo=UTC)
SOUND = LegacyRow(
    id="d4254ff5-4a92-492f-870b-fb095c659001",
    merchant_order_id="f50d9fa2-5d3e-4e49-9a02-218ad32ef4a9",
    idempotency_key="abc123",
    amount_cents="1500",
    currency="INR",
    status="SUCCESS",
    provider_txn_id="txn_1",
    created_at=AT,
    updated_at=AT,
    id_is_shared=False,
    key_is_shared=False,
    txn_id_is_shared=False,
)


@pytest.mark.parametrize(
    "differing",
    [
        {},
        {"idempotency_key": None},
        {"idempotency_key": "k" * 255},
        {"amount_cents": "1"},
        {"amount_cents": "2147483647"},
        {"status": "PENDING", "provider_txn_id": None},
        {"provider_txn_id": None},
        {"created_at": None},
        {"updated_at": None},
    ],
)
def test_a_sound_row(differing: dict[str, Any]) -> None:
    assert list(faults(SOUND._replace(**differing))) == []


@pytest.mark.parametrize(
    ("differing", "reason"),
    [
        ({"id": None}, "id is not a UUID"),
        ({"id": "17"}, "id is not a UUID"),
        ({"id": "d4254ff54a92492f870bfb095c659001"}, "id is not a UUID"),
        ({"id_is_shared": True}, "another row has the same id"),
        ({"merchant_order_id": None}, "no merchant_order_id"),
        ({"merchant_order_id": "order-1"}, "merchant_order_id is not a UUID"),
        ({"idempotency_key": ""}, "idempotency_key is not 1 to 255"),
        ({"idempotency_key": " k"}, "idempotency_key is not 1 to 255"),
        ({"idempotency_key": "k\n"}, "idempotency_key is not 1 to 255"),
        ({"idempotency_key": "clé"}, "idempotency_key is not 1 to 255"),
        ({"idempotency_key": "k" * 256}, "idempotency_key is not 1 to 255"),
        ({"key_is_shared": True}, "another row has the same idempotency_key"),
        ({"amount_cents": None}, "amount_cents is not from 1"),
        ({"amount_cents": "0"}, "amount_cents is not from 1"),
        ({"amount_cents": "-5"}, "amount_cents is not from 1"),
        ({"amount_cents": "2147483648"}, "amount_cents is not from 1"),
        ({"amount_cents": "1.5"}, "amount_cents is not from 1"),
        ({"currency": None}, "currency is not"),
        ({"currency": "inr"}, "currency is not"),
        ({"currency": "XXX"}, "currency is not"),
        ({"status": None}, "status is none of"),
        ({"status": "PAID"}, "status is none of"),
        ({"txn_id_is_shared": True}, "another captured row"),
        ({"provider_txn_id": "t" * 256}, "provider_txn_id has more than 255"),
        ({"created_at": None, "updated_at": None}, "neither created_at nor updated_at"),
    ],
)
def test_a_row_that_cannot_be_imported(differing: dict[str, Any], reason: str) -> None:
    (found,) = faults(SOUND._replace(**differing))
    assert found.startswith(reason)


def test_what_failed_there_is_not_watched() -> None:
    """As declines are that a gateway may turn: nobody here was asked."""
    payment = fold(facts_of(SOUND._replace(status="FAILED"), "simulated"))
    assert payment is not None
    assert (payment.status, payment.declined, payment.unsettled) == ("FAILED", False, None)


def loosened(node: Node) -> list[str]:
    """Two sound rows in a table without constraints, and one of each kind that is not; their
    ids."""
    node.execute("DROP TABLE payments")
    node.execute(LOOSE_TABLE)
    insert(node, idempotency_key="sound", provider_txn_id=None)
    insert(node, idempotency_key=None, provider_txn_id=None)
    return [
        insert(node, idempotency_key="a", merchant_order_id=None, provider_txn_id=None),
        insert(node, idempotency_key="b", amount_cents=0, status="PENDING"),
        insert(node, idempotency_key="twice", provider_txn_id="t2"),
        insert(node, idempotency_key="twice", provider_txn_id="t3"),
        insert(node, idempotency_key="c", provider_txn_id="t4"),
        insert(node, idempotency_key="d", provider_txn_id="t4"),
        insert(node, id="17", idempotency_key="e", status=None),
        insert(node, idempotency_key="f", created_at="infinity", updated_at="-infinity"),
    ]


def test_nothing_is_imported_until_they_may_be_left_out(node: Node, payments: Command) -> None:
    bad = loosened(node)
    for arguments in ((), ("--dry-run",)):
        done = payments("import-legacy", *arguments)
        assert done.exit_code == 1
        told = [line.split()[1].rstrip(":") for line in done.stdout.splitlines()[:-1]]
        assert sorted(told) == sorted(bad)
        assert "10 rows, 8 of them cannot be imported; nothing was changed" in done.stdout
        relations = ("legacy_payments", "schema_migrations")
        for name in relations:
            assert node.execute("SELECT to_regclass(%s)", [name]).fetchone() == (None,)
    done = payments("import-legacy", "--leave-out-rows")
    assert done.exit_code == 0
    assert "imported: 2 rows of 10\nleft out: 8 rows" in done.stdout
    assert node.execute("SELECT count(*) FROM payments").fetchone() == (2,)
    assert node.execute("SELECT count(*) FROM legacy_payments").fetchone() == (10,)
    assert payments("rebuild", "--dry-run").exit_code == 0


def test_the_flag_says_what_it_means(payments: Command) -> None:
    said = " ".join(payments("import-legacy", "--help").stdout.split())
    assert "a charge with the idempotency key of such a row IS SENT TO THE PROVIDER AGAIN" in said


@pytest.mark.parametrize(
    "arguments", [("--gateway", "No Such"), ("--timezone", "Mars/Olympus"), ("--timezone", "")]
)
def test_wrong_arguments(node: Node, payments: Command, arguments: tuple[str, ...]) -> None:
    assert payments("import-legacy", *arguments).exit_code == 2
    assert node.execute("SELECT to_regclass('legacy_payments')").fetchone() == (None,)
