"""A service process that is stopped for a while, with requests in its sockets: it charges nobody
who has given up meanwhile, and everybody who has not."""

import signal
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import msgspec
import psycopg
import pytest

from payments.database.connections import DatabaseAddress
from payments.payment.identity import payment_id_for
from tests.callbacks.sales import new_orders
from tests.commands.looking import topics
from tests.doubles.order_bookings import Purchase
from tests.doubles.order_seats import Seating
from tests.doubles.order_service import Options, OrderServiceProcess
from tests.edge.raw import Connection, code_of
from tests.edge.requests import charge
from tests.process import ServiceProcess, at
from tests.support import eventually, ledger_rows

DEADLINE_S = 3.0
PER_S, STOPPED_S, TIMES = 12.0, 10.0, 10
SERVED_S = 6.0  # of CHARGE_DEADLINE_S; the rest is for the machine to begin

# When each intent was stored.
BEGUN = """
SELECT state, extract(epoch FROM recorded_at)::float
  FROM payment_events WHERE topic = 'PaymentInitiated'
"""


@contextmanager
def stopped(service: ServiceProcess) -> Iterator[None]:
    service.process.send_signal(signal.SIGSTOP)
    try:
        yield
    finally:
        service.process.send_signal(signal.SIGCONT)


def key(name: str) -> bytes:
    return b"Idempotency-Key: %s\r\n" % name.encode()


def captures(ledger: Path) -> set[str]:
    return {str(row.id) for row in ledger_rows(ledger)}


def test_who_gave_up_while_it_was_stopped_is_not_charged(
    address: DatabaseAddress, connection: psycopg.Connection[Any], tmp_path: Path
) -> None:
    ledger = tmp_path / "ledger.sqlite"
    settings = {"SIMULATED_LEDGER": ledger, "CHARGE_DEADLINE_S": DEADLINE_S}
    settings |= {"GATEWAY_TIMEOUT_S": DEADLINE_S - 0.5}
    gave_up = [f"gave up {number}" for number in range(8)]
    with ServiceProcess(tmp_path, **at(address), **settings) as service:
        with Connection(service.port) as client:
            client.send(charge(key=key("known")))
            known = client.answer()
            assert known is not None
            assert known.status == 201
        waiting = {name: Connection(service.port) for name in ("waited", "known", "refund", "new")}
        connected = [Connection(service.port) for _ in gave_up[::2]]
        with stopped(service):
            connected += [Connection(service.port) for _ in gave_up[1::2]]
            for name, each in zip(gave_up, connected, strict=True):
                with each:
                    each.send(charge(key=key(name)))
            for name in ("waited", "known"):
                waiting[name].send(charge(key=key(name)))
            refund = b'{"payment_id": "%s"}' % known.json()["id"].encode()
            line = b"POST /v1/refund HTTP/1.1\r\n"
            waiting["refund"].send(charge(refund, line=line, key=b""))
            time.sleep(DEADLINE_S + 0.2)
            waiting["new"].send(charge(key=key("new")))
            waiting["new"].half_close()
        answers = {name: each.answer() for name, each in waiting.items()}
        assert {name: answer.status for name, answer in answers.items() if answer} == {
            "waited": 503,
            "known": 201,
            "refund": 201,
            "new": 201,
        }
        assert answers["waited"] is not None
        assert code_of(answers["waited"]) == "client_gone"
        assert answers["waited"].headers["retry-after"] == "1"
        assert answers["known"] is not None
        assert answers["known"].json() == known.json()
        for each in waiting.values():
            each.__exit__(None, None, None)
        counted = f'payments_charges_total{{outcome="client_gone"}} {len(gave_up) + 1}.0'
        eventually(lambda: counted in metrics(service))
        # What was refused is not used up.
        with Connection(service.port) as client:
            client.send(charge(key=key("waited")))
            assert (answer := client.answer()) is not None
            assert answer.status == 201
    charged = {str(payment_id_for(name)) for name in ("known", "new", "waited")}
    assert {id for id in captures(ledger) if id in charged} == charged
    for name in gave_up:
        assert str(payment_id_for(name)) not in captures(ledger)
        assert topics(connection, payment_id_for(name)) == []


def metrics(service: ServiceProcess) -> str:
    with Connection(service.port) as client:
        client.send(b"GET /metrics HTTP/1.1\r\nHost: x\r\n\r\n")
        answer = client.answer()
    return answer.body.decode() if answer is not None else ""


@pytest.mark.timeout(600)
def test_sales_go_on_while_it_is_stopped_ten_times(
    address: DatabaseAddress,
    connection: psycopg.Connection[Any],
    tmp_path: Path,
    long_run: bool,
) -> None:
    """Order Service gives up after 8 s. The figures are printed."""
    if not long_run:
        pytest.skip("it takes minutes: --long")
    sold_at: dict[str, float] = {}
    stops: list[tuple[float, float]] = []
    ledger = tmp_path / "ledger.sqlite"
    with OrderServiceProcess(Options(seating=Seating(unanswered="FAILED"))) as orders:

        def sell(seconds: float) -> None:
            began = time.monotonic()
            for number, order_id in enumerate(new_orders(round(seconds * PER_S))):
                time.sleep(max(0.0, began + number / PER_S - time.monotonic()))
                sold_at[order_id] = time.time()
                seats = (f"seat of {order_id}",)
                orders.sell(Purchase(service.url, order_id, f"{order_id}-pay", seats))

        settings = at(address) | {"ORDER_CALLBACK_URL": orders.url, "SIMULATED_LEDGER": ledger}
        with ServiceProcess(tmp_path, **settings) as service:
            for _ in range(TIMES):
                sell(1)
                with stopped(service):
                    began = time.time()
                    sell(STOPPED_S)
                stops.append((began, time.time()))
                sell(3)
            eventually(lambda: orders.selling == 0)
            told = {each: order.charges[-1] for each, order in orders.book.items()}
    begun = {
        str(msgspec.json.decode(state)["merchant_order_id"]): at_s
        for state, at_s in connection.execute(BEGUN)
    }
    paid = captures(ledger)
    late = [each for each, at_s in begun.items() if at_s - sold_at[each] >= 7]
    served = [each for each, at_s in sold_at.items() if is_served(at_s, stops)]
    unserved = {each: told[each] for each in served if told[each] != "SUCCESS"}
    unheard = [
        each
        for each in sold_at
        if told[each] != "SUCCESS" and str(payment_id_for(f"{each}-pay")) in paid
    ]
    sys.stdout.write(
        f"{len(sold_at)} sold, {len(begun)} begun, {len(late)} of them too late, {len(paid)} paid; "
        f"of {len(served)} clients that still waited {len(unserved)} not told SUCCESS: {unserved}; "
        f"{len(unheard)} paid without a response, under way when it was stopped\n"
    )
    assert (late, unserved) == ([], {})
    assert all(any(-1 < began - sold_at[each] < 0.5 for began, _ in stops) for each in unheard)


def is_served(sold_at: float, stops: list[tuple[float, float]]) -> bool:
    """Whether the service ran, and was not stopped at once, or went on while its client waited."""
    return all(sold_at < began - 0.5 or sold_at > ended - SERVED_S for began, ended in stops)
