"""Builds the OpenAPI 3.1 document from the running application.

Paths and methods come from the application, bodies from their Structs, problems from the error
classes, summaries from the first lines of the handlers' docstrings. The rest is in operations/.
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
    UnreadableRequest,
    UnsupportedMediaType,
)
from web.schema.common import DESCRIPTION, HEADERS, REQUEST_HEADERS, TAGS
from web.schema.description import Answer, Operation, Parameter
from web.schema.webhooks import BODIES, WEBHOOKS

VERSION = importlib.metadata.version("payment-service")

# Problems that any request can have.
_EVERYWHERE = (BodyTooSlow, BodyTooLarge, PaymentsError)

_NEVER_BUSY = ("/health", "/health/live")


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
                "headers": HEADERS,
                "responses": dict(_responses_without_endpoint()),
                "securitySchemes": {
                    "bearer": {
                        "type": "http",
                        "scheme": "bearer",
                        "description": "An API key; required if API keys are configured.",
                    }
                },
            },
        }
    )


class DescribedRoute(NamedTuple):
    path: str
    method: str  # in lower case
    summary: str
    operation: Operation


def endpoints(app: Litestar) -> Iterator[DescribedRoute]:
    """All endpoints except the framework's OPTIONS handlers; ValueError if one is not described."""
    for route in sorted(app.routes, key=lambda route: route.path):
        assert isinstance(route, HTTPRoute)
        for handler in route.route_handlers:
            for method in sorted(handler.http_methods - {"OPTIONS"}):
                operation = handler.opt.get("operation")
                if operation is None:
                    raise ValueError(f"{method} {route.path_format} has no description")
                docstring = inspect.getdoc(handler.fn) or ""  # none with python -OO
                summary = docstring.partition("\n")[0].removesuffix(".")
                yield DescribedRoute(route.path_format, method.lower(), summary, operation)


def _operation(endpoint: DescribedRoute) -> dict[str, Any]:
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
        "parameters": [_parameter(each) for each in operation.parameters + REQUEST_HEADERS],
        "responses": dict(sorted(responses.items())),
        # An API key is needed only if keys are configured.
        "security": [{}, {"bearer": []}] if Unauthorized in problems else [],
    }
    if operation.body:
        content = {"schema": _reference(operation.body)} | _examples(operation.body_examples)
        found["requestBody"] = {"required": True, "content": {"application/json": content}}
    elif operation.is_raw:
        content = {"schema": {}} | _examples(operation.body_examples)
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
    """The responses for these errors, one for each status."""
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
    """Responses that are sent before the endpoint of a request is known; no path refers to them."""
    yield _response(NotFound, str(NotFound()))
    yield _response(MethodNotAllowed, str(MethodNotAllowed()), "Allow")
    for kind in UnreadableRequest.__subclasses__():
        yield _response(kind, f"{kind.title}; the server closes the connection.")


def _response(
    kind: type[PaymentsError], description: str, *headers: str
) -> tuple[str, dict[str, Any]]:
    return kind.code, _problem(kind.status, {kind.code: kind.title}, description, *headers)


def _problem(
    status: int, titles: dict[str, str], description: str, *headers: str
) -> dict[str, Any]:
    """A response with one of these codes; each code has its title, and an example of its name.

    All share one schema: client generators make a type of each different one, and few support a
    string that is limited to some values.
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
        # No defaults: client generators take a field with a default for one that is always present.
        for field in schema.get("properties", {}).values():
            field.pop("default", None)
        if "description" in schema:
            schema["description"] = inspect.cleandoc(schema["description"])
        if "enum" in schema:
            schema["type"] = "string"
    return dict(sorted(schemas.items()))
