"""Checks the Razorpay gateway against Razorpay's test mode, with the RAZORPAY_* of the environment.

    scripts/sandbox-check razorpay [PAYMENT [AMOUNT_CENTS [CURRENCY]]]

PAYMENT is a pay_… that was paid at Checkout in test mode, and that is authorized. It is captured,
and the least amount of it is refunded. Without one, only orders are made and read.

Exit code 0: all is as the gateway takes it to be. 1: something is not. 2: it could not be checked.
"""

import asyncio
import os
import sys
from collections.abc import Awaitable, Sequence
from typing import TypeVar
from uuid import NAMESPACE_URL, uuid4, uuid5

import click

from payments.errors import StartError
from payments.gateways import (
    BadSignature,
    NeverSent,
    Open,
    OutcomeUnknown,
    ProviderCharge,
    ProviderRefund,
)
from payments.gateways.razorpay import RazorpayGateway, build
from payments.gateways.razorpay_api import now
from payments.payment.state import Approved
from payments.setting_sources import read_settings

USAGE = "scripts/sandbox-check razorpay [PAYMENT [AMOUNT_CENTS [CURRENCY]]]"
TIMEOUT_S = 15.0
LEAST_CENTS = 100

T = TypeVar("T")


class Check:
    def __init__(self) -> None:
        self.failed = 0

    def that(self, holds: bool, text: str) -> None:
        self.failed += not holds
        click.echo(f"{'ok  ' if holds else 'FAIL'}  {text}")


def main(arguments: Sequence[str]) -> int:
    try:
        payment = _payment_of(*arguments) if arguments else None
    except (TypeError, ValueError):
        click.echo(USAGE, err=True)
        return 2
    try:
        gateway = build(read_settings(os.environ))
        return asyncio.run(_check(gateway, payment))
    except StartError as error:
        click.echo(error, err=True)
    except (OutcomeUnknown, NeverSent) as error:
        click.echo(f"Razorpay gave no outcome: {error}", err=True)
    return 2


async def _check(gateway: RazorpayGateway, payment: tuple[str, int, str] | None) -> int:
    check = Check()
    if await gateway.account(TIMEOUT_S) != "test":
        click.echo("RAZORPAY_KEY_ID is a live key: this moves money, and takes test keys", err=True)
        return 2
    try:
        findings = await gateway.findings(TIMEOUT_S)
        for finding in findings:
            check.that(not finding.bad, finding.text)
        if not any(finding.bad and "API key" in finding.text for finding in findings):
            await _check_orders(gateway, check)
            if payment is not None:
                await _check_payment(gateway, check, *payment)
        await _check_signature(gateway, check)
    finally:
        await gateway.close()
    return 1 if check.failed else 0


def _payment_of(
    payment: str, amount_cents: str = "100", currency: str = "INR"
) -> tuple[str, int, str]:
    return payment, int(amount_cents), currency


async def _check_orders(gateway: RazorpayGateway, check: Check) -> None:
    charge = ProviderCharge(payment_id=uuid4(), amount_cents=LEAST_CENTS, currency="INR")
    order_id = await gateway.prepare(charge, TIMEOUT_S)
    check.that(order_id.startswith("order_"), f"an order is made: {order_id}")
    again = await gateway.prepare(charge, TIMEOUT_S)
    check.that(again == order_id, "it is found by its receipt, and not made again")
    made = await gateway._api.make_order(charge, 12, now() + TIMEOUT_S)
    check.that(made.id == order_id, "unique_receipt makes no second order for one receipt")
    prepared = ProviderCharge(
        payment_id=charge.payment_id, amount_cents=LEAST_CENTS, currency="INR", reference=order_id
    )
    found = await gateway.find_charge(prepared, TIMEOUT_S)
    waits = isinstance(found, Open) and found.step == "action" and found.id == charge.payment_id
    check.that(waits, "the order waits for its customer, and names our id")


async def _check_payment(
    gateway: RazorpayGateway, check: Check, payment: str, amount_cents: int, currency: str
) -> None:
    """With ids of ours that follow from the payment, so that it can be checked again."""
    charge = ProviderCharge(
        payment_id=uuid5(NAMESPACE_URL, payment),
        amount_cents=amount_cents,
        currency=currency,
        payment_method=payment,
        reference=payment,
    )
    if (refusal := gateway.refuses(charge)) is not None:
        check.that(False, f"{refusal.field} {refusal.message}")
        return
    captured = await gateway.charge(charge, TIMEOUT_S)
    check.that(isinstance(captured, Approved), f"{payment} is captured: {captured}")
    if not isinstance(captured, Approved):
        return
    check.that(captured.id == charge.payment_id, "its notes name our id")
    check.that(
        await gateway.charge(charge, TIMEOUT_S) == captured, "captured again, it is the same"
    )
    check.that(await gateway.find_charge(charge, TIMEOUT_S) == captured, "it is found")
    refund = ProviderRefund(
        refund_id=uuid5(charge.payment_id, "refund"),
        payment_id=charge.payment_id,
        provider_txn_id=payment,
        amount_cents=LEAST_CENTS,
        currency=currency,
        reference=payment,
    )
    returned = await _or_unknown(gateway.refund(refund, TIMEOUT_S))
    check.that(isinstance(returned, Approved), f"it is refunded in part: {returned}")
    again = await _or_unknown(gateway.refund(refund, TIMEOUT_S))
    check.that(again == returned, "refunded again with the same key, it is the same")
    check.that(await _or_unknown(gateway.find_refund(refund, TIMEOUT_S)) == returned, "it is found")


async def _or_unknown(asking: Awaitable[T]) -> T | str:
    try:
        return await asking
    except OutcomeUnknown as error:
        return f"unknown, {error}"


async def _check_signature(gateway: RazorpayGateway, check: Check) -> None:
    try:
        await gateway.hint({"x-razorpay-signature": "0" * 64}, b"{}", TIMEOUT_S)
    except BadSignature:
        check.that(True, "a webhook that is not signed is rejected")
    else:
        check.that(False, "a webhook that is not signed is rejected")


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
