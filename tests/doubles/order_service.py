"""Order Service as its callers meet it, as a process of its own.

    python -m tests.doubles.order_service [--port N] [--log FILE] [--careful] [--secret SECRET] …
    python -m tests.doubles.order_service --seating '{"takes_s":6}' --fault '{"kind":"503",
        "count":null,"shards":2,"shard":1,"retry_after":"3600"}'

listens on 127.0.0.1 and prints its port as one line. It ends on SIGTERM, when its stdin is closed
(its parent is gone) and after LIFE_MAX_S. Tests use OrderServiceProcess, or, in an event loop of
their own, OrderService. What it does: order_receiver.py.
"""

import argparse
import asyncio
import signal
import sys
from contextlib import suppress
from pathlib import Path
from typing import Any

import msgspec

from tests.doubles.controlled import ControlledProcess
from tests.doubles.order_bookings import Booking, Purchase
from tests.doubles.order_faults import Fault, Script
from tests.doubles.order_receiver import TODAY, WAIT_MAX_S, Options, OrderService, Stage, url_of
from tests.doubles.order_requests import CALLBACK_PATH, ORDERS_PATH, Request, findings
from tests.doubles.order_seats import Seating
from tests.doubles.order_states import OrderState

__all__ = ["Fault", "Options", "OrderService", "OrderServiceProcess", "Request", "findings"]

LIFE_MAX_S = 900.0
COMMAND_BYTES_MAX = 1 << 20


def _say(line: str) -> None:
    sys.stdout.write(f"{line}\n")
    sys.stdout.flush()


async def _obey(service: OrderService, command: dict[str, Any]) -> Any:
    """One command of OrderServiceProcess."""
    match command["do"]:
        case "script":
            service.script(*msgspec.convert(command["faults"], list[Fault]))
        case "listen":
            await service.listen()
        case "refuse":
            service.refuse()
        case "close_idle":
            service.close_idle()
        case "wait_for":
            try:
                await service.wait_for(command["count"], command["stage"], command["timeout_s"])
            except TimeoutError:
                return False
        case "requests":
            return service.requests
        case "orders":
            return service.orders
        case "findings":
            return service.findings()
        case "counts":
            return service.counts
        case "connections":
            return service.connections
        case "lookups":
            return service.lookups
        case _:
            return await _obey_seated(service, command)
    return True


async def _obey_seated(service: OrderService, command: dict[str, Any]) -> Any:
    """One that is about seats and charges."""
    match command["do"]:
        case "book":
            return service.book
        case "seat":
            service.seat(msgspec.convert(command["seating"], Seating))
            return True
        case "sell":
            return service.sell(msgspec.convert(command["purchase"], Purchase))
        case "selling":
            return service.sales.under_way
        case "refund":
            return await service.sales.refund(
                command["url"], command["order_id"], command["payment_id"]
            )
    raise ValueError(command["do"])


async def _run(options: Options, port: int, faults: list[Fault]) -> None:
    service = OrderService(options, port)
    service.script(*faults)
    loop = asyncio.get_running_loop()
    stop = asyncio.Event()
    loop.add_signal_handler(signal.SIGTERM, stop.set)
    commands = asyncio.StreamReader(limit=COMMAND_BYTES_MAX)
    await loop.connect_read_pipe(lambda: asyncio.StreamReaderProtocol(commands), sys.stdin)
    _say(str(await service.listen()))

    async def obey() -> None:
        while command := await commands.readline():
            answered = await _obey(service, msgspec.json.decode(command))
            _say(msgspec.json.encode(answered).decode())
        stop.set()

    obeying = asyncio.create_task(obey())
    with suppress(TimeoutError):
        await asyncio.wait_for(stop.wait(), LIFE_MAX_S)
    obeying.cancel()
    await service.close()


class OrderServiceProcess(ControlledProcess):
    """Order Service for a test, in a process of its own. Its port stays the same over restarts, and
    so do its orders and requests if there is a log; its faults do not."""

    def __init__(self, options: Options = TODAY, port: int = 0) -> None:
        self._options = options
        arguments = ["--issue-takes-s", str(options.issue_takes_s)]
        arguments += [] if options.naive else ["--careful"]
        arguments += ["--bare"] if options.bare else []
        arguments += ["--log", str(options.log)] if options.log else []
        arguments += ["--tls", str(options.tls)] if options.tls else []
        if options.seating is not None:
            arguments += ["--seating", msgspec.json.encode(options.seating).decode()]
        for secret in options.secrets:
            arguments += ["--secret", secret]
        super().__init__("tests.doubles.order_service", arguments, port)

    @property
    def url(self) -> str:
        return url_of(self._options, self.port)

    @property
    def orders_url(self) -> str:
        """Of one order, with {order_id} in its place."""
        return f"{self.url.removesuffix(CALLBACK_PATH)}{ORDERS_PATH}{{order_id}}"

    def script(self, *faults: Fault) -> None:
        """As OrderService.script(), and so on."""
        Script(faults)  # a wrong one raises here
        self._ask(bool, do="script", faults=faults)

    def listen(self) -> None:
        self._ask(bool, do="listen")

    def refuse(self) -> None:
        self._ask(bool, do="refuse")

    def close_idle(self) -> None:
        self._ask(bool, do="close_idle")

    def wait_for(
        self, count: int, stage: Stage = "finished", timeout_s: float = WAIT_MAX_S
    ) -> None:
        if not self._ask(bool, do="wait_for", count=count, stage=stage, timeout_s=timeout_s):
            raise TimeoutError(f"of {count} requests {self.counts[stage]} are {stage}")

    @property
    def requests(self) -> list[Request]:
        return self._ask(list[Request], do="requests")

    @property
    def orders(self) -> dict[str, OrderState]:
        return self._ask(dict[str, OrderState], do="orders")

    @property
    def counts(self) -> dict[Stage, int]:
        return self._ask(dict[Stage, int], do="counts")

    @property
    def connections(self) -> int:
        return self._ask(int, do="connections")

    def findings(self) -> list[str]:
        return self._ask(list[str], do="findings")

    @property
    def lookups(self) -> list[str]:
        return self._ask(list[str], do="lookups")

    @property
    def book(self) -> dict[str, Booking]:
        return self._ask(dict[str, Booking], do="book")

    def seat(self, seating: Seating) -> None:
        self._ask(bool, do="seat", seating=seating)

    def sell(self, purchase: Purchase) -> bool:
        return self._ask(bool, do="sell", purchase=purchase)

    @property
    def selling(self) -> int:
        """Charges that wait for their response."""
        return self._ask(int, do="selling")

    def refund(self, url: str, order_id: str, payment_id: str) -> str:
        return self._ask(str, do="refund", url=url, order_id=order_id, payment_id=payment_id)


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m tests.doubles.order_service")
    parser.add_argument("--port", type=int, default=0)
    parser.add_argument("--log", type=Path)
    parser.add_argument("--careful", action="store_true", help="not naive")
    parser.add_argument("--secret", action="append", default=[])
    parser.add_argument("--issue-takes-s", type=float, default=TODAY.issue_takes_s)
    parser.add_argument("--tls", type=Path, metavar="DIRECTORY")
    parser.add_argument("--bare", action="store_true", help="count, and keep nothing")
    parser.add_argument("--seating", metavar="JSON", help="the fields of Seating; {} for seats")
    parser.add_argument(
        "--fault", metavar="JSON", action="append", default=[], help="the fields of a Fault"
    )
    given = parser.parse_args()
    options = Options(
        naive=not given.careful,
        secrets=tuple(given.secret),
        issue_takes_s=given.issue_takes_s,
        log=given.log,
        tls=given.tls,
        bare=given.bare,
        seating=msgspec.json.decode(given.seating, type=Seating) if given.seating else None,
    )
    faults = [msgspec.json.decode(fault, type=Fault) for fault in given.fault]
    asyncio.run(_run(options, given.port, faults))


if __name__ == "__main__":
    main()
