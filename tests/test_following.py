"""Another team's program follows the log as docs/following-the-log.md says."""

import re
import time
import uuid
from collections.abc import Callable, Iterator
from contextlib import closing
from pathlib import Path
from typing import Any

import httpx
import msgspec
import psycopg
import pytest

from payments.database.connections import DatabaseAddress, connect, create_database_if_missing
from payments.events.facts import FACTS, Fact
from payments.migrations import migrate
from tests.following import PAGE, Follower
from tests.outside_postgres import OutsidePostgres
from tests.process import ServiceProcess, at
from tests.support import History, append, append_stored, eventually, stored_event

WAITING = """
SELECT count(*)::int FROM pg_stat_activity
 WHERE datname = current_database() AND wait_event_type = 'Lock'
"""

Connection = psycopg.Connection[Any]


@pytest.fixture
def role(connection: Connection) -> Iterator[str]:
    """May log in and read payment_events, and nothing else."""
    name = f"sales_reader_{uuid.uuid4().hex[:8]}"
    (statements,) = re.findall(r"```sql\n(CREATE ROLE.*?)```", PAGE.read_text(), re.DOTALL)
    for statement in statements.replace("sales_reader", name).split(";\n")[:2]:
        connection.execute(statement.encode())
    yield name
    connection.execute(f"DROP OWNED BY {name}; DROP ROLE {name}".encode())


@pytest.fixture
def follower(
    tmp_path: Path, address: DatabaseAddress, role: str, empty_database: DatabaseAddress
) -> Follower:
    return Follower(tmp_path, address, role, empty_database)


def total_of(own: Connection) -> int:
    """What its table says, in all; 0 as long as there is none."""
    if own.execute("SELECT to_regclass('sales')").fetchone() == (None,):
        return 0
    ((cents,),) = own.execute("SELECT coalesce(sum(cents), 0) FROM sales").fetchall()
    return int(cents)


def total_at(own: DatabaseAddress) -> int:
    with closing(connect(own, "tests")) as opened:
        return total_of(opened)


@pytest.fixture
def sold(empty_database: DatabaseAddress) -> Iterator[Callable[[], int]]:
    with closing(connect(empty_database, "tests")) as opened:
        yield lambda: total_of(opened)


def test_beside_the_running_service(
    follower: Follower,
    sold: Callable[[], int],
    address: DatabaseAddress,
    empty_database: DatabaseAddress,
    connection: Connection,
    tmp_path: Path,
) -> None:
    """What was before it and what comes, captures and refunds, and nothing that failed."""
    settings: dict[str, Any] = at(address)
    with ServiceProcess(tmp_path, **settings) as service, httpx.Client() as client:
        payment = service.charge(client, "a").json()
        assert service.charge(client, "b", amount_cents=1507).json()["status"] == "FAILED"
        with follower:
            eventually(lambda: sold() == 1500)
            service.charge(client, "c", amount_cents=2000, currency="EUR")
            back = {"payment_id": payment["id"], "amount_cents": 400}
            given = client.post(
                f"{service.url}/v1/refund", json=back, headers={"Idempotency-Key": "r"}
            )
            assert given.status_code == 201
            eventually(lambda: sold() == 3100)
    with connect(empty_database, "tests") as own:
        rows = own.execute("SELECT currency, cents, day FROM sales ORDER BY 1").fetchall()
    today = connection.execute("SELECT (now() AT TIME ZONE 'UTC')::date").fetchall()[0][0]
    assert {row[:2] for row in rows} == {("EUR", 2000), ("INR", 1100)}
    assert all((today - row[2]).days in (0, 1) for row in rows)


def test_killed_between_its_position_and_its_row(
    follower: Follower,
    sold: Callable[[], int],
    connection: Connection,
    empty_database: DatabaseAddress,
) -> None:
    """Each event once and none skipped."""
    whole = 0

    def charge(payments: int) -> None:
        nonlocal whole
        histories = [History(uuid.uuid4().hex).charged() for _ in range(payments)]
        append(connection, [fact for history in histories for fact in history.facts])
        whole += sum(history.payment.amount_cents for history in histories)

    charge(20)
    with connect(empty_database, "tests holding") as holding:
        for _ in range(2):
            with follower:
                eventually(lambda: sold() == whole)
                with holding.transaction():
                    holding.execute("LOCK TABLE sales IN EXCLUSIVE MODE")
                    charge(3)
                    eventually(lambda: holding.execute(WAITING).fetchall() == [(1,)])
                    follower.kill()
    with follower:
        eventually(lambda: sold() == whole)


def test_sessions_that_are_terminated(
    follower: Follower,
    sold: Callable[[], int],
    role: str,
    connection: Connection,
    empty_database: DatabaseAddress,
) -> None:
    """As by a server that stops, in the log's database and in its own."""
    with follower, connect(empty_database, "tests of sales") as own:
        for number in range(3):
            history = History(f"k {number}").charged()
            append(connection, history.facts)
            eventually(lambda: sold() == history.payment.amount_cents * (number + 1))  # noqa: B023
            connection.execute(
                "SELECT pg_terminate_backend(pid) FROM pg_stat_activity WHERE usename = %s", [role]
            )
            own.execute(
                "SELECT pg_terminate_backend(pid) FROM pg_stat_activity"
                " WHERE datname = current_database() AND application_name NOT LIKE 'tests%'"
            )
        assert follower.is_running, follower.talk


def test_a_server_that_restarts(tmp_path: Path, state_dir: Path, long_run: bool) -> None:
    """With both databases, and away for longer than one query is tried again."""
    if not long_run:
        pytest.skip("--long: how sessions end is tested above")
    with OutsidePostgres(state_dir / "followed") as server:
        migrate(server.address)
        own = msgspec.structs.replace(server.address, dbname="sales")
        create_database_if_missing(own)
        with Follower(tmp_path, server.address, server.address.user, own) as follower:
            for number, (how, away_s) in enumerate([("fast", 0), ("immediate", 0), ("fast", 60)]):
                history = History(f"k {number}").charged()
                with server.connect() as connection:
                    append(connection, history.facts)
                whole = history.payment.amount_cents * (number + 1)
                eventually(lambda: total_at(own) == whole, 60)  # noqa: B023
                server.stop(how)  # type: ignore[arg-type]
                time.sleep(away_s)
                server.start()
            assert follower.is_running, follower.talk


def test_of_two_at_once_one_ends(
    tmp_path: Path, follower: Follower, sold: Callable[[], int], connection: Connection
) -> None:
    second = tmp_path / "second"
    second.mkdir()
    whole = 0

    def ended_after_one_more() -> bool:
        nonlocal whole
        history = History(uuid.uuid4().hex).charged()
        append(connection, history.facts)
        whole += history.payment.amount_cents
        return follower.is_running != other.is_running

    with follower, follower.beside(second) as other:
        eventually(ended_after_one_more)
        assert "IntegrityError" in follower.talk + other.talk
        eventually(lambda: sold() == whole)


def test_a_type_that_is_not_known_is_not_delivered(
    follower: Follower, sold: Callable[[], int], connection: Connection
) -> None:
    history = History("k").charged()
    append_stored(connection, [stored_event(topic="OfALaterRelease")])
    append(connection, history.facts)
    with follower:
        eventually(lambda: sold() == history.payment.amount_cents)


def test_the_page_has_every_field_of_every_fact() -> None:
    text = PAGE.read_text()

    def names(line: str) -> list[str]:
        return re.findall(r"`(\w+)`", line)

    (table,) = re.findall(r"^\| field of all \|.*\n\|---.*\n((?:\|.*\n)*)", text, re.M)
    common = [name for line in table.splitlines() for name in names(line.split("|")[1])]
    assert set(common) == {*Fact.__struct_fields__, "schema_version"}
    (table,) = re.findall(r"^\| type \|.*\n\|---.*\n((?:\|.*\n)*)", text, re.M)
    shown = {names(line)[0]: names(line)[1:] for line in table.splitlines()}
    fields = {
        topic: [name for name in fact.__struct_fields__ if name not in common]
        for topic, fact in FACTS.items()
    }
    assert shown == fields
