"""What every gateway must do, whatever provider is behind it.

A test module subclasses GatewayConformance and gives it a fixture `harness`. Faults that its
provider cannot be told to have are skipped. docs/gateways.md says what each case is about.
"""

import asyncio
from typing import Protocol
from uuid import UUID, uuid4

import pytest

from payments.gateways import (
    Gateway,
    NeverSent,
    OutcomeUnknown,
    ProviderCharge,
    ProviderRefund,
)
from payments.payment.state import Approved, Declined
from tests.machine import within

OPERATIONS = ("charge", "refund", "find_charge", "find_refund")
WAIT_S = 10.0  # where nothing is meant to go wrong
TIMEOUT_S = 0.4  # where the deadline is meant to pass
LATE_S = 1.0  # how much later than its deadline a call may end

# Each failure, and how it must be reported.
FAILURES: dict[str, type[Exception]] = {
    "refused": NeverSent,  # nothing listens
    "500": OutcomeUnknown,  # before the provider does anything
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
UNTIL_THE_DEADLINE = ("timeout", "slow", "drip")
MISMATCHES = ("wrong_id", "wrong_amount", "wrong_currency")


class Harness(Protocol):
    """A gateway, and the test's hold on the provider behind it."""

    @property
    def gateway(self) -> Gateway:
        """Ask for it anew after `script`."""
        ...

    declined_cents: int
    """An amount that is declined as a charge."""

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
        assert gateway.name
        assert gateway.name.isascii()
        assert gateway.name.isprintable()
        assert gateway.safe_retry_s >= 0
        assert gateway.late_capture_s >= 0

    @pytest.mark.parametrize(
        ("amount_cents", "currency"),
        [(1, "INR"), (1500, "INR"), (500, "JPY"), (2_147_483_640, "USD")],
    )
    async def test_a_charge_is_captured(
        self, harness: Harness, amount_cents: int, currency: str
    ) -> None:
        charge = charge_of(amount_cents, currency)
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
        charge = charge_of(harness.declined_cents)
        outcome = await harness.gateway.charge(charge, WAIT_S)
        assert isinstance(outcome, Declined)
        assert outcome.code
        assert await harness.captured(charge.payment_id) == []

    async def test_each_capture_has_an_id_of_its_own(self, harness: Harness) -> None:
        first, second = await captured(harness), await captured(harness)
        assert first.provider_txn_id != second.provider_txn_id

    @pytest.mark.parametrize("declined", [False, True])
    async def test_a_charge_can_be_found(self, harness: Harness, declined: bool) -> None:
        charge = charge_of(harness.declined_cents if declined else 1500)
        outcome = await harness.gateway.charge(charge, WAIT_S)
        assert await harness.gateway.find_charge(charge.payment_id, WAIT_S) == outcome

    async def test_an_unknown_charge_is_not_found(self, harness: Harness) -> None:
        await captured(harness)
        assert await harness.gateway.find_charge(uuid4(), WAIT_S) is None

    @pytest.mark.parametrize("declined", [False, True])
    async def test_the_same_charge_twice(self, harness: Harness, declined: bool) -> None:
        charge = charge_of(harness.declined_cents if declined else 1500)
        first = await harness.gateway.charge(charge, WAIT_S)
        assert await harness.gateway.charge(charge, WAIT_S) == first
        assert len(await harness.captured(charge.payment_id)) == (not declined)

    async def test_the_same_charge_32_times_at_once(self, harness: Harness) -> None:
        charge, gateway = charge_of(), harness.gateway
        outcomes = await asyncio.gather(*(gateway.charge(charge, WAIT_S) for _ in range(32)))
        assert isinstance(outcomes[0], Approved)
        assert set(outcomes) == {outcomes[0]}
        assert await harness.captured(charge.payment_id) == [1500]

    async def test_32_charges_at_once(self, harness: Harness) -> None:
        charges, gateway = [charge_of(1000 + n * 10) for n in range(32)], harness.gateway
        outcomes = await asyncio.gather(*(gateway.charge(each, WAIT_S) for each in charges))
        for charge, outcome in zip(charges, outcomes, strict=True):
            assert isinstance(outcome, Approved)
            assert (outcome.id, outcome.amount_cents) == (charge.payment_id, charge.amount_cents)
            assert await harness.captured(charge.payment_id) == [charge.amount_cents]

    async def test_another_amount_under_the_same_id_captures_nothing(
        self, harness: Harness
    ) -> None:
        first = await captured(harness)
        try:
            outcome = await harness.gateway.charge(
                ProviderCharge(payment_id=first.id, amount_cents=2500, currency=first.currency),
                WAIT_S,
            )
        except OutcomeUnknown:
            outcome = first
        assert outcome == first
        assert await harness.captured(first.id) == [1500]

    @pytest.mark.parametrize("fault", FAILURES)
    async def test_a_charge_that_fails(self, harness: Harness, fault: str) -> None:
        """How it is reported, that asking then tells the truth, and that sending it again mends."""
        await captured(harness)  # so that there is a kept connection, if it keeps any
        charge = charge_of()
        await script(harness, fault, "charge")
        await fails(harness.gateway.charge(charge, timeout_for(fault)), fault)
        await harness.recover()
        truth = await harness.captured(charge.payment_id)
        assert truth in ([], [1500])
        assert FAILURES[fault] is OutcomeUnknown or truth == []
        found = await harness.gateway.find_charge(charge.payment_id, WAIT_S)
        assert isinstance(found, Approved if truth else type(None))
        again = await harness.gateway.charge(charge, WAIT_S)
        assert isinstance(again, Approved)
        assert found in (None, again)
        assert await harness.captured(charge.payment_id) == [1500]

    @pytest.mark.parametrize("fault", FAILURES)
    async def test_a_refund_that_fails(self, harness: Harness, fault: str) -> None:
        refund = refund_of(await captured(harness), 600)
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
    @pytest.mark.parametrize("operation", ["find_charge", "find_refund"])
    async def test_a_question_that_fails_is_not_answered_no(
        self, harness: Harness, operation: str, fault: str
    ) -> None:
        capture = await captured(harness)
        refund = refund_of(capture, 1500)
        await harness.gateway.refund(refund, WAIT_S)
        await script(harness, fault, operation)
        await fails(ask(harness.gateway, operation, refund, timeout_for(fault)), fault)
        await harness.recover()
        assert isinstance(await ask(harness.gateway, operation, refund, WAIT_S), Approved)

    @pytest.mark.parametrize("mismatch", MISMATCHES)
    @pytest.mark.parametrize("operation", OPERATIONS)
    async def test_what_the_provider_states_is_passed_on_unchanged(
        self, harness: Harness, operation: str, mismatch: str
    ) -> None:
        """The caller compares, and must get to see it."""
        capture = await captured(harness)
        refund = refund_of(capture, 600)
        if operation == "find_refund":
            await harness.gateway.refund(refund, WAIT_S)
        await script(harness, mismatch, operation)
        stated = await ask(harness.gateway, operation, refund, WAIT_S)
        assert isinstance(stated, Approved)
        true_id, true_amount = (
            (refund.refund_id, 600) if "refund" in operation else (capture.id, 1500)
        )
        assert (stated.id != true_id) is (mismatch == "wrong_id")
        assert (stated.amount_cents != true_amount) is (mismatch == "wrong_amount")
        assert (stated.currency != "INR") is (mismatch == "wrong_currency")

    async def test_a_full_refund(self, harness: Harness) -> None:
        capture = await captured(harness)
        refund = refund_of(capture, 1500)
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
        capture = await captured(harness)
        await harness.gateway.refund(refund_of(capture, 600), WAIT_S)
        assert await harness.gateway.find_charge(capture.id, WAIT_S) == capture

    async def test_partial_refunds_up_to_the_capture(self, harness: Harness) -> None:
        capture = await captured(harness)
        for amount_cents, outcome in ((600, Approved), (900, Approved), (100, Declined)):
            refund = refund_of(capture, amount_cents)
            assert isinstance(await harness.gateway.refund(refund, WAIT_S), outcome)
            given_back = [amount_cents] if outcome is Approved else []
            assert await harness.given_back(refund.refund_id) == given_back

    async def test_a_refund_beyond_the_capture_is_declined(self, harness: Harness) -> None:
        refund = refund_of(await captured(harness), 1600)
        outcome = await harness.gateway.refund(refund, WAIT_S)
        assert isinstance(outcome, Declined)
        assert outcome.code
        assert await harness.given_back(refund.refund_id) == []
        assert await harness.gateway.find_refund(refund, WAIT_S) in (None, outcome)

    async def test_a_refund_of_what_was_never_captured_is_declined(self, harness: Harness) -> None:
        capture = Approved(
            id=uuid4(), amount_cents=1500, currency="INR", provider_txn_id="never_captured"
        )
        outcome = await harness.gateway.refund(refund_of(capture, 600), WAIT_S)
        assert isinstance(outcome, Declined)

    async def test_an_unknown_refund_is_not_found(self, harness: Harness) -> None:
        refund = refund_of(await captured(harness), 600)
        assert await harness.gateway.find_refund(refund, WAIT_S) is None

    async def test_the_same_refund_twice(self, harness: Harness) -> None:
        refund = refund_of(await captured(harness), 600)
        first = await harness.gateway.refund(refund, WAIT_S)
        assert await harness.gateway.refund(refund, WAIT_S) == first
        assert await harness.given_back(refund.refund_id) == [600]

    async def test_the_same_refund_32_times_at_once(self, harness: Harness) -> None:
        refund, gateway = refund_of(await captured(harness), 600), harness.gateway
        outcomes = await asyncio.gather(*(gateway.refund(refund, WAIT_S) for _ in range(32)))
        assert isinstance(outcomes[0], Approved)
        assert set(outcomes) == {outcomes[0]}
        assert await harness.given_back(refund.refund_id) == [600]

    async def test_refunds_at_once_stay_within_the_capture(self, harness: Harness) -> None:
        capture, gateway = await captured(harness, 1000), harness.gateway
        refunds = [refund_of(capture, 300) for _ in range(8)]
        outcomes = await asyncio.gather(*(gateway.refund(each, WAIT_S) for each in refunds))
        assert sum(isinstance(outcome, Approved) for outcome in outcomes) == 3
        assert [len(await harness.given_back(each.refund_id)) for each in refunds].count(1) == 3

    @pytest.mark.parametrize("operation", OPERATIONS)
    async def test_a_cancelled_call_harms_no_other(self, harness: Harness, operation: str) -> None:
        refund = refund_of(await captured(harness), 600)
        await script(harness, "timeout", operation)
        running = asyncio.create_task(ask(harness.gateway, operation, refund, WAIT_S))
        await asyncio.sleep(0.05)  # until it is sent; it is cancelled wherever it has got to
        running.cancel()
        with pytest.raises(asyncio.CancelledError):
            await running
        await harness.recover()
        await captured(harness)


def charge_of(amount_cents: int = 1500, currency: str = "INR") -> ProviderCharge:
    return ProviderCharge(payment_id=uuid4(), amount_cents=amount_cents, currency=currency)


def refund_of(capture: Approved, amount_cents: int) -> ProviderRefund:
    return ProviderRefund(
        refund_id=uuid4(),
        payment_id=capture.id,
        provider_txn_id=capture.provider_txn_id,
        amount_cents=amount_cents,
        currency=capture.currency,
    )


async def captured(harness: Harness, amount_cents: int = 1500) -> Approved:
    outcome = await harness.gateway.charge(charge_of(amount_cents), WAIT_S)
    assert isinstance(outcome, Approved)
    return outcome


async def script(harness: Harness, fault: str, operation: str) -> None:
    if not harness.can(fault, operation):
        pytest.skip("this provider cannot be told to have this fault")
    await harness.script(fault, operation)


async def ask(
    gateway: Gateway, operation: str, refund: ProviderRefund, timeout_s: float
) -> Approved | Declined | None:
    """One call of this operation, about this refund or its payment (then always of 15.00)."""
    match operation:
        case "charge":
            charge = ProviderCharge(
                payment_id=refund.payment_id, amount_cents=1500, currency=refund.currency
            )
            return await gateway.charge(charge, timeout_s)
        case "refund":
            return await gateway.refund(refund, timeout_s)
        case "find_charge":
            return await gateway.find_charge(refund.payment_id, timeout_s)
        case _:
            return await gateway.find_refund(refund, timeout_s)


def timeout_for(fault: str) -> float:
    return TIMEOUT_S if fault in UNTIL_THE_DEADLINE else WAIT_S


async def fails(call: object, fault: str) -> None:
    """The call ends in time, and with exactly the exception that this fault means."""
    assert asyncio.iscoroutine(call)
    with (
        within(timeout_for(fault) + LATE_S),
        pytest.raises((NeverSent, OutcomeUnknown)) as raised,
    ):
        await call
    assert raised.type is FAILURES[fault]
