"""The access token: one for all exchanges, and what happens if there is none."""

import asyncio
import logging
from collections.abc import AsyncIterator

import pytest
from loguru import logger

from payments.gateways import NeverSent, OutcomeUnknown
from payments.gateways.http import ProviderHttp
from payments.gateways.oauth import MARGIN_S, OAuthHttp
from payments.gateways.paypal import TOKEN_PATH, PayPalGateway
from payments.payment.state import Approved
from tests.doubles.paypal_server import CLIENT_ID, CLIENT_SECRET, WEBHOOK_ID, PayPalProcess
from tests.doubles.stand_in import Fault, FaultKind
from tests.gateways.conformance import LATE_S, TIMEOUT_S, WAIT_S, begun, charge_of, tls
from tests.machine import within

pytestmark = pytest.mark.anyio

PATH = f"/v1/notifications/webhooks/{WEBHOOK_ID}"


class Clock:
    now = 1000.0

    def __call__(self) -> float:
        return self.now


@pytest.fixture
def clock() -> Clock:
    return Clock()


@pytest.fixture
async def http(paypal: PayPalProcess, clock: Clock) -> AsyncIterator[OAuthHttp]:
    plain = ProviderHttp(paypal.url, tls=tls())
    opened = OAuthHttp(plain, TOKEN_PATH, CLIENT_ID, CLIENT_SECRET, clock)
    yield opened
    await opened.close()


async def ask(http: OAuthHttp, timeout_s: float = WAIT_S) -> int:
    return (await http.exchange("GET", PATH, timeout_s=timeout_s)).status


def asked(paypal: PayPalProcess, operation: str = "token") -> int:
    return paypal.counts()[operation]


async def test_200_charges_at_once_ask_for_one_token(
    paypal: PayPalProcess, http: OAuthHttp
) -> None:
    prepared = OAuthHttp(ProviderHttp(paypal.url), TOKEN_PATH, CLIENT_ID, CLIENT_SECRET)
    gateway = PayPalGateway(prepared, environment="sandbox")
    charges = [await begun(gateway, charge_of(1000 + n * 10)) for n in range(200)]
    await gateway.close()
    before = asked(paypal)
    fresh = PayPalGateway(http, environment="sandbox")
    outcomes = await asyncio.gather(*(fresh.charge(each, 60) for each in charges))
    assert [isinstance(each, Approved) for each in outcomes] == [True] * 200
    assert asked(paypal) - before == 1


async def test_a_token_is_kept_until_shortly_before_it_expires(
    paypal: PayPalProcess, http: OAuthHttp, clock: Clock
) -> None:
    before = asked(paypal)
    for now, count in ((0, 1), (32_400 - MARGIN_S - 1, 1), (32_400 - MARGIN_S, 2)):
        clock.now = 1000.0 + now
        assert await ask(http) == 200
        assert asked(paypal) - before == count


async def test_a_token_of_a_short_life_is_used(
    paypal: PayPalProcess, http: OAuthHttp, clock: Clock
) -> None:
    paypal.set(token_s=10)
    before = asked(paypal)
    for now, count in ((0, 1), (8.9, 1), (9.0, 2)):
        clock.now = 1000.0 + now
        assert await ask(http) == 200
        assert asked(paypal) - before == count


async def test_a_rejected_token_is_replaced_once_for_all(
    paypal: PayPalProcess, http: OAuthHttp
) -> None:
    assert await ask(http) == 200
    before = asked(paypal)
    paypal.revoke_tokens()
    assert await asyncio.gather(*(ask(http) for _ in range(50))) == [200] * 50
    assert asked(paypal) - before == 1


async def test_a_request_is_sent_no_third_time(
    paypal: PayPalProcess, http: OAuthHttp, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert await ask(http) == 200
    token = http._token
    assert token is not None
    paypal.revoke_tokens()
    requests = asked(paypal, "webhook")

    async def same(timeout_s: float) -> object:
        return token

    monkeypatch.setattr(http, "_valid_token", same)
    assert await ask(http) == 401
    assert asked(paypal, "webhook") - requests == 2


@pytest.mark.parametrize(
    ("fault", "is_outage"),
    [
        ("500", True),
        ("429", True),
        ("reset", True),
        ("answer_lost", True),
        ("garbage", False),
        ("not_found_page", False),
        ("redirect", False),
        ("huge", False),
    ],
)
async def test_without_a_token_nothing_was_sent(
    paypal: PayPalProcess, http: OAuthHttp, fault: FaultKind, is_outage: bool
) -> None:
    requests = asked(paypal, "webhook")
    paypal.script(Fault(fault, "token"))
    with pytest.raises(NeverSent) as raised:
        await ask(http)
    assert raised.value.is_outage is is_outage
    assert asked(paypal, "webhook") == requests
    assert await ask(http) == 200


async def test_a_token_endpoint_that_refuses_connections(
    paypal: PayPalProcess, http: OAuthHttp
) -> None:
    paypal.refuse()
    with pytest.raises(NeverSent) as raised:
        await ask(http)
    assert raised.value.is_outage


async def test_a_silent_token_endpoint_ends_each_call_in_its_time(
    paypal: PayPalProcess, http: OAuthHttp
) -> None:
    """They share one request, and do not wait for its end."""
    before = asked(paypal)
    paypal.script(Fault("timeout", "token"))
    with within(TIMEOUT_S + LATE_S):
        failures = await asyncio.gather(
            *(ask(http, TIMEOUT_S) for _ in range(20)), return_exceptions=True
        )
    assert [type(each) for each in failures] == [NeverSent] * 20
    assert all(each.is_outage for each in failures if isinstance(each, NeverSent))
    assert asked(paypal) - before == 1


async def test_a_failure_is_shared_and_then_asked_again(
    paypal: PayPalProcess, http: OAuthHttp
) -> None:
    before = asked(paypal)
    paypal.script(Fault("500", "token"))
    failures = await asyncio.gather(*(ask(http) for _ in range(20)), return_exceptions=True)
    assert [type(each) for each in failures] == [NeverSent] * 20
    assert len({id(each) for each in failures}) == 20
    assert asked(paypal) - before == 1
    assert await ask(http) == 200


async def test_a_cancelled_call_leaves_the_token_to_the_others(
    paypal: PayPalProcess, http: OAuthHttp
) -> None:
    before = asked(paypal)
    paypal.script(Fault("slow", "token", seconds=0.2))
    first, second = (asyncio.create_task(ask(http)) for _ in range(2))
    await asyncio.sleep(0.05)
    first.cancel()
    with pytest.raises(asyncio.CancelledError):
        await first
    assert await second == 200
    assert asked(paypal) - before == 1


async def test_wrong_credentials_are_no_outage_and_never_shown(
    paypal: PayPalProcess, http: OAuthHttp
) -> None:
    paypal.set(secret="rotated-secret")
    written: list[str] = []
    sink = logger.add(written.append, level="ERROR", format="{message} {extra}")
    for _ in range(2):
        with pytest.raises(NeverSent, match="rejects the client id and secret") as raised:
            await ask(http)
        assert not raised.value.is_outage
        assert CLIENT_SECRET not in f"{raised.value!r} {http!r}"
    logger.remove(sink)
    assert len(written) == 1
    assert "rejects the client id and secret" in written[0]
    assert CLIENT_SECRET not in written[0]


async def test_no_time_is_no_outage(http: OAuthHttp) -> None:
    with pytest.raises(NeverSent) as raised:
        await ask(http, 0)
    assert not raised.value.is_outage


async def test_after_the_end_nothing_is_sent(paypal: PayPalProcess, http: OAuthHttp) -> None:
    paypal.script(Fault("timeout", "token"))
    waiting = asyncio.create_task(ask(http))
    await asyncio.sleep(0.1)
    await http.close()
    with pytest.raises(NeverSent) as raised:
        await waiting
    assert not raised.value.is_outage


async def test_neither_token_nor_secret_is_logged(
    paypal: PayPalProcess, http: OAuthHttp, caplog: pytest.LogCaptureFixture
) -> None:
    written: list[str] = []
    sink = logger.add(written.append, level=0, format="{message} {extra}")
    with caplog.at_level(logging.DEBUG):
        assert await ask(http) == 200
        paypal.script(Fault("garbage", "webhook"), Fault("500", "webhook"))
        for _ in range(2):
            await ask(http)
        paypal.script(Fault("answer_lost", "webhook"))
        with pytest.raises(OutcomeUnknown) as raised:
            await ask(http)
    logger.remove(sink)
    assert http._token is not None
    shown = f"{caplog.text} {written} {raised.value!r}"
    for secret in (http._token.header.split()[1], CLIENT_SECRET):
        assert secret not in shown
