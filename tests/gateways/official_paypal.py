"""Exchanges with PayPal's stand-in, held to PayPal's own OpenAPI files.

PROVIDER_SPECS names a directory with paypal-orders.json, paypal-pay.json and paypal-wh.json, from
github.com/paypal/paypal-rest-api-specifications. They are not part of this repository.
"""

import asyncio
import json
import os
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from functools import cache
from pathlib import Path
from typing import Any, NamedTuple

import msgspec

from payments.gateways.http import ProviderHttp, ProviderResponse
from payments.gateways.oauth import OAuthHttp
from payments.gateways.paypal import TOKEN_PATH, PayPalGateway
from tests.doubles.paypal_server import CLIENT_ID, CLIENT_SECRET, WEBHOOK_ID
from tests.gateways.conformance import tls

HOST = "https://api-m.sandbox.paypal.com"
FILES = {
    "/v2/checkout/": "paypal-orders.json",
    "/v2/payments/": "paypal-pay.json",
    "/v1/notifications/": "paypal-wh.json",
}
# On PayPal's page of errors (rest/reference/orders/v2/errors), and missing in the file; or new.
NOT_IN_THE_FILE = (
    *("ACTION_DOES_NOT_MATCH_INTENT", "CARD_EXPIRED", "CURRENCY_NOT_SUPPORTED"),
    *("DECIMALS_NOT_SUPPORTED", "SOMETHING_NEW"),
)


class Exchange(NamedTuple):
    method: str
    path: str
    headers: dict[str, str]
    body: bytes | None
    response: ProviderResponse


class RecordedHttp(ProviderHttp):
    """Keeps each exchange that got a response."""

    def __init__(self, base_url: str) -> None:
        super().__init__(base_url, tls=tls())
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


@asynccontextmanager
async def checked_gateway(url: str, counts: list[Counts]) -> AsyncIterator[PayPalGateway]:
    """A gateway whose exchanges are checked in the end, if there are PayPal's files."""
    http = RecordedHttp(url)
    oauth = OAuthHttp(http, TOKEN_PATH, CLIENT_ID, CLIENT_SECRET)
    gateway = PayPalGateway(oauth, environment="sandbox", webhook_id=WEBHOOK_ID)
    yield gateway
    await gateway.close()
    if (specs := directory()) is not None:
        counts.append(await asyncio.to_thread(check, http.exchanges, specs))


def told(counts: list[Counts]) -> str:
    total = Counts()
    for each in counts:
        total = total.plus(each)
    return f"exchanges with PayPal's stand-in held to PayPal's files: {total}"


def directory() -> Path | None:
    """None where one of the files is missing."""
    named = os.environ.get("PROVIDER_SPECS")
    if not named or not all((Path(named) / name).exists() for name in FILES.values()):
        return None
    return Path(named)


@cache
def _spec(path: Path) -> Any:
    """Not checked itself: one of its patterns is none to Python. Without its OAuth2, of which
    openapi-core knows nothing. The fields of an event are read-only in the file, and in its example
    of a request."""
    from openapi_core import Config, OpenAPI  # half a second, and rarely needed

    spec = json.loads(path.read_text())
    for operations in spec["paths"].values():
        for operation in operations.values():
            if isinstance(operation, dict):
                operation.pop("security", None)
    for field in spec["components"]["schemas"].get("event", {}).get("properties", {}).values():
        field.pop("readOnly", None)
    return OpenAPI.from_dict(spec, Config(spec_validator_cls=None))


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
    from openapi_core.testing import MockRequest

    return MockRequest(
        HOST,
        each.method.lower(),
        each.path,
        headers=each.headers,
        data=each.body,
        content_type="application/json" if each.body is not None else "",
    )


def _response(response: ProviderResponse) -> Any:
    from openapi_core.testing import MockResponse

    return MockResponse(response.body, status_code=response.status, content_type="application/json")


def _is_scripted(response: ProviderResponse) -> bool:
    if response.status == 204:
        return False
    try:
        told = json.loads(response.body)
    except ValueError:
        return True
    issues = [each["issue"] for each in told.get("details", ())]
    return not told or "error" in told or any(each in NOT_IN_THE_FILE for each in issues)
