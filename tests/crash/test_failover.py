"""A failover to a standby that lagged takes back what was answered: it is noticed, and told."""

import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import msgspec
import psycopg
import pytest

from payments.database import connections as database
from payments.database.connections import Database, connect
from tests.outside_postgres import OutsidePostgres, Standby
from tests.process import ServiceProcess, invoke
from tests.support import eventually, ledger_rows


@pytest.fixture
def servers(data_dir: Path) -> Iterator[tuple[OutsidePostgres, Standby]]:
    with (
        OutsidePostgres(data_dir / "primary") as primary,
        Standby(data_dir / "standby", primary) as standby,
    ):
        yield primary, standby


@pytest.fixture
def service(servers: Any, tmp_path: Path) -> Iterator[ServiceProcess]:
    with ServiceProcess(tmp_path, **servers[0].settings) as running:
        yield running


def caught_up(primary: OutsidePostgres) -> bool:
    with primary.connect() as connection:
        row = connection.execute(
            "SELECT bool_and(replay_lsn = pg_current_wal_lsn()) FROM pg_stat_replication"
        ).fetchone()
    return row == (True,)


def gauge(client: httpx.Client, series: str) -> float:
    match = re.search(rf"^{re.escape(series)} (\S+)$", client.get("/metrics").text, re.MULTILINE)
    assert match
    return float(match[1])


def refunds(ledger: Path) -> int:
    return sum(row.payment_id is not None for row in ledger_rows(ledger))


def test_a_standby_that_nothing_waits_for_is_reported(
    servers: tuple[OutsidePostgres, Standby], service: ServiceProcess, tmp_path: Path
) -> None:
    primary, _ = servers
    given = {**primary.settings, "PAYMENTS_DATA_DIR": tmp_path}
    with httpx.Client(base_url=service.url, timeout=10) as client:
        assert gauge(client, 'payments_database_standbys{kind="asynchronous"}') == 1
        told = invoke("doctor", **given)
        assert told.returncode == 1
        assert re.search(
            "FAIL +standbys +0 synchronous, 1 asynchronous: a failover may", told.stdout
        )
        with primary.connect() as connection:
            connection.execute("ALTER SYSTEM SET synchronous_standby_names = '*'")
            connection.execute("SELECT pg_reload_conf()")
        series = 'payments_database_standbys{kind="synchronous"}'
        eventually(lambda: gauge(client, series) == 1)
        assert service.charge(client, "k").status_code == 201
        assert re.search("ok +standbys +1 synchronous, 0 async", invoke("doctor", **given).stdout)


def test_a_failover_that_loses_is_noticed_and_accepted(
    servers: tuple[OutsidePostgres, Standby], service: ServiceProcess, tmp_path: Path
) -> None:
    primary, standby = servers
    port = primary.address.port
    given = {**primary.settings, "PAYMENTS_DATA_DIR": tmp_path, "LOG_LEVEL": "ERROR"}
    with httpx.Client(base_url=service.url, timeout=10) as client:
        a = service.charge(client, "a").json()["id"]
        eventually(lambda: caught_up(primary))
        standby.freeze()
        b = service.charge(client, "b").json()["id"]
        refund = {"payment_id": a, "amount_cents": 500}
        keyed = {"Idempotency-Key": "r1"}
        assert client.post("/v1/refund", json=refund, headers=keyed).status_code == 201
        head = eventually(lambda: _head(given, 6))

        primary.kill()
        standby.promote_at(port)

        health = eventually(lambda: _rewound(client))
        assert health.status_code == 200
        assert gauge(client, "payments_log_rewound") == 1
        assert client.get(f"/v1/payments/{b}").status_code == 404
        other = {"Idempotency-Key": "r2"}
        refused = client.post("/v1/refund", json=refund, headers=other)
        assert (refused.status_code, refused.json()["code"]) == (503, "log_rewound")
        assert service.charge(client, "c").status_code == 201
        again = service.charge(client, "b")  # the provider has it, and answers the same
        assert (again.status_code, again.json()["id"]) == (201, b)
        assert "the log was rewound" in service.log.read_text()
        assert re.search("FAIL +log +.* are missing", invoke("doctor", **given).stdout)
        found = invoke("audit", "verify", "--head", head, **given)
        assert found.returncode == 1
        assert "acknowledged events are missing" in found.stdout

        accepted = invoke("log", "accept-loss", "--by", "Ada", "--reason", "failover", **given)
        assert accepted.returncode == 0, accepted.stderr
        eventually(lambda: not _rewound(client))
        made = client.post("/v1/refund", json=refund, headers=keyed)
        assert (made.status_code, made.json()["refunded_cents"]) == (201, 500)
        assert refunds(tmp_path / "simulated-ledger.sqlite") == 1
        eventually(lambda: invoke("audit", "verify", "--head", head, **given).returncode == 0)

    service.terminate()
    service.start()
    with httpx.Client(base_url=service.url, timeout=10) as client:
        assert client.get("/health").json()["log"] == "ok"


def test_a_restart_notices_it_as_well(
    servers: tuple[OutsidePostgres, Standby], service: ServiceProcess
) -> None:
    """Nobody of those who were told is left; the data directory remembers the newest seal."""
    primary, standby = servers
    with httpx.Client(base_url=service.url, timeout=10) as client:
        service.charge(client, "a")
        eventually(lambda: caught_up(primary))
        standby.freeze()
        service.charge(client, "b")
        kept = eventually(lambda: list(service.data_dir.glob("log-head-*.json")))[0]
        eventually(lambda: b'"position":4' in kept.read_bytes())
        service.kill()
        port = primary.address.port
        primary.kill()
        standby.promote_at(port)
    service.start()
    with httpx.Client(base_url=service.url, timeout=10) as client:
        eventually(lambda: _rewound(client))


def _rewound(client: httpx.Client) -> httpx.Response | None:
    health = client.get("/health")
    return health if health.json()["log"] == "rewound" else None


def _head(given: dict[str, Any], position: int) -> str | None:
    head = invoke("audit", "head", **given).stdout.strip()
    return head if head.startswith(f"{position}:") else None


class TestSeveralServers:
    """libpq takes the first one that answers, a standby as well."""

    @pytest.fixture
    def servers(self, data_dir: Path) -> Iterator[tuple[OutsidePostgres, Standby]]:
        with OutsidePostgres(data_dir / "primary") as primary:
            standby = Standby(data_dir / "standby", primary)
            standby.address = msgspec.structs.replace(primary.address, host="127.0.0.2")
            with standby:
                yield primary, standby

    @pytest.mark.parametrize("form", ["127.0.0.2,127.0.0.1", "a name"])
    @pytest.mark.anyio
    async def test_the_one_that_takes_events_is_used(
        self, servers: Any, form: str, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        async def addresses(host: str, timeout_s: float) -> list[str]:
            return ["127.0.0.2", "127.0.0.1"]

        monkeypatch.setattr(database, "addresses_of", addresses)
        address = msgspec.structs.replace(servers[0].address, host=form.replace(" ", "."))
        async with Database(address, 1) as opened:
            assert await opened.fetch("SELECT pg_is_in_recovery()") == [(False,)]

    @pytest.mark.anyio
    async def test_to_read_those_will_do_that_do_not(
        self, servers: Any, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        async def addresses(host: str, timeout_s: float) -> list[str]:
            return ["127.0.0.2", "127.0.0.2"]

        monkeypatch.setattr(database, "addresses_of", addresses)
        address = msgspec.structs.replace(servers[0].address, host="a.name")
        async with Database(address, 1) as opened:
            assert await opened.fetch("SELECT pg_is_in_recovery()") == [(True,)]

    def test_at_the_start_as_well(self, servers: Any, monkeypatch: pytest.MonkeyPatch) -> None:
        primary, standby = servers
        several = msgspec.structs.replace(primary.address, host="127.0.0.2,127.0.0.1")
        with connect(several, "tests") as connection:
            assert connection.execute("SELECT pg_is_in_recovery()").fetchone() == (False,)
        monkeypatch.setattr(database, "_is_a_name", lambda host: True)
        with connect(standby.address, "tests") as connection:
            assert connection.execute("SELECT pg_is_in_recovery()").fetchone() == (True,)
        with pytest.raises(psycopg.OperationalError, match="read-only"):
            psycopg.connect(database._to_write(standby.address.conninfo()))
