"""Callbacks while the log is exported: how long a claim takes, and whether any callback waits.

python -m benchmarks.exports --minutes 10             with two exports open
python -m benchmarks.exports --minutes 3 --snapshot   with a snapshot held instead, to compare

Charges come at a fixed rate, each of an order of its own, and every callback goes to a sink.
Meanwhile one `payments replay --follow` prints what comes, and one `payments replay` is open that
nobody reads on, as in a pager. A row is printed for each stretch of time.
"""

import asyncio
import subprocess
import sys
import threading
import time
import uuid
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from typing import Any, Self

import click
import msgspec
import psycopg
import uvloop
from rich.console import Console
from rich.table import Table

from benchmarks.client_limit import SECRETS, SinkProcess
from benchmarks.load import Figures
from benchmarks.log import fill_log
from benchmarks.parts import Part
from benchmarks.process import ServerProcess
from payments.callbacks import outbox
from payments.database.connections import Database, DatabaseAddress, connect
from payments.http_url import parse_http_url
from payments.observability.logs import set_up_logs
from payments.observability.metrics import Telemetry
from payments.order_service.target import Target
from payments.projections.callbacks import begin_at_the_end
from payments.service import build_dispatcher, build_followers
from payments.settings import Settings

FILLED = 2000  # payments before it begins: a pipe holds less of them
CONNECTIONS = 32
RATE = 300.0  # charges per second: what two cores do with time to spare, load and sink included

LOOK = """
SELECT (SELECT count(*) FROM callback_deliveries WHERE state = 'due'),
       coalesce((SELECT extract(epoch FROM clock_timestamp() - min(due_since))
                   FROM callback_deliveries WHERE state = 'due'), 0)::float8,
       coalesce((SELECT max(age(a.backend_xmin)) FROM pg_stat_activity a
                  WHERE a.datname = current_database() AND a.pid <> pg_backend_pid()), 0),
       (SELECT n_dead_tup FROM pg_stat_user_tables WHERE relname = 'callback_lanes'),
       coalesce((SELECT calls FROM pg_stat_user_functions WHERE funcname = 'claim_deliveries'), 0),
       coalesce((SELECT total_time FROM pg_stat_user_functions
                  WHERE funcname = 'claim_deliveries'), 0)
"""


class Stretch(msgspec.Struct, frozen=True):
    """What one stretch of time was like. Of a claim: its round trip, and what it takes the server.
    `horizon`: transactions since the oldest that somebody may still see."""

    charges_per_s: float
    claims_per_s: float
    claim_p50_ms: float
    claim_p99_ms: float
    claim_server_ms: float
    due: int
    oldest_due_s: float
    horizon: int
    dead_lanes: int


class Callbacks:
    """The follower and the dispatcher of `payments work`, in a thread; each claim is timed."""

    def __init__(self, address: DatabaseAddress, url: str) -> None:
        self._address = address
        self._url = url
        self._thread = threading.Thread(target=lambda: uvloop.run(self._run()), name="callbacks")
        self._ready, self._stopping = threading.Event(), threading.Event()
        self._seconds: list[float] = []
        self._claim = outbox.claim

    def __enter__(self) -> Self:
        outbox.claim = self._timed
        self._thread.start()
        self._ready.wait(60)
        return self

    def __exit__(self, *_: object) -> None:
        self._stopping.set()
        self._thread.join()
        outbox.claim = self._claim

    def taken(self) -> list[float]:
        """The round trips since the last call, in seconds."""
        taken, self._seconds = self._seconds, []
        return taken

    async def _timed(self, *arguments: Any, **options: Any) -> list[outbox.ClaimedDelivery]:
        began = time.perf_counter()
        claimed = await self._claim(*arguments, **options)
        self._seconds.append(time.perf_counter() - began)
        return claimed

    async def _run(self) -> None:
        settings = Settings(
            order_callback_url=parse_http_url(self._url), order_callback_secret=SECRETS
        )
        async with Database(self._address, 2) as database:
            await begin_at_the_end(database)
            dispatcher = build_dispatcher(
                settings, Target.of_callbacks(settings), database, Telemetry()
            )
            assert dispatcher is not None
            *_, follower = build_followers(settings, database, Telemetry(), dispatcher.wake)
            await dispatcher.start()
            follower.start()
            self._ready.set()
            await asyncio.to_thread(self._stopping.wait)
            await follower.stop()
            await dispatcher.stop(1)


class Charges:
    """Charges at a fixed rate, each with a key and an order of its own, in a thread."""

    def __init__(self, port: int, rate: float) -> None:
        self._port = port
        self._rate = rate
        self._thread = threading.Thread(target=lambda: uvloop.run(self._run()), name="charges")
        self._stopping = threading.Event()
        self.answered = self.others = 0

    def __enter__(self) -> Self:
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._stopping.set()
        self._thread.join()

    async def _run(self) -> None:
        self._due = time.perf_counter()
        await asyncio.gather(*(self._client() for _ in range(CONNECTIONS)))

    async def _client(self) -> None:
        """Takes turns with the others; without a free connection a turn comes late."""
        reader, writer = await asyncio.open_connection("127.0.0.1", self._port)
        while not self._stopping.is_set():
            due, self._due = self._due, self._due + 1 / self._rate
            await asyncio.sleep(due - time.perf_counter())
            body = b'{"merchant_order_id":"%b","amount_cents":1500}' % str(uuid.uuid4()).encode()
            head = (
                "POST /v1/charge HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\n"
                f"Idempotency-Key: {uuid.uuid4()}\r\nContent-Length: {len(body)}\r\n\r\n"
            )
            writer.write(head.encode() + body)
            answer = (await reader.readuntil(b"\r\n\r\n")).lower()
            length = int(answer.partition(b"content-length: ")[2].partition(b"\r")[0])
            await reader.readexactly(length)
            if answer.startswith(b"http/1.1 201"):
                self.answered += 1
            else:
                self.others += 1
        writer.close()


@contextmanager
def exports(address: DatabaseAddress) -> Iterator[None]:
    """One that follows, and one whose reader has stopped reading."""
    command = [sys.executable, "-m", "payments", "replay"]
    environment = {
        "DATABASE_HOST": address.host,
        "DATABASE_PORT": str(address.port),
        "DATABASE_USERNAME": address.user,
        "DATABASE_NAME": address.dbname,
    }
    following = subprocess.Popen(
        [*command, "--follow"], env=environment, stdout=subprocess.DEVNULL, start_new_session=True
    )
    paused = subprocess.Popen(
        command, env=environment, stdout=subprocess.PIPE, start_new_session=True
    )
    try:
        assert paused.stdout is not None
        paused.stdout.readline()
        yield
        assert following.poll() is None, "the export that follows has ended"
        assert paused.poll() is None, "the export that is paused has ended"
    finally:
        for process in (following, paused):
            process.kill()
            process.communicate()


@contextmanager
def snapshot(address: DatabaseAddress) -> Iterator[None]:
    """What an export would hold that reads everything as of one moment."""
    with connect(address, "benchmarks snapshot") as connection:
        connection.execute("SET idle_in_transaction_session_timeout = 0")
        connection.execute("BEGIN ISOLATION LEVEL REPEATABLE READ; SELECT 1")
        yield


class Exports(Part):
    """Its own figures are those of the claims, over all stretches of a round."""

    name = "exports"
    rate = RATE
    stretches = 5
    held = staticmethod(exports)

    def __enter__(self) -> Self:
        super().__enter__()
        self._stretches: list[Stretch] = []
        with ExitStack() as stack:
            self._server = ServerProcess(self.name, self.address, {})
            self._server.start()
            stack.callback(self._server.stop)
            sink = SinkProcess()
            sink.start()
            stack.callback(sink.stop)
            self._callbacks = stack.enter_context(Callbacks(self.address, sink.url))
            self._stack = stack.pop_all()
        return self

    def __exit__(self, *_: object) -> None:
        self._stack.close()

    def prepare(self) -> None:
        super().prepare()
        with psycopg.connect(self.address.conninfo("benchmarks")) as connection:
            fill_log(connection, FILLED)
            tracked = f'ALTER DATABASE "{self.address.dbname}" SET track_functions = pl'
            connection.execute(tracked.encode())

    def run(self, seconds: float) -> Figures:
        self._stretches = []
        took: list[float] = []
        with (
            connect(self.address, "benchmarks") as look,
            self.held(self.address),
            Charges(self._server.port, self.rate) as charges,
        ):
            self._callbacks.taken()
            began = time.perf_counter()
            for _ in range(self.stretches):
                stretch, claims = self._watch(look, charges, seconds / self.stretches)
                self._stretches.append(stretch)
                took += claims
            ended = time.perf_counter()
            self._others = charges.others
        return Figures.of(took, ended - began)

    def _watch(
        self, look: psycopg.Connection[Any], charges: Charges, seconds: float
    ) -> tuple[Stretch, list[float]]:
        answered, began, before = charges.answered, time.perf_counter(), self._look(look)
        time.sleep(seconds)
        after = self._look(look)
        took_s = time.perf_counter() - began
        claims = self._callbacks.taken()
        figures = Figures.of(claims, took_s)
        due, oldest_s, horizon, dead, calls, total_ms = after
        stretch = Stretch(
            charges_per_s=(charges.answered - answered) / took_s,
            claims_per_s=figures.per_s,
            claim_p50_ms=figures.p50_ms,
            claim_p99_ms=figures.p99_ms,
            claim_server_ms=(total_ms - before[5]) / max(1, calls - before[4]),
            due=due,
            oldest_due_s=oldest_s,
            horizon=horizon,
            dead_lanes=dead,
        )
        return stretch, claims

    def _look(self, connection: psycopg.Connection[Any]) -> tuple[Any, ...]:
        (found,) = connection.execute(LOOK.encode()).fetchall()
        return tuple(found)

    def remarks(self) -> list[str]:
        last = self._stretches[-1]
        return [
            f"{self._others} charges were not answered 201; at the end {last.due:,} callbacks were "
            f"due, the oldest for {last.oldest_due_s:.1f} s, and {last.horizon:,} transactions "
            "were held"
        ]

    def rows(self) -> dict[str, dict[str, float]]:
        return {
            str(number): msgspec.to_builtins(stretch)
            for number, stretch in enumerate(self._stretches, 1)
        }


STRETCHES = 10
HEADINGS = (
    *("charges/s", "claims/s", "p50 ms", "p99 ms", "server ms", "due", "oldest s", "horizon"),
    "dead lanes",
)


@click.command()
@click.option("--minutes", default=1.0, show_default=True, type=click.FloatRange(0.1))
@click.option("--rate", default=RATE, show_default=True, help="Charges per second.")
@click.option("--snapshot", "hold", is_flag=True, help="Hold a snapshot, and export nothing.")
def main(minutes: float, rate: float, hold: bool) -> None:
    """Measure once."""
    from benchmarks.__main__ import server  # not at the top: it imports all parts

    set_up_logs("auto", "WARNING")
    with server() as address, Exports(address) as part:
        part.rate, part.stretches = rate, STRETCHES
        part.held = snapshot if hold else exports
        figures = part.run(60 * minutes)
        table = Table("minutes", *HEADINGS, box=None)
        for number, row in enumerate(part.rows().values(), 1):
            table.add_row(
                f"{number * minutes / STRETCHES:.1f}", *(f"{value:,.1f}" for value in row.values())
            )
        Console(highlight=False, width=110).print(table)
        for remark in part.remarks():
            click.echo(remark)
        click.echo(f"claims: p50 {figures.p50_ms:.2f} ms, p99 {figures.p99_ms:.2f} ms")


if __name__ == "__main__":
    main()
