"""Forms as Stripe reads them: metadata[payment_id], payment_method_types[]."""

import re
from collections.abc import Mapping, Sequence
from typing import Any

_PARTS = re.compile(r"^([^\[\]]+)|\[([^\[\]]*)\]")


def nested(form: Mapping[str, Sequence[str]]) -> dict[str, Any]:
    """Of parse_qs's result: mappings and lists instead of brackets; all values are texts. Brackets
    with a number in them are a list as well."""
    found: dict[str, Any] = {}
    for name, values in form.items():
        first, *rest = [whole or part for whole, part in _PARTS.findall(name)]
        if not rest:
            found[first] = values[0]
        elif rest[0] == "" or rest[0].isdecimal():
            found.setdefault(first, []).extend(values)
        else:
            found.setdefault(first, {})[rest[0]] = values[0]
    return found
