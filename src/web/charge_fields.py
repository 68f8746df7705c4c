"""What a charge's fields must be beyond their types: rules that a schema cannot say.

None of the messages repeats a value: it may be a card number.
"""

import re
from datetime import datetime

from payments.errors import FieldError
from payments.times import read_time
from web.bodies import invalid_fields
from web.requests import TIME_TEXT

_CARD_NUMBER = re.compile(r"[0-9]{13,19}")
_DOT = re.compile(r"%2e", re.IGNORECASE)


def check_payment_method(payment_method: str | None) -> None:
    """Raises InvalidRequest for what looks like a card number: it would make this service, its logs
    and its backups subject to the rules for card data (PCI DSS)."""
    if payment_method is not None and is_card_number(payment_method):
        raise invalid_fields(
            FieldError(
                "payment_method",
                "looks like a card number: send the token that the provider made of the card, "
                "never the number itself",
            )
        )


def is_card_number(text: str) -> bool:
    """13 to 19 digits, blanks and dashes aside, with the check digit of ISO/IEC 7812 (Luhn)."""
    digits = text.replace(" ", "").replace("-", "")
    if not _CARD_NUMBER.fullmatch(digits):
        return False
    doubled = (sum(divmod(2 * int(digit), 10)) for digit in digits[-2::-2])
    return (sum(doubled) + sum(map(int, digits[-1::-2]))) % 10 == 0


def check_return_url(return_url: str | None, prefixes: tuple[str, ...]) -> None:
    """Raises InvalidRequest for one that begins with none of the prefixes, also once a browser has
    resolved `..`: the provider sends the customer there."""
    if return_url is None:
        return
    if not prefixes:
        message = "is not accepted: the service has no RETURN_URL_PREFIXES; leave it out"
        raise invalid_fields(FieldError("return_url", message))
    if not return_url.startswith(prefixes) or _has_dot_segment(return_url):
        message = f"must begin with {' or '.join(prefixes)}, without a segment . or .. in its path"
        raise invalid_fields(FieldError("return_url", message))


def _has_dot_segment(url: str) -> bool:
    """As browsers read the path: %2e is a dot there, and a backslash a slash."""
    path = _DOT.sub(".", re.split(r"[?#]", url, maxsplit=1)[0])
    return any(segment in (".", "..") for segment in re.split(r"[/\\]", path))


def read_hold_until(hold_until: str | None) -> datetime | None:
    if hold_until is None:
        return None
    try:
        return read_time(hold_until)
    except ValueError:  # a 31 February
        raise invalid_fields(FieldError("hold_until", f"must be {TIME_TEXT}")) from None
