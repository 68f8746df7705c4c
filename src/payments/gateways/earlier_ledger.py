"""Ledgers of earlier versions: a JSON array per line and decision. They are read in once, and kept.

    ["<payment id>",1500,"INR","approved"]
    ["<refund id>",500,"INR","approved","refund","<payment id>"]

A file is moved only by the process that holds its lock, and whoever gets the lock looks whether it
is still in its place. What was read in twice is the same: a kill at any point harms nothing.
"""

import fcntl
import itertools
import os
import re
import time
from collections.abc import Iterable, Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import BinaryIO, Literal
from uuid import UUID

import msgspec

from payments.errors import StartError
from payments.gateways.ledger_file import (
    Decision,
    LedgerFile,
    LedgerRefund,
    NotALedger,
    RefundRule,
)
from payments.gateways.ledger_tables import START_WAIT_S

_BEGINNING = re.compile(rb'\["[0-9a-f-]{0,36}("|\Z)')


class _Line(Decision, frozen=True, array_like=True, kw_only=True):
    """`payment_id` is a refund's."""

    kind: Literal["refund"] | None = None
    payment_id: UUID | None = None


def open_ledger(
    path: Path, refund_rule: RefundRule, lock_wait_s: float, earlier: Path | None = None
) -> tuple[LedgerFile, BinaryIO | None]:
    """The ledger, with what the file `earlier` holds, if there is one, and otherwise with what an
    earlier version wrote at `path` itself. Raises StartError.

    The file that was read in comes with it: while it is open, processes of the earlier version can
    decide nothing in it. Outcomes that they do not know are those of this ledger.
    """
    earlier = earlier or path.with_name(f"{path.name}.earlier")
    file = None
    try:
        file = _locked(earlier)
        ledger = LedgerFile(path, refund_rule, lock_wait_s, _decisions(file) if file else ())
        if file is not None:
            earlier.rename(_kept_as(earlier))
    except (OSError, StartError) as error:
        if file is not None:
            file.close()
        if isinstance(error, NotALedger) and _move_aside(path, earlier):
            return open_ledger(path, refund_rule, lock_wait_s, earlier)
        if isinstance(error, StartError):
            raise
        reason = f"{error.strerror}: {error.filename!r}"
        raise StartError(f"SIMULATED_LEDGER: cannot be imported: {reason}") from None
    return ledger, file


def _locked(path: Path) -> BinaryIO | None:
    """The file, None if it is not there; StartError if another process keeps it locked."""
    deadline = time.monotonic() + START_WAIT_S
    while time.monotonic() < deadline:
        with ExitStack() as opened:
            try:
                file = opened.enter_context(path.open("rb"))
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
                if os.path.samestat(os.fstat(file.fileno()), path.stat()):
                    opened.pop_all()
                    return file
            except FileNotFoundError:
                return None
            except BlockingIOError:  # it is being written, or read in: then it is moved afterwards
                time.sleep(0.01)
    raise StartError(f"SIMULATED_LEDGER: another process has locked {str(path)!r}")


def _move_aside(path: Path, earlier: Path) -> bool:
    """Whether it is worth another look: the file was moved, or another process was quicker."""
    with _locked(path) or open(os.devnull, "rb") as file:  # noqa: PTH123 - not a path of ours
        beginning = file.read(40)
        if not _BEGINNING.match(beginning):
            return not beginning or beginning.startswith(b"SQLite format 3\0")
        if earlier.exists():
            raise StartError(f"SIMULATED_LEDGER: {str(earlier)!r} exists already: rename it")
        path.rename(earlier)
    return True


def _decisions(lines: Iterable[bytes]) -> Iterator[Decision]:
    """Half a line, at the end, is nobody's decision."""
    for number, text in enumerate(lines, 1):
        if not text.endswith(b"\n"):
            return
        try:
            line = msgspec.json.decode(text, type=_Line)
        except msgspec.MsgspecError as error:
            raise StartError(
                f"SIMULATED_LEDGER: line {number} cannot be imported: {error}"
            ) from None
        decided = msgspec.structs.asdict(line)
        del decided["kind"]
        payment_id = decided.pop("payment_id")
        yield LedgerRefund(**decided, payment_id=payment_id) if payment_id else Decision(**decided)


def _kept_as(earlier: Path) -> Path:
    """A name that is not taken: there may have been a rollback, and another file."""
    name = f"{earlier.name.removesuffix('.earlier')}.imported"
    names = (f"{name}-{number}" if number > 1 else name for number in itertools.count(1))
    return next(kept for kept in map(earlier.with_name, names) if not kept.exists())
