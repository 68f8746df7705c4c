"""Parts of the embedded server are killed under the service: it is back within seconds, and what
was answered is there. Or the service ends, so that whoever supervises it knows."""

import asyncio
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any

import httpx
import psutil
import psycopg
import pytest

from payments.embedded_postgres import supervisor
from tests.crash.client import Answer, Caller, race
from tests.crash.money import (
    FAST,
    UNRELIABLE,
    Answers,
    Traffic,
    count,
    nothing_open,
    records,
    settled,
)
from tests.doubles.provider import ProviderProcess
from tests.doubles.stand_in import Fault
from tests.invariants.checker import check
from tests.machine import within
from tests.process import (
    ROOT,
    ServiceProcess,
    database_processes,
    environment,
    free_port,
    without_forked,
    working,
)
from tests.support import eventually

HEALTHY_AGAIN_S = 15  # it takes one or two, on a machine that is not busy

# The service with a keeper that gives up soon.
GIVES_UP_SOON = """
from payments.embedded_postgres import keeper
keeper.STARTS_MAX, keeper.PAUSE_MAX_S = 3, 0.1
from payments.cli import main
main(["serve"])
"""


def settings(provider: ProviderProcess, **more: object) -> dict[str, Any]:
    """For the embedded server, and this provider."""
    return {
        **FAST,
        "GATEWAY": "tests.doubles.http_gateway:build",
        "TEST_PROVIDER_URL": provider.url,
        "LOG_FORMAT": "json",
        **more,
    }


def connect(data_dir: Path) -> "psycopg.Connection[Any]":
    """As soon as there is a server."""
    while True:
        with suppress(FileNotFoundError, psycopg.OperationalError):
            host = (data_dir / "postgres" / "socket-directory").read_text()
            return psycopg.connect(
                f"host={host} user=postgres dbname=paymentdb application_name=tests",
                autocommit=True,
            )
        time.sleep(0.02)


def postmaster(data_dir: Path) -> psutil.Process:
    return having(data_dir, "-D")


def supervisor_of(data_dir: Path) -> psutil.Process:
    return having(data_dir, supervisor.__file__)


def having(data_dir: Path, argument: str) -> psutil.Process:
    found = [each.pid for each in database_processes(data_dir) if argument in arguments_of(each)]
    return psutil.Process(without_forked(found)[0])


def arguments_of(process: psutil.Process) -> list[str]:
    with suppress(psutil.NoSuchProcess):
        return process.cmdline()
    return []


def appender(data_dir: Path) -> psutil.Process:
    """The backend that writes events, as soon as there is one."""
    query = "SELECT pid FROM pg_stat_activity WHERE application_name = 'payments appender'"
    with connect(data_dir) as connection:
        eventually(lambda: connection.execute(query).rowcount)
        rows = connection.execute(query).fetchall()
    return psutil.Process(rows[0][0])


def everything(data_dir: Path) -> psutil.Process:
    """The postmaster; the supervisor is dead already."""
    found = postmaster(data_dir)
    supervisor_of(data_dir).kill()
    return found


def lines(log: str) -> list[dict[str, Any]]:
    return [json.loads(line) for line in log.splitlines() if line.startswith("{")]


@pytest.mark.parametrize(
    "victim", [postmaster, supervisor_of, everything, appender], ids=lambda each: each.__name__
)
def test_killed_under_load(
    provider: ProviderProcess,
    data_dir: Path,
    pytestconfig: pytest.Config,
    victim: Callable[[Path], psutil.Process],
) -> None:
    kills = max(1, pytestconfig.getoption("--kills") // 4)
    provider.script(*UNRELIABLE)
    answers = Answers()
    with ServiceProcess(data_dir, **settings(provider)) as service:
        with Traffic([service.port], answers) as traffic:
            for _ in range(kills):
                before, killed = traffic.captured, victim(data_dir)
                killed.kill()
                eventually(lambda killed=killed: not alive(killed))  # type: ignore[misc]
                eventually(service.is_healthy, HEALTHY_AGAIN_S)
                eventually(lambda before=before: traffic.captured >= before + 5)  # type: ignore[misc]
        provider.script()
        with connect(data_dir) as connection:
            settled(connection, 30)
            check(connection, records(provider), answers.charges, answers.refunds, settled=True)
        assert service.terminate() == 0
    eventually(lambda: not database_processes(data_dir))  # the supervisor ends after the service
    levels = {line["level"] for line in lines(service.log.read_text())}
    assert "CRITICAL" not in levels


test_killed_under_load = pytest.mark.timeout(900)(test_killed_under_load)


def alive(process: psutil.Process) -> bool:
    try:
        return process.status() != psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return False


@pytest.fixture
def frozen_backend(data_dir: Path) -> Iterator[Callable[[], int]]:
    """Freezes a backend that nobody needs: the next server has to wait for it, for 5 s."""
    frozen: list[int] = []

    def freeze() -> int:
        connection = connect(data_dir)
        frozen.append(connection.info.backend_pid)
        os.kill(frozen[-1], signal.SIGSTOP)
        connection.close()
        return frozen[-1]

    yield freeze
    for pid in frozen:
        with suppress(ProcessLookupError):
            os.kill(pid, signal.SIGCONT)


def test_an_outcome_that_waits_in_memory_is_written_afterwards(
    provider: ProviderProcess,
    data_dir: Path,
    frozen_backend: Callable[[], int],
) -> None:
    """In time, and the provider is not asked again. 202, unless the next server was as quick."""
    provider.script(Fault("slow", operation="charge", seconds=0.5))
    answers = Answers()
    more = settings(provider, CHARGE_DEADLINE_S=5, PENDING_ABANDON_AFTER_S=60)
    with ServiceProcess(data_dir, **more) as service:
        frozen_backend()

        async def charge(callers: list[Caller]) -> Answer | None:
            task = asyncio.create_task(callers[0].charge("k"))
            while not provider.captures():
                await asyncio.sleep(0.01)
            await asyncio.to_thread(lambda: postmaster(data_dir).kill())
            return await task

        answer = race([service.port], 1, charge)
        assert answer is not None
        assert (answer.status, answer.body["status"]) in ((202, "PENDING"), (201, "SUCCESS"))
        answers.charged("k", answer)
        eventually(service.is_healthy, HEALTHY_AGAIN_S + supervisor.HEADLESS_STOP[0][1])
        with connect(data_dir) as connection:
            eventually(lambda: count(connection) == 2 and nothing_open(connection))
            check(connection, records(provider), answers.charges, settled=True)
        assert provider.counts().get("charge") == 1


def test_processes_that_share_it_both_go_on(data_dir: Path) -> None:
    """`serve --api-only` and `work`: the worker's followers as well."""
    with (
        ServiceProcess(data_dir, "--api-only") as service,
        working(PAYMENTS_DATA_DIR=data_dir),
        httpx.Client(timeout=15) as client,
    ):
        for number in range(3):
            killed = postmaster(data_dir)
            killed.kill()
            eventually(lambda killed=killed: not alive(killed))  # type: ignore[misc]
            eventually(service.is_healthy, HEALTHY_AGAIN_S)
            eventually(lambda n=number: service.charge(client, f"k{n}").status_code == 201)  # type: ignore[misc]
            with connect(data_dir) as connection:
                eventually(lambda c=connection, n=number: projected(c, n + 1))  # type: ignore[misc]


def test_a_worker_alone_keeps_it_running(data_dir: Path) -> None:
    with working(PAYMENTS_DATA_DIR=data_dir):
        killed = postmaster(data_dir)
        killed.kill()
        eventually(lambda: not alive(killed))
        with connect(data_dir) as connection:
            assert count(connection) == 0


def projected(connection: "psycopg.Connection[Any]", payments: int) -> bool:
    row = connection.execute("SELECT count(*) FROM payments WHERE status = 'SUCCESS'").fetchone()
    return row == (payments,)


@pytest.mark.parametrize("victim", [postmaster, everything], ids=lambda each: each.__name__)
def test_a_sigterm_while_it_is_started_again(
    data_dir: Path,
    frozen_backend: Callable[[], int],
    victim: Callable[[Path], psutil.Process],
) -> None:
    service = ServiceProcess(data_dir).start()
    frozen_backend()
    victim(data_dir).kill()
    eventually(lambda: not service.is_healthy(), HEALTHY_AGAIN_S)
    with within(9.5):
        assert service.terminate() == 0


def test_a_server_that_cannot_be_started_again_ends_the_service(data_dir: Path) -> None:
    """With one line that says why, and an exit code that whoever supervises it takes for one."""
    port = free_port()
    process = subprocess.Popen(
        [sys.executable, "-c", GIVES_UP_SOON],
        cwd=ROOT,
        env=environment(PORT=port, PAYMENTS_DATA_DIR=data_dir, LOG_FORMAT="json"),
        stderr=subprocess.PIPE,
        text=True,
    )
    try:
        eventually(lambda: answers(port, "/health"), 30)
        (data_dir / "postgres" / "cluster" / "global" / "pg_control").unlink()
        postmaster(data_dir).kill()
        _, talk = process.communicate(timeout=30)
    finally:
        process.kill()
    assert process.returncode == 1
    (critical,) = [line for line in lines(talk) if line["level"] == "CRITICAL"]
    assert critical["message"] == "the embedded Postgres cannot be kept running"
    assert "pg_control" in critical["reason"]
    last = talk.splitlines()[-1]
    assert last.startswith("payments: the embedded Postgres cannot be kept running: Postgres does")
    Path((data_dir / "postgres" / "socket-directory.old").read_text()).rmdir()  # for the next start


def answers(port: int, path: str) -> bool:
    with suppress(httpx.TransportError):
        return httpx.get(f"http://127.0.0.1:{port}{path}").status_code == 200
    return False
