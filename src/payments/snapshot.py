"""Reading much of the database, for exports, audits and rebuilds, and holding nothing for long.

What a transaction or a cursor may still look at, no vacuum removes, from any table. So what is much
is read in many short statements, each to its end: between two of them nothing is held, however long
whoever reads is paused. docs/decisions/exports.md says why nothing else is needed.

Blocking, on connections of its own: it is used by commands, never while requests are served.
"""

import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from types import TracebackType
from typing import Any, Protocol, Self, TypeVar

import psycopg

from payments.database import DatabaseAddress, connect, cut
from payments.events.store import READ_NEXT_PLACE

T = TypeVar("T")
Rows = list[tuple[Any, ...]]

# A read of everything takes as long as it takes, and may sort or scan where requests may not. A
# plan for any values would not know which of them are given. A server that cannot reach its client
# any more ends what it does for it.
UNHURRIED = """
SET statement_timeout = 0;
SET enable_seqscan = on;
SET plan_cache_mode = force_custom_plan;
SET work_mem = '64MB';
SET client_connection_check_interval = '1s'
"""

BEGIN = """
BEGIN ISOLATION LEVEL REPEATABLE READ READ ONLY
"""

# A standby that falls behind cancels what reads rows which the primary has removed since. It does
# so to what runs for long; a short statement has another try.
CONFLICTS = (psycopg.errors.SerializationFailure, psycopg.errors.DeadlockDetected)
CONFLICT_PAUSE_S = 0.1
CONFLICT_FOR_S = 30.0

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
    """Statements that see the database as it is then, each by itself, on one connection."""

    def __init__(self, address: DatabaseAddress, application_name: str) -> None:
        """StartError."""
        self._connection = unhurried(address, application_name)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, _: TracebackType | None
    ) -> None:
        self.close()

    def close(self) -> None:
        self._connection.close()

    def fetch(self, query: str, params: Mapping[str, Any] | None = None) -> Rows:
        return again_on_conflict(lambda: _fetch(self._connection, query, params))

    def at_one_moment(self, read: Callable[[Snapshot], T]) -> T:
        """What `read` makes of a snapshot; it must not take long, and may be called again."""
        return again_on_conflict(lambda: self._at_one_moment(read))

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
                cut(self._connection)  # or a server that does not answer would be waited for
                raise

    def _at_one_moment(self, read: Callable[[Snapshot], T]) -> T:
        self._connection.execute(BEGIN)
        try:
            return read(Snapshot(self._connection))
        finally:
            if not self._connection.closed:
                self._connection.rollback()


def again_on_conflict(read: Callable[[], T]) -> T:
    """Tries again while a standby cancels it, for CONFLICT_FOR_S."""
    give_up_at = time.monotonic() + CONFLICT_FOR_S
    while True:
        try:
            return read()
        except CONFLICTS:
            if time.monotonic() > give_up_at:
                raise
            time.sleep(CONFLICT_PAUSE_S)


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
    connection: psycopg.Connection[Any], query: str, params: Mapping[str, Any] | None
) -> Rows:
    with connection.cursor(binary=True) as cursor:
        return cursor.execute(query.encode(), params).fetchall()
