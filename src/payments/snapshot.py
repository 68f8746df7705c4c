"""Reading much of the database at once, as of one moment: for audits and rebuilds.

Blocking, on connections of its own: it is used by commands, never while requests are served.
"""

from collections.abc import Iterator, Mapping
from types import TracebackType
from typing import Any, Self

import psycopg

from payments.database import DatabaseAddress, connect

CHUNK = 1000  # rows that libpq hands over at once

# A read of everything takes as long as it takes, and may sort or scan where requests may not.
# A server that cannot reach its client any more ends what it does for it.
UNHURRIED = """
SET statement_timeout = 0;
SET idle_in_transaction_session_timeout = 0;
SET enable_seqscan = on;
SET work_mem = '64MB';
SET client_connection_check_interval = '1s'
"""

BEGIN = """
BEGIN ISOLATION LEVEL REPEATABLE READ READ ONLY
"""

EXPORT = """
SELECT pg_export_snapshot()
"""

# It takes no parameters; the name is the server's own.
IMPORT = "SET TRANSACTION SNAPSHOT '{}'"


def unhurried(address: DatabaseAddress, application_name: str) -> psycopg.Connection[Any]:
    """A connection without the limits that requests have; StartError."""
    connection = connect(address, application_name)
    connection.execute(UNHURRIED)
    return connection


class Snapshot:
    """Several readers that see the same state of the database, each on its own connection."""

    def __init__(self, address: DatabaseAddress, application_name: str) -> None:
        self._address = address
        self._name = application_name
        self._connections = [unhurried(address, application_name)]
        self._connections[0].execute(BEGIN)
        ((self._id,),) = self.fetch(EXPORT)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, _: TracebackType | None
    ) -> None:
        for connection in self._connections:
            connection.close()

    def fetch(self, query: str, params: Mapping[str, Any] | None = None) -> list[tuple[Any, ...]]:
        """All rows of a statement that has few."""
        with self._connections[0].cursor(binary=True) as cursor:
            return cursor.execute(query.encode(), params).fetchall()

    def stream(
        self, query: str, params: Mapping[str, Any] | None = None
    ) -> Iterator[tuple[Any, ...]]:
        """The rows as the server sends them, however many; read them to the end, or close.

        The server works on the next ones meanwhile.
        """
        connection = unhurried(self._address, self._name)
        self._connections.append(connection)
        connection.execute(BEGIN)
        connection.execute(IMPORT.format(self._id).encode())
        with connection.cursor(binary=True) as cursor:
            yield from cursor.stream(query.encode(), params, size=CHUNK)
