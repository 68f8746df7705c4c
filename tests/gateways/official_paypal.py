"""Exchanges with PayPal's stand-in, held to PayPal's own OpenAPI files.

PROVIDER_SPECS names a directory with paypal-orders.json, paypal-pay.json and paypal-wh.json, from
github.com/paypal/paypal-rest-api-specifications. They are not part of this repository.
"""

import json
import os
from functools import cache
from pathlib import Path
from typing import Any, NamedTuple

import msgspec
from openapi_core import OpenAPI
from openapi_core.testing import MockRequest, MockResponse

from payments.gateways.http import ProviderHttp, ProviderResponse

HOST = "https://api-m.sandbox.paypal.com"
FILES = {
    "/v2/checkout/": "paypal-orders.json",
    "/v2/payments/": "paypal-pay.json",
    "/v1/notifications/": "paypal-wh.json",
}
# On PayPal's page of errors (rest/reference/orders/v2/errors), and missing in the file.
ONLY_ON_THE_PAGE = ("ACTION_DOES_NOT_MATCH_INTENT",)


class Exchange(NamedTuple):
    method: str
    path: str
    headers: dict[str, str]
    body: bytes | None
    response: ProviderResponse


class RecordedHttp(ProviderHttp):
    """Keeps each exchange that got a response."""

    def __init__(self, base_url: str) -> None:
        super().__init__(base_url)
        self.exchanges: list[Exchange] = []

    async def exchange(self, method: str, path: str, **more: Any) -> ProviderResponse:
        response = await super().exchange(method, path, **more)
        body = more.get("body")
        sent = None if body is None else msgspec.json.encode(body)
        headers = dict(more.get("headers") or {})
        self.exchanges.append(Exchange(method, path, headers, sent, response))
        return response


class Counts(NamedTuple):
    """`validated`: request and response. `requests`: the request alone, as the response was
    scripted to be wrong. `outside`: of an address in none of the files (the token)."""

    validated: int = 0
    requests: int = 0
    outside: int = 0

    def plus(self, other: "Counts") -> "Counts":
        return Counts(*(one + two for one, two in zip(self, other, strict=True)))


def directory() -> Path | None:
    named = os.environ.get("PROVIDER_SPECS")
    return Path(named) if named else None


@cache
def _spec(path: Path) -> OpenAPI:
    return OpenAPI.from_dict(json.loads(path.read_text()))


def check(exchanges: list[Exchange], specs: Path) -> Counts:
    """Raises openapi-core's error for the first that PayPal's files do not allow."""
    counts = Counts()
    for each in exchanges:
        name = next((name for start, name in FILES.items() if each.path.startswith(start)), None)
        if name is None:
            counts = counts.plus(Counts(outside=1))
            continue
        spec = _spec(specs / name)
        request = _request(each)
        spec.validate_request(request)
        if _is_scripted(each.response):
            counts = counts.plus(Counts(requests=1))
            continue
        spec.validate_response(request, _response(each.response))
        counts = counts.plus(Counts(validated=1))
    return counts


def _request(each: Exchange) -> Any:
    return MockRequest(
        HOST,
        each.method.lower(),
        each.path,
        headers=each.headers,
        data=each.body,
        content_type="application/json" if each.body is not None else "",
    )


def _response(response: ProviderResponse) -> Any:
    return MockResponse(response.body, status_code=response.status, content_type="application/json")


def _is_scripted(response: ProviderResponse) -> bool:
    if response.status == 204:
        return False
    try:
        told = json.loads(response.body)
    except ValueError:
        return True
    issues = [each["issue"] for each in told.get("details", ())]
    return not told or "error" in told or any(each in ONLY_ON_THE_PAGE for each in issues)
