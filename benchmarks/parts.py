"""What is measured, one class per part. A part is entered once and run once per round."""

import asyncio
import re
import tempfile
import time
import uuid
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from datetime import UTC, datetime
from pathlib import Path
from typing import ClassVar, Self

import httpx
import msgspec
import psycopg
import uvloop
from prometheus_client.parser import text_string_to_metric_families

from benchmarks.child import output_of
from benchmarks.load import Figures, Load
from benchmarks.log import fill_log, project
from benchmarks.process import ServerProcess
from payments import embedded_postgres
from payments.database.connections import Database, DatabaseAddress, create_database_if_missing
from payments.events.appender import Appender
from payments.events.notifier import Notifier
from payments.events.store import to_stored_event
from payments.migrations import migrate
from payments.observability.metrics import Telemetry
from payments.payment.decisions import Cause, initiate
from payments.payment.identity import ChargeRequest

CONNECTIONS = 32


LAG = """
SELECT (SELECT coalesce(max(notification_id), 0) FROM payment_events)
       - (SELECT position FROM followers WHERE name = 'payments')
"""


class Part:
    """Something that is measured on a database of its own."""

    name: ClassVar[str]

    def __init__(self, server: DatabaseAddress) -> None:
        self.address = msgspec.structs.replace(server, dbname=f"bench_{self.name}")

    def __enter__(self) -> Self:
        create_database_if_missing(self.address)
        self.prepare()
        return self

    def __exit__(self, *_: object) -> None:
        pass

    def prepare(self) -> None:
        migrate(self.address)

    def run(self, seconds: float) -> Figures:
        raise NotImplementedError

    def remarks(self) -> list[str]:
        """What the reader of the figures should know; looked at after the last round."""
        return []

    def rows(self) -> dict[str, dict[str, float]]:
        """A table of the part's own, for what does not fit into Figures."""
        return {}

    def said(self) -> str:
        """What the part's own processes wrote last; shown when the part fails."""
        return ""

    def count(self, query: str) -> int:
        with psycopg.connect(self.address.conninfo("benchmarks")) as connection:
            connection.execute("SET statement_timeout = 0")
            row = connection.execute(query.encode()).fetchone()
        assert row is not None
        return int(row[0])


class HttpPart(Part):
    """A server in a process of its own, and a load of charges with unique keys, or of reads."""

    connections: ClassVar[int] = CONNECTIONS
    settings: ClassVar[dict[str, str]] = {}
    paths: Sequence[str] = ()

    def __enter__(self) -> Self:
        super().__enter__()
        self.answered = self.refused = self.runs = 0
        self._server = ServerProcess(self.name, self.address, self.settings)
        self._server.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._server.stop()

    def run(self, seconds: float) -> Figures:
        figures = Load(self._server.port, self.connections, self.paths).run(seconds)
        self.answered += figures.answers
        self.refused += figures.errors
        self.runs += 1
        return figures

    def remarks(self) -> list[str]:
        return [f"{self.refused:,} requests were not answered 2xx"] if self.refused else []

    def said(self) -> str:
        return self._server.said()


class FloorPost(HttpPart):
    """The same application, route, validation and middleware, and no database behind it."""

    name = "floor_post"


class Charge(HttpPart):
    """POST /v1/charge as it is: two durable appends and a provider call each, and the projector."""

    name = "charge"

    def __enter__(self) -> Self:
        super().__enter__()
        self._lags: list[tuple[int, float]] = []  # events behind at the end of a round, seconds
        self._resident_mb: list[float] = []
        return self

    def run(self, seconds: float) -> Figures:
        figures = super().run(seconds)
        ended = time.monotonic()
        lag = self.count(LAG)
        while self.count(LAG):
            assert time.monotonic() < ended + 60, "the projector does not catch up"
            time.sleep(0.01)
        self._lags.append((lag, time.monotonic() - ended))
        self._resident_mb.append(self._server.resident_mb())
        return figures

    def remarks(self) -> list[str]:
        stored = self.count("SELECT count(*) FROM payment_events WHERE topic = 'PaymentCharged'")
        # The load ends in the middle of requests: some are stored and no longer answered.
        most = self.answered + self.connections * self.runs
        assert self.answered <= stored <= most, (self.answered, stored)
        lag, took_s = max(self._lags, key=lambda pair: pair[1])
        return [
            *super().remarks(),
            f"{self.answered:,} charges answered 2xx, {stored:,} stored as PaymentCharged",
            f"read model at the end of a burst: at most {lag:,} events behind, "
            f"level after at most {took_s:.2f} s",
            f"resident memory: {self._resident_mb[0]:.1f} MB after the warm-up, "
            f"{self._resident_mb[-1]:.1f} MB at the end",
        ]


class ChargeBare(Charge):
    """The same without the guard and the protocol's limits: what these cost."""

    name = "charge_bare"


class ChargeBlind(Charge):
    """The same without metrics and logs: what these cost."""

    name = "charge_blind"


class Scrape(HttpPart):
    """GET /metrics, five a second, while charges run at full load; each answer is parsed."""

    name = "scrape"

    def run(self, seconds: float) -> Figures:
        url, latencies = f"http://127.0.0.1:{self._server.port}/metrics", []
        with ThreadPoolExecutor(1) as threads, httpx.Client() as client:
            load = threads.submit(super().run, seconds)
            began = time.perf_counter()
            while not load.done():
                time.sleep(0.2)
                asked = time.perf_counter()
                answer = client.get(url)
                latencies.append(time.perf_counter() - asked)
                assert list(text_string_to_metric_families(answer.text))
            self._charges = load.result()
            return Figures.of(latencies, time.perf_counter() - began)

    def remarks(self) -> list[str]:
        return [*super().remarks(), f"meanwhile {self._charges.per_s:,.0f} charges/s"]


class ChargeSlowProvider(Charge):
    """1,000 connections while the provider takes 500 ms: at best 2,000 per second."""

    name = "charge_slow_provider"
    connections = 1000
    settings: ClassVar[dict[str, str]] = {"SIMULATED_FAULTS": "delay=0.5"}


class Library(HttpPart):
    """The eventsourcing library's own Application in threads behind the same route."""

    name = "library"

    def prepare(self) -> None:
        pass  # it makes its own tables

    def remarks(self) -> list[str]:
        stored = self.count("SELECT count(*) FROM librarypayments_events")
        return [
            *super().remarks(),
            f"{self.answered:,} charges answered, {stored:,} events stored",
        ]


class Reads(HttpPart):
    """Reads of payments that were charged before."""

    payments: ClassVar[int] = 20_000

    def prepare(self) -> None:
        super().prepare()
        with psycopg.connect(self.address.conninfo("benchmarks")) as connection:
            self.ids = fill_log(connection, self.payments)
        asyncio.run(project(self.address))
        self.paths = self.all_paths()

    def all_paths(self) -> list[str]:
        return [f"/v1/payments/{payment_id}" for payment_id in self.ids]


class FloorGet(Reads):
    """The same route and answer, and no database behind it."""

    name = "floor_get"


class Get(Reads):
    """GET /v1/payments/{id}: strictly current."""

    name = "get"


class List(Reads):
    """GET /v1/payments: the newest 50, and the payments of one status."""

    name = "list"
    payments = 100_000

    def all_paths(self) -> list[str]:
        return ["/v1/payments", "/v1/payments?status=SUCCESS", "/v1/payments?status=FAILED"]


class Project(Part):
    """The follower alone: 1,000,000 events, of which it makes 490,000 rows, per round.

    Latency is that of a batch.
    """

    name = "project"
    payments: ClassVar[int] = 490_200

    def prepare(self) -> None:
        super().prepare()
        with psycopg.connect(self.address.conninfo("benchmarks")) as connection:
            fill_log(connection, self.payments)
        self._events = self.count("SELECT count(*) FROM payment_events")

    def run(self, seconds: float) -> Figures:
        with psycopg.connect(self.address.conninfo("benchmarks")) as connection:
            connection.execute("SET statement_timeout = 0")
            connection.execute("TRUNCATE payments, refunds, payment_clients, unsettled_payments")
            connection.execute("UPDATE followers SET position = 0")
        warm_up = seconds <= 1
        started = time.perf_counter()
        batches = uvloop.run(project(self.address, 20_000 if warm_up else self._events))
        took = time.perf_counter() - started
        events = sum(count for count, _ in batches)
        latencies = [seconds for _, seconds in batches]
        return msgspec.structs.replace(
            Figures.of(latencies, took), per_s=events / took, answers=events
        )

    def remarks(self) -> list[str]:
        rows = self.count("SELECT count(*) FROM payments")
        refunds = self.count("SELECT count(*) FROM refunds")
        return [f"{self._events:,} events became {rows:,} payments and {refunds:,} refunds"]


class Append(Part):
    """The event store alone: one event per append, 32 callers."""

    name = "append"

    def run(self, seconds: float) -> Figures:
        return uvloop.run(append_for(self.address, seconds))


async def append_for(address: DatabaseAddress, seconds: float) -> Figures:
    """32 callers append one event after the other; whoever follows is notified, as always."""
    database, telemetry = Database(address, 1), Telemetry()
    notifier = Notifier(database.connect, telemetry)
    appender = Appender(database.connect, telemetry, intent_queue_max=1, appended=notifier.appended)
    notifier.start()
    appender.start()
    cause = Cause(
        event_id=uuid.uuid4(), occurred_at=_now(), client="default", request_id="benchmark"
    )
    latencies: list[float] = []
    started = time.perf_counter()

    async def caller() -> None:
        while (began := time.perf_counter()) - started < seconds:
            request = ChargeRequest(
                idempotency_key=str(uuid.uuid4()),
                merchant_order_id=uuid.uuid4(),
                amount_cents=1500,
                currency="INR",
                client="default",
            )
            await appender.append([to_stored_event(initiate(request, "x", cause))])
            latencies.append(time.perf_counter() - began)

    await asyncio.gather(*(caller() for _ in range(CONNECTIONS)))
    took = time.perf_counter() - started
    await appender.stop(5)
    await notifier.stop()
    return Figures.of(latencies, took)


class PgCommit(Part):
    """pgbench with 32 clients: what Postgres commits when every charge is one transaction."""

    name = "pg_commit"

    SCHEMA = """
        CREATE TABLE events (
            id bigserial UNIQUE, stream uuid, version bigint, topic text, state bytea,
            recorded_at timestamptz, PRIMARY KEY (stream, version));
        CREATE TABLE payments (
            id uuid PRIMARY KEY, merchant_order_id uuid, idempotency_key text UNIQUE,
            amount_cents int, currency text, status text, provider_txn_id text,
            created_at timestamp DEFAULT now(), updated_at timestamp DEFAULT now());
    """
    # A line per statement, as pgbench wants it.
    SCRIPT = (
        "BEGIN;",
        "INSERT INTO events (stream, version, topic, state, recorded_at) VALUES"
        " (gen_random_uuid(), 1, 'PaymentCharged', decode(repeat('61', 400), 'hex'), now());",
        "INSERT INTO payments (id, merchant_order_id, idempotency_key, amount_cents, currency,"
        " status) VALUES (gen_random_uuid(), gen_random_uuid(), gen_random_uuid()::text, 1500,"
        " 'INR', 'SUCCESS');",
        "COMMIT;",
    )

    def prepare(self) -> None:
        with psycopg.connect(self.address.conninfo("benchmarks")) as connection:
            connection.execute(self.SCHEMA)

    def run(self, seconds: float) -> Figures:
        with tempfile.TemporaryDirectory() as directory:
            script = Path(directory) / "charge.sql"
            script.write_text("\n".join(self.SCRIPT))
            told = output_of(
                [
                    str(embedded_postgres.binary("pgbench")),
                    *("--no-vacuum", "--protocol=prepared", f"--file={script}"),
                    *(f"--client={CONNECTIONS}", "--jobs=2"),
                    *(f"--time={max(1, round(seconds))}", "--log", f"--log-prefix={directory}/log"),
                    *("-h", self.address.host, "-p", str(self.address.port)),
                    *("-U", self.address.user, self.address.dbname),
                ],
                timeout_s=seconds + 60,
            )
            # client, transaction number, microseconds, …
            latencies = [
                int(line.split()[2]) / 1e6
                for log in Path(directory).glob("log*")
                for line in log.read_text().splitlines()
            ]
        match = re.search(r"tps = ([0-9.]+)", told)
        assert match, told
        return Figures.of(latencies, len(latencies) / float(match[1]))

    def remarks(self) -> list[str]:
        rows = self.count("SELECT count(*) FROM payments")
        return [f"{rows:,} transactions, each: {' '.join(self.SCRIPT)}"]


def _now() -> datetime:
    return datetime.now(UTC)


PARTS: dict[str, type[Part]] = {
    part.name: part
    for part in (
        FloorPost,
        Charge,
        ChargeBare,
        ChargeBlind,
        Scrape,
        FloorGet,
        Get,
        List,
        Append,
        Project,
        PgCommit,
        Library,
        ChargeSlowProvider,
    )
}
