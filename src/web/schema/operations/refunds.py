"""POST /v1/refund: request and responses."""

from typing import Annotated
from uuid import UUID

import msgspec

from payments import money
from payments.errors import (
    DatabaseUnavailable,
    IdempotencyKeyReused,
    InvalidIdempotencyKey,
    InvalidRequest,
    LogRewound,
    PaymentAlreadyRefunded,
    PaymentNotFound,
    PaymentNotRefundable,
    PaymentUnreadable,
    RefundDeclined,
    RefundExceedsCapture,
    TooBusy,
    Unauthorized,
)
from payments.payment.state import Status
from web.problems import UnsupportedMediaType
from web.requests import KEY_SCHEMA, UUID_PATTERN
from web.schema.description import Answer, Operation, Parameter


class RefundBody(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """The body of POST /v1/refund."""

    # The descriptions are also the texts of the field errors.
    payment_id: Annotated[
        str,
        msgspec.Meta(
            pattern=UUID_PATTERN,
            max_length=36,
            extra_json_schema={"format": "uuid"},
            description="the payment's UUID, like 058c9593-e150-402f-ab5b-37dd4c9816f0",
        ),
    ]
    # Not null: a client that failed to compute an amount must not refund everything.
    amount_cents: Annotated[
        Annotated[int, msgspec.Meta(ge=money.MIN_AMOUNT_CENTS, le=money.MAX_AMOUNT_CENTS)]
        | msgspec.UnsetType,
        msgspec.Meta(
            description=f"a whole number from {money.MIN_AMOUNT_CENTS} to "
            f"{money.MAX_AMOUNT_CENTS}, or left out to refund the remaining amount"
        ),
    ] = msgspec.UNSET


class RefundAnswer(msgspec.Struct, frozen=True, kw_only=True):
    """The response to POST /v1/refund.

    `id` and `status` are the payment's, `amount_cents` is the refund's. `refunded_cents` is the
    total of the payment's refunds. For a finished refund all values are as of its end.
    """

    id: UUID
    status: Status
    refund_id: UUID
    amount_cents: int
    refunded_cents: int


_REFUNDED = {
    "id": "058c9593-e150-402f-ab5b-37dd4c9816f0",
    "status": "SUCCESS",
    "refund_id": "07966c99-6c12-47f3-a9db-4d2b6d208e0b",
    "amount_cents": 500,
    "refunded_cents": 500,
}
_LINKS = {
    "payment": {"operationId": "get_payment", "parameters": {"payment_id": "$response.body#/id"}},
    "events": {"operationId": "get_events", "parameters": {"payment_id": "$response.body#/id"}},
}
REFUND = Operation(
    id="refund",
    tag="payments",
    description="The sum of all refunds, concurrent ones included, never exceeds the captured "
    "amount. An accepted refund is never abandoned, even if the provider is "
    "unavailable.",
    parameters=(
        Parameter(
            name="Idempotency-Key",
            place="header",
            description="A new value for each refund of the payment, and the same value for "
            "its retries. Required with `amount_cents`, and recommended without.",
            schema=KEY_SCHEMA,
            examples={"a part": "abc123-refund-1", "all that is left": "abc123-refund-2"},
        ),
    ),
    body=RefundBody,
    body_examples={
        "a part": {
            "payment_id": "058c9593-e150-402f-ab5b-37dd4c9816f0",
            "amount_cents": 500,
        },
        "all that is left": {"payment_id": "058c9593-e150-402f-ab5b-37dd4c9816f0"},
    },
    answers={
        201: Answer(
            description="Refunded. `status` is `REFUNDED` once the whole amount is refunded.",
            body=RefundAnswer,
            example=_REFUNDED,
            headers=("Location", "Idempotent-Replayed"),
            links=_LINKS,
        ),
        202: Answer(
            description="Accepted; the outcome is not known yet. The service settles the "
            "refund without another request; read the payment, or retry the same "
            "request.",
            body=RefundAnswer,
            example=_REFUNDED | {"refunded_cents": 0},
            headers=("Location", "Retry-After"),
            links=_LINKS,
        ),
    },
    problems=(
        InvalidRequest,
        InvalidIdempotencyKey,
        Unauthorized,
        PaymentNotFound,
        PaymentNotRefundable,
        PaymentAlreadyRefunded,
        RefundExceedsCapture,
        RefundDeclined,
        UnsupportedMediaType,
        IdempotencyKeyReused,
        TooBusy,
        DatabaseUnavailable,
        LogRewound,
        PaymentUnreadable,
    ),
)
