"""Requests to the API, and what is read of its responses."""

import hashlib
import re
from typing import Any

import httpx
import psycopg

from payments.clients import ApiKey
from payments.service import Service
from tests.support import until

Connection = psycopg.Connection[Any]

ORDER = "f50d9fa2-5d3e-4e49-9a02-218ad32ef4a9"
BODY = {"merchant_order_id": ORDER, "amount_cents": 1500, "currency": "INR"}


async def charge(client: httpx.AsyncClient, key: str = "abc123", **changed: Any) -> httpx.Response:
    return await client.post("/v1/charge", json=BODY | changed, headers={"Idempotency-Key": key})


def problem(response: httpx.Response) -> tuple[int, str]:
    """Status and code of a problem answer, checked for its form."""
    assert response.headers["content-type"] == "application/problem+json"
    body = response.json()
    assert body["status"] == response.status_code
    assert body["type"] == f"urn:payments:problem:{body['code']}"
    assert body["title"]
    assert body["detail"]
    return response.status_code, body["code"]


async def gauge(client: httpx.AsyncClient, series: str) -> float:
    text = (await client.get("/metrics")).text
    match = re.search(rf"^{re.escape(series)} (\S+)$", text, re.MULTILINE)
    assert match, series
    return float(match[1])


async def caught_up(service: Service, connection: Connection) -> None:
    """Until everything in the log is in the tables."""

    def holds() -> bool:
        row = connection.execute(
            "SELECT position = (SELECT max(notification_id) FROM payment_events)"
            "  FROM followers WHERE name = 'payments'"
        ).fetchone()
        return row == (True,)

    await until(holds)


def key(client: str, secret: bytes) -> ApiKey:
    return ApiKey(client, hashlib.sha256(secret).digest())
