"""Keeps the embedded server running for a long-running process.

A killed server, for example by the kernel for lack of memory, must not leave the process without a
database. It is restarted at the same socket, to which its users reconnect.
"""

import threading
import time
from collections.abc import Callable
from typing import Self

from loguru import logger

from payments.embedded_postgres import EmbeddedPostgres

LOOK_S = 0.2
START_TIMEOUT_S = 300.0  # a recovery reads at most max_wal_size: 1 GB
# Starts count as in a row until the server has run for STEADY_S. The pause grows with their number.
STEADY_S = 10.0
PAUSE_MAX_S = 10.0
STARTS_MAX = 10  # in a row: about a minute


class Keeper:
    """Restarts the server whenever it ends, within a `with` block.

    If restarts fail, `lost` says why, and `on_lost` is called once, in the keeper's thread.
    """

    def __init__(self, server: EmbeddedPostgres, on_lost: Callable[[], None]) -> None:
        self.lost: str | None = None
        self._server = server
        self._on_lost = on_lost
        self._left = threading.Event()
        self._thread = threading.Thread(target=self._run, name="keeper", daemon=True)

    def __enter__(self) -> Self:
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._left.set()
        self._thread.join(timeout=1.0)  # a running start ends once no process uses the server

    def _run(self) -> None:
        in_a_row, last_at = 0, time.monotonic()
        while not self._left.wait(_pause_s(in_a_row)):
            failure = None
            try:
                if not self._server.start_if_stopped(timeout_s=START_TIMEOUT_S):
                    if self._server.is_ready() and time.monotonic() - last_at > STEADY_S:
                        in_a_row = 0
                    continue
            except Exception as error:  # noqa: BLE001 - retried after any error
                failure = str(error) or repr(error)
            if self._left.is_set():
                return
            in_a_row, last_at = in_a_row + 1, time.monotonic()
            if in_a_row > STARTS_MAX:
                self._lose(failure or f"it stopped {STARTS_MAX} times in a row")
                return
            _tell(in_a_row, failure)

    def _lose(self, reason: str) -> None:
        self.lost = f"the embedded Postgres cannot be kept running: {reason}"
        logger.bind(reason=reason).critical("the embedded Postgres cannot be kept running")
        self._on_lost()


def _pause_s(in_a_row: int) -> float:
    return min(LOOK_S * 2.0 ** max(0, in_a_row - 1), PAUSE_MAX_S)


def _tell(in_a_row: int, failure: str | None) -> None:
    log = logger.bind(starts_in_a_row=in_a_row)
    if failure is None:
        log.warning("the embedded Postgres had stopped and was restarted")
    else:
        log.bind(reason=failure).warning(
            "the embedded Postgres is stopped and cannot be restarted yet"
        )
