"""GET /v1/unfulfilled: responses."""

from payments.errors import DatabaseUnavailable, InvalidRequest, TooBusy, Unauthorized
from payments.queries.fulfilments import UnfulfilledPage
from web.list_query import UNFULFILLED_READERS
from web.schema.description import Answer, Operation, query_parameters

_EXAMPLE = {
    "payment_id": "058c9593-e150-402f-ab5b-37dd4c9816f0",
    "order_id": "f50d9fa2-5d3e-4e49-9a02-218ad32ef4a9",
    "amount_cents": 1500,
    "currency": "INR",
    "state": "unfulfilled",
    "said": "already_processed",
    "order_status": "FAILED",
    "problem": None,
    "found_at": "2026-01-31T18:30:01Z",
    "checked_at": "2026-01-31T18:30:02Z",
    "next_at": "2026-01-31T18:45:02Z",
    "given_back_at": None,
}

LIST_UNFULFILLED = Operation(
    id="list_unfulfilled",
    tag="payments",
    description="Captured payments that Order Service did not confirm. `unfulfilled`: it shows the "
    "order as failed; give the money back, or see that the order is fulfilled. `paid_twice`: the "
    "order is confirmed, and was paid by another payment before; give this one back. `suspect`: it "
    "is not known. `given_back`: the service gave it back. What was refunded is not listed.",
    parameters=query_parameters(
        UNFULFILLED_READERS, notes={"state": "; without it all but given_back are listed"}
    ),
    answers={
        200: Answer(
            description="A page; `next_cursor` is `null` on the last one.",
            body=UnfulfilledPage,
            example={"payments": [_EXAMPLE], "next_cursor": None, "order_status_asked": True},
        )
    },
    problems=(InvalidRequest, Unauthorized, TooBusy, DatabaseUnavailable),
)
