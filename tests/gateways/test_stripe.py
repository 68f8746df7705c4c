"""The Stripe gateway: what each status and each error becomes, and the known traps of payments.

The conformance suite is in test_stripe_conformance.py.
"""

import asyncio
import time
from typing import Any
from uuid import uuid4

import msgspec
import pytest
from loguru import logger

from payments.gateways import (
    NeverSent,
    NextAction,
    Open,
    OutcomeUnknown,
    ProviderCharge,
    ProviderRefund,
    ReferenceNotFound,
)
from payments.gateways.stripe import DAY_S, StripeGateway
from payments.payment.state import Approved, Declined
from tests.doubles.stand_in import Fault
from tests.doubles.stripe_flows import ACTION, ACTION_DECLINED, DECLINES, PROCESSING
from tests.doubles.stripe_server import (
    StripeProcess,
)
from tests.gateways.conformance import WAIT_S, begun, charge_of, refund_of
from tests.gateways.stripes import (
    PUBLISHABLE_KEY,
    RETURN_URL,
    check_official,
    hint_of,
    opened_gateway,
)

pytestmark = pytest.mark.anyio


@pytest.fixture
def gateway(stripe_gateway: StripeGateway) -> StripeGateway:
    return stripe_gateway


def with_method(
    method: str | None = "pm_card_visa", return_url: str | None = None, **more: Any
) -> ProviderCharge:
    charge = charge_of(payment_method=method, **more)
    return msgspec.structs.replace(charge, return_url=return_url)


async def charged(
    gateway: StripeGateway, method: str = "pm_card_visa", return_url: str | None = None
) -> tuple[ProviderCharge, Approved | Declined | Open]:
    charge = await begun(gateway, with_method(method, return_url))
    return charge, await gateway.charge(charge, WAIT_S)


async def sold(gateway: StripeGateway) -> tuple[ProviderCharge, Approved]:
    charge, capture = await charged(gateway)
    assert isinstance(capture, Approved)
    return charge, capture


def object_of(stripe: StripeProcess, id: str | None) -> dict[str, Any]:
    (found,) = [each for line in stripe.lines() for each in line.objects if each["id"] == id][-1:]
    return found


class TestStatuses:
    @pytest.mark.parametrize(
        ("status", "fields", "expected"),
        [
            ("succeeded", {"amount_received": 1500}, "approved"),
            ("requires_confirmation", {}, "ready"),
            ("requires_payment_method", {}, "ready"),
            ("processing", {}, "processing"),
            ("canceled", {"cancellation_reason": "duplicate"}, "duplicate"),
            ("canceled", {"cancellation_reason": None}, "canceled"),
            ("requires_capture", {"amount_capturable": 1500}, "unknown"),
            ("requires_reauthorization", {}, "unknown"),
        ],
    )
    async def test_of_an_intent(
        self,
        gateway: StripeGateway,
        stripe: StripeProcess,
        status: str,
        fields: dict[str, Any],
        expected: str,
    ) -> None:
        charge = await begun(gateway, with_method())
        assert charge.reference is not None
        stripe.alter(charge.reference, status=status, **fields)
        async with opened_gateway(stripe.url, checked=status != "requires_reauthorization") as at:
            if expected == "unknown":
                with pytest.raises(OutcomeUnknown) as raised:
                    await at.find_charge(charge, WAIT_S)
                assert not raised.value.is_outage
                return
            found = await at.find_charge(charge, WAIT_S)
        id = charge.payment_id
        assert found in (
            Open(id=id, step=expected),  # type: ignore[arg-type]
            Declined(expected),
            Approved(id=id, amount_cents=1500, currency="INR", provider_txn_id=charge.reference),
        )

    async def test_money_that_is_only_held_is_an_alarm(
        self, gateway: StripeGateway, stripe: StripeProcess
    ) -> None:
        charge = await begun(gateway, with_method())
        stripe.alter(charge.reference or "", status="requires_capture")
        lines: list[str] = []
        sink = logger.add(lines.append, level="ERROR", format="{message} {extra}")
        with pytest.raises(OutcomeUnknown):
            await gateway.find_charge(charge, WAIT_S)
        logger.remove(sink)
        (line,) = lines
        assert str(charge.payment_id) in line

    @pytest.mark.parametrize(
        ("publishable_key", "type"), [(PUBLISHABLE_KEY, "stripe"), (None, "redirect")]
    )
    async def test_an_action(
        self, stripe: StripeProcess, publishable_key: str | None, type: str
    ) -> None:
        async with opened_gateway(stripe.url, stripe_publishable_key=publishable_key) as gateway:
            charge, open_ = await charged(gateway, ACTION, RETURN_URL)
            assert isinstance(open_, Open)
            assert open_.step == "action"
            assert open_.action is not None
            secret = object_of(stripe, charge.reference)["client_secret"]
            if publishable_key is None:
                assert list(open_.action.fields) == ["url"]
                assert open_.action.fields["url"].startswith("https://hooks.stripe.com/")
            else:
                fields = {"client_secret": secret, "publishable_key": publishable_key}
                assert open_.action == NextAction(type="stripe", fields=fields)
            assert open_.action.type == type
            assert await gateway.find_charge(charge, WAIT_S) == open_

    async def test_an_action_of_a_kind_that_stripe_js_knows(
        self, gateway: StripeGateway, stripe: StripeProcess
    ) -> None:
        charge = await begun(gateway, with_method())
        step = {"type": "verify_with_microdeposits"}
        stripe.alter(charge.reference or "", status="requires_action", next_action=step)
        found = await gateway.find_charge(charge, WAIT_S)
        assert isinstance(found, Open)
        assert found.action is not None
        assert found.action.type == "stripe"

    @pytest.mark.parametrize(("method", "codes"), DECLINES.items())
    async def test_a_decline_has_the_bank_s_code_or_else_stripe_s(
        self, gateway: StripeGateway, method: str, codes: tuple[str, str | None]
    ) -> None:
        assert (await charged(gateway, method))[1] == Declined(codes[1] or codes[0])

    @pytest.mark.parametrize(
        ("status", "reason", "expected"),
        [
            ("succeeded", None, "approved"),
            ("pending", None, "unknown"),
            ("requires_action", None, "unknown"),
            ("failed", "expired_or_canceled_card", "expired_or_canceled_card"),
            ("failed", None, "failed"),
            ("canceled", None, "canceled"),
            ("reversed", None, "unknown"),
            (None, None, "unknown"),
        ],
    )
    async def test_of_a_refund(
        self,
        gateway: StripeGateway,
        stripe: StripeProcess,
        status: str | None,
        reason: str | None,
        expected: str,
    ) -> None:
        charge, capture = await sold(gateway)
        refund = refund_of(capture, 600, charge.reference)
        made = await gateway.refund(refund, WAIT_S)
        assert isinstance(made, Approved)
        more = {"failure_reason": reason} if reason else {}
        stripe.alter(made.provider_txn_id, status=status, **more)
        if expected == "unknown":
            with pytest.raises(OutcomeUnknown):
                await gateway.find_refund(refund, WAIT_S)
            return
        found = await gateway.find_refund(refund, WAIT_S)
        assert found == (made if expected == "approved" else Declined(expected))


class TestErrors:
    @pytest.mark.parametrize(
        ("amount_cents", "currency", "code"),
        [(10, "INR", "amount_too_small"), (1500, "BOB", "invalid_currency")],
    )
    async def test_what_the_account_cannot_take_is_declined_before_it_is_made(
        self,
        gateway: StripeGateway,
        stripe: StripeProcess,
        amount_cents: int,
        currency: str,
        code: str,
    ) -> None:
        charge = with_method(amount_cents=amount_cents, currency=currency)
        for _ in range(2):
            assert await gateway.prepare(charge, WAIT_S) == Declined(code)

    async def test_an_unknown_payment_method_is_declined_and_the_intent_cancelled(
        self, gateway: StripeGateway, stripe: StripeProcess
    ) -> None:
        charge, outcome = await charged(gateway, "pm_unknown")
        assert outcome == Declined("resource_missing")
        assert object_of(stripe, charge.reference)["status"] == "canceled"

    async def test_another_body_under_a_known_key(self, gateway: StripeGateway) -> None:
        charge = with_method()
        await gateway.prepare(charge, WAIT_S)
        other = msgspec.structs.replace(charge, amount_cents=2500)
        with pytest.raises(OutcomeUnknown, match="idempotency_error") as raised:
            await gateway.prepare(other, WAIT_S)
        assert not raised.value.is_outage

    async def test_a_rejected_key_says_nothing_of_the_charge(
        self, gateway: StripeGateway, stripe: StripeProcess
    ) -> None:
        """It counts as an outage, so that nothing new is begun before it is put right."""
        charge, _ = await sold(gateway)
        stripe.accept_keys()
        for call in (gateway.prepare, gateway.charge, gateway.find_charge, gateway.cancel):
            with pytest.raises(OutcomeUnknown, match="API key") as raised:
                await call(charge, WAIT_S)
            assert raised.value.is_outage
        with pytest.raises(OutcomeUnknown):
            await gateway.account(WAIT_S)

    async def test_another_account_s_key_knows_none_of_it(
        self, gateway: StripeGateway, stripe: StripeProcess
    ) -> None:
        missing = msgspec.structs.replace(with_method(), reference="pi_of_another_account")
        for call in (gateway.charge, gateway.find_charge, gateway.cancel):
            with pytest.raises(ReferenceNotFound):
                await call(missing, WAIT_S)
        refund = ProviderRefund(
            refund_id=uuid4(),
            payment_id=missing.payment_id,
            provider_txn_id="pi_of_another_account",
            amount_cents=600,
            currency="INR",
        )
        for ask in (gateway.refund, gateway.find_refund):
            with pytest.raises(ReferenceNotFound):
                await ask(refund, WAIT_S)

    async def test_busy_is_repeated_inside_the_deadline(
        self, gateway: StripeGateway, stripe: StripeProcess
    ) -> None:
        charge = await begun(gateway, with_method())
        stripe.busy(4)
        assert isinstance(await gateway.charge(charge, WAIT_S), Approved)
        stripe.busy(1000)
        started = time.monotonic()
        with pytest.raises(OutcomeUnknown):
            await gateway.refund(refund_of(await sold_at(gateway, charge), 600), 0.6)
        assert time.monotonic() - started > 0.3

    async def test_once_it_was_reached_it_is_not_unsent(
        self, gateway: StripeGateway, stripe: StripeProcess
    ) -> None:
        """Stripe is busy, and then away: an earlier request with the key may be under way."""
        charge = await begun(gateway, with_method())
        stripe.busy(1000)
        before = stripe.counts()["charge"]
        running = asyncio.create_task(gateway.charge(charge, WAIT_S))
        while stripe.counts()["charge"] == before:
            await asyncio.sleep(0.01)
        stripe.refuse()
        with pytest.raises(OutcomeUnknown):
            await running

    async def test_a_refund_of_an_amount_that_stripe_has_not(self, gateway: StripeGateway) -> None:
        capture = Approved(
            id=uuid4(), amount_cents=15_000, currency="MGA", provider_txn_id="pi_none"
        )
        assert await gateway.refund(refund_of(capture, 150), WAIT_S) == Declined("invalid_amount")


async def sold_at(gateway: StripeGateway, charge: ProviderCharge) -> Approved:
    found = await gateway.find_charge(charge, WAIT_S)
    assert isinstance(found, Approved)
    return found


class TestDeclinesAreFinal:
    async def test_without_anybody_to_act_an_action_is_a_decline(
        self, gateway: StripeGateway, stripe: StripeProcess
    ) -> None:
        charge, outcome = await charged(gateway, ACTION, None)
        assert outcome == Declined("authentication_required")
        assert await gateway.find_charge(charge, WAIT_S) == outcome

    @pytest.mark.parametrize(
        ("method", "acts", "code"),
        [
            (ACTION, "fails", "payment_intent_authentication_failure"),
            (ACTION_DECLINED, None, "generic_decline"),
        ],
    )
    async def test_after_an_action_the_intent_is_cancelled(
        self,
        gateway: StripeGateway,
        stripe: StripeProcess,
        method: str,
        acts: str | None,
        code: str,
    ) -> None:
        """The customer has the client secret, and could pay with another card afterwards."""
        charge, _ = await charged(gateway, method, RETURN_URL)
        stripe.customer_acts(charge.reference, acts)
        assert await gateway.find_charge(charge, WAIT_S) == Declined(code)
        assert object_of(stripe, charge.reference)["status"] == "canceled"
        assert await gateway.charge(charge, WAIT_S) == Declined(code)
        assert stripe.moved(charge.payment_id) == []

    async def test_a_customer_who_pays_before_it_is_cancelled_has_paid(
        self, gateway: StripeGateway, stripe: StripeProcess
    ) -> None:
        charge, _ = await charged(gateway, ACTION, RETURN_URL)
        stripe.customer_acts(charge.reference, "fails")
        stripe.script(Fault("slow", "find_charge", seconds=0.3))
        running = asyncio.create_task(gateway.find_charge(charge, WAIT_S))
        await asyncio.sleep(0.1)
        stripe.customer_acts(charge.reference, "pm_card_visa")
        assert isinstance(await running, Approved)
        assert len(stripe.moved(charge.payment_id)) == 1

    async def test_one_at_once_needs_no_further_request(
        self, gateway: StripeGateway, stripe: StripeProcess
    ) -> None:
        before = stripe.counts()
        await charged(gateway, "pm_card_chargeDeclined")
        after = stripe.counts()
        assert {
            name: after[name] - before[name] for name in after if after[name] > before[name]
        } == {
            "prepare": 1,
            "charge": 1,
        }

    async def test_a_late_confirmation_does_not_capture_after_it(
        self, gateway: StripeGateway, stripe: StripeProcess
    ) -> None:
        """Of another process, with another return address."""
        charge, outcome = await charged(gateway, "pm_card_chargeDeclined")
        late = msgspec.structs.replace(
            charge, payment_method="pm_card_visa", return_url="https://shop.example/later"
        )
        assert await gateway.charge(late, WAIT_S) == outcome
        assert stripe.moved(charge.payment_id) == []

    async def test_an_intent_of_another_payment_is_not_cancelled(
        self, gateway: StripeGateway, stripe: StripeProcess
    ) -> None:
        charge, _ = await charged(gateway, ACTION, RETURN_URL)
        stripe.customer_acts(charge.reference, "fails")
        other = msgspec.structs.replace(charge, payment_id=uuid4())
        with pytest.raises(OutcomeUnknown):
            await gateway.find_charge(other, WAIT_S)
        assert object_of(stripe, charge.reference)["status"] == "requires_payment_method"

    async def test_the_reason_is_found_when_the_error_was_erased(
        self, gateway: StripeGateway, stripe: StripeProcess
    ) -> None:
        charge, _ = await charged(gateway, "pm_card_chargeDeclined")
        stripe.alter(charge.reference or "", last_payment_error=None)
        assert await gateway.find_charge(charge, WAIT_S) == Declined("card_declined")


class TestKnownTraps:
    async def test_a_retry_neither_captures_twice_nor_gets_an_old_response_for_ever(
        self, stripe: StripeProcess
    ) -> None:
        """With a new key each retry captures again; with the same one, what was stored (an action,
        an error) is the response of each, whatever has become of the charge since."""
        async with opened_gateway(stripe.url) as one, opened_gateway(stripe.url) as other:
            charge, first = await charged(one, ACTION, RETURN_URL)
            assert isinstance(first, Open)
            assert await other.charge(charge, WAIT_S) == first
            stripe.customer_acts(charge.reference)
            assert isinstance(await other.charge(charge, WAIT_S), Approved)
            assert isinstance(await one.charge(charge, WAIT_S), Approved)
            assert len(stripe.moved(charge.payment_id)) == 1

    async def test_a_stored_500_does_not_block_the_payment(
        self, gateway: StripeGateway, stripe: StripeProcess
    ) -> None:
        charge = await begun(gateway, with_method())
        for _ in range(2):
            stripe.fail_inside(1)
            with pytest.raises(OutcomeUnknown) as raised:
                await gateway.charge(charge, WAIT_S)
            assert raised.value.is_outage
            found = await gateway.find_charge(charge, WAIT_S)
            assert found == Open(id=charge.payment_id, step="ready")
        assert isinstance(await gateway.charge(charge, WAIT_S), Approved)
        assert isinstance(await gateway.charge(charge, WAIT_S), Approved)
        assert len(stripe.moved(charge.payment_id)) == 1

    async def test_an_idempotency_key_that_stripe_has_forgotten(
        self, gateway: StripeGateway, stripe: StripeProcess
    ) -> None:
        """A second confirmation is refused, and the refusal names the intent that was captured."""
        charge, capture = await sold(gateway)
        stripe.age_keys(2 * DAY_S)
        assert await gateway.charge(charge, WAIT_S) == capture
        assert len(stripe.moved(charge.payment_id)) == 1

    async def test_a_webhook_and_the_response_at_once_are_one_capture(
        self, gateway: StripeGateway, stripe: StripeProcess
    ) -> None:
        """Both paths end in the same question, and neither believes the payload."""
        charge = await begun(gateway, with_method())
        stripe.script(Fault("slow", "charge", seconds=0.2))
        running = asyncio.create_task(gateway.charge(charge, WAIT_S))
        await asyncio.sleep(0.05)
        event = stripe.event("payment_intent.succeeded", charge.reference or "")
        hint = await hint_of(gateway, event)
        assert hint is not None
        found = await gateway.find_charge(charge, WAIT_S)
        assert found in (await running, Open(id=charge.payment_id, step="ready"))
        assert len(stripe.moved(charge.payment_id)) == 1

    async def test_a_webhook_of_a_refund_names_the_charge_it_is_of(
        self, gateway: StripeGateway, stripe: StripeProcess
    ) -> None:
        """Not the refund's own id, which no payment has; also before its capture is known here."""
        charge, capture = await sold(gateway)
        made = await gateway.refund(refund_of(capture, 600), WAIT_S)
        assert isinstance(made, Approved)
        hint = await hint_of(gateway, stripe.event("refund.created", made.provider_txn_id))
        assert hint is not None
        assert hint.reference == charge.reference

    async def test_a_pending_refund_is_neither_made_nor_failed(self, stripe: StripeProcess) -> None:
        types = ("us_bank_account",)
        async with opened_gateway(stripe.url, stripe_payment_method_types=types) as gateway:
            charge, _ = await charged(gateway, PROCESSING)
            stripe.finish(charge.reference)
            refund = refund_of(await sold_at(gateway, charge), 600)
            for _ in range(2):
                with pytest.raises(OutcomeUnknown, match="pending") as raised:
                    await gateway.refund(refund, WAIT_S)
                assert not raised.value.is_outage
                with pytest.raises(OutcomeUnknown, match="pending"):
                    await gateway.find_refund(refund, WAIT_S)
            (id,) = {
                each["id"]
                for line in stripe.lines()
                for each in line.objects
                if each["metadata"].get("refund_id") == str(refund.refund_id)
            }
            stripe.finish(id)
            made = await gateway.find_refund(refund, WAIT_S)
            assert isinstance(made, Approved)
            assert await gateway.refund(refund, WAIT_S) == made
            stripe.finish(id, "failed")  # days later
            assert await gateway.find_refund(refund, WAIT_S) == Declined("lost_or_stolen_card")

    async def test_a_refund_is_not_pending_where_stripe_was_never_asked(
        self, gateway: StripeGateway, stripe: StripeProcess
    ) -> None:
        _, capture = await sold(gateway)
        refund = refund_of(capture, 600)
        stripe.refuse()
        with pytest.raises(NeverSent):
            await gateway.refund(refund, WAIT_S)
        stripe.listen()
        assert await gateway.find_refund(refund, WAIT_S) is None

    async def test_refunds_of_others_are_not_ours(
        self, gateway: StripeGateway, stripe: StripeProcess
    ) -> None:
        """Made in the dashboard, more than a page of them: ours is on the second."""
        charge, capture = await sold(gateway)
        refund = refund_of(capture, 600)
        made = await gateway.refund(refund, WAIT_S)
        stripe.refunded_elsewhere(charge.reference or "", 1, count=120)
        assert await gateway.find_refund(refund, WAIT_S) == made
        assert await gateway.find_refund(refund_of(capture, 600), WAIT_S) is None
        assert await gateway.find_charge(charge, WAIT_S) == capture

    async def test_what_the_customer_abandoned_ends(
        self, gateway: StripeGateway, stripe: StripeProcess
    ) -> None:
        charge, _ = await charged(gateway, ACTION, RETURN_URL)
        assert await gateway.cancel(charge, WAIT_S) == Declined("abandoned")
        stripe.customer_acts(charge.reference)  # too late
        assert await gateway.find_charge(charge, WAIT_S) == Declined("abandoned")
        assert stripe.moved(charge.payment_id) == []


def test_all_of_it_is_as_stripe_describes_it(pytestconfig: pytest.Config) -> None:
    """The last test of the module: what the others have exchanged."""
    check_official(pytestconfig, "POST /v1/payment_intents/{intent}/confirm", "GET /v1/refunds")
