"""A Postgres of a test's own on 127.0.0.1, to be stopped, killed, frozen and started again.

Unlike the embedded server it stays where it is: every start has the same port.
"""

import os
import random
import secrets
import shutil
import signal
import socket
import subprocess
import time
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any, Literal, Self

import msgspec
import psutil
import psycopg

from payments import embedded_postgres
from payments.database.connections import DatabaseAddress
from payments.embedded_postgres import supervisor
from tests.process import at

START_TIMEOUT_S = 30
STOP_TIMEOUT_S = 15

# Below the ports that the kernel gives to clients: one of those could take the server's place while
# it is away, or connect to itself there.
PORTS = range(20_000, 32_000)


class OutsidePostgres:
    """A server with one database and its superuser, in a directory that any user may enter."""

    def __init__(self, home: Path) -> None:
        self._home = home
        self._cluster = home / "cluster"
        self._log = home / "postgres.log"
        self._process: subprocess.Popen[bytes] | None = None
        password = secrets.token_urlsafe(16)  # whoever is on this machine can reach the port
        self.address = DatabaseAddress(
            host="127.0.0.1",
            port=_free_port(),
            user="postgres",
            password=password,
            dbname="postgres",
        )

    @property
    def settings(self) -> dict[str, object]:
        """The service's settings for this database."""
        return {**at(self.address), "DATABASE_PASSWORD": self.address.password}

    def __enter__(self) -> Self:
        self._plan = embedded_postgres._plan(self._home, {}, -1)
        self._home.mkdir(exist_ok=True)
        if self._plan.uid is not None and self._plan.gid is not None:
            os.chown(self._home, self._plan.uid, self._plan.gid)
        try:
            self._programs = supervisor.usable_programs(self._plan, self._home)
            self._create()
            return self.start()
        except BaseException:
            self.__exit__()
            raise

    def __exit__(self, *_: object) -> None:
        self.kill()
        shutil.rmtree(self._home)

    def start(self) -> Self:
        """Returns when it takes connections."""
        settings = {
            "listen_addresses": self.address.host,
            "port": self.address.port,
            "unix_socket_directories": "",
            "dynamic_shared_memory_type": "mmap",  # in its own directory: nothing stays behind
        }
        options = [part for name, value in settings.items() for part in ("-c", f"{name}={value}")]
        self._process = self._spawn("postgres", "-D", str(self._cluster), *options)
        self._wait(self._answers, START_TIMEOUT_S, "does not start")
        return self

    def stop(self, how: Literal["fast", "immediate"]) -> None:
        """As `pg_ctl stop -m HOW`: an orderly end of all connections, or a crash."""
        assert self._process is not None
        self._process.send_signal(signal.SIGINT if how == "fast" else signal.SIGQUIT)
        process = self._process
        self._wait(lambda: process.poll() is not None, STOP_TIMEOUT_S, f"does not stop ({how})")

    def kill(self) -> None:
        """SIGKILL to all of its processes, frozen or not."""
        while found := self.processes():
            for process in found:
                with suppress(psutil.NoSuchProcess):
                    process.kill()
            time.sleep(0.01)
        if self._process is not None:
            self._process.wait(timeout=STOP_TIMEOUT_S)

    def freeze(self) -> None:
        """SIGSTOP to all of its processes: connections stay open and nobody answers on them."""
        # The postmaster first, and until all stand: it may have forked another one meanwhile.
        while running := [process for process in self.processes() if not stands(process)]:
            for process in running:
                with suppress(psutil.NoSuchProcess):
                    process.suspend()

    def thaw(self) -> None:
        for process in self.processes():
            with suppress(psutil.NoSuchProcess):
                process.resume()

    def kill_backend(self, application_name: str) -> None:
        """kill -9 of one connection's process; the server then ends all others and recovers."""
        with self.connect() as connection:
            row = connection.execute(
                "SELECT pid FROM pg_stat_activity WHERE application_name = %s LIMIT 1",
                [application_name],
            ).fetchone()
        assert row is not None, f"no connection is called {application_name!r}"
        psutil.Process(row[0]).kill()

    def terminate_backends(self) -> None:
        """Every connection but the one that asks gets FATAL 57P01."""
        with self.connect() as connection:
            connection.execute(
                "SELECT pg_terminate_backend(pid) FROM pg_stat_activity"
                " WHERE datname = current_database() AND pid <> pg_backend_pid()"
            )

    def connect(self) -> psycopg.Connection[Any]:
        return psycopg.connect(self.address.conninfo("tests"), autocommit=True)

    def processes(self) -> list[psutil.Process]:
        """The postmaster first; backends may outlive it."""
        found = []
        for process in psutil.process_iter():
            with suppress(psutil.Error, OSError):
                if process.name() == "postgres" and process.cwd() == str(self._cluster):
                    found.append(process)
        postmaster = self._process and self._process.pid
        return sorted(found, key=lambda process: process.pid != postmaster)

    def _create(self) -> None:
        password = self._home / "password"
        password.write_text(f"{self.address.password}\n")
        access = ["--username=postgres", "--auth=scram-sha-256", f"--pwfile={password}"]
        options = ["--encoding=UTF8", "--locale=C", "--no-sync", "--no-instructions"]
        initdb = self._spawn("initdb", "-D", str(self._cluster), *access, *options)
        try:
            assert initdb.wait(timeout=START_TIMEOUT_S) == 0, self._log.read_text()
        finally:
            initdb.kill()
            initdb.wait()

    def _answers(self) -> bool:
        assert self._process is not None
        assert self._process.poll() is None, self._log.read_text()
        try:
            self.connect().close()
        except psycopg.OperationalError:
            return False
        return True

    def _spawn(self, program: str, *arguments: str) -> "subprocess.Popen[bytes]":
        with self._log.open("ab") as log:
            return subprocess.Popen(
                [self._programs / program, *arguments],
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=log,
                cwd=self._home,
                env=supervisor.environment(),
                user=self._plan.uid,
                group=self._plan.gid,
                extra_groups=[] if self._plan.uid is not None else None,
                start_new_session=True,
            )

    def _wait(self, holds: Callable[[], bool], timeout_s: float, otherwise: str) -> None:
        deadline = time.monotonic() + timeout_s
        while not holds():
            assert time.monotonic() < deadline, f"Postgres {otherwise}: {self._log.read_text()}"
            time.sleep(0.02)


class Standby(OutsidePostgres):
    """An asynchronous standby of another server; it stays one until it is promoted."""

    def __init__(self, home: Path, primary: OutsidePostgres) -> None:
        super().__init__(home)
        self._primary = primary.address
        self.address = msgspec.structs.replace(primary.address, port=self.address.port)

    def promote_at(self, port: int) -> None:
        """Becomes the primary, at this port, with what had reached it until now."""
        self.kill()
        (self._cluster / "standby.signal").unlink()
        self.address = msgspec.structs.replace(self.address, port=port)
        self.start()

    def _create(self) -> None:
        source = self._primary.conninfo("standby").replace("dbname=postgres", "")
        backup = self._spawn(
            *("pg_basebackup", "-D", str(self._cluster), "--write-recovery-conf", "--no-sync"),
            *("--checkpoint=fast", f"--dbname={source}"),
        )
        try:
            assert backup.wait(timeout=START_TIMEOUT_S) == 0, self._log.read_text()
        finally:
            backup.kill()
            backup.wait()


def _free_port() -> int:
    while True:
        port = random.choice(PORTS)
        with socket.socket() as probe, suppress(OSError):
            probe.bind(("127.0.0.1", port))
            return port


def stands(process: psutil.Process) -> bool:
    """Whether a SIGSTOP has stopped it, or it is gone."""
    try:
        return bool(process.status() == psutil.STATUS_STOPPED)
    except psutil.NoSuchProcess:
        return True
