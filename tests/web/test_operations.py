"""What operators see of followers and open payments."""

import asyncio
import threading
import uuid
from collections import deque
from collections.abc import Callable
from functools import partial
from types import SimpleNamespace
from typing import Any

import httpx
import psycopg
import pytest

from payments.database.connections import DatabaseAddress, connect
from payments.gateways.breaker import FAILURES_MIN
from payments.gateways.simulated import SimulatedGateway, parse_faults
from payments.service import Service
from payments.settings import Settings
from payments.single_flight import Recent
from tests.lost_log import accept_loss, lose_after
from tests.support import History, append, until
from tests.web.requests import gauge
from web import operations

pytestmark = pytest.mark.anyio

BODY = {"merchant_order_id": "f50d9fa2-5d3e-4e49-9a02-218ad32ef4a9", "amount_cents": 1500}


@pytest.fixture
def settings() -> Settings:
    return Settings(simulated_ledger="", simulated_faults="answer_lost*1")


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


async def test_errors_are_counted_by_their_code(client: httpx.AsyncClient) -> None:
    text = (await client.get("/metrics")).text
    for code in ("payment_not_found", "internal_error", "too_busy", "database_unavailable"):
        assert f'http_problems_total{{code="{code}"}} 0.0' in text
    await client.get(f"/v1/payments/{uuid.uuid4()}")
    await client.get("/v1/payments/x")
    text = (await client.get("/metrics")).text
    assert 'http_problems_total{code="payment_not_found"} 1.0' in text
    assert 'http_problems_total{code="invalid_request"} 1.0' in text


async def test_metrics_answer_without_a_database(
    client: httpx.AsyncClient, service: Service
) -> None:
    await service.health._database.close()
    answer = await client.get("/metrics")
    assert answer.status_code == 200
    assert "payments_database_up 0.0" in answer.text
    assert "payments_pending " not in answer.text


async def test_metrics_are_rendered_once_in_a_while_for_all_who_ask_and_beside_the_loop(
    client: httpx.AsyncClient, service: Service, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(operations, "METRICS_AGE_S", 60.0)
    threads: list[threading.Thread] = []

    def rendering(render: Callable[[], bytes]) -> Callable[[], bytes]:
        def rendered() -> bytes:
            threads.append(threading.current_thread())
            return render()

        return rendered

    for name in ("exposition", "openmetrics"):
        recent: Recent[bytes] = getattr(service.health, name)
        render = rendering(getattr(service.telemetry, name))
        monkeypatch.setattr(recent, "_work", partial(service.health._rendered, render))
    for accept in ("text/plain", "application/openmetrics-text"):
        asked = [client.get("/metrics", headers={"Accept": accept}) for _ in range(5)]
        answers = [*await asyncio.gather(*asked), await client.get("/metrics")]
        assert len({answer.text for answer in answers[:5]}) == 1
    assert len(threads) == 2
    assert threading.main_thread() not in threads
    monkeypatch.setattr(operations, "METRICS_AGE_S", 0.0)
    await client.get("/metrics")
    assert len(threads) == 3


@pytest.mark.parametrize(
    ("accept", "media_type"),
    [
        (["application/json"], "application/json"),
        (["application/json;q=0"], "text/plain"),
        (["application/openmetrics-text;q=0, text/plain"], "text/plain"),
        (["text/plain;q=0.5", "application/openmetrics-text"], "application/openmetrics-text"),
        (["image/png"], "text/plain"),
    ],
)
async def test_metrics_are_given_as_they_are_wanted(
    client: httpx.AsyncClient, accept: list[str], media_type: str
) -> None:
    answer = await client.get("/metrics", headers=[("Accept", value) for value in accept])
    assert answer.status_code == 200
    assert answer.headers["content-type"].split(";")[0] == media_type


async def test_what_is_rendered_beside_the_loop_iterates_over_nothing_that_it_changes(
    client: httpx.AsyncClient, service: Service, monkeypatch: pytest.MonkeyPatch
) -> None:
    class Changing(deque[Any]):
        def __iter__(self) -> Any:
            raise AssertionError("iterated over")

    appender = service.appender
    monkeypatch.setattr(appender, "_waiting", Changing([SimpleNamespace(submitted_at=0.0)]))
    assert await gauge(client, "payments_append_backlog") == 1
    assert await gauge(client, "payments_append_oldest_age_seconds") > 1
    appender._waiting.clear()
    assert await gauge(client, "payments_append_oldest_age_seconds") == 0


async def test_health_of_a_database_that_refuses_to_write(
    client: httpx.AsyncClient, connection: psycopg.Connection[Any], address: DatabaseAddress
) -> None:
    """A standby, or one that was set so: it answers every question, and takes no charge."""
    set_to = f'ALTER DATABASE "{address.dbname}" SET default_transaction_read_only = on'
    connection.execute(set_to.encode())
    connection.execute(
        "SELECT pg_terminate_backend(pid) FROM pg_stat_activity"
        " WHERE datname = current_database() AND pid <> pg_backend_pid()"
    )

    async def refused() -> dict[str, Any] | None:
        health = await client.get("/health")
        read_only = health.json()["database"] == "read_only"
        return health.json() if health.status_code == 503 and read_only else None

    health = await until(refused)
    assert health["ok"] is False
    connection.execute(f'ALTER DATABASE "{address.dbname}" RESET ALL'.encode())
    connection.execute(
        "SELECT pg_terminate_backend(pid) FROM pg_stat_activity"
        " WHERE datname = current_database() AND pid <> pg_backend_pid()"
    )

    async def recovered() -> bool:
        return (await client.get("/health")).status_code == 200

    await until(recovered)


async def test_health_while_a_provider_is_down(client: httpx.AsyncClient, service: Service) -> None:
    """Charges get 503; a load balancer must not take the process for dead."""
    breaker = 'payments_gateway_breaker_open{gateway="simulated"}'
    assert (await client.get("/health")).json()["gateways_down"] == []
    assert await gauge(client, breaker) == 0
    await client.post("/v1/charge", json=BODY, headers={"Idempotency-Key": "lost"})
    (gateway,) = service.gateways
    assert isinstance(gateway._gateway, SimulatedGateway)
    gateway._gateway._faults = parse_faults(f"charge:down*{FAILURES_MIN}")
    for number in range(FAILURES_MIN):
        headers = {"Idempotency-Key": f"down-{number}"}
        assert (await client.post("/v1/charge", json=BODY, headers=headers)).status_code == 503
    health = await client.get("/health")
    assert (health.status_code, health.json()["gateways_down"]) == (200, ["simulated"])
    assert await gauge(client, breaker) == 1


async def test_open_payments_of_a_provider_that_is_not_configured(
    client: httpx.AsyncClient, service: Service, connection: psycopg.Connection[Any]
) -> None:
    """They are counted once settling has told of them, and 0 once they are gone."""
    history = History("k", gateway="former")
    await asyncio.to_thread(append, connection, history.facts)
    shown = 'payments_unsettled_unconfigured{gateway="former"}'

    async def counted() -> bool:
        text = (await client.get("/metrics")).text
        return f"\n{shown} 1.0\n" in text

    await until(counted)
    connection.execute("DELETE FROM unsettled_payments")

    async def gone() -> bool:
        return await gauge(client, shown) == 0

    await until(gone)


async def test_a_log_that_went_back(
    client: httpx.AsyncClient, connection: psycopg.Connection[Any]
) -> None:
    """Refunds are refused, charges and health go on; a person's word ends it."""
    await client.post("/v1/charge", json=BODY, headers={"Idempotency-Key": "a"})  # answer lost
    paid = await client.post("/v1/charge", json=BODY, headers={"Idempotency-Key": "b"})
    assert paid.status_code == 201
    # In a thread: a follower of this loop may hold its row.
    await asyncio.to_thread(lose_after, connection, 1)
    refused = await client.post("/v1/refund", json={"payment_id": paid.json()["id"]})
    assert (refused.status_code, refused.json()["code"]) == (503, "log_rewound")
    assert refused.headers["retry-after"] == "60"
    health = await client.get("/health")
    assert (health.status_code, health.json()["log"]) == (200, "rewound")
    assert await gauge(client, "payments_log_rewound") == 1
    charged = await client.post("/v1/charge", json=BODY, headers={"Idempotency-Key": "c"})
    assert charged.status_code == 201
    accept_loss(connection)
    refund = {"payment_id": charged.json()["id"]}
    assert (await client.post("/v1/refund", json=refund)).status_code == 201
    assert (await client.get("/health")).json()["log"] == "ok"
    assert await gauge(client, "payments_log_rewound") == 0


async def test_clocks_and_standbys(
    client: httpx.AsyncClient, connection: psycopg.Connection[Any]
) -> None:
    append(connection, History("k").facts)
    connection.execute("ALTER TABLE payment_events DISABLE TRIGGER ALL")
    connection.execute("UPDATE payment_events SET recorded_at = now() + interval '1 hour'")
    assert 3500 < await gauge(client, "payments_log_ahead_seconds") <= 3600
    assert await gauge(client, "payments_clock_skew_seconds") == 0
    assert await gauge(client, 'payments_database_standbys{kind="asynchronous"}') == 0
    assert await gauge(client, 'payments_follower_lag_seconds{follower="payments"}') == 0
    unsettled = 'payments_unsettled_oldest_age_seconds{kind="charge"}'
    await until(lambda: connection.execute("SELECT FROM unsettled_payments").fetchall())
    connection.execute("UPDATE unsettled_payments SET since = now() + interval '1 hour'")
    assert await gauge(client, unsettled) == 0


async def test_what_holds_the_database_up(
    client: httpx.AsyncClient, connection: psycopg.Connection[Any], address: DatabaseAddress
) -> None:
    assert await gauge(client, "payments_database_notification_queue_ratio") == 0
    assert await gauge(client, "payments_database_horizon_age_seconds") < 1
    with connect(address, "somebody") as holder:
        holder.execute("BEGIN ISOLATION LEVEL REPEATABLE READ; SELECT 1")
        await asyncio.sleep(1.1)  # a rendering is shared for a second
        assert await gauge(client, "payments_database_horizon_age_seconds") > 1
