"""Connections: what is asked of the server holds, whatever its defaults are or stands between."""

from collections.abc import Iterator
from typing import Any

import psycopg
import pytest
from psycopg.sql import SQL, Identifier

from payments.database.connections import Database, DatabaseAddress, connect
from payments.database.session import SETTINGS
from tests.pooler import Pooler

pytestmark = pytest.mark.anyio

# What the code relies upon, and what a server may have been told instead.
WANTED = {
    "TimeZone": "UTC",
    "default_transaction_isolation": "read committed",
    "synchronous_commit": "on",
    "enable_seqscan": "off",
    "jit": "off",
    "statement_timeout": "2s",
    "lock_timeout": "1200ms",
    "idle_in_transaction_session_timeout": "5s",
}
TOLD = {
    "TimeZone": "Asia/Kolkata",
    "default_transaction_isolation": "serializable",
    "synchronous_commit": "off",
    "enable_seqscan": "on",
    "jit": "on",
    "statement_timeout": "0",
    "lock_timeout": "0",
    "idle_in_transaction_session_timeout": "0",
}
IN_FORCE = "SELECT name, current_setting(name) FROM unnest(%s::text[]) AS name"
NAMES = list(WANTED)


@pytest.fixture(params=["directly", "through a pooler"])
def contrary(
    request: pytest.FixtureRequest,
    address: DatabaseAddress,
    connection: psycopg.Connection[Any],
    monkeypatch: pytest.MonkeyPatch,
) -> Iterator[DatabaseAddress]:
    """A database whose defaults are the opposite of what we want."""
    # Nor does it count what other programs are told; and a pooler would refuse it.
    monkeypatch.setenv("PGOPTIONS", "-c synchronous_commit=off")
    for name, value in TOLD.items():
        statement = SQL("ALTER DATABASE {} SET {} = {}")
        connection.execute(statement.format(Identifier(address.dbname), Identifier(name), value))
    with psycopg.connect(
        host=address.host, port=address.port, user=address.user, dbname=address.dbname
    ) as plain:
        there: dict[str, str] = dict(plain.execute(IN_FORCE, [NAMES]).fetchall())
    assert not there.items() & WANTED.items()
    if request.param == "directly":
        yield address
    else:
        with Pooler(address, "session") as pooler:
            yield pooler.address


def test_every_option_is_looked_at() -> None:
    assert WANTED.keys() == TOLD.keys() == SETTINGS.keys()


async def test_the_pools_and_ones_own_connections(contrary: DatabaseAddress) -> None:
    async with Database(contrary, pool_max=1) as database:
        assert dict(await database.fetch(IN_FORCE, [NAMES])) == WANTED
        async with await database.connect("tests of ours") as own:
            assert dict(await (await own.execute(IN_FORCE, [NAMES])).fetchall()) == WANTED


def test_blocking_connections(contrary: DatabaseAddress) -> None:
    with connect(contrary, "tests of ours") as opened:
        assert dict(opened.execute(IN_FORCE, [NAMES]).fetchall()) == WANTED
