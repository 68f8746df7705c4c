"""GET /v1/payments: the list, one payment, and its events."""

from typing import Annotated, Any

import msgspec
from litestar import Response, get
from litestar.enums import MediaType
from litestar.params import Parameter

from payments.queries.history import get_history
from payments.queries.payments import get_payment, list_payments
from web.auth import may_read
from web.list_query import read_list_query
from web.requests import Anyone, client_of, service_of, uuid_in_path

PaymentId = Annotated[str, Parameter(description="the payment's UUID")]


@get("/payments", media_type=MediaType.JSON)
async def payments(request: Anyone) -> Response[bytes]:
    """Payments, newest first; it may be a moment behind, and `position` says where it was."""
    reach = may_read(client_of(request))
    query = read_list_query(request.scope["query_string"])
    page = await list_payments(
        service_of(request).database, query.filter, reach, query.limit, query.cursor
    )
    return _json(page)


@get("/payments/{payment_id:str}", media_type=MediaType.JSON)
async def payment(request: Anyone, payment_id: PaymentId) -> Response[bytes]:
    """The payment as of now."""
    service, reach = service_of(request), may_read(client_of(request))
    wanted = uuid_in_path(payment_id, "payment_id")
    return _json(await get_payment(service.database, service.lookups, wanted, reach))


@get("/payments/{payment_id:str}/events", media_type=MediaType.JSON)
async def events(request: Anyone, payment_id: PaymentId) -> Response[bytes]:
    """What happened to the payment, oldest first: its events as they are stored."""
    service, reach = service_of(request), may_read(client_of(request))
    wanted = uuid_in_path(payment_id, "payment_id")
    return _json(await get_history(service.database, wanted, reach))


_encoder = msgspec.json.Encoder()


def _json(answer: Any) -> Response[bytes]:
    return Response(_encoder.encode(answer), media_type=MediaType.JSON)
