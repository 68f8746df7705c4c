"""Runs `payments` by forking a process that has imported all of it.

Importing takes half of the time that a service needs to start, and most of that of a short command,
and the tests start hundreds. What a test passes is set in the child before the command begins:
arguments, environment, directory, stdout and stderr, and a session of its own. That the command
starts and ends by itself is tested in tests/cli/test_exits.py and tests/test_environment.py.
"""

import asyncio
import atexit
import gc
import json
import os
import select
import signal
import socket
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Mapping, Sequence
from contextlib import suppress
from functools import cache
from pathlib import Path
from typing import NoReturn

REQUEST_MAX = 256 * 1024  # bytes
# What GATEWAY names in tests.
GATEWAY = "tests.doubles.http_gateway"
# No library reads them when it is imported.
_LATE = ("TEST_", "OTEL_")


def may_fork(given: Mapping[str, str], ours: Mapping[str, str]) -> bool:
    """Whether a process with the environment `given` may be forked from one with `ours`."""
    return _can_watch() and _early(given) == _early(ours)


@cache
def _can_watch() -> bool:
    """Whether the kernel tells of a child's end by a descriptor (Linux 5.3)."""
    try:
        os.close(os.pidfd_open(os.getpid()))
    except OSError:
        return False
    return True


def _early(environment: Mapping[str, str]) -> dict[str, str]:
    """The variables that a module may have read when it was imported."""
    from payments.settings import VARIABLES

    return {
        name: value
        for name, value in environment.items()
        if name not in VARIABLES and not name.startswith(_LATE)
    }


class ForkedProcess:
    """The part of subprocess.Popen that a test of the service uses."""

    def __init__(
        self,
        arguments: Sequence[str],
        environment: Mapping[str, str],
        *,
        stdout: int,
        stderr: int,
        cwd: Path,
    ) -> None:
        self.returncode: int | None = None
        self._told, tell = os.pipe()
        order = json.dumps([list(arguments), dict(environment), str(cwd)]).encode()
        assert len(order) < REQUEST_MAX
        control, _ = _forker()
        socket.send_fds(control, [order], [stdout, stderr, tell])
        os.close(tell)
        self.pid = int(control.recv(16))

    def poll(self) -> int | None:
        return self._ended_within(0)

    def wait(self, timeout: float) -> int:
        code = self._ended_within(timeout)
        if code is None:
            raise subprocess.TimeoutExpired("payments", timeout)
        return code

    def send_signal(self, signum: int) -> None:
        if self.poll() is None:
            os.kill(self.pid, signum)

    def kill(self) -> None:
        self.send_signal(signal.SIGKILL)

    def terminate(self) -> None:
        self.send_signal(signal.SIGTERM)

    def _ended_within(self, seconds: float) -> int | None:
        if self.returncode is None and select.select([self._told], [], [], seconds)[0]:
            told = os.read(self._told, 16)
            os.close(self._told)
            assert told, "the process that forks has ended"
            self.returncode = int(told)
        return self.returncode


@cache
def _forker() -> tuple[socket.socket, "subprocess.Popen[bytes]"]:
    """This process's own one, which ends with it, and the socket to it."""
    ours, its = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    with its:
        forker = subprocess.Popen(
            [sys.executable, "-m", "tests.forked", str(its.fileno())],
            cwd=Path(__file__).parent.parent,
            pass_fds=[its.fileno()],
            start_new_session=True,
        )
    atexit.register(_end, ours, forker)
    return ours, forker


def _end(control: socket.socket, forker: "subprocess.Popen[bytes]") -> None:
    control.close()
    forker.wait(timeout=10)


def _fork_on_demand(control: socket.socket) -> list[str]:
    """Returns in each child, with the command's arguments; ends with the other side."""
    children: dict[int, tuple[int, int]] = {}  # pid and where to tell its end, by its pidfd
    while True:
        for ready in select.select([control.fileno(), *children], [], [])[0]:
            if ready != control.fileno():
                pid, tell = children.pop(ready)
                code = os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])
                with suppress(BrokenPipeError):  # nobody waits for it
                    os.write(tell, str(code).encode())
                _close(ready, tell)
                continue
            order, given, _, _ = socket.recv_fds(control, REQUEST_MAX, 3)
            if not order:
                sys.exit(0)
            stdout, stderr, tell = given
            arguments, environment, directory = json.loads(order)
            pid = os.fork()
            if pid == 0:
                os.setsid()
                os.dup2(stdout, 1)
                os.dup2(stderr, 2)
                _close(*given, *children, *(each for _, each in children.values()))
                control.close()
                os.chdir(directory)
                os.environ.clear()
                os.environ.update(environment)
                time.tzset()
                return list(arguments)
            _close(stdout, stderr)
            children[os.pidfd_open(pid)] = pid, tell
            control.send(str(pid).encode())


def _close(*descriptors: int) -> None:
    for descriptor in descriptors:
        os.close(descriptor)


async def _build_a_service() -> None:
    """The first one takes five times as long as the next: libraries import and remember more."""
    from payments.database.connections import DatabaseAddress
    from payments.service import Service
    from payments.settings import Settings
    from web.app import application

    nowhere = DatabaseAddress(host="/", port=1, user="", password=None, dbname="")
    with tempfile.TemporaryDirectory() as folder:
        service = Service(Settings(simulated_ledger=f"{folder}/ledger.sqlite"), nowhere)
        application(service)
        await service.gateways.close()


def _end_at_once(code: int) -> NoReturn:
    """As the interpreter does, but for taking each module apart, which would copy the memory that
    this process shares with the one that it was forked from."""
    threading._shutdown()  # type: ignore[attr-defined]
    atexit._run_exitfuncs()
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)


def main() -> None:
    from payments.environment import prepare

    prepare()
    import importlib
    import pkgutil

    import payments.__main__
    import web
    from payments.cli import main as command

    for package in (payments, web):
        for module in pkgutil.walk_packages(package.__path__, f"{package.__name__}."):
            importlib.import_module(module.name)
    importlib.import_module(GATEWAY)
    asyncio.run(_build_a_service())
    assert threading.active_count() == 1, threading.enumerate()
    gc.collect()
    gc.freeze()
    arguments = _fork_on_demand(socket.socket(fileno=int(sys.argv[1])))
    # As for `python -m payments`, which help texts name.
    sys.argv = [str(payments.__main__.__file__), *arguments]
    sys.modules["__main__"].__package__ = "payments"
    try:
        command()
    except SystemExit as end:
        if isinstance(end.code, int):
            _end_at_once(end.code)
        raise


if __name__ == "__main__":
    main()
