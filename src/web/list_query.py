"""Query parameters: strict, and with every one's error at once."""

import re
from collections.abc import Callable, Mapping
from datetime import UTC, datetime
from typing import Any, NamedTuple, NoReturn
from urllib.parse import unquote_plus

from payments.errors import FieldError, InvalidRequest
from payments.money import DECIMALS
from payments.payment.state import Status
from payments.queries.cursor import read_cursor
from payments.queries.payments import LIMIT_DEFAULT, LIMIT_MAX, Moment, PaymentFilter
from payments.times import TIME_PATTERN, read_time
from web.bodies import ERRORS_MAX
from web.requests import UUID_SCHEMA, read_uuid
from web.schema.description import Parameter

# name -> how it is read, what it must be, and the same as JSON Schema; of a schema that a body has
# as well, generators of clients make one type.
Readers = Mapping[str, tuple[Callable[[str], Any], str, dict[str, Any]]]


POSITION_MAX = 2**63 - 1


class ListQuery(NamedTuple):
    filter: PaymentFilter
    limit: int
    cursor: str | None


def read_list_query(query_string: bytes) -> ListQuery:
    """InvalidRequest names every parameter that is wrong and how to mend it."""
    found = read_parameters(query_string, _READERS)
    if found.get("created_until", _LAST) < found.get("created_from", _FIRST):
        _refuse([FieldError("created_until", "must not be before created_from")])
    limit, cursor = found.pop("limit", LIMIT_DEFAULT), found.pop("cursor", None)
    return ListQuery(PaymentFilter(**found), limit, cursor)


def read_parameters(query_string: bytes, readers: Readers) -> dict[str, Any]:
    """The values of those that were sent; InvalidRequest as above."""
    found: dict[str, Any] = {}
    errors: list[FieldError] = []
    for name, values in _parameters(query_string).items():
        if name not in readers:
            errors.append(FieldError(name[:64], "is not a parameter of this request; leave it out"))
        elif len(values) > 1:
            errors.append(FieldError(name, f"was sent {len(values)} times; send it once"))
        else:
            read, description, _ = readers[name]
            try:
                found[name] = read(values[0])
            except ValueError:
                errors.append(FieldError(name, f"must be {description}{_hint(name, values[0])}"))
    if errors:
        _refuse(errors)
    return found


def read_as_of(query_string: bytes) -> Moment | None:
    """As of when a payment is asked for, None for now; InvalidRequest as above."""
    return read_parameters(query_string, _AS_OF).get("as_of")


def _refuse(errors: list[FieldError]) -> NoReturn:
    raise InvalidRequest("Mend the query parameters listed in errors.", tuple(errors[:ERRORS_MAX]))


def _parameters(query_string: bytes) -> dict[str, list[str]]:
    """Names and values as a form sends them: percent-encoded UTF-8, + for a space.

    What is not UTF-8 becomes replacement characters, which no parameter takes.
    """
    parameters: dict[str, list[str]] = {}
    for part in query_string.decode("utf-8", "replace").split("&"):
        if part:
            name, _, value = part.partition("=")
            parameters.setdefault(unquote_plus(name), []).append(unquote_plus(value))
    return parameters


def _currency(text: str) -> str:
    if text not in DECIMALS:
        raise ValueError(text)
    return text


def _limit(text: str) -> int:
    if not re.fullmatch("[0-9]{1,3}", text) or not 1 <= int(text) <= LIMIT_MAX:
        raise ValueError(text)
    return int(text)


def _moment(text: str) -> Moment:
    if not re.fullmatch("[0-9]{1,19}", text):
        return read_time(text)
    position = int(text)
    if not 1 <= position <= POSITION_MAX:
        raise ValueError(text)
    return position


LIMIT = (
    _limit,
    f"a whole number from 1 to {LIMIT_MAX}",
    {"type": "integer", "minimum": 1, "maximum": LIMIT_MAX, "default": LIMIT_DEFAULT},
)


def cursor_of(name: str) -> tuple[Callable[[str], str], str, dict[str, Any]]:
    """How the cursor of the list of this name is read."""

    def read(text: str) -> str:
        try:
            read_cursor(text, name)
        except InvalidRequest as error:
            raise ValueError(text) from error
        return text

    schema = {"type": "string", "pattern": "^[A-Za-z0-9_-]{38}$"}
    return read, "the next_cursor of an earlier answer, unchanged", schema


def _hint(name: str, value: str) -> str:
    return _lost_plus(value) if name in ("created_from", "created_until", "as_of") else ""


def _lost_plus(value: str) -> str:
    """The usual mistake with a time: a + that stands for itself must be written as %2B."""
    try:
        read_time(value.replace(" ", "+"))
    except ValueError:
        return ""
    return ". A + in a query stands for a space: write it as %2B, or use Z"


_FIRST = datetime.min.replace(tzinfo=UTC)
_LAST = datetime.max.replace(tzinfo=UTC)
TIME_TEXT = "a time with its offset from UTC (RFC 3339), like 2026-01-31T18:30:00Z"
_TIME_SCHEMA = {"type": "string", "format": "date-time", "pattern": TIME_PATTERN}
ORDER = (read_uuid, "the order's UUID, like f50d9fa2-5d3e-4e49-9a02-218ad32ef4a9", UUID_SCHEMA)
_READERS: Readers = {
    "merchant_order_id": ORDER,
    "status": (Status, f"one of {', '.join(Status)}", {"$ref": "#/components/schemas/Status"}),
    "currency": (
        _currency,
        "an ISO 4217 code in upper case, like INR",
        {"$ref": "#/components/schemas/Currency"},
    ),
    "created_from": (read_time, TIME_TEXT, _TIME_SCHEMA),
    "created_until": (read_time, TIME_TEXT, _TIME_SCHEMA),
    "limit": LIMIT,
    "cursor": cursor_of(""),
}
_EXAMPLES: dict[str, dict[str, Any]] = {
    "limit": {"list": 20},
    "created_from": {"list": "2026-01-31T18:30:00Z"},
}
_NOTES = {
    "created_from": "; included",
    "created_until": "; excluded, and not before created_from",
}
PARAMETERS = tuple(
    Parameter(
        name=name,
        place="query",
        description=description + _NOTES.get(name, ""),
        schema=schema,
        examples=_EXAMPLES.get(name, {}),
    )
    for name, (_, description, schema) in _READERS.items()
)
_AS_OF: Readers = {
    "as_of": (
        _moment,
        f"{TIME_TEXT}, or a position of the log, from 1",
        {
            "oneOf": [
                _TIME_SCHEMA,
                {"type": "integer", "minimum": 1, "maximum": POSITION_MAX},
            ]
        },
    )
}
AS_OF = Parameter(
    name="as_of",
    place="query",
    description=f"{TIME_TEXT}, or a position of the log: the payment as it was after everything "
    "that was recorded by then. Without it, or later than now: as of now.",
    schema=_AS_OF["as_of"][2],
)
