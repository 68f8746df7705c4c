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
    description="Captured payments whose order Order Service did not confirm. `unfulfilled`: "
    "the order failed; refund the payment, or have the order fulfilled. "
    "`paid_twice`: the order is confirmed for another payment; refund this one. "
    "`suspect`: the status of the order is not known. `given_back`: the service "
    "gave the payment back by itself. Payments that were refunded on request are "
    "not listed.",
    parameters=query_parameters(
        UNFULFILLED_READERS, notes={"state": "; by default all but given_back"}
    ),
    answers={
        200: Answer(
            description="A page; `next_cursor` is `null` on the last page.",
            body=UnfulfilledPage,
            example={"payments": [_EXAMPLE], "next_cursor": None, "order_status_asked": True},
        )
    },
    problems=(InvalidRequest, Unauthorized, TooBusy, DatabaseUnavailable),
)
