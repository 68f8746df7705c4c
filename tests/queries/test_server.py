"""Who keeps vacuum from removing dead rows, for how long, and what a role may see of that."""

import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import msgspec
import psycopg
import pytest

from payments.database.connections import Database, DatabaseAddress, connect
from payments.queries.server import Horizon, HorizonAge, horizon, unread_notifications
from tests.support import until

pytestmark = pytest.mark.anyio

Connection = psycopg.Connection[Any]
KEEP = "SET idle_in_transaction_session_timeout = 0; SET statement_timeout = 0"


@contextmanager
def holding(address: DatabaseAddress, statement: str) -> Iterator[Connection]:
    """Somebody in the middle of a transaction."""
    with connect(address, "somebody") as opened:
        opened.execute(KEEP)
        opened.execute(f"BEGIN ISOLATION LEVEL REPEATABLE READ; {statement}".encode())
        yield opened


def write(connection: Connection, transactions: int) -> None:
    for _ in range(transactions):
        connection.execute("UPDATE followers SET updated_at = now()")


async def held_by(database: Database, who: str | None) -> Horizon:
    """Databases for tests are made meanwhile, which takes a transaction of its own."""

    async def found() -> Horizon | None:
        now = await horizon(database)
        return now if now.held_by == who else None

    return await until(found)  # type: ignore[no-any-return]


def name_of(holder: Connection) -> str:
    return f"session {holder.info.backend_pid} (somebody)"


async def test_nobody(database: Database, connection: Connection) -> None:
    write(connection, 3)
    found = await held_by(database, None)
    assert (found.transactions, found.held_s) == (0, 0.0)
    write(connection, 2)
    assert (await horizon(database)).next_transaction >= found.next_transaction + 2


@pytest.mark.parametrize("statement", ["SELECT 1", "UPDATE followers SET updated_at = now()"])
async def test_a_session(
    database: Database, address: DatabaseAddress, connection: Connection, statement: str
) -> None:
    """That reads, or has written."""
    with holding(address, statement) as holder:
        connection.execute("CREATE TABLE busy ()")
        time.sleep(0.1)
        found = await held_by(database, name_of(holder))
        assert found.transactions >= 1
        assert 0.1 <= found.held_s < 60
    await held_by(database, None)


@pytest.fixture
def plain_role(address: DatabaseAddress, connection: Connection) -> Iterator[DatabaseAddress]:
    """One that sees nothing of other roles' sessions."""
    name = f"plain_{address.dbname}"
    connection.execute(f"CREATE ROLE {name} LOGIN".encode())
    yield msgspec.structs.replace(address, user=name)
    connection.execute(f"DROP ROLE {name}".encode())


async def test_what_a_role_without_rights_sees(
    plain_role: DatabaseAddress, address: DatabaseAddress, connection: Connection
) -> None:
    """Who holds it, and for how many transactions; of itself for how long as well."""
    async with Database(plain_role, 1) as database:
        with holding(address, "SELECT 1") as holder:
            connection.execute("CREATE TABLE busy ()")
            found = await held_by(database, name_of(holder))
            assert found.transactions >= 1
            assert found.held_s == 0
        with holding(plain_role, "SELECT 1") as holder:
            connection.execute("DROP TABLE busy")
            assert (await held_by(database, name_of(holder))).held_s > 0


async def test_another_database(
    database: Database, server: DatabaseAddress, connection: Connection
) -> None:
    """Who writes there keeps all snapshots old; who reads there concerns nobody here."""
    with holding(server, "SELECT 1"):
        connection.execute("CREATE TABLE busy ()")
        await held_by(database, None)
    with holding(server, "SELECT pg_current_xact_id()") as writer:
        connection.execute("DROP TABLE busy")
        await held_by(database, name_of(writer))


async def test_vacuum_holds_nothing(
    database: Database, address: DatabaseAddress, connection: Connection
) -> None:
    rows = "SELECT repeat('x', 500) FROM generate_series(1, 9999)"
    connection.execute(f"CREATE TABLE large AS {rows}".encode())
    running = "SELECT pid FROM pg_stat_progress_vacuum WHERE datname = current_database()"

    def vacuum() -> None:
        with connect(address, "vacuum") as cleaner:
            cleaner.execute("SET statement_timeout = 0; SET vacuum_cost_delay = 100")
            cleaner.execute("SET vacuum_cost_limit = 1")
            with pytest.raises(psycopg.errors.QueryCanceled):
                cleaner.execute("VACUUM large")

    thread = threading.Thread(target=vacuum)
    thread.start()
    while not connection.execute(running).fetchall():
        time.sleep(0.01)
    write(connection, 3)
    await held_by(database, None)
    connection.execute(f"SELECT pg_cancel_backend(pid) FROM ({running}) AS it".encode())
    thread.join(timeout=20)


async def test_notifications(database: Database) -> None:
    assert await unread_notifications(database) == 0.0


def held(next_transaction: int, transactions: int, held_s: float = 0.0) -> Horizon:
    return Horizon(
        next_transaction=next_transaction,
        held_by="somebody",
        transactions=transactions,
        held_s=held_s,
    )


def test_an_age_is_known_from_what_was_seen() -> None:
    age = HorizonAge()
    assert age.seconds(held(100, 0), 0.0) == 0
    assert age.seconds(held(200, 0), 10.0) == 0
    # The oldest is 150, which was given out between the two looks.
    assert age.seconds(held(300, 150), 20.0) == 10
    assert age.seconds(held(400, 250), 35.0) == 25
    # From before the first look: at the least as old as that.
    assert age.seconds(held(500, 490), 50.0) == 50
    # Let go.
    assert age.seconds(held(600, 0), 60.0) == 0
    assert age.seconds(held(700, 50), 70.0) == 0


def test_a_server_that_does_nothing_holds_nothing_back() -> None:
    age = HorizonAge()
    for now in range(0, 1000, 10):
        assert age.seconds(held(100, 0), now) == 0
    assert age.seconds(held(101, 1), 1000.0) == 0
    assert age.seconds(held(102, 2), 1010.0) == 10


def test_what_the_server_tells_counts_too() -> None:
    age = HorizonAge()
    assert age.seconds(held(100, 10, 700.0), 5.0) == 700
    assert age.seconds(held(200, 110, 1.0), 1000.0) == 995


def test_no_more_is_remembered_than_a_day() -> None:
    age = HorizonAge()
    for number in range(30_000):
        age.seconds(held(number, 0), 5.0 * number)
    assert len(age._next) == len(age._times) == HorizonAge.KEPT
    assert age.seconds(held(30_000, 29_999), 150_000.0) > 86_400
