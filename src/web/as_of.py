"""The query parameter of GET /v1/payments/{payment_id}: as of when."""

import re

from payments.errors import FieldError, InvalidRequest
from payments.queries.as_of import Moment
from payments.times import TIME_PATTERN, read_time
from web.bodies import ERRORS_MAX
from web.list_query import TIME_TEXT, lost_plus, parameters
from web.schema.description import Parameter

POSITION_MAX = 2**63 - 1

AS_OF = Parameter(
    name="as_of",
    place="query",
    description=f"{TIME_TEXT}, or a position of the log: the payment as it was after everything "
    "that was recorded by then. Without it, or later than now: as of now.",
    schema={
        "oneOf": [
            {"type": "string", "format": "date-time", "pattern": TIME_PATTERN},
            {"type": "integer", "minimum": 1, "maximum": POSITION_MAX},
        ]
    },
)


def read_as_of(query_string: bytes) -> Moment | None:
    """None without the parameter. InvalidRequest names what is wrong and how to mend it."""
    moment: Moment | None = None
    errors: list[FieldError] = []
    for name, values in parameters(query_string).items():
        if name != "as_of":
            errors.append(FieldError(name[:64], "is not a parameter of this request; leave it out"))
        elif len(values) > 1:
            errors.append(FieldError(name, f"was sent {len(values)} times; send it once"))
        else:
            try:
                moment = _moment(values[0])
            except ValueError:
                text = f"must be {TIME_TEXT}, or a position of the log, from 1"
                errors.append(FieldError(name, text + lost_plus(values[0])))
    if errors:
        raise InvalidRequest(
            "Mend the query parameters listed in errors.", tuple(errors[:ERRORS_MAX])
        )
    return moment


def _moment(text: str) -> Moment:
    if not re.fullmatch("[0-9]{1,19}", text):
        return read_time(text)
    position = int(text)
    if not 1 <= position <= POSITION_MAX:
        raise ValueError(text)
    return position
