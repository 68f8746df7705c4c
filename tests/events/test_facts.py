"""What is stored decodes for ever, and what cannot be decoded says so without its values."""

import json
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, Literal, get_args, get_type_hints
from uuid import UUID

import msgspec
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from payments.events import facts
from payments.events.facts import (
    FACTS,
    UPCASTERS,
    Fact,
    LateCaptureFound,
    LateCaptureReturned,
    Legacy,
    PaymentActionRequired,
    PaymentCharged,
    PaymentFailed,
    PaymentInitiated,
    PaymentReferenced,
    PaymentRefunded,
    RefundFailed,
    RefundInitiated,
    UndecodableEvent,
    decode,
    encode,
)

GOLDEN = Path(__file__).parent / "golden"
CANARY = "canary7391"

CAUSED: dict[str, Any] = {
    "payment_id": UUID("058c9593-e150-402f-ab5b-37dd4c9816f0"),
    "event_id": UUID("0192f3a1-7c55-7b1e-8a43-5d1f2e3c4b5a"),
    "occurred_at": datetime(2026, 1, 2, 3, 4, 5, 6, tzinfo=UTC),
    "client": "order-service",
    "request_id": "req-1",
    "traceparent": "00-4bf92f3577b34da6a3ce929d0e0e4736-00f067aa0ba902b7-01",
}
CHARGE: dict[str, Any] = {
    "merchant_order_id": UUID("f50d9fa2-5d3e-4e49-9a02-218ad32ef4a9"),
    "amount_cents": 2_147_483_647,
    "currency": "INR",
}
INITIATED = PaymentInitiated(
    **CAUSED,
    **CHARGE,
    version=1,
    idempotency_key='abc123 "quoted" \\',
    fingerprint="e3" * 32,
    gateway="simulated",
)
HELD = msgspec.structs.replace(INITIATED, hold_until=datetime(2026, 1, 2, 3, 19, 5, 6, tzinfo=UTC))
WITH_REFERENCE = msgspec.structs.replace(INITIATED, provider_reference="pay_1")
REFERENCED = PaymentReferenced(**CAUSED, **CHARGE, version=2, provider_reference="pi_1")
ACTION_REQUIRED = PaymentActionRequired(**CAUSED, **CHARGE, version=3, kind="redirect")
CHARGED = PaymentCharged(**CAUSED, **CHARGE, version=2, provider_txn_id="txn_é☃")
FAILED = PaymentFailed(
    **CAUSED, **CHARGE, version=2, reason="declined", decline_code="insufficient_funds"
)
ABANDONED = PaymentFailed(**CAUSED, **CHARGE, version=2, reason="abandoned")
REFUND: dict[str, Any] = CHARGE | {
    "refund_id": UUID("3f0a4f57-9d5c-4a0e-8a51-6f2b7c1d9e04"),
    "amount_cents": 1_000_000_000,
}
REFUND_INITIATED = RefundInitiated(
    **CAUSED, **REFUND, version=3, idempotency_key="refund-1 é☃", whole=False
)
WHOLE_REFUND_INITIATED = msgspec.structs.replace(REFUND_INITIATED, whole=True)
REFUNDED = PaymentRefunded(
    **CAUSED,
    **REFUND,
    version=4,
    provider_refund_id="re_é☃",
    refunded_cents=1_500_000_000,
    captured_cents=2_147_483_647,
)
REFUND_FAILED = RefundFailed(**CAUSED, **REFUND, version=4, decline_code="account_closed")
LATE_CAPTURE: dict[str, Any] = CHARGE | {"refund_id": REFUND["refund_id"]}
LATE_CAPTURE_FOUND = LateCaptureFound(**CAUSED, **LATE_CAPTURE, version=3, provider_txn_id="txn_é☃")
LATE_CAPTURE_RETURNED = LateCaptureReturned(
    **CAUSED, **LATE_CAPTURE, version=4, provider_refund_id="re_é☃"
)


IMPORTED = msgspec.structs.replace(
    INITIATED,
    imported=True,
    legacy=Legacy(
        UUID("d4254ff5-4a92-492f-870b-fb095c659001"),
        "txn_é☃",
        datetime(2026, 1, 2, 3, 4, 5, 7, tzinfo=UTC),
    ),
)


def without_optional_ones(fact: Fact, *more: str) -> Fact:
    return msgspec.structs.replace(fact, **dict.fromkeys(("request_id", "traceparent", *more)))


# The fact behind every golden file. When a fact's version is raised, the files of the old one stay
# as they are, and what is expected of them here becomes the upcast fact.
EXPECTED: dict[str, Fact] = {
    "PaymentInitiated.v1": INITIATED,
    "PaymentInitiated.v1.nulls": without_optional_ones(INITIATED),
    "PaymentInitiated.v1.held": HELD,
    "PaymentInitiated.v1.imported": IMPORTED,
    "PaymentInitiated.v1.referenced": WITH_REFERENCE,
    "PaymentReferenced.v1": REFERENCED,
    "PaymentReferenced.v1.nulls": without_optional_ones(REFERENCED),
    "PaymentActionRequired.v1": ACTION_REQUIRED,
    "PaymentActionRequired.v1.nulls": without_optional_ones(ACTION_REQUIRED),
    "PaymentCharged.v1": CHARGED,
    "PaymentCharged.v1.nulls": without_optional_ones(CHARGED),
    "PaymentCharged.v1.imported": msgspec.structs.replace(CHARGED, imported=True),
    "PaymentFailed.v1": FAILED,
    "PaymentFailed.v1.nulls": without_optional_ones(FAILED, "decline_code"),
    "PaymentFailed.v1.abandoned": ABANDONED,
    "RefundInitiated.v1": REFUND_INITIATED,
    "RefundInitiated.v1.nulls": without_optional_ones(WHOLE_REFUND_INITIATED, "idempotency_key"),
    "PaymentRefunded.v1": REFUNDED,
    "PaymentRefunded.v1.nulls": without_optional_ones(REFUNDED),
    "RefundFailed.v1": REFUND_FAILED,
    "RefundFailed.v1.nulls": without_optional_ones(REFUND_FAILED),
    "LateCaptureFound.v1": LATE_CAPTURE_FOUND,
    "LateCaptureFound.v1.nulls": without_optional_ones(LATE_CAPTURE_FOUND),
    "LateCaptureReturned.v1": LATE_CAPTURE_RETURNED,
    "LateCaptureReturned.v1.nulls": without_optional_ones(LATE_CAPTURE_RETURNED),
}


def current_version(fact: type[Fact]) -> int:
    (version,) = get_args(get_type_hints(fact)["schema_version"])
    assert isinstance(version, int)
    return version


def golden(name: str) -> bytes:
    return (GOLDEN / f"{name}.json").read_bytes()


def topic_of(name: str) -> str:
    return name.partition(".")[0]


def nullable_fields(fact: type[Fact]) -> set[str]:
    return {name for name, hint in get_type_hints(fact).items() if type(None) in get_args(hint)}


def widened(value: Any, added: Any) -> Any:
    """With two more fields in every object, however deep."""
    if isinstance(value, dict):
        fields = {name: widened(field, added) for name, field in value.items()}
        return {"added_first": added, **fields, "added_last": added}
    return [widened(each, added) for each in value] if isinstance(value, list) else value


CURRENT = [name for name in EXPECTED if f".v{current_version(FACTS[topic_of(name)])}" in name]
# The file of each version of each fact in which no field is null.
COMPLETE = [name for name in EXPECTED if name.count(".") == 1]
# Files beyond the two that every version of every fact has, and what is null in them.
FURTHER: dict[str, set[str]] = {
    "PaymentFailed.v1.abandoned": {"decline_code"},
    "PaymentInitiated.v1.held": set(),
    "PaymentInitiated.v1.imported": set(),
    "PaymentInitiated.v1.referenced": set(),
    "PaymentCharged.v1.imported": set(),
}


class TestGolden:
    @pytest.mark.parametrize("name", CURRENT)
    def test_a_fact_is_stored_as_these_bytes(self, name: str) -> None:
        assert encode(EXPECTED[name]) == golden(name)

    @pytest.mark.parametrize("name", EXPECTED)
    def test_these_bytes_decode(self, name: str) -> None:
        assert decode(topic_of(name), golden(name)) == EXPECTED[name]

    @pytest.mark.parametrize("name", EXPECTED)
    def test_what_a_newer_version_added_is_passed_over(self, name: str) -> None:
        """It may add fields without raising schema_version."""
        for added in (None, CANARY, 7391.5, [7391], {"amount_cents": {"deeper": [{"client": 1}]}}):
            state = json.dumps(widened(json.loads(golden(name)), added)).encode()
            assert decode(topic_of(name), state) == EXPECTED[name], added

    def test_every_version_of_every_fact_has_its_files(self) -> None:
        needed = {
            f"{topic}.v{version}{ending}"
            for topic, fact in FACTS.items()
            for version in range(1, current_version(fact) + 1)
            for ending in ("", ".nulls")
        } | set(FURTHER)
        assert {path.name.removesuffix(".json") for path in GOLDEN.iterdir()} == needed
        assert set(EXPECTED) == needed

    def test_every_older_version_has_an_upcaster(self) -> None:
        needed = {
            (topic, version)
            for topic, fact in FACTS.items()
            for version in range(1, current_version(fact))
        }
        assert set(UPCASTERS) == needed

    def test_the_bytes_state_their_version(self) -> None:
        for name in EXPECTED:
            assert f".v{json.loads(golden(name))['schema_version']}" in name

    @pytest.mark.parametrize("name", EXPECTED)
    def test_the_nulls_are_there_and_only_there(self, name: str) -> None:
        """All that may be null is null in the one file, and has a value in the other."""
        nullable = nullable_fields(FACTS[topic_of(name)]) if name.endswith(".nulls") else set()
        nulls = {field for field, value in json.loads(golden(name)).items() if value is None}
        assert nulls == FURTHER.get(name, nullable)


def test_topics_are_pinned() -> None:
    """A topic is stored with every event: renaming one would orphan history."""
    assert [(topic, fact.TOPIC, fact.__name__) for topic, fact in FACTS.items()] == [
        ("PaymentInitiated", "PaymentInitiated", "PaymentInitiated"),
        ("PaymentReferenced", "PaymentReferenced", "PaymentReferenced"),
        ("PaymentActionRequired", "PaymentActionRequired", "PaymentActionRequired"),
        ("PaymentCharged", "PaymentCharged", "PaymentCharged"),
        ("PaymentFailed", "PaymentFailed", "PaymentFailed"),
        ("RefundInitiated", "RefundInitiated", "RefundInitiated"),
        ("PaymentRefunded", "PaymentRefunded", "PaymentRefunded"),
        ("RefundFailed", "RefundFailed", "RefundFailed"),
        ("LateCaptureFound", "LateCaptureFound", "LateCaptureFound"),
        ("LateCaptureReturned", "LateCaptureReturned", "LateCaptureReturned"),
    ]


def test_the_library_finds_its_own_names() -> None:
    assert CHARGED.originator_id == CHARGED.payment_id
    assert CHARGED.originator_version == CHARGED.version


def test_facts_cannot_be_changed() -> None:
    with pytest.raises(AttributeError):
        CHARGED.amount_cents = 1  # type: ignore[misc]


def altered(name: str, **fields: Any) -> bytes:
    return json.dumps(json.loads(golden(name)) | fields).encode()


def without(name: str, field: str) -> bytes:
    fields = json.loads(golden(name))
    del fields[field]
    return json.dumps(fields).encode()


# What old bytes may lack; every other field is missed, also one that may be null.
MAY_BE_MISSING = {topic: {"schema_version", "request_id", "traceparent"} for topic in FACTS}
MAY_BE_MISSING["PaymentFailed"] |= {"decline_code"}


def refusal(topic: str, state: bytes) -> str:
    """The message, which must hold no field value; nor may the error behind it."""
    try:
        decode(topic, state)
    except UndecodableEvent as refused:
        error: BaseException | None = refused
        while error is not None:
            assert CANARY not in str(error)
            assert "7391" not in str(error)
            error = error.__cause__
        return str(refused)
    pytest.fail(f"a {topic} was made of {state[:1000]!r}")


NO_FACTS = [
    b"",
    b"null",
    b"[]",
    b"7391",
    f'"{CANARY}"'.encode(),
    b"{}",
    f'{{"client": "{CANARY}"'.encode(),
    f'{{"client": "{CANARY}",}}'.encode(),
    f"\xef\xbb\xbf{CANARY}".encode(),
    f'{{"client": "{CANARY}'.encode() + b'\xff"}',
    f'{{"client": "{CANARY}'.encode() + b'\\ud800"}',
    f'{{"client": "{CANARY}'.encode() + b'\x00"}',
    b'{"schema_version": [7391]}',
    b'{"schema_version": {"7391": 7391}}',
    b'{"schema_version": 1e400}',
    b"\x80\x04\x95",
]


class TestUndecodable:
    @pytest.mark.parametrize(
        "topic", ["", "paymentcharged", "payments.events.facts:PaymentCharged"]
    )
    def test_an_unknown_topic(self, topic: str) -> None:
        assert "unknown topic" in refusal(topic, altered("PaymentCharged.v1", client=CANARY))

    @pytest.mark.parametrize("topic", FACTS)
    def test_no_fact_at_all(self, topic: str) -> None:
        for state in NO_FACTS:
            assert refusal(topic, state).startswith(f"{topic}: ")

    @pytest.mark.parametrize("topic", FACTS)
    def test_deeply_nested_bytes(self, topic: str) -> None:
        for depth in (2_000, 100_000):
            refusal(topic, b"[" * depth)
            refusal(topic, b'{"more": ' + b"[" * depth)

    @pytest.mark.parametrize("name", COMPLETE)
    def test_a_missing_field(self, name: str) -> None:
        for field in json.loads(golden(name)):
            if field not in MAY_BE_MISSING[topic_of(name)]:
                assert field in refusal(topic_of(name), without(name, field))

    @pytest.mark.parametrize("name", COMPLETE)
    def test_a_value_of_another_type(self, name: str) -> None:
        """No type of ours is laxer than it reads."""
        for field in json.loads(golden(name)):
            for value in ([CANARY], {CANARY: CANARY}, 7391.5, True):
                if (field, value) != ("whole", True):
                    refusal(topic_of(name), altered(name, **{field: value}))

    def test_a_whole_refund(self) -> None:
        state = altered("RefundInitiated.v1", whole=True)
        assert decode("RefundInitiated", state) == WHOLE_REFUND_INITIATED

    @pytest.mark.parametrize(
        ("name", "field", "value"),
        [
            ("PaymentInitiated.v1", "payment_id", CANARY),
            ("PaymentInitiated.v1", "occurred_at", CANARY),
            ("PaymentInitiated.v1", "occurred_at", "7391-13-01T00:00:00Z"),
            ("PaymentInitiated.v1", "amount_cents", CANARY),
            ("PaymentInitiated.v1", "amount_cents", "1500"),
            ("PaymentInitiated.v1", "provider_reference", 7391),
            ("PaymentInitiated.v1", "provider_reference", None),
            ("PaymentReferenced.v1", "provider_reference", None),
            ("PaymentReferenced.v1", "provider_reference", 7391),
            ("PaymentActionRequired.v1", "kind", None),
            ("PaymentActionRequired.v1", "kind", 7391),
            ("PaymentCharged.v1", "amount_cents", 1500.5),
            ("PaymentCharged.v1", "version", CANARY),
            ("PaymentCharged.v1", "provider_txn_id", None),
            ("PaymentCharged.v1", "provider_txn_id", 7391),
            ("PaymentCharged.v1", "client", None),
            ("PaymentFailed.v1", "reason", CANARY),
            ("PaymentFailed.v1", "reason", None),
            ("PaymentFailed.v1", "decline_code", 7391),
            ("RefundInitiated.v1", "refund_id", None),
            ("RefundInitiated.v1", "refund_id", CANARY),
            ("RefundInitiated.v1", "idempotency_key", 7391),
            ("RefundInitiated.v1", "amount_cents", None),
            ("RefundInitiated.v1", "whole", None),
            ("RefundInitiated.v1", "whole", 1),
            ("RefundInitiated.v1", "whole", CANARY),
            ("PaymentRefunded.v1", "provider_refund_id", None),
            ("PaymentRefunded.v1", "refunded_cents", None),
            ("PaymentRefunded.v1", "refunded_cents", "7391"),
            ("PaymentRefunded.v1", "captured_cents", 7391.5),
            ("RefundFailed.v1", "decline_code", None),
            ("RefundFailed.v1", "refund_id", CANARY),
            ("LateCaptureFound.v1", "refund_id", None),
            ("LateCaptureFound.v1", "provider_txn_id", None),
            ("LateCaptureReturned.v1", "refund_id", None),
            ("LateCaptureReturned.v1", "provider_refund_id", 7391),
        ],
    )
    def test_a_wrong_value(self, name: str, field: str, value: Any) -> None:
        assert field in refusal(topic_of(name), altered(name, **{field: value}))

    @pytest.mark.parametrize("name", COMPLETE)
    def test_an_unknown_schema_version(self, name: str) -> None:
        for version in (0, 2, -1, "1", None, CANARY, 10**40, [1], {"1": 1}):
            refusal(topic_of(name), altered(name, schema_version=version))

    @pytest.mark.parametrize("name", COMPLETE)
    def test_read_as_another_fact(self, name: str) -> None:
        """Two facts hold all that another one does; folding refuses them in its place."""
        holds_all_of = {
            "LateCaptureFound.v1": "PaymentCharged",
            "PaymentRefunded.v1": "LateCaptureReturned",
        }
        for topic in FACTS:
            if topic in (topic_of(name), holds_all_of.get(name)):
                assert type(decode(topic, golden(name))) is FACTS[topic]
            else:
                refusal(topic, golden(name))


UTC_TIMES = st.datetimes(timezones=st.just(UTC))

# What each type of field may hold in a fact that is written.
VALUES: dict[Any, st.SearchStrategy[Any]] = {
    UUID: st.uuids(),
    int: st.integers(-(2**63), 2**63 - 1),
    str: st.text(max_size=20),
    bool: st.booleans(),
    datetime: UTC_TIMES,
    datetime | msgspec.UnsetType: st.just(msgspec.UNSET) | UTC_TIMES,
    str | None: st.none() | st.text(max_size=20),
    str | msgspec.UnsetType: st.just(msgspec.UNSET) | st.text(max_size=20),
    bool | msgspec.UnsetType: st.just(msgspec.UNSET) | st.booleans(),
    Legacy | msgspec.UnsetType: st.just(msgspec.UNSET)
    | st.builds(Legacy, st.uuids(), st.none() | st.text(max_size=20), UTC_TIMES),
    Literal["declined", "abandoned"]: st.sampled_from(["declined", "abandoned"]),
}


def facts_of(fact: type[Fact]) -> st.SearchStrategy[Fact]:
    hints = get_type_hints(fact)
    fields = [name for name in fact.__struct_fields__ if name != "schema_version"]
    return st.builds(fact, **{name: VALUES[hints[name]] for name in fields})


@pytest.mark.parametrize("topic", FACTS)
@given(st.data())
@settings(max_examples=50)
def test_what_is_encoded_decodes_to_an_equal_fact(topic: str, data: st.DataObject) -> None:
    fact = data.draw(facts_of(FACTS[topic]))
    assert decode(topic, encode(fact)) == fact


class TestTimes:
    def test_they_are_utc_with_microseconds(self) -> None:
        decoded = decode("PaymentCharged", golden("PaymentCharged.v1"))
        assert decoded.occurred_at == datetime(2026, 1, 2, 3, 4, 5, 6, tzinfo=UTC)
        assert decoded.occurred_at.tzinfo is UTC
        assert json.loads(golden("PaymentCharged.v1"))["occurred_at"] == (
            "2026-01-02T03:04:05.000006Z"
        )

    @pytest.mark.parametrize("microsecond", [0, 1, 100_000, 999_999])
    def test_no_microsecond_is_lost(self, microsecond: int) -> None:
        fact = msgspec.structs.replace(
            CHARGED, occurred_at=CHARGED.occurred_at.replace(microsecond=microsecond)
        )
        assert decode("PaymentCharged", encode(fact)) == fact

    @pytest.mark.parametrize(
        "occurred_at", ["2026-01-02T05:04:05.000006+02:00", "2026-01-02T03:04:05.000006"]
    )
    def test_any_other_zone_or_none_is_refused(self, occurred_at: str) -> None:
        state = altered("PaymentCharged.v1", occurred_at=occurred_at)
        assert "occurred_at" in refusal("PaymentCharged", state)


class TestUpcasting:
    """A fictitious fact on its third version; the first two are read through two steps."""

    class ReceiptSent(Fact, frozen=True, kw_only=True):
        TOPIC = "ReceiptSent"
        schema_version: Literal[3] = 3

        amount_cents: int
        currency: str

    NOW = ReceiptSent(**CAUSED, version=3, amount_cents=1550, currency="INR")

    @pytest.fixture(autouse=True)
    def receipt_sent(self, monkeypatch: pytest.MonkeyPatch) -> None:
        def decimals_to_cents(fields: dict[str, Any]) -> dict[str, Any]:
            amount = fields.pop("amount")
            return fields | {"schema_version": 2, "amount_cents": round(amount * 100)}

        def add_currency(fields: dict[str, Any]) -> dict[str, Any]:
            return fields | {"schema_version": 3, "currency": "INR"}

        monkeypatch.setitem(facts.FACTS, "ReceiptSent", self.ReceiptSent)
        monkeypatch.setitem(facts._decoders, "ReceiptSent", msgspec.json.Decoder(self.ReceiptSent))
        monkeypatch.setitem(facts.UPCASTERS, ("ReceiptSent", 1), decimals_to_cents)
        monkeypatch.setitem(facts.UPCASTERS, ("ReceiptSent", 2), add_currency)

    def stored(self, version: int, **fields: Any) -> bytes:
        shared = json.loads(msgspec.json.encode(CAUSED))
        return json.dumps(shared | fields | {"version": 3, "schema_version": version}).encode()

    @pytest.mark.parametrize(
        ("version", "fields"),
        [
            (1, {"amount": 15.5}),
            (2, {"amount_cents": 1550}),
            (3, {"amount_cents": 1550, "currency": "INR"}),
        ],
    )
    def test_every_version_is_read(self, version: int, fields: dict[str, Any]) -> None:
        assert decode("ReceiptSent", self.stored(version, **fields)) == self.NOW

    @pytest.mark.parametrize("version", [0, 4])
    def test_other_versions_are_not(self, version: int) -> None:
        refusal("ReceiptSent", self.stored(version, amount_cents=1550, currency="INR"))

    @pytest.mark.parametrize("fields", [{}, {"amount": CANARY}, {"amount": [7391]}])
    def test_an_upcaster_that_fails_makes_it_undecodable(self, fields: dict[str, Any]) -> None:
        refusal("ReceiptSent", self.stored(1, **fields))

    def test_what_is_still_wrong_afterwards_is_undecodable(self) -> None:
        refusal("ReceiptSent", self.stored(2, amount_cents=CANARY))
