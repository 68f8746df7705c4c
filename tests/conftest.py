"""A real Postgres for the tests: one embedded server, one migrated template, a clone per test."""

import itertools
import os
import queue
import signal
import threading
import uuid
from collections.abc import AsyncIterator, Callable, Iterator
from functools import cache
from pathlib import Path
from typing import Any, Literal

import msgspec
import psycopg
import pytest
from _pytest.runner import runtestprotocol
from blockbuster import blockbuster_ctx
from click.testing import CliRunner, Result
from httpx._transports import default
from hypothesis import HealthCheck
from hypothesis import settings as hypothesis_settings
from psycopg.sql import SQL, Identifier

from payments import embedded_postgres, environment
from payments.cli import main
from payments.database.connections import (
    Database,
    DatabaseAddress,
    connect,
    create_database_if_missing,
)
from payments.migrations import migrate
from payments.service import Service
from payments.settings import Settings
from tests.invariants.checker import InvariantBroken
from tests.machine import PAUSE_S, Machine, Pauses, late
from tests.process import at, open_directory

TESTS = Path(__file__).parent
EVERY_DAY_KILLS = 6
PAUSES: pytest.StashKey[Pauses] = pytest.StashKey()
RAN_AGAIN = "ran again"  # a property of such a test, and why

environment.forget(os.environ)  # as the command does: no test connects to what PGHOSTADDR names

# Else each client of a test reads the certificates of all authorities, which takes 30 ms.
default.create_ssl_context = cache(default.create_ssl_context)  # type: ignore[attr-defined]


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--long", action="store_true", help="sizes that take too long for every day")
    parser.addoption(
        "--kills", type=int, default=EVERY_DAY_KILLS, help="cycles of each kill -9 loop"
    )
    parser.addoption("--outcomes", type=int, default=200, help="called back among all faults")
    parser.addoption("--sold", type=int, default=200, help="orders whose seats take their time")
    parser.addoption("--cases", type=int, default=150, help="requests drawn from the schema")
    parser.addoption("--overload-seconds", type=float, help="for each rate; with strict bounds")
    parser.addoption("--outages", type=int, default=3, help="of Postgres, one after another")
    parser.addoption("--mutations", type=int, default=600, help="of requests, byte by byte")
    parser.addoption("--update-openapi", action="store_true", help="rewrite openapi.json")


# How fast examples are drawn and tried is not what a property is about.
hypothesis_settings.register_profile(
    "tests", deadline=None, suppress_health_check=[HealthCheck.too_slow]
)
hypothesis_settings.load_profile("tests")


def pytest_configure(config: pytest.Config) -> None:
    config.stash[PAUSES] = Pauses()
    _take_signals()


def _take_signals() -> None:
    """A shell that starts this in the background has Ctrl-C ignored, and nohup SIGHUP, by all that
    we start too. With a handler of ours they have the default again."""
    if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
        signal.signal(signal.SIGINT, signal.default_int_handler)
    if signal.getsignal(signal.SIGHUP) is signal.SIG_IGN:
        signal.signal(signal.SIGHUP, lambda *_: None)


# What starts processes, or takes seconds for other reasons: how its node ids begin, in this folder.
SLOW = (
    *("callbacks/test_delivery.py", "callbacks/test_endpoint.py"),
    *("callbacks/test_endpoint_responses.py", "callbacks/test_partial_outages.py"),
    *("callbacks/test_ping.py", "callbacks/test_sales.py", "cli/", "crash/", "doubles/", "edge/"),
    *("embedded_postgres/", "events/test_append_function.py", "events/test_append_lock.py"),
    *("events/test_log.py", "fulfilment/test_kills.py", "fulfilment/test_service.py"),
    *("gateways/test_earlier_ledger.py", "gateways/test_http_gateway.py"),
    *("gateways/test_oauth.py", "gateways/test_paypal.py", "gateways/test_paypal_conformance.py"),
    *("gateways/test_accounts.py", "gateways/test_simulated_ledger.py", "legacy/"),
    *("gateways/test_stripe.py", "gateways/test_stripe_client.py"),
    *("gateways/test_stripe_conformance.py", "gateways/test_sandbox_check.py"),
    *("gateways/test_razorpay.py", "gateways/test_razorpay_conformance.py"),
    "gateways/test_razorpay_documented.py",
    *("projections/test_follower.py", "projections/test_followers_crash.py"),
    *("projections/test_rebuild.py", "queries/test_lookups.py", "queries/test_plans.py"),
    *("test_benchmarks.py", "test_database_care.py", "test_docs.py::test_the_client"),
    *("test_docs.py::test_the_receiver", "test_environment.py", "test_following.py"),
    *("test_held.py", "test_logs.py", "test_machine.py::test_what_fails", "test_migrations.py"),
    "test_monitoring.py",
    *("test_session.py", "test_tracing.py", "test_upgrades.py", "web/test_generated_clients.py"),
    "web/test_schemathesis.py",
    # A third of a second or more on average, for each of hundreds.
    *(f"callbacks/test_{name}.py" for name in ("breaker", "clock", "crowds", "dispatcher")),
    *(f"callbacks/test_{name}.py" for name in ("interleavings", "locks", "long_queue", "outages")),
    *(f"callbacks/test_{name}.py" for name in ("may_be_running", "outbox", "paid_again")),
    *(f"commands/test_{name}.py" for name in ("actions", "client_gone", "hints", "settle_behind")),
    "commands/test_telling.py",
    *(f"events/test_{name}.py" for name in ("appender", "library", "watch")),
    *("fulfilment/test_checking.py", "fulfilment/test_suspects.py", "queries/test_replay.py"),
    *("gateways/test_simulated_page.py", "projections/test_payments.py", "test_brake.py"),
    *("projections/test_seals.py", "test_shape.py"),
    *(f"web/test_{name}.py" for name in ("access_log", "actions", "api", "arrivals", "as_of")),
    *(f"web/test_{name}.py" for name in ("callbacks", "clients", "door", "operations")),
    *(f"web/test_{name}.py" for name in ("payments", "provider_webhooks", "refunds")),
    *("web/test_throttle.py", "web/test_unfulfilled.py"),
)


def pytest_ignore_collect(collection_path: Path, config: pytest.Config) -> bool | None:
    """With -m "not slow" they are not even imported: each worker would do it."""
    name = str(collection_path).removeprefix(f"{TESTS}/") + "/" * collection_path.is_dir()
    return (name.startswith(SLOW) and "not slow" in config.getoption("-m")) or None


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """The file that takes longest comes first: else the other workers wait for it in the end."""
    items.sort(key=lambda item: item.path.name != "test_schemathesis.py")
    for item in items:
        if item.nodeid.removeprefix("tests/").startswith(SLOW):
            item.add_marker("slow")


def pytest_runtest_protocol(item: pytest.Item, nextitem: pytest.Item | None) -> object:
    """A test that fails while it is kept from running runs again, once; the summary says so. But
    money that was charged twice is a finding on any machine."""
    pauses = item.config.stash[PAUSES]
    pauses.forget()
    item.ihook.pytest_runtest_logstart(nodeid=item.nodeid, location=item.location)
    reports = runtestprotocol(item, nextitem=nextitem, log=False)
    failed = [report.longreprtext for report in reports if report.failed]
    may_run_again = not item.user_properties and InvariantBroken.__name__ not in "".join(failed)
    if failed and may_run_again and (paused_s := pauses.longest_s()) > PAUSE_S:
        why = f"it failed, and was kept from running for {paused_s:.2f} s"
        item.user_properties.append((RAN_AGAIN, "\n".join([why, *failed])))
        # The whole hook: pytest-timeout counts anew.
        return item.ihook.pytest_runtest_protocol(item=item, nextitem=nextitem)
    for report in reports:
        item.ihook.pytest_runtest_logreport(report=report)
    item.ihook.pytest_runtest_logfinish(nodeid=item.nodeid, location=item.location)
    return True


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter) -> None:
    for report in itertools.chain.from_iterable(terminalreporter.stats.values()):
        for name, why in getattr(report, "user_properties", ()):
            if name == RAN_AGAIN and report.when == "teardown":
                terminalreporter.write_line(f"RAN AGAIN {report.nodeid}: {why}")


@pytest.hookimpl(wrapper=True)
def pytest_runtest_call(item: pytest.Item) -> Iterator[None]:
    """What was late on a busy machine is said once all else was looked at."""
    late.clear()
    yield
    if late:
        pytest.skip(f"all but times was looked at in {item.nodeid}: {'; '.join(late)}")


@pytest.fixture
def machine() -> Machine:
    """Who has the processors during this test, for `bound` of tests.machine."""
    return Machine()


@pytest.fixture(scope="session")
def anyio_backend() -> str:
    return "asyncio"


@pytest.fixture(scope="session")
def long_run(pytestconfig: pytest.Config) -> bool:
    """Whether the long run's sizes are wanted."""
    return bool(pytestconfig.getoption("--long"))


@pytest.fixture(scope="session", autouse=True)
def nothing_blocks_the_event_loop() -> Iterator[None]:
    """A blocking call of ours inside the event loop fails the test that made it.

    Allowed: building things before the first request, reading /proc for the metrics, writing to a
    log that poll(2) says is ready for it, and to the ledger where that waits neither for a lock nor
    for the disk.
    """
    with blockbuster_ctx(["payments", "web"]) as blockbuster:
        for function in blockbuster.functions.values():
            function.can_block_in(
                "payments/observability/metrics.py",
                {"__init__", "exposition", "openmetrics", "documented"},
            )
            function.can_block_in("payments/gateways/simulated.py", {"__init__"})
            function.can_block_in("payments/gateways/simulated_ledger.py", {"_decided_at_once"})
            function.can_block_in("payments/service.py", {"build_dispatcher", "build_order_status"})
            function.can_block_in("payments/observability/logs.py", {"_write_some"})
        yield


@pytest.fixture(scope="session")
def state_dir() -> Iterator[Path]:
    """A directory that the embedded server's user can reach, unlike pytest's own."""
    with open_directory("payments-tests-") as path:
        yield path


@pytest.fixture(scope="session")
def server(state_dir: Path) -> Iterator[DatabaseAddress]:
    """The server's maintenance database."""
    with embedded_postgres.start(state_dir) as running:
        address = DatabaseAddress(
            host=str(running.socket_dir),
            port=running.port,
            user=running.user,
            password=None,
            dbname="postgres",
        )
        _wait_for_the_disk(address, "off")
        yield address
    embedded_postgres.wait_until_stopped(state_dir)


def _wait_for_the_disk(server: DatabaseAddress, whether: Literal["on", "off"]) -> None:
    """A database for each test is made and dropped; nobody misses one after a power cut. Tests that
    kill their server have one of their own."""
    with connect(server, "tests") as connection:
        for name in ("fsync", "full_page_writes"):
            setting = SQL("ALTER SYSTEM SET {} = {}").format(Identifier(name), whether)
            connection.execute(setting)
        connection.execute("SELECT pg_reload_conf()")
        while connection.execute("SHOW full_page_writes").fetchall() != [(whether,)]:
            connection.execute("SELECT pg_sleep(0.01)")


@pytest.fixture
def durable(server: DatabaseAddress) -> Iterator[None]:
    """The server waits for the disk, as `payments doctor` demands of one."""
    _wait_for_the_disk(server, "on")
    yield
    _wait_for_the_disk(server, "off")


@pytest.fixture(scope="session")
def template(server: DatabaseAddress) -> DatabaseAddress:
    address = msgspec.structs.replace(server, dbname="template_payments")
    create_database_if_missing(address)
    migrate(address)
    return address


class Clones:
    """Databases that a thread makes ahead and drops behind: that takes longer than most tests."""

    def __init__(self, server: DatabaseAddress, template: str, ahead: int) -> None:
        self._server = server
        self._template = template
        self._ready: queue.Queue[DatabaseAddress] = queue.Queue()
        # How many to make, or which one to drop; None: the end.
        self._orders: queue.SimpleQueue[int | DatabaseAddress | None] = queue.SimpleQueue()
        self._thread = threading.Thread(target=self._run, name=f"clones of {template}")
        self._thread.start()
        self._orders.put(ahead)

    def take(self) -> DatabaseAddress:
        self._orders.put(1)
        return self._ready.get(timeout=30)

    def drop(self, database: DatabaseAddress) -> None:
        self._orders.put(database)

    def close(self) -> None:
        self._orders.put(None)
        self._thread.join(timeout=30)

    def _run(self) -> None:
        with psycopg.connect(self._server.conninfo("tests"), autocommit=True) as connection:
            connection.execute("SET statement_timeout = '30s'; SET lock_timeout = '30s'")
            while (order := self._orders.get()) is not None:
                if isinstance(order, int):
                    for _ in range(order):
                        self._ready.put(self._make(connection))
                else:
                    name = Identifier(order.dbname)
                    connection.execute(SQL("DROP DATABASE {} WITH (FORCE)").format(name))

    def _make(self, connection: psycopg.Connection[Any]) -> DatabaseAddress:
        made = msgspec.structs.replace(self._server, dbname=f"test_{uuid.uuid4().hex[:12]}")
        statement = SQL("CREATE DATABASE {} TEMPLATE {} STRATEGY file_copy")
        connection.execute(statement.format(Identifier(made.dbname), Identifier(self._template)))
        return made


@pytest.fixture(scope="session")
def clones(server: DatabaseAddress, template: DatabaseAddress) -> Iterator[Clones]:
    made = Clones(server, template.dbname, ahead=2)
    yield made
    made.close()


@pytest.fixture(scope="session")
def empty_clones(server: DatabaseAddress) -> Iterator[Clones]:
    made = Clones(server, "template0", ahead=0)
    yield made
    made.close()


@pytest.fixture
def empty_database(empty_clones: Clones) -> Iterator[DatabaseAddress]:
    """A database without our schema."""
    database = empty_clones.take()
    yield database
    empty_clones.drop(database)


@pytest.fixture
def address(clones: Clones) -> Iterator[DatabaseAddress]:
    """A migrated database of this test alone."""
    database = clones.take()
    yield database
    clones.drop(database)


@pytest.fixture
def connection(address: DatabaseAddress) -> Iterator[psycopg.Connection[Any]]:
    """A plain connection to this test's database, for looking at what is stored."""
    with connect(address, "tests") as opened:
        # A lock that a test holds is held for as long as that takes.
        opened.execute("SET idle_in_transaction_session_timeout = 0")
        yield opened


@pytest.fixture
def operator(address: DatabaseAddress, monkeypatch: pytest.MonkeyPatch) -> Callable[..., Result]:
    """`payments ARGUMENTS` on this test's database; `text` is its stdin."""
    for name, value in {**at(address), "LOG_LEVEL": "WARNING"}.items():
        monkeypatch.setenv(name, str(value))

    def invoke(*arguments: object, text: str | bytes | None = None) -> Result:
        return CliRunner().invoke(main, [str(each) for each in arguments], input=text)

    return invoke


@pytest.fixture
async def database(address: DatabaseAddress) -> AsyncIterator[Database]:
    """With one connection: nothing holds one while it waits for another."""
    opened = Database(address, pool_max=1)
    await opened.open()
    yield opened
    await opened.close()


@pytest.fixture
def settings(tmp_path: Path) -> Settings:
    return Settings(simulated_ledger=str(tmp_path / "ledger.sqlite"))


@pytest.fixture
async def service(address: DatabaseAddress, settings: Settings) -> AsyncIterator[Service]:
    """A started service on the simulated gateway."""
    running = Service(settings, address)
    await running.start()
    yield running
    await running.stop(5)
