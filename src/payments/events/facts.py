"""What can happen to a payment: one frozen Struct per fact, stored as JSON.

The stored form outlives this code, so it is fixed in three ways. TOPIC names the fact, never a
Python path: a class may move. `schema_version` is in the bytes: when a fact gets another required
field, or one goes or means something else, raise its number and add the step from the old form to
UPCASTERS. And tests/events/golden holds the bytes of every version that was ever written; they must
decode for ever.

The release before reads what this one writes: beside it while processes are replaced, and instead
of it after a rollback (docs/decisions/upgrades.md). It passes over fields that it does not know, so
a field with a default may be added under the same number, if whoever does not see it still decides
right. A topic, a number, or a value of a Literal that it does not know is unreadable to it: these
must be readable one release before they are written.

Times are UTC with microseconds; amounts are whole minor units of the currency.
"""

import re
from collections.abc import Callable
from datetime import UTC, datetime, timedelta
from typing import Annotated, Any, ClassVar, Literal
from uuid import UUID

import msgspec

_NO_OFFSET = timedelta(0)


class UndecodableEvent(Exception):
    """Stored bytes that no fact of this version of the software can be made from."""


class Legacy(msgspec.Struct, frozen=True):
    """Of an imported payment's row what no fact has a place for: its id there, its
    `provider_txn_id`, also if nothing was captured, and when it was changed last."""

    id: UUID
    provider_txn_id: str | None
    updated_at: datetime


class Fact(msgspec.Struct, frozen=True, kw_only=True):
    """What every fact carries: which payment, its place in the stream, and who caused it when.

    `payment_id` and `version` repeat the row's stream and version, so that bytes which were moved
    to another row no longer decode. `imported`: it happened in the service before this one, as that
    one recorded it; where it does not hold, the field is not stored.
    """

    TOPIC: ClassVar[str]

    payment_id: UUID
    version: int
    event_id: UUID
    occurred_at: datetime
    client: str
    request_id: str | None = None
    traceparent: str | None = None
    imported: bool | msgspec.UnsetType = msgspec.UNSET

    def __post_init__(self) -> None:
        # What msgspec makes of a trailing Z is this very object.
        if self.occurred_at.tzinfo is not UTC and self.occurred_at.utcoffset() != _NO_OFFSET:
            raise ValueError("occurred_at must be UTC")

    # The eventsourcing library's names for the same two things.
    @property
    def originator_id(self) -> UUID:
        return self.payment_id

    @property
    def originator_version(self) -> int:
        return self.version


class PaymentInitiated(Fact, frozen=True, kw_only=True):
    """A charge was accepted and is durable; from here on the provider may be asked.

    `fingerprint` is a SHA-256 over the whole request: see identity.fingerprint. `hold_until` is
    when the hold of the seats ends, if that is known: then no capture is sent any more. `legacy`:
    of an imported one. `provider_reference`: the provider's own id of the charge, if the client's
    payment method names it; no other payment of that provider may name it.
    """

    TOPIC = "PaymentInitiated"
    schema_version: Literal[1] = 1

    idempotency_key: str
    fingerprint: str
    merchant_order_id: UUID
    amount_cents: int
    currency: str
    gateway: str
    hold_until: Annotated[datetime, msgspec.Meta(tz=True)] | msgspec.UnsetType = msgspec.UNSET
    legacy: Legacy | msgspec.UnsetType = msgspec.UNSET
    provider_reference: str | msgspec.UnsetType = msgspec.UNSET


class PaymentReferenced(Fact, frozen=True, kw_only=True):
    """The provider prepared the charge and gave it an id of its own; nothing was captured yet."""

    TOPIC = "PaymentReferenced"
    schema_version: Literal[1] = 1

    merchant_order_id: UUID
    amount_cents: int
    currency: str
    provider_reference: str


class PaymentActionRequired(Fact, frozen=True, kw_only=True):
    """The client is told that its customer has to act before the provider captures.

    `kind` is the type of the action, like "redirect". Where it leads to is never stored.
    """

    TOPIC = "PaymentActionRequired"
    schema_version: Literal[1] = 1

    merchant_order_id: UUID
    amount_cents: int
    currency: str
    kind: str


class PaymentCharged(Fact, frozen=True, kw_only=True):
    """The provider captured the money."""

    TOPIC = "PaymentCharged"
    schema_version: Literal[1] = 1

    merchant_order_id: UUID
    amount_cents: int
    currency: str
    provider_txn_id: str


class PaymentFailed(Fact, frozen=True, kw_only=True):
    """The provider declined (`decline_code` is its word for why), or never came to know of it."""

    TOPIC = "PaymentFailed"
    schema_version: Literal[1] = 1

    merchant_order_id: UUID
    amount_cents: int
    currency: str
    reason: Literal["declined", "abandoned"]
    decline_code: str | None = None


class RefundInitiated(Fact, frozen=True, kw_only=True):
    """A refund was accepted and its amount is reserved; from here on the provider may be asked.

    `whole`: the request named no amount, so it means whatever was left.
    """

    TOPIC = "RefundInitiated"
    schema_version: Literal[1] = 1

    refund_id: UUID
    idempotency_key: str | None
    merchant_order_id: UUID
    amount_cents: int
    currency: str
    whole: bool


class PaymentRefunded(Fact, frozen=True, kw_only=True):
    """The provider gave `amount_cents` back: `refunded_cents` of `captured_cents` by now."""

    TOPIC = "PaymentRefunded"
    schema_version: Literal[1] = 1

    refund_id: UUID
    merchant_order_id: UUID
    amount_cents: int
    currency: str
    provider_refund_id: str
    refunded_cents: int
    captured_cents: int


class RefundFailed(Fact, frozen=True, kw_only=True):
    """The provider refused to give the amount back; it is no longer reserved."""

    TOPIC = "RefundFailed"
    schema_version: Literal[1] = 1

    refund_id: UUID
    merchant_order_id: UUID
    amount_cents: int
    currency: str
    decline_code: str


class LateCaptureFound(Fact, frozen=True, kw_only=True):
    """The provider captured a payment that is held as FAILED; the money is sent back.

    `refund_id` is the provider's idempotency key for sending it back.
    """

    TOPIC = "LateCaptureFound"
    schema_version: Literal[1] = 1

    refund_id: UUID
    merchant_order_id: UUID
    amount_cents: int
    currency: str
    provider_txn_id: str


class LateCaptureReturned(Fact, frozen=True, kw_only=True):
    """The money of a late capture went back."""

    TOPIC = "LateCaptureReturned"
    schema_version: Literal[1] = 1

    refund_id: UUID
    merchant_order_id: UUID
    amount_cents: int
    currency: str
    provider_refund_id: str


# What a provider did, or did not do: all that is appended after the provider was asked.
ProviderOutcome = (
    PaymentReferenced
    | PaymentActionRequired
    | PaymentCharged
    | PaymentFailed
    | PaymentRefunded
    | RefundFailed
    | LateCaptureFound
    | LateCaptureReturned
)

FACTS: dict[str, type[Fact]] = {
    fact.TOPIC: fact
    for fact in (
        PaymentInitiated,
        PaymentReferenced,
        PaymentActionRequired,
        PaymentCharged,
        PaymentFailed,
        RefundInitiated,
        PaymentRefunded,
        RefundFailed,
        LateCaptureFound,
        LateCaptureReturned,
    )
}

# (topic, old schema_version) -> the same fact's fields one version later, schema_version included.
UPCASTERS: dict[tuple[str, int], Callable[[dict[str, Any]], dict[str, Any]]] = {}

_UNREADABLE = (msgspec.MsgspecError, UnicodeDecodeError, RecursionError)


class _Traced(msgspec.Struct):
    traceparent: str | None = None


_traced = msgspec.json.Decoder(_Traced)
_encoder = msgspec.json.Encoder()
_decoders = {topic: msgspec.json.Decoder(fact) for topic, fact in FACTS.items()}


def encode(fact: Fact) -> bytes:
    return _encoder.encode(fact)


def traceparent_of(state: bytes) -> str | None:
    """Of an event's metadata, whatever else is in it; None also if it cannot be read."""
    try:
        return _traced.decode(state).traceparent
    except _UNREADABLE:
        return None


def decode(topic: str, state: bytes) -> Fact:
    """The fact behind a stored row; older versions are brought up to date on the way.

    Raises UndecodableEvent for an unknown topic, bytes that are not JSON, and missing or wrong
    fields. The message holds no field values.
    """
    decoder = _decoders.get(topic)
    if decoder is None:
        raise UndecodableEvent(f"unknown topic {topic!r}")
    try:
        return decoder.decode(state)
    except _UNREADABLE:
        return _decode_older(topic, state)


def _decode_older(topic: str, state: bytes) -> Fact:
    """Reads an older version through its upcasters, one step at a time."""
    try:
        fields = msgspec.json.decode(state, type=dict[str, Any])
        version = fields.get("schema_version")
        while upcast := UPCASTERS.get((topic, version)):  # type: ignore[arg-type]
            fields = upcast(fields)
            version = fields["schema_version"]
        return msgspec.convert(fields, FACTS[topic])
    except (*_UNREADABLE, LookupError, TypeError, ValueError) as error:
        # The only message of msgspec that quotes a value.
        reason = re.sub(r"(Invalid enum value) .*?(?= - at |$)", r"\1", str(error), flags=re.DOTALL)
        raise UndecodableEvent(f"{topic}: {reason}") from None
