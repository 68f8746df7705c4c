"""A server that ends while it is used is started again where its users expect it, or given up."""

import os
import shutil
import signal
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import psycopg
import pytest
from loguru import logger

from payments.embedded_postgres import (
    EmbeddedPostgres,
    EmbeddedPostgresError,
    keeper,
    start,
    supervisor,
)
from payments.embedded_postgres import _server_user as server_user
from payments.embedded_postgres.keeper import Keeper
from tests.embedded_postgres.servers import (
    CLEAN_STOP_S,
    STOP_AFTER_KILL_S,
    User,
    assert_gone,
    connect,
    kill,
    plan_of,
    postmaster,
    postmasters,
    processes,
    show,
    supervisor_pid,
    supervisors,
    wait_until,
)

AGAIN_S = 10  # it takes half a second, on a machine that is not busy
LOST_S = 20


@pytest.fixture
def impatient(monkeypatch: pytest.MonkeyPatch) -> None:
    """Three starts in a row are enough, and there is no waiting between them."""
    monkeypatch.setattr(keeper, "STARTS_MAX", 3)
    monkeypatch.setattr(keeper, "PAUSE_MAX_S", 0.05)


@pytest.fixture
def told() -> Iterator[list[tuple[str, str]]]:
    """The level and the reason of each line that is logged."""
    lines: list[tuple[str, str]] = []

    def note(message: Any) -> None:
        lines.append((message.record["level"].name, message.record["extra"].get("reason", "")))

    sink = logger.add(note)
    yield lines
    logger.remove(sink)


@contextmanager
def kept(data_dir: Path) -> Iterator[tuple[EmbeddedPostgres, Keeper, threading.Event]]:
    """A server with its keeper; the event says that it was lost."""
    lost = threading.Event()
    with start(data_dir) as server, Keeper(server, lost.set) as keeping:
        yield server, keeping, lost


def answers(server: EmbeddedPostgres) -> bool:
    try:
        connect(server).close()
    except psycopg.OperationalError:
        return False
    return True


def kill_server(data_dir: Path) -> int:
    pid = postmaster(data_dir)
    kill(pid)
    return pid


def is_another(data_dir: Path, server: EmbeddedPostgres, pid: int) -> bool:
    other = any(each != pid for each in postmasters(data_dir))
    return other and is_known_to_run(data_dir) and answers(server)


def is_known_to_run(data_dir: Path) -> bool:
    """Of a server that is there: it responds before its supervisor notices, and a server that is
    killed in between did not start."""
    return not (data_dir / "postgres" / "socket-directory.new").exists()


@pytest.mark.parametrize("whom", ["server", "supervisor", "both"])
def test_it_is_started_again_at_the_same_socket(
    data_dir: Path, whom: str, told: list[tuple[str, str]]
) -> None:
    with kept(data_dir) as (server, keeping, _):
        with connect(server) as connection:
            connection.execute("CREATE TABLE payment (n int)")
        for n in range(3):
            with connect(server) as connection:
                connection.execute("INSERT INTO payment VALUES (%s)", [n])
            pid, pids = postmaster(data_dir), []
            if whom in ("supervisor", "both"):
                pids.append(supervisor_pid(data_dir))
            if whom in ("server", "both"):
                pids.append(pid)
            for each in pids:
                os.kill(each, signal.SIGKILL)
            wait_until(lambda pid=pid: is_another(data_dir, server, pid), AGAIN_S)  # type: ignore[misc]
        with connect(server) as connection:
            assert connection.execute("SELECT count(*) FROM payment").fetchone() == (3,)
        assert show(server, "fsync") == "on"
        assert keeping.lost is None
    assert_gone(data_dir, CLEAN_STOP_S)
    assert not server.socket_dir.exists()
    assert [level for level, _ in told if level != "INFO"] == ["WARNING"] * 3


def test_the_server_keeps_its_options(data_dir: Path) -> None:
    lost = threading.Event()
    with (
        start(data_dir, options={"max_connections": "17"}) as server,
        Keeper(server, lost.set),
    ):
        pid = kill_server(data_dir)
        wait_until(lambda: is_another(data_dir, server, pid), AGAIN_S)
        assert show(server, "max_connections") == "17"


def test_a_frozen_backend_of_the_killed_server_is_waited_for_and_then_killed(
    data_dir: Path,
) -> None:
    """It holds the shared memory: beside it no other server starts."""
    with kept(data_dir) as (server, keeping, _), connect(server) as connection:
        os.kill(connection.info.backend_pid, signal.SIGSTOP)
        began = time.monotonic()
        pid = kill_server(data_dir)
        wait_until(lambda: is_another(data_dir, server, pid), AGAIN_S + 5)
        assert time.monotonic() - began > supervisor.HEADLESS_STOP[0][1]
        assert keeping.lost is None


def test_what_is_left_of_the_killed_server_is_the_supervisors_to_wait_for(data_dir: Path) -> None:
    """Else it would be a zombie of a container's first process, one more at each restart."""
    with start(data_dir) as server, connect(server) as connection:
        backend, supervising = connection.info.backend_pid, supervisor_pid(data_dir)
        os.kill(backend, signal.SIGSTOP)
        kill_server(data_dir)
        parent = Path(f"/proc/{backend}/stat").read_text().rpartition(")")[2].split()[1]
        assert int(parent) == supervising
        os.kill(backend, signal.SIGCONT)
        wait_until(lambda: not Path(f"/proc/{backend}").exists(), AGAIN_S)
    next_start_leaves_nothing(data_dir, server)


def next_start_leaves_nothing(data_dir: Path, server: EmbeddedPostgres) -> None:
    """Nor anything of a server that nobody started again."""
    start(data_dir).release()
    assert_gone(data_dir, CLEAN_STOP_S)
    assert not server.socket_dir.exists()


def test_processes_that_do_not_even_end_when_they_are_killed(
    data_dir: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A disk that hangs: here it is the signal that is none."""
    monkeypatch.setattr(supervisor, "HEADLESS_STOP", ((signal.SIGCONT, 0.1),))
    home = data_dir / "postgres"
    with start(data_dir) as server, connect(server) as connection:
        backend = connection.info.backend_pid
        os.kill(backend, signal.SIGSTOP)
        monkeypatch.setattr(supervisor, "HEADLESS_STOP", ((signal.SIGSTOP, 0.1),))
        kill_server(data_dir)
        previous = supervisor._PreviousServer(plan_of(home, *server_user()), home / "cluster")
        with pytest.raises(EmbeddedPostgresError, match=rf"do not end: .*\b{backend}\b"):
            wait_until(previous.is_gone, AGAIN_S)
        os.kill(backend, signal.SIGKILL)
    next_start_leaves_nothing(data_dir, server)


def test_two_processes_that_keep_it_start_one_server(data_dir: Path) -> None:
    """As `serve` and `work` do; a third one only uses it."""
    with kept(data_dir) as (server, one, _), kept(data_dir) as (_, two, _):
        for _ in range(3):
            pid = kill_server(data_dir)
            wait_until(lambda pid=pid: is_another(data_dir, server, pid), AGAIN_S)  # type: ignore[misc]
            assert len(postmasters(data_dir)) == 1
            user = User(data_dir)
            user.read()
            user.leave()
        assert (one.lost, two.lost) == (None, None)
    assert_gone(data_dir, CLEAN_STOP_S)


def test_a_socket_directory_that_was_removed_is_made_again(data_dir: Path) -> None:
    with kept(data_dir) as (server, _, _):
        shutil.rmtree(server.socket_dir)
        pid = kill_server(data_dir)
        wait_until(lambda: is_another(data_dir, server, pid), AGAIN_S)


@pytest.mark.usefixtures("impatient")
def test_a_socket_directory_that_is_not_private_any_more_is_given_up(
    data_dir: Path, told: list[tuple[str, str]]
) -> None:
    """Somebody else may listen there: the users must not go on with it."""
    with kept(data_dir) as (server, keeping, lost):
        server.socket_dir.chmod(0o755)
        kill_server(data_dir)
        assert lost.wait(LOST_S)
        assert f"not in {server.socket_dir}" in str(keeping.lost)
        assert [level for level, _ in told].count("CRITICAL") == 1
    assert_gone(data_dir, CLEAN_STOP_S)
    shutil.rmtree(server.socket_dir)  # it is not the server's any more


@pytest.mark.usefixtures("impatient")
def test_a_damaged_cluster_is_given_up_with_its_reason(
    data_dir: Path, told: list[tuple[str, str]]
) -> None:
    with kept(data_dir) as (server, keeping, lost):
        (data_dir / "postgres" / "cluster" / "global" / "pg_control").unlink()
        kill_server(data_dir)
        assert lost.wait(LOST_S)
        assert "cannot be kept running: Postgres does not start: " in str(keeping.lost)
        assert "pg_control" in str(keeping.lost)
        assert [level for level, _ in told if level != "INFO"] == ["WARNING"] * 3 + ["CRITICAL"]
        assert all("pg_control" in reason for level, reason in told if level != "INFO")
    assert not processes(data_dir)
    with pytest.raises(EmbeddedPostgresError, match="pg_control"):
        start(data_dir)
    wait_until(lambda: not processes(data_dir), CLEAN_STOP_S)
    server.socket_dir.rmdir()


@pytest.mark.usefixtures("impatient")
def test_a_server_that_ends_again_and_again_is_given_up(
    data_dir: Path, told: list[tuple[str, str]]
) -> None:
    with kept(data_dir) as (server, keeping, lost):
        deadline = time.monotonic() + LOST_S
        while not lost.is_set():
            assert time.monotonic() < deadline
            for pid in postmasters(data_dir):
                if is_known_to_run(data_dir) and answers(server):
                    kill(pid)
        assert "it stopped 3 times in a row" in str(keeping.lost)
        assert [level for level, _ in told].count("CRITICAL") == 1


@pytest.mark.usefixtures("impatient")
def test_a_server_that_ran_well_in_between_is_not_given_up(
    data_dir: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(keeper, "STEADY_S", 0.0)
    with kept(data_dir) as (server, keeping, lost):
        for _ in range(5):
            pid = kill_server(data_dir)
            wait_until(lambda pid=pid: is_another(data_dir, server, pid), AGAIN_S)  # type: ignore[misc]
            time.sleep(0.5)  # it is looked at in between
        assert not lost.is_set()
        assert keeping.lost is None


@pytest.mark.parametrize("whom", ["server", "both"])
def test_leaving_while_it_is_started_again_leaves_nothing(data_dir: Path, whom: str) -> None:
    """While what is left of the killed one keeps the old supervisor busy, or a new one."""
    lost = threading.Event()
    with start(data_dir) as server, Keeper(server, lost.set) as keeping:
        with connect(server) as connection:
            backend = connection.info.backend_pid
            os.kill(backend, signal.SIGSTOP)
        before, pid = supervisor_pid(data_dir), postmaster(data_dir)
        if whom == "both":
            kill(before)
        kill(pid)
        if whom == "both":
            wait_until(lambda: set(supervisors(data_dir)) - {before}, AGAIN_S)
    time.sleep(0.2)
    os.kill(backend, signal.SIGCONT)
    assert_gone(data_dir, STOP_AFTER_KILL_S)
    assert not server.socket_dir.exists()
    assert (keeping.lost, lost.is_set()) == (None, False)


def test_the_looks_become_rarer() -> None:
    pauses = [keeper._pause_s(in_a_row) for in_a_row in range(keeper.STARTS_MAX + 1)]
    assert pauses == [0.2, 0.2, 0.4, 0.8, 1.6, 3.2, 6.4, 10, 10, 10, 10]
