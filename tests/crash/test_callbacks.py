"""Callbacks of real services that are killed, stopped and cut off, to a receiver that goes and
comes.

`--kills N` for more than a few.
"""

import json
import random
import sys
import threading
import time
import uuid
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any
from uuid import UUID

import httpx
import psycopg
import pytest

from payments.callbacks import lease_s
from payments.callbacks.dispatcher import CONCURRENCY_MAX
from payments.database.connections import DatabaseAddress
from tests.crash.client import PAUSE_S
from tests.crash.money import nothing_open
from tests.doubles.order_service import Fault, Options, OrderServiceProcess, Request
from tests.invariants.callbacks import CallbackReport, check_callbacks, is_followed, nothing_due
from tests.invariants.checker import ChargeAnswer, check
from tests.machine import Machine, bound, within
from tests.outside_postgres import OutsidePostgres
from tests.process import ServiceProcess, at, invoke, working
from tests.support import History, append, at_once, eventually

SEED = 22
FAST = {
    "CHARGE_DEADLINE_S": 1,
    "GATEWAY_TIMEOUT_S": 0.8,
    "PENDING_ABANDON_AFTER_S": 3,
    "CALLBACK_TIMEOUT_S": 4,
}
LEASE_S = lease_s(4)
PAID, DECLINED = 1500, 1507  # the simulated provider declines what ends with a 7
# What a customer pays for one order, one after another.
PURCHASES = ((PAID,), (DECLINED,), (DECLINED, PAID), (DECLINED, DECLINED), (PAID, DECLINED))


@pytest.fixture
def orders(tmp_path: Path) -> Iterator[OrderServiceProcess]:
    """It issues tickets in one step: two at once are found as such."""
    with OrderServiceProcess(Options(issue_takes_s=0, log=tmp_path / "orders")) as running:
        yield running


def calling(address: DatabaseAddress, orders: OrderServiceProcess) -> dict[str, Any]:
    """The settings of a service."""
    return {**at(address), **FAST, "ORDER_CALLBACK_URL": orders.url}


class Customers:
    """Orders that are paid for, from several threads, until told to stop."""

    def __init__(self, service: ServiceProcess, threads: int = 6) -> None:
        self.answers: list[ChargeAnswer] = []
        self._service = service
        self._stopped = threading.Event()
        self._threads = [threading.Thread(target=self._run, args=(n,)) for n in range(threads)]

    def __enter__(self) -> "Customers":
        for thread in self._threads:
            thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._stopped.set()
        for thread in self._threads:
            thread.join(timeout=20)

    def _run(self, number: int) -> None:
        dice = random.Random(SEED + number)
        with httpx.Client(timeout=15) as client:
            while not self._stopped.is_set():
                order_id = str(uuid.uuid4())
                for amount_cents in dice.choice(PURCHASES):
                    self._pay(client, order_id, amount_cents)
                    self._stopped.wait(PAUSE_S)

    def _pay(self, client: httpx.Client, order_id: str, amount_cents: int) -> None:
        changed = {"merchant_order_id": order_id, "amount_cents": amount_cents}
        try:
            answer = self._service.charge(client, str(uuid.uuid4()), **changed)
        except httpx.TransportError:
            return
        if answer.status_code in (201, 202):
            told = answer.json()
            self.answers.append(ChargeAnswer(UUID(told["id"]), answer.status_code, told["status"]))

    def wait_for(self, count: int) -> None:
        """Until so many charges were answered."""
        eventually(lambda: len(self.answers) >= count)


def all_is_well(
    connection: psycopg.Connection[Any],
    orders: OrderServiceProcess,
    answers: Sequence[ChargeAnswer] = (),
    timeout_s: float = 20,
) -> CallbackReport:
    """Waits until nothing is left to be done, and checks everything."""
    eventually(lambda: at_once(connection, nothing_open, nothing_due), timeout_s)
    check(connection, charges=answers, settled=True)
    report = check_callbacks(connection, received=orders.requests)
    assert orders.findings() == []
    return report


def attempts_of(connection: psycopg.Connection[Any]) -> list[str]:
    rows = connection.execute("SELECT outcome FROM callback_attempts ORDER BY claim")
    return [outcome for (outcome,) in rows]


@pytest.mark.timeout(900)
def test_kill_9_leaves_no_outcome_out_and_keeps_the_order(
    address: DatabaseAddress,
    connection: psycopg.Connection[Any],
    orders: OrderServiceProcess,
    tmp_path: Path,
    pytestconfig: pytest.Config,
) -> None:
    orders.script(Fault("slow", count=None, share=0.3, seed=SEED, seconds=0.3))
    service = ServiceProcess(tmp_path, **calling(address, orders))
    answers: list[ChargeAnswer] = []
    for number in range(pytestconfig.getoption("--kills")):
        with service, Customers(service) as customers:
            customers.wait_for(20 + 5 * (number % 10))
            service.kill()
        answers += customers.answers
    # Nobody is left to whom the leases belong: the last ones need not be waited for.
    connection.execute("UPDATE callback_lanes SET next_at = now() WHERE in_flight IS NOT NULL")
    with service:
        report = all_is_well(connection, orders, answers)
        assert service.terminate() == 0
    interrupted = attempts_of(connection).count("interrupted")
    sys.stdout.write(f"{report}, {len(orders.requests)} requests, {interrupted} interrupted\n")
    assert interrupted > 0, "no callback was under way at any kill"
    assert set(report.states) == {"delivered", "superseded"}


def test_of_two_processes_one_takes_over_what_the_other_had_begun(
    address: DatabaseAddress,
    connection: psycopg.Connection[Any],
    orders: OrderServiceProcess,
    tmp_path: Path,
) -> None:
    settings = calling(address, orders)
    service, machine = ServiceProcess(tmp_path, **settings).start(), Machine()
    with working(PAYMENTS_DATA_DIR=tmp_path, **settings):
        # Each takes as many as it may have under way.
        orders.script(Fault("slow", count=2 * CONCURRENCY_MAX, seconds=3))
        ids = [uuid.uuid4() for _ in range(3 * CONCURRENCY_MAX)]
        append(
            connection,
            [f for id in ids for f in History(str(id), order_id=id).charged().facts],
        )
        orders.wait_for(2 * CONCURRENCY_MAX, "arrived")
        assert orders.counts["finished"] == 0
        service.kill()
        report = all_is_well(connection, orders, timeout_s=LEASE_S + 10)
    outcomes = attempts_of(connection)
    assert outcomes.count("interrupted") == CONCURRENCY_MAX
    assert outcomes.count("delivered") == report.states["delivered"] == len(ids)
    waits = list(between_repetitions_s(orders.requests))
    assert len(waits) == CONCURRENCY_MAX
    assert min(waits) > LEASE_S - 0.5, "taken over before the lease was over"
    bound(max(waits), LEASE_S + 3, machine)


def between_repetitions_s(received: Sequence[Request]) -> Iterator[float]:
    last: dict[str, float] = {}
    for request in received:
        event_id = request.get("event_id")
        if event_id in last:
            yield request.arrived - last[event_id]
        last[event_id] = request.arrived


def test_sigterm_waits_for_what_is_under_way_and_begins_nothing_more(
    address: DatabaseAddress,
    connection: psycopg.Connection[Any],
    orders: OrderServiceProcess,
    tmp_path: Path,
) -> None:
    """It is recorded, so that it is not sent again; what stands behind it is sent after the next
    start."""
    orders.script(Fault("slow", seconds=2))
    service = ServiceProcess(tmp_path, **calling(address, orders)).start()
    with httpx.Client() as client:
        for key in ("first", "second"):
            assert service.charge(client, key).status_code == 201
    orders.wait_for(1, "arrived")
    eventually(lambda: is_followed(connection))
    stopped = time.monotonic()
    with within(9):
        assert service.terminate() == 0
    assert time.monotonic() - stopped > 0.5
    assert orders.counts == {"arrived": 1, "finished": 1, "accepted": 1}
    assert check_callbacks(connection, settled=False) == ({"delivered": 1, "due": 1}, 1)
    with service:
        assert all_is_well(connection, orders) == ({"delivered": 2}, 2)
    assert orders.counts["arrived"] == 2


def test_sigterm_cuts_off_what_takes_too_long_and_the_next_start_waits_for_it(
    address: DatabaseAddress,
    connection: psycopg.Connection[Any],
    orders: OrderServiceProcess,
    tmp_path: Path,
) -> None:
    orders.script(Fault("slow", seconds=12))
    settings = {**calling(address, orders), "CALLBACK_TIMEOUT_S": 14}
    service = ServiceProcess(tmp_path, **settings).start()
    with httpx.Client() as client:
        assert service.charge(client, "first").status_code == 201
    orders.wait_for(1, "arrived")
    with within(9.5):
        assert service.terminate() == 0
    assert attempts_of(connection) == ["end_unknown"]
    with service:
        assert all_is_well(connection, orders, timeout_s=30) == ({"delivered": 1}, 2)
    first, again = orders.requests
    assert again.arrived - first.arrived > 14, "repeated while the first was at work"


def test_the_receiver_goes_and_comes_back(
    address: DatabaseAddress,
    connection: psycopg.Connection[Any],
    orders: OrderServiceProcess,
    tmp_path: Path,
) -> None:
    """Charges go on meanwhile; afterwards all is delivered without anybody's doing."""
    with ServiceProcess(tmp_path, **calling(address, orders)) as service, httpx.Client() as client:

        def health() -> tuple[int, str]:
            answer = client.get(f"{service.url}/health")
            return answer.status_code, answer.json()["callbacks"]

        assert health() == (200, "ok")
        orders.stop()
        for number in range(25):
            ids = {"merchant_order_id": str(uuid.uuid4())}
            for part in ("a", "b"):
                assert service.charge(client, f"{number}{part}", **ids).status_code == 201
        eventually(lambda: health() == (200, "degraded"))
        orders.start()
        report = all_is_well(connection, orders)
        assert report.states == {"delivered": 50}
        assert len(orders.requests) == 50
        eventually(lambda: health() == (200, "ok"))


def test_callbacks_begin_with_the_first_start_that_has_an_address(
    address: DatabaseAddress,
    connection: psycopg.Connection[Any],
    orders: OrderServiceProcess,
    tmp_path: Path,
) -> None:
    """What was before that is brought by `backfill`, once."""
    with_it = calling(address, orders)
    without = {name: value for name, value in with_it.items() if name != "ORDER_CALLBACK_URL"}
    with ServiceProcess(tmp_path, **without) as service, httpx.Client() as client:
        for number in range(3):
            assert service.charge(client, f"before {number}").status_code == 201
        eventually(lambda: nothing_open(connection))
        assert client.get(f"{service.url}/health").json()["callbacks"] == "off"
    rows = "SELECT count(*) FROM callback_deliveries"
    assert connection.execute(rows).fetchone() == (0,)
    last = "SELECT max(notification_id) FROM payment_events"
    ((before,),) = connection.execute(last)
    with ServiceProcess(tmp_path, **with_it) as service, httpx.Client() as client:
        assert service.charge(client, "since").status_code == 201
        eventually(lambda: nothing_due(connection))
        report = check_callbacks(connection, first_position=before + 1, received=orders.requests)
        assert report.states == {"delivered": 1}
        for enqueued in (3, 0):
            done = invoke("callbacks", "backfill", "--from", "1", **with_it)
            assert (done.returncode, done.stdout) == (0, f"enqueued: {enqueued}\n")
        eventually(lambda: nothing_due(connection))
        assert check_callbacks(connection).states == {"delivered": 4}
        assert orders.counts["accepted"] == 4


def test_a_charge_that_is_given_up_after_the_orders_money_went_back_is_told(
    address: DatabaseAddress,
    connection: psycopg.Connection[Any],
    orders: OrderServiceProcess,
    tmp_path: Path,
) -> None:
    """Order Service has left the order open: the charge was answered 202."""
    settings = calling(address, orders)
    order = {"merchant_order_id": str(uuid.uuid4())}
    with ServiceProcess(tmp_path, **settings) as service, httpx.Client() as client:
        first = service.charge(client, "first", **order).json()
        body = {"payment_id": first["id"]}
        assert client.post(f"{service.url}/v1/refund", json=body).json()["status"] == "REFUNDED"
    settings["SIMULATED_FAULTS"] = "charge:timeout"
    with ServiceProcess(tmp_path, **settings) as service, httpx.Client() as client:
        second = service.charge(client, "second", **order)
        assert (second.status_code, second.json()["status"]) == (202, "PENDING")
        eventually(lambda: at_once(connection, nothing_open, nothing_due))
    told = [(request.outcome, request.get("payment_id")) for request in orders.requests]
    assert told == [("SUCCESS", first["id"]), ("FAILED", second.json()["id"])]
    report = check_callbacks(connection, received=orders.requests)
    assert report.states == {"delivered": 2, "excluded": 1}


def test_a_dead_letter_is_seen_and_sent_again(
    address: DatabaseAddress,
    connection: psycopg.Connection[Any],
    orders: OrderServiceProcess,
    tmp_path: Path,
) -> None:
    settings = calling(address, orders)
    order_id = str(uuid.uuid4())

    def told(*arguments: str) -> tuple[str, str]:
        """By `payments callbacks`, on stdout and stderr."""
        done = invoke("callbacks", *arguments, **settings)
        assert done.returncode == 0, done.stderr
        return done.stdout, done.stderr

    with ServiceProcess(tmp_path, **settings) as service, httpx.Client() as client:
        orders.script(Fault("410"))
        for key in ("dead", "next"):
            service.charge(client, key, merchant_order_id=order_id)
        eventually(lambda: orders.counts["finished"] == 2 and nothing_due(connection))
        (dead,) = json.loads(told("list", "--dead", "--format", "json")[0])
        table, cut = told("list", "--limit", "1")
        assert order_id in table
        assert dead["event_id"] not in table
        assert cut == "only the first 1 (--limit) are shown; there are more\n"
        assert dead["order_id"] == order_id
        assert (dead["state"], dead["attempts"], dead["last_attempt"]) == ("dead", 1, "gone 410")
        of_order = json.loads(told("list", "--order", order_id, "--format", "json")[0])
        assert [row["state"] for row in of_order] == ["delivered", "dead"]

        event_id = dead["event_id"]
        assert told("redrive", event_id) == ("due again: 1\n", "")
        eventually(lambda: nothing_due(connection))
        shown = json.loads(told("show", event_id, "--format", "json")[0])
        assert (shown["state"], shown["event_id"], shown["attempts"]) == ("delivered", event_id, 1)
        first, second = shown["attempts_on_record"]
        assert (first["outcome"], first["status"]) == ("gone", 410)
        assert json.loads(first["answer"]) == {"error": "scripted"}
        assert (second["outcome"], second["status"]) == ("delivered", 200)
        table, _ = told("show", event_id)
        assert all(word in table for word in (event_id, "gone", "410", "scripted", '{"ok":true}'))

        assert told("redrive", "--due")[0] == "due again: 0\n"
        assert told("redrive", "--since", of_order[0]["enqueued_at"])[0] == "due again: 0\n"
        assert told("redrive", "--since", "2026-01-01T00:00:00+05:30")[0] == "due again: 2\n"
        eventually(lambda: orders.counts["accepted"] == 4 and nothing_due(connection))
        failed = {"merchant_order_id": str(uuid.uuid4()), "amount_cents": DECLINED}
        service.charge(client, "declined", **failed)
        eventually(lambda: orders.counts["accepted"] == 5 and nothing_due(connection))
        since = ("redrive", "--since", "2026-01-01T00:00:00Z")
        assert told(*since)[0] == "due again: 2\n"
        assert told(*since, "--with-failed")[0] == "due again: 3\n"
        eventually(lambda: nothing_due(connection))
        assert check_callbacks(connection).states == {"delivered": 3}


# What is refused, with which exit code.
REFUSED = {
    ("show",): 2,
    ("show", "7"): 2,
    ("show", str(uuid.uuid4())): 1,
    ("redrive",): 2,
    ("redrive", str(uuid.uuid4()), "--dead"): 2,
    ("redrive", str(uuid.uuid4())): 1,
    ("redrive", "--dead", "--due"): 2,
    ("redrive", "--since", "yesterday"): 2,
    ("redrive", "--dead", "--with-failed"): 2,
    ("redrive", "--since", "2026-01-01T00:00:00"): 2,
    ("list", "--dead", "--order", str(uuid.uuid4())): 2,
    ("list", "--dead", "--due"): 2,
    ("list", "--format", "xml"): 2,
    ("backfill",): 2,
    ("backfill", "--from", "0"): 2,
    ("backfill", "--from", "1"): 1,  # nobody is to be called back
}


def test_the_commands_say_in_a_line_what_they_cannot_do(address: DatabaseAddress) -> None:
    """Exit code 2 for wrong arguments, 1 for what cannot be done."""
    for arguments, code in REFUSED.items():
        done = invoke("callbacks", *arguments, **at(address))
        assert (done.returncode, done.stdout) == (code, ""), arguments
        assert code == 2 or done.stderr.count("\n") == 1, done.stderr


def freeze(server: OutsidePostgres) -> None:
    server.freeze()
    time.sleep(2)
    server.thaw()


def crash(server: OutsidePostgres) -> None:
    server.stop("immediate")
    time.sleep(1)
    server.start()


def test_postgres_goes_and_comes_back(
    data_dir: Path, orders: OrderServiceProcess, tmp_path: Path
) -> None:
    """With callbacks under way each time; they go on afterwards, and none is left out."""
    orders.script(Fault("slow", count=None, share=0.5, seed=SEED, seconds=0.3))
    with OutsidePostgres(data_dir / "outside") as server:
        settings = {**calling(server.address, orders), **server.settings}
        with ServiceProcess(tmp_path, **settings) as service:
            with Customers(service) as customers:
                for outage in (OutsidePostgres.terminate_backends, freeze, crash):
                    customers.wait_for(len(customers.answers) + 20)
                    outage(server)
                customers.wait_for(len(customers.answers) + 20)
            with server.connect() as connection:
                report = all_is_well(connection, orders, customers.answers)
            assert set(report.states) == {"delivered", "superseded"}
            assert service.terminate() == 0
        assert "unhandled error" not in service.log.read_text()
        assert "retrying" in service.log.read_text()
