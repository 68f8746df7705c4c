"""What operators see of followers and open payments."""

import re
import uuid

import httpx
import pytest

from payments.service import Service
from payments.settings import Settings
from tests.support import until

pytestmark = pytest.mark.anyio

BODY = {"merchant_order_id": "f50d9fa2-5d3e-4e49-9a02-218ad32ef4a9", "amount_cents": 1500}


@pytest.fixture
def settings() -> Settings:
    return Settings(simulated_ledger="", simulated_faults="answer_lost*1")


async def gauge(client: httpx.AsyncClient, series: str) -> float:
    text = (await client.get("/metrics")).text
    match = re.search(rf"^{re.escape(series)} (\S+)$", text, re.MULTILINE)
    assert match, series
    return float(match[1])


async def test_gauges_show_what_is_open_and_how_far_the_read_model_is(
    client: httpx.AsyncClient, service: Service
) -> None:
    lag = 'payments_follower_lag_events{follower="payments"}'
    assert await gauge(client, lag) == 0
    answer = await client.post("/v1/charge", json=BODY, headers={"Idempotency-Key": "k"})
    assert answer.status_code == 202
    opened = 'payments_unsettled{kind="charge"}'

    async def shown() -> bool:
        return await gauge(client, opened) == 1

    await until(shown)
    assert await gauge(client, lag) == 0
    assert 0 <= await gauge(client, 'payments_unsettled_oldest_age_seconds{kind="charge"}') < 10
    assert await gauge(client, 'payments_unsettled{kind="refund"}') == 0
    assert await gauge(client, 'payments_follower_applied_events_total{follower="payments"}') == 1
    await service.followers[0].stop()
    await client.post("/v1/charge", json=BODY, headers={"Idempotency-Key": "l"})
    assert await gauge(client, lag) == 2


async def test_what_is_documented_is_counted_from_0_on(client: httpx.AsyncClient) -> None:
    """Prometheus sees no increase in a series that begins above 0."""
    text = (await client.get("/metrics")).text
    for method, route, status in (
        ("POST", "/v1/charge", 201),
        ("POST", "/v1/charge", 500),
        ("POST", "/v1/charge", 503),
        ("POST", "/v1/refund", 409),
        ("GET", "/v1/payments/{payment_id}", 404),
        ("GET", "/health", 503),
    ):
        labels = f'method="{method}",route="{route}",status="{status}"'
        assert f"http_requests_total{{{labels}}} 0.0" in text, labels
    before = text.count("\nhttp_requests_total{")
    await client.get(f"/v1/payments/{uuid.uuid4()}")
    await client.get("/v1/payments")
    await client.get("/health")
    after = (await client.get("/metrics")).text
    assert after.count("\nhttp_requests_total{") == before
    counted = 'method="GET",route="/v1/payments/{payment_id}",status="404"'
    assert f"http_requests_total{{{counted}}} 1.0" in after


async def test_metrics_answer_without_a_database(
    client: httpx.AsyncClient, service: Service
) -> None:
    await service.database.close()
    assert (await client.get("/metrics")).status_code == 200
