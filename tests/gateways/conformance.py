"""What every gateway must do, whatever provider is behind it.

A test module subclasses GatewayConformance and gives it a fixture `harness`. What its provider does
not have, and faults that it cannot be told to have, are skipped. docs/gateways.md says what each
case is about.
"""

import asyncio
import ssl
from functools import cache
from typing import NamedTuple, Protocol, cast, get_args
from uuid import UUID, uuid4

import msgspec
import pytest

from payments.gateways import (
    BadSignature,
    Gateway,
    Hint,
    NeverSent,
    NextAction,
    Open,
    OutcomeUnknown,
    ProviderCharge,
    ProviderRefund,
    ReferenceNotFound,
    Refusal,
    Step,
    WebhookGateway,
)
from payments.gateways.building import GATEWAY_MEMBERS
from payments.gateways.counted import _WORD as STORABLE
from payments.payment.state import Approved, Declined
from tests.machine import within

OPERATIONS = ("charge", "refund", "find_charge", "find_refund")
QUESTIONS = ("find_charge", "find_refund", "account")
STEPS: tuple[Step, ...] = get_args(Step)
WAIT_S = 10.0  # where nothing is meant to go wrong
TIMEOUT_S = 0.4  # where the deadline is meant to pass
LATE_S = 1.0  # how much later than its deadline a call may end


@cache
def tls() -> ssl.SSLContext:
    """Made once: it takes a tenth of a second, and each test has a gateway of its own."""
    return ssl.create_default_context()


# Each failure, and how it must be reported.
FAILURES: dict[str, type[Exception]] = {
    "refused": NeverSent,  # nothing listens
    "500": OutcomeUnknown,  # before the provider does anything
    "429": OutcomeUnknown,
    "500_after": OutcomeUnknown,
    "timeout": OutcomeUnknown,  # nothing is done, and no answer comes
    "slow": OutcomeUnknown,  # the answer comes after the deadline
    "drip": OutcomeUnknown,  # the answer comes a byte at a time
    "answer_lost": OutcomeUnknown,  # it is done, then the connection is closed
    "half_answer": OutcomeUnknown,
    "reset": OutcomeUnknown,  # before the provider does anything
    "reset_after": OutcomeUnknown,
    "closed": OutcomeUnknown,  # before the provider does anything
    "garbage": OutcomeUnknown,  # an answer without sense
    "huge": OutcomeUnknown,  # an answer of more than 64 KiB
    "redirect": OutcomeUnknown,
    "not_found_page": OutcomeUnknown,  # 404, but not by the provider
}
# Of these the breaker has to know, and of those it must not; of the others it may.
OUTAGES = ("refused", "500", "429", "500_after", "timeout", "slow", "drip", "reset", "reset_after")
NO_OUTAGES = ("garbage", "huge", "redirect", "not_found_page")
UNTIL_THE_DEADLINE = ("timeout", "slow", "drip")
# For stand-ins: a byte comes sooner than a timeout for each read would end.
SECONDS = {"slow": 5.0, "drip": 0.05}
MISMATCHES = ("wrong_id", "wrong_amount", "wrong_currency")


class Harness(Protocol):
    """A gateway, and the test's hold on the provider behind it."""

    @property
    def gateway(self) -> Gateway:
        """Ask for it anew after `script`."""
        ...

    declined_cents: int
    """An amount that is declined as a charge."""

    amounts: tuple[tuple[int, str], ...]
    """Amounts and currencies that are captured: the least, the most, and one without decimals."""

    method: str | None
    """A payment method with which a charge is captured."""

    declined_method: str | None
    """One with which a charge of `declined_cents` is declined."""

    prepares: bool
    """Whether it has charges of its own that are prepared."""

    method_to_prepare: str | None
    """The payment method of one, if it is not every charge."""

    refused_method: str | None
    """A payment method that `refuses` does not take; None if it takes all."""

    steps: frozenset[Step]
    """At which a charge of this provider can be open."""

    cancels: frozenset[Step]
    """At which `cancel` ends it."""

    sends_webhooks: bool

    dates_webhooks: bool
    """Whether the signature covers the time, so that an old webhook is known as such."""

    async def open(self, step: Step) -> ProviderCharge:
        """A charge of 15.00 that stands there, with what the service knows of it."""
        ...

    async def customer_acts(self, charge: ProviderCharge) -> None:
        """What an open `action` asks for is done."""
        ...

    async def finish(self, charge: ProviderCharge) -> None:
        """What is `processing` is captured."""
        ...

    async def made_by_customer(self, amount_cents: int) -> str | None:
        """A payment method that names a charge in INR which the customer made at the provider;
        None if there is no such thing."""
        ...

    def webhook(
        self, charge: ProviderCharge | None, *, age_s: float = 0, secret: str | None = None
    ) -> tuple[dict[str, str], bytes]:
        """Headers and raw body of one about this charge, or about none, signed so long ago with
        this secret (the provider's own)."""
        ...

    def redated(self, old: tuple[dict[str, str], bytes], headers: dict[str, str]) -> dict[str, str]:
        """The headers of the old webhook, but with the time of these."""
        ...

    def can(self, fault: str, operation: str) -> bool:
        """Whether the provider can be told to have this fault in this operation."""
        ...

    async def script(self, fault: str, operation: str) -> None:
        """The next call of this operation meets this fault."""
        ...

    async def recover(self) -> None:
        """The provider is well again."""
        ...

    async def captured(self, payment_id: UUID) -> list[int]:
        """The amounts that the provider itself says it captured for this payment, one by one."""
        ...

    async def given_back(self, refund_id: UUID) -> list[int]:
        """The same for what it gave back under this refund."""
        ...


class GatewayConformance:
    async def test_it_declares_its_windows(self, harness: Harness) -> None:
        gateway = harness.gateway
        assert [name for name in GATEWAY_MEMBERS if not hasattr(gateway, name)] == []
        assert gateway.name
        assert gateway.name.isascii()
        assert gateway.name.isprintable()
        assert isinstance(gateway.knows_our_id, bool)
        assert gateway.charge_retry_s >= 0
        assert gateway.refund_retry_s >= 0
        assert gateway.late_capture_s >= 0
        assert gateway.declines_may_turn_s >= 0

    async def test_a_charge_is_captured(self, harness: Harness) -> None:
        for amount_cents, currency in ((1500, "INR"), *harness.amounts):
            charge = await begun(harness.gateway, asked(harness, amount_cents, currency))
            outcome = await harness.gateway.charge(charge, WAIT_S)
            assert isinstance(outcome, Approved)
            assert outcome == Approved(
                id=charge.payment_id,
                amount_cents=amount_cents,
                currency=currency,
                provider_txn_id=outcome.provider_txn_id,
            )
            assert await harness.captured(charge.payment_id) == [amount_cents]

    async def test_a_charge_is_declined(self, harness: Harness) -> None:
        charge = await begun(harness.gateway, asked(harness, declined=True))
        outcome = await harness.gateway.charge(charge, WAIT_S)
        assert isinstance(outcome, Declined)
        assert outcome.code
        assert await harness.captured(charge.payment_id) == []

    async def test_each_capture_has_an_id_of_its_own(self, harness: Harness) -> None:
        first, second = await captured(harness), await captured(harness)
        assert first.capture.provider_txn_id != second.capture.provider_txn_id

    @pytest.mark.parametrize("declined", [False, True])
    async def test_a_charge_can_be_found(self, harness: Harness, declined: bool) -> None:
        charge = await begun(harness.gateway, asked(harness, declined=declined))
        outcome = await harness.gateway.charge(charge, WAIT_S)
        assert await harness.gateway.find_charge(charge, WAIT_S) == outcome

    async def test_an_unknown_charge_is_not_found(self, harness: Harness) -> None:
        sale = await captured(harness)
        if harness.gateway.knows_our_id:
            assert await harness.gateway.find_charge(charge_of(), WAIT_S) is None
            assert await harness.gateway.cancel(charge_of(), WAIT_S) is None
        else:
            unknown = msgspec.structs.replace(charge_of(), reference=f"{sale.charge.reference}x")
            for call in (harness.gateway.find_charge, harness.gateway.cancel):
                with pytest.raises(ReferenceNotFound):
                    await call(unknown, WAIT_S)

    @pytest.mark.parametrize("declined", [False, True])
    async def test_the_same_charge_twice(self, harness: Harness, declined: bool) -> None:
        charge = await begun(harness.gateway, asked(harness, declined=declined))
        first = await harness.gateway.charge(charge, WAIT_S)
        assert await harness.gateway.charge(charge, WAIT_S) == first
        assert len(await harness.captured(charge.payment_id)) == (not declined)

    async def test_the_same_charge_32_times_at_once(self, harness: Harness) -> None:
        gateway = harness.gateway
        charge = await begun(gateway, asked(harness))
        outcomes = await asyncio.gather(*(gateway.charge(charge, WAIT_S) for _ in range(32)))
        assert isinstance(outcomes[0], Approved)
        assert set(outcomes) == {outcomes[0]}
        assert await harness.captured(charge.payment_id) == [1500]

    async def test_32_charges_at_once(self, harness: Harness) -> None:
        gateway = harness.gateway
        charges = [await begun(gateway, asked(harness, 1000 + n * 10)) for n in range(32)]
        outcomes = await asyncio.gather(*(gateway.charge(each, WAIT_S) for each in charges))
        for charge, outcome in zip(charges, outcomes, strict=True):
            assert isinstance(outcome, Approved)
            assert (outcome.id, outcome.amount_cents) == (charge.payment_id, charge.amount_cents)
            assert await harness.captured(charge.payment_id) == [charge.amount_cents]

    async def test_another_amount_under_the_same_id_captures_nothing(
        self, harness: Harness
    ) -> None:
        sale = await captured(harness)
        other = msgspec.structs.replace(sale.charge, amount_cents=2500)
        try:
            outcome = await harness.gateway.charge(other, WAIT_S)
        except OutcomeUnknown:
            outcome = sale.capture
        assert outcome == sale.capture
        assert await harness.captured(sale.charge.payment_id) == [1500]

    @pytest.mark.parametrize("fault", FAILURES)
    async def test_a_charge_that_fails(self, harness: Harness, fault: str) -> None:
        """How it is reported, that asking then tells the truth, and that sending it again mends."""
        await captured(harness)  # so that there is a kept connection, if it keeps any
        charge = await begun(harness.gateway, asked(harness))
        await script(harness, fault, "charge")
        await fails(harness.gateway.charge(charge, timeout_for(fault)), fault)
        await harness.recover()
        truth = await harness.captured(charge.payment_id)
        assert truth in ([], [1500])
        assert FAILURES[fault] is OutcomeUnknown or truth == []
        found = await harness.gateway.find_charge(charge, WAIT_S)
        assert isinstance(found, Approved) if truth else is_open(found, harness.gateway)
        again = await harness.gateway.charge(charge, WAIT_S)
        assert isinstance(again, Approved)
        assert found == again or not truth
        assert await harness.captured(charge.payment_id) == [1500]

    @pytest.mark.parametrize("fault", FAILURES)
    async def test_a_refund_that_fails(self, harness: Harness, fault: str) -> None:
        refund = (await captured(harness)).refund(600)
        await script(harness, fault, "refund")
        await fails(harness.gateway.refund(refund, timeout_for(fault)), fault)
        await harness.recover()
        truth = await harness.given_back(refund.refund_id)
        assert truth in ([], [600])
        assert FAILURES[fault] is OutcomeUnknown or truth == []
        found = await harness.gateway.find_refund(refund, WAIT_S)
        assert isinstance(found, Approved if truth else type(None))
        again = await harness.gateway.refund(refund, WAIT_S)
        assert isinstance(again, Approved)
        assert found in (None, again)
        assert await harness.given_back(refund.refund_id) == [600]

    @pytest.mark.parametrize("fault", FAILURES)
    @pytest.mark.parametrize("operation", QUESTIONS)
    async def test_a_question_that_fails_is_not_answered_no(
        self, harness: Harness, operation: str, fault: str
    ) -> None:
        refund = (await captured(harness)).refund(1500)
        await harness.gateway.refund(refund, WAIT_S)
        await script(harness, fault, operation)
        await fails(ask(harness.gateway, operation, refund, timeout_for(fault)), fault)
        await harness.recover()
        assert isinstance(await ask(harness.gateway, operation, refund, WAIT_S), Approved | str)

    @pytest.mark.parametrize("mismatch", MISMATCHES)
    @pytest.mark.parametrize("operation", OPERATIONS)
    async def test_what_the_provider_states_is_passed_on_unchanged(
        self, harness: Harness, operation: str, mismatch: str
    ) -> None:
        """The caller compares, and must get to see it."""
        sale = await captured(harness)
        capture, refund = sale.capture, sale.refund(600)
        if operation == "find_refund":
            await harness.gateway.refund(refund, WAIT_S)
        await script(harness, mismatch, operation)
        stated = await ask(harness.gateway, operation, refund, WAIT_S, sale.charge)
        assert isinstance(stated, Approved)
        true_id, true_amount = (
            (refund.refund_id, 600) if "refund" in operation else (capture.id, 1500)
        )
        assert (stated.id != true_id) is (mismatch == "wrong_id")
        assert (stated.amount_cents != true_amount) is (mismatch == "wrong_amount")
        assert (stated.currency != "INR") is (mismatch == "wrong_currency")

    async def test_a_full_refund(self, harness: Harness) -> None:
        sale = await captured(harness)
        capture, refund = sale.capture, sale.refund(1500)
        outcome = await harness.gateway.refund(refund, WAIT_S)
        assert isinstance(outcome, Approved)
        assert outcome == Approved(
            id=refund.refund_id,
            amount_cents=1500,
            currency="INR",
            provider_txn_id=outcome.provider_txn_id,
        )
        assert outcome.provider_txn_id != capture.provider_txn_id
        assert await harness.given_back(refund.refund_id) == [1500]
        assert await harness.gateway.find_refund(refund, WAIT_S) == outcome

    async def test_a_refund_leaves_the_charge_as_it_was(self, harness: Harness) -> None:
        sale = await captured(harness)
        await harness.gateway.refund(sale.refund(600), WAIT_S)
        assert await harness.gateway.find_charge(sale.charge, WAIT_S) == sale.capture

    async def test_partial_refunds_up_to_the_capture(self, harness: Harness) -> None:
        sale = await captured(harness)
        for amount_cents, outcome in ((600, Approved), (900, Approved), (100, Declined)):
            refund = sale.refund(amount_cents)
            assert isinstance(await harness.gateway.refund(refund, WAIT_S), outcome)
            given_back = [amount_cents] if outcome is Approved else []
            assert await harness.given_back(refund.refund_id) == given_back

    async def test_a_refund_beyond_the_capture_is_declined(self, harness: Harness) -> None:
        refund = (await captured(harness)).refund(1600)
        outcome = await harness.gateway.refund(refund, WAIT_S)
        assert isinstance(outcome, Declined)
        assert outcome.code
        assert await harness.given_back(refund.refund_id) == []
        assert await harness.gateway.find_refund(refund, WAIT_S) in (None, outcome)

    async def test_a_refund_of_what_was_never_captured_is_declined(self, harness: Harness) -> None:
        """Or the provider does not know the id: it may be another account's."""
        capture = Approved(
            id=uuid4(), amount_cents=1500, currency="INR", provider_txn_id="never_captured"
        )
        try:
            outcome = await harness.gateway.refund(refund_of(capture, 600), WAIT_S)
        except ReferenceNotFound:
            assert not harness.gateway.knows_our_id
        else:
            assert isinstance(outcome, Declined)

    async def test_an_unknown_refund_is_not_found(self, harness: Harness) -> None:
        refund = (await captured(harness)).refund(600)
        assert await harness.gateway.find_refund(refund, WAIT_S) is None

    async def test_the_same_refund_twice(self, harness: Harness) -> None:
        refund = (await captured(harness)).refund(600)
        first = await harness.gateway.refund(refund, WAIT_S)
        assert await harness.gateway.refund(refund, WAIT_S) == first
        assert await harness.given_back(refund.refund_id) == [600]

    async def test_the_same_refund_32_times_at_once(self, harness: Harness) -> None:
        refund, gateway = (await captured(harness)).refund(600), harness.gateway
        outcomes = await asyncio.gather(*(gateway.refund(refund, WAIT_S) for _ in range(32)))
        assert isinstance(outcomes[0], Approved)
        assert set(outcomes) == {outcomes[0]}
        assert await harness.given_back(refund.refund_id) == [600]

    async def test_refunds_at_once_stay_within_the_capture(self, harness: Harness) -> None:
        sale, gateway = await captured(harness, 1000), harness.gateway
        refunds = [sale.refund(300) for _ in range(8)]
        outcomes = await asyncio.gather(*(gateway.refund(each, WAIT_S) for each in refunds))
        assert sum(isinstance(outcome, Approved) for outcome in outcomes) == 3
        assert [len(await harness.given_back(each.refund_id)) for each in refunds].count(1) == 3

    @pytest.mark.parametrize("operation", OPERATIONS)
    async def test_a_cancelled_call_harms_no_other(self, harness: Harness, operation: str) -> None:
        sale = await captured(harness)
        refund = sale.refund(600)
        await script(harness, "timeout", operation)
        running = asyncio.create_task(ask(harness.gateway, operation, refund, WAIT_S, sale.charge))
        await asyncio.sleep(0.05)  # until it is sent; it is cancelled wherever it has got to
        running.cancel()
        with pytest.raises(asyncio.CancelledError):
            await running
        await harness.recover()
        await captured(harness)

    async def test_what_is_asked_without_a_call(self, harness: Harness) -> None:
        """The provider is down, and the same is said twice: nothing is asked, nothing changes."""
        charge = asked(harness)
        refused = msgspec.structs.replace(charge, payment_method=harness.refused_method)
        if harness.can("refused", "charge"):
            await harness.script("refused", "charge")
        gateway = harness.gateway
        for _ in range(2):
            assert gateway.refuses(charge) is None
            assert gateway.reference(charge) is None
            assert gateway.needs_preparing(charge) is not gateway.knows_our_id
            if harness.refused_method is not None:
                refusal = gateway.refuses(refused)
                assert isinstance(refusal, Refusal)
                assert refusal.field == "payment_method"
                assert refusal.message
                assert harness.refused_method not in refusal.message
        await harness.recover()
        assert await harness.captured(charge.payment_id) == []

    async def test_its_account(self, harness: Harness) -> None:
        account = await harness.gateway.account(WAIT_S)
        assert account is None or STORABLE.fullmatch(account)
        await captured(harness)
        assert await harness.gateway.account(WAIT_S) == account

    async def test_preparing_captures_nothing_and_gives_one_reference(
        self, harness: Harness
    ) -> None:
        """Also at once, and for settling, which knows neither payment method nor return address."""
        if not harness.prepares:
            pytest.skip("this provider prepares nothing")
        gateway, charge = harness.gateway, charge_of(payment_method=harness.method_to_prepare)
        charge = msgspec.structs.replace(charge, return_url="https://shop.example/paid")
        plain = charge if gateway.knows_our_id else charge_of(payment_id=charge.payment_id)
        calls = [charge, plain, *[charge] * 6]
        references = await asyncio.gather(*(gateway.prepare(each, WAIT_S) for each in calls))
        assert isinstance(references[0], str)
        assert STORABLE.fullmatch(references[0])
        assert set(references) == {references[0]}
        other = charge_of(payment_method=charge.payment_method)
        assert await gateway.prepare(other, WAIT_S) not in references
        prepared = msgspec.structs.replace(plain, reference=references[0])
        found = await gateway.find_charge(prepared, WAIT_S)
        assert found == Open(id=charge.payment_id, step="ready")
        assert await harness.captured(charge.payment_id) == []

    @pytest.mark.parametrize("fault", FAILURES)
    async def test_preparing_that_fails(self, harness: Harness, fault: str) -> None:
        if harness.gateway.knows_our_id:
            pytest.skip("this provider is not asked to prepare")
        charge = charge_of()
        await script(harness, fault, "prepare")
        await fails(harness.gateway.prepare(charge, timeout_for(fault)), fault)
        await harness.recover()
        reference = await harness.gateway.prepare(charge, WAIT_S)
        assert await harness.gateway.prepare(charge, WAIT_S) == reference
        assert await harness.captured(charge.payment_id) == []

    async def test_a_charge_that_the_customer_made(self, harness: Harness) -> None:
        """It is captured once, and by our id of it the caller sees for which payment."""
        method = await harness.made_by_customer(1500)
        if method is None:
            pytest.skip("no payment method of this provider names a charge")
        gateway, first = harness.gateway, charge_of(payment_method=method)
        reference = gateway.reference(first)
        assert reference is not None
        assert STORABLE.fullmatch(reference)
        assert not gateway.needs_preparing(first)
        charge = await begun(gateway, first)
        capture = await gateway.charge(charge, WAIT_S)
        assert isinstance(capture, Approved)
        assert capture.id == charge.payment_id
        assert await gateway.find_charge(charge, WAIT_S) == capture
        if not gateway.knows_our_id:
            second = msgspec.structs.replace(charge, payment_id=uuid4())
            assert await gateway.charge(second, WAIT_S) == capture
            assert await harness.captured(second.payment_id) == []
        assert await harness.captured(charge.payment_id) == [1500]

    @pytest.mark.parametrize("step", STEPS)
    async def test_an_open_charge_is_found_and_captures_nothing(
        self, harness: Harness, step: Step
    ) -> None:
        charge = await opened(harness, step)
        for _ in range(2):
            found = await harness.gateway.find_charge(charge, WAIT_S)
            assert isinstance(found, Open)
            assert (found.id, found.step) == (charge.payment_id, step)
            assert (found.action is not None) is (step == "action")
        assert await harness.captured(charge.payment_id) == []

    @pytest.mark.parametrize("step", ["ready", "authorized"])
    async def test_an_open_charge_that_waits_for_us_is_captured(
        self, harness: Harness, step: Step
    ) -> None:
        charge = await opened(harness, step)
        if step == "authorized":  # as settling completes it
            charge = charge_of(payment_id=charge.payment_id, reference=charge.reference)
        capture = await harness.gateway.charge(charge, WAIT_S)
        assert isinstance(capture, Approved)
        assert await harness.gateway.charge(charge, WAIT_S) == capture
        assert await harness.captured(charge.payment_id) == [1500]

    async def test_what_the_customer_has_to_do(self, harness: Harness) -> None:
        """It is told again at each request, and charging again changes nothing before it is done.
        Logs do not show it."""
        charge = await opened(harness, "action")
        for call in (harness.gateway.charge, harness.gateway.find_charge, harness.gateway.charge):
            open_ = await call(charge, WAIT_S)
            assert isinstance(open_, Open)
            assert isinstance(open_.action, NextAction)
            assert STORABLE.fullmatch(open_.action.type)
            assert all(isinstance(value, str) for value in open_.action.fields.values())
            assert not [value for value in open_.action.fields.values() if value in repr(open_)]
        assert await harness.captured(charge.payment_id) == []
        await harness.customer_acts(charge)
        found = await harness.gateway.find_charge(charge, WAIT_S)
        by_itself = isinstance(found, Approved)
        assert by_itself or is_open(found, harness.gateway, "ready", "authorized")
        assert isinstance(await harness.gateway.charge(charge, WAIT_S), Approved)
        assert await harness.captured(charge.payment_id) == [1500]

    async def test_what_is_processing_ends_by_itself(self, harness: Harness) -> None:
        charge = await opened(harness, "processing")
        again = await harness.gateway.charge(charge, WAIT_S)
        assert again == Open(id=charge.payment_id, step="processing")
        assert await harness.captured(charge.payment_id) == []
        await harness.finish(charge)
        assert isinstance(await harness.gateway.find_charge(charge, WAIT_S), Approved)
        assert await harness.captured(charge.payment_id) == [1500]

    @pytest.mark.parametrize("step", STEPS)
    async def test_a_cancelled_charge_is_never_captured(self, harness: Harness, step: Step) -> None:
        charge = await opened(harness, step)
        cancelled = await harness.gateway.cancel(charge, WAIT_S)
        if step not in harness.cancels:
            assert is_open(cancelled, harness.gateway, step)
            return
        assert isinstance(cancelled, Declined)
        gateway = harness.gateway
        for call in (gateway.charge, gateway.find_charge, gateway.cancel, gateway.charge):
            assert await call(charge, WAIT_S) == cancelled
        assert await harness.captured(charge.payment_id) == []

    @pytest.mark.parametrize("declined", [False, True])
    async def test_cancelling_what_has_an_outcome_says_it(
        self, harness: Harness, declined: bool
    ) -> None:
        charge = await begun(harness.gateway, asked(harness, declined=declined))
        outcome = await harness.gateway.charge(charge, WAIT_S)
        assert isinstance(outcome, Declined if declined else Approved)
        assert await harness.gateway.cancel(charge, WAIT_S) == outcome
        assert await harness.gateway.find_charge(charge, WAIT_S) == outcome

    async def test_a_charge_and_its_cancellation_at_once_have_one_outcome(
        self, harness: Harness
    ) -> None:
        gateway = harness.gateway
        for _ in range(8):
            charge = await opened(harness, "ready")
            outcomes = await asyncio.gather(
                *(gateway.charge(charge, WAIT_S) for _ in range(2)),
                gateway.cancel(charge, WAIT_S),
                gateway.charge(charge, WAIT_S),
            )
            assert set(outcomes) == {outcomes[0]}
            truth = await harness.captured(charge.payment_id)
            assert truth == ([1500] if isinstance(outcomes[0], Approved) else [])

    @pytest.mark.parametrize("fault", FAILURES)
    async def test_a_cancellation_that_fails(self, harness: Harness, fault: str) -> None:
        charge = await opened(harness, "ready")
        await script(harness, fault, "cancel")
        await fails(harness.gateway.cancel(charge, timeout_for(fault)), fault)
        await harness.recover()
        assert isinstance(await harness.gateway.cancel(charge, WAIT_S), Declined)
        assert await harness.captured(charge.payment_id) == []

    async def test_a_webhook_names_what_to_ask_about(self, harness: Harness) -> None:
        gateway, charge = webhooks_of(harness), await begun(harness.gateway, charge_of())
        hint = await gateway.hint(*harness.webhook(charge), WAIT_S)
        assert isinstance(hint, Hint)
        assert hint.event_id
        by_id, by_reference = charge.payment_id, charge.reference
        assert (hint.payment_id, hint.reference) in ((by_id, None), (None, by_reference))
        assert await gateway.hint(*harness.webhook(charge), WAIT_S) == hint
        assert await gateway.hint(*harness.webhook(None), WAIT_S) is None
        assert await harness.captured(charge.payment_id) == []

    async def test_a_webhook_of_somebody_else_is_not_believed(self, harness: Harness) -> None:
        gateway, charge = webhooks_of(harness), await begun(harness.gateway, charge_of())
        headers, body = harness.webhook(charge)
        false = {
            "altered": (headers, body.replace(b":", b": ", 1)),
            "of another": (headers, harness.webhook(None)[1]),
            "another secret": harness.webhook(charge, secret="another"),
            "unsigned": ({}, body),
            "empty": (dict.fromkeys(headers, ""), body),
            "no ASCII": (dict.fromkeys(headers, "t=1,v1=\xe9"), body),
        }
        if harness.dates_webhooks:
            older, newer = (harness.webhook(charge, age_s=age_s) for age_s in (3600, -3600))
            false |= {"old": older, "from the future": newer}
            false["a new time with an old signature"] = harness.redated(older, headers), body
        believed = []
        for what, webhook in false.items():
            try:
                await gateway.hint(*webhook, WAIT_S)
            except BadSignature:
                continue
            believed.append(what)
        assert believed == []


def asked(
    harness: Harness, amount_cents: int = 1500, currency: str = "INR", *, declined: bool = False
) -> ProviderCharge:
    """A new charge, which the provider captures, or declines."""
    if declined:
        return charge_of(harness.declined_cents, payment_method=harness.declined_method)
    return charge_of(amount_cents, currency, payment_method=harness.method)


class Sale(NamedTuple):
    """A charge that is captured."""

    charge: ProviderCharge
    capture: Approved

    def refund(self, amount_cents: int) -> ProviderRefund:
        return refund_of(self.capture, amount_cents, self.charge.reference)


def charge_of(
    amount_cents: int = 1500,
    currency: str = "INR",
    *,
    payment_id: UUID | None = None,
    payment_method: str | None = None,
    reference: str | None = None,
) -> ProviderCharge:
    return ProviderCharge(
        payment_id=payment_id or uuid4(),
        amount_cents=amount_cents,
        currency=currency,
        payment_method=payment_method,
        reference=reference,
    )


def refund_of(capture: Approved, amount_cents: int, reference: str | None = None) -> ProviderRefund:
    return ProviderRefund(
        refund_id=uuid4(),
        payment_id=capture.id,
        provider_txn_id=capture.provider_txn_id,
        amount_cents=amount_cents,
        currency=capture.currency,
        reference=reference,
    )


async def begun(gateway: Gateway, charge: ProviderCharge) -> ProviderCharge:
    """With the reference that the service has stored before it charges."""
    reference = gateway.reference(charge)
    if reference is None and gateway.needs_preparing(charge):
        prepared = await gateway.prepare(charge, WAIT_S)
        assert isinstance(prepared, str)
        reference = prepared
    return msgspec.structs.replace(charge, reference=reference)


async def captured(harness: Harness, amount_cents: int = 1500) -> Sale:
    charge = await begun(harness.gateway, asked(harness, amount_cents))
    outcome = await harness.gateway.charge(charge, WAIT_S)
    assert isinstance(outcome, Approved)
    return Sale(charge, outcome)


async def opened(harness: Harness, step: Step) -> ProviderCharge:
    if step not in harness.steps:
        pytest.skip(f"no charge of this provider is ever {step}")
    return await harness.open(step)


def is_open(found: object, gateway: Gateway, *steps: Step) -> bool:
    """At one of these steps; ready, or unknown to a provider that finds by our id, if none."""
    if not steps and found is None:
        return gateway.knows_our_id
    return isinstance(found, Open) and found.step in (steps or ("ready",))


def webhooks_of(harness: Harness) -> WebhookGateway:
    if not harness.sends_webhooks:
        pytest.skip("this provider sends no webhooks")
    return cast(WebhookGateway, harness.gateway)


async def script(harness: Harness, fault: str, operation: str) -> None:
    if not harness.can(fault, operation):
        pytest.skip("this provider cannot be told to have this fault")
    await harness.script(fault, operation)


async def ask(
    gateway: Gateway,
    operation: str,
    refund: ProviderRefund,
    timeout_s: float,
    charge: ProviderCharge | None = None,
) -> Approved | Declined | Open | str | None:
    """One call of this operation, about this refund or its payment (then always of 15.00), or about
    this charge."""
    charge = charge or charge_of(payment_id=refund.payment_id, reference=refund.reference)
    match operation:
        case "charge":
            return await gateway.charge(charge, timeout_s)
        case "refund":
            return await gateway.refund(refund, timeout_s)
        case "find_charge":
            return await gateway.find_charge(charge, timeout_s)
        case "account":
            return await gateway.account(timeout_s)
        case _:
            return await gateway.find_refund(refund, timeout_s)


def timeout_for(fault: str) -> float:
    return TIMEOUT_S if fault in UNTIL_THE_DEADLINE else WAIT_S


async def fails(call: object, fault: str) -> None:
    """The call ends in time, and with exactly the exception that this fault means; it is known
    whether that is an outage."""
    assert asyncio.iscoroutine(call)
    with (
        within(timeout_for(fault) + LATE_S),
        pytest.raises((NeverSent, OutcomeUnknown)) as raised,
    ):
        await call
    assert raised.type is FAILURES[fault]
    assert isinstance(raised.value, NeverSent | OutcomeUnknown)
    if fault in (*OUTAGES, *NO_OUTAGES):
        assert raised.value.is_outage is (fault in OUTAGES)
