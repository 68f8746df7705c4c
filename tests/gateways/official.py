"""Stripe's own OpenAPI file, as the judge of the gateway's requests and the stand-in's responses.

PROVIDER_SPECS names a directory that holds it, as published in github.com/stripe/openapi
(stripe-2023-08-16.json). It is not a part of this repository: without it these checks are skipped,
visibly.
"""

import json
import os
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any
from urllib.parse import parse_qs

import pytest
from openapi_schema_validator import OAS30Validator

from payments.gateways.http import ANSWER_BYTES_MAX, ProviderHttp, ProviderResponse, encode_form
from tests.doubles.stripe_forms import nested

VARIABLE = "PROVIDER_SPECS"
FORM = "application/x-www-form-urlencoded"
Schema = dict[str, Any]


def official_file(name: str) -> Path:
    """Of a provider; skips the test where there is none."""
    directory = os.environ.get(VARIABLE)
    if not directory:
        pytest.skip(f"{VARIABLE} is not set: it names the directory with the providers' own files")
    path = Path(directory) / name
    if not path.exists():
        pytest.skip(f"{VARIABLE} holds no {name}")
    return path


class NotOfficial(AssertionError):
    """An exchange that the provider's own schema does not allow."""


class Official:
    """An API as its provider describes it. `checked` counts the exchanges that fit, by operation;
    `unknown` those with paths that the file has not."""

    def __init__(self, file: Path, *, beyond: Sequence[str] = ()) -> None:
        """`beyond` are parameters that are newer than the file: they are left out."""
        spec = json.loads(file.read_text(encoding="utf-8"))
        self._components = _respelled(spec["components"])
        self._operations = {
            (method.upper(), path): _respelled(operation)
            for path, operations in spec["paths"].items()
            for method, operation in operations.items()
        }
        self._patterns = {
            path: re.compile(re.sub(r"\{[^}]*\}", "[^/?]+", path)) for path in spec["paths"]
        }
        self._beyond = beyond
        self.checked: dict[str, int] = {}
        self.unknown: dict[str, int] = {}

    def check(
        self, method: str, target: str, form: str, status: int | None = None, body: object = None
    ) -> None:
        """Raises NotOfficial. Without a status there is no response yet, and nothing is counted."""
        path, _, query = target.partition("?")
        template = next((each for each, p in self._patterns.items() if p.fullmatch(path)), None)
        operation = self._operations.get((method, template or ""))
        if operation is None and status is None:
            return
        if operation is None:
            name = f"{method} {path}"
            self.unknown[name] = self.unknown.get(name, 0) + 1
            return
        name = f"{method} {template}"
        self._check_request(name, operation, query, form)
        if status is None:
            return
        self._check_response(name, operation, status, body)
        self.checked[name] = self.checked.get(name, 0) + 1

    def _check_request(self, name: str, operation: Schema, query: str, form: str) -> None:
        parameters = [each for each in operation.get("parameters", ()) if each["in"] == "query"]
        known = {each["name"]: each["schema"] for each in parameters}
        asked = nested(parse_qs(query, keep_blank_values=True))
        schema = {"type": "object", "additionalProperties": False, "properties": known}
        self._validate(f"{name}: its query", self._coerced(asked, schema), schema)
        body_schema = operation["requestBody"]["content"][FORM]["schema"]
        sent = nested(parse_qs(form, keep_blank_values=True))
        sent = {key: value for key, value in sent.items() if key not in self._beyond}
        self._validate(f"{name}: its form", self._coerced(sent, body_schema), body_schema)

    def _check_response(self, name: str, operation: Schema, status: int, body: object) -> None:
        responses = operation["responses"]
        described = responses.get(str(status), responses["default"])
        schema = described["content"]["application/json"]["schema"]
        self._validate(f"{name}: its response {status}", body, schema)

    def _validate(self, what: str, value: object, schema: Schema) -> None:
        whole = {**schema, "components": self._components}
        for error in OAS30Validator(whole).iter_errors(value):
            place = "/".join(str(each) for each in error.absolute_path)
            raise NotOfficial(f"{what}: {place}: {error.message}")

    def _coerced(self, value: Any, schema: Schema) -> Any:
        """Texts of a form as what the schema has there."""
        schema = self._dereferenced(schema)
        for choice in schema.get("anyOf", ()):
            made = self._coerced(value, choice)
            if OAS30Validator({**choice, "components": self._components}).is_valid(made):
                return made
        match schema.get("type"), value:
            case "object", Mapping():
                known, other = schema.get("properties", {}), schema.get("additionalProperties")
                other = other if isinstance(other, dict) else {}
                return {k: self._coerced(v, known.get(k, other)) for k, v in value.items()}
            case "array", list():
                return [self._coerced(each, schema.get("items", {})) for each in value]
            case "integer", str() if re.fullmatch(r"-?[0-9]+", value):
                return int(value)
            case "boolean", "true" | "false":
                return value == "true"
        return value

    def _dereferenced(self, schema: Schema) -> Schema:
        while "$ref" in schema:
            schema = self._components["schemas"][schema["$ref"].rpartition("/")[2]]
        return schema


def _respelled(part: Any) -> Any:
    """`nullable` has no meaning for the validator beside anyOf, enum or $ref, and of a field that
    can be expanded only the id is ever sent here."""
    if isinstance(part, list):
        return [_respelled(each) for each in part]
    if not isinstance(part, dict):
        return part
    part = {key: _respelled(value) for key, value in part.items()}
    if "x-expansionResources" in part:
        part["anyOf"] = [each for each in part.get("anyOf", ()) if each.get("type") == "string"]
    if part.get("nullable") is True and {"anyOf", "enum", "$ref"} & set(part):
        rest = {key: value for key, value in part.items() if key != "nullable"}
        return {"anyOf": [rest, {"enum": [None], "nullable": True}]}
    return part


class CheckedHttp(ProviderHttp):
    """Checks each exchange before and after it is made. What only scripted faults respond with is
    not checked, as it is not the provider's."""

    def __init__(self, official: Official | None, *given: Any, **more: Any) -> None:
        super().__init__(*given, **more)
        self.official = official

    async def exchange(self, method: str, path: str, **given: Any) -> ProviderResponse:
        if self.official is None:
            return await super().exchange(method, path, **given)
        form = encode_form(given.get("form") or {}).decode()
        self.official.check(method, path, form)
        response = await super().exchange(method, path, **given)
        body = _json(response.body)
        if body is not None and len(response.body) <= ANSWER_BYTES_MAX:
            self.official.check(method, path, form, response.status, body)
        return response


def _json(content: bytes) -> object:
    """None for what a scripted fault made."""
    try:
        body = json.loads(content)
    except ValueError:
        return None
    return None if body in ({}, {"error": "scripted"}) else body


def show(official: Official, config: pytest.Config) -> None:
    """How many exchanges were checked, among the results of the tests."""
    plugins = config.pluginmanager
    reporter, capture = plugins.get_plugin("terminalreporter"), plugins.get_plugin("capturemanager")
    if reporter is None or capture is None:  # in a worker of several
        return
    count = sum(official.checked.values())
    with capture.global_and_fixture_disabled():
        reporter.write_line(f"\n{count} exchanges fit the provider's schema: {official.checked}")
