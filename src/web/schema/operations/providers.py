"""POST /v1/providers/{name}/webhook: response."""

import msgspec

from payments.errors import BadWebhookSignature, DatabaseUnavailable, GatewayUnavailable, TooBusy
from payments.hints import Recorded
from web.problems import NotFound
from web.schema.description import Answer, Operation, Parameter


class WebhookAnswer(msgspec.Struct, frozen=True, kw_only=True):
    """What a webhook came to, as the provider's list of deliveries may show it."""

    result: Recorded


PROVIDER_WEBHOOK = Operation(
    id="provider_webhook",
    tag="providers",
    description="For payment providers; it needs their signature instead of an API key. A webhook "
    "only says which payment to ask about: settling then asks the provider, and nothing else in it "
    "is used. `accepted`: the payment is asked about now. `duplicate`: this event was received "
    "before. `unknown`: no such payment yet; kept for 7 days. `ignored`: nothing of the payment is "
    "unsettled, or the event is about no payment.",
    parameters=(
        Parameter(
            name="name",
            place="path",
            description="The name of a provider in `GATEWAYS` that sends webhooks.",
            schema={"type": "string", "pattern": "^[A-Za-z0-9._-]{1,64}$"},
            required=True,
            examples={"webhook": "acme"},
        ),
    ),
    is_raw=True,
    body_examples={"webhook": {"id": "evt_1", "type": "charge.captured"}},
    answers={
        200: Answer(
            description="The webhook is stored; deliver it no more.",
            body=WebhookAnswer,
            example={"result": "accepted"},
        )
    },
    problems=(BadWebhookSignature, NotFound, TooBusy, DatabaseUnavailable, GatewayUnavailable),
)
