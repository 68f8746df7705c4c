"""Stripe's test mode. It moves no money, and leaves some test payments in the account."""

import asyncio
from uuid import uuid4

import msgspec

from payments.errors import StartError
from payments.gateways import BadSignature, Open, ProviderCharge, ProviderRefund
from payments.gateways.stripe import StripeGateway, build
from payments.gateways.stripe_account import checked_key
from payments.payment.state import Approved, Declined
from payments.settings import Settings
from scripts.sandbox_check import Options, Report, webhooks

TIMEOUT_S = 20.0
WEBHOOK_WAIT_S = 30.0
RETURN_URL = "https://example.com/paid"
AMOUNT, PART = 1500, 600
FORWARDING = "run `stripe listen --forward-to 127.0.0.1:PORT`, and give --webhooks PORT"


async def check(settings: Settings, options: Options, report: Report) -> None:
    if options.payment is not None:
        raise StartError("PAYMENT must be left out for stripe: the check makes its own payments")
    _, mode = checked_key(settings)
    if mode != "test":
        raise StartError("STRIPE_SECRET_KEY is a live key: this check needs one of the test mode")
    gateway = build(settings)
    try:
        await _Check(gateway, options.currency, report).run()
        await _webhooks(gateway, settings, options, report)
    finally:
        await gateway.close()


class _Check:
    def __init__(self, gateway: StripeGateway, currency: str, report: Report) -> None:
        self._gateway = gateway
        self._currency = currency
        self._report = report

    async def run(self) -> None:
        account = await self._gateway.account(TIMEOUT_S)
        self._report.held("account", account is not None, account)
        for finding in await self._gateway.findings(TIMEOUT_S):
            self._report.held("settings", not finding.bad, finding.text)
        await self._charge_and_refund()
        await self._decline()
        await self._action()
        least = await self._gateway.prepare(self.asked("pm_card_visa", amount=1), TIMEOUT_S)
        held = isinstance(least, Declined)
        self._report.held("an amount below the least one is declined", held, least)

    async def _charge_and_refund(self) -> None:
        charge = await self.prepared(self.asked("pm_card_visa"))
        again = await self._gateway.prepare(charge, TIMEOUT_S)
        self._report.held("preparing again is the same", again == charge.reference, again)
        capture = await self._gateway.charge(charge, TIMEOUT_S)
        expected = Approved(
            id=charge.payment_id,
            amount_cents=AMOUNT,
            currency=self._currency,
            provider_txn_id=charge.reference or "",
        )
        if not self._report.held("a charge is captured", capture == expected, capture):
            return
        again_ = await self._gateway.charge(charge, TIMEOUT_S)
        self._report.held("charging again is the same capture", again_ == capture, again_)
        found = await self._gateway.find_charge(charge, TIMEOUT_S)
        self._report.held("it is found", found == capture, found)
        part = self._refund(charge, PART)
        none = await self._gateway.find_refund(part, TIMEOUT_S)
        self._report.held("a refund that was not made is not found", none is None, none)
        back = await self._gateway.refund(part, TIMEOUT_S)
        self._report.held("a part is refunded", isinstance(back, Approved), back)
        twice = await self._gateway.refund(part, TIMEOUT_S)
        listed = await self._gateway.find_refund(part, TIMEOUT_S)
        self._report.held("once, and listed at once", back == twice == listed, listed)
        beyond = await self._gateway.refund(self._refund(charge, AMOUNT), TIMEOUT_S)
        held = isinstance(beyond, Declined)
        self._report.held("more than the rest is declined", held, beyond)

    async def _decline(self) -> None:
        charge = await self.prepared(self.asked("pm_card_chargeDeclined"))
        first = await self._gateway.charge(charge, TIMEOUT_S)
        self._report.held("a card is declined", first == Declined("generic_decline"), first)
        found = await self._gateway.find_charge(charge, TIMEOUT_S)
        self._report.held("the decline is found", found == first, found)
        again = await self._gateway.charge(charge, TIMEOUT_S)
        self._report.held("and stays, now that it is cancelled", again == first, again)

    async def _action(self) -> None:
        method = "pm_card_threeDSecure2Required"
        charge = await self.prepared(self.asked(method, return_url=RETURN_URL))
        open_ = await self._gateway.charge(charge, TIMEOUT_S)
        held = isinstance(open_, Open) and open_.action is not None
        self._report.held("3-D Secure has the customer act", held, open_)
        ended = await self._gateway.cancel(charge, TIMEOUT_S)
        self._report.held("and can be cancelled", isinstance(ended, Declined), ended)
        alone = await self.prepared(self.asked(method))
        declined = await self._gateway.charge(alone, TIMEOUT_S)
        held = declined == Declined("authentication_required")
        self._report.held("without a return_url it is declined", held, declined)

    def asked(
        self, method: str, *, amount: int = AMOUNT, return_url: str | None = None
    ) -> ProviderCharge:
        return ProviderCharge(
            payment_id=uuid4(),
            amount_cents=amount,
            currency=self._currency,
            payment_method=method,
            return_url=return_url,
        )

    async def prepared(self, charge: ProviderCharge) -> ProviderCharge:
        refusal = self._gateway.refuses(charge)
        if refusal is not None:
            raise StartError(f"--currency: {refusal.field} {refusal.message}")
        reference = await self._gateway.prepare(charge, TIMEOUT_S)
        if isinstance(reference, Declined):
            raise StartError(f"--currency: the account does not take it ({reference.code})")
        return msgspec.structs.replace(charge, reference=reference)

    def _refund(self, charge: ProviderCharge, amount_cents: int) -> ProviderRefund:
        return ProviderRefund(
            refund_id=uuid4(),
            payment_id=charge.payment_id,
            provider_txn_id=charge.reference or "",
            amount_cents=amount_cents,
            currency=charge.currency,
            reference=charge.reference,
        )


async def _webhooks(
    gateway: StripeGateway, settings: Settings, options: Options, report: Report
) -> None:
    """That of a charge is received, verified, and names it."""
    if options.webhooks is None or not settings.stripe_webhook_secrets:
        why = FORWARDING if options.webhooks is None else "STRIPE_WEBHOOK_SECRETS is not set"
        report.skipped("webhooks", why)
        return
    receiving = asyncio.create_task(webhooks(options.webhooks, 2, WEBHOOK_WAIT_S))
    await asyncio.sleep(0.1)
    checking = _Check(gateway, options.currency, report)
    made = await checking.prepared(checking.asked("pm_card_visa"))
    await gateway.charge(made, TIMEOUT_S)
    references: list[str | None] = []
    for headers, body in await receiving:
        try:
            hint = await gateway.hint(headers, body, TIMEOUT_S)
        except BadSignature as error:
            report.held("a webhook is verified", False, error)
            continue
        references.append(hint.reference if hint is not None else None)
    report.held("a webhook names the charge", made.reference in references, references)
