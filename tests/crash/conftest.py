import uuid
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.doubles.provider import ProviderProcess
from tests.machine import within
from tests.process import database_processes
from tests.support import eventually


@pytest.fixture
def data_dir(state_dir: Path) -> Iterator[Path]:
    """A data directory of this test alone; afterwards nothing of it may still run."""
    path = state_dir / uuid.uuid4().hex[:8]
    path.mkdir()
    yield path
    with within(6):
        eventually(lambda: not database_processes(path))


@pytest.fixture
def provider(tmp_path: Path) -> Iterator[ProviderProcess]:
    with ProviderProcess(tmp_path / "provider.jsonl") as running:
        yield running
