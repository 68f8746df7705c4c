from collections.abc import Iterator
from typing import Any

import psycopg
import pytest

from payments.database.connections import DatabaseAddress
from tests.conftest import Clones
from tests.process import ServiceProcess, at


@pytest.fixture(scope="module")
def module_database(clones: Clones) -> Iterator[DatabaseAddress]:
    """A migrated database of the module's tests."""
    database = clones.take()
    yield database
    clones.drop(database)


@pytest.fixture(scope="module")
def edge(
    module_database: DatabaseAddress, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[ServiceProcess]:
    """A service for all tests of the module; none of them may harm it or fill its log."""
    settings: dict[str, Any] = at(module_database) | {"SIMULATED_LEDGER": "", "LOG_FORMAT": "json"}
    with ServiceProcess(tmp_path_factory.mktemp("edge"), **settings) as service:
        yield service
        assert service.is_healthy()
        log = service.log.read_text()
        assert "Traceback" not in log
        assert '"ERROR"' not in log
        assert '"CRITICAL"' not in log


@pytest.fixture(scope="module")
def store(module_database: DatabaseAddress) -> Iterator[psycopg.Connection[Any]]:
    """A plain connection to the module's database, for looking at what is stored."""
    with psycopg.connect(module_database.conninfo("tests"), autocommit=True) as opened:
        yield opened
