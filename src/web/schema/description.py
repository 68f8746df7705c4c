"""The description of an operation, beyond what its code states. The handler keeps it in its `opt`;
document.py builds the OpenAPI document from it."""

from collections.abc import Mapping
from typing import Any, Literal

import msgspec

from payments.errors import PaymentsError
from web.list_query import Readers


class Parameter(msgspec.Struct, frozen=True, kw_only=True):
    """A parameter in header, path or query; `schema` is its JSON Schema.

    `examples` are of working requests, by name: the same name in several places is one request.
    """

    name: str
    place: Literal["header", "path", "query"]
    description: str
    schema: dict[str, Any]
    required: bool = False
    examples: dict[str, Any] = {}


class Answer(msgspec.Struct, frozen=True, kw_only=True):
    """A response other than a problem; `headers` are names in common.HEADERS.

    `body` is the Struct that is encoded, None for text. `links` names the possible next requests.
    """

    description: str
    body: type[msgspec.Struct] | None
    example: Any
    media_type: str = "application/json"
    headers: tuple[str, ...] = ()
    links: dict[str, Any] = {}


class Operation(msgspec.Struct, frozen=True, kw_only=True):
    """One method of one path. `body` is the Struct of its JSON body; `is_raw`: it has another one,
    which is signed as it is. Its summary is the first line of its handler's docstring.

    `problems` omits those that every endpoint has. With Unauthorized among them the endpoint needs
    an API key.
    """

    id: str
    tag: str
    description: str
    answers: dict[int, Answer]
    parameters: tuple[Parameter, ...] = ()
    body: type[msgspec.Struct] | None = None
    body_examples: dict[str, Any] = {}
    is_raw: bool = False
    problems: tuple[type[PaymentsError], ...] = ()


def described(operation: Operation) -> dict[str, Any]:
    """The `opt` of the operation's handler."""
    return {"operation": operation}


def query_parameters(
    readers: Readers,
    *,
    notes: Mapping[str, str] = {},
    examples: Mapping[str, dict[str, Any]] = {},
) -> tuple[Parameter, ...]:
    """The parameters of `readers`. A note is appended to its parameter's description, by name."""
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
