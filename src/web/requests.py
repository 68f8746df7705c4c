"""Reads requests of the endpoints under /v1: header section, path, and JSON bodies into Structs:
strictly, and with the errors of all fields at once.
"""

import codecs
import json
import math
import re
from decimal import Decimal, InvalidOperation
from typing import (
    Annotated,
    Any,
    Generic,
    NamedTuple,
    NoReturn,
    TypeVar,
    cast,
    get_args,
    get_origin,
)
from uuid import UUID

import msgspec
from litestar import Request
from litestar.datastructures import State

from payments.commands.runs import Caller
from payments.errors import FieldError, InvalidIdempotencyKey, InvalidRequest
from payments.payment.identity import KEY_MAX, KEY_PATTERN
from payments.service import Service
from web.auth import authenticate
from web.problems import UnsupportedMediaType
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

ERRORS_MAX = 20
_INTEGER_MAX = 10**18  # above the limits of all fields; an exponent could create any size
_CHARSET = re.compile(rb"""\bcharset\s*=\s*"?([^\s";]*)""", re.IGNORECASE)
_UTF_8 = (b"utf-8", b"utf8")

# JSON can spell an unpaired surrogate, which msgspec cannot encode to compare it with field names.
_NOT_VALID = (msgspec.ValidationError, UnicodeEncodeError)


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


class _Refused(ValueError):
    """Not JSON, or ambiguous JSON; the message says why."""


def check_json(content_types: list[bytes]) -> None:
    """Raises UnsupportedMediaType unless there is one Content-Type and it is application/json."""
    if content_types == [b"application/json"]:  # nearly always
        return
    if len(content_types) == 1:
        media_type, _, parameters = content_types[0].partition(b";")
        if media_type.strip().lower() == b"application/json":
            # JSON is UTF-8 (RFC 8259 section 8.1): another charset means other bytes.
            if all(charset.lower() in _UTF_8 for charset in _CHARSET.findall(parameters)):
                return
            raise UnsupportedMediaType("Send JSON as UTF-8, with or without charset=utf-8.")
    raise UnsupportedMediaType("Send Content-Type: application/json.")


def check_not_encoded(content_encodings: list[bytes]) -> None:
    """Raises UnsupportedMediaType for a compressed body (RFC 9110 section 8.4). `identity` means no
    encoding; some clients send it."""
    codings = b",".join(content_encodings).split(b",") if content_encodings else ()
    if any(coding.strip().lower() not in (b"", b"identity") for coding in codings):
        raise UnsupportedMediaType("Send the body uncompressed, without Content-Encoding.")


def read_body(body: bytes, struct: type[B]) -> B:
    """The body as a Struct. InvalidRequest names every wrong field and how to correct it."""
    try:
        value = _decoder.decode(_text(body))
    except _Refused as error:
        raise InvalidRequest(str(error)) from None
    except (ValueError, RecursionError):
        raise InvalidRequest("The body is not valid JSON.") from None
    if not isinstance(value, dict):
        raise InvalidRequest("The body must be a JSON object.")
    try:
        return msgspec.convert(value, struct)
    except _NOT_VALID:
        errors = _field_errors(value, struct)
    raise invalid_fields(*errors)


def invalid_fields(*errors: FieldError) -> InvalidRequest:
    """The error to raise for a body with these field errors."""
    return InvalidRequest("Correct the fields listed in errors.", errors[:ERRORS_MAX])


def _text(body: bytes) -> str:
    if body.startswith(codecs.BOM_UTF8):
        raise _Refused("The body begins with a byte order mark; remove it.")
    try:
        return body.decode("utf-8")
    except UnicodeDecodeError:
        raise _Refused("The body is not valid UTF-8.") from None


def _object(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    fields = dict(pairs)
    if len(fields) != len(pairs):
        raise _Refused("The body contains a field twice; send each field once.")
    return fields


def _constant(name: str) -> NoReturn:
    raise _Refused(f"{name} is not valid JSON.")


def _number(text: str) -> int | float:
    """A number with a decimal point or an exponent. 1500.0 and 1.5e3 are integers in JSON Schema
    (JSON Schema Core section 6.3) and in languages without an integer type. The text decides, since
    a float would round."""
    try:
        number = Decimal(text)
    except InvalidOperation:  # an exponent of 20 digits
        return math.inf
    if number.copy_abs() < _INTEGER_MAX and number == number.to_integral_value():
        return int(number)
    return float(text)


# The standard library's decoder, since only it reports duplicate names.
_decoder = json.JSONDecoder(
    object_pairs_hook=_object, parse_constant=_constant, parse_float=_number
)


def _field_errors(value: dict[str, Any], struct: type[msgspec.Struct]) -> list[FieldError]:
    errors = []
    fields = msgspec.structs.fields(struct)
    for field in fields:
        if field.encode_name in value:
            try:
                msgspec.convert(value[field.encode_name], field.type)
            except _NOT_VALID:
                errors.append(FieldError(field.encode_name, f"must be {_description(field.type)}"))
        elif field.required:
            message = f"is required: {_description(field.type)}"
            errors.append(FieldError(field.encode_name, message))
    known = {field.encode_name for field in fields}
    for name in sorted(value.keys() - known):
        shown = name[:64].encode("utf-8", "replace").decode()
        errors.append(FieldError(shown, "is not a field of this request; remove it"))
    return errors


def _description(annotation: Any) -> str:
    """The description in the field's annotation, which the API's schema has too."""
    if get_origin(annotation) is Annotated:
        for meta in get_args(annotation)[1:]:
            if isinstance(meta, msgspec.Meta) and meta.description:
                return meta.description
    return "a different value"
