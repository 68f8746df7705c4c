"""Reading over HTTP: one payment, its events, the list, and whose they are."""

import asyncio
import hashlib
import re
import uuid

import httpx
import msgspec
import pytest

from payments.clients import ApiKey
from payments.database.connections import READ_TIMEOUT_S, DatabaseAddress
from payments.service import Service
from payments.settings import Settings
from tests.machine import within
from tests.queries.conftest import FreezingProxy
from tests.queries.rows import insert, view
from tests.support import ORDER_ID, History, append, append_stored, stored_event, until
from tests.web.requests import Connection, caught_up, charge, problem
from web.app import application, guarded

pytestmark = pytest.mark.anyio


TIME = re.compile(r"\d{4}-\d\d-\d\dT\d\d:\d\d:\d\d(\.\d+)?Z")


async def test_events(client: httpx.AsyncClient) -> None:
    payment_id = (await charge(client)).json()["id"]
    response = await client.get(f"/v1/payments/{payment_id}/events")
    assert response.status_code == 200
    assert response.headers["content-type"] == "application/json"
    begun, done = response.json()["events"]
    assert (begun["position"], begun["version"], begun["type"]) == (1, 1, "PaymentInitiated")
    assert (done["position"], done["version"], done["type"]) == (2, 2, "PaymentCharged")
    assert begun["data"]["idempotency_key"] == "abc123"
    assert done["data"]["payment_id"] == payment_id
    assert TIME.fullmatch(begun["recorded_at"])


async def test_a_damaged_payment_is_a_503_and_its_events_are_shown(
    client: httpx.AsyncClient, connection: Connection
) -> None:
    good, bad = History("good").charged(), History("bad")
    append(connection, [*good.facts, *bad.facts])
    append_stored(connection, [stored_event(bad.id, 2, b"\xff")])
    unreadable, fine = await asyncio.gather(
        client.get(f"/v1/payments/{bad.id}"), client.get(f"/v1/payments/{good.id}")
    )
    assert problem(unreadable) == (503, "payment_unreadable")
    assert fine.status_code == 200
    events = (await client.get(f"/v1/payments/{bad.id}/events")).json()["events"]
    assert [event["data"] is None for event in events] == [False, True]


async def test_the_list(
    client: httpx.AsyncClient, service: Service, connection: Connection
) -> None:
    assert (await client.get("/v1/payments")).json() == {
        "payments": [],
        "next_cursor": None,
        "position": 0,
    }
    ids = [(await charge(client, f"k{number}")).json()["id"] for number in range(5)]
    await caught_up(service, connection)
    first = await client.get("/v1/payments", params={"limit": 3})
    assert first.headers["content-type"] == "application/json"
    rest = await client.get(
        "/v1/payments", params={"limit": 3, "cursor": first.json()["next_cursor"]}
    )
    assert first.json()["position"] == rest.json()["position"] == 10
    assert rest.json()["next_cursor"] is None
    listed = first.json()["payments"] + rest.json()["payments"]
    assert [payment["id"] for payment in listed] == ids[::-1]
    for payment in listed:  # the list and the single read say the same, field for field
        single = await client.get(f"/v1/payments/{payment['id']}")
        assert single.json() == payment


async def test_the_list_can_be_narrowed(
    client: httpx.AsyncClient, service: Service, connection: Connection
) -> None:
    await charge(client, "k1")
    declined = (await charge(client, "k2", amount_cents=1507, currency="USD")).json()
    await caught_up(service, connection)
    for query in (
        {"status": "FAILED"},
        {"currency": "USD"},
        {"status": "FAILED", "currency": "USD", "merchant_order_id": str(ORDER_ID)},
    ):
        payments = (await client.get("/v1/payments", params=query)).json()["payments"]
        assert [payment["id"] for payment in payments] == [declined["id"]]
    for query in ({"currency": "JPY"}, {"created_until": "2020-01-01T00:00:00Z"}):
        assert (await client.get("/v1/payments", params=query)).json()["payments"] == []


async def test_a_wrong_query_names_everything_that_is_wrong(client: httpx.AsyncClient) -> None:
    response = await client.get(
        "/v1/payments?limit=0&page=2&created_from=2026-01-01T00:00:00+01:00"
    )
    assert problem(response) == (400, "invalid_request")
    fields = [error["field"] for error in response.json()["errors"]]
    assert fields == ["limit", "page", "created_from"]
    assert "%2B" in response.text


@pytest.mark.parametrize("path", ["/v1/payments/{}", "/v1/payments/{}/events"])
async def test_an_orders_id_leads_to_its_payments(
    client: httpx.AsyncClient, service: Service, connection: Connection, path: str
) -> None:
    unknown = await client.get(path.format(ORDER_ID))
    assert problem(unknown) == (404, "payment_not_found")
    assert unknown.json()["detail"] == f"Payment {ORDER_ID} does not exist."
    payment_id = (await charge(client)).json()["id"]
    await caught_up(service, connection)
    response = await client.get(path.format(ORDER_ID))
    assert problem(response) == (404, "payment_not_found")
    assert f"{payment_id} (SUCCESS, 15.00 INR): use one of" in response.json()["detail"]


@pytest.mark.parametrize("odd", ["abc", str(ORDER_ID).replace("-", ""), f"{ORDER_ID}%0A"])
async def test_odd_ids(client: httpx.AsyncClient, odd: str) -> None:
    for path in (f"/v1/payments/{odd}", f"/v1/payments/{odd}/events"):
        assert problem(await client.get(path)) == (400, "invalid_request")


async def test_nothing_is_read_with_another_method(client: httpx.AsyncClient) -> None:
    for path in ("/v1/payments", f"/v1/payments/{ORDER_ID}", f"/v1/payments/{ORDER_ID}/events"):
        for method in ("POST", "PUT", "DELETE"):
            assert problem(await client.request(method, path)) == (405, "method_not_allowed")


async def test_reads_while_the_database_is_frozen(
    address: DatabaseAddress, settings: Settings, connection: Connection
) -> None:
    """Every kind of read is a 503 with Retry-After in under 3 s, and goes on by itself."""
    history = History("k").charged()
    append(connection, history.facts)
    async with FreezingProxy(address) as proxy:
        service = Service(settings, proxy.address)
        await service.start(work=False)
        try:
            transport = httpx.ASGITransport(guarded(application(service), service))  # type: ignore[arg-type]
            async with httpx.AsyncClient(transport=transport, base_url="http://payments") as client:
                one = f"/v1/payments/{history.id}"
                assert (await client.get(one)).status_code == 200
                proxy.running.clear()
                paths = [one, f"/v1/payments/{uuid.uuid4()}", f"{one}/events", "/v1/payments"] * 10
                with within(READ_TIMEOUT_S + 0.5):
                    answers = await asyncio.gather(*(client.get(path) for path in paths))
                for answer in answers:
                    assert problem(answer) == (503, "database_unavailable")
                    assert answer.headers["retry-after"] == "1"
                proxy.running.set()

                async def reads_again() -> bool:
                    return (await client.get(one)).status_code == 200

                await until(reads_again)
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
    def key(name: str) -> dict[str, str]:
        return {"Authorization": f"Bearer {name}-key"}

    async def test_without_a_key(self, client: httpx.AsyncClient) -> None:
        for path in ("", f"/{ORDER_ID}", f"/{ORDER_ID}/events", "?limit=0", "/x"):
            assert problem(await client.get(f"/v1/payments{path}")) == (401, "unauthorized")

    @pytest.mark.parametrize(("name", "status"), [("shop", 200), ("other", 404), ("staff", 200)])
    async def test_own_payments_only(
        self, client: httpx.AsyncClient, connection: Connection, name: str, status: int
    ) -> None:
        history = History("k", client="shop").charged()
        append(connection, history.facts)
        for path in (f"/v1/payments/{history.id}", f"/v1/payments/{history.id}/events"):
            response = await client.get(path, headers=self.key(name))
            assert response.status_code == status

    async def test_lists_of_their_own(
        self, client: httpx.AsyncClient, service: Service, connection: Connection
    ) -> None:
        for name in ("shop", "other"):
            history = History(name, client=name).charged()
            append(connection, history.facts)
        await caught_up(service, connection)

        async def listed(name: str) -> list[str]:
            page = (await client.get("/v1/payments", headers=self.key(name))).json()
            return sorted(payment["idempotency_key"] for payment in page["payments"])

        assert await listed("shop") == ["shop"]
        assert await listed("other") == ["other"]
        assert await listed("staff") == ["other", "shop"]

    async def test_an_orders_id_leads_to_ones_own_payments(
        self, client: httpx.AsyncClient, connection: Connection
    ) -> None:
        order = uuid.uuid4()
        payment = view(History("k").facts[0].occurred_at, merchant_order_id=order)
        insert(connection, [payment], "shop")
        for name, told in (("shop", True), ("other", False), ("staff", True)):
            response = await client.get(f"/v1/payments/{order}", headers=self.key(name))
            assert problem(response) == (404, "payment_not_found")
            assert (str(payment.id) in response.text) is told
