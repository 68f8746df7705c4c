"""The file of the simulated provider's ledger: what is decided in it, and its SQL."""

import itertools
import sqlite3
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any, NamedTuple
from uuid import UUID

import msgspec

from payments.errors import StartError
from payments.gateways import ProviderRefund
from payments.gateways.ledger_tables import open_tables

ROWS_MAX = 32  # in a statement
RECENT_MAX = 20_000  # charges kept where there is no file, and refunds
LOCK_WAIT_S = 1.0  # another process has the lock for a millisecond

LEDGER_ID = "SELECT id FROM ledger"
ADD_CHARGE = "INSERT INTO charges (id, amount_cents, currency, outcome) VALUES (?, ?, ?, ?)"
ADD_CHARGES = [  # one more each: all in one statement, which is a transaction of its own
    ", ".join([ADD_CHARGE, *["(?, ?, ?, ?)"] * more]) + " ON CONFLICT DO NOTHING"
    for more in range(ROWS_MAX)
]
ADD_REFUND = "INSERT INTO refunds VALUES (?, ?, ?, ?, ?) ON CONFLICT DO NOTHING"
GIVE_BACK = "UPDATE charges SET refunded_cents = refunded_cents + ? WHERE id = ?"
CHARGE = "SELECT amount_cents, currency, outcome FROM charges WHERE id = ?"
REFUND = "SELECT amount_cents, currency, outcome FROM refunds WHERE id = ?"
ADD_BEGINNING = "INSERT INTO beginnings VALUES (?, ?, ?) ON CONFLICT DO NOTHING"
BEGINNING = "SELECT method, at FROM beginnings WHERE id = ?"
REFUNDED = "SELECT refunded_cents FROM charges WHERE id = ?"
FORGET_CHARGES = "DELETE FROM charges WHERE rowid <= (SELECT max(rowid) FROM charges) - ?"
FORGET_BEGINNINGS = "DELETE FROM beginnings WHERE at < strftime('%s', 'now') - 86400"
FORGET_REFUNDS = "DELETE FROM refunds WHERE rowid <= (SELECT max(rowid) FROM refunds) - ?"


class NotALedger(StartError):
    """The file is no SQLite database."""


class Decision(msgspec.Struct, frozen=True, array_like=True, kw_only=True):
    """By payment id, or by refund id; `outcome` is `approved` or the code of a decline."""

    id: UUID
    amount_cents: int
    currency: str
    outcome: str


class LedgerRefund(Decision, frozen=True, array_like=True, kw_only=True):
    payment_id: UUID


class Beginning(NamedTuple):
    """Of a charge in steps: the payment method that says which, and when (seconds since 1970)."""

    id: UUID
    method: str
    at: float


class Question(NamedTuple):
    """CHARGE, REFUND or BEGINNING, and the id that is asked about."""

    query: str
    id: UUID


# What becomes of a refund, given the charge (None: there is none) and the cents given back so far.
RefundRule = Callable[[ProviderRefund, Decision | None, int], str]
Asked = Decision | ProviderRefund | Question | Beginning


class LedgerFile:
    """A SQLite database that all processes of a host share. It survives a kill of all of them; a
    power cut may take the last transactions away (WAL with synchronous=NORMAL)."""

    def __init__(
        self,
        path: Path | None,
        refund_rule: RefundRule,
        lock_wait_s: float,
        earlier: Iterable[Decision] = (),
    ) -> None:
        """Without a path it is in memory, and what is not recent is forgotten.

        While another process has the lock for more than `lock_wait_s`, `decide` raises. `earlier`
        decisions are added, unless they are known, and are on disk afterwards. Raises StartError.
        """
        self.path = path
        self._refund_rule = refund_rule
        try:
            self._connection = open_tables(path)
            if earlier:
                self._add(earlier)
            self.id = UUID(self._connection.execute(LEDGER_ID).fetchone()[0])
            self._connection.execute(f"PRAGMA busy_timeout = {lock_wait_s * 1000:.0f}")
        except (OSError, sqlite3.Error) as error:
            reason = error.strerror if isinstance(error, OSError) else error
            code = getattr(error, "sqlite_errorcode", None)
            kind = NotALedger if code == sqlite3.SQLITE_NOTADB else StartError
            raise kind(f"SIMULATED_LEDGER: cannot use {str(path)!r}: {reason}") from None

    def without_waiting(self) -> "LedgerFile":
        """The same ledger for an event loop: instead of waiting for a lock it raises, and it leaves
        `checkpoint` to others. Raises StartError."""
        if self.path is None:
            return self
        beside = LedgerFile(self.path, self._refund_rule, 0)
        beside._connection.execute("PRAGMA wal_autocheckpoint = 0")
        return beside

    def decide(self, asked: list[Asked]) -> list[Any]:
        """What stands, of a charge and of a refund the first decision; None if a question finds
        none. All of it in one transaction, or nothing: raises sqlite3.Error."""
        charges = [each for each in asked if isinstance(each, Decision)]
        if len(charges) == len(asked) <= ROWS_MAX and self.path is not None:
            return self._charge(charges)  # a statement is a transaction
        if all(isinstance(each, Question) for each in asked):  # which need no lock
            return [self._find(*each) for each in asked if isinstance(each, Question)]
        with self._transaction():
            standing = {charge.id: charge for charge in self._charge(charges)}
            return [
                standing[each.id]
                if isinstance(each, Decision)
                else self._refund(each)
                if isinstance(each, ProviderRefund)
                else self._begin(each)
                if isinstance(each, Beginning)
                else self._find(*each)
                for each in asked
            ]

    def checkpoint(self) -> None:
        """Moves what was written into the file proper, and waits for the disk."""
        with suppress(sqlite3.Error):  # a full disk, and the next one does what this one did not
            self._connection.execute("PRAGMA wal_checkpoint")

    def close(self) -> None:
        self._connection.close()

    @contextmanager
    def _transaction(self) -> Iterator[None]:
        """Between looking and writing no other process may decide."""
        self._connection.execute("BEGIN IMMEDIATE")
        try:
            yield
            if self.path is None:
                self._connection.execute(FORGET_CHARGES, [RECENT_MAX])
                self._connection.execute(FORGET_REFUNDS, [RECENT_MAX])
                self._connection.execute(FORGET_BEGINNINGS)
            self._connection.execute("COMMIT")
        except BaseException:
            self._connection.rollback()
            raise

    def _charge(self, charges: list[Decision]) -> list[Decision]:
        """What stands for each of these ids."""
        some = (charges[at : at + ROWS_MAX] for at in range(0, len(charges), ROWS_MAX))
        if sum(map(self._add_charges, some)) == len(charges):
            return charges
        # Some stood there, or come twice. What stands is never changed: this needs no lock.
        return [self._find(CHARGE, charge.id) or charge for charge in charges]

    def _add_charges(self, charges: list[Decision]) -> int:
        """How many were not known."""
        values = itertools.chain.from_iterable(msgspec.to_builtins(charges))
        return self._connection.execute(ADD_CHARGES[len(charges) - 1], list(values)).rowcount

    def _refund(self, refund: ProviderRefund) -> Decision:
        standing: Decision | None = self._find(REFUND, refund.refund_id)
        if standing:
            return standing
        charge = self._find(CHARGE, refund.payment_id)
        given_back = self._row(REFUNDED, refund.payment_id) or (0,)
        decision = LedgerRefund(
            id=refund.refund_id,
            amount_cents=refund.amount_cents,
            currency=refund.currency,
            outcome=self._refund_rule(refund, charge, *given_back),
            payment_id=refund.payment_id,
        )
        self._add_refund(decision)
        return decision

    def _add_refund(self, refund: LedgerRefund) -> None:
        added = self._connection.execute(ADD_REFUND, msgspec.to_builtins(refund)).rowcount
        if added and refund.outcome == "approved":
            self._connection.execute(GIVE_BACK, [refund.amount_cents, str(refund.payment_id)])

    def _add(self, earlier: Iterable[Decision]) -> None:
        with self._transaction():
            for decision in earlier:
                if isinstance(decision, LedgerRefund):
                    self._add_refund(decision)
                else:
                    self._charge([decision])
        self._connection.execute("PRAGMA wal_checkpoint")

    def _begin(self, beginning: Beginning) -> Beginning:
        """The one that stands."""
        self._connection.execute(ADD_BEGINNING, [str(beginning.id), *beginning[1:]])
        standing: Beginning = self._find(BEGINNING, beginning.id)
        return standing

    def _find(self, query: str, id: UUID) -> Any:
        """A Decision or a Beginning, as the query says; None if there is none."""
        row = self._row(query, id)
        if row is None:
            return None
        if query == BEGINNING:
            return Beginning(id, *row)
        amount_cents, currency, outcome = row
        return Decision(id=id, amount_cents=amount_cents, currency=currency, outcome=outcome)

    def _row(self, query: str, id: UUID) -> Any:
        return self._connection.execute(query, [str(id)]).fetchone()
