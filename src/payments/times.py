"""Times as text: RFC 3339, parsed alike by the API and the command line."""

import re
from datetime import UTC, datetime

# Any number of fractional digits: Go and Java write nine.
TIME_PATTERN = (
    r"^(?!0000)[0-9]{4}-(0[1-9]|1[0-2])-(0[1-9]|[12][0-9]|3[01])"
    r"[Tt]([01][0-9]|2[0-3]):[0-5][0-9]:[0-5][0-9](\.[0-9]+)?"
    r"([Zz]|[+-]([01][0-9]|2[0-3]):[0-5][0-9])$"
)
_TIME = re.compile(TIME_PATTERN[1:-1])


def read_time(text: str) -> datetime:
    """The time in UTC, cut to microseconds, the precision of Postgres. Raises ValueError."""
    if not _TIME.fullmatch(text):
        raise ValueError(text)
    try:
        return datetime.fromisoformat(text.upper()).astimezone(UTC)
    except OverflowError:  # before the year 1, or after 9999
        raise ValueError(text) from None
