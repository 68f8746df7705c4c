"""A session is set up, is its connection's own, and nothing is acknowledged in one that is not."""

import asyncio
from collections.abc import Callable, Iterator
from typing import Any, Literal

import httpx
import psycopg
import pytest
from click.testing import Result
from loguru import logger

from payments.database import connections as database_module
from payments.database import session
from payments.database.connections import Database, DatabaseAddress, connect, refuse_pooling
from payments.database.session import SETTINGS, SessionUnfit
from payments.errors import DatabaseUnavailable, StartError
from payments.events.appender import Appender
from payments.observability.logs import Repeats
from payments.observability.metrics import Telemetry
from payments.queries.server import unsafe_settings
from tests.events.commits import commits, let_commits_not_wait, log_of
from tests.machine import within
from tests.pooler import WAIT_S, Pooler
from tests.process import ServiceProcess, at, run
from tests.support import PATIENCE_S, stored_event

pytestmark = pytest.mark.anyio

Connection = psycopg.Connection[Any]
Operator = Callable[..., Result]
ROW = ["", "a mark", *SETTINGS.values()]


@pytest.fixture
def logged(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[str]]:
    """Every line of a level above INFO, with its fields."""
    monkeypatch.setattr(database_module._Connection, "_repeats", Repeats())
    found: list[str] = []
    sink = logger.add(lambda line: found.append(line), level="WARNING", format="{message} {extra}")
    yield found
    logger.remove(sink)


def refusal(address: DatabaseAddress) -> str:
    with pytest.raises(StartError) as refused:
        refuse_pooling(address)
    assert "\n" not in str(refused.value)
    return str(refused.value)


def test_what_a_new_session_answers() -> None:
    assert session.mark_of_new(ROW) == "a mark"
    assert session.mark_of_new([None, *ROW[1:]]) == "a mark"
    with pytest.raises(SessionUnfit, match="pool_mode = session"):
        session.mark_of_new(["another mark", *ROW[1:]])


@pytest.mark.parametrize("name", SETTINGS)
def test_each_setting_is_compared(name: str) -> None:
    """In the new session, and in a later transaction."""
    row = [*ROW]
    row[2 + list(SETTINGS).index(name)] = "another"
    text = f"^the session does not have the requested settings: {name} is 'another' instead of"
    with pytest.raises(SessionUnfit, match=text):
        session.mark_of_new(row)
    with pytest.raises(SessionUnfit, match=text):
        session.check(row[1:], "a mark")
    session.check(ROW[1:], "a mark")
    with pytest.raises(SessionUnfit, match="pool_mode = session"):
        session.check(ROW[1:], "my mark")


@pytest.mark.parametrize("size", [2, 20])
@pytest.mark.parametrize("in_turn", [False, True])
@pytest.mark.parametrize("resets", ["never", "session", "transaction"])
def test_transaction_pooling_is_refused(
    address: DatabaseAddress,
    size: int,
    in_turn: bool,
    resets: Literal["never", "session", "transaction"],
) -> None:
    ignores = frozenset({"options"})
    for _ in range(2):  # also if several server connections are there already
        with Pooler(
            address, "transaction", size=size, resets=resets, in_turn=in_turn, ignores=ignores
        ) as pooler:
            assert "(PgBouncer: pool_mode = session, with" in refusal(pooler.address)


def test_sessions_that_others_are_busy_with(address: DatabaseAddress) -> None:
    """Server connections that our two are given in turn, each of which nobody had before."""
    with Pooler(address, "transaction", in_turn=True) as pooler:
        others = [psycopg.connect(pooler.address.conninfo("other")) for _ in range(5)]
        for other in others:
            other.execute("SELECT 1")  # begins a transaction, which keeps one for itself
        for other in others:
            other.commit()
        assert "(PgBouncer: pool_mode = session, with" in refusal(pooler.address)
        for other in others:
            other.close()


def test_two_sessions_that_seem_to_be_ones_own(
    address: DatabaseAddress, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Another client takes part: the second is given a session that only this one had before."""
    real = database_module._connect
    with (
        Pooler(address, "transaction") as pooler,
        psycopg.connect(pooler.address.conninfo("other")) as other,
    ):

        def connected(*arguments: Any) -> Any:
            made = real(*arguments)
            other.commit()
            pooler.wait_until_idle(2)
            return made

        other.execute("SELECT 1")
        monkeypatch.setattr(database_module, "_connect", connected)
        assert "(PgBouncer: pool_mode = session, with" in refusal(pooler.address)


def test_session_pooling_is_not_refused(address: DatabaseAddress) -> None:
    with Pooler(address, "session", size=2) as pooler:
        for _ in range(3):
            refuse_pooling(pooler.address)


def test_a_session_that_is_handed_on_as_it_was_left(address: DatabaseAddress) -> None:
    with Pooler(address, "session", resets="never") as pooler:
        connect(pooler.address, "the first").close()
        assert "server_reset_query = DISCARD ALL" in refusal(pooler.address)


def test_a_pooler_that_has_no_connection_free(
    address: DatabaseAddress, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(database_module, "POOLER_TIMEOUT_S", 0.5)
    with within(WAIT_S), Pooler(address, "session", size=1) as pooler:
        assert "does the pooler have a free connection?" in refusal(pooler.address)


def test_the_commands_say_so_in_one_line(
    address: DatabaseAddress, operator: Operator, monkeypatch: pytest.MonkeyPatch
) -> None:
    with Pooler(address, "transaction") as pooler:
        started = run("serve", **at(pooler.address), LOG_LEVEL="WARNING")
        assert (started.returncode, started.stderr.count("\n")) == (1, 1), started.stderr
        assert "use session pooling" in started.stderr
        monkeypatch.setenv("DATABASE_HOST", pooler.address.host)
        for command in ("work", "migrate", "replay", "rebuild"):
            done = operator(command)
            assert (done.exit_code, done.stderr.count("\n")) == (1, 1), done.stderr
            assert "use session pooling" in done.stderr
        told = operator("doctor")
    assert told.exit_code == 1
    (line,) = (line for line in told.stdout.splitlines() if line.startswith("FAIL"))
    assert "use session pooling" in line


def test_the_service_works_through_session_pooling(
    address: DatabaseAddress, operator: Operator, monkeypatch: pytest.MonkeyPatch, tmp_path: Any
) -> None:
    with Pooler(address, "session") as pooler:
        monkeypatch.setenv("DATABASE_HOST", pooler.address.host)
        with (
            ServiceProcess(tmp_path, **at(pooler.address)) as service,
            httpx.Client(timeout=10) as client,
        ):
            answers = [service.charge(client, f"k{number}") for number in range(5)]
            assert [answer.status_code for answer in answers] == [201] * 5
            assert "; through a pooler" in operator("doctor").stdout
            assert service.terminate() == 0
        verified = operator("audit", "verify")
    assert verified.exit_code == 0, verified.output


def not_set(name: str) -> str:
    """SET_UP, but for one setting."""
    wanted = f"set_config('{name}', '{SETTINGS[name]}', false)"
    assert wanted in session.SET_UP
    return session.SET_UP.replace(wanted, f"current_setting('{name}')")


def set_for_a_moment(name: str) -> str:
    """SET_UP, but one setting holds for its transaction only."""
    wanted = f"set_config('{name}', '{SETTINGS[name]}', false)"
    return session.SET_UP.replace(wanted, wanted.replace("false", "true"))


@pytest.mark.parametrize("lost", [not_set, set_for_a_moment])
async def test_nothing_is_acknowledged_where_a_setting_does_not_hold(
    database: Database,
    connection: Connection,
    address: DatabaseAddress,
    monkeypatch: pytest.MonkeyPatch,
    logged: list[str],
    lost: Any,
) -> None:
    let_commits_not_wait(connection, address)
    monkeypatch.setattr(session, "SET_UP", lost("synchronous_commit"))
    words = "synchronous_commit is 'off' instead of 'on'"
    with pytest.raises(SessionUnfit, match=words):
        await database.connect("tests of ours")
    with pytest.raises(StartError, match=words):
        connect(address, "tests of ours")
    appender = Appender(database.connect, Telemetry(), intent_queue_max=10)
    appender.start()
    intent, outcome = appender.append_intent(stored_event()), appender.append([stored_event()])
    with pytest.raises(DatabaseUnavailable):
        await intent
    assert not outcome.done()
    assert log_of(connection) == []
    assert any(words in line for line in logged)
    monkeypatch.undo()
    assert await asyncio.wait_for(outcome, PATIENCE_S) == 1
    await appender.stop(1)
    assert commits(connection) == [("payments appender", "on")]


async def test_a_commit_waits_whatever_its_session_was_set_to_since(
    database: Database, connection: Connection, address: DatabaseAddress
) -> None:
    let_commits_not_wait(connection, address)

    async def connected(name: str) -> psycopg.AsyncConnection[Any]:
        opened = await database.connect(name)
        await opened.execute("SET synchronous_commit = off")
        return opened

    appender = Appender(connected, Telemetry(), intent_queue_max=10)
    appender.start()
    assert await appender.append([stored_event()]) == 1
    await appender.stop(1)
    assert commits(connection) == [("payments appender", "on")]


@pytest.mark.parametrize(
    ("happens", "query"),
    [
        ("DEALLOCATE ALL", "SELECT pg_backend_pid()"),
        ('PREPARE "_pg3_1" AS SELECT 2', "SELECT pg_backend_pid() AS second"),
    ],
)
async def test_a_pooled_connection_that_was_given_another_session(
    address: DatabaseAddress, connection: Connection, happens: str, query: str
) -> None:
    """Its prepared statements are gone, or others have their names: then it is not used again."""
    # In a function psycopg does not see it.
    connection.execute(
        "CREATE FUNCTION happens() RETURNS void LANGUAGE plpgsql"
        f" AS $$ BEGIN EXECUTE '{happens}'; END $$".encode()
    )
    async with Database(address, 1) as database:
        before = await database.fetch("SELECT pg_backend_pid()", prepare=True)
        await database.fetch("SELECT happens()", prepare=False)
        after = await database.fetch(query, prepare=True)
        assert before != after
        assert await database.fetch(query, prepare=True) == after


async def test_a_server_that_does_not_answer_keeps_nobody(
    address: DatabaseAddress, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(session, "SET_UP", "SELECT pg_sleep(30)")
    monkeypatch.setattr(database_module, "CONNECT_TIMEOUT_S", 0.3)
    with pytest.raises(psycopg.OperationalError):
        await asyncio.wait_for(Database(address, 1).connect("tests"), 25)  # less than it sleeps
    connecting = asyncio.create_task(Database(address, 1).connect("tests"))
    await asyncio.sleep(0.1)
    connecting.cancel()
    with pytest.raises(asyncio.CancelledError):
        await asyncio.wait_for(connecting, 25)


@pytest.mark.usefixtures("logged", "service")  # in this order
async def test_a_server_that_may_lose_what_it_committed(
    database: Database, logged: list[str]
) -> None:
    """The tests' server is one, and the service has said so at its start."""
    assert await unsafe_settings(database) == ["fsync", "full_page_writes"]
    assert [line.partition("{")[2] for line in logged if "may lose or damage" in line] == [
        "'setting': 'fsync'}\n",
        "'setting': 'full_page_writes'}\n",
    ]


def test_of_several_hosts_the_one_that_may_be_written(
    address: DatabaseAddress, empty_database: DatabaseAddress
) -> None:
    read_only = f"ALTER DATABASE {empty_database.dbname} SET default_transaction_read_only = on"
    with connect(empty_database, "tests") as connection:
        connection.execute(read_only.encode())
    with Pooler(empty_database, "session") as standby:
        hosts = f"{standby.address.host},{address.host}"
        several = DatabaseAddress(
            host=hosts,
            port=address.port,
            user=address.user,
            password=address.password,
            dbname=address.dbname,
        )
        with connect(several, "tests") as opened:
            assert opened.execute("SELECT current_database()").fetchone() == (address.dbname,)
