"""What a client would rather have, by its Accept header."""

import pytest

from web.accept import preferred

TEXT, OPENMETRICS, JSON = "text/plain", "application/openmetrics-text", "application/json"
PROMETHEUS = (
    "application/openmetrics-text;version=1.0.0;escaping=allow-utf-8;q=0.5,"
    "application/openmetrics-text;version=0.0.1;q=0.4,text/plain;version=0.0.4;q=0.2,*/*;q=0.1"
)


@pytest.mark.parametrize(
    ("accept", "chosen"),
    [
        ("", TEXT),
        (" , ", TEXT),
        ("*/*", TEXT),
        ("text/html,application/xhtml+xml,application/xml;q=0.9,*/*;q=0.8", TEXT),
        ("application/*", OPENMETRICS),
        ("application/json", JSON),
        ("Application/JSON ; Q=0.3", JSON),
        ("application/json, text/plain, */*", JSON),
        ("text/plain, application/json", TEXT),
        ("*/*, application/json", JSON),
        ("application/json;q=0.5, text/plain", TEXT),
        ("application/json;q=0.5, text/plain;q=0.4", JSON),
        (PROMETHEUS, OPENMETRICS),
        # RFC 9110 section 12.4.2: 0 is "not acceptable".
        ("application/json;q=0", None),
        ("application/json;q=0.000, */*", TEXT),
        ("*/*, application/json;q=0, text/plain;q=0.0", OPENMETRICS),
        ("text/*;q=0, application/json;q=0.001", JSON),
        ("*/*;q=0", None),
        ("image/png", None),
        ("application/jsonp", None),
        ("application/json;q=2", JSON),
        ("application/json;q=x", JSON),
        ("application", None),
        (";q=0", None),
    ],
)
def test_the_best_of_three(accept: str, chosen: str | None) -> None:
    assert preferred(accept, (TEXT, OPENMETRICS, JSON)) == chosen
