"""What OpenAPI says of an operation beyond what is running: its handler holds it in its `opt`, and
document.py assembles the API's document from it."""

from collections.abc import Mapping
from typing import Any, Literal

import msgspec

from payments.errors import PaymentsError
from web.list_query import Readers


class Parameter(msgspec.Struct, frozen=True, kw_only=True):
    """A header, a part of the path or of the query; `schema` is its JSON Schema.

    `examples` are requests that work, by name: the same name in several places is one request.
    """

    name: str
    place: Literal["header", "path", "query"]
    description: str
    schema: dict[str, Any]
    required: bool = False
    examples: dict[str, Any] = {}


class Answer(msgspec.Struct, frozen=True, kw_only=True):
    """An answer other than a problem; `headers` are names in common.HEADERS.

    `body` is the Struct that is encoded, None for text. `links` says what can be asked next.
    """

    description: str
    body: type[msgspec.Struct] | None
    example: Any
    media_type: str = "application/json"
    headers: tuple[str, ...] = ()
    links: dict[str, Any] = {}


class Operation(msgspec.Struct, frozen=True, kw_only=True):
    """One method of one path. `body` is the Struct that its JSON is read into. Its summary is the
    first line of its handler's docstring.

    `problems` leaves out those that every endpoint has; with Unauthorized among them the endpoint
    takes an API key.
    """

    id: str
    tag: str
    description: str
    answers: dict[int, Answer]
    parameters: tuple[Parameter, ...] = ()
    body: type[msgspec.Struct] | None = None
    body_examples: dict[str, Any] = {}
    problems: tuple[type[PaymentsError], ...] = ()


def described(operation: Operation) -> dict[str, Any]:
    """The `opt` of its handler."""
    return {"operation": operation}


def query_parameters(
    readers: Readers,
    *,
    notes: Mapping[str, str] = {},
    examples: Mapping[str, dict[str, Any]] = {},
) -> tuple[Parameter, ...]:
    """Those that `readers` read; the notes follow their descriptions. Both by name."""
    return tuple(
        Parameter(
            name=name,
            place="query",
            description=description + notes.get(name, ""),
            schema=schema,
            examples=examples.get(name, {}),
        )
        for name, (_, description, schema) in readers.items()
    )
