"""Several providers at once: a payment stays with the one that it was begun with."""

from pathlib import Path
from typing import Any

import httpx
import psycopg

from payments.database.connections import DatabaseAddress
from tests.process import ServiceProcess, at, invoke
from tests.support import eventually, ledger_rows

QUICK = {"CHARGE_DEADLINE_S": 1, "GATEWAY_TIMEOUT_S": 0.5}


def refund(
    client: httpx.Client, service: ServiceProcess, payment_id: str, amount_cents: int
) -> httpx.Response:
    body = {"payment_id": payment_id, "amount_cents": amount_cents}
    headers = {"Idempotency-Key": f"{payment_id} {amount_cents}"}
    return client.post(f"{service.url}/v1/refund", json=body, headers=headers)


def test_the_default_is_changed_and_a_provider_is_removed(
    address: DatabaseAddress, connection: psycopg.Connection[Any], tmp_path: Path
) -> None:
    given = {**at(address), **QUICK}
    lost: dict[str, Any] = {"payment_method": "sim_answer_lost"}
    with httpx.Client(timeout=10) as client:
        with ServiceProcess(
            tmp_path,
            GATEWAYS="simulated,simulated-b",
            GATEWAY_BY_CURRENCY="EUR:simulated-b",
            **given,
        ) as service:
            first = service.charge(client, "inr").json()["id"]
            second = service.charge(client, "eur", currency="EUR").json()["id"]
            assert service.charge(client, "lost", **lost).status_code == 202
            assert service.charge(client, "lost-eur", currency="EUR", **lost).status_code == 202
            open_one: dict[str, Any] = {"currency": "EUR", "payment_method": "sim_pending_3600"}
            assert service.charge(client, "open", **open_one).status_code == 202
            service.kill()

        with ServiceProcess(tmp_path, GATEWAYS="simulated-b,simulated", **given) as service:
            assert service.charge(client, "inr-2").status_code == 201
            assert refund(client, service, first, 1500).status_code == 201
            assert refund(client, service, second, 100).status_code == 201
            in_eur = lost | {"currency": "EUR"}
            eventually(lambda: service.charge(client, "lost", **lost).status_code == 201)
            eventually(lambda: service.charge(client, "lost-eur", **in_eur).status_code == 201)

        ledgers = [tmp_path / f"{name}-ledger.sqlite" for name in ("simulated", "simulated-b")]
        assert [len(ledger_rows(ledger)) for ledger in ledgers] == [3, 4]

        with ServiceProcess(tmp_path, GATEWAYS="simulated", **given) as service:
            refused = refund(client, service, second, 200)
            assert (refused.status_code, refused.json()["code"]) == (409, "payment_not_refundable")
            assert "simulated-b, which is not configured" in refused.json()["detail"]
            assert service.charge(client, "inr-3").status_code == 201
            assert service.charge(client, "open", **open_one).status_code == 202
            series = 'payments_unsettled_unconfigured{gateway="simulated-b"} 1.0'
            # Settling looks at it again within a minute: not waited for.
            connection.execute("UPDATE unsettled_payments SET due_at = now()")
            eventually(lambda: series in client.get(f"{service.url}/metrics").text)
            doctor = invoke("doctor", GATEWAYS="simulated", **given).stdout
            assert "1 begun with simulated-b, which GATEWAYS does not name: " in doctor
