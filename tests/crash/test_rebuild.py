"""`payments rebuild` killed at any point, and while the service works at full load."""

import asyncio
import random
import subprocess
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import psycopg
import pytest

from payments.database.connections import Database, DatabaseAddress
from tests.crash.mixed_load import MixedLoad
from tests.invariants.checker import check
from tests.machine import Machine, bound
from tests.process import PAYMENTS, ROOT, ServiceProcess, at, beside_progress, environment, run
from tests.support import History, append, eventually, follow

Connection = psycopg.Connection[Any]
PAYMENTS_KILLED = 3000
SEED = 20261124

LEFT_BEHIND = """
SELECT pid FROM pg_stat_activity
 WHERE datname = current_database() AND application_name LIKE 'payments rebuild%'
"""

TEMPORARY = "SELECT relname FROM pg_class WHERE relpersistence = 't' AND relname LIKE 'rebuilt%'"

WRONG = "SELECT count(*) FROM payments WHERE amount_cents = 1"


def count(connection: Connection, query: str) -> int:
    row = connection.execute(query.encode()).fetchone()
    assert row is not None
    return int(row[0])


def rebuilding(address: DatabaseAddress) -> subprocess.Popen[bytes]:
    return subprocess.Popen(
        [*PAYMENTS, "rebuild"],
        cwd=ROOT,
        env=environment(**at(address), LOG_LEVEL="WARNING"),
        stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
    )


@pytest.mark.timeout(600)
def test_killed_at_any_point(
    address: DatabaseAddress, connection: Connection, request: pytest.FixtureRequest
) -> None:
    """The tables are as before or as after, nothing of it is left, and the next one works."""
    append(connection, [fact for n in range(PAYMENTS_KILLED) for fact in History(f"k{n}").facts])
    asyncio.run(catch_up(address))
    connection.execute("SET statement_timeout = '30s'")

    def vandalise() -> None:
        connection.execute("UPDATE payments SET amount_cents = 1")

    vandalise()
    began = time.monotonic()
    assert run("rebuild", **at(address)).returncode == 0
    took_s = time.monotonic() - began
    assert count(connection, WRONG) == 0
    outcomes = set()
    kills = request.config.getoption("--kills")
    for number in range(kills):
        vandalise()
        process = rebuilding(address)
        # The imports come first; what matters comes after.
        time.sleep(took_s * (0.4 + 0.6 * number / kills))
        process.kill()
        process.communicate(timeout=10)
        eventually(lambda: not connection.execute(LEFT_BEHIND.encode()).fetchall())
        assert not connection.execute(TEMPORARY.encode()).fetchall()
        wrong = count(connection, WRONG)
        assert wrong in (0, PAYMENTS_KILLED)
        outcomes.add(wrong)
    assert PAYMENTS_KILLED in outcomes, "none was killed before its end"
    vandalise()
    assert run("rebuild", **at(address)).returncode == 0
    check(connection)
    assert count(connection, WRONG) == 0


async def catch_up(address: DatabaseAddress) -> None:
    async with Database(address, 2) as database:
        await follow(database, 200)  # a batch has a timeout, and the machine may be busy


@contextmanager
def waiting_for_the_follower(
    address: DatabaseAddress, connection: Connection
) -> Iterator[subprocess.Popen[bytes]]:
    """A rebuild with something to write, which waits for a follower in the middle of a batch."""
    append(connection, [History("k").facts[0]])
    asyncio.run(catch_up(address))
    with psycopg.connect(address.conninfo("tests")) as other:
        other.execute("SET idle_in_transaction_session_timeout = 0")
        other.execute("SELECT FROM followers WHERE name = 'payments' FOR UPDATE")
        connection.execute("UPDATE payments SET amount_cents = 1")
        process = rebuilding(address)
        waiting = "SELECT FROM pg_stat_activity WHERE wait_event_type = 'Lock' AND query LIKE %s"
        eventually(lambda: connection.execute(waiting, ["%followers%"]).fetchall())
        yield process


@pytest.mark.parametrize("signum", [2, 15])
def test_stopped_by_a_signal(address: DatabaseAddress, connection: Connection, signum: int) -> None:
    with waiting_for_the_follower(address, connection) as process:
        process.send_signal(signum)
        _, errors = process.communicate(timeout=15)
    assert process.returncode != 0
    assert b"Traceback" not in errors
    eventually(lambda: not connection.execute(LEFT_BEHIND.encode()).fetchall())
    assert count(connection, WRONG) == 1


def test_a_connection_that_is_lost_is_one_line(
    address: DatabaseAddress, connection: Connection
) -> None:
    with waiting_for_the_follower(address, connection) as process:
        connection.execute(f"SELECT pg_terminate_backend(pid) FROM ({LEFT_BEHIND}) AS it".encode())
        _, errors = process.communicate(timeout=15)
    assert process.returncode == 1
    assert errors.count(b"\n") == 1
    assert errors.startswith(b"payments: the database: ")
    assert count(connection, WRONG) == 1


class Readers:
    """Strangers that read the table all the time, and vandals' rows among it, whole or not."""

    def __init__(self, address: DatabaseAddress) -> None:
        self._address = address
        self._stopped = threading.Event()
        self.slowest_s = 0.0
        self.looks = 0
        self.torn: list[tuple[int, int]] = []

    @contextmanager
    def running(self) -> Iterator[None]:
        thread = threading.Thread(target=self._run)
        thread.start()
        try:
            yield
        finally:
            self._stopped.set()
            thread.join(timeout=20)

    def _run(self) -> None:
        with psycopg.connect(self._address.conninfo("reader"), autocommit=True) as connection:
            query = (
                "SELECT count(*), count(*) FILTER (WHERE amount_cents = 1) FROM payments"
                " WHERE idempotency_key LIKE 'old %'"
            )
            while not self._stopped.is_set():
                began = time.monotonic()
                row = connection.execute(query.encode()).fetchone()
                assert row is not None
                self.slowest_s = max(self.slowest_s, time.monotonic() - began)
                self.looks += 1
                if row[1] not in (0, row[0]):
                    self.torn.append(row)


@pytest.mark.timeout(600)
def test_while_the_service_works(
    address: DatabaseAddress, connection: Connection, tmp_path: Path, long_run: bool
) -> None:
    """Every request gets a right answer, readers see all of a repair or nothing, an audit finds
    nothing afterwards, and the provider was asked by nobody else."""
    old = 500
    append(connection, [fact for n in range(old) for fact in History(f"old {n}").charged().facts])
    ledger = tmp_path / "ledger.sqlite"
    given = {**at(address), "SIMULATED_LEDGER": ledger, "LOG_LEVEL": "WARNING"}
    rounds = 20 if long_run else 2
    readers, machine = Readers(address), Machine()
    with ServiceProcess(tmp_path, **given) as service:
        eventually(lambda: count(connection, "SELECT count(*) FROM payments") == old)
        load = MixedLoad(service.port, random.Random(SEED))

        def disturb() -> None:
            for number in range(rounds):
                if number % 2:
                    connection.execute("TRUNCATE payments, refunds, payment_clients")
                else:
                    vandal = "UPDATE payments SET amount_cents = 1"
                    connection.execute(f"{vandal} WHERE idempotency_key LIKE 'old %'".encode())
                done = run("rebuild", **at(address), LOG_LEVEL="WARNING")
                assert (done.returncode, beside_progress(done.stderr)) == (0, []), done
                verified = run("audit", "verify", **at(address), LOG_LEVEL="WARNING")
                assert (verified.returncode, beside_progress(verified.stderr)) == (0, []), verified

        async def go() -> None:
            async with load.running():
                await asyncio.to_thread(disturb)

        with readers.running():
            asyncio.run(go())
        eventually(lambda: settled(connection))
        assert service.terminate() == 0
        check(connection, None, load.charges, load.refunds)
    assert "unhandled error" not in service.log.read_text()
    faults = [sample for sample in load.samples if sample.fault or not sample.is_normal]
    assert not faults, faults[:10]
    assert len(load.charges) > 50
    assert readers.looks > 50
    assert not readers.torn
    bound(readers.slowest_s, 2, machine)


def settled(connection: Connection) -> bool:
    return (
        count(connection, "SELECT count(*) FROM unsettled_payments") == 0
        and count(
            connection,
            "SELECT (SELECT max(notification_id) FROM payment_events) - position FROM followers"
            " WHERE name = 'payments'",
        )
        == 0
    )
