"""The program that docs/following-the-log.md shows, as the other team runs it."""

import re
import subprocess
import sys
from pathlib import Path

import msgspec

from payments.database.connections import DatabaseAddress
from tests.process import ROOT, environment

PAGE = ROOT / "docs/following-the-log.md"


def postgres_at(name: str, address: DatabaseAddress) -> dict[str, str]:
    """What the library reads from the environment for this database."""
    values = {
        "PERSISTENCE_MODULE": "eventsourcing.postgres",
        "POSTGRES_HOST": address.host,
        "POSTGRES_PORT": address.port,
        "POSTGRES_DBNAME": address.dbname,
        "POSTGRES_USER": address.user,
        "POSTGRES_PASSWORD": address.password or "",
    }
    return {f"{name}_{key}": str(value) for key, value in values.items()}


def log_at(address: DatabaseAddress) -> dict[str, str]:
    return postgres_at("PAYMENTS", address)


class Follower:
    """The program with this role on the log, and with its tables in a database of its own."""

    def __init__(
        self, directory: Path, log: DatabaseAddress, role: str, own: DatabaseAddress
    ) -> None:
        self._databases = (log, role, own)
        (code,) = re.findall(r"```python\n(.*?)```", PAGE.read_text(), re.DOTALL)
        self._file = directory / "sales.py"
        self._file.write_text(code)
        self._talk = directory / "sales.log"
        reading = msgspec.structs.replace(log, user=role)
        self._settings = log_at(reading) | postgres_at("SALES", own)
        self._process: subprocess.Popen[bytes] | None = None

    def beside(self, directory: Path) -> "Follower":
        """Another one with the same tables."""
        return Follower(directory, *self._databases)

    @property
    def talk(self) -> str:
        return self._talk.read_text()

    @property
    def is_running(self) -> bool:
        return self._process is not None and self._process.poll() is None

    def start(self) -> "Follower":
        with self._talk.open("ab") as talk:
            self._process = subprocess.Popen(
                [sys.executable, str(self._file)],
                cwd=self._file.parent,
                env=environment(**self._settings),
                stderr=talk,
            )
        return self

    def kill(self) -> None:
        """kill -9."""
        assert self._process is not None
        self._process.kill()
        self._process.wait(timeout=10)

    def wait(self, timeout_s: float) -> int:
        """Its exit code."""
        assert self._process is not None
        return self._process.wait(timeout=timeout_s)

    def __enter__(self) -> "Follower":
        return self.start()

    def __exit__(self, *_: object) -> None:
        if self.is_running:
            self.kill()
