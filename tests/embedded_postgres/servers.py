"""Embedded servers of a test's own, and their processes."""

import contextlib
import os
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any, ClassVar

import psycopg
import pytest

from payments.embedded_postgres import EmbeddedPostgres, EmbeddedPostgresError, start, supervisor
from tests.machine import within
from tests.process import without_forked
from tests.support import eventually

CLEAN_STOP_S = 3
STOP_AFTER_KILL_S = 6


as_root = pytest.mark.skipif(os.geteuid() != 0, reason="needs root")


# Adds a row, then answers each line on its input with the number of rows; leaves at its end.
USER = """
import pathlib, signal, subprocess, sys, psycopg
from payments.embedded_postgres import start
server = start(pathlib.Path(sys.argv[1]))
if "draining" in sys.argv:
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
if "leaves-child" in sys.argv:
    child = subprocess.Popen(["sleep", "60"], close_fds=False, stdout=subprocess.DEVNULL)
    print(child.pid, flush=True)
connection = psycopg.connect(
    host=str(server.socket_dir), port=server.port, user=server.user, dbname="postgres",
    autocommit=True,
)
connection.execute("SELECT pg_advisory_lock(1)")  # IF NOT EXISTS alone fails in a race
connection.execute("CREATE TABLE IF NOT EXISTS payment (n int)")
connection.execute("INSERT INTO payment VALUES (1)")
connection.execute("SELECT pg_advisory_unlock(1)")
while True:
    print(connection.execute("SELECT count(*) FROM payment").fetchone()[0], flush=True)
    if not sys.stdin.readline():
        break
connection.close()
server.release()
"""


class User:
    """Another process that uses the server."""

    all: ClassVar[list["User"]] = []

    def __init__(self, data_dir: Path, *modes: str, **how: Any) -> None:
        self.process = subprocess.Popen(
            [sys.executable, "-c", USER, str(data_dir), *modes],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            **how,
        )
        self.all.append(self)

    def read(self) -> int:
        assert self.process.stdout is not None
        return int(self.process.stdout.readline())

    def ask(self) -> int:
        assert self.process.stdin is not None
        self.process.stdin.write("\n")
        self.process.stdin.flush()
        return self.read()

    def leave(self) -> None:
        self.process.communicate(timeout=10)
        assert self.process.returncode == 0

    def kill(self) -> None:
        self.process.kill()
        self.process.wait()
        for stream in (self.process.stdin, self.process.stdout):
            assert stream is not None
            stream.close()


def processes(data_dir: Path) -> list[int]:
    """Every living process that works in `data_dir` or names it in its arguments."""
    pids = [int(entry.name) for entry in Path("/proc").iterdir() if entry.name.isdecimal()]
    return [pid for pid in pids if pid != os.getpid() and str(data_dir) in about(pid)]


def about(pid: int) -> str:
    """The directory and the arguments of a process; neither if it is gone or only a zombie."""
    try:
        return (
            str(Path(f"/proc/{pid}/cwd").readlink())
            + "\0"
            + Path(f"/proc/{pid}/cmdline").read_text()
        )
    except OSError:
        return ""


def postmaster(data_dir: Path) -> int:
    return postmasters(data_dir)[0]


def postmasters(data_dir: Path) -> list[int]:
    """At most one, unless the next one has begun."""
    return without_forked([pid for pid in processes(data_dir) if "\0-D\0" in about(pid)])


def supervisor_pid(data_dir: Path) -> int:
    return supervisors(data_dir)[0]


def supervisors(data_dir: Path) -> list[int]:
    return without_forked([pid for pid in processes(data_dir) if supervisor.__file__ in about(pid)])


def kill(pid: int) -> None:
    os.kill(pid, signal.SIGKILL)
    wait_until(lambda: has_ended(pid), 1)


def has_ended(pid: int) -> bool:
    """All its threads have: the last one takes its locks along."""
    states = []
    for task in entries(Path(f"/proc/{pid}/task")):
        with contextlib.suppress(OSError):
            states.append((task / "stat").read_text().rpartition(")")[2].split()[0])
    return set(states) <= {"Z"}


def open_files(pid: int) -> list[str]:
    """Where its descriptors lead to; none if it has ended."""
    files = []
    for link in entries(Path(f"/proc/{pid}/fd")):
        with contextlib.suppress(OSError):
            files.append(str(link.readlink()))
    return files


def entries(directory: Path) -> list[Path]:
    """Empty if it is gone, also if it goes while it is read, as a process ends."""
    with contextlib.suppress(OSError):
        return list(directory.iterdir())
    return []


def wait_until(done: Callable[[], object], within_s: float) -> None:
    if done():  # also where there is no time for it
        return
    with within(within_s):
        eventually(done)


def assert_gone(data_dir: Path, within_s: float) -> None:
    wait_until(lambda: not processes(data_dir), within_s)
    assert not list((data_dir / "postgres").glob("socket-directory*"))


def connect(server: EmbeddedPostgres) -> "psycopg.Connection[tuple[Any, ...]]":
    return psycopg.connect(
        host=str(server.socket_dir),
        port=server.port,
        user=server.user,
        dbname="postgres",
        autocommit=True,
    )


def show(server: EmbeddedPostgres, setting: str) -> str:
    with connect(server) as connection:
        row = connection.execute("SELECT current_setting(%s)", [setting]).fetchone()
    assert row is not None
    return str(row[0])


def assert_fails(data_dir: Path, *words: str, **how: Any) -> None:
    with pytest.raises(EmbeddedPostgresError) as caught:
        start(data_dir, **how).release()
    message = str(caught.value)
    assert "\n" not in message
    for word in words:
        assert word in message
    wait_until(lambda: not processes(data_dir), CLEAN_STOP_S)


def plan_of(home: Path, uid: int | None = None, gid: int | None = None) -> supervisor.Plan:
    """What a supervisor of this directory knows."""
    return supervisor.Plan(
        home=str(home),
        package_dir="",
        version="18",
        temp_dirs=[str(home)],
        options={},
        uid=uid,
        gid=gid,
        server_fd=-1,
    )
