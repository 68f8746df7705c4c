"""PayPal, and a service that dies again and again around it: nothing is lost, doubled or stuck."""

import random
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Literal
from uuid import UUID

import psycopg
import pytest

from payments.database.connections import DatabaseAddress
from payments.gateways.units import from_paypal
from tests.crash.money import FAST, Customers, kill_loop
from tests.doubles.paypal_ledger import Payment
from tests.doubles.paypal_server import CLIENT_ID, CLIENT_SECRET, PayPalProcess
from tests.doubles.stand_in import Fault
from tests.invariants.checker import ProviderRecord
from tests.process import ServiceProcess, at

HELD_S = 60.0  # far longer than the process lives

# Where the process dies: each exchange that changes something, done or not.
POINTS = [
    Fault(kind, operation=operation, count=None, seconds=HELD_S)
    for operation in ("charge", "claim", "prepare", "refund")
    for kind in ("slow", "timeout")
]
FITS = {"value": "10.00", "currency": "INR"}

# The payment method of a charge, or the order that the customer made; None: the service makes one.
METHODS: tuple[str | dict[str, Any] | None, ...] = (
    *[FITS] * 8,
    *[None] * 3,
    "vault:8kk8451t",
    FITS | {"status": "CREATED"},
    FITS | {"value": "10.01"},
    FITS | {"rejects": "INSTRUMENT_DECLINED"},
    FITS | {"outcome": "DECLINED"},
)


@pytest.fixture
def paypal(tmp_path: Path) -> Iterator[PayPalProcess]:
    with PayPalProcess(tmp_path / "paypal.jsonl") as running:
        yield running


def records(paypal: PayPalProcess) -> list[ProviderRecord]:
    """The money that PayPal moved."""
    payment_of = {each.id: UUID(each.custom_id) for each in paypal.captures()}

    def record(
        kind: Literal["capture", "refund"], each: Payment, payment_id: UUID
    ) -> ProviderRecord:
        amount_cents = from_paypal(each.value, each.currency)
        our_id = UUID(each.custom_id)
        return ProviderRecord(kind, our_id, payment_id, amount_cents, each.currency, each.id)

    captures = [record("capture", each, payment_of[each.id]) for each in paypal.captures()]
    refunds = [record("refund", each, payment_of[each.capture_id]) for each in paypal.refunds()]
    return [*captures, *refunds]


@pytest.mark.timeout(3600)
def test_kill_9_loop(
    address: DatabaseAddress,
    connection: psycopg.Connection[tuple[str]],
    paypal: PayPalProcess,
    tmp_path: Path,
    wanted_kills: int,
) -> None:
    """At an unreliable PayPal: with customers who approved before, who approve when they are told
    to or never do, with saved payment methods, and with orders that are declined or do not fit."""
    given = {
        **at(address),
        **FAST,
        "GATEWAY": "paypal",
        "PAYPAL_API_BASE": paypal.url,
        "PAYPAL_ENVIRONMENT": "sandbox",
        "PAYPAL_CLIENT_ID": CLIENT_ID,
        "PAYPAL_CLIENT_SECRET": CLIENT_SECRET,
    }
    paypal.set(approves=False)
    services = [ServiceProcess(tmp_path, **given), ServiceProcess(tmp_path, **given)]
    dice = random.Random(6)

    def new_method() -> str | None:
        method = dice.choice(METHODS)
        return method if isinstance(method, str | None) else paypal.make_order(**method)

    kill_loop(
        services,
        connection,
        paypal,
        lambda: records(paypal),
        wanted_kills,
        seed=7,
        points=POINTS,
        customers=Customers(new_method, lambda payment_id, _: paypal.customer_acts(payment_id)),
    )
