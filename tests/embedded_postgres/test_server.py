"""The embedded server starts, is shared, and goes away, however its users end.

Runs as root and as an ordinary user; each sees a few tests skipped.
"""

import fcntl
import os
import pwd
import shutil
import signal
import stat
import subprocess
import time
from pathlib import Path
from typing import Any

import pytest

from payments import embedded_postgres
from payments.embedded_postgres import EmbeddedPostgresError, start, supervisor
from tests.embedded_postgres.servers import (
    CLEAN_STOP_S,
    STOP_AFTER_KILL_S,
    User,
    about,
    as_root,
    assert_fails,
    assert_gone,
    connect,
    has_ended,
    kill,
    open_files,
    plan_of,
    postmaster,
    postmasters,
    processes,
    show,
    supervisor_pid,
    wait_until,
)
from tests.machine import within

not_as_root = pytest.mark.skipif(os.geteuid() == 0, reason="needs an ordinary user")


def test_starts_and_leaves_nothing_behind(data_dir: Path) -> None:
    with start(data_dir) as server:
        assert show(server, "server_version_num").startswith("18")
        socket_dir = server.socket_dir
        assert stat.S_IMODE(socket_dir.stat().st_mode) == 0o700
        assert stat.S_IMODE((data_dir / "postgres" / "cluster").stat().st_mode) == 0o700
    server.release()  # again: does nothing
    assert_gone(data_dir, CLEAN_STOP_S)
    assert not socket_dir.exists()
    assert "database system is shut down" in (data_dir / "postgres" / "server.log").read_text()


def test_is_durable_and_not_on_the_network(data_dir: Path) -> None:
    with start(data_dir, options={"max_connections": "17", "listen_addresses": "*"}) as server:
        for setting in ("fsync", "full_page_writes", "synchronous_commit", "data_checksums"):
            assert show(server, setting) == "on"
        assert show(server, "listen_addresses") == ""
        assert show(server, "server_encoding") == "UTF8"
        assert show(server, "max_connections") == "17"


@pytest.mark.usefixtures("room")
def test_client_programs_run() -> None:
    for name in ("pgbench", "pg_dump"):
        said = subprocess.run([embedded_postgres.binary(name), "--version"], capture_output=True)
        assert b" 18." in said.stdout
    with pytest.raises(EmbeddedPostgresError, match="no program pg_nonsense"):
        embedded_postgres.binary("pg_nonsense")


def test_every_committed_row_survives_kills_of_the_user(
    data_dir: Path, pytestconfig: pytest.Config
) -> None:
    for committed in range(1, 1 + pytestconfig.getoption("--kills")):
        user = User(data_dir)
        assert user.read() == committed
        user.kill()  # and at once the next start
    assert_gone(data_dir, STOP_AFTER_KILL_S)


def test_lives_until_its_last_user_leaves(data_dir: Path) -> None:
    first, second = User(data_dir), User(data_dir)
    assert {first.read(), second.read()} <= {1, 2}
    before = postmaster(data_dir)
    first.leave()
    assert second.ask() == 2
    assert postmaster(data_dir) == before
    second.leave()
    assert_gone(data_dir, CLEAN_STOP_S)


def test_many_starts_at_once_make_one_server(data_dir: Path) -> None:
    users = [User(data_dir) for _ in range(5)]
    for user in users:
        assert 1 <= user.read() <= 5
    assert [user.ask() for user in users] == [5] * 5
    assert len(postmasters(data_dir)) == 1
    for user in users:
        user.leave()
    assert_gone(data_dir, CLEAN_STOP_S)


@pytest.mark.parametrize("which", ["getpid", "getppid"])
def test_first_process_of_a_container_ends_after_the_server(
    data_dir: Path, monkeypatch: pytest.MonkeyPatch, which: str
) -> None:
    """The kernel would kill the server with it; with `--init` it is the first one's child."""
    server = start(data_dir)
    with monkeypatch.context() as patched:
        patched.setattr(os, which, lambda: 1)
        server.release()
    assert_gone(data_dir, 0)
    assert "database system is shut down" in (data_dir / "postgres" / "server.log").read_text()


def test_first_process_of_a_container_does_not_wait_for_ever(
    data_dir: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(embedded_postgres, "CONTAINER_STOP_S", 0.2)
    server, other = start(data_dir), User(data_dir)
    assert other.read() == 1
    with monkeypatch.context() as patched:
        patched.setattr(os, "getpid", lambda: 1)
        began = time.monotonic()
        with within(2):
            server.release()
        assert time.monotonic() - began >= 0.2
    assert other.ask() == 1
    other.leave()
    assert_gone(data_dir, CLEAN_STOP_S)


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT, signal.SIGHUP])
def test_signal_to_the_group_of_a_draining_user(data_dir: Path, number: int) -> None:
    before = User(data_dir, "draining", start_new_session=True)
    user = User(data_dir, "draining", process_group=0)
    user.read()
    before.read()
    before.leave()
    server_pid = postmaster(data_dir)
    for pid in (server_pid, supervisor_pid(data_dir)):
        assert os.getsid(pid) != os.getsid(user.process.pid)
        assert os.getpgid(pid) != user.process.pid
    os.killpg(user.process.pid, signal.SIGTERM)
    os.kill(supervisor_pid(data_dir), number)  # not even when it is meant
    assert user.ask() == 2
    assert postmaster(data_dir) == server_pid
    user.leave()
    assert_gone(data_dir, CLEAN_STOP_S)


def test_user_whose_parent_ignored_and_blocked_signals(data_dir: Path) -> None:
    numbers = (signal.SIGTERM, signal.SIGINT, signal.SIGHUP, signal.SIGCHLD)

    def be_deaf() -> None:
        for number in numbers:
            signal.signal(number, signal.SIG_IGN)
        signal.pthread_sigmask(signal.SIG_BLOCK, numbers)

    user = User(data_dir, preexec_fn=be_deaf)
    assert user.read() == 1
    user.kill()
    assert_gone(data_dir, STOP_AFTER_KILL_S)


def test_no_lock_leaks_into_other_programs(data_dir: Path) -> None:
    user = User(data_dir, "leaves-child")
    child_pid = user.read()
    user.read()
    for pid in processes(data_dir / "postgres" / "cluster"):
        if pid != supervisor_pid(data_dir):
            files = open_files(pid)
            assert files or has_ended(pid)
            assert not any(file.endswith(".lock") for file in files)
    user.process.kill()
    user.process.wait()
    try:
        assert_gone(data_dir, STOP_AFTER_KILL_S)
    finally:
        kill(child_pid)  # fails if it is gone, and then this test says nothing


def test_killed_supervisor_takes_the_server_along(data_dir: Path) -> None:
    with start(data_dir) as first:
        kill(supervisor_pid(data_dir))
        with start(data_dir) as second:  # at once, while the old server stops
            assert show(second, "fsync") == "on"
            assert show(first, "fsync") == "on"  # where its users expect it
        kill(supervisor_pid(data_dir))
        wait_until(lambda: not processes(data_dir), STOP_AFTER_KILL_S)
    with start(data_dir) as third:
        assert show(third, "fsync") == "on"
    assert_gone(data_dir, CLEAN_STOP_S)
    assert not second.socket_dir.exists()


def test_starts_wait_for_the_server_of_a_killed_supervisor(data_dir: Path) -> None:
    with start(data_dir) as server, connect(server) as connection:
        backend_pid = connection.info.backend_pid
        os.kill(backend_pid, signal.SIGSTOP)  # the old server cannot finish its shutdown
        kill(supervisor_pid(data_dir))
        users = [User(data_dir), User(data_dir)]
        time.sleep(0.7)
        assert not any(user.process.poll() is not None for user in users)
        os.kill(backend_pid, signal.SIGCONT)
        assert sorted(user.read() for user in users) in ([1, 2], [2, 2])


def test_killed_server_is_replaced_even_if_a_backend_is_busy(data_dir: Path) -> None:
    with start(data_dir) as first:
        busy = "DO $$ BEGIN LOOP END LOOP; END $$"
        psql = str(embedded_postgres.binary("psql"))
        arguments = ["-h", str(first.socket_dir), "-U", "postgres", "-c", busy]
        client = subprocess.Popen([psql, *arguments], stderr=subprocess.DEVNULL)
        with connect(first) as connection:
            active = "SELECT 1 FROM pg_stat_activity WHERE query = %s"
            wait_until(lambda: connection.execute(active, [busy]).fetchone(), 5)
        kill(postmaster(data_dir))
        with start(data_dir, timeout_s=10) as second:
            assert show(second, "fsync") == "on"
            assert show(first, "fsync") == "on"
        assert client.wait(5) != 0
    assert_gone(data_dir, CLEAN_STOP_S)


def test_killed_everything(data_dir: Path) -> None:
    user = User(data_dir)
    user.read()
    socket_dir = Path((data_dir / "postgres" / "socket-directory").read_text())
    for pid in (postmaster(data_dir), supervisor_pid(data_dir), user.process.pid):
        os.kill(pid, signal.SIGKILL)
    user.process.wait()
    with start(data_dir) as server, connect(server) as connection:
        assert connection.execute("SELECT count(*) FROM payment").fetchone() == (1,)
    assert_gone(data_dir, CLEAN_STOP_S)
    assert not socket_dir.exists()


def test_kill_during_the_first_start_leaves_no_half_cluster(data_dir: Path) -> None:
    home = data_dir / "postgres"
    user = User(data_dir)
    wait_until(lambda: list(home.glob("cluster.new-*/base")), 10)
    user.kill()
    assert_gone(data_dir, STOP_AFTER_KILL_S)
    assert not list(home.glob("cluster*"))
    supervised = User(data_dir)
    wait_until(lambda: list(home.glob("cluster.new-*/base")), 10)
    kill(supervisor_pid(data_dir))
    assert supervised.read() == 1  # tried again by itself
    supervised.leave()
    assert_gone(data_dir, CLEAN_STOP_S)
    assert [path.name for path in home.glob("cluster*")] == ["cluster"]


def test_pid_file_that_names_an_unrelated_process(data_dir: Path) -> None:
    start(data_dir).release()
    assert_gone(data_dir, CLEAN_STOP_S)
    pid_file = data_dir / "postgres" / "cluster" / "postmaster.pid"
    owner = data_dir / "postgres" / "cluster" / "PG_VERSION"
    pid_file.write_text(f"{os.getppid()}\n{pid_file.parent}\n0\n5432\n\n\n\nready   \n")
    os.chown(pid_file, owner.stat().st_uid, -1)
    with start(data_dir) as server:
        assert show(server, "fsync") == "on"


def test_a_pid_file_of_another_life_does_not_say_that_this_server_is_ready(tmp_path: Path) -> None:
    """After kill -9 in a container the next server has the pid of the last one."""
    plan = plan_of(tmp_path)
    cluster = tmp_path / "cluster"
    cluster.mkdir()
    pid_file = cluster / "postmaster.pid"
    pid_file.write_text(f"24\n{cluster}\n1795513961\n5432\n/tmp/old\n\n160 4\nready   \n")
    left = supervisor._pid_file(plan, cluster)
    assert not supervisor._is_ready(plan, 24, left)
    pid_file.write_text(f"24\n{cluster}\n1795513999\n5432\n/tmp/new\n\n160 4\nstarting\n")
    assert not supervisor._is_ready(plan, 24, left)
    pid_file.write_text(f"24\n{cluster}\n1795513999\n5432\n/tmp/new\n\n160 4\nready   \n")
    assert supervisor._is_ready(plan, 24, left)


def test_failed_start_is_one_line_and_leaves_nothing(data_dir: Path) -> None:
    start(data_dir).release()
    assert_gone(data_dir, CLEAN_STOP_S)
    assert_fails(data_dir, "shared_buffers", "nonsense", options={"shared_buffers": "nonsense"})
    with start(data_dir) as server:
        assert show(server, "shared_buffers") == "128MB"


def test_failed_initdb_is_one_line_and_leaves_nothing(data_dir: Path, monkeypatch: Any) -> None:
    programs = data_dir.parent / "programs" / "pginstall" / "bin"
    programs.mkdir(parents=True)
    for name, text in (("postgres", "exit 0"), ("initdb", "echo 'initdb: error: no luck'; exit 1")):
        (programs / name).write_text(f"#!/bin/sh\n{text}\n")
        (programs / name).chmod(0o755)
    monkeypatch.setattr(embedded_postgres, "_package_dir", lambda: programs.parents[1])
    assert_fails(data_dir, "initdb: error: no luck", "server.log")
    assert not list((data_dir / "postgres").glob("cluster*"))


def test_cluster_of_another_major_version(data_dir: Path) -> None:
    cluster = data_dir / "postgres" / "cluster"
    cluster.mkdir(parents=True)
    assert_fails(data_dir, "not a Postgres cluster")
    (cluster / "PG_VERSION").write_text("17\n")
    assert_fails(data_dir, "made by Postgres 17", "this is Postgres 18", "embedded-postgres 17")
    assert [path.name for path in cluster.iterdir()] == ["PG_VERSION"]


@pytest.mark.parametrize("lock", ["users.lock", "server.lock"])
def test_waits_are_bounded(data_dir: Path, lock: str) -> None:
    (data_dir / "postgres").mkdir(parents=True)
    with (data_dir / "postgres" / lock).open("w") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        with within(2):
            assert_fails(data_dir, str(data_dir), timeout_s=0.2)


def test_start_that_takes_too_long_leaves_nothing(data_dir: Path) -> None:
    assert_fails(data_dir, "server.log", timeout_s=0.15)


def test_long_paths(room: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    long = room.joinpath(*["a" * 60] * 3)
    long.mkdir(parents=True)
    monkeypatch.setenv("TMPDIR", str(long))
    with start(long / "data") as server:
        assert show(server, "fsync") == "on"
        assert server.socket_dir.parent == Path("/tmp")
    assert_gone(long / "data", CLEAN_STOP_S)
    short = room / "short"
    odd = room / "with, comma"
    for temp_dir, used in ((odd, Path("/tmp")), (short, short)):
        temp_dir.mkdir()
        temp_dir.chmod(0o777)
        monkeypatch.setenv("TMPDIR", str(temp_dir))
        with start(long / "data") as server:
            assert show(server, "fsync") == "on"
            assert server.socket_dir.parent == used
        assert_gone(long / "data", CLEAN_STOP_S)
        assert list(temp_dir.iterdir()) == []


def test_log_is_bounded(data_dir: Path) -> None:
    home = data_dir / "postgres"
    home.mkdir(parents=True)
    (home / "server.log").write_bytes(b"x" * (embedded_postgres.LOG_MAX_BYTES + 1))
    start(data_dir).release()
    assert_gone(data_dir, CLEAN_STOP_S)
    assert (home / "server.log").stat().st_size < 100_000
    assert (home / "server.log.1").exists()


def test_secrets_and_settings_of_the_service_stay_out(
    data_dir: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("ORDER_CALLBACK_SECRET", "canary")
    monkeypatch.setenv("PGDATA", "/nonexistent")
    with start(data_dir):
        for pid in (supervisor_pid(data_dir), postmaster(data_dir)):
            assert b"canary" not in Path(f"/proc/{pid}/environ").read_bytes()


def test_default_data_dir(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "geteuid", lambda: 0)
    assert embedded_postgres.default_data_dir() == Path("/var/lib/payment-service")
    monkeypatch.setattr(os, "geteuid", lambda: 1000)
    monkeypatch.setenv("HOME", "/home/someone")
    monkeypatch.setenv("XDG_DATA_HOME", "/data/home")
    assert embedded_postgres.default_data_dir() == Path("/data/home/payment-service")
    monkeypatch.setenv("XDG_DATA_HOME", "relative")
    expected = Path("/home/someone/.local/share/payment-service")
    assert embedded_postgres.default_data_dir() == expected


def test_missing_package(data_dir: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("importlib.util.find_spec", lambda _: None)
    assert_fails(data_dir, "embedded-postgres is not installed", "DATABASE_HOST")


@as_root
def test_root_runs_it_as_nobody_and_touches_nothing_else(data_dir: Path) -> None:
    data_dir.mkdir()
    (data_dir / "ledger").write_text("not yours")
    (data_dir / "ledger").chmod(0o640)
    data_dir.chmod(0o751)
    before = [(p.stat().st_uid, p.stat().st_mode) for p in (data_dir, data_dir / "ledger")]
    with start(data_dir):
        status = Path(f"/proc/{postmaster(data_dir)}/status").read_text()
        uid = pwd.getpwnam("nobody").pw_uid
        assert f"\nUid:\t{uid}\t{uid}\t{uid}\t{uid}\n" in status
        assert "\nGroups:\t \n" in status
    assert before == [(p.stat().st_uid, p.stat().st_mode) for p in (data_dir, data_dir / "ledger")]
    assert {path.stat().st_uid for path in (data_dir / "postgres").glob("*.l*")} == {0}


@as_root
def test_root_with_a_private_umask(data_dir: Path) -> None:
    before = os.umask(0o077)
    try:
        with start(data_dir / "deeper") as server:
            assert show(server, "fsync") == "on"
    finally:
        os.umask(before)


@as_root
def test_root_with_a_data_dir_that_nobody_cannot_reach(room: Path) -> None:
    private = room / "private"
    private.mkdir(mode=0o700)
    assert_fails(private / "data", f"may not enter {private}:", "PAYMENTS_DATA_DIR")
    assert stat.S_IMODE(private.stat().st_mode) == 0o700
    assert not (private / "data" / "postgres" / "cluster").exists()


@as_root
def test_root_with_programs_that_nobody_cannot_reach(
    room: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    private = room / "private"
    private.mkdir(mode=0o700)
    package = embedded_postgres._package_dir()
    for name in (package.name, "embedded_postgres.libs"):
        shutil.copytree(package.parent / name, private / name)
    monkeypatch.setattr(embedded_postgres, "_package_dir", lambda: private / package.name)
    home = room / "data" / "postgres"
    for name in ("binaries-partial", "binaries-17.0.0"):
        (home / name).mkdir(parents=True)
    made = []
    for _ in range(2):  # the second start uses the same copy
        with start(room / "data") as server:
            assert show(server, "fsync") == "on"
            assert str(home / "binaries-18") in about(postmaster(room / "data"))
        assert_gone(room / "data", CLEAN_STOP_S)
        made.append([(path.name, path.stat().st_ino) for path in home.glob("binaries-*")])
    assert len(made[0]) == 1
    assert made[0] == made[1]
    assert stat.S_IMODE(private.stat().st_mode) == 0o700


@as_root
def test_root_without_a_user_nobody(data_dir: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def missing(name: str) -> None:
        raise KeyError(name)

    monkeypatch.setattr(pwd, "getpwnam", missing)
    assert_fails(data_dir, "no user nobody", "DATABASE_HOST")


@as_root
def test_data_of_another_user(data_dir: Path) -> None:
    (data_dir / "postgres").mkdir(parents=True)
    os.chown(data_dir / "postgres", 12345, -1)
    assert_fails(data_dir, "belongs to user 12345", "PAYMENTS_DATA_DIR")


@not_as_root
def test_data_dir_that_cannot_be_written(room: Path) -> None:
    (room / "closed").mkdir(mode=0o500)
    assert_fails(room / "closed" / "data", "Permission denied", str(room / "closed"))


def test_a_user_without_a_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """As containers have them, where only the number counts."""

    def missing(uid: int) -> None:
        raise KeyError(uid)

    monkeypatch.setattr(pwd, "getpwuid", missing)
    plan = embedded_postgres._plan(tmp_path, {}, -1)
    with pytest.raises(EmbeddedPostgresError, match=r"has no name.*or set DATABASE_HOST"):
        supervisor._create_cluster(plan, tmp_path, tmp_path / "cluster", -1)
    assert list(tmp_path.iterdir()) == []
