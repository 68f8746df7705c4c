"""The simulated provider: the default gateway, for development, demonstrations and tests.

It is deterministic: an amount whose last digit is 7 is declined, every other is captured. It keeps
its own ledger, as a real provider does: a file that all processes share, that only grows and that
survives a kill -9 of any of them. Faults can be scripted: docs/simulated-gateway.md.
"""

import asyncio
import errno
import fcntl
import mmap
import os
import re
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from uuid import UUID

import msgspec

from payments.errors import StartError
from payments.gateways import NeverSent, OutcomeUnknown, ProviderCharge
from payments.payment import Approved, Declined

RECENT_MAX = 20_000  # decisions kept in memory: some seconds of the highest load
READ_MAX = 1 << 20

_FAULT = re.compile(
    r"(?:delay=(?P<seconds>[0-9]{1,4}(?:\.[0-9]{1,4})?)|(?P<kind>timeout|answer_lost|down))"
    r"(?:\*(?P<count>[0-9]{1,6}))?"
)


class _Line(msgspec.Struct, frozen=True, array_like=True):
    """One decision in the ledger; outcome is `approved` or a decline code."""

    payment_id: UUID
    amount_cents: int
    currency: str
    outcome: str


class Fault(msgspec.Struct):
    """One scripted fault; `left` is how many calls it still applies to, None for all."""

    kind: str
    seconds: float
    left: int | None

    def take(self) -> bool:
        if self.left is None:
            return True
        self.left -= 1
        return self.left >= 0


def parse_faults(text: str) -> list[Fault]:
    """`kind[=seconds][*count]`, separated by commas; raises StartError.

    delay=S       the answer takes S seconds longer
    timeout       nothing is captured, and no answer comes
    answer_lost   the charge is decided, but its answer never arrives
    down          the provider cannot be reached, for charges and for questions
    """
    faults = []
    for entry in filter(None, (part.strip() for part in text.split(","))):
        if not (match := _FAULT.fullmatch(entry)):
            raise StartError(
                f"SIMULATED_FAULTS: {entry!r} must be delay=SECONDS, timeout, answer_lost or down, "
                "each with *COUNT behind it if it is for the first calls only"
            )
        seconds, kind, count = match["seconds"], match["kind"], match["count"]
        faults.append(Fault(kind or "delay", float(seconds or 0), int(count) if count else None))
    return faults


class SimulatedGateway:
    name = "simulated"
    safe_retry_s = 24 * 3600.0

    def __init__(self, ledger: Path | None, faults: str = "") -> None:
        """`ledger` is the file, None for memory only. Raises StartError if it cannot be opened."""
        self._faults = parse_faults(faults)
        self._ledger = _Ledger(ledger)

    async def charge(self, charge: ProviderCharge, timeout_s: float) -> Approved | Declined:
        fault = await self._suffer(timeout_s)
        outcome = "declined_by_simulation" if charge.amount_cents % 10 == 7 else "approved"
        decided = await self._ledger.decide(
            _Line(charge.payment_id, charge.amount_cents, charge.currency, outcome)
        )
        if fault == "answer_lost":
            raise OutcomeUnknown("simulated: the answer was lost")
        return _outcome(decided)

    async def find_charge(self, payment_id: UUID, timeout_s: float) -> Approved | Declined | None:
        if self._next_fault(("down",)):
            raise NeverSent("simulated: the provider is down")
        found = await self._ledger.find(payment_id)
        return _outcome(found) if found else None

    async def close(self) -> None:
        await self._ledger.close()

    async def _suffer(self, timeout_s: float) -> str | None:
        """Applies what is scripted for this charge; returns the fault if it comes afterwards."""
        if delay := self._next_fault(("delay",)):
            await asyncio.sleep(min(delay.seconds, timeout_s))
            if delay.seconds > timeout_s:
                raise OutcomeUnknown("simulated: slower than the timeout")
        fault = self._next_fault(("timeout", "answer_lost", "down"))
        if fault is None:
            return None
        if fault.kind == "down":
            raise NeverSent("simulated: the provider is down")
        if fault.kind == "timeout":
            await asyncio.sleep(timeout_s)
            raise OutcomeUnknown("simulated: no answer")
        return fault.kind

    def _next_fault(self, kinds: tuple[str, ...]) -> Fault | None:
        return next((f for f in self._faults if f.kind in kinds and f.take()), None)


def _outcome(line: _Line) -> Approved | Declined:
    if line.outcome == "approved":
        txn_id = f"sim_{line.payment_id.hex}"
        return Approved(line.payment_id, line.amount_cents, line.currency, txn_id)
    return Declined(line.outcome)


class _Ledger:
    """An append-only file of JSON lines that all processes share, behind one thread.

    An id's first line is its outcome; if another ever follows, it is a repetition and captured
    nothing. The newest RECENT_MAX decisions are kept in memory, older ones are looked up in the
    file. All charges that wait together are written together. The file is not flushed to disk: it
    survives a kill of every process, not a power cut.
    """

    def __init__(self, path: Path | None) -> None:
        """Without a path there is no file, and what is not recent is forgotten."""
        self._recent: dict[UUID, _Line] = {}
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
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="simulated ledger")
        self._waiting: list[tuple[_Line, asyncio.Future[_Line]]] = []
        self._worker: asyncio.Task[None] | None = None

    async def decide(self, line: _Line) -> _Line:
        """The line that stands for this payment id; OutcomeUnknown if the file fails."""
        future: asyncio.Future[_Line] = asyncio.get_running_loop().create_future()
        self._waiting.append((line, future))
        if self._worker is None or self._worker.done():
            self._worker = asyncio.create_task(self._work(), name="simulated ledger")
        return await future

    async def find(self, payment_id: UUID) -> _Line | None:
        try:
            return await asyncio.get_running_loop().run_in_executor(
                self._thread, self._find, payment_id
            )
        except (OSError, RuntimeError, msgspec.MsgspecError) as error:
            raise OutcomeUnknown(f"simulated: ledger: {error}") from error

    async def close(self) -> None:
        if self._worker is not None:
            await self._worker
        self._thread.shutdown()
        if self._file is not None:
            os.close(self._file)
            self._file = None

    async def _work(self) -> None:
        while self._waiting:
            batch, self._waiting = self._waiting, []
            lines = [line for line, _ in batch]
            try:
                decided = await asyncio.get_running_loop().run_in_executor(
                    self._thread, self._decide, lines
                )
            except (OSError, RuntimeError, msgspec.MsgspecError) as error:
                for _, future in batch:
                    if not future.done():
                        future.set_exception(OutcomeUnknown(f"simulated: ledger: {error}"))
            else:
                for (_, future), line in zip(batch, decided, strict=True):
                    if not future.done():
                        future.set_result(line)

    def _decide(self, lines: list[_Line]) -> list[_Line]:
        with self._locked():
            self._catch_up()
            new: dict[UUID, _Line] = {}
            for line in lines:
                if line.payment_id not in self._recent:
                    new.setdefault(line.payment_id, line)
            self._append(b"".join(msgspec.json.encode(line) + b"\n" for line in new.values()))
            self._remember(new)
        return [self._recent[line.payment_id] for line in lines]

    def _find(self, payment_id: UUID) -> _Line | None:
        with self._locked():
            self._catch_up()
        if payment_id in self._recent or not self._read_to or self._file is None:
            return self._recent.get(payment_id)
        with mmap.mmap(self._file, self._read_to, access=mmap.ACCESS_READ) as text:
            start = text.find(b'["%s"' % str(payment_id).encode())
            if start < 0:
                return None
            return msgspec.json.decode(text[start : text.find(b"\n", start)], type=_Line)

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
        fcntl.flock(self._file, fcntl.LOCK_EX)
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
            lines = [msgspec.json.decode(line, type=_Line) for line in text.splitlines()]
            self._remember({line.payment_id: line for line in reversed(lines)})
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

    def _remember(self, lines: dict[UUID, _Line]) -> None:
        for payment_id, line in lines.items():
            self._recent.setdefault(payment_id, line)
        while len(self._recent) > RECENT_MAX:
            del self._recent[next(iter(self._recent))]
