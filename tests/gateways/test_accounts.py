"""A database's payments are in one account of each provider, and in no other."""

import asyncio
import os
import re
import shlex
import signal
from collections.abc import Callable
from pathlib import Path
from typing import Any

import psycopg
import pytest
from click.testing import Result

from payments.database.connections import DatabaseAddress
from payments.errors import StartError
from payments.gateways import Gateway, NeverSent, OutcomeUnknown
from payments.gateways import accounts as module
from payments.gateways.accounts import FORGET
from payments.gateways.simulated import SimulatedGateway
from payments.service import Service
from payments.settings import Settings
from tests.doubles.gateway import ScriptedGateway
from tests.process import at, free_port, invoke, run
from tests.support import until

pytestmark = pytest.mark.anyio

Connection = psycopg.Connection[Any]


class Says(ScriptedGateway):
    """What it says of its account, one entry for each question; the last one ever after."""

    def __init__(self, *says: str | Exception | None, name: str = "acme") -> None:
        super().__init__()
        self.name = name
        self.says = list(says)
        self.asked = 0

    async def account(self, timeout_s: float) -> str | None:
        self.asked += 1
        said = self.says.pop(0) if len(self.says) > 1 else self.says[0]
        if isinstance(said, Exception):
            raise said
        return said


async def start(address: DatabaseAddress, *gateways: Gateway) -> None:
    service = Service(Settings(), address, gateways=gateways)
    await service.start(work=False)
    await service.stop(2)


def known(connection: Connection) -> list[Any]:
    return connection.execute("SELECT account FROM provider_accounts").fetchall()


async def test_the_first_ledger_becomes_the_known_one(
    address: DatabaseAddress, connection: Connection, tmp_path: Path
) -> None:
    assert known(connection) == []
    for _ in range(2):
        gateway = SimulatedGateway(tmp_path / "ledger")
        account = await gateway.account(1)
        await start(address, gateway)
        assert account is not None
        assert known(connection) == [(account,)]


async def test_another_one_is_refused_until_it_is_accepted(
    address: DatabaseAddress, connection: Connection, tmp_path: Path
) -> None:
    await start(address, SimulatedGateway(tmp_path / "ledger"))
    before = known(connection)
    with pytest.raises(StartError, match=r"simulated has another account.*DELETE FROM") as refused:
        await start(address, SimulatedGateway(tmp_path / "another"))
    assert len(str(refused.value).splitlines()) == 1
    assert known(connection) == before
    connection.execute(FORGET.format("simulated").encode())
    await start(address, SimulatedGateway(tmp_path / "another"))
    assert known(connection) != before
    with pytest.raises(StartError):
        await start(address, SimulatedGateway(tmp_path / "ledger"))


async def test_two_that_start_at_once_do_not_both_become_it(
    address: DatabaseAddress, connection: Connection, tmp_path: Path
) -> None:
    """The second one looks, finds none, and waits for the first one's row."""
    gateway = SimulatedGateway(tmp_path / "ledger")
    with psycopg.connect(address.conninfo("tests")) as first:
        first.execute("INSERT INTO provider_accounts VALUES ('simulated', 'another')")
        starting = asyncio.create_task(start(address, gateway))
        await until(lambda: waits_for_a_lock(connection))
        first.commit()
    with pytest.raises(StartError, match="another account"):
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
    assert done.stderr.startswith("payments: the provider simulated has another account")
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


async def test_the_command_in_the_message_accepts_the_new_one(
    address: DatabaseAddress, connection: Connection
) -> None:
    """As it is printed, and that provider's account only."""
    await start(address, Says("acct_1"), Says("acct_9", name="other.one"))
    with pytest.raises(StartError) as refused:
        await start(address, Says("acct_2"), Says("acct_9", name="other.one"))
    (command,) = re.findall(r"`payments ([^`]+)`", str(refused.value))
    done = await asyncio.to_thread(run, *shlex.split(command), **at(address))
    assert (done.returncode, done.stdout) == (0, "DELETE 1\n")
    assert known(connection) == [("acct_9",)]
    await start(address, Says("acct_2"), Says("acct_9", name="other.one"))
    assert sorted(known(connection)) == [("acct_2",), ("acct_9",)]


async def test_each_provider_has_an_account_of_its_own(
    address: DatabaseAddress, connection: Connection
) -> None:
    """The same id at another provider is another account."""
    await start(address, Says("acct_1"), Says("acct_1", name="other"), Says(None, name="plain"))
    assert known(connection) == [("acct_1",)] * 2
    with pytest.raises(StartError, match="the provider other has another account"):
        await start(address, Says("acct_1"), Says("acct_2", name="other"))
    await start(address, Says("acct_2", name="third"))


@pytest.mark.parametrize(
    "error", [NeverSent("refused"), OutcomeUnknown("503", is_outage=True), KeyError("a defect")]
)
async def test_one_that_cannot_be_asked_is_asked_again(
    address: DatabaseAddress,
    connection: Connection,
    monkeypatch: pytest.MonkeyPatch,
    error: Exception,
) -> None:
    monkeypatch.setattr(module, "AGAIN_S", 0.05)
    silent, other = Says(error, error, "acct_1"), Says("acct_9", name="other")
    service = Service(Settings(), address, gateways=[silent, other])
    await service.start(work=False)
    try:
        await until(lambda: len(known(connection)) == 2)
        assert (silent.asked, other.asked) == (3, 1)
    finally:
        await service.stop(2)


async def test_another_account_that_is_found_later_stops_the_process(
    address: DatabaseAddress, connection: Connection, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As SIGTERM does: what is under way is finished."""
    monkeypatch.setattr(module, "AGAIN_S", 0.05)
    sent: list[tuple[int, int]] = []
    monkeypatch.setattr(os, "kill", lambda pid, signum: sent.append((pid, signum)))
    await start(address, Says("acct_1"))
    service = Service(Settings(), address, gateways=[Says(NeverSent("refused"), "acct_2")])
    await service.start(work=False)
    try:
        await until(lambda: sent)
        await asyncio.sleep(0.2)
        assert sent == [(os.getpid(), signal.SIGTERM)]
        assert known(connection) == [("acct_1",)]
    finally:
        await service.stop(2)


def test_doctor_lists_the_accounts(
    operator: Callable[..., Result], connection: Connection, monkeypatch: pytest.MonkeyPatch
) -> None:
    connection.execute(
        "INSERT INTO provider_accounts VALUES ('simulated-b', 'b-1', '2026-01-02 03:04+00'),"
        " ('former', 'acct_0', '2025-01-02 03:04+00')"
    )
    monkeypatch.setenv("GATEWAYS", "simulated,simulated-b")
    lines = operator("doctor").stdout.splitlines()
    (line,) = [line for line in lines if line.split()[1] == "accounts"]
    assert line == (
        "ok    accounts   simulated: none, simulated-b: b-1 since 2026-01-02, "
        "former: acct_0 since 2025-01-02"
    )
    assert "ok    settings   new payments go to simulated" in lines
