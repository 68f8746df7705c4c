"""GET /v1/payments: the list, one payment, its events, and its callbacks."""

from litestar import get
from litestar.enums import MediaType
from litestar.params import FromPath

from payments.queries.callbacks import get_callbacks
from payments.queries.history import get_history
from payments.queries.payments import get_payment, get_payment_as_of, list_payments
from web.answer import JsonAnswer, json_of
from web.auth import may_read
from web.list_query import AS_OF_READERS, read_list_query, read_query
from web.requests import AnyRequest, client_of, payment_in_path, service_of
from web.schema.description import described
from web.schema.operations.payments import GET_CALLBACKS, GET_EVENTS, GET_PAYMENT, LIST_PAYMENTS


@get("/payments", media_type=MediaType.JSON, opt=described(LIST_PAYMENTS))
async def payments(request: AnyRequest) -> JsonAnswer:
    """Payments, newest first.

    The list may be a moment behind, and `position` says where it was.
    """
    reach = may_read(client_of(request))
    query = read_list_query(request.scope["query_string"])
    page = await list_payments(
        service_of(request).database, query.filter, reach, query.limit, query.cursor
    )
    return json_of(page)


@get("/payments/{payment_id:str}", media_type=MediaType.JSON, opt=described(GET_PAYMENT))
async def payment(request: AnyRequest, payment_id: FromPath[str]) -> JsonAnswer:
    """A payment as of now, or as of a past time or position."""
    service, reach = service_of(request), may_read(client_of(request))
    wanted = payment_in_path(request, payment_id)
    if query := request.scope["query_string"]:
        moment = read_query(query, AS_OF_READERS).get("as_of")
        if moment is not None:
            return json_of(await get_payment_as_of(service.database, wanted, moment, reach))
    return json_of(await get_payment(service.database, service.lookups, wanted, reach))


@get("/payments/{payment_id:str}/events", media_type=MediaType.JSON, opt=described(GET_EVENTS))
async def events(request: AnyRequest, payment_id: FromPath[str]) -> JsonAnswer:
    """The events of a payment.

    Its events as they are stored, oldest first.
    """
    service, reach = service_of(request), may_read(client_of(request))
    wanted = payment_in_path(request, payment_id)
    return json_of(await get_history(service.database, wanted, reach))


@get(
    "/payments/{payment_id:str}/callbacks", media_type=MediaType.JSON, opt=described(GET_CALLBACKS)
)
async def callbacks(request: AnyRequest, payment_id: FromPath[str]) -> JsonAnswer:
    """The callbacks of a payment, with their attempts."""
    service, reach = service_of(request), may_read(client_of(request))
    wanted = payment_in_path(request, payment_id)
    return json_of(await get_callbacks(service.database, service.lookups, wanted, reach))
