"""Reads large parts of the database without long transactions, for exports, audits and rebuilds.

Vacuum keeps all rows, of every table, that an open transaction or cursor may still see. So large
reads consist of many short statements, each read to its end: between two of them no snapshot is
held, however long the reader pauses. docs/decisions/exports.md says why that is enough.

Blocking, on its own connections: used by CLI commands, never while requests are served.
"""

from collections.abc import Callable, Iterable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from types import TracebackType
from typing import Any, Protocol, Self, TypeVar

import psycopg

from payments.database.connections import (
    CONFLICTS,
    DatabaseAddress,
    again_on_conflict,
    connect,
    cut,
)
from payments.errors import StartError
from payments.events.store import HEAD_POSITION, READ_NEXT_PLACE

T = TypeVar("T")
Rows = list[tuple[Any, ...]]

# A full read has no timeout, and may sort or scan where requests may not. The server ends a
# statement when its client has disconnected.
UNHURRIED = """
SET statement_timeout = 0;
SET enable_seqscan = on;
SET work_mem = '64MB';
SET client_connection_check_interval = '1s'
"""

BEGIN = """
BEGIN ISOLATION LEVEL REPEATABLE READ READ ONLY
"""

POSITION_MIN = -(2**63)  # the minimum of the column's type, even for altered rows


def unhurried(address: DatabaseAddress, application_name: str) -> psycopg.Connection[Any]:
    """A connection without the limits of requests; raises StartError."""
    connection = connect(address, application_name)
    connection.execute(UNHURRIED)
    return connection


class Source(Protocol):
    """Executes statements."""

    def fetch(self, query: str, params: Mapping[str, Any] | None = None) -> Rows:
        """All rows of a statement with few rows."""
        ...


class Snapshot:
    """Executes statements that see the same state of the database."""

    def __init__(self, connection: psycopg.Connection[Any]) -> None:
        self._connection = connection

    def fetch(self, query: str, params: Mapping[str, Any] | None = None) -> Rows:
        return _fetch(self._connection, query, params)


class Reader:
    """Executes statements on one connection; each sees the database as of its own moment. Those
    that a standby cancels are retried."""

    def __init__(self, address: DatabaseAddress, application_name: str) -> None:
        """Raises StartError."""
        self._address = address
        self._name = application_name
        self._connection = unhurried(address, application_name)
        self._is_cut = False
        ((self._head,),) = self.fetch(HEAD_POSITION)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, _: TracebackType | None
    ) -> None:
        self.close()

    def close(self) -> None:
        self._connection.close()

    def fetch(
        self, query: str, params: Mapping[str, Any] | None = None, *, prepare: bool = False
    ) -> Rows:
        """`prepare`: for a frequent statement with the same plan for all values."""
        return self._again(lambda connection: _fetch(connection, query, params, prepare))

    def at_one_moment(self, read: Callable[[Snapshot], T]) -> T:
        """The result of `read` in a snapshot. `read` must be short, and may be called again."""
        return self._again(lambda connection: _at_one_moment(connection, read))

    def ahead(self, parts: Iterable[T]) -> Iterator[T]:
        """Yields parts that are read with this reader, none of them None: a thread reads the next
        one while the caller processes the last. The caller must not read with it meanwhile."""
        upcoming = iter(parts)
        with ThreadPoolExecutor(1) as thread:
            coming = thread.submit(next, upcoming, None)
            try:
                while (part := coming.result()) is not None:
                    coming = thread.submit(next, upcoming, None)
                    yield part
            except BaseException:
                self._is_cut = True
                cut(self._connection)  # else the thread would wait for a frozen server
                raise

    def _again(self, read: Callable[[psycopg.Connection[Any]], T]) -> T:
        def once() -> T:
            try:
                return read(self._connection)
            except psycopg.OperationalError as error:
                if not self._connection.closed or self._is_cut:
                    raise
                # The reason of a standby that disconnects does not always arrive.
                if not isinstance(error, CONFLICTS) and error.sqlstate is not None:
                    raise
                self._connection = self._opened_again()
                raise psycopg.errors.SerializationFailure(str(error)) from error

        return again_on_conflict(once)

    def _opened_again(self) -> psycopg.Connection[Any]:
        """A new connection. Raises StartError if it leads to another server, which lacks events."""
        connection = unhurried(self._address, self._name)
        ((head,),) = _fetch(connection, HEAD_POSITION, None)
        if head < self._head:
            connection.close()
            raise StartError(f"the log ends at position {head}; before, it ended at {self._head}")
        return connection


def _at_one_moment(connection: psycopg.Connection[Any], read: Callable[[Snapshot], T]) -> T:
    connection.execute(BEGIN)
    try:
        return read(Snapshot(connection))
    finally:
        with suppress(psycopg.OperationalError):  # the first error is raised
            connection.rollback()


def windows(source: Source, last: int, size: int) -> Iterator[tuple[int, int]]:
    """The first and last positions of consecutive parts of the log up to `last`. Wide gaps, which
    only damage leaves, are skipped."""
    first = _next_place(source, POSITION_MIN)
    while first is not None and first <= last:
        until = min(last, first + size - 1)
        yield first, until
        first = _next_place(source, until + 1) if until < last else None


def _next_place(source: Source, first: int) -> int | None:
    ((place,),) = source.fetch(READ_NEXT_PLACE, {"first": first})
    return place  # type: ignore[no-any-return]


def _fetch(
    connection: psycopg.Connection[Any],
    query: str,
    params: Mapping[str, Any] | None,
    prepare: bool = False,
) -> Rows:
    with connection.cursor(binary=True) as cursor:
        return cursor.execute(query.encode(), params, prepare=prepare).fetchall()
