"""Charges at Razorpay, and processes that die around them: nothing is lost, doubled or stuck."""

import random
from collections.abc import Iterator
from pathlib import Path
from typing import Literal
from uuid import UUID

import psycopg
import pytest

from payments.database.connections import DatabaseAddress
from tests.crash.money import FAST, Customers, kill_loop
from tests.doubles.razorpay_ledger import Entity
from tests.doubles.razorpay_server import KEY_ID, KEY_SECRET, RazorpayProcess
from tests.doubles.stand_in import Fault
from tests.invariants.checker import ProviderRecord
from tests.process import ServiceProcess, at

HELD_S = 60.0  # far longer than the process lives
CENTS = 1000

# Where the process dies: each exchange that changes something, done or not.
POINTS = [
    Fault(kind, operation=operation, count=None, seconds=HELD_S)
    for operation in ("charge", "mark", "prepare", "refund")
    for kind in ("slow", "timeout")
]
# The customer's payment at Checkout, as it stands when the charge begins; None: an order is made.
PAYMENTS = (*["authorized"] * 6, None, None, None, "created", "created", "failed")


@pytest.fixture
def razorpay(tmp_path: Path) -> Iterator[RazorpayProcess]:
    with RazorpayProcess(tmp_path / "razorpay.jsonl") as running:
        yield running


def records(razorpay: RazorpayProcess) -> list[ProviderRecord]:
    """The money that moved."""
    captures = {each["id"]: (each, razorpay.our_id(each)) for each in razorpay.captures()}
    return [
        *(_record("capture", each, our_id, our_id) for each, our_id in captures.values()),
        *(
            _record("refund", each, UUID(each["receipt"]), captures[each["payment_id"]][1])
            for each in razorpay.refunds()
        ),
    ]


def _record(
    kind: Literal["capture", "refund"], entity: Entity, our_id: UUID | None, payment_id: UUID | None
) -> ProviderRecord:
    assert our_id is not None, "nobody captures what is not marked"
    assert payment_id is not None
    amount, currency = entity["amount"], entity["currency"]
    return ProviderRecord(kind, our_id, payment_id, amount, currency, entity["id"])


@pytest.mark.timeout(3600)
def test_kill_9_loop(
    address: DatabaseAddress,
    connection: psycopg.Connection[tuple[str]],
    razorpay: RazorpayProcess,
    tmp_path: Path,
    wanted_kills: int,
) -> None:
    """Again and again, at an unreliable provider: with customers who paid before, who pay when they
    are told to or never do, and whose payment fails."""
    given = {
        **at(address),
        **FAST,
        "GATEWAY": "razorpay",
        "RAZORPAY_KEY_ID": KEY_ID,
        "RAZORPAY_KEY_SECRET": KEY_SECRET,
        "RAZORPAY_API_BASE": razorpay.url,
    }
    services = [ServiceProcess(tmp_path, **given), ServiceProcess(tmp_path, **given)]
    dice = random.Random(4)

    def new_method() -> str | None:
        status = dice.choice(PAYMENTS)
        return None if status is None else razorpay.pay(CENTS, status=status)

    kill_loop(
        services,
        connection,
        razorpay,
        lambda: records(razorpay),
        wanted_kills,
        seed=5,
        points=POINTS,
        customers=Customers(new_method, razorpay.customer_acts),
    )
