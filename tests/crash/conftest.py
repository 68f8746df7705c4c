import uuid
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.conftest import EVERY_DAY_KILLS
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
def wanted_kills(pytestconfig: pytest.Config) -> int:
    """For a loop whose like runs every day with another provider: skipped unless more is wanted."""
    kills: int = pytestconfig.getoption("--kills")
    if not pytestconfig.getoption("--long") and kills <= EVERY_DAY_KILLS:
        pytest.skip("up to 45 s: --long, or --kills above the default")
    return max(2, kills // 3)


@pytest.fixture
def provider(tmp_path: Path) -> Iterator[ProviderProcess]:
    with ProviderProcess(tmp_path / "provider.jsonl") as running:
        yield running
