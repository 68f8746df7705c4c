"""The simulated provider's ledger: what it has decided, for all processes and over every crash."""

import asyncio
from queue import SimpleQueue
from threading import Thread
from typing import Any

from payments.gateways import OutcomeUnknown
from payments.gateways.ledger_file import Asked, LedgerFile

CLOSE_WAIT_S = 1.0
AT_ONCE_MAX = 4  # decided in the event loop; what a flood brings must not hold it up
CHECKPOINT_EVERY = 2000  # that many are 8 MB of log, of which the file gets each page once

Waiting = list[tuple[Asked, asyncio.Future[Any]]]


class Ledger:
    """What is asked in one turn of the event loop is decided in one transaction, and at once: a
    write to the page cache costs less than waking a thread. What has to wait, for a lock or for
    the disk, waits in a thread. (Only the first write after another process's checkpoint may wait
    for the disk here: SQLite begins its log anew.)
    """

    def __init__(self, file: LedgerFile) -> None:
        """The file is its own from now on. Raises StartError."""
        self.file = file
        self._at_once = file.without_waiting()
        self._waiting: Waiting = []
        self._deciding = False
        self._closed = False
        self._since_checkpoint = 0
        self._batches: SimpleQueue[tuple[Waiting, asyncio.AbstractEventLoop, bool] | None]
        self._batches = SimpleQueue()
        self._thread = Thread(target=self._work, name="simulated ledger", daemon=True)
        self._thread.start()

    async def ask(self, asked: Asked) -> Any:
        """What LedgerFile.decide says of it. Raises OutcomeUnknown if the file fails."""
        loop = asyncio.get_running_loop()
        waiter: asyncio.Future[Any] = loop.create_future()
        self._waiting.append((asked, waiter))
        if not self._deciding:
            self._deciding = True
            loop.call_soon(self._decide, loop)  # with what else comes in this turn
        return await waiter

    async def close(self) -> None:
        self._closed = True
        self._batches.put(None)
        await asyncio.to_thread(self._thread.join, CLOSE_WAIT_S)

    def _decide(self, loop: asyncio.AbstractEventLoop) -> None:
        batch, self._waiting = self._waiting, []
        self._deciding = bool(batch)
        if not batch:
            return
        if self._closed:
            self._tell(batch, loop, OutcomeUnknown("simulated: the ledger is closed"))
            return
        self._since_checkpoint += len(batch)
        checkpoint = self._since_checkpoint >= CHECKPOINT_EVERY
        if checkpoint:
            self._since_checkpoint = 0
        elif len(batch) <= AT_ONCE_MAX and (told := self._decided_at_once(batch)) is not None:
            self._tell(batch, loop, told)
            return
        self._batches.put((batch, loop, checkpoint))

    def _decided_at_once(self, batch: Waiting) -> list[Any] | None:
        """None if that failed: the thread tries again, and tells why. Decisions are repeatable."""
        try:
            return self._at_once.decide([asked for asked, _ in batch])
        except Exception:  # noqa: BLE001 - a lock, mostly
            return None

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
        self._decide(loop)

    def _work(self) -> None:
        """The thread."""
        for batch, loop, checkpoint in iter(self._batches.get, None):
            told: list[Any] | Exception
            try:
                if checkpoint:  # first: whoever writes after it waits for the disk once more
                    self.file.checkpoint()
                told = self.file.decide([asked for asked, _ in batch])
            except Exception as error:  # noqa: BLE001 - it must reach those that wait
                told = OutcomeUnknown(f"simulated: ledger: {error}")
            loop.call_soon_threadsafe(self._tell, batch, loop, told)
        self._at_once.close()
        self.file.close()
