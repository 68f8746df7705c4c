"""Webhooks of a provider that runs as a process of its own: what the service reads of them, and
what becomes of the payments, whatever dies."""

import hashlib
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import psutil
import psycopg
import pytest

from payments.database.connections import DatabaseAddress
from tests.commands.hinting import event
from tests.crash.money import settings
from tests.doubles.http_gateway import signed
from tests.doubles.provider import ProviderProcess
from tests.edge.load import Load
from tests.edge.raw import Connection, code_of
from tests.machine import within
from tests.process import ServiceProcess
from tests.support import eventually
from web.serving.door import WEBHOOKS_PER_S
from web.serving.guard import BODY_MAX, BODY_TIMEOUT_S, WEBHOOK_BODY_MAX

SECRETS = ("whsec_new_7391", "whsec_old_7391")
KEY = "shop-key"
PATH = "/v1/providers/test_preparing/webhook"
Store = psycopg.Connection[Any]


@pytest.fixture(scope="module")
def provider(tmp_path_factory: pytest.TempPathFactory) -> Iterator[ProviderProcess]:
    with ProviderProcess(tmp_path_factory.mktemp("provider") / "ledger.jsonl") as running:
        yield running


@pytest.fixture(scope="module")
def given(module_database: DatabaseAddress, provider: ProviderProcess) -> dict[str, Any]:
    more = {
        "PAYMENTS_API_KEYS": f"shop:{hashlib.sha256(KEY.encode()).hexdigest()}",
        "PENDING_ABANDON_AFTER_S": 3600,
        "RETURN_URL_PREFIXES": "https://shop.example/",
        "TEST_PROVIDER_PREPARES": 1,
        "TEST_PROVIDER_WEBHOOK_SECRETS": ",".join(SECRETS),
        "LOG_FORMAT": "json",
    }
    return settings(module_database, provider, **more)


@pytest.fixture(scope="module")
def service(
    given: dict[str, Any], tmp_path_factory: pytest.TempPathFactory
) -> Iterator[ServiceProcess]:
    with ServiceProcess(tmp_path_factory.mktemp("webhooks"), **given) as running:
        yield running
        log = running.log.read_text()
        assert "Traceback" not in log
        assert '"ERROR"' not in log
        assert not [secret for secret in SECRETS if secret in log]


def webhook(
    service: ServiceProcess, event_id: str, *, secret: str = SECRETS[0], **about: object
) -> httpx.Response:
    body = event(event_id, **about)
    headers = signed(secret, time.time(), body)
    return httpx.post(f"{service.url}{PATH}", content=body, headers=headers, timeout=15)


def raw(body: bytes, *more: str) -> bytes:
    """A webhook with this body, signed, as it is sent."""
    fields = [f"{name}: {value}" for name, value in signed(SECRETS[0], time.time(), body).items()]
    return "\r\n".join([f"POST {PATH} HTTP/1.1", "Host: x", *fields, *more, "", ""]).encode()


def to_act(service: ServiceProcess, key: str) -> str:
    """A payment whose customer has to act; its id."""
    body = {
        "merchant_order_id": "f50d9fa2-5d3e-4e49-9a02-218ad32ef4a9",
        "amount_cents": 1500,
        "payment_method": "pm_authorized",
        "return_url": "https://shop.example/back",
    }
    headers = {"Idempotency-Key": key, "Authorization": f"Bearer {KEY}"}
    response = httpx.post(f"{service.url}/v1/charge", json=body, headers=headers, timeout=15)
    assert response.status_code == 202, response.text
    return str(response.json()["id"])


def wait_long(store: Store, payment_id: str) -> None:
    """As after many attempts: the next one is a minute away."""

    def listed() -> bool:
        return bool(
            store.execute(
                "UPDATE unsettled_payments SET attempts = 8, since = since - interval '1 min',"
                " change = nextval('unsettled_payments_change_seq'),"
                " due_at = clock_timestamp() + interval '60 s' WHERE payment_id = %s",
                [payment_id],
            ).rowcount
        )

    eventually(listed)


def captured(store: Store, payment_id: str) -> bool:
    row = store.execute(
        "SELECT array_agg(topic ORDER BY originator_version) FROM payment_events"
        " WHERE originator_id = %s",
        [payment_id],
    ).fetchone()
    assert row is not None
    return bool(row[0][-1] == "PaymentCharged" and row[0].count("PaymentCharged") == 1)


@pytest.mark.parametrize(
    ("size", "more", "status"),
    [
        (BODY_MAX + 1, [], 200),
        (WEBHOOK_BODY_MAX, [], 200),
        (WEBHOOK_BODY_MAX + 1, [], 413),
        (WEBHOOK_BODY_MAX, ["Transfer-Encoding: chunked"], 200),
        (WEBHOOK_BODY_MAX + 1, ["Transfer-Encoding: chunked"], 413),
    ],
)
def test_a_body_of_up_to_64_kib_is_read(
    service: ServiceProcess, size: int, more: list[str], status: int
) -> None:
    start = event(f"evt_{size}_{len(more)}", reference="ref_unknown")[:-1] + b', "x": "'
    body = start + b"x" * (size - len(start) - 2) + b'"}'
    assert len(body) == size
    sent, framing = body, more or [f"Content-Length: {size}"]
    if more:
        parts = [body[place : place + 9000] for place in range(0, size, 9000)]
        sent = b"".join(b"%x\r\n%s\r\n" % (len(part), part) for part in parts) + b"0\r\n\r\n"
    with Connection(service.port) as client:
        client.send(raw(body, *framing), sent)
        answer = client.answer()
    assert answer is not None
    assert answer.status == status
    if status == 413:
        assert code_of(answer) == "body_too_large"
        assert str(WEBHOOK_BODY_MAX) in answer.json()["detail"]


def test_other_endpoints_keep_their_limit(service: ServiceProcess) -> None:
    headers = {"Authorization": f"Bearer {KEY}"}
    for path in ("/v1/charge", "/v1/refund"):
        response = httpx.post(
            f"{service.url}{path}", content=b" " * (BODY_MAX + 1), headers=headers
        )
        assert response.status_code == 413


def test_a_slow_body_ends_in_time_and_others_do_not_wait(service: ServiceProcess) -> None:
    body = event("evt_slow", reference="ref_unknown")
    with Connection(service.port) as slow:
        slow.send(raw(body, f"Content-Length: {len(body)}"), body[:9])
        assert webhook(service, "evt_beside", reference="ref_unknown").status_code == 200
        with within(BODY_TIMEOUT_S + 2):
            answer = slow.answer()
    assert answer is not None
    assert (answer.status, code_of(answer)) == (408, "body_too_slow")


@pytest.mark.parametrize("name", ["simulated", "test_provider", "x", "%74est_preparing", "{name}"])
def test_there_is_none_for_another_name(service: ServiceProcess, name: str) -> None:
    with Connection(service.port) as client:
        client.send(f"POST /v1/providers/{name}/webhook HTTP/1.1\r\nHost: x\r\n".encode())
        client.send(b"Content-Length: 100000\r\n\r\n")  # the body is not waited for
        answer = client.answer()
    assert answer is not None
    assert (answer.status, code_of(answer)) == (404, "not_found")


def test_only_post(service: ServiceProcess) -> None:
    response = httpx.get(f"{service.url}{PATH}")
    assert (response.status_code, response.json()["code"]) == (405, "method_not_allowed")
    assert "POST" in response.headers["allow"]


def test_a_payment_is_settled_at_once_though_its_next_attempt_is_far_away(
    service: ServiceProcess, provider: ProviderProcess, store: Store
) -> None:
    """The client never comes back. Both secrets count, while one replaces the other."""
    store.execute(
        "INSERT INTO unsettled_payments (payment_id, kind, since, due_at)"
        " SELECT gen_random_uuid(), 'charge', now(), now() + interval '50 min'"
        "   FROM generate_series(1, 1000)"
    )
    for number, secret in enumerate(SECRETS):
        payment_id = to_act(service, f"acts {number}")
        wait_long(store, payment_id)
        provider.customer_acts(payment_id)
        with within(3):
            response = webhook(service, f"evt_{number}", secret=secret, payment_id=payment_id)
            assert response.json() == {"result": "accepted"}
            eventually(lambda id=payment_id: captured(store, id))  # type: ignore[misc]
        again = webhook(service, f"evt_{number}", secret=secret, payment_id=payment_id)
        assert again.json() == {"result": "duplicate"}
        assert len(provider.captures(payment_id)) == 1
    store.execute("DELETE FROM unsettled_payments WHERE due_at > now() + interval '30 min'")


def test_a_webhook_that_was_accepted_survives_kill_9(
    service: ServiceProcess, given: dict[str, Any], provider: ProviderProcess, store: Store
) -> None:
    payment_id = to_act(service, "killed")
    wait_long(store, payment_id)
    provider.customer_acts(payment_id)
    asked = provider.counts()["find_charge"]
    service.kill()
    # Takes webhooks, and settles nothing.
    with ServiceProcess(service.data_dir, "--api-only", **given) as taking:
        response = webhook(taking, "evt_killed", payment_id=payment_id)
        assert response.json() == {"result": "accepted"}
        taking.kill()
    assert provider.counts()["find_charge"] == asked
    service.start()
    with within(5):
        eventually(lambda: captured(store, payment_id))
    assert len(provider.captures(payment_id)) == 1
    assert webhook(service, "evt_killed", payment_id=payment_id).json() == {"result": "duplicate"}


@pytest.fixture
def patient(given: dict[str, Any], tmp_path: Path) -> Iterator[ServiceProcess]:
    """One for which the provider is never slow, however busy the machine is: else it is down."""
    slow = {"CHARGE_DEADLINE_S": 25, "GATEWAY_TIMEOUT_S": 20}
    with ServiceProcess(tmp_path, **given | slow) as running:
        yield running
        assert '"ERROR"' not in running.log.read_text()


def test_a_flood_of_forged_ones_refuses_no_charge_and_takes_little_memory(
    patient: ServiceProcess,
) -> None:
    service, seconds, rate = patient, 3.0, 20
    process = psutil.Process(service.process.pid)
    before = process.memory_info().rss
    lines = len(service.log.read_text().splitlines())
    with (
        Load("forge", service.port, seconds, PATH, 200, 60_000) as forged,
        Load("charge", service.port, seconds, rate, KEY) as charges,
    ):
        charged, flooded = charges.result(), forged.result()
    assert charged["statuses"] == {"201": int(seconds * rate)}
    assert set(flooded["statuses"]) == {"400", "503"}
    assert flooded["statuses"]["400"] <= (seconds + 1) * WEBHOOKS_PER_S / 3 + 10
    assert process.memory_info().rss - before < 60 * 2**20
    # Two for each charge, and a few that count.
    assert len(service.log.read_text().splitlines()) - lines < 2 * seconds * rate + 40
    eventually(lambda: webhook(service, "evt_after", reference="ref_unknown").status_code == 200)
