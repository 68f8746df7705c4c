"""The service dies again and again while it charges and refunds at Stripe."""

import random
import uuid
from pathlib import Path
from typing import Any

import psycopg
import pytest

from payments.database.connections import DatabaseAddress
from tests.crash.money import FAST, Customers, kill_loop
from tests.doubles.stand_in import Fault
from tests.doubles.stripe_server import SECRET_KEY, StripeProcess
from tests.invariants.checker import ProviderRecord
from tests.process import ServiceProcess, at

METHODS = ("pm_card_visa", "pm_card_visa", "pm_card_visa", "pm_card_chargeDeclined")
HELD_S = 60.0  # far longer than the process lives

# Where the process dies: each exchange that changes something, done or not.
POINTS = [
    Fault(kind, operation=operation, count=None, seconds=HELD_S)
    for operation in ("prepare", "charge", "refund")
    for kind in ("slow", "timeout")
]


def records(stripe: StripeProcess) -> list[ProviderRecord]:
    """The money that it moved, in INR."""
    moved, found = stripe.moved(), []
    intents = {each["id"]: each for each in moved if each["object"] == "payment_intent"}
    for each in moved:
        refund = each["object"] == "refund"
        intent = intents[each["payment_intent"]] if refund else each
        payment_id = uuid.UUID(intent["metadata"]["payment_id"])
        our_id = uuid.UUID(each["metadata"]["refund_id"]) if refund else payment_id
        kind: Any = "refund" if refund else "capture"
        amount_cents, currency = each["amount"], each["currency"].upper()
        record = ProviderRecord(kind, our_id, payment_id, amount_cents, currency, each["id"])
        found.append(record)
    return found


@pytest.mark.timeout(3600)
def test_kill_9_loop(
    address: DatabaseAddress,
    connection: psycopg.Connection[tuple[str]],
    tmp_path: Path,
    wanted_kills: int,
) -> None:
    """Again and again, at an unreliable Stripe; a fourth of the cards is declined."""
    with StripeProcess(tmp_path / "stripe.jsonl") as stripe:
        given = {
            "GATEWAY": "stripe",
            "STRIPE_SECRET_KEY": SECRET_KEY,
            "STRIPE_API_BASE": stripe.url,
        }
        services = [ServiceProcess(tmp_path, **at(address), **FAST, **given) for _ in range(2)]
        dice = random.Random(8)
        kill_loop(
            services,
            connection,
            stripe,
            lambda: records(stripe),
            wanted_kills,
            seed=3,
            points=POINTS,
            customers=Customers(lambda: dice.choice(METHODS)),
        )
