"""GET /v1/unfulfilled: payments whose order may not have been fulfilled."""

from typing import Any, get_args

from litestar import Response, get
from litestar.enums import MediaType

from payments.errors import DatabaseUnavailable, InvalidRequest, TooBusy, Unauthorized
from payments.queries.fulfilments import (
    LIST,
    State,
    UnfulfilledFilter,
    UnfulfilledPage,
    list_unfulfilled,
)
from payments.queries.payments import LIMIT_DEFAULT
from web.auth import may_read
from web.list_query import LIMIT, ORDER, Readers, cursor_of, read_parameters
from web.payments import json_of
from web.requests import AnyRequest, client_of, service_of
from web.schema.description import Answer, Operation, Parameter, described

_STATES: tuple[State, ...] = get_args(State)


def _state(text: str) -> State:
    for state in _STATES:
        if state == text:
            return state
    raise ValueError(text)


_READERS: Readers = {
    "state": (
        _state,
        f"one of {', '.join(_STATES)}",
        {"type": "string", "enum": list(_STATES)},
    ),
    "merchant_order_id": ORDER,
    "limit": LIMIT,
    "cursor": cursor_of(LIST),
}
_NOTES = {"state": "; without it all but given_back are listed"}

EXAMPLE: dict[str, Any] = {
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
    summary="Payments whose order may not have been fulfilled, the oldest first",
    description="Captured payments that Order Service did not confirm. `unfulfilled`: it shows the "
    "order as failed; give the money back, or see that the order is fulfilled. `paid_twice`: the "
    "order is confirmed, and was paid by another payment before; give this one back. `suspect`: it "
    "is not known. `given_back`: the service gave it back. What was refunded is not listed.",
    parameters=tuple(
        Parameter(
            name=name, place="query", description=description + _NOTES.get(name, ""), schema=schema
        )
        for name, (_, description, schema) in _READERS.items()
    ),
    answers={
        200: Answer(
            description="A page; `next_cursor` is `null` on the last one.",
            body=UnfulfilledPage,
            example={"payments": [EXAMPLE], "next_cursor": None, "order_status_asked": True},
        )
    },
    problems=(InvalidRequest, Unauthorized, TooBusy, DatabaseUnavailable),
)


@get("/unfulfilled", media_type=MediaType.JSON, opt=described(LIST_UNFULFILLED))
async def unfulfilled(request: AnyRequest) -> Response[bytes]:
    """Payments whose order may not have been fulfilled, the oldest first."""
    service, reach = service_of(request), may_read(client_of(request))
    found = read_parameters(request.scope["query_string"], _READERS)
    limit, cursor = found.pop("limit", LIMIT_DEFAULT), found.pop("cursor", None)
    asked = service.settings.order_status_url is not None
    page = await list_unfulfilled(
        service.database, UnfulfilledFilter(**found), reach, limit, cursor, asked=asked
    )
    return json_of(page)
