"""The simulated provider's ledger: what it has decided, for all processes and over every crash."""

import asyncio
import errno
import fcntl
import mmap
import os
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from queue import SimpleQueue
from threading import Thread
from typing import Any
from uuid import UUID

import msgspec

from payments.errors import StartError
from payments.gateways import OutcomeUnknown

RECENT_MAX = 20_000  # decisions kept in memory: some seconds of the highest load
READ_MAX = 1 << 20
LOCK_WAIT_S = 1.0  # another process holds the lock for microseconds


class Decision(msgspec.Struct, frozen=True, array_like=True):
    """One line of the ledger; `outcome` is `approved` or a decline code."""

    payment_id: UUID
    amount_cents: int
    currency: str
    outcome: str


class _Job(msgspec.Struct, frozen=True):
    """Some items, what the thread does with them, and who waits for each result."""

    action: Callable[[list[Any]], list[Any]]
    items: list[Any]
    waiters: list[Any]
    loop: Any


class Ledger:
    """An append-only file of JSON lines that all processes share, behind one thread.

    An id's first line is its outcome; if another ever follows, it is a repetition and captured
    nothing. The newest RECENT_MAX decisions are kept in memory, older ones are looked up in the
    file. All charges that wait together are written together. The file is not flushed to disk: it
    survives a kill of every process, not a power cut.
    """

    def __init__(self, path: Path | None) -> None:
        """Without a path there is no file, and what is not recent is forgotten."""
        self._recent: dict[UUID, Decision] = {}
        self._read_to = 0
        self._file: int | None = None
        if path is not None:
            try:
                path.parent.mkdir(parents=True, exist_ok=True)
                self._file = os.open(path, os.O_RDWR | os.O_APPEND | os.O_CREAT, 0o600)
                self._read_to = self._start_of_recent(self._file)
                self._find(UUID(int=0))
            except (OSError, msgspec.MsgspecError) as error:
                reason = error.strerror if isinstance(error, OSError) else "it is not such a ledger"
                raise StartError(f"SIMULATED_LEDGER: cannot use {str(path)!r}: {reason}") from None
        self._waiting: list[tuple[Decision, asyncio.Future[Decision]]] = []
        self._deciding = False
        # One thread and a queue; an executor costs more than the writing.
        self._jobs: SimpleQueue[_Job | None] = SimpleQueue()
        self._thread = Thread(target=self._work, name="simulated ledger", daemon=True)
        self._thread.start()

    async def decide(self, decision: Decision) -> Decision:
        """The decision that stands for this payment id: this one, unless there was one before.

        Raises OutcomeUnknown if the file fails.
        """
        loop = asyncio.get_running_loop()
        waiter: asyncio.Future[Decision] = loop.create_future()
        self._waiting.append((decision, waiter))
        if not self._deciding:
            self._deciding = True
            loop.call_soon(self._decide_waiting, loop)  # with whoever comes in this turn
        return await waiter

    async def find(self, payment_id: UUID) -> Decision | None:
        """The decision about this payment id, None if there is none; OutcomeUnknown as above."""
        loop = asyncio.get_running_loop()
        waiter: asyncio.Future[Decision | None] = loop.create_future()
        self._submit(_Job(self._find_all, [payment_id], [waiter], loop))
        return await waiter

    async def close(self) -> None:
        self._jobs.put(None)
        await asyncio.to_thread(self._thread.join, LOCK_WAIT_S)
        if self._file is not None and not self._thread.is_alive():
            os.close(self._file)
            self._file = None

    def _decide_waiting(self, loop: asyncio.AbstractEventLoop) -> None:
        batch, self._waiting = self._waiting, []
        self._deciding = bool(batch)
        if batch:
            decisions, waiters = zip(*batch, strict=True)
            self._submit(_Job(self._decide, list(decisions), list(waiters), loop))

    def _submit(self, job: _Job) -> None:
        if self._thread.is_alive():
            self._jobs.put(job)
        else:
            self._tell(job, OutcomeUnknown("simulated: the ledger is closed"))

    def _work(self) -> None:
        """The thread."""
        for job in iter(self._jobs.get, None):
            result: list[Any] | Exception
            try:
                result = job.action(job.items)
            except Exception as error:  # noqa: BLE001 - whoever waits must hear of it
                result = OutcomeUnknown(f"simulated: ledger: {error}")
            job.loop.call_soon_threadsafe(self._tell, job, result)

    def _tell(self, job: _Job, result: list[Any] | Exception) -> None:
        for place, waiter in enumerate(job.waiters):
            if waiter.done():
                continue
            if isinstance(result, Exception):
                waiter.set_exception(result)
            else:
                waiter.set_result(result[place])
        if job.action == self._decide:
            self._decide_waiting(job.loop)

    def _decide(self, decisions: list[Decision]) -> list[Decision]:
        with self._locked():
            self._catch_up()
            new: dict[UUID, Decision] = {}
            for line in decisions:
                if line.payment_id not in self._recent:
                    new.setdefault(line.payment_id, line)
            self._append(b"".join(msgspec.json.encode(line) + b"\n" for line in new.values()))
            standing = [
                new.get(each.payment_id) or self._recent[each.payment_id] for each in decisions
            ]
            self._remember(new)
        return standing

    def _find_all(self, payment_ids: list[UUID]) -> list[Decision | None]:
        return [self._find(payment_id) for payment_id in payment_ids]

    def _find(self, payment_id: UUID) -> Decision | None:
        with self._locked():
            self._catch_up()
        if payment_id in self._recent or not self._read_to or self._file is None:
            return self._recent.get(payment_id)
        with mmap.mmap(self._file, self._read_to, access=mmap.ACCESS_READ) as text:
            start = text.find(b'["%s"' % str(payment_id).encode())
            if start < 0:
                return None
            return msgspec.json.decode(text[start : text.find(b"\n", start)], type=Decision)

    @staticmethod
    def _start_of_recent(file: int) -> int:
        """Where a line begins, about RECENT_MAX lines before the end."""
        near = max(0, os.fstat(file).st_size - RECENT_MAX * 100)
        return near and near + os.pread(file, 1000, near).find(b"\n") + 1

    @contextmanager
    def _locked(self) -> Iterator[None]:
        """Between looking and writing no other process may decide."""
        if self._file is None:
            yield
            return
        deadline = time.monotonic() + LOCK_WAIT_S
        while True:
            try:
                fcntl.flock(self._file, fcntl.LOCK_EX | fcntl.LOCK_NB)
                break
            except BlockingIOError:  # another process is writing, or was frozen while it was
                if time.monotonic() > deadline:
                    raise
                time.sleep(0.001)
        try:
            yield
        finally:
            fcntl.flock(self._file, fcntl.LOCK_UN)

    def _catch_up(self) -> None:
        """Reads what other processes, or earlier ones, have decided."""
        if self._file is None:
            return
        end = os.fstat(self._file).st_size
        while self._read_to < end:
            text = os.pread(self._file, READ_MAX, self._read_to)
            text = text[: text.rfind(b"\n") + 1]
            if not text:  # half a line: its writer died on a full disk
                os.ftruncate(self._file, self._read_to)
                return
            for line in text.splitlines():
                decision = msgspec.json.decode(line, type=Decision)
                self._remember({decision.payment_id: decision})
            self._read_to += len(text)

    def _append(self, text: bytes) -> None:
        """All or nothing: half a line would be nobody's decision."""
        if self._file is None or not text:
            return
        written = os.write(self._file, text)
        if written != len(text):
            os.ftruncate(self._file, self._read_to)
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        self._read_to += written

    def _remember(self, lines: dict[UUID, Decision]) -> None:
        for payment_id, line in lines.items():
            self._recent.setdefault(payment_id, line)
        while len(self._recent) > RECENT_MAX:
            del self._recent[next(iter(self._recent))]
