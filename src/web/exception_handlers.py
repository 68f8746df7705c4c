"""Responses when a handler raises, or when the framework has no handler for a request."""

from http import HTTPStatus

from litestar import Response
from litestar.exceptions import HTTPException
from loguru import logger

from payments.errors import InvalidRequest, PaymentsError
from web.problems import MEDIA_TYPE, MethodNotAllowed, NotFound, problem, refused
from web.requests import AnyRequest

_BY_STATUS = {error.status: error for error in (NotFound(), MethodNotAllowed())}


def on_payments_error(request: AnyRequest, error: PaymentsError) -> Response[bytes]:
    status, body, headers = refused(error)
    request.scope["state"]["problem"] = error.code
    return Response(body, status_code=status, headers=headers, media_type=MEDIA_TYPE)


def on_http_exception(request: AnyRequest, error: HTTPException) -> Response[bytes]:
    """For errors of the framework. Its texts are replaced, since they are not part of our API."""
    status = error.status_code
    if status >= 500:
        return on_exception(request, error)
    known = _BY_STATUS.get(status)
    if known is not None:
        body, code = refused(known)[1], known.code
    else:
        code, phrase = InvalidRequest.code, HTTPStatus(status).phrase
        body = problem(status, code, phrase, InvalidRequest.title)
    request.scope["state"]["problem"] = code
    headers = dict(error.headers or {})  # Allow
    return Response(body, status_code=status, headers=headers, media_type=MEDIA_TYPE)


def on_exception(request: AnyRequest, error: Exception) -> Response[bytes]:
    """For a bug: logged with its request id, which the response names too."""
    request_id = request.scope["state"].get("request_id", "")
    request.scope["state"]["problem"] = PaymentsError.code
    logger.bind(method=request.method).opt(exception=error).error("unhandled error")
    detail = f"The error is logged with the request id {request_id}."
    body = problem(500, PaymentsError.code, PaymentsError.title, detail)
    return Response(body, status_code=500, media_type=MEDIA_TYPE)
