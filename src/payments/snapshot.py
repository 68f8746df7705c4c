"""Reading much of the database, for exports, audits and rebuilds, and holding nothing for long.

What a transaction or a cursor may still look at, no vacuum removes, from any table. So what is much
is read in many short statements, each to its end: between two of them nothing is held, however long
whoever reads is paused. docs/decisions/exports.md says why nothing else is needed.

Blocking, on connections of its own: it is used by commands, never while requests are served.
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

# A read of everything takes as long as it takes, and may sort or scan where requests may not.
# A server that cannot reach its client any more ends what it does for it.
UNHURRIED = """
SET statement_timeout = 0;
SET enable_seqscan = on;
SET work_mem = '64MB';
SET client_connection_check_interval = '1s'
"""

BEGIN = """
BEGIN ISOLATION LEVEL REPEATABLE READ READ ONLY
"""

POSITION_MIN = -(2**63)  # no row has one below it, whatever was done to it


def unhurried(address: DatabaseAddress, application_name: str) -> psycopg.Connection[Any]:
    """A connection without the limits that requests have; StartError."""
    connection = connect(address, application_name)
    connection.execute(UNHURRIED)
    return connection


class Source(Protocol):
    """Where statements are sent to."""

    def fetch(self, query: str, params: Mapping[str, Any] | None = None) -> Rows:
        """All rows of a statement that has few."""
        ...


class Snapshot:
    """Statements that see the same state of the database."""

    def __init__(self, connection: psycopg.Connection[Any]) -> None:
        self._connection = connection

    def fetch(self, query: str, params: Mapping[str, Any] | None = None) -> Rows:
        return _fetch(self._connection, query, params)


class Reader:
    """Statements that see the database as it is then, each by itself, on one connection. What a
    standby cancels is read again."""

    def __init__(self, address: DatabaseAddress, application_name: str) -> None:
        """StartError."""
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
        """`prepare`: it comes often, and one plan is good for all values."""
        return self._again(lambda connection: _fetch(connection, query, params, prepare))

    def at_one_moment(self, read: Callable[[Snapshot], T]) -> T:
        """What `read` makes of a snapshot; it must not take long, and may be called again."""
        return self._again(lambda connection: _at_one_moment(connection, read))

    def ahead(self, parts: Iterable[T]) -> Iterator[T]:
        """Parts that this reader makes, none of which is None: whoever takes one works on it while
        a thread reads the next. Nothing else may be read meanwhile."""
        upcoming = iter(parts)
        with ThreadPoolExecutor(1) as thread:
            coming = thread.submit(next, upcoming, None)
            try:
                while (part := coming.result()) is not None:
                    coming = thread.submit(next, upcoming, None)
                    yield part
            except BaseException:
                self._is_cut = True
                cut(self._connection)  # or a server that does not answer would be waited for
                raise

    def _again(self, read: Callable[[psycopg.Connection[Any]], T]) -> T:
        def once() -> T:
            try:
                return read(self._connection)
            except psycopg.OperationalError as error:
                if not self._connection.closed or self._is_cut:
                    raise
                # Why a standby cuts a connection off does not always arrive.
                if not isinstance(error, CONFLICTS) and error.sqlstate is not None:
                    raise
                self._connection = self._opened_again()
                raise psycopg.errors.SerializationFailure(str(error)) from error

        return again_on_conflict(once)

    def _opened_again(self) -> psycopg.Connection[Any]:
        """It may be another server than before, and that one behind; StartError."""
        connection = unhurried(self._address, self._name)
        ((head,),) = _fetch(connection, HEAD_POSITION, None)
        if head < self._head:
            connection.close()
            raise StartError(f"the log ends at position {head} now; before, at {self._head}")
        return connection


def _at_one_moment(connection: psycopg.Connection[Any], read: Callable[[Snapshot], T]) -> T:
    connection.execute(BEGIN)
    try:
        return read(Snapshot(connection))
    finally:
        with suppress(psycopg.OperationalError):  # what it failed for is told
            connection.rollback()


def windows(source: Source, last: int, size: int) -> Iterator[tuple[int, int]]:
    """The first and last positions of the parts, in order, that the log up to `last` consists of.
    Wide gaps, which only damage leaves, are left out."""
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
