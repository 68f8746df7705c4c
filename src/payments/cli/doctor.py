"""`payments doctor`: whether everything that the service needs is as it should be."""

import asyncio
import ssl
import sys
from collections.abc import Iterator
from datetime import UTC, datetime
from typing import Any, Literal, NamedTuple
from urllib.parse import urlsplit

import click
import psycopg

from payments.callbacks.endpoint import check_target, origin
from payments.cli.output import one_line
from payments.cli.processes import begin, with_database
from payments.database import Database, DatabaseAddress, connect, reason_of
from payments.errors import DatabaseUnavailable, StartError
from payments.events.losses import log_id, open_loss
from payments.migrations import schema_of
from payments.queries.callbacks import backlog
from payments.queries.followers import follower_states, unsettled_payments
from payments.queries.server import (
    UNSAFE_MEANS,
    Role,
    Server,
    role_of,
    server_state,
    unsafe_settings,
)
from payments.queries.verification import newest_head
from payments.service import build_gateway, open_database
from payments.session import settings_in_force
from payments.settings import Settings

POSTGRES_MIN = 15
# docs/security.md
ROLES: dict[Role, str] = {
    "owner": "this role owns the log, and may alter it; docs/security.md has a stricter set-up",
    "inserts": "this role may insert into the log; docs/security.md has a stricter set-up",
    "appends": "only the append function may write to the log",
    "reads": "this role may only read the log",
}
SKEW_MAX_S = 2.0  # deadlines and ages are told by the database's clock, occurred_at by ours
LAG_MAX_S = 30.0  # as the alerts in deploy/prometheus/alerts.yml
PENDING_MAX_S = 120.0
CALLBACK_AGE_MAX_S = 300.0
CONNECT_TIMEOUT_S = 5.0
CERTIFICATE_MIN_DAYS = 14


class Check(NamedTuple):
    """`off`: it is switched off, which is no fault."""

    state: Literal["ok", "off", "FAIL"]
    name: str
    text: str


def _failing(name: str, bad: bool, text: str) -> Check:
    return Check("FAIL" if bad else "ok", name, text)


@click.command()
def doctor() -> None:
    """Check settings, database, followers, seals and callbacks; one line each.

    It only looks. Exit code 0: all is well, or switched off; 1: something is not.
    """
    failed = 0
    for check in _checks():
        click.echo(one_line(f"{check.state:<5} {check.name:<10} {check.text}"))
        failed += check.state == "FAIL"
    sys.exit(1 if failed else 0)


def _checks() -> Iterator[Check]:
    try:
        settings = begin()
        build_gateway(settings)
    except StartError as error:
        yield Check("FAIL", "settings", str(error))
        return
    yield Check("ok", "settings", f"the provider is {settings.gateway}")
    if settings.payments_api_keys:
        clients = {key.client for key in settings.payments_api_keys}
        yield Check("ok", "keys", f"{len(clients)} API clients: {', '.join(sorted(clients))}")
    else:
        yield Check("off", "keys", "whoever reaches the port may charge")
    try:
        with open_database(settings, to="read") as address:
            yield from _database(address)
            yield from with_database(address, _state)
    except StartError as error:
        yield Check("FAIL", "database", str(error))
    except (psycopg.Error, DatabaseUnavailable) as error:
        reason = reason_of(error) if isinstance(error, psycopg.Error) else str(error)
        yield Check("FAIL", "database", reason)
    yield asyncio.run(_callback_target(settings))


def _database(address: DatabaseAddress) -> Iterator[Check]:
    """The server, its schema, which is not behind or it had not been opened, and the session."""
    with connect(address, "payments doctor") as connection:
        version = connection.info.server_version // 10_000
        schema = schema_of(connection)
        text = schema.refusal or "schema up to date"
        if schema.newer and schema.refusal is None:
            text = f"schema newer than this version, which may run on it: {schema.newer[-1]}"
        bad = version < POSTGRES_MIN or schema.refusal is not None
        yield _failing("database", bad, f"Postgres {version}, {text}")
        # Opening the connection has compared them.
        text = ", ".join(f"{name} {value}" for name, value in settings_in_force(connection).items())
        yield Check("ok", "session", f"{text}{_between(connection)}")


def _between(connection: psycopg.Connection[Any]) -> str:
    """A pooler gives out process ids of its own."""
    row = connection.execute("SELECT pg_backend_pid()").fetchone()
    is_direct = row == (connection.info.backend_pid,)
    return "" if is_direct else "; through a pooler, which keeps sessions apart"


async def _server(database: Database) -> list[Check]:
    """What the server is to the service, and whether the log went back."""
    server = await server_state(database)
    skew_s = abs(server.skew_s)
    where = f"{skew_s:.1f} s apart" if skew_s > 0.1 else "together"
    if server.skew_s < 0:
        where += ", the database's is behind"
    elif skew_s > 0.1:
        where += ", the database's is ahead"
    checks = [
        _failing("clock", skew_s > SKEW_MAX_S, f"this machine's and the database's: {where}"),
        _standbys(server),
        _durability(await unsafe_settings(database)),
    ]
    if server.read_only:
        text = "it refuses to write: it is a standby, or read-only"
        checks.append(Check("FAIL", "database", text))
    loss, id = await open_loss(database), await log_id(database)
    text = "its id is missing" if id is None else str(id)
    if server.log_ahead_s:
        text += f": its last event is {server.log_ahead_s:.0f} s ahead of the database's clock"
    if loss is not None:
        text += (
            f": it went back, and lacks up to position {loss.lost_position} what it had "
            f"acknowledged (found by {loss.found_by}): `payments log accept-loss`"
        )
    bad = id is None or loss is not None or server.log_ahead_s > SKEW_MAX_S
    checks.append(_failing("log", bad, text))
    checks.append(Check("ok", "role", ROLES[await role_of(database)]))
    return checks


def _standbys(server: Server) -> Check:
    """Of the database."""
    if server.synchronous + server.asynchronous == 0:
        return Check("off", "standbys", "none: a failover needs one, or a backup")
    text = f"{server.synchronous} synchronous, {server.asynchronous} asynchronous"
    if server.may_lose:
        text += ": a failover may lose what was answered; set synchronous_standby_names"
    return _failing("standbys", server.may_lose, text)


def _durability(unsafe: list[str]) -> Check:
    """Of what the server has committed."""
    if not unsafe:
        return Check("ok", "durability", "fsync and full_page_writes are on")
    return Check("FAIL", "durability", f"off: {' and '.join(unsafe)}; {UNSAFE_MEANS}")


async def _state(database: Database) -> list[Check]:
    checks = await _server(database)
    for follower in await follower_states(database):
        text = f"{follower.name}: {follower.lag_events} events behind"
        if follower.lag_events:
            text += f", {follower.lag_s:.0f} s"
        if follower.parked_streams:
            text += f", {follower.parked_streams} payments parked: `payments parked list`"
        bad = follower.lag_s > LAG_MAX_S or follower.parked_streams > 0
        checks.append(_failing("follower", bad, text))
    head = await newest_head(database)
    sealed = "nothing is sealed yet" if head is None else f"sealed up to position {head.position}"
    checks.append(Check("ok", "seals", f"{sealed}; `payments audit verify` checks them"))
    pending = {row.kind: row for row in await unsettled_payments(database)}.get("charge")
    text = "none is PENDING"
    if pending is not None:
        text = f"{pending.payments} PENDING, the oldest for {pending.oldest_age_s:.0f} s"
    late = pending is not None and pending.oldest_age_s > PENDING_MAX_S
    checks.append(_failing("payments", late, text))
    owed = await backlog(database)
    text = f"{owed.due} due, {owed.dead} dead"
    if owed.due:
        text += f", the oldest for {owed.oldest_age_s:.0f} s"
    bad = owed.dead > 0 or owed.oldest_age_s > CALLBACK_AGE_MAX_S
    checks.append(_failing("callbacks", bad, text))
    return checks


async def _callback_target(settings: Settings) -> Check:
    """Whether Order Service can be connected to; nothing is sent."""
    url = settings.order_callback_url
    if url is None:
        return Check("off", "endpoint", "nobody is called back: ORDER_CALLBACK_URL is not set")
    parts = urlsplit(url)
    context = ssl.create_default_context() if parts.scheme == "https" else None
    port = parts.port or (443 if context else 80)
    try:
        if (warning := await check_target(url)) is not None:
            return Check("FAIL", "endpoint", warning)
        async with asyncio.timeout(CONNECT_TIMEOUT_S):
            _, writer = await asyncio.open_connection(parts.hostname, port, ssl=context)
    except StartError as error:
        return Check("FAIL", "endpoint", str(error))
    except TimeoutError:
        return Check("FAIL", "endpoint", f"{origin(url)} does not answer")
    except ssl.SSLCertVerificationError as error:
        return Check("FAIL", "endpoint", f"{origin(url)}: {error.verify_message}")
    except OSError as error:
        reason = error.strerror or str(error)
        return Check("FAIL", "endpoint", f"{origin(url)} cannot be reached: {reason}")
    certificate = writer.get_extra_info("peercert")
    writer.transport.abort()
    signed = "signed" if settings.order_callback_secret else "not signed"
    text = f"{origin(url)} can be reached; callbacks are {signed}"
    if certificate:
        ends = datetime.fromtimestamp(ssl.cert_time_to_seconds(certificate["notAfter"]), UTC)
        days = (ends - datetime.now(UTC)).days
        text += f"; its certificate ends in {days} days"
        return _failing("endpoint", days < CERTIFICATE_MIN_DAYS, text)
    return Check("ok", "endpoint", text)
