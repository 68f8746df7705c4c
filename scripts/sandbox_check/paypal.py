"""PayPal's sandbox. It moves no real money, and leaves some orders there that expire.

Without PAYMENT an order is made and read, and its address is printed: open it as a sandbox
customer, approve, and give the order's id. It is captured, and refunded.
"""

from datetime import UTC, datetime
from uuid import uuid4

import click
import msgspec

from payments.errors import StartError
from payments.gateways import BadSignature, Open, ProviderCharge, ProviderRefund
from payments.gateways.paypal import PayPalGateway, build
from payments.gateways.paypal_api import ORDERS, PayPalCall
from payments.gateways.paypal_orders import ORDER_ID, read_order
from payments.gateways.units import from_paypal
from payments.payment.state import Approved, Declined
from payments.settings import Settings
from scripts.sandbox_check import Options, Report

TIMEOUT_S = 20.0
AMOUNT = 1500
RETURN_URL = "https://example.com/paid"
APPROVE = "give the id of an order that a sandbox customer approved"


async def check(settings: Settings, options: Options, report: Report) -> None:
    if settings.paypal_environment != "sandbox":
        raise StartError("PAYPAL_ENVIRONMENT must be sandbox: live credentials are not checked")
    if options.payment is not None and not ORDER_ID.fullmatch(options.payment):
        raise StartError("PAYMENT must be the id of a PayPal order, as 5O190127TN364715T")
    gateway = build(settings)
    try:
        for finding in await gateway.findings(TIMEOUT_S):
            report.held("settings", not finding.bad, finding.text)
        account = await gateway.account(TIMEOUT_S)
        report.held("account", account is not None, account)
        await _order(gateway, options.currency, report)
        await _webhook(gateway, report)
        if options.payment is None:
            report.skipped("capture and refund", APPROVE)
        else:
            await _capture_and_refund(gateway, options.payment, report)
    finally:
        await gateway.close()


async def _made(gateway: PayPalGateway, currency: str) -> ProviderCharge:
    charge = ProviderCharge(payment_id=uuid4(), amount_cents=AMOUNT, currency=currency)
    if (refusal := gateway.refuses(charge)) is not None:
        raise StartError(f"--currency: {refusal.field} {refusal.message}")
    reference = await gateway.prepare(charge, TIMEOUT_S)
    if isinstance(reference, Declined):
        raise StartError(f"--currency: the account does not take it ({reference.code})")
    return msgspec.structs.replace(charge, reference=reference)


async def _order(gateway: PayPalGateway, currency: str, report: Report) -> None:
    charge = await _made(gateway, currency)
    again = await gateway.prepare(charge, TIMEOUT_S)
    report.held("the same key makes the same order", again == charge.reference, again)
    found = await gateway.find_charge(charge, TIMEOUT_S)
    waits = isinstance(found, Open) and found.step == "action" and found.id == charge.payment_id
    report.held("an order waits for the customer", waits, found)
    closed = await gateway.cancel(charge, TIMEOUT_S)
    report.held("and can be closed", isinstance(closed, Declined), closed)
    after = await gateway.find_charge(charge, TIMEOUT_S)
    report.held("and stays closed", after == closed, after)
    other = msgspec.structs.replace(await _made(gateway, currency), return_url=RETURN_URL)
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


async def _approved(gateway: PayPalGateway, order_id: str) -> ProviderCharge:
    """A charge of what the order states."""
    response = await PayPalCall(gateway._http, TIMEOUT_S).ask("GET", f"{ORDERS}/{order_id}")
    amount = read_order(response, order_id).unit.amount
    if amount is None:
        raise StartError("PAYMENT must be an order with an amount")
    try:
        amount_cents = from_paypal(amount.value, amount.currency_code)
    except ValueError as error:
        raise StartError(f"PAYMENT is an order whose amount {error}") from None
    return ProviderCharge(
        payment_id=uuid4(),
        amount_cents=amount_cents,
        currency=amount.currency_code,
        payment_method=order_id,
        reference=order_id,
    )


async def _capture_and_refund(gateway: PayPalGateway, order_id: str, report: Report) -> None:
    charge = await _approved(gateway, order_id)
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
