"""The HTTP contract: statuses, headers and bodies, as Order Service and support see them."""

import asyncio
import gzip
import hashlib
import json
import re
from typing import Any

import httpx
import msgspec
import psycopg
import pytest

from payments.clients import ApiKey
from payments.payment.identity import payment_id_for
from payments.service import Service
from payments.settings import Settings
from tests.events.commits import lock_held
from tests.support import until
from tests.web.requests import BODY, ORDER, charge, problem

pytestmark = pytest.mark.anyio


async def test_the_documented_charge(client: httpx.AsyncClient) -> None:
    response = await charge(client)
    assert response.status_code == 201
    assert response.headers["content-type"] == "application/json"
    assert "idempotent-replayed" not in response.headers
    payment_id = "058c9593-e150-402f-ab5b-37dd4c9816f0"
    assert response.headers["location"] == f"/v1/payments/{payment_id}"
    assert response.json() == {
        "id": payment_id,
        "merchant_order_id": ORDER,
        "provider_txn_id": f"sim_{payment_id.replace('-', '')}",
        "status": "SUCCESS",
        "amount_cents": 1500,
        "currency": "INR",
    }


async def test_a_replay_has_the_same_body_and_says_so(client: httpx.AsyncClient) -> None:
    first, again = await charge(client), await charge(client)
    assert (again.status_code, again.content) == (201, first.content)
    assert again.headers["idempotent-replayed"] == "true"


async def test_an_omitted_currency_is_inr(client: httpx.AsyncClient) -> None:
    await charge(client)
    body = {"merchant_order_id": ORDER.upper(), "amount_cents": 1500}
    again = await client.post("/v1/charge", json=body, headers={"Idempotency-Key": "abc123"})
    assert (again.status_code, again.headers["idempotent-replayed"]) == (201, "true")


async def test_a_declined_payment_is_an_outcome(client: httpx.AsyncClient) -> None:
    response = await charge(client, amount_cents=1507)
    assert response.status_code == 201
    assert (response.json()["status"], response.json()["provider_txn_id"]) == ("FAILED", None)


async def test_how_long_the_seats_are_held_is_on_record(client: httpx.AsyncClient) -> None:
    """In UTC, and to the microsecond; what a repetition says does not count."""
    held = await charge(client, hold_until="2126-01-31T20:00:00.1234567+05:30")
    again = await charge(client, hold_until=None)
    assert [each.status_code for each in (held, again)] == [201, 201]
    assert again.headers["idempotent-replayed"] == "true"
    events = (await client.get(f"{held.headers['location']}/events")).json()["events"]
    assert events[0]["data"]["hold_until"] == "2126-01-31T14:30:00.123456Z"
    payment_id = (await charge(client, "without")).json()["id"]
    events = (await client.get(f"/v1/payments/{payment_id}/events")).json()["events"]
    assert "hold_until" not in events[0]["data"]


@pytest.mark.parametrize(
    ("until", "message"),
    [
        ("2026-01-31T18:30:00", "must be a time with its offset from UTC"),
        ("2026-02-31T18:30:00Z", "must be a time with its offset from UTC"),
        ("2126-01-31T18:30:00Z\n", "must be a time with its offset from UTC"),
        ("9999-12-31T23:59:59-01:00", "must be a time with its offset from UTC"),
        ("2026-01-31T18:30:00Z", "must be at least 13.5 s from now"),
        ("0001-01-01T00:00:00Z", "must be at least 13.5 s from now"),
    ],
)
async def test_a_hold_that_is_none(client: httpx.AsyncClient, until: str, message: str) -> None:
    """With a new key: what was charged before is answered."""
    refused = await charge(client, hold_until=until)
    assert problem(refused) == (400, "invalid_request")
    (error,) = refused.json()["errors"]
    assert error["field"] == "hold_until"
    assert message in error["message"]
    assert (await charge(client)).status_code == 201
    if "at least" in message:
        known = await charge(client, hold_until=until)
        assert (known.status_code, known.headers["idempotent-replayed"]) == (201, "true")


async def test_another_request_with_the_key(client: httpx.AsyncClient) -> None:
    await charge(client)
    response = await charge(client, amount_cents=1501)
    assert problem(response) == (422, "idempotency_key_reused")
    assert [error["field"] for error in response.json()["errors"]] == ["amount_cents"]


@pytest.mark.parametrize("settings", [Settings(simulated_ledger="", second_charge="refuse")])
async def test_a_second_charge_of_a_paid_order_is_refused_if_that_is_set(
    client: httpx.AsyncClient,
) -> None:
    """Its key is not used up; the first one has its answer as ever."""
    first = await charge(client)
    refused = await charge(client, "def456")
    assert problem(refused) == (409, "order_already_paid")
    assert first.json()["id"] in refused.json()["detail"]
    assert (await charge(client)).headers["idempotent-replayed"] == "true"
    await client.post("/v1/refund", json={"payment_id": first.json()["id"]})
    assert (await charge(client, "def456")).status_code == 201


async def test_a_payment_can_be_read_the_instant_it_is_answered(client: httpx.AsyncClient) -> None:
    payment_id = (await charge(client)).json()["id"]
    response = await client.get(f"/v1/payments/{payment_id.upper()}")
    assert response.status_code == 200
    found = response.json()
    times = {found.pop("created_at"), found.pop("updated_at")}
    assert all(re.fullmatch(r"\d{4}-\d\d-\d\dT\d\d:\d\d:\d\d(\.\d+)?Z", time) for time in times)
    assert found == {
        "id": payment_id,
        "merchant_order_id": ORDER,
        "idempotency_key": "abc123",
        "amount_cents": 1500,
        "currency": "INR",
        "status": "SUCCESS",
        "provider_txn_id": f"sim_{payment_id.replace('-', '')}",
        "refunded_cents": 0,
    }


async def test_unknown_payment(client: httpx.AsyncClient) -> None:
    assert problem(await client.get(f"/v1/payments/{ORDER}")) == (404, "payment_not_found")


@pytest.mark.parametrize(
    "payment_id",
    [
        "abc",
        ORDER.replace("-", ""),
        f"{{{ORDER}}}",
        f"urn:uuid:{ORDER}",
        ORDER[:-1] + "９",
        ORDER + "%0A",
        "%00",
    ],
)
async def test_odd_payment_ids(client: httpx.AsyncClient, payment_id: str) -> None:
    assert problem(await client.get(f"/v1/payments/{payment_id}")) == (400, "invalid_request")


@pytest.mark.parametrize(
    "headers",
    [
        [],
        [("Idempotency-Key", "")],
        [("Idempotency-Key", "k" * 256)],
        [("Idempotency-Key", "ключ".encode())],
        [("Idempotency-Key", "a\tb")],
        [("Idempotency-Key", "a"), ("Idempotency-Key", "a")],
    ],
    ids=["none", "empty", "too long", "not ASCII", "not printable", "twice"],
)
async def test_bad_keys(
    client: httpx.AsyncClient, headers: Any, connection: psycopg.Connection[Any]
) -> None:
    response = await client.post("/v1/charge", json=BODY, headers=headers)
    assert problem(response) == (400, "invalid_idempotency_key")
    assert connection.execute("SELECT count(*) FROM payment_events").fetchone() == (0,)


@pytest.mark.parametrize("key", ["k", "k" * 255, "a b~!\"#$%&'()*+,-./:;<=>?@[\\]^_`{|}"])
async def test_good_keys(client: httpx.AsyncClient, key: str) -> None:
    response = await charge(client, key)
    assert response.status_code == 201
    assert response.json()["id"] == str(payment_id_for(key))


async def test_a_refused_body_does_not_use_up_the_key(client: httpx.AsyncClient) -> None:
    refused = await charge(client, amount_cents=0, currency="inr", extra=1)
    assert problem(refused) == (400, "invalid_request")
    assert [error["field"] for error in refused.json()["errors"]] == [
        "amount_cents",
        "currency",
        "extra",
    ]
    assert (await charge(client)).status_code == 201


@pytest.mark.parametrize(
    ("content", "content_type", "expected"),
    [
        (b'{"amount_cents": \xff}', "application/json", (400, "invalid_request")),
        (b"[" * 15_000, "application/json", (400, "invalid_request")),
        (b"[" * 100_000, "application/json", (413, "body_too_large")),
        (b"", "application/json", (400, "invalid_request")),
        (b"{}", "text/plain", (415, "unsupported_media_type")),
        (b"{}", "", (415, "unsupported_media_type")),
        (b'{"a": 1, "a": 2}', "application/json; charset=utf-8", (400, "invalid_request")),
    ],
)
async def test_malformed_bodies(
    client: httpx.AsyncClient, content: bytes, content_type: str, expected: tuple[int, str]
) -> None:
    headers = {"Idempotency-Key": "abc123", "Content-Type": content_type}
    assert problem(await client.post("/v1/charge", content=content, headers=headers)) == expected
    assert (await charge(client)).status_code == 201


async def test_other_paths_and_methods(client: httpx.AsyncClient) -> None:
    assert problem(await client.get("/v1/nothing")) == (404, "not_found")
    response = await client.get("/v1/charge")
    assert problem(response) == (405, "method_not_allowed")
    assert "POST" in response.headers["allow"]


async def test_request_ids_are_kept_or_made(
    client: httpx.AsyncClient, connection: psycopg.Connection[Any]
) -> None:
    given = await client.get("/health/live", headers={"X-Request-ID": "order-7/a"})
    assert given.headers["x-request-id"] == "order-7/a"
    for harmful in ("a b", "x" * 129, 'a"b'):
        made = await client.get("/health/live", headers={"X-Request-ID": harmful})
        assert re.fullmatch(r"[0-9a-f]{32}", made.headers["x-request-id"])


@pytest.mark.parametrize("path", ["/v1/charge", "/v1/refund"])
async def test_a_compressed_body_is_refused_for_what_it_is(
    client: httpx.AsyncClient, path: str
) -> None:
    headers = {"Content-Type": "application/json", "Idempotency-Key": "k"}
    body = gzip.compress(json.dumps(BODY).encode())
    refused = await client.post(path, content=body, headers=headers | {"Content-Encoding": "gzip"})
    assert problem(refused) == (415, "unsupported_media_type")
    assert "Content-Encoding" in refused.json()["detail"]
    assert refused.headers["accept-encoding"] == "identity"
    assert refused.headers["accept"] == "application/json"
    if path == "/v1/charge":
        plain = json.dumps(BODY).encode()
        taken = await client.post(
            path, content=plain, headers=headers | {"Content-Encoding": "identity"}
        )
        assert taken.status_code == 201


async def test_an_amount_with_a_point_is_the_same_amount(client: httpx.AsyncClient) -> None:
    """To JSON Schema, and to clients in languages without integers."""
    headers = {"Content-Type": "application/json", "Idempotency-Key": "k"}
    first = await client.post("/v1/charge", json=BODY, headers=headers)
    body = json.dumps(BODY).replace("1500", "1500.0").encode()
    again = await client.post("/v1/charge", content=body, headers=headers)
    assert (again.status_code, again.headers["idempotent-replayed"]) == (201, "true")
    assert again.content == first.content


async def test_the_request_is_on_record_in_the_events(
    client: httpx.AsyncClient, connection: psycopg.Connection[Any]
) -> None:
    trace = "00-0af7651916cd43dd8448eb211c80319c-b7ad6b7169203331-01"
    headers = {"Idempotency-Key": "k", "X-Request-ID": "r-1", "traceparent": trace}
    await client.post("/v1/charge", json=BODY, headers=headers)
    rows = connection.execute(
        "SELECT data ->> 'request_id', data ->> 'traceparent', data ->> 'client'"
        " FROM payment_event_log"
    ).fetchall()
    assert rows == [("r-1", trace, "default")] * 2


async def test_a_bug_is_a_500_that_names_its_request_and_tells_nothing(
    client: httpx.AsyncClient,
    service: Service,
    monkeypatch: pytest.MonkeyPatch,
    capfd: pytest.CaptureFixture[str],
) -> None:
    async def fail(command: object) -> None:
        raise RuntimeError("canary")

    monkeypatch.setattr(service.charging, "charge", fail)
    response = await charge(client)
    assert problem(response) == (500, "internal_error")
    assert "canary" not in response.text
    request_id = response.headers["x-request-id"]
    assert request_id in response.json()["detail"]


async def test_health_and_metrics(client: httpx.AsyncClient) -> None:
    await charge(client)
    health = await client.get("/health")
    assert health.status_code == 200
    assert health.json() == {
        "ok": True,
        "service": "payment-service",
        "database": "ok",
        "event_store": "ok",
        "log": "ok",
        "callbacks": "off",
        "gateways_down": [],
    }
    assert (await client.get("/health/live")).json()["ok"] is True
    metrics = await client.get("/metrics")
    assert metrics.headers["content-type"].startswith("text/plain; version=0.0.4")
    assert 'payments_charges_total{outcome="success"} 1.0' in metrics.text
    assert 'route="/v1/charge",status="201"} 1.0' in metrics.text


async def test_health_when_nothing_can_be_appended(
    client: httpx.AsyncClient, connection: psycopg.Connection[Any]
) -> None:
    async def stalled() -> httpx.Response | None:
        health = await client.get("/health")
        return health if health.status_code == 503 else None

    with lock_held(connection):
        assert problem(await charge(client)) == (503, "database_unavailable")
        stuck = asyncio.create_task(charge(client, "other"))
        health = await until(stalled)
    await stuck
    assert health.json()["event_store"] == "stalled"
    assert (await client.get("/health")).status_code == 200


async def test_series_do_not_grow_with_the_paths(
    client: httpx.AsyncClient, service: Service
) -> None:
    async def series() -> int:
        return (await client.get("/metrics")).text.count("http_requests_total{")

    for path in ("/v1/payments/x", "/nothing", "/metrics"):
        await client.get(path)
    before = await series()
    for number in range(50):
        await client.get(f"/v1/payments/{number}")
        await client.get(f"/nothing/{number}")
        await client.request(f"M{number}", f"/v1/{number}")
    assert await series() <= before + 2  # at the most the two for odd methods


class TestWithApiKeys:
    @pytest.fixture
    def settings(self, settings: Settings) -> Settings:
        keys = tuple(
            ApiKey(name, hashlib.sha256(f"{name}-key".encode()).digest())
            for name in ("orders", "other", "staff")
        )
        return msgspec.structs.replace(settings, payments_api_keys=keys)

    @staticmethod
    def key(name: str) -> dict[str, str]:
        return {"Authorization": f"Bearer {name}-key"}

    async def charged(self, client: httpx.AsyncClient, name: str) -> httpx.Response:
        headers = {"Idempotency-Key": "k"} | self.key(name)
        return await client.post("/v1/charge", json=BODY, headers=headers)

    async def test_without_a_key(self, client: httpx.AsyncClient) -> None:
        for response in (await charge(client), await client.get(f"/v1/payments/{ORDER}")):
            assert problem(response) == (401, "unauthorized")
            assert response.headers["www-authenticate"].startswith("Bearer")
        assert (await client.get("/health")).status_code == 200
        assert (await client.get("/metrics")).status_code == 200

    async def test_own_payments_only_and_staff_reads_all(self, client: httpx.AsyncClient) -> None:
        payment_id = (await self.charged(client, "orders")).json()["id"]
        for name, status in (("orders", 200), ("other", 404), ("staff", 200)):
            response = await client.get(f"/v1/payments/{payment_id}", headers=self.key(name))
            assert response.status_code == status

    async def test_another_clients_key(self, client: httpx.AsyncClient) -> None:
        await self.charged(client, "orders")
        assert problem(await self.charged(client, "other")) == (422, "idempotency_key_reused")
