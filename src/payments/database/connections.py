"""Connections to Postgres: opens, pools and cuts them.

Postgres 15 or newer, direct or through a session-mode pooler. session.py sets up every connection
before it is used. TLS is libpq's: set PGSSLMODE and PGSSLROOTCERT.
"""

import asyncio
import ipaddress
import socket
import threading
import time
from collections.abc import AsyncIterator, Callable, Mapping, Sequence
from contextlib import ExitStack, asynccontextmanager, suppress
from typing import Any, Self, TypeVar

import msgspec
import psycopg
from psycopg.conninfo import conninfo_to_dict, make_conninfo
from psycopg.rows import tuple_row
from psycopg.sql import SQL, Identifier
from psycopg_pool import AsyncConnectionPool, PoolTimeout

from payments.database import session
from payments.database.resolving import addresses_of
from payments.errors import DatabaseUnavailable, StartError
from payments.observability.logs import Repeats
from payments.settings import Settings

CONNECT_TIMEOUT_S = 2  # libpq's minimum; a healthy server responds in milliseconds
POOLER_TIMEOUT_S = 5.0  # a pooler makes a client wait while all its server connections are used
RESOLVE_TIMEOUT_S = 2.0  # for the host name; the C library's own timeout is 10 s and more
QUERY_TIMEOUT_S = 1.5  # with the wait for a connection, a request gets its 503 in under 3 s
POOL_WAIT_S = 1.0
SILENCE_S = 1.0  # a connection without a response for so long is dead, and others may be too
READ_TIMEOUT_S = POOL_WAIT_S + QUERY_TIMEOUT_S
# The session lacks the connection's prepared statements: a pooler has switched sessions.
OTHER_SESSION = (
    psycopg.errors.InvalidSqlStatementName,
    psycopg.errors.DuplicatePreparedStatement,
)
# A standby cancels or disconnects queries that need rows which the primary has removed since; with
# a delay of 0 any query at that moment.
CONFLICTS = (psycopg.errors.SerializationFailure, psycopg.errors.DeadlockDetected)
CONFLICT_PAUSE_S = 0.1
CONFLICT_FOR_S = 30.0

DATABASE_EXISTS = "SELECT FROM pg_database WHERE datname = %s"

T = TypeVar("T")


class DatabaseAddress(msgspec.Struct, frozen=True, kw_only=True):
    """Address and credentials of the database. `host` is a name or a socket directory."""

    host: str
    port: int
    user: str
    password: str | None
    dbname: str

    @classmethod
    def from_settings(cls, settings: Settings) -> "DatabaseAddress":
        """The external database of the settings."""
        if settings.database_host is None:
            raise ValueError("DATABASE_HOST is not set")
        return cls(
            host=settings.database_host,
            port=settings.database_port,
            user=settings.database_username,
            password=settings.database_password,
            dbname=settings.database_name,
        )

    def __repr__(self) -> str:
        return f"{self.user}@{self.host}:{self.port}/{self.dbname}"

    def conninfo(self, application_name: str = "payments") -> str:
        """The connection string for libpq, including the password."""
        return make_conninfo(
            host=self.host,
            hostaddr="",  # else PGHOSTADDR would replace the host
            port=self.port,
            user=self.user,
            password=self.password,
            dbname=self.dbname,
            application_name=application_name,
            client_encoding="UTF8",
            connect_timeout=CONNECT_TIMEOUT_S,
            # The kernel detects a dead peer: 3 s after data was sent, or 7 s while only a response
            # is awaited (by default Linux takes 2 hours).
            tcp_user_timeout=3000,
            keepalives_idle=5,
            keepalives_interval=2,
            options="",  # else PGOPTIONS would be sent, which a pooler rejects
            # Of several hosts only one is writable.
            target_session_attrs="read-write" if "," in self.host else None,
        )


def connect(address: DatabaseAddress, application_name: str) -> psycopg.Connection[Any]:
    """A blocking connection for start-up and the CLI; raises StartError with the reason in one
    line."""
    return again_on_conflict(lambda: _connect(address, application_name))[0]


def again_on_conflict(read: Callable[[], T]) -> T:
    """Retries `read` while a standby cancels it, for CONFLICT_FOR_S."""
    give_up_at = time.monotonic() + CONFLICT_FOR_S
    while True:
        try:
            return read()
        except CONFLICTS:
            if time.monotonic() > give_up_at:
                raise
            time.sleep(CONFLICT_PAUSE_S)


def refuse_pooling(address: DatabaseAddress) -> None:
    """Raises StartError unless two concurrent connections each have their own session."""
    with ExitStack() as opened:
        both = []
        for _ in range(2):
            both.append(_connect(address, "payments start"))
            opened.callback(both[-1][0].close)
        try:
            # Twice in a row each: a pooler may rotate its sessions.
            for connection, mark in (both[0], both[0], both[1], both[1], both[0]):
                session.check(_ask(connection, session.LOOK), mark)
        except psycopg.Error as error:
            raise _unfit(address, error) from None


def set_up(connection: psycopg.Connection[Any]) -> str:
    """Sets up a new session and verifies it; returns its mark. On failure closes the connection and
    raises psycopg.Error."""
    try:
        mark = session.mark_of_new(_ask(connection, session.SET_UP))
        session.check(_ask(connection, session.LOOK), mark)
    except BaseException:
        connection.close()
        raise
    return mark


def _connect(address: DatabaseAddress, name: str) -> tuple[psycopg.Connection[Any], str]:
    """A connection, with the mark of its session."""
    conninfo = address.conninfo(name)
    try:
        try:
            wanted = _to_write(conninfo) if _is_a_name(address.host) else conninfo
            connection = psycopg.connect(wanted, autocommit=True)
        except psycopg.OperationalError as error:
            if wanted == conninfo or not _is_read_only(error):
                raise
            connection = psycopg.connect(conninfo, autocommit=True)
    except psycopg.OperationalError as error:
        raise StartError(f"cannot connect to Postgres as {address!r}: {reason_of(error)}") from None
    try:
        return connection, set_up(connection)
    except CONFLICTS:
        raise
    except psycopg.Error as error:
        raise _unfit(address, error) from None


def _ask(connection: psycopg.Connection[Any], query: str) -> tuple[Any, ...]:
    """The one row of a query, within POOLER_TIMEOUT_S; raises psycopg.Error."""
    began = time.monotonic()
    timer = threading.Timer(POOLER_TIMEOUT_S, cut, [connection])
    timer.start()
    try:
        with connection.cursor(row_factory=tuple_row) as cursor:
            ((*row,),) = cursor.execute(query.encode(), prepare=False).fetchall()
    except psycopg.OperationalError as error:
        if time.monotonic() - began < POOLER_TIMEOUT_S:
            raise
        raise psycopg.errors.ConnectionTimeout(
            f"no response for {POOLER_TIMEOUT_S:.0f} s; does the pooler have a free connection?"
        ) from error
    finally:
        timer.cancel()
    return tuple(row)


def _unfit(address: DatabaseAddress, error: psycopg.Error) -> StartError:
    return StartError(f"cannot work with Postgres as {address!r}: {reason_of(error)}")


def reason_of(error: psycopg.Error) -> str:
    """The message of the server or libpq, on one line; it never contains the password."""
    lines = (error.diag.message_primary or str(error)).strip().splitlines()
    # libpq: `connection failed: connection to server at … failed: REASON`, then a hint.
    return lines[0].rpartition(" failed: ")[2] if lines else type(error).__name__


def create_database_if_missing(address: DatabaseAddress) -> None:
    """For the embedded server, whose database the service must create."""
    maintenance = msgspec.structs.replace(address, dbname="postgres")
    statement = SQL("CREATE DATABASE {}").format(Identifier(address.dbname))
    with connect(maintenance, "payments create database") as connection:
        if connection.execute(DATABASE_EXISTS, [address.dbname]).rowcount:
            return  # a read-only server would refuse CREATE DATABASE
        connection.execute("SET statement_timeout = '60s'")  # it copies the template's files
        try:
            connection.execute(statement)
        except (psycopg.errors.DuplicateDatabase, psycopg.errors.UniqueViolation):
            pass
        except psycopg.Error as error:
            raise StartError(f"cannot create {address.dbname}: {reason_of(error)}") from None


def cut(connection: psycopg.Connection[Any] | psycopg.AsyncConnection[Any]) -> None:
    """Ends a connection whose server may be frozen.

    Closing it would contact the server first, and cancelling a query opens another connection to
    it. After a shutdown of the socket, waiting readers see its end at once.
    """
    with suppress(OSError, psycopg.OperationalError):
        borrowed = socket.socket(fileno=connection.fileno())
        try:
            borrowed.shutdown(socket.SHUT_RDWR)
        finally:
            borrowed.detach()  # the descriptor stays libpq's


async def _resolve(host: str) -> list[str]:
    """The addresses of a host name, within RESOLVE_TIMEOUT_S; raises OperationalError."""
    try:
        return await addresses_of(host, RESOLVE_TIMEOUT_S)
    except TimeoutError:
        raise psycopg.errors.ConnectionTimeout(f"{host!r} cannot be resolved in time") from None
    except OSError as error:
        raise psycopg.OperationalError(f"cannot resolve {host!r}: {error}") from None


def _is_a_name(host: str) -> bool:
    """Whether it is a host name: neither a socket directory nor an address."""
    if host.startswith(("/", "@")):
        return False
    try:
        ipaddress.ip_address(host)
    except ValueError:
        return "," not in host  # psycopg handles several hosts
    return False


def _to_write(conninfo: str) -> str:
    """Asks for a writable server: a name may have the addresses of several, of which one is."""
    return make_conninfo(conninfo, target_session_attrs="read-write")


def _is_read_only(error: psycopg.OperationalError) -> bool:
    """Whether libpq found only read-only servers."""
    return "session is read-only" in str(error)


class _Connection(psycopg.AsyncConnection[Any]):
    """A connection with a session that is set up. Connecting and closing take bounded time, even
    with a frozen server.

    Cancelling a task that waits for a query cuts the connection: psycopg would open a second one to
    cancel the query, and wait up to 10 s for a server that may be frozen.
    """

    _mark: str  # of the session
    _repeats = Repeats()  # of all connections

    @classmethod
    async def connect(cls, conninfo: str = "", **options: Any) -> Self:
        host = str(conninfo_to_dict(conninfo).get("host", ""))
        if _is_a_name(host):
            addresses = await _resolve(host)
            hosts = ",".join([host] * len(addresses))  # TLS checks the name
            there = make_conninfo(conninfo, host=hosts, hostaddr=",".join(addresses))
            try:
                connection = await super().connect(_to_write(there), **options)
            except psycopg.OperationalError as error:
                if not _is_read_only(error):
                    raise
                connection = await super().connect(there, **options)
        else:
            connection = await super().connect(conninfo, **options)
        async with connection._closed_if_unfit():
            connection._mark = session.mark_of_new(await connection._ask(session.SET_UP))
        return connection

    async def check_session(self) -> None:
        """Raises SessionUnfit unless the settings hold in another transaction."""
        async with self._closed_if_unfit():
            session.check(await self._ask(session.LOOK), self._mark)

    @asynccontextmanager
    async def _closed_if_unfit(self) -> AsyncIterator[None]:
        try:
            yield
        except BaseException as error:
            if isinstance(error, session.SessionUnfit):
                message = "a database session cannot be used"
                self._repeats.tell("ERROR", message, reason=str(error))
            await self.close()
            raise

    async def _ask(self, query: str) -> tuple[Any, ...]:
        with cut_after(self, CONNECT_TIMEOUT_S):
            cursor = await self.execute(query.encode(), prepare=False)
            ((*row,),) = await cursor.fetchall()
        return tuple(row)

    async def _try_cancel(self, *, timeout: float = 5.0) -> None:  # noqa: ASYNC109 - psycopg's
        cut(self)


async def _fetch(
    connection: psycopg.AsyncConnection[Any],
    query: str,
    params: Sequence[Any] | Mapping[str, Any],
    prepare: bool | None,
) -> list[tuple[Any, ...]]:
    cursor = connection.cursor(binary=True)
    try:
        await cursor.execute(query.encode(), params, prepare=prepare)
    except OTHER_SESSION:
        await connection.close()  # else the pool would reuse it
        raise
    return await cursor.fetchall()


class cut_after:  # noqa: N801 - used like a function
    """Cuts the connection if the body takes longer; queries on it raise OperationalError."""

    def __init__(self, connection: psycopg.AsyncConnection[Any], timeout_s: float) -> None:
        self._connection = connection
        self._timer = asyncio.get_running_loop().call_later(timeout_s, self._cut)
        self.has_cut = False

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self._timer.cancel()

    def _cut(self) -> None:
        self.has_cut = True
        cut(self._connection)


class Database:
    """The pool that queries read through. No connection is held while waiting for anything but the
    database."""

    def __init__(self, address: DatabaseAddress, pool_max: int) -> None:
        self.address = address
        self._pool = AsyncConnectionPool(
            address.conninfo(),
            connection_class=_Connection,
            kwargs={"autocommit": True},
            min_size=1,
            max_size=pool_max,
            open=False,
            timeout=POOL_WAIT_S,
            # After an outage the pool must not sleep in an exponential back-off: it stops
            # reconnecting soon, and the next request makes it start again.
            reconnect_timeout=2.0,
            num_workers=1,
        )

    async def __aenter__(self) -> Self:
        await self.open()
        return self

    async def __aexit__(self, *_: object) -> None:
        await self.close()

    async def open(self) -> None:
        """Must be closed: a pool that stays open can keep its event loop from ending."""
        await self._pool.open()

    async def close(self) -> None:
        await self._pool.close(timeout=1.0)

    def pool_connections(self) -> dict[str, int]:
        """The numbers of used and idle connections, and of requests that wait for one."""
        stats = self._pool.get_stats()
        idle = stats.get("pool_available", 0)
        return {
            "used": stats.get("pool_size", 0) - idle,
            "idle": idle,
            "waited_for": stats.get("requests_waiting", 0),
        }

    async def fetch(
        self,
        query: str,
        params: Sequence[Any] | Mapping[str, Any] = (),
        *,
        timeout_s: float = READ_TIMEOUT_S,
        prepare: bool | None = None,
    ) -> list[tuple[Any, ...]]:
        """All rows of one statement, within `timeout_s` seconds, at most READ_TIMEOUT_S.

        It may be executed twice, so it must only read or be repeatable. With `prepare=False` each
        execution is planned for its own values; by default a frequent statement keeps its plan.
        Pooled connections may have died unnoticed, for example in a failover: then the next one is
        tried, up to all of them and a new one. Raises DatabaseUnavailable.
        """
        deadline = time.monotonic() + min(timeout_s, READ_TIMEOUT_S)

        def left_s() -> float:
            return max(0.01, deadline - time.monotonic())

        tries_left = self._pool.max_size
        while True:
            cutting = None
            try:
                wait_s = min(left_s(), POOL_WAIT_S)
                async with self._pool.connection(timeout=wait_s) as connection:
                    limit_s = min(left_s(), QUERY_TIMEOUT_S)
                    with cut_after(connection, limit_s) as cutting:
                        return await _fetch(connection, query, params, prepare)
            except (psycopg.OperationalError, psycopg.InterfaceError, *OTHER_SESSION) as error:
                if cutting is not None and cutting.has_cut and limit_s >= SILENCE_S:
                    # Idle connections may be dead too, and each would cost another request.
                    await self._pool.drain()
                late = time.monotonic() > deadline - min(timeout_s / 2, POOL_WAIT_S)
                if late or not tries_left or isinstance(error, PoolTimeout):
                    raise DatabaseUnavailable("The database does not respond.") from error
                tries_left -= not isinstance(error, CONFLICTS)

    async def connect(self, application_name: str) -> psycopg.AsyncConnection[Any]:
        """A connection outside the pool, set up in the same way, and checked."""
        conninfo = self.address.conninfo(application_name)
        connection = await _Connection.connect(conninfo, autocommit=True)
        await connection.check_session()
        return connection
