import os
import signal
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.embedded_postgres.servers import CLEAN_STOP_S, User, processes, wait_until
from tests.process import open_directory


@pytest.fixture
def room(monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """A directory that the server's user can get to; pytest's tmp_path is closed to it."""
    monkeypatch.delenv("TMPDIR", raising=False)
    with open_directory("pg-test-") as room:
        yield room
        while User.all:
            User.all.pop().kill()
        try:
            wait_until(lambda: not processes(room), CLEAN_STOP_S)
        finally:
            for pid in processes(room):
                os.kill(pid, signal.SIGKILL)


@pytest.fixture
def data_dir(room: Path) -> Path:
    return room / "data"
