"""Connections to Postgres: how they are opened, pooled and given up.

Postgres 15 or newer, direct or through a session-mode pooler. Every connection is set up as
session.py says before anybody gets it. TLS is libpq's: set PGSSLMODE and PGSSLROOTCERT.
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

CONNECT_TIMEOUT_S = 2  # libpq takes no less, and a healthy server answers in milliseconds
POOLER_TIMEOUT_S = 5.0  # a pooler lets a connection wait while all of its own are taken
RESOLVE_TIMEOUT_S = 2.0  # for the name of the host; the C library itself takes 10 s and more
QUERY_TIMEOUT_S = 1.5  # with the wait for a connection, a request gets its 503 in under 3 s
POOL_WAIT_S = 1.0
SILENCE_S = 1.0  # without an answer for so long a connection was cut off, and others may have been
READ_TIMEOUT_S = POOL_WAIT_S + QUERY_TIMEOUT_S
# A connection's prepared statements are not those of its session: a pooler gave it another one.
OTHER_SESSION = (
    psycopg.errors.InvalidSqlStatementName,
    psycopg.errors.DuplicatePreparedStatement,
)
# A standby cancels, or cuts off, who sees rows that the primary has removed since; if told to wait
# for nobody, whoever reads at that moment.
CONFLICTS = (psycopg.errors.SerializationFailure, psycopg.errors.DeadlockDetected)
CONFLICT_PAUSE_S = 0.1
CONFLICT_FOR_S = 30.0

DATABASE_EXISTS = "SELECT FROM pg_database WHERE datname = %s"

T = TypeVar("T")


class DatabaseAddress(msgspec.Struct, frozen=True, kw_only=True):
    """Where the database is and who we are there. `host` is a name or a socket directory."""

    host: str
    port: int
    user: str
    password: str | None
    dbname: str

    @classmethod
    def from_settings(cls, settings: Settings) -> "DatabaseAddress":
        """The outside database that the settings name."""
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
        """What libpq connects with; it holds the password."""
        return make_conninfo(
            host=self.host,
            hostaddr="",  # what PGHOSTADDR holds would be connected to instead
            port=self.port,
            user=self.user,
            password=self.password,
            dbname=self.dbname,
            application_name=application_name,
            client_encoding="UTF8",
            connect_timeout=CONNECT_TIMEOUT_S,
            # A peer that vanished without a word is noticed by the kernel: 3 s after something was
            # sent, or while only an answer is waited for, after 7 s (Linux would take 2 hours).
            tcp_user_timeout=3000,
            keepalives_idle=5,
            keepalives_interval=2,
            options="",  # nor what PGOPTIONS holds: a pooler refuses it
            # Of several hosts only one takes events.
            target_session_attrs="read-write" if "," in self.host else None,
        )


def connect(address: DatabaseAddress, application_name: str) -> psycopg.Connection[Any]:
    """A blocking connection for start-up and the CLI; StartError says in one line why not."""
    return again_on_conflict(lambda: _connect(address, application_name))[0]


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


def refuse_pooling(address: DatabaseAddress) -> None:
    """StartError unless two connections that are open at once have each its own session."""
    with ExitStack() as opened:
        both = []
        for _ in range(2):
            both.append(_connect(address, "payments start"))
            opened.callback(both[-1][0].close)
        try:
            # Twice in a row each: a pooler may take its sessions in turn.
            for connection, mark in (both[0], both[0], both[1], both[1], both[0]):
                session.check(_ask(connection, session.LOOK), mark)
        except psycopg.Error as error:
            raise _unfit(address, error) from None


def set_up(connection: psycopg.Connection[Any]) -> str:
    """Sets a new session up, and looks whether it holds; its mark. Otherwise the connection is
    closed; raises psycopg.Error."""
    try:
        mark = session.mark_of_new(_ask(connection, session.SET_UP))
        session.check(_ask(connection, session.LOOK), mark)
    except BaseException:
        connection.close()
        raise
    return mark


def _connect(address: DatabaseAddress, name: str) -> tuple[psycopg.Connection[Any], str]:
    """With the mark of its session."""
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
    """The one row of a query, within POOLER_TIMEOUT_S; psycopg.Error."""
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
            f"no answer for {POOLER_TIMEOUT_S:.0f} s; has the pooler a connection free?"
        ) from error
    finally:
        timer.cancel()
    return tuple(row)


def _unfit(address: DatabaseAddress, error: psycopg.Error) -> StartError:
    return StartError(f"cannot work with Postgres as {address!r}: {reason_of(error)}")


def reason_of(error: psycopg.Error) -> str:
    """The server's or libpq's own words, on one line; they never hold the password."""
    lines = (error.diag.message_primary or str(error)).strip().splitlines()
    # libpq: `connection failed: connection to server at … failed: REASON`, then a hint.
    return lines[0].rpartition(" failed: ")[2] if lines else type(error).__name__


def create_database_if_missing(address: DatabaseAddress) -> None:
    """For the embedded server, where nobody else would create it."""
    maintenance = msgspec.structs.replace(address, dbname="postgres")
    statement = SQL("CREATE DATABASE {}").format(Identifier(address.dbname))
    with connect(maintenance, "payments create database") as connection:
        if connection.execute(DATABASE_EXISTS, [address.dbname]).rowcount:
            return  # a server that is read-only would refuse
        connection.execute("SET statement_timeout = '60s'")  # it copies the template's files
        try:
            connection.execute(statement)
        except (psycopg.errors.DuplicateDatabase, psycopg.errors.UniqueViolation):
            pass
        except psycopg.Error as error:
            raise StartError(f"cannot create {address.dbname}: {reason_of(error)}") from None


def cut(connection: psycopg.Connection[Any] | psycopg.AsyncConnection[Any]) -> None:
    """Ends a connection whose server may be frozen.

    Closing it would ask the server first, and cancelling a query opens another connection to it.
    Shutting the socket down makes whoever waits on it see an end at once.
    """
    with suppress(OSError, psycopg.OperationalError):
        borrowed = socket.socket(fileno=connection.fileno())
        try:
            borrowed.shutdown(socket.SHUT_RDWR)
        finally:
            borrowed.detach()  # the descriptor stays libpq's


async def _resolve(host: str) -> list[str]:
    """The addresses of a host name, within RESOLVE_TIMEOUT_S; OperationalError."""
    try:
        return await addresses_of(host, RESOLVE_TIMEOUT_S)
    except TimeoutError:
        raise psycopg.errors.ConnectionTimeout(f"{host!r} cannot be resolved in time") from None
    except OSError as error:
        raise psycopg.OperationalError(f"cannot resolve {host!r}: {error}") from None


def _is_a_name(host: str) -> bool:
    """Neither a socket directory nor an address."""
    if host.startswith(("/", "@")):
        return False
    try:
        ipaddress.ip_address(host)
    except ValueError:
        return "," not in host  # several hosts are left to psycopg
    return False


def _to_write(conninfo: str) -> str:
    """For a name, which may have the addresses of several servers: only one takes events."""
    return make_conninfo(conninfo, target_session_attrs="read-write")


def _is_read_only(error: psycopg.OperationalError) -> bool:
    """Whether libpq found none of a name's servers that writes, and one that reads."""
    return "session is read-only" in str(error)


class _Connection(psycopg.AsyncConnection[Any]):
    """Its session is set up. Neither connecting nor giving up takes long, whatever the server does.

    Cancelling whoever waits for a query cuts the connection: psycopg would open a second one to
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
        """SessionUnfit unless what was set up holds in another transaction."""
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
        await connection.close()  # else the pool would hand it out again
        raise
    return await cursor.fetchall()


class cut_after:  # noqa: N801 - used like a function
    """Cuts the connection if the body takes longer; what waits on it raises OperationalError."""

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
    """The pool that queries read through. Nothing holds a connection while it waits for anything
    but the database."""

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
            # After an outage the pool must not sleep through an exponential back-off: it gives up
            # soon, and the next request makes it try again.
            reconnect_timeout=2.0,
            num_workers=1,
        )

    async def open(self) -> None:
        await self._pool.open()

    async def close(self) -> None:
        await self._pool.close(timeout=1.0)

    def pool_connections(self) -> dict[str, int]:
        """How many are used, idle, and waited for."""
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
        """All rows of one statement, within `timeout_s` seconds, READ_TIMEOUT_S at the most.

        It may be carried out twice: it only reads, or doing it again is harmless.
        `prepare=False` has each execution planned for its own values; by default a statement that
        comes often keeps its plan. Pooled connections may have died unnoticed, for example in a
        failover: then the next one is tried, until all of them and a new one were. Raises
        DatabaseUnavailable.
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
                    # Those that idle may be as dead, each at the cost of another request.
                    await self._pool.drain()
                late = time.monotonic() > deadline - min(timeout_s / 2, POOL_WAIT_S)
                if late or not tries_left or isinstance(error, PoolTimeout):
                    raise DatabaseUnavailable("The database does not answer.") from error
                tries_left -= not isinstance(error, CONFLICTS)

    async def connect(self, application_name: str) -> psycopg.AsyncConnection[Any]:
        """A connection of one's own, outside the pool, set up in the same way, and checked."""
        conninfo = self.address.conninfo(application_name)
        connection = await _Connection.connect(conninfo, autocommit=True)
        await connection.check_session()
        return connection
