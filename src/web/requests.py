"""Reading requests and building responses, for the endpoints under /v1."""

import math
import re
from typing import Any, Generic, NamedTuple, TypeVar, cast
from uuid import UUID

import msgspec
from litestar import Request
from litestar.datastructures import State

from payments.commands.waiters import Caller
from payments.errors import FieldError, InvalidIdempotencyKey, InvalidRequest
from payments.payment.identity import KEY_MAX, KEY_PATTERN
from payments.service import Service
from web.answer import JsonAnswer
from web.auth import authenticate
from web.bodies import check_json, check_not_encoded, read_body
from web.serving.arrivals import CALLER
from web.serving.heads import Headers

AnyRequest = Request[Any, Any, State]

B = TypeVar("B", bound=msgspec.Struct)

UUID_PATTERN = "^[0-9a-fA-F]{8}-[0-9a-fA-F]{4}-[0-9a-fA-F]{4}-[0-9a-fA-F]{4}-[0-9a-fA-F]{12}$"
# Both: client generators use the format, and some validators check only the pattern.
UUID_SCHEMA = {"type": "string", "format": "uuid", "maxLength": 36, "pattern": UUID_PATTERN}
KEY_SCHEMA = {"type": "string", "minLength": 1, "maxLength": KEY_MAX, "pattern": KEY_PATTERN}
TIME_TEXT = "a time with its offset from UTC (RFC 3339), like 2026-01-31T18:30:00Z"
_KEY = re.compile(KEY_PATTERN[1:-1].encode())


def service_of(request: AnyRequest) -> Service:
    return cast(Service, request.app.state.service)


def headers_of(request: AnyRequest) -> Headers:
    return cast(Headers, request.scope["headers"])


def client_of(request: AnyRequest) -> str:
    """The API client that sent the request; raises Unauthorized. The protocol has authenticated it;
    without our protocol this is done here."""
    state = request.scope["state"]
    if "client" not in state:
        keys = service_of(request).settings.payments_api_keys
        log_with(request, client=authenticate(headers_of(request), keys))
    return cast(str, state["client"])


def _idempotency_key(sent: list[bytes]) -> str | None:
    """The key, None if none was sent; raises InvalidIdempotencyKey."""
    if not sent:
        return None
    if len(sent) > 1:
        raise InvalidIdempotencyKey("Send the Idempotency-Key header once.")
    key = sent[0].strip(b" \t")  # not part of the value (RFC 9112 section 5); the parser keeps tabs
    if not _KEY.fullmatch(key):
        raise InvalidIdempotencyKey(
            f"The Idempotency-Key must be 1 to {KEY_MAX} printable ASCII characters."
        )
    return key.decode("ascii")


def log_with(request: AnyRequest, **fields: Any) -> None:
    """Adds fields to the request's line in the access log: see access_log.LOGGED."""
    request.scope["state"].update(fields)


def read_uuid(text: str) -> UUID:
    """Accepts only the form with dashes, in either case; raises ValueError."""
    if not re.fullmatch(UUID_PATTERN[1:-1], text):
        raise ValueError(text)
    return UUID(text)


def payment_in_path(request: AnyRequest, text: str) -> UUID:
    """The payment's id; raises InvalidRequest if it is not a UUID."""
    try:
        payment_id = read_uuid(text)
    except ValueError:
        error = FieldError("payment_id", "must be a UUID like f50d9fa2-5d3e-4e49-9a02-218ad32ef4a9")
        raise InvalidRequest("The payment_id in the path is not a UUID.", (error,)) from None
    log_with(request, payment_id=text)
    return payment_id


class Sent(NamedTuple, Generic[B]):
    """A command as it was sent. `caller` is the client that waits for the response; None without
    our protocol."""

    client: str
    key: str | None
    body: B
    request_id: str
    traceparent: str | None
    caller: Caller | None


def read_command(
    request: AnyRequest, body_type: type[B], *, why_a_key: str | None = None
) -> Sent[B]:
    """Reads header section and body. Raises Unauthorized, UnsupportedMediaType, InvalidRequest and
    InvalidIdempotencyKey; with `why_a_key` also for a missing key."""
    client = client_of(request)
    sent: dict[bytes, list[bytes]] = {}
    for name, value in request.scope["headers"]:
        sent.setdefault(name, []).append(value)
    check_json(sent.get(b"content-type", []))
    check_not_encoded(sent.get(b"content-encoding", []))
    key = _idempotency_key(sent.get(b"idempotency-key", []))
    if key is None and why_a_key is not None:
        raise InvalidIdempotencyKey(why_a_key)
    state: dict[str, Any] = request.scope["state"]
    return Sent(
        client=client,
        key=key,
        body=read_body(state["body"], body_type),  # as the guard read it
        request_id=state["request_id"],
        traceparent=state["traceparent"],  # W3C trace context
        caller=state.get(CALLER),
    )


def json_of(answer: Any) -> JsonAnswer:
    return JsonAnswer(msgspec.json.encode(answer))


def command_answer(
    request: AnyRequest, answer: msgspec.Struct, payment_id: UUID, *, pending: bool, replayed: bool
) -> JsonAnswer:
    """201 with an outcome, 202 without; a header marks a replayed outcome."""
    log_with(request, payment_id=payment_id)
    headers = [(b"location", b"/v1/payments/%b" % str(payment_id).encode())]
    if pending:
        # An earlier retry would only wait for the deadline of this request.
        after_s = math.ceil(service_of(request).settings.charge_deadline_s)
        headers.append((b"retry-after", b"%d" % after_s))
    elif replayed:
        headers.append((b"idempotent-replayed", b"true"))
    return JsonAnswer(msgspec.json.encode(answer), status=202 if pending else 201, headers=headers)
