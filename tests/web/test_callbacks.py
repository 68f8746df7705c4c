"""A service that calls back: what its users and operators see of it."""

import hashlib
import uuid
from collections.abc import AsyncIterator
from typing import Any

import httpx
import msgspec
import psycopg
import pytest

from payments.clients import ApiKey
from payments.database.connections import DatabaseAddress
from payments.errors import StartError
from payments.http_url import parse_http_url
from payments.service import Service
from payments.settings import Settings
from tests.doubles.order_service import Fault, OrderService
from tests.invariants.callbacks import check_callbacks, is_followed, nothing_due
from tests.support import History, append, until
from tests.web.requests import gauge

pytestmark = pytest.mark.anyio

BODY = {"merchant_order_id": "f50d9fa2-5d3e-4e49-9a02-218ad32ef4a9", "amount_cents": 1500}
KEYED = {"Idempotency-Key": "k"}


@pytest.fixture
async def orders() -> AsyncIterator[OrderService]:
    running = OrderService()
    await running.listen()
    yield running
    await running.close()


@pytest.fixture
def settings(orders: OrderService) -> Settings:
    return Settings(simulated_ledger="", order_callback_url=parse_http_url(orders.url))


async def test_a_charge_is_called_back_and_shows_it(
    client: httpx.AsyncClient, orders: OrderService
) -> None:
    orders.script(Fault("500"))
    charged = (await client.post("/v1/charge", json=BODY, headers=KEYED)).json()
    path = f"/v1/payments/{charged['id']}/callbacks"

    async def delivered() -> Any:
        shown = (await client.get(path)).json()["callbacks"]
        return shown[0] if shown and shown[0]["state"] == "delivered" else None

    shown = await until(delivered)
    assert (shown["status"], shown["sequence"], shown["next_at"]) == ("SUCCESS", 2, None)
    assert shown["order_id"] == BODY["merchant_order_id"]
    first, second = shown["attempts"]
    assert (first["outcome"], first["status"], second["outcome"]) == (
        *("http_error", 500),
        "delivered",
    )
    assert (second["status"], second["answer"]) == (200, '{"ok":true}')
    assert first["started_at"] < second["started_at"] < shown["finished_at"]
    assert orders.findings() == []
    told = msgspec.json.decode(orders.requests[-1].body)
    assert (told["payment_id"], told["event_id"]) == (charged["id"], shown["event_id"])
    assert all(uuid.UUID(told[name]).version == 4 for name in ("payment_id", "event_id"))
    assert await gauge(client, 'payments_callback_attempts_total{outcome="delivered"}') == 1


async def test_an_order_that_was_refunded_and_charged_again_is_told_how_that_ended(
    client: httpx.AsyncClient, orders: OrderService, connection: psycopg.Connection[Any]
) -> None:
    """And of a charge that fails while the order has money it is not told."""

    async def charge(key: str, amount_cents: int) -> dict[str, Any]:
        body = BODY | {"amount_cents": amount_cents}
        answer = await client.post("/v1/charge", json=body, headers={"Idempotency-Key": key})
        assert answer.status_code == 201
        charged: dict[str, Any] = answer.json()
        return charged

    async def refund(payment: dict[str, Any], key: str, **amount: int) -> None:
        body = {"payment_id": payment["id"]} | amount
        answer = await client.post("/v1/refund", json=body, headers={"Idempotency-Key": key})
        assert answer.status_code == 201

    first = await charge("first", 1500)
    await refund(first, "a part", amount_cents=500)
    await until(lambda: is_followed(connection))
    kept = await charge("a part is still there", 1507)
    await until(lambda: is_followed(connection))
    await refund(first, "the rest")
    second = await charge("second", 1507)
    assert (kept["status"], second["status"]) == ("FAILED", "FAILED")
    await until(lambda: nothing_due(connection))
    report = check_callbacks(connection, received=orders.requests)
    assert report.states == {"delivered": 2, "excluded": 1, "superseded": 1}
    told = [(request.outcome, request.get("payment_id")) for request in orders.requests]
    assert told == [("SUCCESS", first["id"]), ("FAILED", second["id"])]


async def test_a_payment_that_is_not_there_has_no_callbacks(client: httpx.AsyncClient) -> None:
    assert (await client.get(f"/v1/payments/{uuid.uuid4()}/callbacks")).status_code == 404
    assert (await client.get("/v1/payments/x/callbacks")).status_code == 400


async def test_health_is_degraded_and_not_down_while_nobody_takes_callbacks(
    client: httpx.AsyncClient, orders: OrderService, service: Service
) -> None:
    assert (await client.get("/health")).json()["callbacks"] == "ok"
    orders.refuse()
    for number in range(6):
        headers = {"Idempotency-Key": f"k{number}"}
        body = BODY | {"merchant_order_id": str(uuid.uuid4())}
        assert (await client.post("/v1/charge", json=body, headers=headers)).status_code == 201

    async def degraded() -> bool:
        answer = await client.get("/health")
        assert (answer.status_code, answer.json()["ok"]) == (200, True)
        return bool(answer.json()["callbacks"] == "degraded")

    async def all_are_due() -> bool:
        return await gauge(client, "payments_callbacks_due") == 6

    await until(degraded)
    await until(all_are_due)
    assert await gauge(client, "payments_callbacks_oldest_age_seconds") > 0
    assert await gauge(client, 'payments_callback_breaker_state{state="closed"}') == 0
    await orders.listen()

    async def well() -> bool:
        return bool((await client.get("/health")).json()["callbacks"] == "ok")

    await until(well)
    await until(lambda: len(orders.requests) >= 6)


async def test_what_was_given_up_is_counted(
    client: httpx.AsyncClient, orders: OrderService
) -> None:
    orders.script(Fault("410"))
    assert await gauge(client, "payments_callbacks_dead") == 0
    assert (await client.post("/v1/charge", json=BODY, headers=KEYED)).status_code == 201

    async def counted() -> bool:
        return await gauge(client, "payments_callbacks_dead") == 1

    await until(counted)
    assert await gauge(client, "payments_callbacks_due") == 0


async def test_what_is_due_for_long_degrades_a_process_that_only_answers_as_well(
    address: DatabaseAddress, settings: Settings, connection: psycopg.Connection[Any]
) -> None:
    service = Service(settings, address)
    await service.start(work=False)
    try:
        append(connection, History("k").charged().facts)
        assert (await service.health.reach_database()).callbacks == "ok"
        connection.execute(
            "INSERT INTO callback_deliveries SELECT gen_random_uuid(), 1, gen_random_uuid(),"
            " gen_random_uuid(), 2, 'SUCCESS', 1, 'INR', now(), 'due', 0, now(),"
            " now() - interval '2 min'"
        )
        assert (await service.health.reach_database()).callbacks == "degraded"
    finally:
        await service.stop(1)


async def test_what_is_due_since_a_time_to_come_has_no_age(
    client: httpx.AsyncClient, orders: OrderService, connection: psycopg.Connection[Any]
) -> None:
    """The database's clock was ahead when it was written, and was set back."""
    orders.script(Fault("500", count=None))
    assert (await client.post("/v1/charge", json=BODY, headers=KEYED)).status_code == 201
    await until(lambda: is_followed(connection))
    connection.execute("UPDATE callback_deliveries SET due_since = now() + interval '1 h'")
    assert await gauge(client, "payments_callbacks_due") == 1
    assert await gauge(client, "payments_callbacks_oldest_age_seconds") == 0
    assert (await client.get("/health")).json()["callbacks"] == "ok"


async def test_without_an_address_nobody_is_called_back(
    address: DatabaseAddress, connection: psycopg.Connection[Any]
) -> None:
    service = Service(Settings(simulated_ledger=""), address)
    await service.start()
    try:
        append(connection, History("k").charged().facts)
        assert (await service.health.reach_database()).callbacks == "off"
        await service.health.observe()
    finally:
        await service.stop(1)
    found = connection.execute("SELECT name FROM followers ORDER BY name").fetchall()
    assert found == [("payments",), ("seals",)]


async def test_it_is_called_back_from_the_first_start_with_an_address_on(
    address: DatabaseAddress, settings: Settings, orders: OrderService, connection: Any
) -> None:
    append(connection, History("before", order_id=uuid.uuid4()).charged().facts)
    service = Service(settings, address)
    await service.start()
    try:
        after = History("after", order_id=uuid.uuid4()).charged()
        append(connection, after.facts)
        await until(lambda: orders.requests)
    finally:
        await service.stop(2)
    (request,) = orders.requests
    assert msgspec.json.decode(request.body)["payment_id"] == str(after.id)


async def test_an_address_that_can_never_work_stops_the_start(address: DatabaseAddress) -> None:
    url = parse_http_url("http://8.8.8.8/callback?token=canary")
    with pytest.raises(StartError, match="no loopback or private address") as stopped:
        await Service(Settings(simulated_ledger="", order_callback_url=url), address).start()
    assert "canary" not in str(stopped.value)
    assert "\n" not in str(stopped.value)


async def test_a_database_that_is_away_stops_the_start(settings: Settings) -> None:
    nowhere = DatabaseAddress(
        host="127.0.0.1", port=1, user="nobody", password=None, dbname="nothing"
    )
    with pytest.raises(StartError, match="does not respond"):
        await Service(settings, nowhere).start()


class TestWithKeys:
    @pytest.fixture
    def settings(self, orders: OrderService) -> Settings:
        def key(name: str) -> ApiKey:
            return ApiKey(name, hashlib.sha256(name.encode()).digest())

        return Settings(
            simulated_ledger="",
            order_callback_url=parse_http_url(orders.url),
            payments_api_keys=(key("shop"), key("other"), key("staff")),
        )

    async def test_callbacks_of_others_are_not_shown(self, client: httpx.AsyncClient) -> None:
        def of(name: str) -> dict[str, str]:
            return {"Authorization": f"Bearer {name}"}

        charged = await client.post("/v1/charge", json=BODY, headers=KEYED | of("shop"))
        path = f"/v1/payments/{charged.json()['id']}/callbacks"
        statuses = {
            name: (await client.get(path, headers=of(name))).status_code
            for name in ("shop", "staff", "other", "nobody")
        }
        assert statuses == {"shop": 200, "staff": 200, "other": 404, "nobody": 401}
