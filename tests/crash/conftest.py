import time
import uuid
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.process import database_processes


@pytest.fixture
def data_dir(state_dir: Path) -> Iterator[Path]:
    """A data directory of this test alone; afterwards nothing of it may still run."""
    path = state_dir / uuid.uuid4().hex[:8]
    path.mkdir()
    yield path
    deadline = time.monotonic() + 6
    while left := database_processes(path):
        assert time.monotonic() < deadline, left
        time.sleep(0.05)
