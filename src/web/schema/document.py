"""The API's description as an OpenAPI 3.1 document, assembled from what is running.

Paths and methods are the application's own; bodies are described by the Structs that read and write
them; problems by the error classes; summaries are the first lines of the handlers' docstrings. The
rest is in operations/.
"""

import importlib.metadata
import inspect
from collections.abc import Iterator
from typing import Any, NamedTuple

import msgspec
from litestar import Litestar
from litestar.routes import HTTPRoute

from payments.errors import PaymentsError, TooBusy, Unauthorized
from web.problems import (
    MEDIA_TYPE,
    BodyTooLarge,
    BodyTooSlow,
    MethodNotAllowed,
    NotFound,
    Problem,
    Unreadable,
    UnsupportedMediaType,
)
from web.schema.description import Answer, Operation, Parameter
from web.schema.webhooks import BODIES, WEBHOOKS
from web.serving.guard import BODY_MAX, BODY_TIMEOUT_S
from web.serving.heads import HEAD_MAX, HEADERS_MAX

VERSION = importlib.metadata.version("payment-service")

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

# What can become of any request, whatever it is for.
_EVERYWHERE = (BodyTooSlow, BodyTooLarge, PaymentsError)

_NEVER_BUSY = ("/health", "/health/live")

_REQUEST_HEADERS = (
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

_HEADERS: dict[str, dict[str, Any]] = {
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


def document(app: Litestar) -> bytes:
    """The description of all routes of the application; ValueError if one has none."""
    types: list[Any] = [Problem, *BODIES]
    paths: dict[str, dict[str, Any]] = {}
    for endpoint in endpoints(app):
        operation = endpoint.operation
        types += [operation.body] if operation.body else []
        types += [answer.body for answer in operation.answers.values() if answer.body]
        paths.setdefault(endpoint.path, {})[endpoint.method] = _operation(endpoint)
    return msgspec.json.encode(
        {
            "openapi": "3.1.0",
            "info": {"title": "Payment Service", "version": VERSION, "description": DESCRIPTION},
            "servers": [{"url": "/"}],
            "tags": TAGS,
            "paths": paths,
            "webhooks": WEBHOOKS,
            "components": {
                "schemas": _schemas(types),
                "headers": _HEADERS,
                "responses": dict(_responses_without_endpoint()),
                "securitySchemes": {
                    "bearer": {
                        "type": "http",
                        "scheme": "bearer",
                        "description": "An API key, if the service is configured with some.",
                    }
                },
            },
        }
    )


class Endpoint(NamedTuple):
    path: str
    method: str  # in lower case
    summary: str
    operation: Operation


def endpoints(app: Litestar) -> Iterator[Endpoint]:
    """All but the framework's own OPTIONS handlers; ValueError if one has no description."""
    for route in sorted(app.routes, key=lambda route: route.path):
        assert isinstance(route, HTTPRoute)
        for handler in route.route_handlers:
            for method in sorted(handler.http_methods - {"OPTIONS"}):
                operation = handler.opt.get("operation")
                if operation is None:
                    raise ValueError(f"{method} {route.path_format} has no description")
                docstring = inspect.getdoc(handler.fn) or ""  # none with python -OO
                summary = docstring.partition("\n")[0].removesuffix(".")
                yield Endpoint(route.path_format, method.lower(), summary, operation)


def _operation(endpoint: Endpoint) -> dict[str, Any]:
    operation = endpoint.operation
    problems = operation.problems + _EVERYWHERE
    if endpoint.path not in _NEVER_BUSY and TooBusy not in problems:
        problems += (TooBusy,)
    responses = {
        str(status): _answer(answer) for status, answer in operation.answers.items()
    } | _problems(problems)
    found: dict[str, Any] = {
        "operationId": operation.id,
        "tags": [operation.tag],
        "summary": endpoint.summary,
        "description": operation.description,
        "parameters": [_parameter(each) for each in operation.parameters + _REQUEST_HEADERS],
        "responses": dict(sorted(responses.items())),
        # An API key is taken if some are configured.
        "security": [{}, {"bearer": []}] if Unauthorized in problems else [],
    }
    if operation.body:
        content = {"schema": _reference(operation.body)} | _examples(operation.body_examples)
        found["requestBody"] = {"required": True, "content": {"application/json": content}}
    return found


def _parameter(parameter: Parameter) -> dict[str, Any]:
    return {
        "name": parameter.name,
        "in": parameter.place,
        "description": parameter.description,
        "required": parameter.required,
        "schema": parameter.schema,
    } | _examples(parameter.examples)


def _examples(examples: dict[str, Any]) -> dict[str, Any]:
    if not examples:
        return {}
    return {"examples": {name: {"value": value} for name, value in examples.items()}}


def _answer(answer: Answer) -> dict[str, Any]:
    schema = _reference(answer.body) if answer.body else {"type": "string"}
    content = {answer.media_type: {"schema": schema, "example": answer.example}}
    found = {
        "description": answer.description,
        "headers": _headers(*answer.headers),
        "content": content,
    }
    return found | ({"links": answer.links} if answer.links else {})


def _problems(errors: tuple[type[PaymentsError], ...]) -> dict[str, Any]:
    """The answers for these errors, one for each status."""
    by_status: dict[int, list[type[PaymentsError]]] = {}
    for error in errors:
        by_status.setdefault(error.status, []).append(error)
    found = {}
    for status, kinds in by_status.items():
        headers = ["Retry-After"] if any(kind.retry_after_s is not None for kind in kinds) else []
        headers += ["WWW-Authenticate"] if Unauthorized in kinds else []
        headers += ["Accept", "Accept-Encoding"] if UnsupportedMediaType in kinds else []
        meanings = "\n".join(f"- `{kind.code}`: {kind.title}." for kind in kinds)
        titles = {kind.code: kind.title for kind in kinds}
        found[str(status)] = _problem(status, titles, meanings, *headers)
    return found


def _responses_without_endpoint() -> Iterator[tuple[str, Any]]:
    """What is answered before it is known which endpoint a request is for; no path refers to it."""
    yield _response(NotFound, str(NotFound()))
    yield _response(MethodNotAllowed, str(MethodNotAllowed()), "Allow")
    for kind in Unreadable.__subclasses__():
        yield _response(kind, f"{kind.title}; the connection ends.")


def _response(
    kind: type[PaymentsError], description: str, *headers: str
) -> tuple[str, dict[str, Any]]:
    return kind.code, _problem(kind.status, {kind.code: kind.title}, description, *headers)


def _problem(
    status: int, titles: dict[str, str], description: str, *headers: str
) -> dict[str, Any]:
    """An answer with one of these codes; each has its title, and an example of its name.

    The schema is the same for all: generators make a type of each that is not, and not many can
    narrow a text down to some.
    """
    detail = "What is wrong with this very request, and what to do about it."
    content = {"schema": _reference(Problem)} | _examples(
        {
            code: Problem(
                type=f"urn:payments:problem:{code}",
                title=title,
                status=status,
                detail=detail,
                code=code,
            )
            for code, title in titles.items()
        }
    )
    return {
        "description": description,
        "headers": _headers(*headers),
        "content": {MEDIA_TYPE: content},
    }


def _headers(*names: str) -> dict[str, Any]:
    return {name: {"$ref": f"#/components/headers/{name}"} for name in (*names, "X-Request-ID")}


_REFERENCE = "#/components/schemas/{name}"


def _reference(type: type[msgspec.Struct]) -> dict[str, str]:
    return {"$ref": _REFERENCE.format(name=type.__name__)}


def _schemas(types: list[Any]) -> dict[str, Any]:
    """The JSON Schemas of these types, and of those that they are made of."""
    _, schemas = msgspec.json.schema_components(types, ref_template=_REFERENCE)
    for schema in schemas.values():
        # What is left out of a request is said in words, and an answer may leave it out: generators
        # take a field with a default for one that is always there.
        for field in schema.get("properties", {}).values():
            field.pop("default", None)
        if "description" in schema:
            schema["description"] = inspect.cleandoc(schema["description"])
        if "enum" in schema:
            schema["type"] = "string"
    return dict(sorted(schemas.items()))
