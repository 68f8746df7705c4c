"""POST /v1/refund as support and finance see it."""

import asyncio
import hashlib
from typing import Any
from uuid import UUID

import httpx
import msgspec
import psycopg
import pytest

from payments.clients import ApiKey
from payments.database.connections import DatabaseAddress
from payments.payment.identity import refund_id_for
from payments.service import Service
from payments.settings import Settings
from tests.doubles.gateway import ScriptedGateway, decline, no_answer
from tests.support import ORDER_ID, until
from tests.web.requests import BODY, charge, problem
from web.app import application, guarded

pytestmark = pytest.mark.anyio


async def refund(
    client: httpx.AsyncClient, payment_id: Any, key: str | None = None, **body: Any
) -> httpx.Response:
    headers = {} if key is None else {"Idempotency-Key": key}
    body = {"payment_id": str(payment_id)} | body
    return await client.post("/v1/refund", json=body, headers=headers)


async def charged(client: httpx.AsyncClient, amount_cents: int = 1500) -> str:
    response = await charge(client, amount_cents=amount_cents)
    return str(response.json()["id"])


async def test_the_whole_payment(client: httpx.AsyncClient) -> None:
    payment_id = await charged(client)
    response = await refund(client, payment_id)
    assert response.status_code == 201
    assert response.headers["content-type"] == "application/json"
    assert response.headers["location"] == f"/v1/payments/{payment_id}"
    assert "idempotent-replayed" not in response.headers
    answer = response.json()
    answer.pop("refund_id")
    assert answer == {
        "id": payment_id,
        "status": "REFUNDED",
        "amount_cents": 1500,
        "refunded_cents": 1500,
    }
    found = (await client.get(f"/v1/payments/{payment_id}")).json()
    assert (found["status"], found["refunded_cents"]) == ("REFUNDED", 1500)
    assert problem(await refund(client, payment_id)) == (409, "payment_already_refunded")


async def test_parts_add_up_and_each_has_its_own_answer(client: httpx.AsyncClient) -> None:
    payment_id = await charged(client)
    first = await refund(client, payment_id, "r1", amount_cents=500)
    second = await refund(client, payment_id.upper(), "r2", amount_cents=600)
    rest = await refund(client, payment_id, "r3")
    assert [each.json()["status"] for each in (first, second, rest)] == [
        "SUCCESS",
        "SUCCESS",
        "REFUNDED",
    ]
    assert [each.json()["amount_cents"] for each in (first, second, rest)] == [500, 600, 400]
    assert [each.json()["refunded_cents"] for each in (first, second, rest)] == [500, 1100, 1500]
    for key, amount, answered in (("r1", 500, first), ("r2", 600, second)):
        again = await refund(client, payment_id, key, amount_cents=amount)
        assert (again.status_code, again.content) == (201, answered.content)
        assert again.headers["idempotent-replayed"] == "true"
    assert (await refund(client, payment_id, "r3")).content == rest.content


async def test_a_replayed_charge_says_what_it_first_said(client: httpx.AsyncClient) -> None:
    first = await charge(client)
    await refund(client, first.json()["id"])
    again = await charge(client)
    assert (again.status_code, again.content) == (201, first.content)
    assert again.json()["status"] == "SUCCESS"


@pytest.mark.parametrize("body", [{"amount_cents": 1501}, {"amount_cents": 2147483647}])
async def test_more_than_is_left(client: httpx.AsyncClient, body: dict[str, Any]) -> None:
    response = await refund(client, await charged(client), "r1", **body)
    assert problem(response) == (409, "refund_exceeds_capture")


async def test_a_payment_that_was_not_captured(client: httpx.AsyncClient) -> None:
    response = await refund(client, await charged(client, 1507))
    assert problem(response) == (409, "payment_not_refundable")


async def test_a_key_that_meant_another_refund(client: httpx.AsyncClient) -> None:
    payment_id = await charged(client)
    await refund(client, payment_id, "r1", amount_cents=500)
    response = await refund(client, payment_id, "r1", amount_cents=501)
    assert problem(response) == (422, "idempotency_key_reused")
    assert [error["field"] for error in response.json()["errors"]] == ["amount_cents"]


async def test_an_amount_needs_a_key(
    client: httpx.AsyncClient, connection: psycopg.Connection[Any]
) -> None:
    payment_id = await charged(client)
    response = await refund(client, payment_id, amount_cents=500)
    assert problem(response) == (400, "invalid_idempotency_key")
    assert "a second time" in response.json()["detail"]
    assert connection.execute("SELECT count(*) FROM payment_events").fetchone() == (2,)


@pytest.mark.parametrize(
    "headers",
    [
        [("Idempotency-Key", "")],
        [("Idempotency-Key", "k" * 256)],
        [("Idempotency-Key", "ключ".encode())],
        [("Idempotency-Key", "a"), ("Idempotency-Key", "a")],
    ],
    ids=["empty", "too long", "not ASCII", "twice"],
)
@pytest.mark.parametrize("body", [{}, {"amount_cents": 5}])
async def test_bad_keys(client: httpx.AsyncClient, headers: Any, body: dict[str, Any]) -> None:
    body = {"payment_id": str(ORDER_ID)} | body
    response = await client.post("/v1/refund", json=body, headers=headers)
    assert problem(response) == (400, "invalid_idempotency_key")


@pytest.mark.parametrize(
    ("body", "fields"),
    [
        ({}, ["payment_id"]),
        ({"payment_id": None}, ["payment_id"]),
        ({"payment_id": "x", "amount_cents": 0}, ["payment_id", "amount_cents"]),
        ({"payment_id": f"{ORDER_ID}\n"}, ["payment_id"]),
        ({"payment_id": str(ORDER_ID).replace("-", "")}, ["payment_id"]),
        ({"payment_id": str(ORDER_ID), "amount_cents": None}, ["amount_cents"]),
        ({"payment_id": str(ORDER_ID), "amount_cents": -1}, ["amount_cents"]),
        ({"payment_id": str(ORDER_ID), "amount_cents": 2147483648}, ["amount_cents"]),
        ({"payment_id": str(ORDER_ID), "amount_cents": 10**40}, ["amount_cents"]),
        ({"payment_id": str(ORDER_ID), "amount_cents": 5.5}, ["amount_cents"]),
        ({"payment_id": str(ORDER_ID), "amount_cents": "5"}, ["amount_cents"]),
        ({"payment_id": str(ORDER_ID), "amount_cents": True}, ["amount_cents"]),
        ({"payment_id": str(ORDER_ID), "amount": 5, "reason": "x"}, ["amount", "reason"]),
    ],
)
async def test_bad_bodies(
    client: httpx.AsyncClient, body: dict[str, Any], fields: list[str]
) -> None:
    response = await client.post("/v1/refund", json=body, headers={"Idempotency-Key": "r"})
    assert problem(response) == (400, "invalid_request")
    assert [error["field"] for error in response.json()["errors"]] == fields
    assert all(error["message"] for error in response.json()["errors"])


async def test_not_json(client: httpx.AsyncClient) -> None:
    plain = {"Content-Type": "text/plain"}
    response = await client.post("/v1/refund", content=b"{}", headers=plain)
    assert problem(response) == (415, "unsupported_media_type")


async def test_an_orders_id_leads_to_its_payments(client: httpx.AsyncClient) -> None:
    assert problem(await refund(client, ORDER_ID)) == (404, "payment_not_found")
    payment_id = await charged(client)

    async def told() -> bool:
        response = await refund(client, ORDER_ID)
        assert problem(response) == (404, "payment_not_found")
        return f"{payment_id} (SUCCESS, 15.00 INR): use one" in response.json()["detail"]

    await until(told)


async def test_eight_at_once_give_back_three(client: httpx.AsyncClient) -> None:
    payment_id = await charged(client, 1000)
    answers = await asyncio.gather(
        *(refund(client, payment_id, f"r{number}", amount_cents=300) for number in range(8))
    )
    statuses = sorted(answer.status_code for answer in answers)
    assert statuses == [201] * 3 + [409] * 5
    given_back = [each.json()["refunded_cents"] for each in answers if each.status_code == 201]
    assert sorted(given_back) == [300, 600, 900]


async def test_a_refund_that_the_provider_refuses_or_does_not_answer(
    address: DatabaseAddress, connection: psycopg.Connection[Any]
) -> None:
    gateway = ScriptedGateway(refund_script=[decline, no_answer])
    service = Service(Settings(), address, gateways=[gateway])
    await service.start(work=False)
    try:
        transport = httpx.ASGITransport(guarded(application(service), service))  # type: ignore[arg-type]
        async with httpx.AsyncClient(transport=transport, base_url="http://payments") as client:
            payment_id = await charged(client)
            refused = await refund(client, payment_id, "r1", amount_cents=100)
            assert problem(refused) == (409, "refund_declined")
            open_refund = await refund(client, payment_id, "r2", amount_cents=200)
            assert open_refund.status_code == 202
            assert open_refund.headers["location"] == f"/v1/payments/{payment_id}"
            assert "idempotent-replayed" not in open_refund.headers
            payment = (await client.get(f"/v1/payments/{payment_id}")).json()
            assert open_refund.json() == {
                "id": payment_id,
                "status": payment["status"],
                "refund_id": open_refund.json()["refund_id"],
                "amount_cents": 200,
                "refunded_cents": 0,
            }
            assert payment["refunded_cents"] == 0
    finally:
        await service.stop(5)


class TestWithApiKeys:
    @pytest.fixture
    def settings(self, settings: Settings) -> Settings:
        keys = tuple(
            ApiKey(name, hashlib.sha256(f"{name}-key".encode()).digest())
            for name in ("shop", "other", "staff")
        )
        return msgspec.structs.replace(settings, payments_api_keys=keys)

    @staticmethod
    def headers(name: str | None, key: str) -> dict[str, str]:
        sent = {} if name is None else {"Authorization": f"Bearer {name}-key"}
        return sent | {"Idempotency-Key": key}

    async def test_own_payments_only_and_staff_refunds_all(self, client: httpx.AsyncClient) -> None:
        charged = await client.post("/v1/charge", json=BODY, headers=self.headers("shop", "k"))
        payment_id = charged.json()["id"]
        for name, status in (("other", 404), ("shop", 201), ("staff", 201), (None, 401)):
            response = await client.post(
                "/v1/refund",
                json={"payment_id": payment_id, "amount_cents": 100},
                headers=self.headers(name, f"r {name}"),
            )
            assert response.status_code == status
            if status == 201:
                expected = refund_id_for(UUID(payment_id), f"r {name}")
                assert response.json()["refund_id"] == str(expected)
