"""Errors as application/problem+json (RFC 9457).

`type` is urn:payments:problem:CODE, `code` is stable, `detail` names the fix, and `errors` lists
the fields of a body that are wrong. No SQL, stack or secret gets into one: only PaymentsError
carries words to the outside. What is wrong with a request as HTTP is here; all else that is refused
is in payments/errors.py.
"""

from http import HTTPStatus
from typing import Any

import msgspec
from litestar import Request, Response
from litestar.exceptions import HTTPException
from loguru import logger

from payments.errors import InvalidRequest, PaymentsError

MEDIA_TYPE = "application/problem+json"

Refusal = tuple[int, str]  # status and code

# What the protocol refuses before there is a request, each with a detail of its own.
MALFORMED_REQUEST: Refusal = (400, "malformed_request")
TARGET_TOO_LONG: Refusal = (414, "target_too_long")
HEAD_TOO_LARGE: Refusal = (431, "head_too_large")
NOT_IMPLEMENTED: Refusal = (501, "not_implemented")
VERSION_NOT_SUPPORTED: Refusal = (505, "version_not_supported")
PROTOCOL_PROBLEMS = (
    MALFORMED_REQUEST,
    TARGET_TOO_LONG,
    HEAD_TOO_LARGE,
    NOT_IMPLEMENTED,
    VERSION_NOT_SUPPORTED,
)

# What the framework itself refuses: status -> (code, detail).
FRAMEWORK_PROBLEMS = {
    404: ("not_found", "There is nothing at this path. GET /schema lists the endpoints."),
    405: ("method_not_allowed", "This path does not take this method; see the Allow header."),
}


class BodyTooLarge(PaymentsError):
    status = 413
    code = "body_too_large"
    title = "The body is too large"


class BodyTooSlow(PaymentsError):
    status = 408
    code = "body_too_slow"
    title = "The body did not arrive in time"


class UnsupportedMediaType(PaymentsError):
    status = 415
    code = "unsupported_media_type"
    title = "The body's media type or encoding is not supported"


class FieldProblem(msgspec.Struct, frozen=True, kw_only=True):
    field: str
    message: str


class Problem(msgspec.Struct, frozen=True, omit_defaults=True, kw_only=True):
    """An error (RFC 9457). `code` is stable; `errors` lists the fields or parameters at fault."""

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
    """The body of a problem answer."""
    fields = [FieldProblem(field=field, message=message) for field, message in errors]
    uri = f"urn:payments:problem:{code}"
    return msgspec.json.encode(
        Problem(type=uri, title=title, status=status, detail=detail, code=code, errors=fields)
    )


def refused(error: PaymentsError) -> tuple[int, bytes, dict[str, str]]:
    """Status, body and headers for an error of ours."""
    headers = {}
    if error.retry_after_s is not None:
        headers["Retry-After"] = str(error.retry_after_s)
    if error.status == 401:
        headers["WWW-Authenticate"] = 'Bearer realm="payments"'
    if error.status == 415:  # RFC 9110 section 15.5.16
        headers |= {"Accept": "application/json", "Accept-Encoding": "identity"}
    body = problem(error.status, error.code, error.title, str(error), error.errors)
    return error.status, body, headers


def on_payments_error(request: Request[Any, Any, Any], error: PaymentsError) -> Response[bytes]:
    status, body, headers = refused(error)
    request.scope["state"]["problem"] = error.code
    return Response(body, status_code=status, headers=headers, media_type=MEDIA_TYPE)


def on_http_exception(request: Request[Any, Any, Any], error: HTTPException) -> Response[bytes]:
    """Refusals of the framework; their own texts are not ours to promise."""
    status = error.status_code
    if status >= 500:
        return on_exception(request, error)
    title = HTTPStatus(status).phrase
    code, detail = FRAMEWORK_PROBLEMS.get(status, (InvalidRequest.code, InvalidRequest.title))
    headers = dict(error.headers or {})
    request.scope["state"]["problem"] = code
    return Response(
        problem(status, code, title, detail),
        status_code=status,
        headers=headers,
        media_type=MEDIA_TYPE,
    )


def on_exception(request: Request[Any, Any, Any], error: Exception) -> Response[bytes]:
    """A bug: logged with its request id, which the answer names too."""
    request_id = request.scope["state"].get("request_id", "")
    request.scope["state"]["problem"] = PaymentsError.code
    logger.bind(method=request.method).opt(exception=error).error("unhandled error")
    detail = f"It was logged as request {request_id}."
    body = problem(500, PaymentsError.code, PaymentsError.title, detail)
    return Response(body, status_code=500, media_type=MEDIA_TYPE)
