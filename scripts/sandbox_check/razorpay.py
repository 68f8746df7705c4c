"""Razorpay's test mode. It moves no money, and leaves some test orders in the account.

Only a customer makes payments: one that was paid at Checkout with a test card, and is authorized,
is captured if its id is given, and 1.00 of it is refunded. It can be checked again.
"""

from collections.abc import Awaitable
from uuid import NAMESPACE_URL, uuid4, uuid5

import msgspec

from payments.errors import StartError
from payments.gateways import (
    BadSignature,
    Open,
    OutcomeUnknown,
    ProviderCharge,
    ProviderRefund,
)
from payments.gateways.razorpay import EXPIRY_MIN, PAYMENT_ID, RazorpayGateway, build
from payments.gateways.razorpay_api import RazorpayApi, now
from payments.gateways.razorpay_entities import RazorpayOrder, cents
from payments.payment.state import Approved, Declined
from payments.settings import Settings
from scripts.sandbox_check import Options, Report, webhooks

TIMEOUT_S = 20.0
WEBHOOK_WAIT_S = 120.0
LEAST = 100
PAY = "give the id (pay_…) of an authorized payment that was made at Checkout"
FORWARDING = (
    "give --webhooks PORT, and have a tunnel bring the webhooks of the dashboard there; then pay"
)


async def check(settings: Settings, options: Options, report: Report) -> None:
    if (settings.razorpay_key_id or "").startswith("rzp_live_"):
        raise StartError("RAZORPAY_KEY_ID is a live key: this check needs one of the test mode")
    if options.payment is not None and not PAYMENT_ID.fullmatch(options.payment):
        raise StartError("PAYMENT must be the id of a payment at Razorpay: pay_…")
    gateway = build(settings)
    try:
        findings = await gateway.findings(TIMEOUT_S)
        for finding in findings:
            report.held("settings", not finding.bad, finding.text)
        if any(finding.bad and "API key" in finding.text for finding in findings):
            return
        await _orders(gateway, options.currency, report)
        if options.payment is not None:
            await _payment(gateway, options.payment, report)
        else:
            report.skipped("capture and refund", PAY)
        await _webhooks(gateway, options, report)
    finally:
        await gateway.close()


async def _orders(gateway: RazorpayGateway, currency: str, report: Report) -> None:
    charge = ProviderCharge(payment_id=uuid4(), amount_cents=LEAST, currency=currency)
    order_id = await gateway.prepare(charge, TIMEOUT_S)
    if isinstance(order_id, Declined):
        raise StartError(f"--currency: the account does not take it ({order_id.code})")
    report.held("an order is made", order_id.startswith("order_"), order_id)
    again = await gateway.prepare(charge, TIMEOUT_S)
    report.held("it is found by its receipt", again == order_id, again)
    api: RazorpayApi = gateway._api
    second = await api.make_order(charge, EXPIRY_MIN, now() + TIMEOUT_S)
    same = isinstance(second, RazorpayOrder) and second.id == order_id
    report.held("unique_receipt makes no second one", same, second)
    found = await gateway.find_charge(
        msgspec.structs.replace(charge, reference=order_id), TIMEOUT_S
    )
    waits = isinstance(found, Open) and (found.id, found.step) == (charge.payment_id, "action")
    report.held("it waits for its customer, and has our id", waits, found)


async def _payment(gateway: RazorpayGateway, payment_id: str, report: Report) -> None:
    """With ids of ours that follow from it, so that it can be checked again."""
    api: RazorpayApi = gateway._api
    payment = await api.payment(payment_id, now() + TIMEOUT_S)
    charge = ProviderCharge(
        payment_id=uuid5(NAMESPACE_URL, payment_id),
        amount_cents=cents(payment),
        currency=payment.currency,
        payment_method=payment_id,
        reference=payment_id,
    )
    other = msgspec.structs.replace(charge, amount_cents=charge.amount_cents + LEAST)
    if payment.status == "authorized":
        differs = await gateway.charge(other, TIMEOUT_S)
        report.held("another amount is declined", differs == Declined("amount_differs"), differs)
    capture = await gateway.charge(charge, TIMEOUT_S)
    held = isinstance(capture, Approved) and capture.id == charge.payment_id
    if not report.held("the payment is captured, and marked", held, capture):
        return
    again = await gateway.charge(charge, TIMEOUT_S)
    report.held("captured again it is the same", again == capture, again)
    found = await gateway.find_charge(charge, TIMEOUT_S)
    report.held("the capture is found", found == capture, found)
    refund = ProviderRefund(
        refund_id=uuid5(charge.payment_id, "refund"),
        payment_id=charge.payment_id,
        provider_txn_id=payment_id,
        amount_cents=LEAST,
        currency=payment.currency,
        reference=payment_id,
    )
    returned = await _known(gateway.refund(refund, TIMEOUT_S))
    report.held("it is refunded in part", isinstance(returned, Approved), returned)
    again_returned = await _known(gateway.refund(refund, TIMEOUT_S))
    report.held("refunded again it is the same", again_returned == returned, again_returned)
    found_refund = await _known(gateway.find_refund(refund, TIMEOUT_S))
    report.held("the refund is found", found_refund == returned, found_refund)


async def _known(asking: Awaitable[Approved | Declined | None]) -> object:
    """One that is under way is reported, and does not end the check."""
    try:
        return await asking
    except OutcomeUnknown as error:
        return f"unknown: {error}"


async def _webhooks(gateway: RazorpayGateway, options: Options, report: Report) -> None:
    try:
        await gateway.hint({"x-razorpay-signature": "0" * 64}, b"{}", TIMEOUT_S)
    except BadSignature as error:
        report.held("an unsigned webhook is rejected", True, error)
    else:
        report.held("an unsigned webhook is rejected", False, "it was accepted")
    if options.webhooks is None:
        report.skipped("webhooks", FORWARDING)
        return
    found = await webhooks(options.webhooks, 1, WEBHOOK_WAIT_S)
    report.held("a webhook arrives", bool(found), len(found))
    for headers, raw_body in found:
        try:
            hint = await gateway.hint(headers, raw_body, TIMEOUT_S)
        except BadSignature as error:
            report.held("its signature", False, error)
        else:
            report.held("its signature", True, hint)
