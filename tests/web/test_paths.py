"""Every path has one spelling, and it is known which need an API key."""

import pytest
from litestar import Litestar

from web.app import v1
from web.operations import health, live, metrics
from web.paths import WEBHOOK, Paths
from web.schema.page import docs, root

KEYED = {
    "/v1/charge",
    "/v1/refund",
    "/v1/payments",
    "/v1/payments/{payment_id}",
    "/v1/payments/{payment_id}/events",
    "/v1/payments/{payment_id}/callbacks",
    "/v1/unfulfilled",
}
OPEN = {
    *("/health", "/health/live", "/metrics", "/schema", "/schema/openapi.json"),
    *("/schema/swagger-ui-bundle.js", "/schema/swagger-ui.css", WEBHOOK),
}
ROOT = "/"
ID = "058c9593-e150-402f-ab5b-37dd4c9816f0"


@pytest.fixture(scope="module")
def paths() -> Paths:
    app = Litestar([v1, docs, root, health, live, metrics], openapi_config=None)
    return Paths(app, {WEBHOOK: ["acme", "acme.2"]})


def found(paths: Paths, target: str) -> str | None:
    path = paths.find(target.encode())
    return path.template if path else None


def test_what_needs_a_key_and_what_does_not(paths: Paths) -> None:
    assert {path.template for path in paths.all if path.needs_key} == KEYED
    assert {path.template for path in paths.all if not path.needs_key} == OPEN | {ROOT}


@pytest.mark.parametrize("template", sorted(KEYED | OPEN | {ROOT}))
@pytest.mark.parametrize("form", ["{}", "{}?x=%2f", "{}?", "http://x{}", "HTTP://x:80{}?a#"])
def test_a_path_is_found_as_it_is_written(paths: Paths, template: str, form: str) -> None:
    path = template.replace("{payment_id}", ID).replace("{name}", "acme.2")
    assert found(paths, form.format(path)) == template


@pytest.mark.parametrize("template", sorted(KEYED | OPEN))
def test_and_in_no_other_way(paths: Paths, template: str) -> None:
    path = template.replace("{payment_id}", ID).replace("{name}", "acme.2")
    letters = f"/%{ord(path[1]):02x}{path[2:]}"
    others = (
        *(path + "/", path + "//", "/" + path, "//" + path, path[:1] + "." + path, path + "%2f"),
        *(path + "%2F", path + "/.", path + "/..", letters, path.upper(), path + ";", path + " "),
        *(
            path.replace("/", "//"),
            path.replace("/", "/./"),
            path[0] + path[1:].replace("/", "%2f") + "%2f",
        ),
        *("/x/.." + path, path + "%3f", path + "%00", path + "\\", "http://x/" + path),
    )
    inexact = {other: found(paths, other) for other in others}
    # What is behind the last slash of a payment's path is an id, if a bad one.
    expected = template if template.endswith("{payment_id}") else None
    bad_ids = {path + end for end in (";", " ", "%3f", "%00", "\\")}
    for other, template_found in inexact.items():
        assert template_found == (expected if other in bad_ids else None), other


@pytest.mark.parametrize("other", ["//", "/.", "/..", "/%2f", "/;", "/ ", "/index.html", "///"])
def test_the_root_has_one_spelling_too(paths: Paths, other: str) -> None:
    assert found(paths, other) is None


@pytest.mark.parametrize("segment", ["a%20b", "%00", "%ff", "...", ".a", "a;b", "%", "%zz"])
def test_an_id_may_be_anything_but_a_path(paths: Paths, segment: str) -> None:
    assert found(paths, f"/v1/payments/{segment}") == "/v1/payments/{payment_id}"
    events = found(paths, f"/v1/payments/{segment}/events")
    assert events == "/v1/payments/{payment_id}/events"


@pytest.mark.parametrize("segment", ["", ".", "..", "a%2fb", "%2F", "a/b", "../x", "x/events/y"])
def test_an_id_is_one_part_of_a_path(paths: Paths, segment: str) -> None:
    assert found(paths, f"/v1/payments/{segment}") is None


@pytest.mark.parametrize("target", ["http://x", "health", "http://x:99999/health", "%2fhealth"])
def test_what_is_no_target_at_all(paths: Paths, target: str) -> None:
    with pytest.raises(ValueError, match=target):
        paths.find(target.encode())


@pytest.mark.parametrize("name", ["other", "acmex2", "{name}", "%61cme", "", "acme.2/x", "ACME"])
def test_only_webhooks_of_providers_that_send_some_are_found(paths: Paths, name: str) -> None:
    assert found(paths, WEBHOOK.replace("{name}", name)) is None
