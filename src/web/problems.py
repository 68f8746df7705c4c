"""Errors as application/problem+json (RFC 9457).

`type` is urn:payments:problem:CODE, `code` is stable, `detail` names the fix, and `errors` lists
the wrong fields. Problems contain no SQL, stack trace or secret: only the text of a PaymentsError
is sent. Errors of HTTP are here, all others in payments/errors.py.

PaymentsError
├── NotFound                     404  not_found
├── MethodNotAllowed             405  method_not_allowed
├── BodyTooSlow                  408  body_too_slow
├── BodyTooLarge                 413  body_too_large
├── UnsupportedMediaType         415  unsupported_media_type
└── UnreadableRequest
    ├── MalformedRequest         400  malformed_request
    ├── TargetTooLong            414  target_too_long
    ├── HeadTooLarge             431  head_too_large
    ├── Unimplemented            501  not_implemented
    └── VersionNotSupported      505  version_not_supported
"""

from typing import Any

import msgspec

from payments.errors import PaymentsError

MEDIA_TYPE = "application/problem+json"


class NotFound(PaymentsError):
    status = 404
    code = "not_found"
    title = "Not Found"

    def __init__(self) -> None:
        super().__init__("This path does not exist. GET /schema lists the endpoints.")


class MethodNotAllowed(PaymentsError):
    status = 405
    code = "method_not_allowed"
    title = "Method Not Allowed"

    def __init__(self) -> None:
        super().__init__(
            "This path does not support this method; the Allow header lists those it does."
        )


class BodyTooSlow(PaymentsError):
    status = 408
    code = "body_too_slow"
    title = "The body did not arrive in time"


class BodyTooLarge(PaymentsError):
    status = 413
    code = "body_too_large"
    title = "The body is too large"


class UnsupportedMediaType(PaymentsError):
    status = 415
    code = "unsupported_media_type"
    title = "The body's media type or encoding is not supported"


class UnreadableRequest(PaymentsError):
    """The protocol cannot read a request; the connection is closed."""

    title = "The request cannot be read"


class MalformedRequest(UnreadableRequest):
    status = 400
    code = "malformed_request"


class TargetTooLong(UnreadableRequest):
    status = 414
    code = "target_too_long"


class HeadTooLarge(UnreadableRequest):
    status = 431
    code = "head_too_large"


class Unimplemented(UnreadableRequest):
    status = 501
    code = "not_implemented"


class VersionNotSupported(UnreadableRequest):
    status = 505
    code = "version_not_supported"


class FieldProblem(msgspec.Struct, frozen=True, kw_only=True):
    field: str
    message: str


class Problem(msgspec.Struct, frozen=True, omit_defaults=True, kw_only=True):
    """An error (RFC 9457). `code` is stable; `errors` lists the invalid fields or parameters."""

    type: str
    title: str
    status: int
    detail: str
    code: str
    errors: list[FieldProblem] = []


def problem(
    status: int,
    code: str,
    title: str,
    detail: str,
    errors: tuple[Any, ...] = (),
) -> bytes:
    """The body of a problem response."""
    fields = [FieldProblem(field=field, message=message) for field, message in errors]
    uri = f"urn:payments:problem:{code}"
    return msgspec.json.encode(
        Problem(type=uri, title=title, status=status, detail=detail, code=code, errors=fields)
    )


def refused(error: PaymentsError) -> tuple[int, bytes, dict[str, str]]:
    """Status, body and headers of the response to this error."""
    headers = {}
    if error.retry_after_s is not None:
        headers["Retry-After"] = str(error.retry_after_s)
    if error.status == 401:
        headers["WWW-Authenticate"] = 'Bearer realm="payments"'
    if error.status == 415:  # RFC 9110 section 15.5.16
        headers |= {"Accept": "application/json", "Accept-Encoding": "identity"}
    body = problem(error.status, error.code, error.title, str(error), error.errors)
    return error.status, body, headers
