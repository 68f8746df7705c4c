"""Reads query parameters: strictly, and reports the errors of all parameters at once."""

import re
from collections.abc import Callable, Mapping
from datetime import UTC, datetime
from typing import Any, NamedTuple, NoReturn, get_args
from urllib.parse import unquote_plus

from payments.errors import FieldError, InvalidRequest
from payments.money import DECIMALS
from payments.payment.state import Status
from payments.queries import fulfilments
from payments.queries.cursor import read_cursor
from payments.queries.payments import LIMIT_DEFAULT, LIMIT_MAX, Moment, PaymentFilter
from payments.times import TIME_PATTERN, read_time
from web.requests import ERRORS_MAX, TIME_TEXT, UUID_SCHEMA, read_uuid

# name -> its reader, what it must be as text, and as JSON Schema. A schema that a body uses too
# becomes one type in generated clients.
Readers = Mapping[str, tuple[Callable[[str], Any], str, dict[str, Any]]]

_POSITION_MAX = 2**63 - 1


class ListQuery(NamedTuple):
    filter: PaymentFilter
    limit: int
    cursor: str | None


def read_list_query(query_string: bytes) -> ListQuery:
    """The parameters of GET /v1/payments; raises InvalidRequest."""
    found = read_query(query_string, LIST_READERS)
    if found.get("created_until", _LAST) < found.get("created_from", _FIRST):
        _refuse([FieldError("created_until", "must not be before created_from")])
    limit, cursor = found.pop("limit", LIMIT_DEFAULT), found.pop("cursor", None)
    return ListQuery(PaymentFilter(**found), limit, cursor)


def read_query(query_string: bytes, readers: Readers) -> dict[str, Any]:
    """The values of the parameters that were sent. InvalidRequest names every wrong parameter and
    how to correct it."""
    found: dict[str, Any] = {}
    errors: list[FieldError] = []
    for name, values in _parameters(query_string).items():
        if name not in readers:
            errors.append(FieldError(name[:64], "is not a parameter of this request; remove it"))
        elif len(values) > 1:
            errors.append(FieldError(name, f"is present {len(values)} times; send it once"))
        else:
            read, description, _ = readers[name]
            try:
                found[name] = read(values[0])
            except ValueError:
                errors.append(FieldError(name, f"must be {description}{_hint(name, values[0])}"))
    if errors:
        _refuse(errors)
    return found


def _refuse(errors: list[FieldError]) -> NoReturn:
    raise InvalidRequest(
        "Correct the query parameters listed in errors.", tuple(errors[:ERRORS_MAX])
    )


def _parameters(query_string: bytes) -> dict[str, list[str]]:
    """Names and values, decoded as from a form: percent-encoded UTF-8, + for a space.

    Bytes that are not UTF-8 become replacement characters, which no parameter accepts.
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


def _state(text: str) -> fulfilments.State:
    for state in _STATES:
        if state == text:
            return state
    raise ValueError(text)


def _limit(text: str) -> int:
    if not re.fullmatch("[0-9]{1,3}", text) or not 1 <= int(text) <= LIMIT_MAX:
        raise ValueError(text)
    return int(text)


def _moment(text: str) -> Moment:
    if not re.fullmatch("[0-9]{1,19}", text):
        return read_time(text)
    position = int(text)
    if not 1 <= position <= _POSITION_MAX:
        raise ValueError(text)
    return position


_LIMIT = (
    _limit,
    f"a whole number from 1 to {LIMIT_MAX}",
    {"type": "integer", "minimum": 1, "maximum": LIMIT_MAX, "default": LIMIT_DEFAULT},
)


def _cursor_of(name: str) -> tuple[Callable[[str], str], str, dict[str, Any]]:
    """The reader of the cursor of this list, for Readers."""

    def read(text: str) -> str:
        try:
            read_cursor(text, name)
        except InvalidRequest as error:
            raise ValueError(text) from error
        return text

    schema = {"type": "string", "pattern": "^[A-Za-z0-9_-]{38}$"}
    return read, "the next_cursor of an earlier response, unchanged", schema


def _hint(name: str, value: str) -> str:
    return _lost_plus(value) if name in ("created_from", "created_until", "as_of") else ""


def _lost_plus(value: str) -> str:
    """A hint for the usual mistake in a time: a literal + must be written as %2B."""
    try:
        read_time(value.replace(" ", "+"))
    except ValueError:
        return ""
    return ". A + in a query means a space: encode it as %2B, or use Z"


_STATES: tuple[fulfilments.State, ...] = get_args(fulfilments.State)
_FIRST = datetime.min.replace(tzinfo=UTC)
_LAST = datetime.max.replace(tzinfo=UTC)
_TIME_SCHEMA = {"type": "string", "format": "date-time", "pattern": TIME_PATTERN}
_ORDER = (read_uuid, "the order's UUID, like f50d9fa2-5d3e-4e49-9a02-218ad32ef4a9", UUID_SCHEMA)
LIST_READERS: Readers = {
    "merchant_order_id": _ORDER,
    "status": (Status, f"one of {', '.join(Status)}", {"$ref": "#/components/schemas/Status"}),
    "currency": (
        _currency,
        "an ISO 4217 code in upper case, like INR",
        {"$ref": "#/components/schemas/Currency"},
    ),
    "created_from": (read_time, TIME_TEXT, _TIME_SCHEMA),
    "created_until": (read_time, TIME_TEXT, _TIME_SCHEMA),
    "limit": _LIMIT,
    "cursor": _cursor_of(""),
}
AS_OF_READERS: Readers = {
    "as_of": (
        _moment,
        f"{TIME_TEXT}, or a position of the log, from 1",
        {
            "oneOf": [
                _TIME_SCHEMA,
                {"type": "integer", "minimum": 1, "maximum": _POSITION_MAX},
            ]
        },
    )
}
UNFULFILLED_READERS: Readers = {
    "state": (
        _state,
        f"one of {', '.join(_STATES)}",
        {"type": "string", "enum": list(_STATES)},
    ),
    "merchant_order_id": _ORDER,
    "limit": _LIMIT,
    "cursor": _cursor_of(fulfilments.LIST),
}
