"""`payments doctor`: a line for each thing, and exit code 1 if one of them is not well."""

import socket
import ssl
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from datetime import UTC, datetime
from pathlib import Path
from typing import Any
from uuid import uuid4

import httpx
import psycopg
import pytest
from click.testing import Result

from payments.cli import checks, provider_checks
from payments.cli.checks import ALERTS, ROLES, Told
from payments.database import session
from payments.database.connections import DatabaseAddress, connect
from payments.database.session import SETTINGS
from payments.queries.server import ServerState
from tests.alerts import ALERTS as RULES
from tests.cli import checked
from tests.process import ROOT, ServiceProcess, at
from tests.queries.rows import insert, insert_fulfilment, view
from tests.support import History, append, eventually

Connection = psycopg.Connection[Any]
Operator = Callable[..., Result]

pytestmark = pytest.mark.usefixtures("durable")


@pytest.fixture(autouse=True)
def following(address: DatabaseAddress) -> Iterator[Connection]:
    """As if a process followed."""
    with connect(address, "payments follower payments") as session:
        yield session


def lines(done: Result) -> dict[str, list[tuple[str, str]]]:
    """State and text by name. What is not ok names what to do next."""
    found: dict[str, list[tuple[str, str]]] = {}
    for line in done.stdout.splitlines():
        state, name, text = line.split(maxsplit=2)
        assert state != "FAIL" or "`" in text or "docs/" in text or name == "settings", line
        found.setdefault(name, []).append((state, text))
    return found


def only(done: Result, name: str) -> tuple[str, str]:
    (line,) = lines(done)[name]
    return line


def test_all_is_well(operator: Operator) -> None:
    done = operator("doctor")
    assert (done.exit_code, done.stderr) == (0, "")
    assert "FAIL" not in done.stdout
    assert only(done, "keys")[0] == only(done, "endpoint")[0] == "off"
    assert only(done, "database") == ("ok", "Postgres 18, schema up to date")
    assert only(done, "clock")[1].endswith("together")
    assert [text for _, text in lines(done)["follower"]] == [
        "payments: 0 events behind",
        "seals: 0 events behind",
    ]
    assert only(done, "work") == ("ok", "following: payments")


def test_nobody_works(operator: Operator, connection: Connection, following: Connection) -> None:
    following.close()
    eventually(lambda: only(operator("doctor"), "work")[0] == "off")  # there is nothing to do
    assert operator("doctor").exit_code == 0
    append(connection, History("k").facts)
    done = operator("doctor")
    assert done.exit_code == 1
    assert only(done, "work")[0] == "FAIL"
    assert "but 1 events are waiting: start `payments serve` or" in only(done, "work")[1]


def test_some_of_many_are_named(operator: Operator, connection: Connection) -> None:
    """The oldest three, so that a line stays one."""
    connection.execute(
        "INSERT INTO unsettled_payments (payment_id, kind, since, due_at) SELECT gen_random_uuid(),"
        " 'charge', now() - make_interval(hours => n), now() FROM generate_series(1, 9) n"
    )
    oldest = connection.execute(
        "SELECT payment_id::text FROM unsettled_payments ORDER BY since LIMIT 3"
    ).fetchall()
    ids = [id for (id,) in oldest]
    words = f": {', '.join(ids)} and 6 more: `payments explain {ids[0]}`"
    assert only(operator("doctor"), "payments")[1].endswith(words)


def test_orders_that_nobody_can_judge(
    operator: Operator, connection: Connection, calling_back: pytest.MonkeyPatch
) -> None:
    """That is no fault, and a way out is named; an order that failed a moment ago is none yet."""
    payments = [view(datetime.now(UTC)) for _ in range(3)]
    insert(connection, payments)
    assert only(operator("doctor"), "orders") == ("ok", "no payment is known to be unfulfilled")
    insert_fulfilment(connection, payments[0], "suspect", "nothing")
    insert_fulfilment(connection, payments[1], "suspect", "repeated")
    state, text = only(operator("doctor"), "orders")
    assert (state, operator("doctor").exit_code) == ("off", 0)
    assert "2 whose response did not contain it" in text
    assert "ORDER_STATUS_URL is not set" in text
    insert_fulfilment(connection, payments[2], "unfulfilled", "failed")
    calling_back.setenv("ORDER_STATUS_URL", "http://127.0.0.1:1/{order_id}")
    state, text = only(operator("doctor"), "orders")
    assert state == "ok"
    assert "1 unfulfilled, the oldest for " in text
    assert f"2 whose response did not contain it; {payments[2].id}: " in text
    assert "`payments callbacks list --unfulfilled`" in text
    assert "not set" not in text


def test_settings(operator: Operator, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("GATEWAY", "nowhere.to_be:found")
    done = operator("doctor")
    assert (done.exit_code, len(done.stdout.splitlines())) == (1, 1)
    assert only(done, "settings")[0] == "FAIL"
    monkeypatch.setenv("GATEWAY", "simulated")
    monkeypatch.setenv("PAYMENTS_API_KEYS", f"orders:{'0' * 64},staff:{'1' * 64}")
    assert only(operator("doctor"), "keys") == ("ok", "2 API clients: orders, staff")


def test_a_database_that_is_away(operator: Operator, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("DATABASE_HOST", "127.0.0.1")
    monkeypatch.setenv("DATABASE_PORT", "1")
    monkeypatch.setenv("DATABASE_PASSWORD", "canary")
    done = operator("doctor")
    assert done.exit_code == 1
    assert only(done, "database")[0] == "FAIL"
    assert only(done, "endpoint")[0] == "off"  # it goes on
    assert "canary" not in done.output


def test_a_schema_that_is_behind(operator: Operator, connection: Connection) -> None:
    connection.execute("DELETE FROM schema_migrations WHERE number = 4")
    state, text = only(operator("doctor"), "database")
    assert state == "FAIL"
    assert "the database lacks 0004_audit" in text


def age_events(connection: Connection) -> None:
    connection.execute("ALTER TABLE payment_events DISABLE TRIGGER ALL")
    connection.execute("UPDATE payment_events SET recorded_at = now() - interval '1 hour'")


def test_followers_that_are_behind(operator: Operator, connection: Connection) -> None:
    append(connection, History("k").facts)
    assert operator("doctor").exit_code == 0  # for a moment that is nothing
    age_events(connection)
    done = operator("doctor")
    assert done.exit_code == 1
    assert [state for state, _ in lines(done)["follower"]] == ["FAIL", "FAIL"]
    assert "1 events behind, 36" in lines(done)["follower"][0][1]


def test_parked_payments(operator: Operator, connection: Connection) -> None:
    connection.execute("INSERT INTO parked_streams VALUES ('payments', gen_random_uuid(), 1, '')")
    done = operator("doctor")
    assert done.exit_code == 1
    assert "1 payments parked: `payments parked list`: " in done.stdout


@pytest.mark.parametrize(("age", "exit_code"), [("1 minute", 0), ("1 hour", 1)])
def test_payments_that_stay_pending(
    operator: Operator, connection: Connection, age: str, exit_code: int
) -> None:
    connection.execute(
        "INSERT INTO unsettled_payments (payment_id, kind, since, due_at)"
        " VALUES (gen_random_uuid(), 'charge', now() - %s::interval, now())",
        [age],
    )
    done = operator("doctor")
    assert done.exit_code == exit_code
    assert only(done, "payments")[1].startswith("1 PENDING, the oldest for ")


@pytest.mark.parametrize(
    ("state", "age", "exit_code", "switched_off"),
    [("due", "1 s", 0, 0), ("due", "1 hour", 1, 0), ("dead", "1 s", 1, 1)],
)
def test_callbacks(
    operator: Operator,
    connection: Connection,
    calling_back: pytest.MonkeyPatch,
    following: Connection,
    state: str,
    age: str,
    exit_code: int,
    switched_off: int,
) -> None:
    """Switched off, as on a copy, what is due is meant to wait, and nobody follows for it."""
    connection.execute("INSERT INTO followers (name, position) VALUES ('callbacks', 0)")
    append(connection, History("k").facts)
    connection.execute("ALTER TABLE payment_events DISABLE TRIGGER ALL")
    connection.execute("UPDATE payment_events SET recorded_at = now() - interval '1 hour'")
    connection.execute("UPDATE followers SET position = 1")
    connection.execute(
        "INSERT INTO callback_deliveries (event_id, position, order_id, payment_id, sequence,"
        " status, amount_cents, currency, occurred_at, state, due_since)"
        " VALUES (gen_random_uuid(), 1, gen_random_uuid(), gen_random_uuid(), 2, 'SUCCESS', 1,"
        " 'INR', now(), %s, now() - %s::interval)",
        [state, age],
    )
    assert operator("doctor").exit_code == exit_code
    connection.execute("UPDATE followers SET position = 0 WHERE name = 'callbacks'")
    calling_back.delenv("ORDER_CALLBACK_URL")
    following.close()
    assert operator("doctor").exit_code == switched_off


@pytest.fixture
def calling_back(
    listening: Callable[[ssl.SSLContext | None], int], monkeypatch: pytest.MonkeyPatch
) -> pytest.MonkeyPatch:
    monkeypatch.setenv("ORDER_CALLBACK_URL", f"http://127.0.0.1:{listening(None)}/")
    return monkeypatch


@pytest.fixture
def listening() -> Iterator[Callable[[ssl.SSLContext | None], int]]:
    """Something that takes connections, with TLS or without; its port."""
    opened = []

    def listen(context: ssl.SSLContext | None) -> int:
        listener = socket.create_server(("127.0.0.1", 0))
        opened.append(listener)

        def serve() -> None:
            while True:
                try:
                    connection, _ = listener.accept()
                    if context is not None:
                        connection = context.wrap_socket(connection, server_side=True)
                    connection.close()
                except ssl.SSLError:
                    continue
                except OSError:
                    return

        threading.Thread(target=serve, daemon=True).start()
        return int(listener.getsockname()[1])

    yield listen
    for listener in opened:
        listener.shutdown(socket.SHUT_RDWR)
        listener.close()


def test_where_callbacks_go(
    operator: Operator,
    monkeypatch: pytest.MonkeyPatch,
    listening: Callable[[ssl.SSLContext | None], int],
) -> None:
    url = f"http://127.0.0.1:{listening(None)}/v1/callback?token=canary"
    monkeypatch.setenv("ORDER_CALLBACK_URL", url)
    done = operator("doctor")
    assert done.exit_code == 0
    assert only(done, "endpoint")[0] == "ok"
    assert "not signed" in only(done, "endpoint")[1]
    assert "canary" not in done.output


@pytest.mark.parametrize(
    ("url", "words"),
    [
        ("http://127.0.0.1:1/x", "is unreachable"),
        ("http://192.0.2.1/x", "plain http is allowed to those only"),
        ("https://no-such-host.invalid/x", "cannot be resolved yet"),
    ],
)
def test_where_callbacks_cannot_go(
    operator: Operator, monkeypatch: pytest.MonkeyPatch, url: str, words: str
) -> None:
    monkeypatch.setenv("ORDER_CALLBACK_URL", url)
    done = operator("doctor")
    state, text = only(done, "endpoint")
    assert (done.exit_code, state) == (1, "FAIL")
    assert words in text


def test_a_certificate_that_nobody_vouches_for(
    operator: Operator,
    monkeypatch: pytest.MonkeyPatch,
    listening: Callable[[ssl.SSLContext | None], int],
) -> None:
    tls = ROOT / "tests/doubles/tls"
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.load_cert_chain(tls / "certificate.pem", tls / "key.pem")
    monkeypatch.setenv("ORDER_CALLBACK_URL", f"https://localhost:{listening(context)}/x")
    state, text = only(operator("doctor"), "endpoint")
    assert state == "FAIL"
    assert "self" in text


def test_a_log_whose_time_is_ahead(operator: Operator, connection: Connection) -> None:
    """The database's clock was ahead once: time stands still in the log until it is reached."""
    append(connection, History("k").facts)
    connection.execute("ALTER TABLE payment_events DISABLE TRIGGER ALL")
    connection.execute("UPDATE payment_events SET recorded_at = now() + interval '1 hour'")
    state, text = only(operator("doctor"), "log")
    assert state == "FAIL"
    assert "3600 s ahead of the database's clock" in text or "3599 s ahead" in text


def test_clocks_that_are_apart(operator: Operator, monkeypatch: pytest.MonkeyPatch) -> None:
    real = time.time
    for ahead, words in ((-3600, "the database's is ahead"), (3600, "the database's is behind")):
        monkeypatch.setattr("payments.queries.server.time.time", lambda by=ahead: real() + by)
        state, text = only(operator("doctor"), "clock")
        assert state == "FAIL"
        assert "3600.0 s apart" in text or "3599.9 s apart" in text
        assert words in text


def test_a_log_that_went_back(operator: Operator, connection: Connection) -> None:
    connection.execute(
        "INSERT INTO log_losses (kind, by, reason, kept_position, lost_position, head_position)"
        " VALUES ('found', 'api-1:7', 'lacks', 2, 9, 4)"
    )
    state, text = only(operator("doctor"), "log")
    assert state == "FAIL"
    assert "up to position 9" in text
    assert "payments log accept-loss" in text


def test_a_server_that_refuses_to_write(
    operator: Operator, connection: Connection, address: DatabaseAddress
) -> None:
    connection.execute(
        f'ALTER DATABASE "{address.dbname}" SET default_transaction_read_only = on'.encode()
    )
    states = dict(lines(operator("doctor"))["database"])
    assert "refuses writes" in states["FAIL"]


def test_the_session_that_the_service_asks_for(
    operator: Operator, connection: Connection, address: DatabaseAddress
) -> None:
    contrary = f'ALTER DATABASE "{address.dbname}" SET synchronous_commit = off'
    connection.execute(contrary.encode())
    state, text = only(operator("doctor"), "session")
    assert (state, text.split(", ")) == ("ok", [f"{name} {SETTINGS[name]}" for name in SETTINGS])


def test_a_session_that_is_not_set_as_it_was_asked_to_be(
    operator: Operator,
    connection: Connection,
    address: DatabaseAddress,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    contrary = f'ALTER DATABASE "{address.dbname}" SET synchronous_commit = off'
    connection.execute(contrary.encode())
    monkeypatch.setattr(session, "SET_UP", session.LOOK.replace("true),", "true), 'a mark',"))
    done = operator("doctor")
    assert done.exit_code == 1
    state, text = only(done, "database")
    assert state == "FAIL"
    assert "synchronous_commit is 'off' instead of 'on'" in text


@pytest.mark.parametrize("name", ["fsync", "full_page_writes"])
def test_a_server_that_does_not_wait_for_the_disk(
    operator: Operator, server: DatabaseAddress, name: str
) -> None:
    assert only(operator("doctor"), "durability")[0] == "ok"
    with connect(server, "tests") as connection:
        connection.execute(f"ALTER SYSTEM SET {name} = off".encode())
        connection.execute("SELECT pg_reload_conf()")
        while connection.execute(f"SHOW {name}".encode()).fetchall() != [("off",)]:
            connection.execute("SELECT pg_sleep(0.01)")
    done = operator("doctor")
    assert done.exit_code == 1
    words = (
        f"off: {name}; a crash of the database's machine may lose or damage acknowledged payments"
    )
    assert only(done, "durability") == ("FAIL", f"{words}: `ALTER SYSTEM SET {name} = on`")


def test_no_standbys_and_one_role(operator: Operator) -> None:
    done = operator("doctor")
    assert only(done, "standbys")[0] == "off"
    assert only(done, "role") == ("ok", ROLES["owner"])


def test_every_alert_has_a_line_or_a_reason() -> None:
    """And the line fails where the alert fires. The reasons are in the docs as well."""
    page = (ROOT / "docs/operations.md").read_text()
    assert list(ALERTS) == [rule["alert"] for rule in RULES]
    for rule in RULES:
        told = ALERTS[rule["alert"]]
        if isinstance(told, Told):
            assert f"> {told.limit:g}" in rule["expr"] or told.limit == 0, rule
        else:
            assert f"- {rule['alert']}: {told}\n" in page, rule


class Incident:
    """What makes an alert fire, as far as the database knows of it."""

    def __init__(
        self,
        connection: Connection,
        holder: Connection,
        following: Connection,
        monkeypatch: pytest.MonkeyPatch,
    ) -> None:
        """`holder`: somebody else's session; `following`: a follower's."""
        self._connection = connection
        self._holder = holder
        self._following = following
        self._patch = monkeypatch
        self.about = uuid4()  # which payment or callback it is about

    def _open(self, kind: str, told_level: int | None = None) -> None:
        self._connection.execute(
            "INSERT INTO unsettled_payments (payment_id, kind, since, due_at, told_at, told_level)"
            " VALUES (%s, %s, now() - interval '2 hours', now(), now(), %s)",
            [self.about, kind, told_level],
        )

    def _callback(self, state: str) -> None:
        self._connection.execute(
            "INSERT INTO callback_deliveries (event_id, position, order_id, payment_id, sequence,"
            " status, amount_cents, currency, occurred_at, state, due_since)"
            " VALUES (%s, 1, gen_random_uuid(), gen_random_uuid(), 2, 'SUCCESS', 1,"
            " 'INR', now(), %s, now() - interval '1 hour')",
            [self.about, state],
        )

    def payments_nobody_works(self) -> None:
        self._open("abandoned")
        self._following.close()
        query = "SELECT FROM pg_stat_activity WHERE application_name LIKE 'payments follower %'"
        eventually(lambda: not self._connection.execute(query).fetchall())

    def payments_database_away(self) -> None:
        name = self._connection.info.dbname
        read_only = f'ALTER DATABASE "{name}" SET default_transaction_read_only = on'
        self._connection.execute(read_only.encode())

    def payments_pending_too_long(self) -> None:
        self._open("charge")

    def payments_refund_open_too_long(self) -> None:
        self._open("late_capture")

    def payments_provider_contradicts(self) -> None:
        self._open("abandoned", told_level=50)

    def payments_giving_back_stopped(self) -> None:
        self._patch.setenv("UNFULFILLED", "refund")
        self._patch.setenv("ORDER_STATUS_URL", "http://127.0.0.1:1/{order_id}")
        self._connection.execute("INSERT INTO giving_back_stopped (reason) VALUES ('too many')")

    def payments_callbacks_old(self) -> None:
        self._callback("due")

    def payments_callbacks_dead(self) -> None:
        self._callback("dead")

    def _fulfilment(self, state: str, age: str) -> None:
        payment = view(datetime.now(UTC), id=self.about)
        insert(self._connection, [payment])
        insert_fulfilment(self._connection, payment, state, "failed")
        aged = "UPDATE fulfilments SET found_at = now() - %s::interval"
        self._connection.execute(aged, [age])

    def payments_unfulfilled(self) -> None:
        self._fulfilment("unfulfilled", "31 min")

    def payments_paid_twice(self) -> None:
        self._fulfilment("paid_twice", "1 s")

    def payments_fulfilment_unknown(self) -> None:
        self._fulfilment("suspect", "61 min")

    def payments_follower_lag(self) -> None:
        history = History("k")
        append(self._connection, history.facts)
        age_events(self._connection)
        self.about = history.id

    def payments_parked_streams(self) -> None:
        self._connection.execute(
            "INSERT INTO parked_streams VALUES ('payments', %s, 1, '')", [self.about]
        )

    def payments_log_rewound(self) -> None:
        self._connection.execute(
            "INSERT INTO log_losses (kind, by, reason, kept_position, lost_position,"
            " head_position) VALUES ('found', 'api-1:7', 'lacks', 2, 9, 4)"
        )

    def payments_failover_would_lose(self) -> None:
        async def lagging(_: object) -> ServerState:
            return ServerState(
                synchronous=0, asynchronous=2, skew_s=0.0, log_ahead_s=0.0, read_only=False
            )

        self._patch.setattr(checks, "server_state", lagging)

    def payments_clock_skew(self) -> None:
        real = time.time
        self._patch.setattr("payments.queries.server.time.time", lambda: real() - 61)

    def payments_vacuum_held(self) -> None:
        self._patch.setattr(checks, "HORIZON_MAX_S", 0.01)
        self._holder.execute("BEGIN ISOLATION LEVEL REPEATABLE READ; SELECT 1")
        self._connection.execute("CREATE TABLE busy ()")
        time.sleep(0.02)

    def payments_notifications_unread(self) -> None:
        async def full(_: object) -> float:
            return 0.11

        self._patch.setattr(checks, "unread_notifications", full)

    def payments_appends_wait(self) -> None:
        async def held(_: object) -> dict[str, float]:
            return {"session 7 (psql)": 0.6}

        self._patch.setattr(checks, "waiting_appends", held)


# A line that tells these names the payments or callbacks.
ABOUT_SOME = {
    *("PaymentsProviderContradicts", "PaymentsFollowerLag", "PaymentsParkedStreams"),
    *("PaymentsPendingTooLong", "PaymentsRefundOpenTooLong"),
    *("PaymentsCallbacksOld", "PaymentsCallbacksDead"),
    *("PaymentsUnfulfilled", "PaymentsPaidTwice", "PaymentsFulfilmentUnknown"),
}


def snake(alert: str) -> str:
    return "".join(f"_{each.lower()}" if each.isupper() else each for each in alert)[1:]


@pytest.mark.parametrize("alert", [name for name, told in ALERTS.items() if type(told) is Told])
def test_what_raises_an_alert_fails_its_line(
    operator: Operator,
    connection: Connection,
    address: DatabaseAddress,
    following: Connection,
    calling_back: pytest.MonkeyPatch,
    alert: str,
) -> None:
    assert operator("doctor").exit_code == 0
    with connect(address, "a report") as holder:
        incident = Incident(connection, holder, following, calling_back)
        getattr(incident, snake(alert))()
        done = operator("doctor")
    assert done.exit_code == 1
    failed = {
        name for name, found in lines(done).items() if "FAIL" in [state for state, _ in found]
    }
    told = ALERTS[alert]
    assert isinstance(told, Told)
    assert failed == {told.check}
    if alert in ABOUT_SOME:
        assert str(incident.about) in " ".join(text for _, text in lines(done)[told.check])


def test_payments_that_were_begun_with_another_provider(
    operator: Operator, connection: Connection
) -> None:
    """Before the service that is started with this one's settings finds out."""
    history = History("k")
    append(connection, history.facts)
    connection.execute(
        "INSERT INTO unsettled_payments (payment_id, kind, since, due_at)"
        " VALUES (%s, 'charge', now(), now())",
        [history.id],
    )
    assert only(operator("doctor"), "provider")[0] == "ok"
    connection.execute("ALTER TABLE payment_events DISABLE TRIGGER ALL")
    connection.execute(
        "UPDATE payment_events SET state ="
        " convert_to(replace(convert_from(state, 'UTF8'), '\"simulated\"', '\"before\"'), 'UTF8')"
    )
    words = (
        f"unsettled payments: 1 begun with before, which GATEWAYS does not name: {history.id}:"
        f" `payments explain {history.id}`: docs/stuck.md"
    )
    assert only(operator("doctor"), "provider") == ("FAIL", words)
    connection.execute("UPDATE unsettled_payments SET told_level = 50, told_at = now()")
    assert only(operator("doctor"), "provider") == ("FAIL", words)  # and no second time


def test_who_holds_the_horizon_is_named(
    operator: Operator,
    connection: Connection,
    address: DatabaseAddress,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    with connect(address, "a report") as holder:
        holder.execute("BEGIN ISOLATION LEVEL REPEATABLE READ; SELECT 1")
        holder.execute("SET idle_in_transaction_session_timeout = 0")
        connection.execute("CREATE TABLE busy ()")
        assert only(operator("doctor"), "vacuum")[0] == "ok"  # for a moment that is nothing
        monkeypatch.setattr(checks, "HORIZON_MAX_TRANSACTIONS", 0)
        name = f"by session {holder.info.backend_pid} (a report): "
        # A database for another test may be made at this moment, in an older transaction.
        eventually(lambda: name in only(operator("doctor"), "vacuum")[1])
        assert operator("doctor").exit_code == 1


@contextmanager
def held_append_lock(address: DatabaseAddress) -> Iterator[None]:
    with connect(address, "somebody") as holder:
        holder.execute("BEGIN; LOCK TABLE append_lock IN SHARE UPDATE EXCLUSIVE MODE")
        holder.execute("SET LOCAL idle_in_transaction_session_timeout = 0")
        yield


def test_appends_that_wait(operator: Operator, address: DatabaseAddress, tmp_path: Path) -> None:
    """Those of a service: it waits for a second, gives up, and tries again."""
    assert only(operator("doctor"), "appends") == ("ok", "none waits long")
    with ServiceProcess(tmp_path, **at(address)) as service, httpx.Client(timeout=30) as client:
        service.charge(client, "k1")
        assert only(operator("doctor"), "appends")[0] == "ok"
        with held_append_lock(address), ThreadPoolExecutor(1) as pool:
            stopped = threading.Event()

            def charge() -> None:
                for number in range(1000):
                    if stopped.is_set():
                        return
                    service.charge(client, f"waits {number}")

            charging = pool.submit(charge)
            try:
                state, text = eventually(
                    lambda: (found := only(operator("doctor"), "appends"))[0] == "FAIL" and found
                )
            finally:
                stopped.set()
        charging.result()
    assert state == "FAIL"
    assert text.startswith("they wait for session ")
    assert " (somebody): docs/" in text


class TestProviders:
    """What the gateways find at their providers."""

    def asked(self, operator: Operator, *factories: str) -> list[tuple[str, str]]:
        checked.closed.clear()
        with pytest.MonkeyPatch.context() as patch:
            named = ",".join(f"tests.cli.checked:{factory}" for factory in factories)
            patch.setenv("GATEWAYS", named)
            done = operator("doctor")
        assert done.exit_code == 1
        assert checked.closed == list(factories)
        assert checked.SECRET not in done.stdout + done.stderr
        return lines(done)["gateway"]

    def test_a_line_for_each_finding(self, operator: Operator) -> None:
        assert self.asked(operator, "checked") == [
            ("ok", "checked: account a_1"),
            (
                "FAIL",
                "checked: no webhook secret: set X_WEBHOOK_SECRETS: `payments settings`",
            ),
        ]

    def test_one_that_cannot_be_asked_hides_none_of_the_others(self, operator: Operator) -> None:
        found = self.asked(operator, "unreachable", "broken", "checked")
        assert [state for state, _ in found] == ["FAIL", "FAIL", "ok", "FAIL"]
        assert found[0][1].startswith("unreachable: it cannot be asked: no connection: check")
        assert found[1][1].startswith("broken: its gateway failed with ValueError, a defect")

    def test_one_that_does_not_respond_is_not_waited_for(
        self, operator: Operator, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setattr(provider_checks, "WHOLE_TIMEOUT_S", 0.1)
        ((state, text),) = self.asked(operator, "hanging")
        assert (state, text[:37]) == ("FAIL", "hanging: it did not respond within 0.")

    def test_there_is_none_for_a_gateway_without_a_check(self, operator: Operator) -> None:
        done = operator("doctor")
        assert (done.exit_code, lines(done).get("gateway")) == (0, None)
