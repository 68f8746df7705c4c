"""The real service: killed, stopped, frozen and cut off from its database."""

import os
import signal
import socket
import sqlite3
import threading
import time
import uuid
from contextlib import closing
from pathlib import Path
from typing import Any

import httpx
import psycopg
import pytest

from payments import embedded_postgres
from payments.payment.identity import payment_id_for
from tests.crash.client import PAUSE_S
from tests.machine import within
from tests.outside_postgres import OutsidePostgres
from tests.process import ServiceProcess
from tests.support import eventually, ledger_rows


class Load:
    """Charges from several threads until told to stop; remembers every answer."""

    def __init__(self, service: ServiceProcess, threads: int = 6) -> None:
        self.answers: list[tuple[str, int, Any, float]] = []  # key, status (0: none), body, seconds
        self._service = service
        self._stopped = threading.Event()
        self._threads = [threading.Thread(target=self._run, args=(n,)) for n in range(threads)]

    def __len__(self) -> int:
        return len(self._threads)

    def __enter__(self) -> "Load":
        for thread in self._threads:
            thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._stopped.set()
        for thread in self._threads:
            thread.join(timeout=20)

    def _run(self, number: int) -> None:
        with httpx.Client(timeout=15) as client:
            while not self._stopped.is_set():
                key = f"{number}-{uuid.uuid4()}"
                started = time.monotonic()
                try:
                    response = self._service.charge(client, key)
                    status, body = response.status_code, response.json()
                except httpx.TransportError:
                    status, body = 0, None
                self.answers.append((key, status, body, time.monotonic() - started))
                self._stopped.wait(PAUSE_S)

    def wait_for(self, count: int) -> None:
        """Until so many charges were captured."""
        eventually(lambda: [status for _, status, *_ in list(self.answers)].count(201) >= count)


def events_of(data_dir: Path) -> dict[uuid.UUID, list[str]]:
    """payment id -> topics, from the stopped service's database."""
    with embedded_postgres.start(data_dir) as server:
        conninfo = f"host={server.socket_dir} port={server.port} user={server.user}"
        with psycopg.connect(f"{conninfo} dbname=paymentdb") as connection:
            rows = connection.execute(
                "SELECT originator_id, array_agg(topic ORDER BY originator_version)"
                " FROM payment_events GROUP BY 1"
            ).fetchall()
    return dict(rows)


def captured_by_provider(data_dir: Path) -> set[uuid.UUID]:
    decided = ledger_rows(data_dir / "simulated-ledger.sqlite")
    assert {row.outcome for row in decided} == {"approved"}
    return {row.id for row in decided}


@pytest.mark.timeout(3600)
def test_kill_9_under_load_loses_no_answered_charge_and_doubles_none(
    data_dir: Path, pytestconfig: pytest.Config
) -> None:
    kills: int = pytestconfig.getoption("--kills")
    service = ServiceProcess(data_dir, CHARGE_DEADLINE_S=1, GATEWAY_TIMEOUT_S=0.9)
    answers: list[tuple[str, int, Any, float]] = []
    for number in range(kills):
        with service, Load(service) as load:
            load.wait_for(10 + 3 * number)
            service.kill()
        answers += load.answers
    time.sleep(1.1)  # the runs of the last kill are over: a retry settles them
    with service, httpx.Client(timeout=15) as client:
        unanswered = [key for key, status, _, _ in answers if status == 0]
        for key in unanswered:
            assert service.charge(client, key).status_code == 201
        service.terminate()
    events = events_of(data_dir)
    answered = {payment_id_for(key) for key, status, _, _ in answers if status == 201}
    assert len(answered) > kills * 10
    assert answered <= events.keys(), "an answered charge is not in the log"
    assert set(map(tuple, events.values())) == {("PaymentInitiated", "PaymentCharged")}
    assert captured_by_provider(data_dir) == events.keys()


def test_sigterm_to_the_whole_group_under_load(data_dir: Path) -> None:
    """Every charge that was accepted is answered, the exit code is 0, and nothing is left."""
    service = ServiceProcess(data_dir, SIMULATED_FAULTS="delay=0.3").start()
    with Load(service, threads=12) as load:
        load.wait_for(30)
        with within(9):
            assert service.terminate(group=True) == 0
    # Connections that came after the listener closed are refused; none was cut off in the middle.
    assert {status for _, status, _, _ in load.answers} <= {0, 201}
    events = events_of(data_dir)
    answered = {payment_id_for(key) for key, status, _, _ in load.answers if status == 201}
    assert answered == events.keys(), "a charge was begun and not answered"
    assert set(map(tuple, events.values())) == {("PaymentInitiated", "PaymentCharged")}


def test_a_charge_that_was_answered_202_is_finished_before_the_exit(data_dir: Path) -> None:
    settings = {"CHARGE_DEADLINE_S": 0.5, "GATEWAY_TIMEOUT_S": 0.4}
    with (
        ServiceProcess(data_dir, SIMULATED_FAULTS="answer_lost*1", **settings) as service,
        httpx.Client() as client,
    ):
        response = service.charge(client, "k")
        assert (response.status_code, response.json()["status"]) == (202, "PENDING")
        assert service.terminate() == 0


def test_two_services_share_the_embedded_server(data_dir: Path) -> None:
    with ServiceProcess(data_dir) as one, ServiceProcess(data_dir) as two, httpx.Client() as client:
        first = one.charge(client, "k")
        again = two.charge(client, "k")
        assert again.headers["idempotent-replayed"] == "true"
        assert again.content == first.content
        one.kill()
        assert two.charge(client, "l").status_code == 201


@pytest.mark.parametrize("frozen", [True, False], ids=["frozen", "stopped"])
def test_a_sigterm_while_the_database_is_away(data_dir: Path, frozen: bool) -> None:
    """Who waits is told, and the exit code is 0."""
    with OutsidePostgres(data_dir / "outside") as server:
        service = ServiceProcess(data_dir, **server.settings).start()
        with Load(service) as load:
            load.wait_for(20)
            if frozen:
                server.freeze()
            else:
                server.stop("immediate")
            time.sleep(0.5)
            sent = len(load.answers)
            with within(9):
                assert service.terminate() == 0
        under_way = load.answers[sent:][: len(load)]
        # Who came when the door was closed already (0) was sent away at once.
        answered = {status for _, status, _, took_s in under_way if status or took_s > 0.1}
        assert answered <= {201, 202, 503}, "cut off"


def test_a_charge_whose_body_comes_after_the_sigterm_is_answered(data_dir: Path) -> None:
    """The provider is asked and slow: PENDING in time, not an error, and exit 0."""
    body = b'{"merchant_order_id":"f50d9fa2-5d3e-4e49-9a02-218ad32ef4a9","amount_cents":5}'
    head = b"POST /v1/charge HTTP/1.1\r\nHost: x\r\nContent-Type: application/json\r\n"
    head += b"Idempotency-Key: k\r\nContent-Length: %d\r\n\r\n" % len(body)
    with (
        ServiceProcess(data_dir, SIMULATED_FAULTS="delay=5") as service,
        socket.create_connection(("127.0.0.1", service.port), timeout=15) as connection,
    ):
        connection.sendall(head)
        time.sleep(0.3)
        service.process.terminate()
        time.sleep(3)
        with within(6.5):
            connection.sendall(body)
            assert connection.recv(65536).startswith(b"HTTP/1.1 202")
            assert service.process.wait(timeout=10) == 0


def test_a_ledger_that_somebody_holds_does_not_keep_the_service_from_stopping(
    data_dir: Path,
) -> None:
    with (
        ServiceProcess(data_dir) as service,
        httpx.Client(timeout=15) as client,
        closing(sqlite3.connect(data_dir / "simulated-ledger.sqlite")) as ledger,
    ):
        ledger.execute("BEGIN IMMEDIATE")
        assert service.charge(client, "k").status_code == 202
        with within(9):
            assert service.terminate() == 0


def test_the_service_survives_its_terminal(data_dir: Path) -> None:
    """SIGINT is Ctrl-C: an orderly stop with exit code 0."""
    service = ServiceProcess(data_dir).start()
    os.kill(service.process.pid, signal.SIGINT)
    assert service.process.wait(timeout=10) == 0
