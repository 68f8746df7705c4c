"""GET /schema: the document is true, complete and as agreed upon; the page loads nothing else."""

import json
import re
from collections.abc import Iterator
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import httpx
import jsonschema_rs
import msgspec
import pytest
import schemathesis
from litestar import Litestar, get

from payments.callbacks.dispatcher import CallbackBody
from payments.errors import PaymentsError
from payments.order_service.signing import signature_headers
from payments.settings import Settings
from tests.support import ORDER_ID, subclasses
from tests.web.requests import key
from web.schema import document as openapi

pytestmark = pytest.mark.anyio

SNAPSHOT = Path(__file__).parent / "openapi.json"
REWRITE = "pytest tests/web/test_openapi.py --update-openapi"

ENDPOINTS = {
    "POST /v1/charge",
    "POST /v1/refund",
    "GET /v1/payments",
    "GET /v1/payments/{payment_id}",
    "GET /v1/payments/{payment_id}/events",
    "GET /v1/payments/{payment_id}/callbacks",
    "GET /v1/unfulfilled",
    "POST /v1/providers/{name}/webhook",
    "GET /health",
    "GET /health/live",
    "GET /metrics",
}

# Only a provider can sign one: test_provider_webhooks.py.
SIGNED = {"POST /v1/providers/{name}/webhook"}

# The list may be a moment behind, and here nobody is called back.
EXAMPLES_OF_MORE = {
    "GET /v1/payments",
    "GET /v1/payments/{payment_id}/callbacks",
    "GET /v1/unfulfilled",
}


@pytest.fixture
async def document(client: httpx.AsyncClient) -> Any:
    response = await client.get("/schema/openapi.json")
    assert response.status_code == 200
    assert response.headers["content-type"] == "application/json"
    return response.json()


def operations(document: Any) -> dict[str, Any]:
    return {
        f"{method.upper()} {path}": operation
        for path, methods in document["paths"].items()
        for method, operation in methods.items()
    }


def check(value: Any, schema: Any, document: Any) -> None:
    """Raises ValidationError; formats count as well."""
    whole = {"components": document["components"], "allOf": [schema]}
    jsonschema_rs.Draft202012Validator(whole, validate_formats=True).validate(value)


async def test_the_document_is_as_agreed_upon(
    document: Any, request: pytest.FixtureRequest
) -> None:
    text = json.dumps(document, indent=2, ensure_ascii=False) + "\n"
    if request.config.getoption("--update-openapi"):
        SNAPSHOT.write_text(text, encoding="utf-8")
    agreed = SNAPSHOT.read_text(encoding="utf-8")
    assert text == agreed, f"The API's description changed. If that is meant: {REWRITE}"


async def test_it_is_openapi_3_1(document: Any) -> None:
    assert document["openapi"].startswith("3.1.")
    schemathesis.openapi.from_dict(document).validate()
    for name, schema in document["components"]["schemas"].items():
        jsonschema_rs.meta.validate(schema)
        # Every reference leads somewhere.
        check_all = {"components": document["components"], "$ref": f"#/components/schemas/{name}"}
        jsonschema_rs.Draft202012Validator(check_all)
    for reference in re.findall(r'"\$ref": "#/([^"]+)"', json.dumps(document)):
        found = document
        for part in reference.split("/"):
            found = found[part]


async def test_every_route_is_described_and_nothing_else(document: Any) -> None:
    assert set(operations(document)) == ENDPOINTS
    ids = [operation["operationId"] for operation in operations(document).values()]
    assert len(set(ids)) == len(ENDPOINTS)
    summaries = [operation["summary"] for operation in operations(document).values()]
    assert all(summaries)


def test_a_route_without_a_description_stops_the_start() -> None:
    @get("/forgotten", sync_to_thread=False)
    def forgotten() -> None: ...

    app = Litestar([forgotten], openapi_config=None)
    with pytest.raises(ValueError, match="GET /forgotten has no description"):
        openapi.document(app)


async def test_bodies_with_unknown_fields_are_not_valid(document: Any) -> None:
    for path in ("/v1/charge", "/v1/refund"):
        content = document["paths"][path]["post"]["requestBody"]["content"]
        schema = content["application/json"]["schema"]
        for example in content["application/json"]["examples"].values():
            check(example["value"], schema, document)
            with pytest.raises(jsonschema_rs.ValidationError):
                check(example["value"] | {"amount": 1}, schema, document)
            for field, wrong in {"amount_cents": 0, "payment_id": "1", "currency": "inr"}.items():
                with pytest.raises(jsonschema_rs.ValidationError):
                    check(example["value"] | {field: wrong}, schema, document)


def requests_of(endpoint: str, operation: Any) -> list[dict[str, Any]]:
    """Its examples as requests for httpx, and one without any if it needs none."""
    bodies = operation.get("requestBody", {}).get("content", {}).get("application/json", {})
    names = list(bodies.get("examples", {}))
    names += [
        name
        for parameter in operation["parameters"]
        for name in parameter.get("examples", {})
        if name not in names
    ]
    found = []
    for name in names or [None]:
        method, path = endpoint.split()
        request: dict[str, Any] = {"method": method, "headers": {}, "params": {}}
        for parameter in operation["parameters"]:
            if name not in parameter.get("examples", {}):
                assert name is None or not parameter["required"], (endpoint, parameter["name"])
                continue
            value = parameter["examples"][name]["value"]
            if parameter["in"] == "path":
                path = path.replace("{" + parameter["name"] + "}", value)
            else:
                request["headers" if parameter["in"] == "header" else "params"][
                    parameter["name"]
                ] = value
        if bodies:
            request["json"] = bodies["examples"][name]["value"]
        found.append(request | {"url": path})
    return found


def form(value: Any) -> Any:
    """Its fields, with theirs; of a list its last."""
    if isinstance(value, dict):
        return {name: form(field) for name, field in value.items()}
    if isinstance(value, list):
        return [form(item) for item in value[-1:]]
    return None


async def test_every_example_works_as_documented(client: httpx.AsyncClient, document: Any) -> None:
    found = operations(document)
    order = [
        "POST /v1/charge",
        *sorted(ENDPOINTS - SIGNED - {"POST /v1/charge", "POST /v1/refund"}),
    ]
    for endpoint in [*order, "POST /v1/refund"]:
        expected = min(found[endpoint]["responses"])
        answer = found[endpoint]["responses"][expected]
        for number, request in enumerate(requests_of(endpoint, found[endpoint])):
            response = await client.request(**request)
            assert response.status_code == int(expected), response.text
            ((media_type, content),) = answer["content"].items()
            assert response.headers["content-type"].split(";")[0] == media_type
            for name, header in answer["headers"].items():
                header = document["components"]["headers"][header["$ref"].split("/")[-1]]
                if header.get("required"):
                    check(response.headers[name], header["schema"], document)
            if media_type == "text/plain":
                continue
            check(response.json(), content["schema"], document)
            if endpoint.startswith("POST") and number == 0:
                assert response.json() == content["example"]
            elif endpoint not in EXAMPLES_OF_MORE:
                assert form(response.json()) == form(content["example"])


async def test_every_answer_has_valid_examples(document: Any) -> None:
    for operation in operations(document).values():
        for answer in operation["responses"].values():
            for content in answer["content"].values():
                examples = [example["value"] for example in content.get("examples", {}).values()]
                if "example" in content:
                    examples.append(content["example"])
                assert examples
                for example in examples:
                    check(example, content["schema"], document)


def problems(document: Any) -> set[tuple[int, str]]:
    answers = [
        answer
        for operation in operations(document).values()
        for answer in operation["responses"].values()
    ]
    found = set()
    without_endpoint = list(document["components"]["responses"].values())
    for answer in [*answers, *without_endpoint]:
        content = answer["content"].get("application/problem+json")
        if content:
            assert content["schema"] == {"$ref": "#/components/schemas/Problem"}
            for code, example in content["examples"].items():
                assert code in answer["description"] or answer in without_endpoint
                assert example["value"]["code"] == code
                found.add((example["value"]["status"], code))
    return found


async def test_every_problem_that_is_answered_is_described(document: Any) -> None:
    errors: list[type[PaymentsError]] = [PaymentsError, *subclasses(PaymentsError)]
    answered = {(error.status, error.code) for error in errors if "code" in vars(error)}
    assert problems(document) == answered


async def test_problems_are_as_described(client: httpx.AsyncClient, document: Any) -> None:
    charged = operations(document)["POST /v1/charge"]["responses"]
    key_header = {"Idempotency-Key": "k"}
    requests: list[dict[str, Any]] = [
        {"json": {}, "headers": key_header},
        {"json": {}},
        {"content": b"{}", "headers": key_header},
        {"content": b" " * 20_000},
    ]
    for request in requests:
        response = await client.post("/v1/charge", **request)
        content = charged[str(response.status_code)]["content"]["application/problem+json"]
        check(response.json(), content["schema"], document)
        assert response.json()["code"] in content["examples"]


def every_schema(part: Any) -> Iterator[dict[str, Any]]:
    """All objects of the document, schemas among them."""
    if isinstance(part, dict):
        yield part
        for each in part.values():
            yield from every_schema(each)
    elif isinstance(part, list):
        for each in part:
            yield from every_schema(each)


async def test_generators_of_clients_read_it_as_it_is_meant(document: Any) -> None:
    """msgspec names defaults, `null` among them, and generators take such a field for required."""
    for name, schema in document["components"]["schemas"].items():
        for field, found in schema.get("properties", {}).items():
            assert "default" not in found, (name, field)
            assert field[-3:] != "_at" or "date-time" in json.dumps(found), (name, field)
    for schema in every_schema(document):
        if "[0-9a-fA-F]{8}-" in schema.get("pattern", ""):
            assert schema["format"] == "uuid"
        # One type of each kind, and none without a name.
        assert schema.get("enum", [])[:1] != ["AED"] or schema.get("title") == "Currency"
        assert "allOf" not in schema


async def test_callbacks_are_described(document: Any) -> None:
    (webhook,) = document["webhooks"].values()
    content = webhook["post"]["requestBody"]["content"]["application/json"]
    sent = CallbackBody(
        order_id=ORDER_ID,
        payment_id=ORDER_ID,
        status="REFUNDED",
        event_id=ORDER_ID,
        sequence=4,
        occurred_at=datetime.now(UTC),
        amount_cents=1,
        currency="INR",
    )
    body = json.loads(msgspec.json.encode(sent))
    check(body, content["schema"], document)
    for field in body:
        with pytest.raises(jsonschema_rs.ValidationError):
            check({name: body[name] for name in body if name != field}, content["schema"], document)
    for example in content["examples"].values():
        assert form(example["value"]) == form(body)
        check(example["value"], content["schema"], document)
    signed = signature_headers((b"secret",), str(ORDER_ID), 1, b"")
    named = [parameter["name"] for parameter in webhook["post"]["parameters"]]
    assert named == [*signed, "traceparent"]


async def test_a_browser_is_sent_to_the_page(client: httpx.AsyncClient) -> None:
    for method in ("GET", "HEAD"):
        sent = await client.request(method, "/", headers={"Accept": "text/html"})
        assert (sent.status_code, sent.headers["location"]) == (302, "/schema")
    assert (await client.get("/", follow_redirects=True)).url.path == "/schema"
    refused = await client.post("/")
    assert (refused.status_code, refused.json()["code"]) == (405, "method_not_allowed")


async def test_the_page_loads_its_own_files_only(client: httpx.AsyncClient) -> None:
    page = await client.get("/schema")
    assert page.status_code == 200
    assert page.headers["content-type"] == "text/html; charset=utf-8"
    policy = page.headers["content-security-policy"]
    assert policy.startswith("default-src 'none'; ")
    assert "http" not in policy
    assert "*" not in policy
    assert "unsafe" not in policy
    html = page.text.replace("xmlns='http://www.w3.org/2000/svg'", "")  # a name, not an address
    assert "//" not in html
    loaded = re.findall(r'(?:src|href|url)(?:=|: )"([^"]+)"', html)
    own = [path for path in loaded if not path.startswith("data:image/svg+xml,")]
    assert {"/schema/swagger-ui-bundle.js", "/schema/swagger-ui.css"} < set(own)
    for path in own:
        assert (await client.get(path)).status_code == 200
    assert "validatorUrl: null" in html


@pytest.mark.parametrize(
    ("path", "media_type", "within"),
    [
        ("swagger-ui-bundle.js", "text/javascript; charset=utf-8", b"SwaggerUIBundle"),
        ("swagger-ui.css", "text/css; charset=utf-8", b".swagger-ui"),
    ],
)
async def test_its_files(
    client: httpx.AsyncClient, path: str, media_type: str, within: bytes
) -> None:
    for _ in range(2):
        response = await client.get(f"/schema/{path}")
        assert response.status_code == 200
        assert response.headers["content-type"] == media_type
        assert response.headers["cache-control"] == "public, max-age=3600"
        assert response.headers["x-content-type-options"] == "nosniff"
        assert within in response.content


@pytest.mark.parametrize(
    "path",
    [
        "swagger-ui-standalone-preset.js",
        "default.min.css",
        "..%2f__init__.py",
        "../health/other",
        "openapi.yaml",
    ],
)
async def test_there_are_no_others(client: httpx.AsyncClient, path: str) -> None:
    response = await client.get(f"/schema/{path}")
    assert (response.status_code, response.json()["code"]) == (404, "not_found")


class TestWithApiKeys:
    @pytest.fixture
    def settings(self) -> Settings:
        return Settings(simulated_ledger="", payments_api_keys=(key("shop", b"shop-key"),))

    async def test_the_description_is_open_and_says_what_is_not(
        self, client: httpx.AsyncClient, document: Any
    ) -> None:
        assert (await client.get("/schema")).status_code == 200
        assert (await client.get("/")).status_code == 302
        found = operations(document)
        for endpoint in sorted(ENDPOINTS, key=lambda endpoint: endpoint != "POST /v1/charge"):
            (request, *_) = requests_of(endpoint, found[endpoint])
            refused = await client.request(**request)
            is_open = found[endpoint]["security"] == []
            assert is_open is (refused.status_code != 401), endpoint
            if not is_open:
                assert found[endpoint]["security"] == [{}, {"bearer": []}]
                described = found[endpoint]["responses"]["401"]["headers"]
                assert "WWW-Authenticate" in described
                assert "WWW-Authenticate" in refused.headers
                request["headers"]["Authorization"] = "Bearer shop-key"
                assert (await client.request(**request)).is_success
