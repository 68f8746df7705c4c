from collections.abc import Callable, Iterator
from typing import Any

import psycopg
import pytest
from click.testing import CliRunner, Result

from payments.cli import main
from payments.database.connections import DatabaseAddress, connect
from tests.legacy.node import TABLE
from tests.process import at

Command = Callable[..., Result]
Node = psycopg.Connection[Any]


@pytest.fixture
def node(empty_database: DatabaseAddress) -> Iterator[Node]:
    """A connection to the Node service's database; the import takes it for one of its own."""
    with connect(empty_database, "payments import-legacy") as connection:
        connection.execute(TABLE)
        yield connection


@pytest.fixture
def payments(empty_database: DatabaseAddress, monkeypatch: pytest.MonkeyPatch) -> Command:
    """`payments ARGUMENTS` on that database."""
    for name, value in {**at(empty_database), "LOG_LEVEL": "WARNING"}.items():
        monkeypatch.setenv(name, str(value))

    def invoke(*arguments: str) -> Result:
        return CliRunner().invoke(main, arguments)

    return invoke
