"""The file of the simulated provider's ledger: tables, decisions, and how it is opened."""

import sqlite3
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple
from uuid import UUID, uuid4

import msgspec

from payments.errors import StartError
from payments.gateways import ProviderRefund

RECENT_MAX = 20_000  # charges kept where there is no file, and refunds
LOCK_WAIT_S = 1.0  # another process has the lock for a millisecond
START_WAIT_S = 60.0  # or reads in the ledger of an earlier version
APPLICATION_ID = 0x70617973  # in the header of the file

TABLES = """
CREATE TABLE ledger (id TEXT NOT NULL);
CREATE TABLE charges (
    id             TEXT PRIMARY KEY NOT NULL, -- the payment's
    amount_cents   INTEGER NOT NULL,
    currency       TEXT NOT NULL,
    outcome        TEXT NOT NULL, -- approved, or the code of the decline
    refunded_cents INTEGER NOT NULL DEFAULT 0
);
CREATE TABLE refunds (
    id           TEXT PRIMARY KEY NOT NULL,
    amount_cents INTEGER NOT NULL,
    currency     TEXT NOT NULL,
    outcome      TEXT NOT NULL,
    payment_id   TEXT NOT NULL
);
"""
NAME = "INSERT INTO ledger (id) VALUES (?)"
LEDGER_ID = "SELECT id FROM ledger"
# A JSON array per charge, all in one statement: between two the thread waits for the event loop.
ADD_CHARGES = """
INSERT INTO charges (id, amount_cents, currency, outcome)
SELECT json_extract(value, '$[0]'), json_extract(value, '$[1]'),
       json_extract(value, '$[2]'), json_extract(value, '$[3]')
  FROM json_each(?) WHERE true
    ON CONFLICT DO NOTHING
"""
ADD_REFUND = "INSERT INTO refunds VALUES (?, ?, ?, ?, ?) ON CONFLICT DO NOTHING"
GIVE_BACK = "UPDATE charges SET refunded_cents = refunded_cents + ? WHERE id = ?"
CHARGE = "SELECT amount_cents, currency, outcome FROM charges WHERE id = ?"
REFUND = "SELECT amount_cents, currency, outcome FROM refunds WHERE id = ?"
REFUNDED = "SELECT refunded_cents FROM charges WHERE id = ?"
FORGET_CHARGES = "DELETE FROM charges WHERE rowid <= (SELECT max(rowid) FROM charges) - ?"
FORGET_REFUNDS = "DELETE FROM refunds WHERE rowid <= (SELECT max(rowid) FROM refunds) - ?"


class NotALedger(StartError):
    """The file is no SQLite database."""


class Decision(msgspec.Struct, frozen=True, array_like=True, kw_only=True):
    """By payment id, or by refund id; `outcome` is `approved` or the code of a decline."""

    id: UUID
    amount_cents: int
    currency: str
    outcome: str


class Refund(Decision, frozen=True, array_like=True, kw_only=True):
    payment_id: UUID


class Question(NamedTuple):
    """CHARGE or REFUND, and the id that is asked about."""

    query: str
    id: UUID


# What becomes of a refund, given the charge (None: there is none) and the cents given back so far.
RefundRule = Callable[[ProviderRefund, Decision | None, int], str]
Asked = Decision | ProviderRefund | Question


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
            self._connection = _open(path)
            if earlier:
                self._add(earlier)
            self.id = UUID(self._connection.execute(LEDGER_ID).fetchone()[0])
            self._connection.execute(f"PRAGMA busy_timeout = {lock_wait_s * 1000:.0f}")
        except (OSError, sqlite3.Error) as error:
            reason = error.strerror if isinstance(error, OSError) else error
            code = getattr(error, "sqlite_errorcode", None)
            kind = NotALedger if code == sqlite3.SQLITE_NOTADB else StartError
            raise kind(f"SIMULATED_LEDGER: cannot use {str(path)!r}: {reason}") from None

    def decide(self, asked: list[Asked]) -> list[Any]:
        """What stands, of a charge and of a refund the first decision; None if a question finds
        none. All of it in one transaction, or nothing: raises sqlite3.Error."""
        if all(isinstance(each, Question) for each in asked):  # which need no lock
            return [self._find(*each) for each in asked if isinstance(each, Question)]
        with self._transaction():
            charges = self._charge([each for each in asked if isinstance(each, Decision)])
            return [
                charges[each.id]
                if isinstance(each, Decision)
                else self._refund(each)
                if isinstance(each, ProviderRefund)
                else self._find(*each)
                for each in asked
            ]

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
            self._connection.execute("COMMIT")
        except BaseException:
            self._connection.rollback()
            raise

    def _charge(self, charges: list[Decision]) -> dict[UUID, Decision]:
        """What stands for each of these ids."""
        if not charges:
            return {}
        asked = msgspec.json.encode(charges).decode()
        added = self._connection.execute(ADD_CHARGES, [asked]).rowcount
        standing = {charge.id: charge for charge in charges}
        if added < len(charges):  # some stood there, or come twice
            standing |= {id: found for id in standing if (found := self._find(CHARGE, id))}
        return standing

    def _refund(self, refund: ProviderRefund) -> Decision:
        if standing := self._find(REFUND, refund.refund_id):
            return standing
        charge = self._find(CHARGE, refund.payment_id)
        given_back = self._row(REFUNDED, refund.payment_id) or (0,)
        decision = Refund(
            id=refund.refund_id,
            amount_cents=refund.amount_cents,
            currency=refund.currency,
            outcome=self._refund_rule(refund, charge, *given_back),
            payment_id=refund.payment_id,
        )
        self._add_refund(decision)
        return decision

    def _add_refund(self, refund: Refund) -> None:
        added = self._connection.execute(ADD_REFUND, msgspec.to_builtins(refund)).rowcount
        if added and refund.outcome == "approved":
            self._connection.execute(GIVE_BACK, [refund.amount_cents, str(refund.payment_id)])

    def _add(self, earlier: Iterable[Decision]) -> None:
        with self._transaction():
            for decision in earlier:
                if isinstance(decision, Refund):
                    self._add_refund(decision)
                else:
                    self._charge([decision])
        self._connection.execute("PRAGMA wal_checkpoint")

    def _find(self, query: str, id: UUID) -> Decision | None:
        row = self._row(query, id)
        if row is None:
            return None
        amount_cents, currency, outcome = row
        return Decision(id=id, amount_cents=amount_cents, currency=currency, outcome=outcome)

    def _row(self, query: str, id: UUID) -> Any:
        return self._connection.execute(query, [str(id)]).fetchone()


def _open(path: Path | None) -> sqlite3.Connection:
    """With its tables; raises OSError and sqlite3.Error."""
    if path is not None and not path.exists():
        path.parent.mkdir(parents=True, exist_ok=True)
        path.touch(0o600)
    connection = sqlite3.connect(
        path.absolute() if path else ":memory:",
        START_WAIT_S,
        isolation_level=None,
        check_same_thread=False,  # it is opened before its thread is started
    )
    try:
        _make_tables(connection)
    except BaseException:
        connection.close()
        raise
    return connection


def _make_tables(connection: sqlite3.Connection) -> None:
    """Unless they are there; raises sqlite3.Error."""

    def is_made() -> bool:
        (marker,) = connection.execute("PRAGMA application_id").fetchone()
        return bool(marker == APPLICATION_ID)

    # In this order: another process may be making them, all in one transaction.
    if connection.execute("SELECT 1 FROM sqlite_master").fetchone() and not is_made():
        raise sqlite3.DatabaseError("it is the database of another program")
    if _journal_mode(connection) not in ("wal", "memory"):
        raise sqlite3.DatabaseError("its file system lets processes share no memory, as WAL does")
    connection.execute("PRAGMA synchronous = NORMAL")
    if is_made():
        return
    connection.execute("BEGIN IMMEDIATE")
    if not is_made():
        for statement in TABLES.split(";")[:-1]:
            connection.execute(statement)
        connection.execute(NAME, [str(uuid4())])
        connection.execute(f"PRAGMA application_id = {APPLICATION_ID}")
    connection.execute("COMMIT")


def _journal_mode(connection: sqlite3.Connection) -> str:
    """Sets it; SQLite itself does not wait here for another process that does the same."""
    deadline = time.monotonic() + START_WAIT_S
    while True:
        try:
            return str(connection.execute("PRAGMA journal_mode = WAL").fetchone()[0])
        except sqlite3.OperationalError as error:
            if error.sqlite_errorcode != sqlite3.SQLITE_BUSY or time.monotonic() > deadline:
                raise
            time.sleep(0.01)
