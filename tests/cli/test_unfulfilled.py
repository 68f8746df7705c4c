"""`payments callbacks list --unfulfilled`, and what `payments explain` says of an order."""

import csv
import io
import json
from collections.abc import Callable
from datetime import UTC, datetime, timedelta
from typing import Any

import psycopg
import pytest
from click.testing import Result

from payments.cli.unfulfilled import IN_THE_TABLE
from payments.payment.state import Status
from payments.queries.fulfilments import Unfulfilled
from payments.queries.payments import PaymentView
from tests.queries.rows import insert, insert_fulfilment, view
from tests.support import History, append

Connection = psycopg.Connection[Any]
Operator = Callable[..., Result]

NOW = datetime.now(UTC)
LIST = ("callbacks", "list", "--unfulfilled")


@pytest.fixture
def listed(connection: Connection) -> list[PaymentView]:
    """One of each state, the oldest first, and one that was refunded."""
    payments = [view(NOW) for _ in range(4)] + [view(NOW, status=Status.REFUNDED)]
    insert(connection, payments)
    told = (
        ("unfulfilled", "failed", "FAILED", None),
        ("paid_twice", "already_processed", "CONFIRMED", None),
        ("suspect", "failed", None, "=503"),
        ("given_back", "failed", "FAILED", None),
        ("unfulfilled", "failed", "FAILED", None),
    )
    for age, (payment, (state, said, order_status, problem)) in enumerate(
        zip(payments, told, strict=True)
    ):
        insert_fulfilment(
            *(connection, payment, state, said),
            order_status=order_status,
            problem=problem,
            found_at=NOW - timedelta(hours=9 - age),
        )
    return payments


def test_the_list(operator: Operator, listed: list[PaymentView]) -> None:
    done = operator(*LIST)
    assert (done.exit_code, done.stderr) == (0, "")
    header, *lines = done.stdout.splitlines()
    assert header.split() == list(IN_THE_TABLE)
    assert [line.split()[:5] for line in lines] == [
        [str(payment.id), str(payment.merchant_order_id), state, "15.00", "INR"]
        for payment, state in zip(listed, ("unfulfilled", "paid_twice", "suspect"), strict=False)
    ]
    order = operator(*LIST, "--order", listed[1].merchant_order_id)
    assert [line.split()[0] for line in order.stdout.splitlines()[1:]] == [str(listed[1].id)]
    given_back = operator("callbacks", "list", "--given-back")
    assert [line.split()[0] for line in given_back.stdout.splitlines()[1:]] == [str(listed[3].id)]


def test_the_list_for_programs(operator: Operator, listed: list[PaymentView]) -> None:
    done = operator(*LIST, "--format", "json", "--limit", 2)
    assert (done.exit_code, done.stderr) == (
        0,
        "only the first 2 (--limit) are shown; there are more\n",
    )
    found = json.loads(done.stdout)
    assert [each["payment_id"] for each in found] == [str(each.id) for each in listed[:2]]
    assert list(found[0]) == list(Unfulfilled.__struct_fields__)
    assert (found[0]["amount_cents"], found[0]["currency"]) == (1500, "INR")
    in_csv = list(csv.DictReader(io.StringIO(operator(*LIST, "--format", "csv").stdout)))
    assert [row["payment_id"] for row in in_csv] == [str(each.id) for each in listed[:3]]
    assert in_csv[2]["problem"] == "'=503"  # no formula
    assert in_csv[0]["checked_at"] == ""


def test_callbacks_as_csv(operator: Operator) -> None:
    done = operator("callbacks", "list", "--format", "csv")
    assert done.stdout.startswith("event_id,order_id,payment_id,status,")


@pytest.mark.parametrize(
    ("url", "words"),
    [
        (None, "set ORDER_STATUS_URL to find out: docs/order-service.md"),
        ("http://127.0.0.1:1/{order_id}", "requests it from ORDER_STATUS_URL"),
    ],
)
def test_what_nobody_can_judge_is_said(
    operator: Operator,
    connection: Connection,
    monkeypatch: pytest.MonkeyPatch,
    url: str | None,
    words: str,
) -> None:
    if url is not None:
        monkeypatch.setenv("ORDER_STATUS_URL", url)
    payments = [view(NOW) for _ in range(3)]
    insert(connection, payments)
    for payment, said in zip(payments, ("nothing", "repeated", "nothing"), strict=True):
        insert_fulfilment(connection, payment, "suspect", said)
    done = operator(*LIST)
    assert len(done.stdout.splitlines()) == 1
    (line,) = done.stderr.splitlines()
    assert line.startswith("not listed: 3 payments whose order status is not known")
    assert words in line
    assert json.loads(operator(*LIST, "--format", "json").stdout) == []


@pytest.mark.parametrize(
    "others", [("--due",), ("--dead",), ("--given-back",), ("--due", "--order", str(NOW.year))]
)
def test_one_list_at_a_time(operator: Operator, others: tuple[str, ...]) -> None:
    done = operator(*LIST, *others)
    assert (done.exit_code, done.stdout) == (2, "")


def test_explain(operator: Operator, connection: Connection) -> None:
    history = History("k").charged()
    append(connection, history.facts)
    before = operator("explain", history.id, "--format", "json")
    assert json.loads(before.stdout)["fulfilment"] is None
    assert "\norder: " not in operator("explain", history.id).stdout
    payment = view(NOW, id=history.id)
    insert(connection, [payment])
    insert_fulfilment(connection, payment, "unfulfilled", "failed", order_status="CAN\nCELLED")
    told = json.loads(operator("explain", history.id, "--format", "json").stdout)["fulfilment"]
    assert (told["state"], told["said"], told["checked_at"]) == ("unfulfilled", "failed", None)
    line = operator("explain", history.id).stdout.splitlines()[-1]
    assert line.startswith("order: paid, but not fulfilled, found ")
    assert r"status: CAN\nCELLED, status not requested yet" in line
