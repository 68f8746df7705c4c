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
from typing import Any, Literal
from uuid import UUID

import msgspec

from payments.errors import StartError
from payments.gateways import OutcomeUnknown, ProviderRefund

RECENT_MAX = 20_000  # charges kept in memory, and refunds: some seconds of the highest load
MARKS = 1 << 20  # with 10,000 refunds, one id in fifty is searched for though it is not there
READ_MAX = 1 << 20
LOCK_WAIT_S = 1.0  # another process holds the lock for microseconds
_REFUND = b',"refund",'  # in every refund line and in no other


class Decision(msgspec.Struct, frozen=True, array_like=True):
    """A charge's line in the ledger, by payment id; `outcome` is `approved` or a decline code."""

    id: UUID
    amount_cents: int
    currency: str
    outcome: str


class Refund(Decision, frozen=True, array_like=True):
    """A refund's line: as a charge's, by refund id, and two elements more."""

    kind: Literal["refund"]
    payment_id: UUID


class Refunded(Decision, frozen=True, array_like=True):
    """A charge in memory whose refunds are known: how many cents they gave back. Never written."""

    given_back: int


# What becomes of a refund, given the charge (None: there is none) and the cents given back so far.
RefundRule = Callable[[ProviderRefund, Decision | None, int], str]


class _Job(msgspec.Struct, frozen=True):
    """Some items, what the thread does with them, and who waits for each result."""

    action: Callable[[list[Any]], list[Any]]
    items: list[Any]
    waiters: list[Any]
    loop: Any


class Ledger:
    """An append-only file of JSON lines that all processes share, behind one thread.

    A payment id's first line is its outcome; if another ever follows, it is a repetition and
    captured nothing. A refund id has one line. The newest RECENT_MAX charges and as many refunds
    are kept in memory, older ones are looked up in the file. All charges that wait together are
    written together. The file is not flushed to disk: it survives a kill of every process, not a
    power cut.
    """

    def __init__(self, path: Path | None, refund_rule: RefundRule) -> None:
        """Without a path there is no file, and what is not recent is forgotten."""
        self._refund_rule = refund_rule
        self._recent: dict[UUID, Decision] = {}
        self._recent_refunds: dict[UUID, Refund] = {}
        # Every refund line marks its two ids. What has no mark is in no refund line: a first
        # refund needs no search of the file. What has one may share it with another id.
        self._marks = bytearray(MARKS)
        self._read_to = 0
        self._file: int | None = None
        if path is not None:
            try:
                path.parent.mkdir(parents=True, exist_ok=True)
                self._file = os.open(path, os.O_RDWR | os.O_APPEND | os.O_CREAT, 0o600)
                self._read_to = self._start_of_recent(self._file)
                for line in self._search(_REFUND):
                    self._mark(line)
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

    async def refund(self, refund: ProviderRefund) -> Refund:
        """The decision that stands for this refund id; OutcomeUnknown as above."""
        loop = asyncio.get_running_loop()
        waiter: asyncio.Future[Refund] = loop.create_future()
        self._submit(_Job(self._refund_all, [refund], [waiter], loop))
        return await waiter

    async def find_refund(self, refund_id: UUID) -> Refund | None:
        """The decision about this refund id, None if there is none; OutcomeUnknown as above."""
        loop = asyncio.get_running_loop()
        waiter: asyncio.Future[Refund | None] = loop.create_future()
        self._submit(_Job(self._find_all_refunds, [refund_id], [waiter], loop))
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
                if line.id not in self._recent:
                    new.setdefault(line.id, line)
            self._append(b"".join(msgspec.json.encode(line) + b"\n" for line in new.values()))
            standing = [new.get(each.id) or self._recent[each.id] for each in decisions]
            self._remember(new)
        return standing

    def _find_all(self, payment_ids: list[UUID]) -> list[Decision | None]:
        return [self._find(payment_id) for payment_id in payment_ids]

    def _find(self, payment_id: UUID) -> Decision | None:
        with self._locked():
            self._catch_up()
        if payment_id in self._recent:
            return self._recent[payment_id]
        lines = self._search(b'["%s"' % str(payment_id).encode())
        return next((line for line in lines if not isinstance(line, Refund)), None)

    def _refund_all(self, refunds: list[ProviderRefund]) -> list[Refund]:
        found = [self._find(each.payment_id) for each in refunds]  # a long search needs no lock
        with self._locked():
            self._catch_up()
            return [self._refund(*each) for each in zip(refunds, found, strict=True)]

    def _refund(self, refund: ProviderRefund, found: Decision | None) -> Refund:
        """Under the lock. `found` is the charge as it was known before."""
        if standing := self._standing_refund(refund.refund_id):
            return standing
        if found:  # what it says about refunds may be out of date
            self._remember({found.id: Decision(*msgspec.structs.astuple(found)[:4])})
        charge = self._recent.get(refund.payment_id)
        given_back = self._given_back(charge) if charge else 0
        line = Refund(
            refund.refund_id,
            refund.amount_cents,
            refund.currency,
            self._refund_rule(refund, charge, given_back),
            "refund",
            refund.payment_id,
        )
        self._append(msgspec.json.encode(line) + b"\n")
        self._remember_refund(line)
        return line

    def _given_back(self, charge: Decision) -> int:
        """Cents, of a charge in memory; under the lock, so that no refund is missed."""
        known = self._known_given_back(charge)
        if known is not None:
            return known
        lines = self._search(b'%s"%s"]' % (_REFUND, str(charge.id).encode()))
        given_back = sum(line.amount_cents for line in lines if line.outcome == "approved")
        self._recent[charge.id] = _refunded(charge, given_back)
        return given_back

    def _known_given_back(self, charge: Decision) -> int | None:
        """None if only the file can tell."""
        if isinstance(charge, Refunded):
            return charge.given_back
        return None if self._is_marked(charge.id) else 0

    def _standing_refund(self, refund_id: UUID) -> Refund | None:
        if refund_id in self._recent_refunds or not self._is_marked(refund_id):
            return self._recent_refunds.get(refund_id)
        lines = self._search(b'["%s"' % str(refund_id).encode())
        return next((line for line in lines if isinstance(line, Refund)), None)

    def _find_all_refunds(self, refund_ids: list[UUID]) -> list[Refund | None]:
        with self._locked():
            self._catch_up()
        return [self._standing_refund(refund_id) for refund_id in refund_ids]

    def _search(self, part: bytes) -> Iterator[Decision]:
        """The lines of the file, as far as it was read, that have this part; the oldest first."""
        if not self._read_to or self._file is None:
            return
        with mmap.mmap(self._file, self._read_to, access=mmap.ACCESS_READ) as text:
            found = text.find(part)
            while found >= 0:
                end = text.find(b"\n", found)
                line = text[text.rfind(b"\n", 0, found) + 1 : end]
                yield msgspec.json.decode(line, type=Refund if _REFUND in line else Decision)
                found = text.find(part, end)

    def _mark(self, line: Decision) -> None:
        if isinstance(line, Refund):
            self._marks[line.id.int % MARKS] = self._marks[line.payment_id.int % MARKS] = 1

    def _is_marked(self, any_id: UUID) -> bool:
        return bool(self._marks[any_id.int % MARKS])

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
            any_refund = _REFUND in text  # looking once is much cheaper than in every line
            for line in text.splitlines():
                if any_refund and _REFUND in line:
                    self._remember_refund(msgspec.json.decode(line, type=Refund))
                else:
                    decision = msgspec.json.decode(line, type=Decision)
                    self._remember({decision.id: decision})
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

    def _remember_refund(self, line: Refund) -> None:
        charge = self._recent.get(line.payment_id)
        before = self._known_given_back(charge) if charge else None
        if charge and before is not None:
            more = line.amount_cents if line.outcome == "approved" else 0
            self._recent[charge.id] = _refunded(charge, before + more)
        self._recent_refunds[line.id] = line
        self._mark(line)
        while len(self._recent_refunds) > RECENT_MAX:
            del self._recent_refunds[next(iter(self._recent_refunds))]


def _refunded(charge: Decision, given_back: int) -> Refunded:
    """In memory it takes the charge's place, so that both are forgotten together."""
    return Refunded(charge.id, charge.amount_cents, charge.currency, charge.outcome, given_back)
