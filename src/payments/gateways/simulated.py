"""The simulated provider: the default gateway, for development, demonstrations and tests.

It is deterministic: an amount whose last digit is 7 is declined, every other is captured. It keeps
its own ledger, as a real provider does: a SQLite file that all processes share, that only grows and
that survives a kill -9 of any of them. Faults can be scripted: docs/simulated-gateway.md.
"""

import asyncio
import re
import sqlite3
from collections.abc import Callable
from pathlib import Path
from typing import Any
from uuid import UUID

import msgspec

from payments.errors import StartError
from payments.gateways import NeverSent, OutcomeUnknown, ProviderCharge
from payments.payment import Approved, Declined

IN_MEMORY_MAX = 100_000  # charges that a ledger without a file remembers

_FAULT = re.compile(
    r"(?:delay=(?P<seconds>[0-9]{1,4}(?:\.[0-9]{1,4})?)|(?P<kind>timeout|answer_lost|down))"
    r"(?:\*(?P<count>[0-9]{1,6}))?"
)

_SCHEMA = """
-- One row for each charge that the provider decided; outcome is 'approved' or a decline code.
CREATE TABLE IF NOT EXISTS charges (
    number       INTEGER PRIMARY KEY,
    payment_id   BLOB NOT NULL UNIQUE,
    amount_cents INTEGER NOT NULL,
    currency     TEXT NOT NULL,
    outcome      TEXT NOT NULL
);
CREATE TRIGGER IF NOT EXISTS charges_are_never_changed BEFORE UPDATE ON charges
BEGIN SELECT RAISE(ABORT, 'the ledger is append-only'); END;
"""
_CHARGE = """
INSERT INTO charges (payment_id, amount_cents, currency, outcome) VALUES (?, ?, ?, ?)
ON CONFLICT (payment_id) DO NOTHING
"""
_FIND = "SELECT amount_cents, currency, outcome FROM charges WHERE payment_id = ?"
_FORGET = "DELETE FROM charges WHERE number <= (SELECT max(number) FROM charges) - ?"


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
        row = (charge.payment_id.bytes, charge.amount_cents, charge.currency, outcome)

        def decide(ledger: sqlite3.Connection) -> Any:
            if ledger.execute(_CHARGE, row).rowcount == 1:
                return row[1:]
            return ledger.execute(_FIND, row[:1]).fetchone()

        decided = await self._ledger.run(decide)
        if fault == "answer_lost":
            raise OutcomeUnknown("simulated: the answer was lost")
        return _outcome(charge.payment_id, decided)

    async def find_charge(self, payment_id: UUID, timeout_s: float) -> Approved | Declined | None:
        if self._next_fault(("down",)):
            raise NeverSent("simulated: the provider is down")
        found = await self._ledger.run(
            lambda ledger: ledger.execute(_FIND, [payment_id.bytes]).fetchone()
        )
        return _outcome(payment_id, found) if found else None

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


def _outcome(payment_id: UUID, row: tuple[int, str, str]) -> Approved | Declined:
    amount_cents, currency, outcome = row
    if outcome == "approved":
        return Approved(payment_id, amount_cents, currency, f"sim_{payment_id.hex}")
    return Declined(outcome)


class _Ledger:
    """The SQLite file behind one thread: all calls that wait together share one transaction."""

    def __init__(self, path: Path | None) -> None:
        self._in_memory = path is None
        try:
            if path is not None:
                path.parent.mkdir(parents=True, exist_ok=True)
            self._connection = sqlite3.connect(
                path or ":memory:", timeout=2, isolation_level=None, check_same_thread=False
            )
            # WAL without flushes: it survives a kill of every process, not a power cut.
            self._connection.execute("PRAGMA journal_mode = WAL")
            self._connection.execute("PRAGMA synchronous = OFF")
            self._connection.executescript(_SCHEMA)
        except (sqlite3.Error, OSError) as error:
            raise StartError(f"SIMULATED_LEDGER: cannot use {str(path)!r}: {error}") from None
        self._waiting: list[tuple[Callable[[sqlite3.Connection], Any], asyncio.Future[Any]]] = []
        self._worker: asyncio.Task[None] | None = None

    async def run(self, action: Callable[[sqlite3.Connection], Any]) -> Any:
        """What the action returns, after its commit; OutcomeUnknown if the file fails."""
        future = asyncio.get_running_loop().create_future()
        self._waiting.append((action, future))
        if self._worker is None or self._worker.done():
            self._worker = asyncio.create_task(self._work(), name="simulated ledger")
        return await future

    async def close(self) -> None:
        if self._worker is not None:
            await self._worker
        self._connection.close()

    async def _work(self) -> None:
        while self._waiting:
            batch, self._waiting = self._waiting, []
            try:
                results = await asyncio.to_thread(self._commit, [action for action, _ in batch])
            except sqlite3.Error as error:
                results = [OutcomeUnknown(f"simulated: ledger: {error}")] * len(batch)
            for (_, future), result in zip(batch, results, strict=True):
                if future.done():
                    continue
                if isinstance(result, Exception):
                    future.set_exception(result)
                else:
                    future.set_result(result)

    def _commit(self, actions: list[Callable[[sqlite3.Connection], Any]]) -> list[Any]:
        ledger = self._connection
        ledger.execute("BEGIN IMMEDIATE")
        try:
            results = [action(ledger) for action in actions]
            if self._in_memory:
                ledger.execute(_FORGET, [IN_MEMORY_MAX])
            ledger.execute("COMMIT")
        except BaseException:
            ledger.rollback()
            raise
        return results
