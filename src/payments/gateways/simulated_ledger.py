"""The simulated provider's ledger: what it has decided, for all processes and over every crash."""

import asyncio
from queue import SimpleQueue
from threading import Thread
from typing import Any

from payments.gateways import OutcomeUnknown
from payments.gateways.ledger_file import Asked, LedgerFile

CLOSE_WAIT_S = 1.0

Waiting = list[tuple[Asked, asyncio.Future[Any]]]


class Ledger:
    """The file behind one thread, so that the event loop waits neither for the disk nor for a lock.

    What waits together is decided in one transaction.
    """

    def __init__(self, file: LedgerFile) -> None:
        """The file is its own from now on."""
        self.file = file
        self._waiting: Waiting = []
        self._deciding = False
        # One thread and a queue; an executor costs more than the writing.
        self._batches: SimpleQueue[tuple[Waiting, asyncio.AbstractEventLoop] | None] = SimpleQueue()
        self._thread = Thread(target=self._work, name="simulated ledger", daemon=True)
        self._thread.start()

    async def ask(self, asked: Asked) -> Any:
        """What LedgerFile.decide says of it. Raises OutcomeUnknown if the file fails."""
        loop = asyncio.get_running_loop()
        waiter: asyncio.Future[Any] = loop.create_future()
        self._waiting.append((asked, waiter))
        if not self._deciding:
            self._deciding = True
            loop.call_soon(self._submit, loop)  # with what else comes in this turn
        return await waiter

    async def close(self) -> None:
        self._batches.put(None)
        await asyncio.to_thread(self._thread.join, CLOSE_WAIT_S)

    def _submit(self, loop: asyncio.AbstractEventLoop) -> None:
        batch, self._waiting = self._waiting, []
        self._deciding = bool(batch)
        if batch and self._thread.is_alive():
            self._batches.put((batch, loop))
        elif batch:
            self._tell(batch, loop, OutcomeUnknown("simulated: the ledger is closed"))

    def _tell(
        self, batch: Waiting, loop: asyncio.AbstractEventLoop, told: list[Any] | Exception
    ) -> None:
        for place, (_, waiter) in enumerate(batch):
            if waiter.done():
                continue
            if isinstance(told, Exception):
                waiter.set_exception(told)
            else:
                waiter.set_result(told[place])
        self._submit(loop)

    def _work(self) -> None:
        """The thread."""
        for batch, loop in iter(self._batches.get, None):
            told: list[Any] | Exception
            try:
                told = self.file.decide([asked for asked, _ in batch])
            except Exception as error:  # noqa: BLE001 - it must reach those that wait
                told = OutcomeUnknown(f"simulated: ledger: {error}")
            loop.call_soon_threadsafe(self._tell, batch, loop, told)
        self.file.close()
