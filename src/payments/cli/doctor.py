"""`payments doctor`: checks everything that the service needs."""

import asyncio
import ssl
import sys
from collections.abc import Iterator
from datetime import UTC, datetime
from typing import Any

import click
import psycopg

from payments.cli.checks import Check, failing, server_checks
from payments.cli.exits import FINDINGS, one_is_a_finding
from payments.cli.orders_check import orders_check
from payments.cli.output import one_line
from payments.cli.provider_checks import gateway_checks
from payments.cli.start import begin, with_database
from payments.cli.work_checks import brake_check, work_checks
from payments.database.connections import Database, DatabaseAddress, connect, reason_of
from payments.database.session import settings_in_force
from payments.errors import DatabaseUnavailable, StartError
from payments.gateways import Gateway
from payments.gateways.building import build_gateways
from payments.gateways.chosen import Gateways
from payments.http_url import HttpUrl
from payments.migrations import schema_of, shape
from payments.opening import open_database
from payments.order_service.target import Target, check_target
from payments.settings import Settings

POSTGRES_MIN = 15
CONNECT_TIMEOUT_S = 5.0
CERTIFICATE_MIN_DAYS = 14


@click.command()
def doctor() -> None:
    """Check settings, database, followers, unsettled payments, callbacks and providers.

    One line each. The checks include every alert that the database alone can show. Nothing is
    changed. Exit code 0: all is ok, or switched off; 1: a check failed; 2: the checks could not
    run.
    """
    one_is_a_finding()
    failed = 0
    for check in _checks():
        click.echo(one_line(f"{check.state:<5} {check.name:<10} {check.text}"))
        failed += check.state == "FAIL"
    sys.exit(FINDINGS if failed else 0)


def _checks() -> Iterator[Check]:
    try:
        settings = begin()
        built = build_gateways(settings, to="look")
        gateways = Gateways(built, dict(settings.gateway_by_currency))
    except StartError as error:
        yield Check(state="FAIL", name="settings", text=str(error))
        return
    names = [gateway.name for gateway in gateways]
    yield Check(
        state="ok", name="settings", text=f"new payments go to {_chosen(gateways, settings)}"
    )
    if settings.payments_api_keys:
        clients = {key.client for key in settings.payments_api_keys}
        yield Check(
            state="ok",
            name="keys",
            text=f"{len(clients)} API clients: {', '.join(sorted(clients))}",
        )
    else:
        text = "every client that reaches the port can charge: `payments keys new NAME`"
        yield Check(state="off", name="keys", text=text)
    try:
        with open_database(settings, to="read") as address:
            yield from _database(address)

            async def look(database: Database) -> list[Check]:
                calls_back = settings.order_callback_url is not None
                asks = settings.order_status_url is not None
                return [
                    *await server_checks(database),
                    *await work_checks(database, names, calls_back=calls_back),
                    await brake_check(database, gives_back=settings.unfulfilled == "refund"),
                    await orders_check(database, calls_back=calls_back, asks=asks),
                ]

            yield from with_database(address, look)
    except (StartError, psycopg.Error, DatabaseUnavailable) as error:
        reason = reason_of(error) if isinstance(error, psycopg.Error) else str(error)
        yield Check(
            state="FAIL",
            name="database",
            text=f"{reason}; `payments settings` shows which database it is",
        )
    yield from asyncio.run(gateway_checks(built))
    yield _callback_target(Target.of_callbacks(settings))


def _chosen(gateways: Gateways[Gateway], settings: Settings) -> str:
    default = next(iter(gateways)).name
    others = [f"{name} ({currency})" for currency, name in settings.gateway_by_currency]
    return ", ".join([default, *others])


def _database(address: DatabaseAddress) -> Iterator[Check]:
    """Checks the server, its schema, which open_database has found up to date, and the session."""
    with connect(address, "payments doctor") as connection:
        version = connection.info.server_version // 10_000
        schema = schema_of(connection)
        text = schema.refusal or "schema up to date"
        if version < POSTGRES_MIN:
            text += f"; {POSTGRES_MIN} or newer is needed: docs/backup.md"
        if schema.newer and schema.refusal is None:
            text = f"schema newer than this version, but compatible with it: {schema.newer[-1]}"
        changed = shape.lost(connection)
        if changed:
            text += f"; another program changed the table payments ({', '.join(changed)}): "
            text += "`payments migrate`, then `payments rebuild`"
        bad = version < POSTGRES_MIN or schema.refusal is not None or bool(changed)
        yield failing("database", bad, f"Postgres {version}, {text}")
        # They were verified when the connection was opened.
        text = ", ".join(f"{name} {value}" for name, value in settings_in_force(connection).items())
        yield Check(state="ok", name="session", text=f"{text}{_between(connection)}")


def _between(connection: psycopg.Connection[Any]) -> str:
    """Detects a pooler, which reports its own process ids."""
    row = connection.execute("SELECT pg_backend_pid()").fetchone()
    is_direct = row == (connection.info.backend_pid,)
    return "" if is_direct else "; through a pooler, which keeps sessions apart"


def _callback_target(target: Target | None) -> Check:
    """Checks whether Order Service accepts connections; sends nothing."""
    if target is None:
        return Check(
            state="off",
            name="endpoint",
            text="no callbacks are sent: ORDER_CALLBACK_URL is not set",
        )
    origin = target.url.origin
    try:
        warning = asyncio.run(check_target(target))
        if warning is not None:
            return _cannot_be_called(warning, origin)
        certificate = asyncio.run(_certificate(target.url))
    except StartError as error:
        return _cannot_be_called(str(error), origin)
    except TimeoutError:
        return _cannot_be_called(f"{origin} does not respond", origin)
    except ssl.SSLCertVerificationError as error:
        return _cannot_be_called(f"{origin}: {error.verify_message}", origin)
    except OSError as error:
        reason = error.strerror or str(error)
        return _cannot_be_called(f"{origin} is unreachable: {reason}", origin)
    text = f"{origin} is reachable; callbacks are {target.signed}"
    if certificate:
        ends = datetime.fromtimestamp(ssl.cert_time_to_seconds(certificate["notAfter"]), UTC)
        days = (ends - datetime.now(UTC)).days
        text += f"; its certificate expires in {days} days"
        if days < CERTIFICATE_MIN_DAYS:
            return _cannot_be_called(text, origin)
    return Check(state="ok", name="endpoint", text=text)


def _cannot_be_called(text: str, origin: str) -> Check:
    """Cannot be called now, or soon."""
    return Check(state="FAIL", name="endpoint", text=f"{text}: `curl -v {origin}`")


async def _certificate(url: HttpUrl) -> Any:
    """Connects, and returns the server's certificate, None for plain http."""
    context = ssl.create_default_context() if url.scheme == "https" else None
    async with asyncio.timeout(CONNECT_TIMEOUT_S):
        _, writer = await asyncio.open_connection(url.host, url.port, ssl=context)
    certificate = writer.get_extra_info("peercert")
    writer.transport.abort()
    return certificate
