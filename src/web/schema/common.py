"""The part of the OpenAPI document for all operations: how to charge safely, and the headers."""

from typing import Any

from web.schema.description import Parameter
from web.serving.guard import BODY_MAX, BODY_TIMEOUT_S
from web.serving.heads import HEAD_MAX, HEADERS_MAX

DESCRIPTION = f"""\
Captures money exactly once per `Idempotency-Key`, and gives it back.

### How to charge safely

1. Make **one key for each attempt to pay an order**, and store it with the order before you send.
2. Wait 8 s for the answer; the service answers within 7 s.
3. `201` is final: `status` is `SUCCESS`, or `FAILED` (declined, or given up: nobody paid). Only
   after `FAILED` may a new attempt be made, with a new key.
4. No answer, a broken connection, `408`, `500` or `503`: send **the same request with the same
   key** again, after `Retry-After` seconds or growing pauses, until the answer is `201` or `202`.
   However often it is sent, it is captured once; an outcome that was there before comes with
   `Idempotent-Replayed: true`.
5. `202` is `PENDING`: do not give the order up, and do not take a new key. Send the same request
   again after `Retry-After`, as long as the seats can be held: if the provider never heard of the
   charge, that sends it. Left alone it becomes `SUCCESS` if it was captured, else, after ten
   minutes, `FAILED`.
6. Any other `4xx`: do not repeat it, it would be refused again. Mend what `detail` and `errors`
   name. `422` says that the key belongs to another request.

### Errors

Every error is a problem document (RFC 9457); programs decide by its `code`, which is stable. Before
there is a request to one of the endpoints: `404 not_found`, `405 method_not_allowed`,
`400 malformed_request` (not HTTP/1.1), `414 target_too_long`, `431 head_too_large` (over
{HEAD_MAX // 1024} KiB or {HEADERS_MAX} fields), `501 not_implemented` and
`505 version_not_supported`. Bodies may have {BODY_MAX // 1024} KiB and take {BODY_TIMEOUT_S:g} s.
"""

TAGS = [
    {"name": "payments", "description": "Charge, refund, read"},
    {"name": "callbacks", "description": "What Order Service is sent"},
    {"name": "operations", "description": "For those who run the service"},
]

REQUEST_HEADERS = (
    Parameter(
        name="X-Request-ID",
        place="header",
        description="Names the request in logs, events and the answer: 1 to 128 letters, digits "
        "or any of `._:/+=@-`. Anything else is replaced by a new id.",
        schema={"type": "string"},
    ),
    Parameter(
        name="traceparent",
        place="header",
        description="The W3C trace context of the request; events and callbacks carry it on. "
        "Ignored if bad.",
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
        "description": "Sent if an earlier request with this key began what is answered.",
        "schema": {"type": "string", "enum": ["true"]},
    },
    "Retry-After": {
        "description": "Send the request again after so many seconds.",
        "schema": {"type": "integer", "minimum": 0},
    },
    "WWW-Authenticate": {
        "description": "How to send an API key.",
        "required": True,
        "schema": {"type": "string"},
    },
    "Accept": {
        "description": "The media type that is taken.",
        "required": True,
        "schema": {"type": "string"},
    },
    "Accept-Encoding": {
        "description": "The encodings that are taken: none.",
        "required": True,
        "schema": {"type": "string"},
    },
    "Allow": {
        "description": "The methods that the path takes.",
        "required": True,
        "schema": {"type": "string"},
    },
    "X-Request-ID": {
        "description": "The caller's id of the request, or a new one.",
        "schema": {"type": "string"},
    },
}
