"""GET /v1/unfulfilled."""

from litestar import get
from litestar.enums import MediaType

from payments.queries.fulfilments import UnfulfilledFilter, list_unfulfilled
from payments.queries.payments import LIMIT_DEFAULT
from web.answer import JsonAnswer, json_of
from web.auth import may_read
from web.list_query import UNFULFILLED_READERS, read_query
from web.requests import AnyRequest, client_of, service_of
from web.schema.description import described
from web.schema.operations.unfulfilled import LIST_UNFULFILLED


@get("/unfulfilled", media_type=MediaType.JSON, opt=described(LIST_UNFULFILLED))
async def unfulfilled(request: AnyRequest) -> JsonAnswer:
    """Payments whose order may not have been fulfilled, the oldest first."""
    service, reach = service_of(request), may_read(client_of(request))
    found = read_query(request.scope["query_string"], UNFULFILLED_READERS)
    limit, cursor = found.pop("limit", LIMIT_DEFAULT), found.pop("cursor", None)
    asked = service.settings.order_status_url is not None
    page = await list_unfulfilled(
        service.database, UnfulfilledFilter(**found), reach, limit, cursor, asked=asked
    )
    return json_of(page)
