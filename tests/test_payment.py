"""What a payment's events amount to, and which event may follow which."""

from datetime import timedelta
from typing import Any
from uuid import UUID

import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st

from payments.events.facts import (
    FACTS,
    Fact,
    PaymentInitiated,
    PaymentRefunded,
)
from payments.payment.state import (
    LateCapture,
    Payment,
    Refund,
    Status,
    UnexpectedEvent,
    Unsettled,
    evolve,
    fold,
)
from tests.payment_states import (
    ABANDONED,
    ACTION,
    CHARGED,
    DECLINED,
    FOUND,
    INITIATED,
    LATE,
    ORDER_ID,
    OTHER_ID,
    PAYMENT_ID,
    R1,
    R1_BEGAN,
    R2,
    REFERENCED,
    RETURNED,
    STATES,
    STREAMS,
    SUCCESS,
    T0,
    UNKEYED,
    at,
    began,
    changed,
    given_back,
    payment_after,
    payment_in,
    refused,
)


class TestFold:
    def test_nothing_is_no_payment(self) -> None:
        assert fold([]) is None

    def test_initiated(self) -> None:
        assert payment_in("PENDING") == Payment(
            id=PAYMENT_ID,
            version=1,
            merchant_order_id=ORDER_ID,
            idempotency_key="abc123",
            fingerprint="aca6776269074565b9d8c8676dbdccb86bff9aa57bc7600de6dc98e9989d323c",
            client="order",
            amount_cents=1500,
            currency="INR",
            gateway="simulated",
            status=Status.PENDING,
            created_at=T0,
            updated_at=T0,
        )

    # What each further event changes in the payment, besides its version and `updated_at`.
    CHANGES: list[tuple[list[Fact], dict[str, Any]]] = [  # noqa: RUF012
        ([INITIATED, REFERENCED], {"provider_reference": "pi_1"}),
        ([INITIATED, ACTION], {"action_required": True}),
        ([INITIATED, CHARGED], {"status": Status.SUCCESS, "provider_txn_id": "txn-1"}),
        (
            [INITIATED, DECLINED],
            {"status": Status.FAILED, "failure": "declined", "decline_code": "no_funds"},
        ),
        ([INITIATED, ABANDONED], {"status": Status.FAILED, "failure": "abandoned"}),
        (
            STREAMS["500 under way"],
            {
                "refunds": (
                    Refund(
                        id=R1,
                        version=3,
                        idempotency_key="r1",
                        client="order",
                        amount_cents=500,
                        whole=False,
                        status=Status.PENDING,
                        created_at=at(3),
                        updated_at=at(3),
                    ),
                )
            },
        ),
        (
            STREAMS["500 back"],
            {
                "refunds": (
                    Refund(
                        id=R1,
                        version=3,
                        idempotency_key="r1",
                        client="order",
                        amount_cents=500,
                        whole=False,
                        status=Status.SUCCESS,
                        created_at=at(3),
                        updated_at=at(4),
                        refunded_cents=500,
                        provider_refund_id="re-1",
                    ),
                )
            },
        ),
        (
            [*STREAMS["all under way"], refused(4, UNKEYED, 1500)],
            {
                "refunds": (
                    Refund(
                        id=UNKEYED,
                        version=3,
                        idempotency_key=None,
                        client="order",
                        amount_cents=1500,
                        whole=True,
                        status=Status.FAILED,
                        created_at=at(3),
                        updated_at=at(4),
                        decline_code="account_closed",
                    ),
                )
            },
        ),
        (
            STREAMS["late capture found"],
            {
                "late_capture": LateCapture(
                    refund_id=LATE, version=3, found_at=at(3), provider_txn_id="txn-1"
                )
            },
        ),
        (
            STREAMS["late capture returned"],
            {
                "late_capture": LateCapture(
                    refund_id=LATE,
                    version=3,
                    found_at=at(3),
                    provider_txn_id="txn-1",
                    provider_refund_id="re-1",
                )
            },
        ),
    ]

    @pytest.mark.parametrize(
        ("stream", "changes"), CHANGES, ids=[stream[-1].TOPIC for stream, _ in CHANGES]
    )
    def test_each_event_changes_this_and_nothing_else(
        self, stream: list[Fact], changes: dict[str, Any]
    ) -> None:
        version = len(stream)
        assert payment_after(stream) == msgspec.structs.replace(
            payment_after(stream[:-1]), version=version, updated_at=at(version), **changes
        )

    def test_every_event_but_the_first_is_among_them(self) -> None:
        assert {type(stream[-1]) for stream, _ in self.CHANGES} == {
            fact for fact in FACTS.values() if fact is not PaymentInitiated
        }

    def test_a_reference_that_the_client_supplied(self) -> None:
        payment = payment_after([changed(INITIATED, provider_reference="pay_1")])
        assert payment == msgspec.structs.replace(payment_in("PENDING"), provider_reference="pay_1")
        with pytest.raises(UnexpectedEvent):
            evolve(payment, REFERENCED)

    @pytest.mark.parametrize("state", STATES)
    def test_an_action_is_awaited_until_there_is_an_outcome(self, state: str) -> None:
        awaited = state in ("to act", "referenced, to act")
        assert payment_in(state).awaits_action is awaited

    def test_a_reference_outlives_the_outcome(self) -> None:
        payment = payment_after([INITIATED, REFERENCED, changed(CHARGED, version=3)])
        assert (payment.provider_reference, payment.provider_txn_id) == ("pi_1", "txn-1")

    def test_refunds_are_told_apart(self) -> None:
        payment = payment_in("REFUNDED in parts")
        assert [(each.id, each.status, each.refunded_cents) for each in payment.refunds] == [
            (R1, Status.SUCCESS, 800),
            (R2, Status.SUCCESS, 300),
            (UNKEYED, Status.SUCCESS, 1500),
        ]
        payment = payment_in("300 back, 500 refused")
        assert [(each.id, each.status, each.refunded_cents) for each in payment.refunds] == [
            (R2, Status.SUCCESS, 300),
            (R1, Status.FAILED, 0),
        ]
        assert [(each.provider_refund_id, each.decline_code) for each in payment.refunds] == [
            ("re-1", None),
            (None, "account_closed"),
        ]
        assert [(each.created_at, each.updated_at) for each in payment.refunds] == [
            (at(3), at(5)),
            (at(4), at(6)),
        ]

    def test_a_refund_belongs_to_the_client_that_asked_for_it(self) -> None:
        by_staff = changed(R1_BEGAN, client="staff")
        payment = payment_after([*SUCCESS, by_staff])
        assert (payment.client, payment.refunds[0].client) == ("order", "staff")

    @given(st.sampled_from(list(STREAMS.values())), st.integers(0, 8))
    def test_a_prefix_and_then_the_rest_is_the_whole(self, stream: list[Fact], cut: int) -> None:
        assert fold(stream[cut:], fold(stream[:cut])) == fold(stream)

    @pytest.mark.parametrize("state", STATES)
    def test_time_never_runs_backwards(self, state: str) -> None:
        """Each fact here comes from a clock that is a minute behind the one before it."""
        stream = [
            changed(fact, occurred_at=T0 - timedelta(minutes=fact.version - 1))
            for fact in STREAMS[state]
        ]
        payment = payment_after(stream)
        assert payment.updated_at == payment.created_at == T0
        assert all(each.updated_at == each.created_at for each in payment.refunds)


# What a payment comes to in each state.
STANDING: dict[str, tuple[Status, Status, int, int, int, Unsettled | None]] = {
    # status, outcome of the charge, refunded, reserved, remaining, unsettled
    "PENDING": (Status.PENDING, Status.PENDING, 0, 0, 0, Unsettled("charge", at(1))),
    **dict.fromkeys(
        ("referenced", "to act", "referenced, to act"),
        (Status.PENDING, Status.PENDING, 0, 0, 0, Unsettled("charge", at(1))),
    ),
    "SUCCESS": (Status.SUCCESS, Status.SUCCESS, 0, 0, 1500, None),
    "500 under way": (
        *(Status.SUCCESS, Status.SUCCESS, 0, 500, 1000),
        Unsettled("refund", at(3)),
    ),
    "all under way": (
        *(Status.SUCCESS, Status.SUCCESS, 0, 1500, 0),
        Unsettled("refund", at(3)),
    ),
    "500 back": (Status.SUCCESS, Status.SUCCESS, 500, 0, 1000, None),
    "500 back, 300 going": (
        *(Status.SUCCESS, Status.SUCCESS, 500, 300, 700),
        Unsettled("refund", at(5)),
    ),
    "300 back, 500 refused": (Status.SUCCESS, Status.SUCCESS, 300, 0, 1200, None),
    "REFUNDED at once": (Status.REFUNDED, Status.SUCCESS, 1500, 0, 0, None),
    "REFUNDED in parts": (Status.REFUNDED, Status.SUCCESS, 1500, 0, 0, None),
    "FAILED declined": (Status.FAILED, Status.FAILED, 0, 0, 0, None),
    "FAILED abandoned": (Status.FAILED, Status.FAILED, 0, 0, 0, Unsettled("abandoned", at(1))),
    "late capture found": (
        *(Status.FAILED, Status.FAILED, 0, 0, 0),
        Unsettled("late_capture", at(3)),
    ),
    "late capture returned": (Status.FAILED, Status.FAILED, 0, 0, 0, None),
}


class TestStanding:
    def test_the_table_covers_every_state(self) -> None:
        assert list(STANDING) == STATES

    @pytest.mark.parametrize("state", STATES)
    def test_every_state(self, state: str) -> None:
        payment = payment_in(state)
        assert (
            payment.status,
            payment.outcome,
            payment.refunded_cents,
            payment.reserved_cents,
            payment.remaining_cents,
            payment.unsettled,
        ) == STANDING[state]

    def test_of_several_refunds_under_way_the_oldest_is_the_most_urgent(self) -> None:
        payment = payment_after([*STREAMS["500 under way"], began(4, R2, 300)])
        assert payment.unsettled == Unsettled("refund", at(3))

    def test_a_refund_that_is_under_way_is_urgent_beside_one_that_is_done(self) -> None:
        stream = [*STREAMS["500 under way"], began(4, R2, 300), given_back(5, R1, 500, 500)]
        assert payment_after(stream).unsettled == Unsettled("refund", at(4))

    def test_a_late_capture_after_a_decline_goes_back_as_well(self) -> None:
        payment = payment_after([INITIATED, DECLINED, FOUND])
        assert payment.unsettled == Unsettled("late_capture", at(3))
        assert evolve(payment, RETURNED).unsettled is None

    def test_a_refund_is_found_by_its_id(self) -> None:
        payment = payment_in("300 back, 500 refused")
        assert (payment.refund(R2), payment.refund(R1)) == payment.refunds
        assert payment.refund(UNKEYED) is None
        assert payment_in("PENDING").refund(R1) is None


def next_fact(topic: str, payment: Payment | None) -> Fact:
    """A fact that fits the payment as well as one of its topic can."""
    version = payment.version + 1 if payment else 1
    refund_id, amount_cents = R1, 500
    if payment and payment.refunds:
        refund_id, amount_cents = payment.refunds[-1].id, payment.refunds[-1].amount_cents
    back = (payment.refunded_cents if payment else 0) + amount_cents
    return {
        "PaymentInitiated": changed(INITIATED, version=version),
        "PaymentReferenced": changed(REFERENCED, version=version),
        "PaymentActionRequired": changed(ACTION, version=version),
        "PaymentCharged": changed(CHARGED, version=version),
        "PaymentFailed": changed(DECLINED, version=version),
        "RefundInitiated": began(version, OTHER_ID, 1),
        "PaymentRefunded": given_back(version, refund_id, amount_cents, back),
        "RefundFailed": refused(version, refund_id, amount_cents),
        "LateCaptureFound": changed(FOUND, version=version),
        "LateCaptureReturned": changed(RETURNED, version=version),
    }[topic]


# Which fact may stand after which state, and the status then. No other may.
NEXT: dict[tuple[str, str], Status] = {
    ("none", "PaymentInitiated"): Status.PENDING,
    ("PENDING", "PaymentReferenced"): Status.PENDING,
    ("PENDING", "PaymentActionRequired"): Status.PENDING,
    ("PENDING", "PaymentCharged"): Status.SUCCESS,
    ("PENDING", "PaymentFailed"): Status.FAILED,
    ("referenced", "PaymentActionRequired"): Status.PENDING,
    ("referenced", "PaymentCharged"): Status.SUCCESS,
    ("referenced", "PaymentFailed"): Status.FAILED,
    ("to act", "PaymentReferenced"): Status.PENDING,
    ("to act", "PaymentCharged"): Status.SUCCESS,
    ("to act", "PaymentFailed"): Status.FAILED,
    ("referenced, to act", "PaymentCharged"): Status.SUCCESS,
    ("referenced, to act", "PaymentFailed"): Status.FAILED,
    ("SUCCESS", "RefundInitiated"): Status.SUCCESS,
    ("500 under way", "RefundInitiated"): Status.SUCCESS,
    ("500 under way", "PaymentRefunded"): Status.SUCCESS,
    ("500 under way", "RefundFailed"): Status.SUCCESS,
    ("all under way", "PaymentRefunded"): Status.REFUNDED,
    ("all under way", "RefundFailed"): Status.SUCCESS,
    ("500 back", "RefundInitiated"): Status.SUCCESS,
    ("500 back, 300 going", "RefundInitiated"): Status.SUCCESS,
    ("500 back, 300 going", "PaymentRefunded"): Status.SUCCESS,
    ("500 back, 300 going", "RefundFailed"): Status.SUCCESS,
    ("300 back, 500 refused", "RefundInitiated"): Status.SUCCESS,
    ("FAILED declined", "LateCaptureFound"): Status.FAILED,
    ("FAILED abandoned", "LateCaptureFound"): Status.FAILED,
    ("late capture found", "LateCaptureReturned"): Status.FAILED,
}
# What may follow a payment, and may not if it is about something else.
FOLLOWING = [pair for pair in NEXT if pair[0] != "none"]
following = pytest.mark.parametrize(("state", "topic"), FOLLOWING)


class TestEvolve:
    @pytest.mark.parametrize("topic", FACTS)
    @pytest.mark.parametrize("state", STREAMS)
    def test_every_fact_in_every_state(self, state: str, topic: str) -> None:
        payment = fold(STREAMS[state])
        fact = next_fact(topic, payment)
        expected = NEXT.get((state, topic))
        if expected is None:
            with pytest.raises(UnexpectedEvent):
                evolve(payment, fact)
        else:
            assert evolve(payment, fact).status is expected

    def test_every_fact_may_stand_somewhere(self) -> None:
        assert {topic for _, topic in NEXT} == set(FACTS)
        assert {state for state, _ in NEXT} < set(STREAMS)

    @pytest.mark.parametrize("version", [-1, 0, 2, 3])
    def test_a_stream_begins_at_version_1(self, version: int) -> None:
        with pytest.raises(UnexpectedEvent):
            evolve(None, changed(INITIATED, version=version))

    @following
    @pytest.mark.parametrize("by", [-2, -1, 1, 2])
    def test_versions_have_no_gaps_and_never_repeat(self, state: str, topic: str, by: int) -> None:
        payment = payment_in(state)
        fact = next_fact(topic, payment)
        with pytest.raises(UnexpectedEvent):
            evolve(payment, changed(fact, version=fact.version + by))

    @following
    def test_a_fact_of_another_payment_is_refused(self, state: str, topic: str) -> None:
        payment = payment_in(state)
        with pytest.raises(UnexpectedEvent):
            evolve(payment, changed(next_fact(topic, payment), payment_id=OTHER_ID))

    @following
    @pytest.mark.parametrize("currency", ["USD", "inr", ""])
    def test_a_fact_in_another_currency_is_refused(
        self, state: str, topic: str, currency: str
    ) -> None:
        payment = payment_in(state)
        with pytest.raises(UnexpectedEvent):
            evolve(payment, changed(next_fact(topic, payment), currency=currency))

    @following
    def test_a_fact_about_another_order_is_refused(self, state: str, topic: str) -> None:
        payment = payment_in(state)
        with pytest.raises(UnexpectedEvent):
            evolve(payment, changed(next_fact(topic, payment), merchant_order_id=OTHER_ID))

    @pytest.mark.parametrize(
        ("state", "topic"), [pair for pair in FOLLOWING if pair[1] != "RefundInitiated"]
    )
    @pytest.mark.parametrize("by", [-1, 1, -(10**6)])
    def test_a_fact_about_another_amount_is_refused(self, state: str, topic: str, by: int) -> None:
        """Also if its totals agree with that amount: only what was reserved can be given back."""
        payment = payment_in(state)
        fact: Any = next_fact(topic, payment)
        changes = {"amount_cents": fact.amount_cents + by}
        with pytest.raises(UnexpectedEvent):
            evolve(payment, changed(fact, **changes))
        if isinstance(fact, PaymentRefunded):
            with pytest.raises(UnexpectedEvent):
                evolve(payment, changed(fact, **changes, refunded_cents=fact.refunded_cents + by))

    @pytest.mark.parametrize("state", [state for state in STATES if STANDING[state][4]])
    def test_a_refund_reserves_at_most_what_remains(self, state: str) -> None:
        payment = payment_in(state)
        remaining_cents = STANDING[state][4]
        fitting = began(payment.version + 1, OTHER_ID, remaining_cents)
        assert evolve(payment, fitting).remaining_cents == 0
        for amount_cents in (remaining_cents + 1, 2**31):
            with pytest.raises(UnexpectedEvent):
                evolve(payment, changed(fitting, amount_cents=amount_cents))

    @pytest.mark.parametrize("state", STATES)
    @pytest.mark.parametrize("amount_cents", [0, -1, -1500])
    def test_a_refund_is_never_of_nothing_or_less(self, state: str, amount_cents: int) -> None:
        payment = payment_in(state)
        with pytest.raises(UnexpectedEvent):
            evolve(payment, began(payment.version + 1, OTHER_ID, amount_cents))

    @pytest.mark.parametrize("state", [state for state in STATES if payment_in(state).refunds])
    def test_a_refund_begins_once(self, state: str) -> None:
        """Whether it is under way, was given back or was refused."""
        payment = payment_in(state)
        for refund in payment.refunds:
            with pytest.raises(UnexpectedEvent):
                evolve(payment, began(payment.version + 1, refund.id, 1))

    @pytest.mark.parametrize("state", [state for state in STATES if payment_in(state).refunds])
    def test_a_refund_ends_once(self, state: str) -> None:
        payment = payment_in(state)
        version = payment.version + 1
        for refund in payment.refunds:
            if refund.status is Status.PENDING:
                continue
            back = payment.refunded_cents + refund.amount_cents
            for fact in (
                given_back(version, refund.id, refund.amount_cents, back),
                given_back(version, refund.id, refund.amount_cents, payment.refunded_cents),
                refused(version, refund.id, refund.amount_cents),
            ):
                with pytest.raises(UnexpectedEvent):
                    evolve(payment, fact)

    @pytest.mark.parametrize(
        ("state", "topic"),
        [pair for pair in FOLLOWING if pair[1] in ("PaymentRefunded", "RefundFailed")],
    )
    def test_a_refund_that_never_began_does_not_end(self, state: str, topic: str) -> None:
        payment = payment_in(state)
        with pytest.raises(UnexpectedEvent):
            evolve(payment, changed(next_fact(topic, payment), refund_id=OTHER_ID))

    @pytest.mark.parametrize(
        "state", [state for state, topic in FOLLOWING if topic == "PaymentRefunded"]
    )
    @pytest.mark.parametrize("total", ["refunded_cents", "captured_cents"])
    @pytest.mark.parametrize("by", [-500, -1, 1, 500])
    def test_totals_that_do_not_add_up_are_refused(self, state: str, total: str, by: int) -> None:
        payment = payment_in(state)
        fact = next_fact("PaymentRefunded", payment)
        with pytest.raises(UnexpectedEvent):
            evolve(payment, changed(fact, **{total: getattr(fact, total) + by}))

    @pytest.mark.parametrize("refund_id", [OTHER_ID, R1, PAYMENT_ID])
    def test_a_late_capture_goes_back_under_its_own_refund_id(self, refund_id: UUID) -> None:
        with pytest.raises(UnexpectedEvent):
            evolve(payment_in("late capture found"), changed(RETURNED, refund_id=refund_id))

    @pytest.mark.parametrize("state", STATES)
    def test_the_payment_before_is_untouched(self, state: str) -> None:
        stream = STREAMS[state]
        before = fold(stream[:-1])
        evolve(before, stream[-1])
        assert before == fold(stream[:-1])
