"""The part of the OpenAPI document for all operations: how to charge safely, and the headers."""

from typing import Any

from web.schema.description import Parameter
from web.serving.guard import BODY_MAX, BODY_TIMEOUT_S, WEBHOOK_BODY_MAX
from web.serving.heads import HEAD_MAX, HEADERS_MAX

DESCRIPTION = f"""\
Captures money exactly once per `Idempotency-Key`, and refunds it.

### How to charge safely

1. Create **one key for each attempt to pay an order**, and store it with the order before you send
   the request.
2. Wait 8 s for the response; the service responds within 7 s.
3. `201` is final: `status` is `SUCCESS`, or `FAILED` (declined or abandoned: nothing was captured).
   Only after `FAILED` may you make a new attempt, with a new key.
4. No response, a broken connection, `408`, `500` or `503`: retry **the same request with the same
   key** after `Retry-After` seconds, or with exponential backoff, until the response is `201` or
   `202`. The service captures once, however often you retry. If the response holds an outcome that
   was recorded before, it has `Idempotent-Replayed: true`.
5. `202` is `PENDING`: keep the order, and keep the key. Retry the same request after `Retry-After`
   for as long as the seats can be held; if the provider never received the charge, the retry sends
   it. Without a retry the payment becomes `SUCCESS` if it was captured, or else `FAILED` after ten
   minutes.
6. Any other `4xx`: do not retry, the result would be the same. Correct what `detail` and `errors`
   name. `422` means that the key belongs to a different request.

### Errors

Every error is a problem document (RFC 9457). Programs decide by its `code`, which is stable. A
request can fail before it is assigned to an endpoint: `404 not_found`, `405 method_not_allowed`,
`400 malformed_request` (not HTTP/1.1), `414 target_too_long`, `431 head_too_large` (over
{HEAD_MAX // 1024} KiB or {HEADERS_MAX} fields), `501 not_implemented` and
`505 version_not_supported`. A body may have up to {BODY_MAX // 1024} KiB, that of a
provider's webhook {WEBHOOK_BODY_MAX // 1024} KiB, and must arrive within {BODY_TIMEOUT_S:g} s.
"""

TAGS = [
    {"name": "payments", "description": "Charge, refund, read"},
    {"name": "providers", "description": "Webhooks of payment providers"},
    {"name": "callbacks", "description": "Requests to Order Service"},
    {"name": "operations", "description": "Health and metrics"},
]

REQUEST_HEADERS = (
    Parameter(
        name="X-Request-ID",
        place="header",
        description="Identifies the request in logs, events and the response: 1 to 128 "
        "letters, digits or any of `._:/+=@-`. The service replaces any other "
        "value by a new id.",
        schema={"type": "string"},
    ),
    Parameter(
        name="traceparent",
        place="header",
        description="The W3C trace context of the request, passed on to events and callbacks. "
        "An invalid value is ignored.",
        schema={"type": "string"},
    ),
)

HEADERS: dict[str, dict[str, Any]] = {
    "Location": {
        "description": "The path of the payment.",
        "required": True,
        "schema": {"type": "string", "format": "uri-reference"},
    },
    "Idempotent-Replayed": {
        "description": "Present if an earlier request with this key started the operation.",
        "schema": {"type": "string", "enum": ["true"]},
    },
    "Retry-After": {
        "description": "Retry after this number of seconds.",
        "schema": {"type": "integer", "minimum": 0},
    },
    "WWW-Authenticate": {
        "description": "How to send an API key.",
        "required": True,
        "schema": {"type": "string"},
    },
    "Accept": {
        "description": "The supported media type.",
        "required": True,
        "schema": {"type": "string"},
    },
    "Accept-Encoding": {
        "description": "The supported encodings: none.",
        "required": True,
        "schema": {"type": "string"},
    },
    "Allow": {
        "description": "The methods that the path supports.",
        "required": True,
        "schema": {"type": "string"},
    },
    "X-Request-ID": {
        "description": "The client's id of the request, or a new one.",
        "schema": {"type": "string"},
    },
}
