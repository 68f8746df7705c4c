"""A customer who has to act: what the client is told, and what nobody else ever sees."""

import asyncio
import json
import re
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import httpx
import psycopg
import pytest
from click.testing import Result

from payments.database.connections import DatabaseAddress
from payments.gateways import simulated_methods
from payments.service import Service
from payments.settings import Settings
from tests.process import ServiceProcess, at
from tests.support import History, append
from tests.web.requests import BODY, ORDER, caught_up, charge, problem
from web.charges import is_card_number

pytestmark = pytest.mark.anyio

Connection = psycopg.Connection[Any]
Operator = Callable[..., Result]

PREFIX = "https://shop.example/orders/"
CARD = "4242424242424242"
SPELLINGS = [CARD, "4242-4242-4242-4242", "4242 4242 4242 4242", "4222222222222", "4" * 18 + "2"]


class Returning(Settings, frozen=True, kw_only=True):
    return_url_prefixes: tuple[str, ...] = (PREFIX, "https://other.example/")


@pytest.fixture
def settings() -> Settings:
    return Returning(simulated_ledger="")


@pytest.fixture
def no_time(monkeypatch: pytest.MonkeyPatch) -> Callable[[], None]:
    """The customer has acted, once it is called."""
    return lambda: monkeypatch.setattr(simulated_methods, "ACTION_S", 0.0)


async def test_the_client_is_told_what_its_customer_has_to_do(
    client: httpx.AsyncClient, no_time: Callable[[], None]
) -> None:
    back = f"{PREFIX}7?paid=1"
    first = await charge(client, payment_method="sim_action", return_url=back)
    assert first.status_code == 202
    assert first.headers["retry-after"] == "7"
    payment_id = first.json()["id"]
    assert first.json() == {
        "id": payment_id,
        "merchant_order_id": ORDER,
        "provider_txn_id": None,
        "status": "PENDING",
        "amount_cents": 1500,
        "currency": "INR",
        "next_action": {
            "type": "redirect",
            "url": f"https://simulated.invalid/customer/{payment_id}"
            "?return_url=https%3A%2F%2Fshop.example%2Forders%2F7%3Fpaid%3D1",
            "client_secret": f"simsecret_{payment_id.replace('-', '')}",
        },
    }
    again = await charge(client, payment_method="sim_action", return_url=back)
    assert again.content == first.content
    no_time()
    # It is the same request, wherever the customer is to return to.
    captured = await charge(client, payment_method="sim_action", return_url=f"{PREFIX}8")
    assert captured.status_code == 201
    txn_id = f"sim_{payment_id.replace('-', '')}"
    assert (
        captured.content
        == first.content[: first.content.index(b',"next_action"')]
        .replace(b"null", f'"{txn_id}"'.encode())
        .replace(b"PENDING", b"SUCCESS")
        + b"}"
    )


@pytest.mark.parametrize("settings", [Settings(simulated_ledger="", charge_deadline_s=60)])
async def test_a_retry_does_not_wait_for_the_time_of_the_first_request(
    client: httpx.AsyncClient, no_time: Callable[[], None]
) -> None:
    """Its run is over: it told the client what to do."""
    async with asyncio.timeout(30):
        first, again = [await charge(client, payment_method="sim_action") for _ in range(2)]
        assert [each.status_code for each in (first, again)] == [202, 202]
        no_time()
        captured = await charge(client, payment_method="sim_action")
    assert (captured.status_code, captured.json()["status"]) == (201, "SUCCESS")
    replayed = await charge(client, payment_method="sim_action")
    assert replayed.headers["idempotent-replayed"] == "true"
    assert replayed.content == captured.content


async def test_a_payment_says_so_while_it_waits_for_its_customer(
    client: httpx.AsyncClient,
    service: Service,
    connection: Connection,
    no_time: Callable[[], None],
) -> None:
    waiting = (await charge(client, payment_method="sim_action")).headers["location"]
    plain = (await charge(client, "plain")).headers["location"]
    assert (await client.get(waiting)).json()["awaits_action"] is True
    assert (await client.get(f"{waiting}?as_of=3")).json()["awaits_action"] is True
    assert "awaits_action" not in (await client.get(f"{waiting}?as_of=2")).json()
    assert "awaits_action" not in (await client.get(plain)).json()
    await caught_up(service, connection)
    listed = (await client.get("/v1/payments")).json()["payments"]
    assert [each["status"] for each in listed] == ["SUCCESS", "PENDING"]
    assert all("awaits_action" not in each for each in listed)
    no_time()
    await charge(client, payment_method="sim_action")
    assert "awaits_action" not in (await client.get(waiting)).json()


def test_the_commands_say_so_as_well(operator: Operator, connection: Connection) -> None:
    history = History("k").action_required()
    append(connection, history.facts)
    explained = operator("explain", history.id).stdout
    assert "waiting for the customer to act" in explained
    assert "the customer has to act before the provider captures (redirect)" in explained
    replay = ("replay", "--payment", history.id, "--format")
    for form in ("jsonl", "csv", "table"):
        assert "awaits_action" in operator(*replay, form, "--as-of", 2).stdout, form
        before = operator(*replay, form, "--as-of", 1).stdout
        assert str(history.id) in before
        assert "awaits_action" not in before, form
    append(connection, history.charged().facts[2:])
    assert "waiting" not in operator("explain", history.id).stdout


async def test_a_return_url_is_no_part_of_the_request(client: httpx.AsyncClient) -> None:
    first = await charge(client, return_url=f"{PREFIX}1")
    again = await charge(client)
    assert (again.status_code, again.headers["idempotent-replayed"]) == (201, "true")
    assert again.content == first.content


@pytest.mark.parametrize(
    "return_url",
    [
        "http://shop.example/orders/1",
        "https://shop.example/orders",
        "https://shop.example.evil.example/orders/1",
        "https://evil.example/https://shop.example/orders/",
        "HTTPS://shop.example/orders/1",
        f"{PREFIX}..",
        f"{PREFIX}../admin",
        f"{PREFIX}%2e%2E/admin?x",
        f"{PREFIX}a/.%2e#x",
        f"{PREFIX}..\\admin",
        f"{PREFIX}./1",
        f"{PREFIX}1\n",
        f"{PREFIX}a b",
        f"{PREFIX}é",
        PREFIX + "x" * (2049 - len(PREFIX)),
        "",
        7,
    ],
)
async def test_a_return_url_that_leads_elsewhere(
    client: httpx.AsyncClient, return_url: Any, connection: Connection
) -> None:
    refused = await charge(client, return_url=return_url)
    assert problem(refused) == (400, "invalid_request")
    (error,) = refused.json()["errors"]
    assert error["field"] == "return_url"
    assert error["message"].startswith("must be")
    assert connection.execute("SELECT count(*) FROM payment_events").fetchone() == (0,)


@pytest.mark.parametrize(
    "return_url",
    [
        PREFIX,
        f"{PREFIX}1?next=../x#..",
        f"{PREFIX}a..b/...",
        "https://other.example/",
        PREFIX + "x" * (2048 - len(PREFIX)),
    ],
)
async def test_a_return_url_that_is_accepted(client: httpx.AsyncClient, return_url: str) -> None:
    assert (await charge(client, return_url=return_url)).status_code == 201


@pytest.mark.parametrize("settings", [Settings(simulated_ledger="")])
async def test_without_prefixes_no_return_url_is_accepted(client: httpx.AsyncClient) -> None:
    refused = await charge(client, return_url=PREFIX)
    assert problem(refused) == (400, "invalid_request")
    assert refused.json()["errors"] == [
        {
            "field": "return_url",
            "message": "is not accepted: the service has no RETURN_URL_PREFIXES; leave it out",
        }
    ]
    assert (await charge(client, return_url=None)).status_code == 201


@pytest.mark.parametrize("number", SPELLINGS)
async def test_a_card_number_is_refused(
    client: httpx.AsyncClient, number: str, connection: Connection
) -> None:
    """Also with a key that is known."""
    await charge(client, "known", payment_method="tok_1")
    stored = connection.execute("SELECT count(*) FROM payment_events").fetchone()
    for key in ("new", "known"):
        refused = await charge(client, key, payment_method=number)
        assert problem(refused) == (400, "invalid_request")
        (error,) = refused.json()["errors"]
        assert error["field"] == "payment_method"
        assert number not in refused.text
    if " " not in number:
        assert "looks like a card number" in error["message"]
    assert connection.execute("SELECT count(*) FROM payment_events").fetchone() == stored


@pytest.mark.parametrize(
    "token", ["4242424242424241", "123456789012", "4" * 20, "tok4242424242424242"]
)
async def test_a_token_that_is_no_card_number(client: httpx.AsyncClient, token: str) -> None:
    assert (await charge(client, payment_method=token)).status_code == 201


def test_the_check_digit() -> None:
    """Of each test number that card companies publish, every other last digit is wrong."""
    for number in (
        "378282246310005",
        "6011111111111117",
        "5555555555554444",
        "3056930902590" + "4",
    ):
        right = [d for d in "0123456789" if is_card_number(number[:-1] + d)]
        assert right == [number[-1]]
    assert is_card_number(" 4242 42-42 4242-4242 ")
    assert not is_card_number("٤" * 16)


@pytest.fixture
def served(address: DatabaseAddress, tmp_path: Path) -> Iterator[ServiceProcess]:
    """All that it says, it logs."""
    settings = at(address) | {"LOG_LEVEL": "DEBUG", "LOG_FORMAT": "json"}
    with ServiceProcess(tmp_path, **settings) as service:
        yield service


def test_no_secret_is_logged_or_stored(served: ServiceProcess, connection: Connection) -> None:
    """Neither card numbers, nor payment methods, nor what the customer has to do: not in the log,
    the database, the metrics, nor an error."""
    token = "tok_canary_5d1f"
    sent = httpx.Client(base_url=served.url, timeout=10)
    responses = []
    with sent:

        def post(key: str, payment_method: str) -> httpx.Response:
            response = sent.post(
                "/v1/charge",
                json=BODY | {"payment_method": payment_method},
                headers={"Idempotency-Key": key},
            )
            responses.append(response)
            return response

        for number in SPELLINGS:
            assert post("card", number).status_code == 400
        assert post("token", token).status_code == 201
        assert post("token", f"{token}x").status_code == 422
        assert post("token", SPELLINGS[1]).status_code == 400
        actions = [post("action", "sim_action_never") for _ in range(2)]
        assert [each.status_code for each in actions] == [202, 202]
        action = actions[0].json()["next_action"]
        location = actions[0].headers["location"]
        shown = [sent.get(f"{location}{more}").text for more in ("", "/events")]
        shown.append(sent.get("/metrics").text)
    served.terminate()
    secrets = [*SPELLINGS, CARD, token, action["client_secret"], action["url"]]
    errors = [each.text for each in responses if each.status_code >= 400]
    tables = connection.execute(
        "SELECT quote_ident(tablename) FROM pg_tables WHERE schemaname = 'public'"
    ).fetchall()
    stored = [
        row
        for (table,) in [*tables, ("payment_event_log",)]  # there the bytes of events are text
        for (row,) in connection.execute(f"SELECT t::text FROM {table} t".encode()).fetchall()
    ]
    log = served.log.read_text()
    assert '"POST /v1/charge 400"' in log
    assert any("PaymentActionRequired" in row for row in stored)
    for place in (log, *shown, *errors, *stored):
        assert not [secret for secret in secrets if secret in place]
    digits = re.compile(r"4242.?4242|simsecret|simulated\.invalid")
    assert not [place for place in (log, *stored, *errors) if digits.search(place)]
    assert json.loads(log.splitlines()[0])
