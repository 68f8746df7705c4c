"""GET /v1/payments: the list, one payment, and its events."""

from typing import Any

import msgspec
from litestar import Response, get
from litestar.enums import MediaType
from litestar.params import FromPath

from payments.errors import (
    DatabaseUnavailable,
    InvalidRequest,
    PaymentNotFound,
    PaymentUnreadable,
    TooBusy,
    Unauthorized,
)
from payments.queries.history import PaymentHistory, get_history
from payments.queries.payments import (
    PaymentPage,
    PaymentView,
    get_payment,
    get_payment_as_of,
    list_payments,
)
from web.auth import may_read
from web.list_query import AS_OF, PARAMETERS, read_as_of, read_list_query
from web.requests import UUID_SCHEMA, AnyRequest, client_of, payment_in_path, service_of
from web.schema.description import Answer, Operation, Parameter, described

_ID = "058c9593-e150-402f-ab5b-37dd4c9816f0"
PAYMENT_ID = Parameter(
    name="payment_id",
    place="path",
    description="The payment's UUID; for an order's, the `404` lists the order's payments.",
    schema=UUID_SCHEMA,
    required=True,
    examples={"payment": _ID},
)
_VIEW = {
    "id": _ID,
    "merchant_order_id": "f50d9fa2-5d3e-4e49-9a02-218ad32ef4a9",
    "idempotency_key": "abc123",
    "amount_cents": 1500,
    "currency": "INR",
    "status": "SUCCESS",
    "provider_txn_id": "sim_058c9593e150402fab5b37dd4c9816f0",
    "created_at": "2026-01-31T18:30:00.125Z",
    "updated_at": "2026-01-31T18:30:00.25Z",
    "refunded_cents": 0,
}

ONE_PAYMENT_PROBLEMS = (
    InvalidRequest,
    Unauthorized,
    PaymentNotFound,
    TooBusy,
    DatabaseUnavailable,
    PaymentUnreadable,
)

LIST_PAYMENTS = Operation(
    id="list_payments",
    tag="payments",
    summary="Payments, newest first",
    description="Some milliseconds behind: `position` is the last event that the list takes into "
    "account. Payments that come while you page neither push others onto the next page nor off it.",
    parameters=PARAMETERS,
    answers={
        200: Answer(
            description="A page; `next_cursor` is `null` on the last one.",
            body=PaymentPage,
            example={"payments": [_VIEW], "next_cursor": None, "position": 2},
        )
    },
    problems=(InvalidRequest, Unauthorized, TooBusy, DatabaseUnavailable),
)
GET_PAYMENT = Operation(
    id="get_payment",
    tag="payments",
    summary="A payment as of now, or as of then",
    description="Read from its events: a payment is there the instant its charge was answered. "
    "With `as_of` it is as it was then, and `404` if it did not exist yet.",
    parameters=(PAYMENT_ID, AS_OF),
    answers={200: Answer(description="The payment.", body=PaymentView, example=_VIEW)},
    problems=ONE_PAYMENT_PROBLEMS,
)
GET_EVENTS = Operation(
    id="get_events",
    tag="payments",
    summary="What happened to a payment",
    description="Its events as they are stored, oldest first; also those of a payment that is "
    "`payment_unreadable`.",
    parameters=(PAYMENT_ID,),
    answers={
        200: Answer(
            description="The history.",
            body=PaymentHistory,
            example={
                "events": [
                    {
                        "position": 2,
                        "version": 2,
                        "type": "PaymentCharged",
                        "recorded_at": "2026-01-31T18:30:00.25Z",
                        "data": {
                            "payment_id": _ID,
                            "version": 2,
                            "event_id": "d4807417-6604-43d6-bfcb-fd32680f5f5b",
                            "occurred_at": "2026-01-31T18:30:00.245Z",
                            "client": "default",
                            "request_id": "551be6e7f42bf49ee8b0ed941b1dddd3",
                            "traceparent": None,
                            "schema_version": 1,
                            "merchant_order_id": "f50d9fa2-5d3e-4e49-9a02-218ad32ef4a9",
                            "amount_cents": 1500,
                            "currency": "INR",
                            "provider_txn_id": "sim_058c9593e150402fab5b37dd4c9816f0",
                        },
                    }
                ]
            },
        )
    },
    problems=(InvalidRequest, Unauthorized, PaymentNotFound, TooBusy, DatabaseUnavailable),
)


@get("/payments", media_type=MediaType.JSON, opt=described(LIST_PAYMENTS))
async def payments(request: AnyRequest) -> Response[bytes]:
    """Payments, newest first; it may be a moment behind, and `position` says where it was."""
    reach = may_read(client_of(request))
    query = read_list_query(request.scope["query_string"])
    page = await list_payments(
        service_of(request).database, query.filter, reach, query.limit, query.cursor
    )
    return json_of(page)


@get("/payments/{payment_id:str}", media_type=MediaType.JSON, opt=described(GET_PAYMENT))
async def payment(request: AnyRequest, payment_id: FromPath[str]) -> Response[bytes]:
    """The payment as of now, or as of then."""
    service, reach = service_of(request), may_read(client_of(request))
    wanted = payment_in_path(request, payment_id)
    if query := request.scope["query_string"]:
        moment = read_as_of(query)
        if moment is not None:
            return json_of(await get_payment_as_of(service.database, wanted, moment, reach))
    return json_of(await get_payment(service.database, service.lookups, wanted, reach))


@get("/payments/{payment_id:str}/events", media_type=MediaType.JSON, opt=described(GET_EVENTS))
async def events(request: AnyRequest, payment_id: FromPath[str]) -> Response[bytes]:
    """What happened to the payment, oldest first: its events as they are stored."""
    service, reach = service_of(request), may_read(client_of(request))
    wanted = payment_in_path(request, payment_id)
    return json_of(await get_history(service.database, wanted, reach))


_encoder = msgspec.json.Encoder()


def json_of(answer: Any) -> Response[bytes]:
    return Response(_encoder.encode(answer), media_type=MediaType.JSON)
