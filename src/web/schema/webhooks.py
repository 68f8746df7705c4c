"""The callbacks to Order Service, as `webhooks` of the OpenAPI document."""

from typing import Any

from payments.callbacks.dispatcher import CallbackBody
from payments.order_service import TIMEOUT_S

BODIES = (CallbackBody,)

_SIGNED = "Only with `ORDER_CALLBACK_SECRET`."
_EXAMPLE = {
    "order_id": "f50d9fa2-5d3e-4e49-9a02-218ad32ef4a9",
    "payment_id": "058c9593-e150-402f-ab5b-37dd4c9816f0",
    "status": "SUCCESS",
    "event_id": "d4807417-6604-43d6-bfcb-fd32680f5f5b",
    "sequence": 2,
    "occurred_at": "2026-01-31T18:30:00.245Z",
    "amount_cents": 1500,
    "currency": "INR",
}


def _header(name: str, description: str, schema: dict[str, Any]) -> dict[str, Any]:
    return {
        "name": name,
        "in": "header",
        "description": description,
        "required": False,
        "schema": schema,
    }


WEBHOOKS: dict[str, Any] = {
    "payment_outcome": {
        "post": {
            "operationId": "payment_outcome",
            "tags": ["callbacks"],
            "summary": "The outcome of a payment, to ORDER_CALLBACK_URL",
            "description": "Delivered at least once; the callbacks of an order are sent in "
            "order, one at a time. `status` is `SUCCESS`, `FAILED` or "
            "`REFUNDED`, and `ACTION_REQUIRED` if it is enabled. Respond with `2xx` to any other "
            "status too, since "
            "more may be added, and to an `event_id` that you have processed "
            "before. Signed according to Standard Webhooks.",
            "parameters": [
                _header(
                    "webhook-id",
                    f"The `event_id`. {_SIGNED}",
                    {"type": "string", "format": "uuid"},
                ),
                _header(
                    "webhook-timestamp",
                    "The time of sending in Unix seconds. Reject the callback if it "
                    f"differs much from your clock. {_SIGNED}",
                    {"type": "integer"},
                ),
                _header(
                    "webhook-signature",
                    "`v1,` and the base64 of the HMAC-SHA256 of `id.timestamp.body`; one per "
                    f"secret, separated by spaces. {_SIGNED}",
                    {"type": "string"},
                ),
                _header(
                    "traceparent",
                    "The W3C trace context of the request that began the payment, if it had one.",
                    {"type": "string"},
                ),
            ],
            "requestBody": {
                "required": True,
                "content": {
                    "application/json": {
                        "schema": {"$ref": f"#/components/schemas/{CallbackBody.__name__}"},
                        "examples": {"paid": {"value": _EXAMPLE}},
                    }
                },
            },
            "responses": {
                "2XX": {"description": "Delivered. Respond only once the outcome is stored."},
                "410": {"description": "Dead: not retried, unless an operator redrives it."},
                "default": {
                    "description": "Retried with exponential backoff for at least three days. "
                    "Without a response within `CALLBACK_TIMEOUT_S` "
                    f"({TIMEOUT_S:g} s) it is retried after at least the same "
                    "time again. After `429` and `503` it is not retried "
                    "before `Retry-After`."
                },
            },
            "security": [],
        }
    }
}
