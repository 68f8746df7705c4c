"""POST /v1/providers/{name}/webhook: who may send one, and what the response is."""

import asyncio
import time
from collections.abc import AsyncIterator, Iterator
from typing import Any

import httpx
import msgspec
import pytest
from loguru import logger

from payments.commands import hints as module
from payments.database.connections import Database, DatabaseAddress
from payments.gateways import NeverSent, OutcomeUnknown
from payments.service import Service
from payments.settings import Settings
from tests.commands.hinting import SECRET, HintingGateway, event
from tests.commands.looking import gateway_of
from tests.doubles.gateway import after
from tests.doubles.http_gateway import SIGNATURE_AGE_MAX_S, SIGNATURE_HEADER, signed
from tests.support import until
from tests.web.requests import gauge, key, problem

pytestmark = pytest.mark.anyio

PATH = "/v1/providers/preparing/webhook"
CANARY = "canary_7391"


@pytest.fixture
def settings() -> Settings:
    return Settings(payments_api_keys=(key("shop", b"shop-key"),))


@pytest.fixture
async def service(address: DatabaseAddress, settings: Settings) -> AsyncIterator[Service]:
    running = Service(settings, address, gateways=[HintingGateway()])
    await running.start()
    yield running
    await running.stop(5)


@pytest.fixture
def logged() -> Iterator[list[dict[str, Any]]]:
    lines: list[dict[str, Any]] = []

    def note(message: Any) -> None:
        lines.append({"text": str(message), **message.record, **message.record["extra"]})

    sink = logger.add(note, level="DEBUG")
    yield lines
    logger.remove(sink)


async def send(
    client: httpx.AsyncClient, body: bytes, sent_at: float | None = None, secret: str = SECRET
) -> httpx.Response:
    sent_at = time.time() if sent_at is None else sent_at
    return await client.post(PATH, content=body, headers=signed(secret, sent_at, body))


def result(response: httpx.Response) -> str:
    assert response.status_code == 200, response.text
    assert response.headers["content-type"] == "application/json"
    return str(response.json()["result"])


async def counted(client: httpx.AsyncClient, result: str) -> float:
    series = f'payments_provider_hints_total{{gateway="preparing",result="{result}"}}'
    return await gauge(client, series)


async def test_it_needs_the_providers_signature_and_no_key(client: httpx.AsyncClient) -> None:
    body = event(reference="pay_1")
    assert result(await send(client, body)) == "unknown"
    assert result(await send(client, body)) == "duplicate"
    assert result(await send(client, b'{"type": "ping"}')) == "ignored"
    assert [await counted(client, each) for each in ("unknown", "duplicate", "ignored")] == [1] * 3


@pytest.mark.parametrize(
    ("secret", "age_s", "altered"),
    [
        ("another", 0, b""),
        (SECRET, SIGNATURE_AGE_MAX_S + 5, b""),
        (SECRET, -SIGNATURE_AGE_MAX_S - 5, b""),
        (SECRET, 0, b" "),
    ],
)
async def test_a_forged_old_or_altered_one_is_refused(
    client: httpx.AsyncClient, secret: str, age_s: float, altered: bytes
) -> None:
    body = event(reference="pay_1")
    headers = signed(secret, time.time() - age_s, body)
    response = await client.post(PATH, content=body + altered, headers=headers)
    assert problem(response) == (400, "bad_signature")
    assert await counted(client, "bad_signature") == 1
    assert result(await send(client, body)) == "unknown"  # nothing was stored of it


async def test_one_without_a_signature_is_refused(client: httpx.AsyncClient) -> None:
    assert problem(await client.post(PATH, content=b"{}")) == (400, "bad_signature")
    doubled = [(SIGNATURE_HEADER, "t=1,v1=a"), (SIGNATURE_HEADER, "t=1,v1=b")]
    assert problem(await client.post(PATH, content=b"{}", headers=doubled)) == (
        400,
        "bad_signature",
    )


async def test_forged_ones_are_logged_once_a_minute_without_what_they_say(
    client: httpx.AsyncClient, logged: list[dict[str, Any]]
) -> None:
    for number in range(20):
        body = event(f"evt_{number}", reference=CANARY)
        headers = {SIGNATURE_HEADER: f"t=1,v1={CANARY}"}
        response = await client.post(f"{PATH}?{CANARY}", content=body, headers=headers)
        assert CANARY not in response.text
    told = [line for line in logged if line["level"].no >= logger.level("INFO").no]
    assert [(line["message"], line["gateway"]) for line in told] == [
        ("a webhook has no valid signature of its provider", "preparing")
    ]
    assert CANARY not in "".join(line["text"] + str(line["extra"]) for line in logged)


@pytest.mark.parametrize("name", ["simulated", "other", "preparing2", "%00", "é"])
async def test_there_is_none_for_another_provider(client: httpx.AsyncClient, name: str) -> None:
    response = await client.post(f"/v1/providers/{name}/webhook", content=b"{}")
    assert problem(response) == (404, "not_found")


@pytest.mark.parametrize("method", ["GET", "PUT", "PATCH", "DELETE", "HEAD"])
async def test_it_is_only_sent_by_post(client: httpx.AsyncClient, method: str) -> None:
    response = await client.request(method, PATH)
    assert response.status_code == 405
    assert set(response.headers["allow"].split(", ")) == {"OPTIONS", "POST"}


async def test_the_gateway_gets_the_bytes_and_headers_as_they_were_sent(
    client: httpx.AsyncClient, service: Service
) -> None:
    body = b'{"id":"evt_\xff"}\r\n'
    await client.post(PATH, content=body, headers={"X-Any": "Value", "Content-Encoding": "br"})
    gateway = gateway_of(service)
    assert isinstance(gateway, HintingGateway)
    ((headers, raw),) = gateway.hints
    assert raw == body
    assert headers["x-any"] == "Value"


@pytest.mark.parametrize("error", [OutcomeUnknown, NeverSent])
async def test_what_cannot_be_verified_now_is_to_be_delivered_again(
    client: httpx.AsyncClient, service: Service, error: type[Exception]
) -> None:
    def fail(*_: Any) -> None:
        raise error(CANARY)

    gateway_of(service).hint_script = [fail]  # type: ignore[attr-defined]
    body = event(reference="pay_1")
    response = await send(client, body)
    assert problem(response) == (503, "gateway_unavailable")
    assert response.headers["retry-after"] == "1"
    assert CANARY not in response.text
    assert await counted(client, "unavailable") == 1
    assert result(await send(client, body)) == "unknown"


async def test_a_defect_of_the_gateway_shows_nothing(
    client: httpx.AsyncClient, service: Service, logged: list[dict[str, Any]]
) -> None:
    gateway_of(service).hint_script = [lambda *_: int(CANARY)]  # type: ignore[attr-defined]
    response = await send(client, event(reference="pay_1"))
    assert problem(response) == (503, "gateway_unavailable")
    assert CANARY not in response.text + "".join(line["text"] for line in logged)


async def test_calls_of_the_provider_are_few_at_a_time(
    client: httpx.AsyncClient, service: Service, monkeypatch: pytest.MonkeyPatch
) -> None:
    """One that verifies webhooks by a call must not be called without end."""
    monkeypatch.setattr(module, "CALLS_MAX", 2)
    go_on, gateway = asyncio.Event(), gateway_of(service)
    assert isinstance(gateway, HintingGateway)
    gateway.hint_script = [after(go_on, lambda *_: None)] * 2
    waiting = [asyncio.create_task(send(client, b"{}")) for _ in range(2)]
    await until(lambda: len(gateway.hints) == 2)
    response = await send(client, b"{}")
    assert problem(response) == (503, "too_busy")
    assert response.headers["retry-after"] == "1"
    go_on.set()
    assert [result(await each) for each in waiting] == ["ignored"] * 2
    assert result(await send(client, b"{}")) == "ignored"


async def test_without_a_database_it_is_to_be_delivered_again(
    client: httpx.AsyncClient, service: Service, address: DatabaseAddress
) -> None:
    nowhere = msgspec.structs.replace(address, host="127.0.0.1", port=1)
    service.hints._database = Database(nowhere, 1)
    response = await send(client, event(reference="pay_1"))
    assert problem(response) == (503, "database_unavailable")
    assert response.headers["retry-after"] == "1"


async def test_the_description_is_true(client: httpx.AsyncClient) -> None:
    document = (await client.get("/schema/openapi.json")).json()
    operation = document["paths"]["/v1/providers/{name}/webhook"]["post"]
    assert operation["security"] == []
    (content,) = operation["responses"]["200"]["content"].values()
    response = (await send(client, event(reference="pay_1"))).json()
    assert response.keys() == content["example"].keys()
    schema = document["components"]["schemas"][content["schema"]["$ref"].split("/")[-1]]
    assert {response["result"], content["example"]["result"]} < set(
        schema["properties"]["result"]["enum"]
    )
