"""GET /v1/payments: responses of the list, one payment, its events and its callbacks."""

from payments.errors import (
    DatabaseUnavailable,
    InvalidRequest,
    PaymentNotFound,
    PaymentUnreadable,
    TooBusy,
    Unauthorized,
)
from payments.queries.callbacks import PaymentCallbacks
from payments.queries.history import PaymentHistory
from payments.queries.payments import PaymentPage, PaymentView
from web.list_query import AS_OF_READERS, LIST_READERS
from web.requests import TIME_TEXT, UUID_SCHEMA
from web.schema.description import Answer, Operation, Parameter, query_parameters

_ID = "058c9593-e150-402f-ab5b-37dd4c9816f0"
_PAYMENT_ID = Parameter(
    name="payment_id",
    place="path",
    description="The payment's UUID. For an order's UUID, the `404` lists the order's payments.",
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

_ONE_PAYMENT_PROBLEMS = (
    InvalidRequest,
    Unauthorized,
    PaymentNotFound,
    TooBusy,
    DatabaseUnavailable,
    PaymentUnreadable,
)
_AS_OF = Parameter(
    name="as_of",
    place="query",
    description=f"{TIME_TEXT}, or a position of the log: the payment is returned with "
    "everything recorded up to then. By default, and for a time in the future: as "
    "of now.",
    schema=AS_OF_READERS["as_of"][2],
)

LIST_PAYMENTS = Operation(
    id="list_payments",
    tag="payments",
    description="The list is some milliseconds behind the log: `position` is the last event "
    "that it includes. Payments created while you page do not shift later pages.",
    parameters=query_parameters(
        LIST_READERS,
        notes={
            "created_from": "; inclusive",
            "created_until": "; exclusive, and not before created_from",
        },
        examples={"limit": {"list": 20}, "created_from": {"list": "2026-01-31T18:30:00Z"}},
    ),
    answers={
        200: Answer(
            description="A page; `next_cursor` is `null` on the last page.",
            body=PaymentPage,
            example={"payments": [_VIEW], "next_cursor": None, "position": 2},
        )
    },
    problems=(InvalidRequest, Unauthorized, TooBusy, DatabaseUnavailable),
)
GET_PAYMENT = Operation(
    id="get_payment",
    tag="payments",
    description="Read from the payment's events, so a payment is readable as soon as the "
    "response to its charge is sent. With `as_of` the payment is returned as it "
    "was then, or `404` if it did not exist.",
    parameters=(_PAYMENT_ID, _AS_OF),
    answers={200: Answer(description="The payment.", body=PaymentView, example=_VIEW)},
    problems=_ONE_PAYMENT_PROBLEMS,
)
GET_EVENTS = Operation(
    id="get_events",
    tag="payments",
    description="The payment's events as stored, oldest first, including those of a payment "
    "that is `payment_unreadable`.",
    parameters=(_PAYMENT_ID,),
    answers={
        200: Answer(
            description="The events.",
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
GET_CALLBACKS = Operation(
    id="get_callbacks",
    tag="payments",
    description="Each outcome that is sent to Order Service, with all recorded attempts. "
    "Empty without `ORDER_CALLBACK_URL`, and for callbacks older than "
    "`CALLBACK_RETENTION_DAYS`. `fulfilment` is not null if the order may not "
    "have been fulfilled: `GET /v1/unfulfilled`.",
    parameters=(_PAYMENT_ID,),
    answers={
        200: Answer(
            description="The callbacks, in the order of `sequence`.",
            body=PaymentCallbacks,
            example={
                "callbacks": [
                    {
                        "event_id": "d4807417-6604-43d6-bfcb-fd32680f5f5b",
                        "order_id": "f50d9fa2-5d3e-4e49-9a02-218ad32ef4a9",
                        "status": "SUCCESS",
                        "sequence": 2,
                        "state": "delivered",
                        "enqueued_at": "2026-01-31T18:30:00.26Z",
                        "finished_at": "2026-01-31T18:30:00.3Z",
                        "next_at": None,
                        "attempts": [
                            {
                                "started_at": "2026-01-31T18:30:00.27Z",
                                "seconds": 0.0125,
                                "outcome": "delivered",
                                "status": 200,
                                "reason": None,
                                "answer": '{"ok":true}',
                            }
                        ],
                    }
                ],
                "fulfilment": None,
            },
        )
    },
    problems=_ONE_PAYMENT_PROBLEMS,
)
