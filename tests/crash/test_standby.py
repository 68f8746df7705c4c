"""A standby: what only reads works on it, though it cancels who reads for long; and what reads on
it may keep the primary from clearing up.
"""

import asyncio
import subprocess
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import psycopg
import pytest

from payments.database.connections import Database
from payments.events.chain import read_line
from payments.migrations import migrate
from payments.queries.server import Horizon, horizon
from tests.outside_postgres import OutsidePostgres, Standby
from tests.process import PAYMENTS, ROOT, environment, open_directory, run
from tests.support import ORDER_ID, History, append, catch_up, eventually

PAYMENTS_MADE = 3000
FIRST = History("k0").id
VACUUM_EVERY_S = 0.2


@pytest.fixture(scope="module")
def servers() -> Iterator[tuple[OutsidePostgres, Standby]]:
    with (
        open_directory("payments-standby-") as home,
        OutsidePostgres(home / "primary") as primary,
    ):
        migrate(primary.address)
        with primary.connect() as connection:
            connection.execute("ALTER SYSTEM SET max_standby_streaming_delay = 0")
            connection.execute("CREATE TABLE hot AS SELECT 1 AS n")
            histories = [History(f"k{n}").charged() for n in range(PAYMENTS_MADE)]
            for start in range(0, PAYMENTS_MADE, 500):
                some = histories[start : start + 500]
                append(connection, [fact for history in some for fact in history.facts])
            catch_up(primary.address)
        with Standby(home / "standby", primary) as standby:
            yield primary, standby


@contextmanager
def vacuumed(primary: OutsidePostgres) -> Iterator[None]:
    """All the time rows die on the primary and are removed: a snapshot on the standby that still
    sees one is cancelled at once."""
    stopping = threading.Event()

    def work() -> None:
        with primary.connect() as connection:
            while not stopping.is_set():
                connection.execute("UPDATE hot SET n = n + 1")
                connection.execute("VACUUM hot")
                time.sleep(VACUUM_EVERY_S)

    thread = threading.Thread(target=work)
    thread.start()
    try:
        yield
    finally:
        stopping.set()
        thread.join(timeout=20)


def test_a_snapshot_that_is_held_is_cancelled(servers: tuple[OutsidePostgres, Standby]) -> None:
    """So the tests below show something."""
    primary, standby = servers
    with vacuumed(primary), standby.connect() as connection:
        connection.execute("BEGIN ISOLATION LEVEL REPEATABLE READ")
        connection.execute("SELECT count(*) FROM payment_events")
        with pytest.raises(psycopg.errors.SerializationFailure, match="conflict with recovery"):
            connection.execute("SELECT count(*), pg_sleep(5) FROM payment_events")


@pytest.mark.parametrize(
    "command",
    [
        "replay",
        f"replay --order {ORDER_ID}",
        f"replay --order {ORDER_ID} --as-of 100 --format csv",
        "replay --format table",
        "export --from 2020-01-01T00:00:00Z --to 2100-01-01T00:00:00Z",
        "audit verify",
        "rebuild --dry-run",
    ],
)
def test_nothing_is_cut_off(servers: tuple[OutsidePostgres, Standby], command: str) -> None:
    primary, standby = servers
    quiet = run(*command.split(), **standby.settings, LOG_LEVEL="ERROR")
    assert quiet.returncode == 0, quiet.stderr
    with vacuumed(primary):
        done = run(*command.split(), **standby.settings, LOG_LEVEL="ERROR")
    assert (done.returncode, done.stderr) == (0, ""), done.stderr
    assert done.stdout == quiet.stdout


def test_who_follows_hears_of_what_arrives(servers: tuple[OutsidePostgres, Standby]) -> None:
    primary, standby = servers
    process = subprocess.Popen(
        [*PAYMENTS, "replay", "--follow", "--from", str(2 * PAYMENTS_MADE)],
        cwd=ROOT,
        env=environment(**standby.settings, LOG_LEVEL="ERROR"),
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
    )
    assert process.stdout is not None
    try:
        assert read_line(process.stdout.readline()).position == 2 * PAYMENTS_MADE
        with vacuumed(primary), primary.connect() as connection:
            for number in range(3):
                position = append(connection, History(f"new {number}").facts)
                assert read_line(process.stdout.readline()).position == position
        process.terminate()
        left, errors = process.communicate(timeout=20)
        assert (process.returncode, left, errors) == (0, b"", b"")
    finally:
        process.kill()
        process.wait(timeout=10)


@pytest.mark.parametrize(
    "command",
    [
        *("audit head", f"explain {FIRST}", f"explain {FIRST} --format json", "parked list"),
        *("callbacks list", "callbacks list --due", "callbacks list --dead --format json"),
        f"callbacks list --order {ORDER_ID}",
        *("callbacks redrive --dead", "settings", "psql -c TABLE\tfollowers"),
    ],
)
def test_what_only_reads_works(servers: tuple[OutsidePostgres, Standby], command: str) -> None:
    _, standby = servers
    words = [word.replace("\t", " ") for word in command.split(" ")]
    done = run(*words, **standby.settings)
    assert done.returncode == 0, done.stderr
    assert done.stdout
    assert "payments:" not in done.stderr


def test_nothing_to_migrate(servers: tuple[OutsidePostgres, Standby]) -> None:
    _, standby = servers
    done = run("migrate", **standby.settings)
    assert (done.returncode, done.stderr) == (0, "the schema is up to date\n")


def test_doctor_says_what_it_is(servers: tuple[OutsidePostgres, Standby]) -> None:
    _, standby = servers
    done = run("doctor", **standby.settings)
    assert (done.returncode, done.stderr) == (1, "")
    assert "it refuses writes: it is a standby, or read-only" in done.stdout


def test_a_dump_of_a_standby(servers: tuple[OutsidePostgres, Standby], tmp_path: Path) -> None:
    _, standby = servers
    done = run("dump", str(tmp_path / "payments.dump"), **standby.settings)
    assert (done.returncode, done.stdout) == (0, ""), done.stderr
    refused = run("restore", str(tmp_path / "payments.dump"), **standby.settings)
    told = "payments: the database refuses writes: it is a standby, or read-only\n"
    assert (refused.returncode, refused.stdout, refused.stderr) == (1, "", told)


@pytest.mark.parametrize(
    "command",
    ["rebuild", "parked retry --all", "callbacks backfill --from 1"],
)
def test_what_cannot_be_done_there_is_one_line(
    servers: tuple[OutsidePostgres, Standby], command: str
) -> None:
    _, standby = servers
    url = "http://127.0.0.1:1/callback"
    done = run(*command.split(), **standby.settings, ORDER_CALLBACK_URL=url)
    told = "payments: the database refuses writes: it is a standby, or read-only\n"
    assert (done.returncode, done.stdout, done.stderr) == (1, "", told)


def horizon_of(server: OutsidePostgres) -> Horizon:
    async def read() -> Horizon:
        async with Database(server.address, 1) as database:
            return await horizon(database)

    return asyncio.run(read())


def test_what_a_standby_and_a_forgotten_transaction_hold() -> None:
    with open_directory("payments-held-") as home, OutsidePostgres(home / "primary") as primary:
        migrate(primary.address)
        with primary.connect() as connection:
            connection.execute("ALTER SYSTEM SET max_prepared_transactions = 1")
            connection.execute("ALTER SYSTEM SET hot_standby_feedback = on")
            connection.execute("ALTER SYSTEM SET wal_receiver_status_interval = 1")
        primary.stop("fast")
        primary.start()
        with Standby(home / "standby", primary) as standby, primary.connect() as connection:
            assert horizon_of(primary).transactions < 10
            with standby.connect() as reader:
                reader.execute("BEGIN ISOLATION LEVEL REPEATABLE READ")
                reader.execute("SELECT count(*) FROM payment_events")
                for _ in range(20):
                    connection.execute("UPDATE followers SET updated_at = now()")
                found = eventually(lambda: (now := horizon_of(primary)).transactions >= 20 and now)
                assert found.held_by.endswith(" (standby)")
            eventually(lambda: horizon_of(primary).transactions < 10)
        with primary.connect() as connection:
            connection.execute("BEGIN; UPDATE followers SET updated_at = now()")
            connection.execute("PREPARE TRANSACTION 'forgotten'")
            connection.execute("CREATE TABLE busy ()")
            found = horizon_of(primary)
            assert found.held_by == "prepared transaction forgotten"
            assert found.held_s > 0
            connection.execute("ROLLBACK PREPARED 'forgotten'")
            connection.execute("SELECT pg_create_physical_replication_slot('unused')")
            assert horizon_of(primary).held_by is None
