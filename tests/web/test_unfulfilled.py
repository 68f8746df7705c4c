"""GET /v1/unfulfilled, and the same in a payment's callbacks and the metrics."""

import hashlib
import time
from datetime import UTC, datetime, timedelta
from typing import Any

import httpx
import psycopg
import pytest

from payments.clients import ApiKey
from payments.http_url import parse_http_url
from payments.payment.state import Status
from payments.queries.payments import PaymentView
from payments.service import Service
from payments.settings import Settings
from tests.queries.rows import insert, insert_fulfilment, view
from tests.support import History, append, until
from tests.web.requests import gauge, problem

pytestmark = pytest.mark.anyio

Connection = psycopg.Connection[Any]

NOW = datetime.now(UTC)
PATH = "/v1/unfulfilled"
CLIENTS = ("shop", "other", "staff")


def row(
    connection: Connection, state: str, minutes: int = 0, client: str | None = None, **fields: Any
) -> PaymentView:
    payment = view(NOW, **fields)
    insert(connection, [payment], client)
    found_at = NOW - timedelta(minutes=minutes)
    insert_fulfilment(
        connection, payment, state, "failed", order_status="FAILED", found_at=found_at
    )
    return payment


async def test_the_list(client: httpx.AsyncClient, connection: Connection) -> None:
    nothing: dict[str, Any] = {"payments": [], "next_cursor": None, "order_status_asked": False}
    assert (await client.get(PATH)).json() == nothing
    twice, first = row(connection, "paid_twice", 1), row(connection, "unfulfilled", 2)
    given_back = row(connection, "given_back", 3, status=Status.REFUNDED)
    row(connection, "unfulfilled", 4, status=Status.REFUNDED)
    page = (await client.get(PATH, params={"limit": 1})).json()
    (shown,) = page["payments"]
    assert shown["payment_id"] == str(first.id)
    assert shown["order_id"] == str(first.merchant_order_id)
    assert (shown["amount_cents"], shown["currency"]) == (1500, "INR")
    assert (shown["state"], shown["said"]) == ("unfulfilled", "failed")
    assert (shown["order_status"], shown["checked_at"]) == ("FAILED", None)
    rest = (await client.get(PATH, params={"limit": 1, "cursor": page["next_cursor"]})).json()
    assert [each["payment_id"] for each in rest["payments"]] == [str(twice.id)]
    assert rest["next_cursor"] is None
    for query, found in (
        ({"state": "given_back"}, given_back),
        ({"state": "paid_twice"}, twice),
        ({"merchant_order_id": str(first.merchant_order_id)}, first),
    ):
        listed = (await client.get(PATH, params=query)).json()["payments"]
        assert [each["payment_id"] for each in listed] == [str(found.id)]


@pytest.mark.parametrize(
    ("query", "field"),
    [
        ("state=lost", "state"),
        ("state=", "state"),
        ("state=suspect&state=suspect", "state"),
        ("merchant_order_id=x", "merchant_order_id"),
        ("limit=201", "limit"),
        ("cursor=x", "cursor"),
        ("status=SUCCESS", "status"),
    ],
)
async def test_what_is_no_query(client: httpx.AsyncClient, query: str, field: str) -> None:
    response = await client.get(f"{PATH}?{query}")
    assert problem(response) == (400, "invalid_request")
    assert [error["field"] for error in response.json()["errors"]] == [field]


async def test_a_cursor_of_the_other_list(
    client: httpx.AsyncClient, service: Service, connection: Connection
) -> None:
    insert(connection, [view(NOW) for _ in range(2)])
    cursor = (await client.get("/v1/payments?limit=1")).json()["next_cursor"]
    assert problem(await client.get(f"{PATH}?cursor={cursor}")) == (400, "invalid_request")
    row(connection, "suspect")
    row(connection, "suspect")
    cursor = (await client.get(f"{PATH}?limit=1")).json()["next_cursor"]
    refused = await client.get(f"/v1/payments?cursor={cursor}")
    assert problem(refused) == (400, "invalid_request")


async def test_of_one_payment(client: httpx.AsyncClient, connection: Connection) -> None:
    history = History("k").charged()
    append(connection, history.facts)
    path = f"/v1/payments/{history.id}/callbacks"
    assert (await client.get(path)).json()["fulfilment"] is None
    # The follower writes the payment's row: not beside it.
    payment = view(NOW, id=history.id)
    insert_fulfilment(connection, payment, "unfulfilled", "failed", order_status="FAILED")

    async def fulfilment() -> Any:
        return (await client.get(path)).json()["fulfilment"]

    told = await until(fulfilment)
    assert list(told) == [
        *("state", "said", "order_status", "problem", "found_at", "checked_at", "given_back_at")
    ]
    assert (told["state"], told["order_status"]) == ("unfulfilled", "FAILED")


async def test_they_are_counted(client: httpx.AsyncClient, connection: Connection) -> None:
    states = ("suspect", "silent", "unfulfilled", "paid_twice")
    for state in states:
        assert await gauge(client, f'payments_unfulfilled{{state="{state}"}}') == 0
    row(connection, "unfulfilled", 10)
    row(connection, "unfulfilled", 20)
    row(connection, "suspect", 5)
    payment = view(NOW)
    insert(connection, [payment])
    insert_fulfilment(connection, payment, "suspect")
    found = [await gauge(client, f'payments_unfulfilled{{state="{state}"}}') for state in states]
    assert found == [1, 1, 2, 0]
    age_s = await gauge(client, 'payments_unfulfilled_oldest_age_seconds{state="unfulfilled"}')
    assert age_s - 1200 == pytest.approx(time.time() - NOW.timestamp(), abs=60)
    connection.execute("DELETE FROM fulfilments")
    assert await gauge(client, 'payments_unfulfilled{state="unfulfilled"}') == 0
    age = 'payments_unfulfilled_oldest_age_seconds{state="unfulfilled"}'
    assert await gauge(client, age) == 0


class TestWithKeys:
    @pytest.fixture
    def settings(self) -> Settings:
        keys = tuple(ApiKey(name, hashlib.sha256(name.encode()).digest()) for name in CLIENTS)
        return Settings(
            simulated_ledger="",
            payments_api_keys=keys,
            order_status_url=parse_http_url("http://127.0.0.1:1/{order_id}"),
        )

    async def test_a_client_sees_its_own(
        self, client: httpx.AsyncClient, connection: Connection
    ) -> None:
        for name in ("shop", "other", None):
            row(connection, "unfulfilled", client=name)

        async def seen(name: str) -> int:
            headers = {"Authorization": f"Bearer {name}"}
            page = (await client.get(PATH, headers=headers)).json()
            assert page["order_status_asked"]
            return len(page["payments"])

        assert [await seen(name) for name in CLIENTS] == [1, 1, 3]
        assert (await client.get(PATH)).status_code == 401
