"""The Node service's payments in this service, once they are imported."""

import csv
import uuid
from collections.abc import AsyncIterator, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import httpx
import pytest
from loguru import logger

from payments.commands.refund import RefundPayment
from payments.database.connections import Database, DatabaseAddress, connect
from payments.errors import IdempotencyKeyReused, PaymentNotRefundable, RefundDeclined
from payments.payment.identity import RefundRequest, payment_id_for
from payments.payment.state import Status
from payments.projections.callbacks import CallbacksProjection, backfill
from payments.service import Service
from payments.settings import Settings
from tests.conftest import Clones
from tests.doubles.gateway import asking
from tests.legacy.node import TABLE, insert
from tests.process import at, invoke
from tests.support import charge_of
from web.app import application, guarded

KEYS = [status.lower() for status in Status]


class Imported(NamedTuple):
    """A database, and the ids that its payments had: by their keys, and of one without a key."""

    address: DatabaseAddress
    ids: dict[str, str]

    def run(self, *arguments: str) -> str:
        """What `payments ARGUMENTS` prints."""
        done = invoke(*arguments, **at(self.address), LOG_LEVEL="WARNING")
        assert done.returncode == 0
        return done.stdout


@pytest.fixture(scope="module")
def imported(empty_clones: Clones) -> Iterator[Imported]:
    """For all of these tests: none of them appends."""
    address = empty_clones.take()
    with connect(address, "payments import-legacy") as node:
        node.execute(TABLE)
        ids = {
            key: insert(node, status=key.upper(), idempotency_key=key, provider_txn_id=key)
            for key in KEYS
        }
        ids["unkeyed"] = insert(node, idempotency_key=None)
        ids["here"] = insert(node, idempotency_key="here", provider_txn_id=None)
    found = Imported(address, ids)
    found.run("import-legacy")
    yield found
    empty_clones.drop(address)


@pytest.fixture
async def service(imported: Imported, tmp_path: Path) -> AsyncIterator[Service]:
    """Its provider knows of nothing."""
    settings = Settings(simulated_ledger="")
    running = Service(settings, imported.address)
    await running.start()
    yield running
    await running.stop(5)


@pytest.mark.anyio
@pytest.mark.parametrize("key", KEYS)
async def test_a_known_key_is_not_charged_again(service: Service, key: str) -> None:
    """Whoever asks, and by whatever payment method: neither was stored."""
    for client in ("default", "orders"):
        for payment_method in (None, "pm_1"):
            command = charge_of(key, client=client, payment_method=payment_method)
            charged = await service.charging.charge(command)
            assert charged.replayed
            assert charged.payment.id == payment_id_for(key)
            assert charged.payment.status == key.upper()
            assert (
                await next(iter(service.gateways)).find_charge(asking(charged.payment.id), 1)
                is None
            )


@pytest.mark.anyio
async def test_another_request_is_told_what_differs(service: Service) -> None:
    for client in ("default", "orders"):
        command = charge_of("success", 1600, order_id=uuid.uuid4(), client=client)
        with pytest.raises(IdempotencyKeyReused) as caught:
            await service.charging.charge(command)
        assert [error.field for error in caught.value.errors] == [
            "merchant_order_id",
            "amount_cents",
        ]


@pytest.mark.anyio
async def test_an_old_id_finds_its_payment(imported: Imported, service: Service) -> None:
    app = guarded(application(service), service)
    transport = httpx.ASGITransport(app)  # type: ignore[arg-type]
    async with httpx.AsyncClient(transport=transport, base_url="http://payments") as client:
        for key, old_id in imported.ids.items():
            new_id = old_id if key == "unkeyed" else str(payment_id_for(key))
            for path in ("", "/events", "/callbacks", "?as_of=2100-01-01T00:00:00Z"):
                by_old = await client.get(f"/v1/payments/{old_id}{path}")
                by_new = await client.get(f"/v1/payments/{new_id}{path}")
                assert by_old.status_code == 200
                assert by_old.content == by_new.content
        refused = await client.post("/v1/refund", json={"payment_id": imported.ids["success"]})
        assert (refused.status_code, refused.json()["code"]) == (409, "payment_not_refundable")
        assert "captured by the provider legacy" in refused.json()["detail"]
        for path in ("", "/events", "/callbacks", "?as_of=1"):
            assert (await client.get(f"/v1/payments/{uuid.uuid4()}{path}")).status_code == 404


@pytest.mark.anyio
async def test_nobody_asks_what_became_of_one_that_is_pending(service: Service) -> None:
    """Nor is a person told of it each time, as of one that another provider was asked about."""
    said: list[str] = []
    sink = logger.add(said.append, level="WARNING")
    charged = await service.charging.charge(charge_of("pending"))
    logger.remove(sink)
    assert said == []
    assert charged.payment.unsettled is None
    assert await service.settling.run_once() == 0


def test_explain_finds_it_by_its_old_id(imported: Imported) -> None:
    told = imported.run("explain", imported.ids["success"])
    assert told.startswith(f"payment {payment_id_for('success')}: SUCCESS")
    assert f"its id was {imported.ids['success']}" in told
    told = imported.run("explain", imported.ids["unkeyed"])
    assert "imported: charge of 15.00 INR with no key" in told


def test_what_moved_in_the_other_service_is_not_exported(imported: Imported) -> None:
    told = imported.run("export", "--from", "2000-01-01T00:00:00Z", "--to", "2100-01-01T00:00:00Z")
    assert len(list(csv.reader(told.splitlines()))) == 1


STATES = "SELECT state, status, count(*) FROM callback_deliveries GROUP BY 1, 2 ORDER BY 2"


@pytest.mark.anyio
async def test_nobody_is_called_back(imported: Imported) -> None:
    """Not by a backfill either, also once what the import wrote was pruned."""
    expected = [("excluded", "FAILED", 1), ("excluded", "REFUNDED", 1), ("excluded", "SUCCESS", 4)]
    projection = CallbacksProjection(("SUCCESS", "FAILED", "REFUNDED"))
    connection = await Database(imported.address, 1).connect("tests")

    async def states() -> list[Any]:
        return await (await connection.execute(STATES)).fetchall()

    async with connection:
        await connection.execute(
            "INSERT INTO followers SELECT 'callbacks', max(notification_id) FROM payment_events"
        )
        assert await states() == expected
        assert (await backfill(connection, projection, 1)).enqueued == 0
        await connection.execute("DELETE FROM callback_deliveries")
        assert (await backfill(connection, projection, 1)).enqueued == 6
        assert await states() == expected
        lanes = await connection.execute("SELECT count(*) FROM callback_lanes")
        assert await lanes.fetchall() == [(0,)]


@pytest.fixture
def captured_here(empty_clones: Clones) -> Iterator[Imported]:
    """One payment with the provider's id of its capture, and one without."""
    address = empty_clones.take()
    with connect(address, "payments import-legacy") as node:
        node.execute(TABLE)
        ids = {
            "with": insert(node),
            "without": insert(node, idempotency_key="k", provider_txn_id=None),
        }
    found = Imported(address, ids)
    found.run("import-legacy", "--gateway", "simulated")
    yield found
    empty_clones.drop(address)


@pytest.mark.anyio
async def test_a_capture_of_this_services_provider_can_be_given_back(
    captured_here: Imported, tmp_path: Path
) -> None:
    """It is asked, and declines: it knows of no such capture. Without the id it is not asked."""
    settings = Settings(simulated_ledger="")
    service = Service(settings, captured_here.address)
    await service.start()
    try:
        for name, error in (("with", RefundDeclined), ("without", PaymentNotRefundable)):
            request = RefundRequest(
                payment_id=uuid.UUID(captured_here.ids[name]),
                amount_cents=None,
                idempotency_key="refund",
                client="default",
            )
            with pytest.raises(error):
                await service.refunding.refund(RefundPayment(request=request))
    finally:
        await service.stop(5)
