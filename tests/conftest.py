"""A real Postgres for the tests: one embedded server, one migrated template, a clone per test."""

import shutil
import tempfile
import uuid
from collections.abc import AsyncIterator, Iterator
from pathlib import Path
from typing import Any

import msgspec
import psycopg
import pytest
from blockbuster import blockbuster_ctx
from psycopg.sql import SQL, Identifier

from payments import embedded_postgres
from payments.database import Database, DatabaseAddress, create_database_if_missing
from payments.migrations import migrate
from payments.service import Service
from payments.settings import Settings


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--kills", type=int, default=30, help="cycles of the kill -9 loop")


@pytest.fixture(scope="session")
def anyio_backend() -> str:
    return "asyncio"


@pytest.fixture(autouse=True)
def nothing_blocks_the_event_loop() -> Iterator[None]:
    """A blocking call of ours inside the event loop fails the test that made it.

    Allowed: building things before the first request, and reading /proc for the metrics.
    """
    with blockbuster_ctx(["payments", "web"]) as blockbuster:
        for function in blockbuster.functions.values():
            function.can_block_in("payments/telemetry.py", {"__init__", "exposition"})
            function.can_block_in("payments/gateways/simulated_ledger.py", {"__init__"})
        yield


@pytest.fixture(scope="session")
def state_dir() -> Iterator[Path]:
    """A directory that the embedded server's user can reach, unlike pytest's own."""
    path = Path(tempfile.mkdtemp(prefix="payments-tests-"))
    path.chmod(0o755)
    yield path
    shutil.rmtree(path)


@pytest.fixture(scope="session")
def server(state_dir: Path) -> Iterator[DatabaseAddress]:
    """The server's maintenance database."""
    with embedded_postgres.start(state_dir) as running:
        yield DatabaseAddress(str(running.socket_dir), running.port, running.user, None, "postgres")
    embedded_postgres.wait_until_stopped(state_dir)


@pytest.fixture(scope="session")
def template(server: DatabaseAddress) -> DatabaseAddress:
    address = msgspec.structs.replace(server, dbname="template_payments")
    create_database_if_missing(address)
    migrate(address)
    return address


@pytest.fixture
def empty_database(server: DatabaseAddress) -> Iterator[DatabaseAddress]:
    """A database without our schema."""
    yield from _database(server, "template0")


@pytest.fixture
def address(server: DatabaseAddress, template: DatabaseAddress) -> Iterator[DatabaseAddress]:
    """A migrated database of this test alone."""
    yield from _database(server, template.dbname)


def _database(server: DatabaseAddress, template: str) -> Iterator[DatabaseAddress]:
    name = f"test_{uuid.uuid4().hex[:12]}"
    with psycopg.connect(server.conninfo("tests"), autocommit=True) as connection:
        connection.execute("SET statement_timeout = '30s'; SET lock_timeout = '30s'")
        connection.execute(
            SQL("CREATE DATABASE {} TEMPLATE {}").format(Identifier(name), Identifier(template))
        )
        yield msgspec.structs.replace(server, dbname=name)
        connection.execute(SQL("DROP DATABASE {} WITH (FORCE)").format(Identifier(name)))


@pytest.fixture
def connection(address: DatabaseAddress) -> Iterator[psycopg.Connection[Any]]:
    """A plain connection to this test's database, for looking at what is stored."""
    with psycopg.connect(address.conninfo("tests"), autocommit=True) as opened:
        yield opened


@pytest.fixture
async def database(address: DatabaseAddress) -> AsyncIterator[Database]:
    opened = Database(address, pool_max=2)
    await opened.open()
    yield opened
    await opened.close()


@pytest.fixture
def settings(tmp_path: Path) -> Settings:
    return Settings(simulated_ledger=str(tmp_path / "ledger.jsonl"))


@pytest.fixture
async def service(address: DatabaseAddress, settings: Settings) -> AsyncIterator[Service]:
    """A started service on the simulated gateway."""
    running = Service(settings, address)
    await running.start()
    yield running
    await running.stop(5)
