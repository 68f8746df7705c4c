"""The real service in a process of its own, as an operator runs it."""

import http.client
import os
import re
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any, Self

import httpx
import psutil
from click.testing import CliRunner
from loguru import logger

from payments.database.connections import DatabaseAddress
from tests.forked import ForkedProcess, may_fork

ROOT = Path(__file__).parent.parent
PAYMENTS = (sys.executable, "-m", "payments")
START_TIMEOUT_S = 30


def environment(**settings: object) -> dict[str, str]:
    """This process's environment without any setting of the service, and the ones given."""
    from payments.settings import VARIABLES

    inherited = {name: value for name, value in os.environ.items() if name not in VARIABLES}
    return inherited | {name: str(value) for name, value in settings.items()}


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


Process = subprocess.Popen[bytes] | ForkedProcess


def started(
    arguments: Sequence[str],
    given: Mapping[str, str],
    *,
    stderr: int,
    stdout: int = 1,
    cwd: Path = ROOT,
) -> Process:
    """`payments ARGUMENTS` with the environment `given`, in a session of its own."""
    if may_fork(given, environment()):
        return ForkedProcess(arguments, given, stderr=stderr, stdout=stdout, cwd=cwd)
    return subprocess.Popen(
        [*PAYMENTS, *arguments],
        env=given,
        stdout=stdout,
        stderr=stderr,
        cwd=cwd,
        start_new_session=True,
    )


def run(*arguments: object, **settings: object) -> subprocess.CompletedProcess[str]:
    """`payments ARGUMENTS` until it ends."""
    return run_to(None, *arguments, **settings)


def run_to(
    stdout: int | None, *arguments: object, **settings: object
) -> subprocess.CompletedProcess[str]:
    """The same, printing to this descriptor."""
    given, words = environment(**settings), [str(each) for each in arguments]
    with tempfile.TemporaryFile("w+") as printed, tempfile.TemporaryFile("w+") as said:
        to = printed.fileno() if stdout is None else stdout
        process = started(words, given, stdout=to, stderr=said.fileno(), cwd=Path.cwd())
        try:
            code = process.wait(timeout=60)
        except subprocess.TimeoutExpired:
            process.kill()
            raise
        for each in (printed, said):
            each.seek(0)
        return subprocess.CompletedProcess(words, code, printed.read(), said.read())


def invoke(*arguments: str, **settings: object) -> subprocess.CompletedProcess[str]:
    """The same within this process, for where a process of its own is not what is tested: most of
    the time goes into starting one."""
    from payments.cli import main
    from payments.settings import VARIABLES

    given: dict[str, str | None] = dict.fromkeys(VARIABLES)
    given |= {name: str(value) for name, value in settings.items()}
    on_sigterm = signal.getsignal(signal.SIGTERM)
    logger.remove()  # as at the start of a process
    try:
        done = CliRunner().invoke(main, arguments, env=given)
    finally:
        signal.signal(signal.SIGTERM, on_sigterm)
    if done.exc_info is not None and not isinstance(done.exception, SystemExit | None):
        raise done.exception
    return subprocess.CompletedProcess(arguments, done.exit_code, done.stdout, done.stderr)


# The peak of its own memory: ru_maxrss begins with that of the process which it was forked from.
_PEAK = (
    "from pathlib import Path; from payments.cli import main; import re, sys\n"
    "try: main()\n"
    "finally:\n"
    "    status = Path('/proc/self/status').read_text()\n"
    "    print(re.search('VmHWM:\\\\s+([0-9]+) kB', status)[1], file=sys.stderr)"
)


_PROGRESS = re.compile(r"[a-z ]+: [\d,]+( of [\d,]+)?(, [\d,]+/s(, \d+ s left)?)?")


def beside_progress(stderr: str) -> list[str]:
    """What a command said besides its progress, which it tells if it takes seconds."""
    return [line for line in stderr.splitlines() if not _PROGRESS.fullmatch(line)]


def peak_mb(*arguments: str, **settings: object) -> float:
    """The largest resident memory of `payments ARGUMENTS`, whatever it prints."""
    done = subprocess.run(
        [PAYMENTS[0], "-c", _PEAK, *arguments],
        env=environment(LOG_LEVEL="WARNING", **settings),
        stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
        text=True,
        timeout=60,
        check=False,
    )
    return int(done.stderr.split()[-1]) / 1024


MEMORY = Path("/dev/shm")
MEMORY_MIN_BYTES = 4 * 2**30  # the whole run takes less than 1 GB


@contextmanager
def open_directory(prefix: str) -> Iterator[Path]:
    """A directory for databases, which any user may enter: in memory if there is room. It is
    removed in the end, also after a failure: what is left would be missed by the next run.

    A database is some 600 files, and an ext4 without a journal makes a file the slower the more
    were deleted in the last minute: a clone then takes 0.3 s instead of 0.01.
    """
    path = Path(tempfile.mkdtemp(prefix=prefix, dir=MEMORY if _is_roomy(MEMORY) else None))
    path.chmod(0o755)
    try:
        yield path
    finally:
        shutil.rmtree(path, ignore_errors=True)


def _is_roomy(directory: Path) -> bool:
    if not os.access(directory, os.W_OK) or os.statvfs(directory).f_flag & os.ST_NOEXEC:
        return False
    free = min(shutil.disk_usage(directory).free, psutil.virtual_memory().available)
    return free > MEMORY_MIN_BYTES


class ServiceProcess:
    """`payments serve` on a free port, in a process group of its own."""

    def __init__(self, data_dir: Path, *options: str, **settings: object) -> None:
        self.data_dir = data_dir
        self._options = options
        self.port = int(str(settings.pop("PORT", free_port())))
        self.url = f"http://127.0.0.1:{self.port}"
        self.log = data_dir / f"service-{self.port}.log"
        self._settings = {"PORT": self.port, "PAYMENTS_DATA_DIR": data_dir, **settings}
        self._process: Process | None = None

    @property
    def process(self) -> Process:
        assert self._process is not None
        return self._process

    def start(self) -> Self:
        given = environment(**self._settings)
        with self.log.open("ab") as log:
            self._process = started(["serve", *self._options], given, stderr=log.fileno())
        try:
            self._wait_until_healthy()
        except BaseException:
            self.kill()
            raise
        return self

    def _wait_until_healthy(self) -> None:
        deadline = time.monotonic() + START_TIMEOUT_S
        while not self.is_healthy():
            assert self.process.poll() is None, self.log.read_text()
            assert time.monotonic() < deadline, self.log.read_text()
            time.sleep(0.02)
        assert self.process.poll() is None, "another service has the port"

    def is_healthy(self) -> bool:
        connection = http.client.HTTPConnection("127.0.0.1", self.port, timeout=5)
        try:
            connection.request("GET", "/health")
            return connection.getresponse().status == 200
        except (OSError, http.client.HTTPException):
            return False
        finally:
            connection.close()

    def kill(self) -> None:
        """kill -9: nothing in the process gets to run again."""
        self.process.kill()
        self.process.wait(timeout=10)

    def terminate(self, *, group: bool = False) -> int:
        """SIGTERM; the exit code."""
        if group:
            os.killpg(self.process.pid, signal.SIGTERM)
        else:
            self.process.terminate()
        return self.process.wait(timeout=15)

    def __enter__(self) -> Self:
        return self.start()

    def __exit__(self, *_: object) -> None:
        if self._process is not None and self._process.poll() is None:
            self.process.terminate()
            try:
                self.process.wait(timeout=15)
            except subprocess.TimeoutExpired:
                self.kill()

    def charge(self, client: httpx.Client, key: str, **changed: Any) -> httpx.Response:
        body = {"merchant_order_id": "f50d9fa2-5d3e-4e49-9a02-218ad32ef4a9", "amount_cents": 1500}
        headers = {"Idempotency-Key": key}
        return client.post(f"{self.url}/v1/charge", json=body | changed, headers=headers)


@contextmanager
def working(**settings: object) -> Iterator[None]:
    """`payments work` until the end of the block; it must stop with exit code 0."""
    with tempfile.NamedTemporaryFile("r") as log:
        process = started(["work"], environment(LOG_FORMAT="json", **settings), stderr=log.fileno())
        try:
            talk = ""
            while '"working"' not in talk:
                assert process.poll() is None, f"it ended before it worked: {talk}"
                time.sleep(0.02)
                talk = Path(log.name).read_text()
            yield
        finally:
            process.terminate()
            code = process.wait(timeout=15)
        assert code == 0, Path(log.name).read_text()


def at(address: DatabaseAddress) -> dict[str, object]:
    """The settings for this database."""
    return {
        "DATABASE_HOST": address.host,
        "DATABASE_PORT": address.port,
        "DATABASE_USERNAME": address.user,
        "DATABASE_NAME": address.dbname,
    }


def without_forked(pids: Sequence[int]) -> list[int]:
    """All but those that one of the others has just forked: a child has the arguments of its parent
    until it gets its own."""
    found = []
    for pid in pids:
        with suppress(psutil.NoSuchProcess):
            if psutil.Process(pid).ppid() not in pids:
                found.append(pid)
    return found


def database_processes(data_dir: Path) -> list[psutil.Process]:
    """Every process of the embedded server under this directory, its supervisor included."""
    found, home = [], bytes(data_dir / "postgres")
    for process in Path("/proc").iterdir():
        # Not by psutil.process_iter: this is polled, and that reads four files of each process.
        with suppress(OSError, psutil.NoSuchProcess):
            if not process.name.isdecimal() or int(process.name) == os.getpid():
                continue
            words = (process / "cmdline").read_bytes().split(b"\0")
            words.append(bytes((process / "cwd").readlink()))
            if any(home in word for word in words):
                found.append(psutil.Process(int(process.name)))
    return found
