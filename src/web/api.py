"""The endpoints under /v1."""

import re
from enum import StrEnum
from typing import Annotated, Any
from uuid import UUID

import msgspec
from litestar import Request, Response, Router, get, post
from litestar.datastructures import State
from litestar.enums import MediaType
from litestar.params import Parameter

from payments import money
from payments.commands.charge import Charged, ChargePayment
from payments.errors import FieldError, InvalidIdempotencyKey, InvalidRequest
from payments.payment import ChargeRequest, Status
from payments.queries.payments import get_payment
from payments.service import Service
from web.auth import authenticate, may_read
from web.bodies import check_json, read_body

Anyone = Request[Any, Any, State]

UUID_PATTERN = "^[0-9a-fA-F]{8}-[0-9a-fA-F]{4}-[0-9a-fA-F]{4}-[0-9a-fA-F]{4}-[0-9a-fA-F]{12}$"
KEY_MAX = 255
_KEY = re.compile(rb"[\x21-\x7e](?:[\x20-\x7e]{0,253}[\x21-\x7e])?")
_TRACEPARENT = re.compile(rb"[0-9a-f]{2}-[0-9a-f]{32}-[0-9a-f]{16}-[0-9a-f]{2}")

Currency = StrEnum("Currency", [(code, code) for code in sorted(money.DECIMALS)])  # type: ignore[misc]


class ChargeBody(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """What POST /v1/charge takes. The descriptions are also the texts of the field errors."""

    # In the patterns `$` alone would let a final line feed pass; the length or `(?!\n)` does not.
    merchant_order_id: Annotated[
        str,
        msgspec.Meta(
            pattern=UUID_PATTERN,
            max_length=36,
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
        Currency, msgspec.Meta(description="an ISO 4217 code in upper case, like INR")
    ] = Currency(money.DEFAULT_CURRENCY)
    payment_method: Annotated[
        Annotated[str, msgspec.Meta(pattern=r"^[!-~]{1,255}(?!\n)$")] | None,
        msgspec.Meta(
            description="the provider's token: 1 to 255 printable ASCII characters without spaces"
        ),
    ] = None


class ChargeAnswer(msgspec.Struct, frozen=True):
    """What POST /v1/charge answers: the payment with its first outcome."""

    id: UUID
    merchant_order_id: UUID
    provider_txn_id: str | None
    status: Status
    amount_cents: int
    currency: str


@post("/charge", status_code=201, media_type=MediaType.JSON)
async def charge(request: Anyone) -> Response[bytes]:
    """Charge a payment, exactly once per Idempotency-Key."""
    service: Service = request.app.state.service
    headers: list[tuple[bytes, bytes]] = request.scope["headers"]  # type: ignore[assignment]
    client = authenticate(headers, service.settings.payments_api_keys)
    check_json([value for name, value in headers if name == b"content-type"])
    key = _idempotency_key(headers)
    body = read_body(await request.body(), ChargeBody)
    charged = await service.charging.charge(
        ChargePayment(
            ChargeRequest(
                key,
                UUID(body.merchant_order_id),
                body.amount_cents,
                body.currency.value,
                client,
                body.payment_method,
            ),
            request.scope["state"]["request_id"],
            _traceparent(headers),
        )
    )
    return _charge_answer(charged)


def _charge_answer(charged: Charged) -> Response[bytes]:
    payment = charged.payment
    answer = ChargeAnswer(
        payment.id,
        payment.merchant_order_id,
        payment.provider_txn_id,
        payment.status,
        payment.amount_cents,
        payment.currency,
    )
    headers = {"Location": f"/v1/payments/{payment.id}"}
    pending = payment.status is Status.PENDING
    if charged.replayed and not pending:
        headers["Idempotent-Replayed"] = "true"
    return Response(
        msgspec.json.encode(answer),
        status_code=202 if pending else 201,
        headers=headers,
        media_type=MediaType.JSON,
    )


@get("/payments/{payment_id:str}", media_type=MediaType.JSON)
async def payment(
    request: Anyone, payment_id: Annotated[str, Parameter(description="the payment's UUID")]
) -> Response[bytes]:
    """The payment as of now."""
    service: Service = request.app.state.service
    client = authenticate(request.scope["headers"], service.settings.payments_api_keys)  # type: ignore[arg-type]
    found = await get_payment(service.database, _uuid(payment_id, "payment_id"), may_read(client))
    return Response(msgspec.json.encode(found), media_type=MediaType.JSON)


def _idempotency_key(headers: list[tuple[bytes, bytes]]) -> str:
    sent = [value for name, value in headers if name == b"idempotency-key"]
    if not sent:
        raise InvalidIdempotencyKey(
            "Send an Idempotency-Key header: one value per charge, the same one when you retry it."
        )
    if len(sent) > 1:
        raise InvalidIdempotencyKey("Send the Idempotency-Key header once.")
    if not _KEY.fullmatch(sent[0]):
        raise InvalidIdempotencyKey(
            f"The Idempotency-Key must be 1 to {KEY_MAX} printable ASCII characters."
        )
    return sent[0].decode("ascii")


def _traceparent(headers: list[tuple[bytes, bytes]]) -> str | None:
    for name, value in headers:
        if name == b"traceparent" and _TRACEPARENT.fullmatch(value):
            return value.decode("ascii")
    return None


def _uuid(text: str, field: str) -> UUID:
    if not re.fullmatch(UUID_PATTERN[1:-1], text):
        error = FieldError(field, "must be a UUID like f50d9fa2-5d3e-4e49-9a02-218ad32ef4a9")
        raise InvalidRequest(f"The {field} in the path is not a UUID.", (error,))
    return UUID(text)


v1 = Router("/v1", route_handlers=[charge, payment])
