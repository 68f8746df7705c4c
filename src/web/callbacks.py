"""GET /v1/payments/{payment_id}/callbacks: what Order Service was told, and how it went."""

from litestar import Response, get
from litestar.enums import MediaType
from litestar.params import FromPath

from payments.queries.callbacks import PaymentCallbacks, get_callbacks
from web.auth import may_read
from web.payments import ONE_PAYMENT_PROBLEMS, PAYMENT_ID, json_of
from web.requests import AnyRequest, client_of, payment_in_path, service_of
from web.schema.description import Answer, Operation, described

GET_CALLBACKS = Operation(
    id="get_callbacks",
    tag="payments",
    summary="What Order Service was told of a payment",
    description="Each outcome that is called back, with every attempt that is on record. None "
    "without `ORDER_CALLBACK_URL`, and for what is older than `CALLBACK_RETENTION_DAYS`. "
    "`fulfilment` is not null if the order may not have been fulfilled: `GET /v1/unfulfilled`.",
    parameters=(PAYMENT_ID,),
    answers={
        200: Answer(
            description="The callbacks, in order.",
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
    problems=ONE_PAYMENT_PROBLEMS,
)


@get(
    "/payments/{payment_id:str}/callbacks", media_type=MediaType.JSON, opt=described(GET_CALLBACKS)
)
async def callbacks(request: AnyRequest, payment_id: FromPath[str]) -> Response[bytes]:
    """What Order Service was told of the payment, and how it went."""
    service, reach = service_of(request), may_read(client_of(request))
    wanted = payment_in_path(request, payment_id)
    return json_of(await get_callbacks(service.database, service.lookups, wanted, reach))
