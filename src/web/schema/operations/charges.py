"""POST /v1/charge: request and responses."""

from enum import StrEnum
from typing import Annotated
from uuid import UUID

import msgspec

from payments import money
from payments.errors import (
    ClientGone,
    DatabaseUnavailable,
    GatewayUnavailable,
    IdempotencyKeyReused,
    InvalidIdempotencyKey,
    InvalidRequest,
    OrderAlreadyPaid,
    PaymentMethodReused,
    PaymentUnreadable,
    TooBusy,
    Unauthorized,
)
from payments.payment.state import Status
from payments.times import TIME_PATTERN
from web.problems import UnsupportedMediaType
from web.requests import KEY_SCHEMA, TIME_TEXT, UUID_PATTERN
from web.schema.description import Answer, Operation, Parameter

Currency = StrEnum("Currency", [(code, code) for code in sorted(money.DECIMALS)])  # type: ignore[misc]


class ChargeBody(msgspec.Struct, frozen=True, forbid_unknown_fields=True, kw_only=True):
    """The body of POST /v1/charge."""

    # The descriptions are also the texts of the field errors. In the patterns `$` alone would
    # accept a final line feed; the length or `(?!\n)` does not.
    merchant_order_id: Annotated[
        str,
        msgspec.Meta(
            pattern=UUID_PATTERN,
            max_length=36,
            extra_json_schema={"format": "uuid"},
            description="the order's UUID, like f50d9fa2-5d3e-4e49-9a02-218ad32ef4a9",
        ),
    ]
    amount_cents: Annotated[
        int,
        msgspec.Meta(
            ge=money.MIN_AMOUNT_CENTS,
            le=money.MAX_AMOUNT_CENTS,
            description=f"a whole number from {money.MIN_AMOUNT_CENTS} to "
            f"{money.MAX_AMOUNT_CENTS}: the amount in the currency's smallest unit",
        ),
    ]
    currency: Annotated[
        Currency,
        msgspec.Meta(
            description=f"an ISO 4217 code in upper case; {money.DEFAULT_CURRENCY} if left out"
        ),
    ] = Currency(money.DEFAULT_CURRENCY)
    payment_method: Annotated[
        Annotated[str, msgspec.Meta(pattern=r"^[!-~]{1,255}(?!\n)$")] | None,
        msgspec.Meta(
            description="the provider's token: 1 to 255 printable ASCII characters without spaces"
        ),
    ] = None
    hold_until: Annotated[
        Annotated[
            str,
            msgspec.Meta(pattern=TIME_PATTERN, extra_json_schema={"format": "date-time"}),
        ]
        | None,
        msgspec.Meta(
            description=f"{TIME_TEXT}: the end of the hold of the seats. No capture is sent "
            "after it. On a retry the value of the first request is used"
        ),
    ] = None
    return_url: Annotated[
        Annotated[
            str,
            msgspec.Meta(
                pattern=r"^https://[!-~]+(?!\n)$",
                max_length=2048,
                extra_json_schema={"format": "uri"},
            ),
        ]
        | None,
        msgspec.Meta(
            description="an https:// URL of at most 2048 printable ASCII characters, where the "
            "provider sends the customer after an action; it must begin with one of the service's "
            "RETURN_URL_PREFIXES"
        ),
    ] = None


class ChargeAnswer(msgspec.Struct, frozen=True, kw_only=True):
    """The response to POST /v1/charge: the payment with its first outcome."""

    id: UUID
    merchant_order_id: UUID
    provider_txn_id: str | None
    status: Status
    amount_cents: int
    currency: str
    next_action: Annotated[
        dict[str, str] | msgspec.UnsetType,
        msgspec.Meta(
            description="what the customer has to do before the provider captures: a `type`, and "
            "fields that depend on the provider and the type, like `url`. Only with `PENDING`. It "
            "may hold secrets and is never stored: retry the request to get it again"
        ),
    ] = msgspec.UNSET


_CHARGED = {
    "id": "058c9593-e150-402f-ab5b-37dd4c9816f0",
    "merchant_order_id": "f50d9fa2-5d3e-4e49-9a02-218ad32ef4a9",
    "provider_txn_id": "sim_058c9593e150402fab5b37dd4c9816f0",
    "status": "SUCCESS",
    "amount_cents": 1500,
    "currency": "INR",
}
_LINKS = {
    "payment": {"operationId": "get_payment", "parameters": {"payment_id": "$response.body#/id"}},
    "events": {"operationId": "get_events", "parameters": {"payment_id": "$response.body#/id"}},
    "refund": {"operationId": "refund", "requestBody": {"payment_id": "$response.body#/id"}},
}
CHARGE = Operation(
    id="charge",
    tag="payments",
    description="Responds within 7 s. A decline is an outcome, `201` with `FAILED`, not an "
    "error. A client that disconnects does not cancel a charge that has started. "
    "A charge does not start if its client has disconnected, or after 7 s.",
    parameters=(
        Parameter(
            name="Idempotency-Key",
            place="header",
            description="A new value for each charge, and the same value for its retries. "
            "Keys never expire.",
            schema=KEY_SCHEMA,
            required=True,
            examples={"charge": "abc123"},
        ),
    ),
    body=ChargeBody,
    body_examples={
        "charge": {
            "merchant_order_id": "f50d9fa2-5d3e-4e49-9a02-218ad32ef4a9",
            "amount_cents": 1500,
            "currency": "INR",
        }
    },
    answers={
        201: Answer(
            description="The outcome: `SUCCESS`, or `FAILED` if the provider declined.",
            body=ChargeAnswer,
            example=_CHARGED,
            headers=("Location", "Idempotent-Replayed"),
            links=_LINKS,
        ),
        202: Answer(
            description="`PENDING`: the outcome is not known yet. Retry the same request "
            "after `Retry-After`, or read the payment. A retry sends the charge "
            "to the provider only if the provider never received it. With `next_action` the "
            "customer has to act first: retry the same request as soon as that is done.",
            body=ChargeAnswer,
            example=_CHARGED | {"provider_txn_id": None, "status": "PENDING"},
            headers=("Location", "Retry-After"),
            links=_LINKS,
        ),
    },
    problems=(
        InvalidRequest,
        InvalidIdempotencyKey,
        Unauthorized,
        UnsupportedMediaType,
        OrderAlreadyPaid,
        IdempotencyKeyReused,
        PaymentMethodReused,
        TooBusy,
        DatabaseUnavailable,
        GatewayUnavailable,
        ClientGone,
        PaymentUnreadable,
    ),
)
