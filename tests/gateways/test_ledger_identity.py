"""A database's payments are in one ledger of the simulated provider, and in no other."""

import asyncio
from pathlib import Path
from typing import Any

import psycopg
import pytest

from payments.database.connections import DatabaseAddress
from payments.errors import StartError
from payments.gateways import Gateway
from payments.gateways.ledger_identity import FORGET
from payments.gateways.simulated import SimulatedGateway
from payments.service import Service
from payments.settings import Settings
from tests.doubles.gateway import ScriptedGateway
from tests.process import at, free_port, invoke, run
from tests.support import until

pytestmark = pytest.mark.anyio

Connection = psycopg.Connection[Any]


async def start(address: DatabaseAddress, gateway: Gateway) -> None:
    service = Service(Settings(), address, gateway=gateway)
    await service.start(work=False)
    await service.stop(2)


def known(connection: Connection) -> list[Any]:
    return connection.execute("SELECT id FROM simulated_ledger").fetchall()


async def test_the_first_ledger_becomes_the_known_one(
    address: DatabaseAddress, connection: Connection, tmp_path: Path
) -> None:
    assert known(connection) == []
    for _ in range(2):
        gateway = SimulatedGateway(tmp_path / "ledger")
        await start(address, gateway)
        assert gateway.ledger is not None
        assert known(connection) == [(gateway.ledger[1],)]


async def test_another_one_is_refused_until_it_is_accepted(
    address: DatabaseAddress, connection: Connection, tmp_path: Path
) -> None:
    await start(address, SimulatedGateway(tmp_path / "ledger"))
    before = known(connection)
    with pytest.raises(StartError, match=f"SIMULATED_LEDGER.*another.*{FORGET}") as refused:
        await start(address, SimulatedGateway(tmp_path / "another"))
    assert len(str(refused.value).splitlines()) == 1
    assert known(connection) == before
    connection.execute(FORGET.encode())
    await start(address, SimulatedGateway(tmp_path / "another"))
    assert known(connection) != before
    with pytest.raises(StartError):
        await start(address, SimulatedGateway(tmp_path / "ledger"))


async def test_two_that_start_at_once_do_not_both_become_it(
    address: DatabaseAddress, connection: Connection, tmp_path: Path
) -> None:
    """The second one looks, finds none, and waits for the first one's row."""
    gateway = SimulatedGateway(tmp_path / "ledger")
    assert gateway.ledger is not None
    with psycopg.connect(address.conninfo("tests")) as first:
        first.execute("INSERT INTO simulated_ledger (id) VALUES (gen_random_uuid())")
        starting = asyncio.create_task(start(address, gateway))
        await until(lambda: waits_for_a_lock(connection))
        first.commit()
    with pytest.raises(StartError, match="SIMULATED_LEDGER"):
        await starting


def waits_for_a_lock(connection: Connection) -> bool:
    found = connection.execute(
        "SELECT FROM pg_stat_activity WHERE wait_event_type = 'Lock'"
        " AND datname = current_database()"
    )
    return bool(found.rowcount)


@pytest.mark.parametrize("gateway", [SimulatedGateway, ScriptedGateway])
async def test_without_a_file_there_is_nothing_to_know(
    address: DatabaseAddress, connection: Connection, tmp_path: Path, gateway: Any
) -> None:
    exempt = (None,) if gateway is SimulatedGateway else ()
    await start(address, gateway(*exempt))
    assert known(connection) == []
    await start(address, SimulatedGateway(tmp_path / "ledger"))
    await start(address, gateway(*exempt))
    assert len(known(connection)) == 1


@pytest.mark.parametrize("command", ["serve", "work"])
async def test_a_process_with_another_ledger_ends_with_one_line(
    address: DatabaseAddress, tmp_path: Path, command: str
) -> None:
    await start(address, SimulatedGateway(tmp_path / "ledger"))
    given = at(address) | {"PAYMENTS_DATA_DIR": tmp_path / "other", "PORT": free_port()}
    done = await asyncio.to_thread(run, command, **given, LOG_LEVEL="ERROR")
    assert (done.returncode, done.stdout) == (1, "")
    assert done.stderr.startswith("payments: SIMULATED_LEDGER: ")
    assert done.stderr.count("\n") == 1
    assert "payments psql -c" in done.stderr


def test_who_only_looks_makes_no_ledger(
    address: DatabaseAddress, tmp_path: Path, connection: Connection
) -> None:
    given = at(address) | {"PAYMENTS_DATA_DIR": tmp_path}
    (tmp_path / "simulated-ledger.jsonl").write_text("")
    for command in (["doctor"], ["parked", "retry", "--all"]):
        invoke(*command, **given, LOG_LEVEL="ERROR")
    assert [each.name for each in tmp_path.iterdir()] == ["simulated-ledger.jsonl"]
    assert known(connection) == []
