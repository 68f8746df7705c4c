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
    """What POST /v1/refund takes."""

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
            f"{money.MAX_AMOUNT_CENTS}, or left out to refund all that is left"
        ),
    ] = msgspec.UNSET


class RefundAnswer(msgspec.Struct, frozen=True, kw_only=True):
    """What POST /v1/refund answers.

    `id` and `status` are the payment's and `amount_cents` is the refund's. `refunded_cents` is what
    was given back of the payment in total. Once the refund is finished all is as of that moment.
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
    description="However many refunds race, their sum never exceeds what was captured. A refund "
    "that was accepted is never given up, even if the provider cannot be reached.",
    parameters=(
        Parameter(
            name="Idempotency-Key",
            place="header",
            description="One value per refund of the payment, the same one when the refund is "
            "repeated. Required with `amount_cents`, and better always sent.",
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
            description="Given back. `status` is `REFUNDED` once the whole amount is back.",
            body=RefundAnswer,
            example=_REFUNDED,
            headers=("Location", "Idempotent-Replayed"),
            links=_LINKS,
        ),
        202: Answer(
            description="Accepted, and its outcome was not known in time. It is found out "
            "without another request; read the payment, or send the same request again.",
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
