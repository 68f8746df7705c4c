"""The aggregate: given these events, when this, then that."""

import uuid
from collections.abc import Sequence
from datetime import UTC, datetime, timedelta
from typing import Any
from uuid import UUID

import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st

from payments.events.facts import FACTS, Fact, PaymentCharged, PaymentFailed, PaymentInitiated
from payments.payment import (
    Approved,
    Cause,
    ChargeRequest,
    Declined,
    OutcomeMismatch,
    Payment,
    Status,
    UnexpectedEvent,
    differing_fields,
    evolve,
    fingerprint,
    fold,
    initiate,
    payment_id_for,
    record_outcome,
)

ORDER_ID = UUID("f50d9fa2-5d3e-4e49-9a02-218ad32ef4a9")
PAYMENT_ID = UUID("058c9593-e150-402f-ab5b-37dd4c9816f0")
OTHER_ID = UUID("11111111-1111-4111-8111-111111111111")
T0 = datetime(2026, 1, 2, 3, 4, 5, 6, tzinfo=UTC)
T1 = T0 + timedelta(seconds=1)

REQUEST = ChargeRequest(
    idempotency_key="abc123",
    merchant_order_id=ORDER_ID,
    amount_cents=1500,
    currency="INR",
    client="order",
    payment_method="tok_1",
)
# One other value for every part of a request but the key.
CHANGES: dict[str, Any] = {
    "merchant_order_id": OTHER_ID,
    "amount_cents": 1501,
    "currency": "USD",
    "client": "someone-else",
    "payment_method": "tok_2",
}


def cause(occurred_at: datetime) -> Cause:
    return Cause(UUID(int=7), occurred_at, "order", "request-1", "00-" + "a" * 32 + "-1-01")


def changed(request: ChargeRequest, **fields: Any) -> ChargeRequest:
    return msgspec.structs.replace(request, **fields)


INITIATED = initiate(REQUEST, "simulated", cause(T0))
OUTCOME: dict[str, Any] = {
    "payment_id": PAYMENT_ID,
    "version": 2,
    "event_id": UUID(int=7),
    "occurred_at": T1,
    "client": "order",
    "request_id": "request-1",
    "traceparent": "00-" + "a" * 32 + "-1-01",
    "merchant_order_id": ORDER_ID,
    "amount_cents": 1500,
    "currency": "INR",
}
CHARGED = PaymentCharged(**OUTCOME, provider_txn_id="txn-1")
FAILED = PaymentFailed(**OUTCOME, reason="declined", decline_code="no_funds")

APPROVED = Approved(PAYMENT_ID, 1500, "INR", "txn-1")
DECLINED = Declined("no_funds")

# A stream for every status that facts lead to so far.
STREAMS: dict[Status, list[Fact]] = {
    Status.PENDING: [INITIATED],
    Status.SUCCESS: [INITIATED, CHARGED],
    Status.FAILED: [INITIATED, FAILED],
}


def payment_after(facts: Sequence[Fact]) -> Payment:
    payment = fold(facts)
    assert payment is not None
    return payment


class TestPaymentId:
    @pytest.mark.parametrize(
        ("key", "payment_id"),
        [
            ("abc123", "058c9593-e150-402f-ab5b-37dd4c9816f0"),
            ("order-1-pay", "8547688f-377d-4974-9296-f22dca7975c5"),
            ("0" * 255, "cb98bdd0-11b8-43db-9561-acf1f51d350b"),
        ],
    )
    def test_a_key_means_the_same_payment_for_ever(self, key: str, payment_id: str) -> None:
        assert payment_id_for(key) == UUID(payment_id)

    @given(st.text(st.characters(min_codepoint=0x20, max_codepoint=0x7E), max_size=255))
    def test_it_is_a_version_4_uuid(self, key: str) -> None:
        payment_id = payment_id_for(key)
        assert payment_id.version == 4
        assert payment_id.variant == uuid.RFC_4122
        assert payment_id == payment_id_for(key)

    @given(st.text(max_size=20), st.text(max_size=20))
    def test_two_keys_mean_two_payments(self, one: str, other: str) -> None:
        assert (payment_id_for(one) == payment_id_for(other)) is (one == other)


class TestFingerprint:
    def test_it_is_pinned(self) -> None:
        """It is stored: a change would turn every replay of an old key into a 422."""
        assert (
            fingerprint(REQUEST)
            == "aca6776269074565b9d8c8676dbdccb86bff9aa57bc7600de6dc98e9989d323c"
        )

    def test_equal_requests_have_equal_ones(self) -> None:
        assert fingerprint(REQUEST) == fingerprint(changed(REQUEST))

    def test_the_key_is_no_part_of_it(self) -> None:
        assert fingerprint(REQUEST) == fingerprint(changed(REQUEST, idempotency_key="other"))

    @pytest.mark.parametrize("field", CHANGES)
    def test_every_other_field_is(self, field: str) -> None:
        other = changed(REQUEST, **{field: CHANGES[field]})
        assert fingerprint(REQUEST) != fingerprint(other)

    def test_no_payment_method_differs_from_any(self) -> None:
        without = changed(REQUEST, payment_method=None)
        assert len({fingerprint(without), fingerprint(REQUEST)}) == 2
        assert fingerprint(without) != fingerprint(changed(REQUEST, payment_method=""))
        assert fingerprint(without) != fingerprint(changed(REQUEST, payment_method="null"))

    def test_the_changes_cover_every_field(self) -> None:
        assert {*CHANGES, "idempotency_key"} == set(ChargeRequest.__struct_fields__)


class TestDifferingFields:
    def test_none_for_the_same_request(self) -> None:
        assert differing_fields(payment_after([INITIATED]), REQUEST) == ()

    def test_none_after_the_outcome_either(self) -> None:
        assert differing_fields(payment_after([INITIATED, CHARGED]), REQUEST) == ()

    @pytest.mark.parametrize("field", CHANGES)
    def test_each_field_is_named(self, field: str) -> None:
        other = changed(REQUEST, **{field: CHANGES[field]})
        assert differing_fields(payment_after([INITIATED]), other) == (field,)

    def test_a_payment_method_that_comes_or_goes_is_named(self) -> None:
        without = changed(REQUEST, payment_method=None)
        began_without = payment_after([initiate(without, "simulated", cause(T0))])
        assert differing_fields(payment_after([INITIATED]), without) == ("payment_method",)
        assert differing_fields(began_without, REQUEST) == ("payment_method",)

    def test_all_stored_fields_that_differ_are_named(self) -> None:
        other = changed(REQUEST, **CHANGES)
        assert differing_fields(payment_after([INITIATED]), other) == (
            "merchant_order_id",
            "amount_cents",
            "currency",
            "client",
        )


class TestInitiate:
    def test_a_request_becomes_the_first_event(self) -> None:
        assert initiate(REQUEST, "simulated", cause(T0)) == PaymentInitiated(
            payment_id=PAYMENT_ID,
            version=1,
            event_id=UUID(int=7),
            occurred_at=T0,
            client="order",
            request_id="request-1",
            traceparent="00-" + "a" * 32 + "-1-01",
            idempotency_key="abc123",
            fingerprint=fingerprint(REQUEST),
            merchant_order_id=ORDER_ID,
            amount_cents=1500,
            currency="INR",
            gateway="simulated",
        )

    def test_the_payment_method_is_not_stored(self) -> None:
        assert b"tok_1" not in msgspec.json.encode(INITIATED)


class TestRecordOutcome:
    @pytest.mark.parametrize(
        ("outcome", "event"),
        [(APPROVED, CHARGED), (DECLINED, FAILED)],
        ids=["approved", "declined"],
    )
    def test_a_pending_payment_gets_its_outcome(
        self, outcome: Approved | Declined, event: Fact
    ) -> None:
        assert record_outcome(payment_after([INITIATED]), outcome, cause(T1)) == event

    @pytest.mark.parametrize(
        ("status", "outcome"),
        [
            (Status.SUCCESS, APPROVED),
            (Status.REFUNDED, APPROVED),
            (Status.FAILED, DECLINED),
            (Status.FAILED, Declined("another word for it")),
        ],
    )
    def test_the_same_outcome_again_is_no_event(
        self, status: Status, outcome: Approved | Declined
    ) -> None:
        assert record_outcome(payment_in(status), outcome, cause(T1)) is None

    @pytest.mark.parametrize(
        ("status", "outcome"),
        [(Status.SUCCESS, DECLINED), (Status.REFUNDED, DECLINED), (Status.FAILED, APPROVED)],
    )
    def test_a_contradiction_is_a_mismatch(
        self, status: Status, outcome: Approved | Declined
    ) -> None:
        with pytest.raises(OutcomeMismatch, match=status):
            record_outcome(payment_in(status), outcome, cause(T1))

    @pytest.mark.parametrize("status", Status)
    @pytest.mark.parametrize(
        "outcome",
        [
            Approved(OTHER_ID, 1500, "INR", "txn-1"),
            Approved(PAYMENT_ID, 1499, "INR", "txn-1"),
            Approved(PAYMENT_ID, 1500, "USD", "txn-1"),
            Approved(PAYMENT_ID, 1500, "inr", "txn-1"),
        ],
        ids=["id", "amount", "currency", "currency spelling"],
    )
    def test_an_answer_about_something_else_is_a_mismatch(
        self, status: Status, outcome: Approved
    ) -> None:
        with pytest.raises(OutcomeMismatch):
            record_outcome(payment_in(status), outcome, cause(T1))


def payment_in(status: Status) -> Payment:
    """No fact leads to REFUNDED yet, so the status is put in by hand."""
    return msgspec.structs.replace(payment_after([INITIATED, CHARGED]), status=status)


class TestFold:
    def test_nothing_is_no_payment(self) -> None:
        assert fold([]) is None

    def test_initiated_is_pending(self) -> None:
        assert fold([INITIATED]) == Payment(
            id=PAYMENT_ID,
            version=1,
            merchant_order_id=ORDER_ID,
            idempotency_key="abc123",
            fingerprint=fingerprint(REQUEST),
            client="order",
            amount_cents=1500,
            currency="INR",
            gateway="simulated",
            status=Status.PENDING,
            created_at=T0,
            updated_at=T0,
            provider_txn_id=None,
            decline_code=None,
        )

    def test_charged_is_success(self) -> None:
        before = payment_after([INITIATED])
        assert fold([INITIATED, CHARGED]) == msgspec.structs.replace(
            before, version=2, status=Status.SUCCESS, provider_txn_id="txn-1", updated_at=T1
        )

    def test_failed_is_failed(self) -> None:
        before = payment_after([INITIATED])
        assert fold([INITIATED, FAILED]) == msgspec.structs.replace(
            before, version=2, status=Status.FAILED, decline_code="no_funds", updated_at=T1
        )

    @given(st.sampled_from(list(STREAMS.values())), st.integers(0, 2))
    def test_a_prefix_and_then_the_rest_is_the_whole(self, stream: list[Fact], cut: int) -> None:
        assert fold(stream[cut:], fold(stream[:cut])) == fold(stream)


def at_version(fact: Fact, version: int) -> Fact:
    return msgspec.structs.replace(fact, version=version)


class TestEvolve:
    """Every fact in every state: the table's status, or UnexpectedEvent."""

    NEXT: dict[tuple[Status | None, str], Status] = {  # noqa: RUF012
        (None, "PaymentInitiated"): Status.PENDING,
        (Status.PENDING, "PaymentCharged"): Status.SUCCESS,
        (Status.PENDING, "PaymentFailed"): Status.FAILED,
    }
    FACTS_BY_TOPIC: dict[str, Fact] = {  # noqa: RUF012
        fact.TOPIC: fact for fact in (INITIATED, CHARGED, FAILED)
    }

    def test_the_table_covers_every_fact(self) -> None:
        assert set(self.FACTS_BY_TOPIC) == set(FACTS)

    @pytest.mark.parametrize("topic", FACTS)
    @pytest.mark.parametrize("status", [None, *Status])
    def test_every_fact_in_every_state(self, status: Status | None, topic: str) -> None:
        payment = payment_in(status) if status else None
        fact = at_version(self.FACTS_BY_TOPIC[topic], payment.version + 1 if payment else 1)
        expected = self.NEXT.get((status, topic))
        if expected is None:
            with pytest.raises(UnexpectedEvent, match=topic):
                evolve(payment, fact)
        else:
            assert evolve(payment, fact).status is expected

    @pytest.mark.parametrize("version", [-1, 0, 2, 3])
    def test_a_stream_begins_at_version_1(self, version: int) -> None:
        with pytest.raises(UnexpectedEvent):
            evolve(None, at_version(INITIATED, version))

    @pytest.mark.parametrize("version", [0, 1, 3, 4])
    @pytest.mark.parametrize("fact", [CHARGED, FAILED], ids=lambda fact: fact.TOPIC)
    def test_versions_have_no_gaps_and_never_repeat(self, fact: Fact, version: int) -> None:
        with pytest.raises(UnexpectedEvent):
            evolve(payment_after([INITIATED]), at_version(fact, version))

    @pytest.mark.parametrize("fact", [CHARGED, FAILED], ids=lambda fact: fact.TOPIC)
    def test_a_fact_of_another_payment_is_refused(self, fact: Fact) -> None:
        with pytest.raises(UnexpectedEvent):
            evolve(payment_after([INITIATED]), msgspec.structs.replace(fact, payment_id=OTHER_ID))

    @pytest.mark.parametrize("field", ["amount_cents", "currency", "merchant_order_id"])
    @pytest.mark.parametrize("fact", [CHARGED, FAILED], ids=lambda fact: fact.TOPIC)
    def test_a_fact_about_other_money_is_refused(self, fact: Fact, field: str) -> None:
        """A stream whose facts disagree about what was captured is damaged."""
        with pytest.raises(UnexpectedEvent):
            evolve(
                payment_after([INITIATED]), msgspec.structs.replace(fact, **{field: CHANGES[field]})
            )

    def test_the_payment_before_is_untouched(self) -> None:
        before = payment_after([INITIATED])
        evolve(before, CHARGED)
        assert before == payment_after([INITIATED])
