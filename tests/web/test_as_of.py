"""GET /v1/payments/{id}?as_of=: the payment as it was."""

import hashlib
import uuid
from collections.abc import AsyncIterator
from datetime import UTC, datetime, timedelta
from typing import Any
from urllib.parse import quote

import httpx
import msgspec
import psycopg
import pytest

from payments.clients import ApiKey
from payments.database.connections import DatabaseAddress
from payments.service import Service
from payments.settings import Settings
from tests.support import History, append, append_stored, stored_event
from tests.web.requests import problem
from web import app

pytestmark = pytest.mark.anyio

Connection = psycopg.Connection[Any]


@pytest.fixture
def refunded(connection: Connection) -> History:
    """Positions 1 to 4, after which another payment has 5 and 6."""
    history = History("k1").charged().refunded("r1", 500)
    append(connection, [*history.facts, *History("k2").charged().facts])
    return history


async def read(client: httpx.AsyncClient, history: History, as_of: object) -> dict[str, Any]:
    path = f"/v1/payments/{history.id}"
    response = await client.get(path, params={"as_of": str(as_of)})
    assert response.status_code == 200, response.text
    body: dict[str, Any] = response.json()
    return body


async def test_as_of_each_position(client: httpx.AsyncClient, refunded: History) -> None:
    states = [await read(client, refunded, position) for position in (1, 2, 3, 4, 5, 2**63 - 1)]
    assert [state["status"] for state in states] == ["PENDING", *["SUCCESS"] * 5]
    assert [state["refunded_cents"] for state in states] == [0, 0, 0, 500, 500, 500]
    assert states[-1] == (await client.get(f"/v1/payments/{refunded.id}")).json()


async def test_as_of_a_time(
    client: httpx.AsyncClient, refunded: History, connection: Connection
) -> None:
    connection.execute("ALTER TABLE payment_events DISABLE TRIGGER ALL")
    connection.execute(
        "UPDATE payment_events SET recorded_at = '2026-01-31T18:30:00Z'::timestamptz"
        " + notification_id * interval '1 second'"
    )
    charged_at = datetime.fromisoformat("2026-01-31T18:30:02Z")
    assert (await read(client, refunded, charged_at.isoformat()))["status"] == "SUCCESS"
    just_before = charged_at - timedelta(microseconds=1)
    assert (await read(client, refunded, just_before.isoformat()))["status"] == "PENDING"
    nanoseconds = "2026-01-31T18:30:01.999999999Z"
    assert (await read(client, refunded, nanoseconds))["status"] == "PENDING"
    assert (await read(client, refunded, "2026-02-01T00:00:04+05:30"))["refunded_cents"] == 500
    assert (await read(client, refunded, "2030-01-01T00:00:00Z"))["refunded_cents"] == 500
    early = await client.get(f"/v1/payments/{refunded.id}?as_of=2026-01-31T18:30:00Z")
    assert problem(early)[1] == "payment_not_found"
    assert early.json()["detail"].endswith("did not exist yet at 2026-01-31T18:30:00Z.")


BAD = [
    "0",
    "-1",
    "1.5",
    "9223372036854775808",
    "99999999999999999999999",
    "yesterday",
    "",
    "2026-01-31",
    "2026-01-31T18:30:00",
    "2026-13-31T18:30:00Z",
    "١",
    "1e3",
    " 1",
    "\x00",
]


@pytest.mark.parametrize("value", BAD)
async def test_what_is_no_moment(client: httpx.AsyncClient, refunded: History, value: str) -> None:
    response = await client.get(f"/v1/payments/{refunded.id}?as_of={quote(value)}")
    assert problem(response) == (400, "invalid_request")
    (error,) = response.json()["errors"]
    assert error["field"] == "as_of"
    assert error["message"].startswith("must be a time with its offset from UTC")


@pytest.mark.parametrize(
    ("query", "fields"),
    [
        ("as_of=1&as_of=2", ["as_of"]),
        ("at=1", ["at"]),
        ("as_of=1&at=1&x=", ["at", "x"]),
        ("as_of=2026-01-31T18:30:00+00:00", ["as_of"]),
    ],
)
async def test_every_mistake_is_named(
    client: httpx.AsyncClient, refunded: History, query: str, fields: list[str]
) -> None:
    response = await client.get(f"/v1/payments/{refunded.id}?{query}")
    assert problem(response) == (400, "invalid_request")
    errors = response.json()["errors"]
    assert [error["field"] for error in errors] == fields
    if "+" in query:
        assert "%2B" in errors[0]["message"]


async def test_unknown_payments_and_damaged_ones(
    client: httpx.AsyncClient, refunded: History, connection: Connection
) -> None:
    unknown = await client.get(f"/v1/payments/{uuid.uuid4()}?as_of=3")
    assert problem(unknown)[1] == "payment_not_found"
    assert "yet" not in unknown.json()["detail"]
    append_stored(connection, [stored_event(refunded.id, 5, b"{", "PaymentRefunded")])
    assert (await read(client, refunded, 6))["refunded_cents"] == 500
    damaged = await client.get(f"/v1/payments/{refunded.id}?as_of=7")
    assert problem(damaged)[1] == "payment_unreadable"


@pytest.fixture
async def guarded(address: DatabaseAddress, settings: Settings) -> AsyncIterator[httpx.AsyncClient]:
    """With API keys for `orders`, `tickets` and `staff`, each its own name."""
    keys = tuple(
        ApiKey(name, hashlib.sha256(name.encode()).digest())
        for name in ("orders", "tickets", "staff")
    )
    service = Service(msgspec.structs.replace(settings, payments_api_keys=keys), address)
    await service.start()
    transport = httpx.ASGITransport(app.guarded(app.application(service), service))  # type: ignore[arg-type]
    async with httpx.AsyncClient(transport=transport, base_url="http://payments") as opened:
        yield opened
    await service.stop(5)


async def test_a_client_reads_its_own(guarded: httpx.AsyncClient, connection: Connection) -> None:
    own = History("k", client="orders").charged()
    append(connection, [*History("earlier").facts, *own.facts])

    async def answer(name: str, as_of: int) -> httpx.Response:
        headers = {"Authorization": f"Bearer {name}"}
        return await guarded.get(f"/v1/payments/{own.id}?as_of={as_of}", headers=headers)

    assert (await answer("orders", 3)).status_code == 200
    assert (await answer("staff", 2)).json()["status"] == "PENDING"
    assert "yet" in (await answer("staff", 1)).json()["detail"]
    others = await answer("tickets", 3)
    assert others.status_code == 404
    assert (await answer("tickets", 1)).json() == others.json()
    nowhere = await guarded.get(
        f"/v1/payments/{uuid.uuid4()}?as_of=2", headers={"Authorization": "Bearer tickets"}
    )
    # It does not tell that there is such a payment.
    assert others.json()["detail"].replace(str(own.id), "") == nowhere.json()["detail"].replace(
        nowhere.url.path.rpartition("/")[2], ""
    )
    assert (await guarded.get(f"/v1/payments/{own.id}?as_of=2")).status_code == 401


async def test_as_of_now_after_the_databases_clock_was_ahead(
    client: httpx.AsyncClient, connection: Connection
) -> None:
    """What was recorded in the future counts from the time on that the application told, and
    nothing counts without what came before it."""
    began_at = datetime.now(UTC) - timedelta(seconds=60)
    history = History("k", began_at=began_at).charged().refunded()
    append(connection, history.facts)
    connection.execute("ALTER TABLE payment_events DISABLE TRIGGER ALL")
    connection.execute(
        "UPDATE payment_events SET recorded_at = now() + interval '1 hour'"
        " WHERE originator_version > 1"
    )
    now = datetime.now(UTC)
    assert (await read(client, history, now.isoformat()))["status"] == "REFUNDED"
    charged = history.facts[1].occurred_at.isoformat()
    connection.execute("UPDATE payment_events SET recorded_at = now() + interval '1 hour'")
    assert (await read(client, history, charged))["status"] == "SUCCESS"
    connection.execute("UPDATE payment_events SET recorded_at = now() WHERE originator_version = 4")
    assert (await read(client, history, charged))["status"] == "SUCCESS"
