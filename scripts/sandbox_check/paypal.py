"""PayPal's sandbox, with the PAYPAL_* of the environment. It moves no real money.

    scripts/sandbox-check paypal
    .venv/bin/python -m scripts.sandbox_check.paypal [ORDER [AMOUNT_CENTS [CURRENCY]]]

ORDER is the id of an order that a sandbox customer approved, 15.00 USD if nothing else is said. It
is captured, and refunded. Without one, an order is made and read, and its address is printed: open
it as a sandbox customer, approve, and give the order's id.

Exit code 0: all of it held. 1: not all. 2: it could not run.
"""

import asyncio
import os
import sys
from collections.abc import Sequence
from datetime import UTC, datetime
from typing import NamedTuple, Protocol
from uuid import uuid4

import click
import msgspec

from payments.errors import StartError
from payments.gateways import (
    BadSignature,
    NeverSent,
    Open,
    OutcomeUnknown,
    ProviderCharge,
    ProviderRefund,
)
from payments.gateways.paypal import PayPalGateway, build
from payments.payment.state import Approved, Declined
from payments.setting_sources import read_settings
from payments.settings import Settings

USAGE = ".venv/bin/python -m scripts.sandbox_check.paypal [ORDER [AMOUNT_CENTS [CURRENCY]]]"
TIMEOUT_S = 20.0
RETURN_URL = "https://example.com/paid"


class Options(Protocol):
    """What `scripts/sandbox-check` was told for any provider."""

    @property
    def currency(self) -> str: ...


class Report(Protocol):
    """Where it is said what held."""

    def held(self, what: str, held: bool, found: object) -> bool: ...

    def skipped(self, what: str, why: str) -> None: ...


class Asked(NamedTuple):
    """`order` is the id of one that was approved, of this amount."""

    order: str | None = None
    amount_cents: int = 1500
    currency: str = "USD"


class Printed:
    """Prints a line for each thing that was checked."""

    def __init__(self) -> None:
        self.failed = 0

    def held(self, what: str, held: bool, found: object) -> bool:
        self.failed += not held
        click.echo(f"{'ok  ' if held else 'FAIL'}  {what}: {found}")
        return held

    def skipped(self, what: str, why: str) -> None:
        click.echo(f"skip  {what}: {why}")


async def check(settings: Settings, options: Options, report: Report) -> None:
    """Without an approved order. Raises StartError for live credentials, OutcomeUnknown or
    NeverSent."""
    await _check(settings, Asked(currency=options.currency), report)


async def _check(settings: Settings, asked: Asked, report: Report) -> None:
    if settings.paypal_environment != "sandbox":
        raise StartError("PAYPAL_ENVIRONMENT must be sandbox: live credentials are not checked")
    gateway = build(settings)
    try:
        for finding in await gateway.findings(TIMEOUT_S):
            report.held("settings", not finding.bad, finding.text)
        account = await gateway.account(TIMEOUT_S)
        report.held("account", account is not None, account)
        await _order(gateway, report, asked)
        await _webhook(gateway, report)
        if asked.order is None:
            report.skipped("capture and refund", f"no approved order was given: {USAGE}")
        else:
            await _capture_and_refund(gateway, report, asked)
    finally:
        await gateway.close()


async def _made(gateway: PayPalGateway, asked: Asked) -> ProviderCharge:
    charge = ProviderCharge(
        payment_id=uuid4(), amount_cents=asked.amount_cents, currency=asked.currency
    )
    if (refusal := gateway.refuses(charge)) is not None:
        raise StartError(f"{refusal.field} {refusal.message}")
    reference = await gateway.prepare(charge, TIMEOUT_S)
    return msgspec.structs.replace(charge, reference=reference)


async def _order(gateway: PayPalGateway, report: Report, asked: Asked) -> None:
    charge = await _made(gateway, asked)
    again = await gateway.prepare(charge, TIMEOUT_S)
    report.held("the same key makes the same order", again == charge.reference, again)
    found = await gateway.find_charge(charge, TIMEOUT_S)
    waits = isinstance(found, Open) and found.step == "action" and found.id == charge.payment_id
    report.held("an order waits for the customer", waits, found)
    closed = await gateway.cancel(charge, TIMEOUT_S)
    report.held("and can be closed", isinstance(closed, Declined), closed)
    after = await gateway.find_charge(charge, TIMEOUT_S)
    report.held("and stays closed", after == closed, after)
    other = msgspec.structs.replace(await _made(gateway, asked), return_url=RETURN_URL)
    told = await gateway.charge(other, TIMEOUT_S)
    action = told.action if isinstance(told, Open) else None
    if report.held("it is told where the customer returns to", action is not None, told):
        assert action is not None
        click.echo(f"      approve {action.fields['url']} and give {other.reference}")


async def _webhook(gateway: PayPalGateway, report: Report) -> None:
    forged = {
        "paypal-auth-algo": "SHA256withRSA",
        "paypal-cert-url": "https://api.sandbox.paypal.com/v1/notifications/certs/CERT-none",
        "paypal-transmission-id": str(uuid4()),
        "paypal-transmission-sig": "bm8gc2lnbmF0dXJl",
        "paypal-transmission-time": datetime.now(UTC).strftime("%Y-%m-%dT%H:%M:%SZ"),
    }
    try:
        hint = await gateway.hint(forged, b'{"id":"WH-1"}', TIMEOUT_S)
    except BadSignature as error:
        report.held("a forged webhook is not believed", True, error)
    else:
        report.held("a forged webhook is not believed", False, hint)


async def _capture_and_refund(gateway: PayPalGateway, report: Report, asked: Asked) -> None:
    charge = ProviderCharge(
        payment_id=uuid4(),
        amount_cents=asked.amount_cents,
        currency=asked.currency,
        payment_method=asked.order,
        reference=asked.order,
    )
    found = await gateway.find_charge(charge, TIMEOUT_S)
    ready = isinstance(found, Open) and found.step == "ready"
    if not report.held("the order is approved", ready, found):
        return
    assert isinstance(found, Open)
    charge = msgspec.structs.replace(charge, payment_id=found.id)  # of the run that made it
    capture = await gateway.charge(charge, TIMEOUT_S)
    if not report.held("it is captured", isinstance(capture, Approved), capture):
        return
    assert isinstance(capture, Approved)
    stated = (capture.id, capture.amount_cents, capture.currency)
    wanted = (charge.payment_id, charge.amount_cents, charge.currency)
    report.held("for this payment and amount", stated == wanted, stated)
    again = await gateway.charge(charge, TIMEOUT_S)
    report.held("charging again is the same capture", again == capture, again)
    refund = ProviderRefund(
        refund_id=uuid4(),
        payment_id=charge.payment_id,
        provider_txn_id=capture.provider_txn_id,
        amount_cents=charge.amount_cents,
        currency=charge.currency,
        reference=charge.reference,
    )
    none = await gateway.find_refund(refund, TIMEOUT_S)
    report.held("a refund that was not made is not found", none is None, none)
    back = await gateway.refund(refund, TIMEOUT_S)
    report.held("it is refunded", isinstance(back, Approved), back)
    twice = await gateway.refund(refund, TIMEOUT_S)
    listed = await gateway.find_refund(refund, TIMEOUT_S)
    report.held("once, and listed at once", back == twice == listed, listed)


def _asked(order: str, amount_cents: str = "1500", currency: str = "USD") -> Asked:
    """Raises TypeError or ValueError."""
    return Asked(order, int(amount_cents), currency)


def main(arguments: Sequence[str]) -> int:
    """The exit code."""
    try:
        asked = _asked(*arguments) if arguments else Asked()
    except (TypeError, ValueError):
        click.echo(f"usage: {USAGE}", err=True)
        return 2
    report = Printed()
    try:
        asyncio.run(_check(read_settings(os.environ), asked, report))
    except StartError as error:
        click.echo(str(error), err=True)
        return 2
    except (OutcomeUnknown, NeverSent) as error:
        click.echo(f"PayPal gave no outcome: {error}", err=True)
        return 2
    click.echo(f"{report.failed} did not hold" if report.failed else "all of it held")
    return 1 if report.failed else 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
