"""Several API clients: what one of them learns of another's payments, which is next to nothing."""

import hashlib
import itertools
import uuid
from typing import Any

import httpx
import msgspec
import psycopg
import pytest

from payments.clients import ApiKey
from payments.events.facts import encode
from payments.payment.identity import payment_id_for
from payments.queries.cursor import ListPlace, write_cursor
from payments.service import Service
from payments.settings import Settings
from tests.queries.rows import insert, view
from tests.support import ORDER_ID, History, append, append_stored, histories, stored_event
from tests.web.requests import caught_up, problem

pytestmark = pytest.mark.anyio

Connection = psycopg.Connection[Any]

BODY = {"merchant_order_id": str(ORDER_ID), "amount_cents": 1500, "currency": "INR"}
# One other value for every part of the request.
OTHER: dict[str, Any] = {
    "merchant_order_id": str(uuid.UUID(int=7)),
    "amount_cents": 1501,
    "currency": "USD",
    "payment_method": "tok_1",
}
# Each way to ask about one payment; {} is its id.
READS = ["/v1/payments/{}", "/v1/payments/{}?as_of=1000", "/v1/payments/{}/callbacks"]
EVENTS = "/v1/payments/{}/events"
TOLD_ANYWAY = {"x-request-id", "date"}


@pytest.fixture
def settings(settings: Settings) -> Settings:
    keys = tuple(
        ApiKey(name, hashlib.sha256(f"{name}-key".encode()).digest())
        for name in ("shop", "other", "staff")
    )
    return msgspec.structs.replace(settings, payments_api_keys=keys)


def by(name: str, key: str | None = None) -> dict[str, str]:
    sent = {"Authorization": f"Bearer {name}-key"}
    return sent if key is None else sent | {"Idempotency-Key": key}


def whole(response: httpx.Response) -> tuple[int, bytes, tuple[tuple[str, str], ...]]:
    """All that an answer tells."""
    headers = tuple(each for each in response.headers.items() if each[0] not in TOLD_ANYWAY)
    return response.status_code, response.content, headers


def fields(response: httpx.Response) -> list[str]:
    return [error["field"] for error in response.json()["errors"]]


async def refund(
    client: httpx.AsyncClient, name: str, payment_id: object, key: str = "r", **body: Any
) -> httpx.Response:
    body = {"payment_id": str(payment_id)} | body
    return await client.post("/v1/refund", json=body, headers=by(name, key))


async def test_a_key_that_is_taken_tells_nothing_else(
    client: httpx.AsyncClient, connection: Connection
) -> None:
    """Whatever became of the other's payment, and however much of its request was guessed."""
    owned = histories("k", client="shop")
    append(connection, [fact for history in owned.values() for fact in history.facts])
    damaged = History("k damaged", client="shop")
    append(connection, damaged.facts)
    append_stored(connection, [stored_event(damaged.id, 2, b"\xff")])
    # Settling may go on with what is open; nothing else begins.
    begun = "SELECT count(*) FROM payment_events WHERE topic = 'PaymentInitiated'"
    before = connection.execute(begun).fetchone()
    answers = set()
    for kind in [*owned, "damaged"]:
        for count in range(len(OTHER) + 1):
            for guessed_wrong in itertools.combinations(OTHER, count):
                body = BODY | {name: OTHER[name] for name in guessed_wrong}
                response = await client.post(
                    "/v1/charge", json=body, headers=by("other", f"k {kind}")
                )
                answers.add(whole(response))
    assert len(answers) == 1
    assert problem(response) == (422, "idempotency_key_reused")
    assert fields(response) == ["client"]
    assert connection.execute(begun).fetchone() == before


async def test_staff_learns_no_more_from_a_charge_and_its_own_client_what_differs(
    client: httpx.AsyncClient, connection: Connection
) -> None:
    append(connection, History("k", client="shop").charged().facts)
    body = BODY | {"amount_cents": 1501, "currency": "USD"}
    told = await client.post("/v1/charge", json=body, headers=by("staff", "k"))
    assert fields(told) == ["client"]
    told = await client.post("/v1/charge", json=body, headers=by("shop", "k"))
    assert fields(told) == ["amount_cents", "currency"]
    again = await client.post("/v1/charge", json=BODY, headers=by("shop", "k"))
    assert (again.status_code, again.headers["idempotent-replayed"]) == (201, "true")


async def test_a_payment_of_before_the_keys_were_switched_on(
    client: httpx.AsyncClient, connection: Connection
) -> None:
    append(connection, History("k").charged().facts)
    for body in (BODY, BODY | OTHER):
        told = await client.post("/v1/charge", json=body, headers=by("shop", "k"))
        assert (told.status_code, fields(told)) == (422, ["client"])


async def test_a_refunds_key_belongs_to_who_sent_it(client: httpx.AsyncClient) -> None:
    charged = await client.post("/v1/charge", json=BODY, headers=by("shop", "k"))
    payment_id = charged.json()["id"]
    made = await refund(client, "staff", payment_id, amount_cents=100)
    assert made.status_code == 201
    again = await refund(client, "staff", payment_id, amount_cents=100)
    assert (again.content, again.headers["idempotent-replayed"]) == (made.content, "true")
    bodies: tuple[dict[str, Any], ...] = ({"amount_cents": 100}, {"amount_cents": 101}, {})
    answers = {whole(await refund(client, "shop", payment_id, **body)) for body in bodies}
    assert len(answers) == 1
    told = await refund(client, "shop", payment_id)
    assert problem(told) == (422, "idempotency_key_reused")
    assert fields(told) == ["client"]
    own = await refund(client, "shop", payment_id, "r2", amount_cents=100)
    assert (own.status_code, own.json()["refunded_cents"]) == (201, 200)


async def answers_of(
    client: httpx.AsyncClient, name: str, payment_id: uuid.UUID
) -> list[httpx.Response]:
    """Of everything that can be asked about one payment; its events come last."""
    paths = [path.format(payment_id) for path in READS]
    asked = [await client.get(path, headers=by(name)) for path in paths]
    for body in ({"amount_cents": 1}, {}, {"amount_cents": 2_000}):
        asked.append(await refund(client, name, payment_id, f"r{len(asked)}", **body))
    return [*asked, await client.get(EVENTS.format(payment_id), headers=by(name))]


async def test_another_clients_payment_is_not_there(
    client: httpx.AsyncClient, connection: Connection
) -> None:
    """In every state, a damaged one as well: nothing tells it from one that never was."""
    owned = list(histories(client="shop").values())
    append(connection, [fact for history in owned for fact in history.facts])
    damaged = [History(f"damaged {number}", client="shop") for number in range(3)]
    append(connection, [fact for history in damaged for fact in history.facts])
    append_stored(
        connection,
        [
            stored_event(damaged[0].id, 2, b"\xff"),
            stored_event(damaged[1].id, 2, encode(History("k").facts[0])),
            stored_event(damaged[2].id, 2, topic="Unheard of"),
        ],
    )
    for payment_id in [history.id for history in [*owned, *damaged]]:
        nowhere = uuid.uuid4()
        unknown = await answers_of(client, "other", nowhere)
        foreign = await answers_of(client, "other", payment_id)
        for one, there_is_none in zip(foreign, unknown, strict=True):
            assert problem(one) == (404, "payment_not_found")
            told = one.text.replace(str(payment_id), ""), one.headers["content-type"]
            none = there_is_none.text.replace(str(nowhere), "")
            assert told == (none, there_is_none.headers["content-type"])


@pytest.mark.parametrize("name", ["shop", "staff"])
async def test_a_damaged_payment_is_told_to_who_may_read_it(
    client: httpx.AsyncClient, connection: Connection, name: str
) -> None:
    history = History("k", client="shop").charged()
    append(connection, history.facts)
    append_stored(connection, [stored_event(history.id, 3, b"\xff")])
    *unreadable, events = await answers_of(client, name, history.id)
    for answer in unreadable:
        assert problem(answer) == (503, "payment_unreadable")
    assert (events.status_code, len(events.json()["events"])) == (200, 3)


@pytest.mark.parametrize(
    "beginning",
    [b"\xff", b'{"client": "shop"}', encode(History("another", client="shop").facts[0])],
    ids=["damaged", "not whole", "another payment's"],
)
async def test_a_payment_whose_beginning_names_nobody_is_for_staff(
    client: httpx.AsyncClient, connection: Connection, beginning: bytes
) -> None:
    payment_id = payment_id_for("k")
    append_stored(connection, [stored_event(payment_id, 1, beginning)])
    for name in ("shop", "other"):
        for answer in await answers_of(client, name, payment_id):
            assert problem(answer) == (404, "payment_not_found")
    *unreadable, events = await answers_of(client, "staff", payment_id)
    for answer in unreadable:
        assert problem(answer) == (503, "payment_unreadable")
    assert events.status_code == 200


async def test_an_orders_id_leads_nobody_to_anothers_payments(
    client: httpx.AsyncClient, connection: Connection
) -> None:
    order = uuid.uuid4()
    payment = view(History("k").facts[0].occurred_at, merchant_order_id=order)
    insert(connection, [payment], "shop")
    for name, told in (("shop", True), ("other", False), ("staff", True)):
        for answer in await answers_of(client, name, order):
            assert problem(answer) == (404, "payment_not_found")
            assert (str(payment.id) in answer.text) is told


async def test_no_filter_and_no_cursor_leads_to_anothers_payments(
    client: httpx.AsyncClient, service: Service, connection: Connection
) -> None:
    theirs = History("theirs", client="shop").charged()
    append(connection, theirs.facts)
    await caught_up(service, connection)
    begun = theirs.payment.created_at
    # A client may make up its cursors: what matters is what follows.
    before = ListPlace(begun, uuid.UUID(int=2**128 - 1))
    for query in (
        {},
        {"merchant_order_id": str(ORDER_ID)},
        {"status": "SUCCESS"},
        {"currency": "INR"},
        {"status": "SUCCESS", "currency": "INR", "merchant_order_id": str(ORDER_ID)},
        {"created_from": begun.isoformat()},
        {"cursor": write_cursor(before)},
    ):
        page = await client.get("/v1/payments", params=query, headers=by("other"))
        assert (page.status_code, page.json()["payments"]) == (200, [])
        page = await client.get("/v1/payments", params=query, headers=by("shop"))
        assert [each["id"] for each in page.json()["payments"]] == [str(theirs.id)]
