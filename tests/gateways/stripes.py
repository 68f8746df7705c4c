"""Stripe gateways for tests, and the settings they are built from."""

import os
import time
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from functools import cache, partial
from typing import Any

import msgspec
import pytest

from payments.gateways import Hint, stripe
from payments.gateways.stripe import StripeGateway
from payments.http_url import parse_http_url
from payments.settings import Settings
from tests.doubles.stripe_server import SECRET_KEY, WEBHOOK_SECRET, signed
from tests.gateways.conformance import WAIT_S, tls
from tests.gateways.official import VARIABLE, CheckedHttp, Official, official_file, show

FILE = "stripe-2023-08-16.json"
SECRETS = ("whsec_before", WEBHOOK_SECRET)
PUBLISHABLE_KEY = "pk_test_stand_in"
RETURN_URL = "https://shop.example/paid"
# Newer than the schema's version of the API, and taken by it all the same.
NEWER_THAN_THE_FILE = ("confirmation_token",)


@cache
def official_stripe() -> Official | None:
    """One for all tests of a process; None where PROVIDER_SPECS names no directory."""
    if not os.environ.get(VARIABLE):
        return None
    return Official(official_file(FILE), beyond=NEWER_THAN_THE_FILE)


def check_official(config: pytest.Config, *operations: str) -> None:
    """These were checked, and all that has been exchanged is as Stripe describes it."""
    official_file(FILE)  # skips without one
    official = official_stripe()
    assert official is not None
    show(official, config)
    assert set(operations) <= set(official.checked)
    assert set(official.unknown) <= {"GET /v1/account"}


def settings_for(url: str, **more: Any) -> Settings:
    given: dict[str, Any] = {
        "stripe_secret_key": SECRET_KEY,
        "stripe_publishable_key": PUBLISHABLE_KEY,
        "stripe_webhook_secrets": SECRETS,
        "stripe_api_base": parse_http_url(url),
    }
    return Settings(**given | more)


@asynccontextmanager
async def opened_gateway(
    url: str, *, checked: bool = True, **more: Any
) -> AsyncIterator[StripeGateway]:
    """As it is built from settings; where there is Stripe's schema, its exchanges are checked."""

    official = official_stripe() if checked else None
    connect = partial(CheckedHttp, official, tls=tls())
    gateway = stripe.build(settings_for(url, **more), connect)
    try:
        yield gateway
    finally:
        await gateway.close()


async def hint_of(
    gateway: StripeGateway, event: object, *secrets: str, age_s: float = 0
) -> Hint | None:
    """Of a webhook that was signed so long ago."""
    body = msgspec.json.encode(event)
    headers = signed(body, time.time() - age_s, *(secrets or SECRETS[1:]))
    return await gateway.hint(headers, body, WAIT_S)
