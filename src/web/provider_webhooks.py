"""POST /v1/providers/{name}/webhook: providers say which payment there is news of."""

from typing import cast

from litestar import post
from litestar.enums import MediaType
from litestar.params import FromPath

from payments.errors import BadWebhookSignature
from web.answer import JsonAnswer, json_of
from web.problems import NotFound
from web.requests import AnyRequest, headers_of, log_with, service_of
from web.schema.description import described
from web.schema.operations.providers import PROVIDER_WEBHOOK, WebhookAnswer
from web.serving.door import WebhookPath
from web.serving.guard import PLACE


@post(
    "/providers/{name:str}/webhook",
    status_code=200,
    media_type=MediaType.JSON,
    opt=described(PROVIDER_WEBHOOK),
)
async def provider_webhook(request: AnyRequest, name: FromPath[str]) -> JsonAnswer:
    """Take a webhook of a payment provider."""
    hints, state = service_of(request).hints, request.scope["state"]
    if name not in hints.names:
        raise NotFound
    headers: dict[str, str] = {}
    for field, value in headers_of(request):
        key, text = field.decode("latin-1"), value.decode("latin-1")
        headers[key] = f"{headers[key]}, {text}" if key in headers else text
    try:
        taken = await hints.take(name, headers, cast(bytes, state["body"]))
    except BadWebhookSignature:
        place = state.get(PLACE)
        if isinstance(place, WebhookPath):
            place.was_forged()
        raise
    if taken.payment_id is not None:
        log_with(request, payment_id=taken.payment_id)
    return json_of(WebhookAnswer(result=taken.result))
