"""Reading the log in order, as a whole or in part, and following it.

By position, in parts of one short statement each: the log is append-only and positions are given
out in the order of commits, so the events up to a position are the same whenever they are read.
Between two parts nothing is held. A part fits into what sockets hold, so the server is done with it
even if whoever asked for it is stopped that moment.
"""

import time
from collections.abc import Callable, Iterator, Sequence
from datetime import datetime
from types import TracebackType
from typing import NamedTuple, Self, TypeVar
from uuid import UUID

import msgspec
import psycopg

from payments.backoff import Backoff
from payments.database.connections import DatabaseAddress, reason_of
from payments.errors import StartError
from payments.events.store import (
    HEAD_POSITION,
    READ_ASKED_FOR,
    READ_MATCHING,
    READ_MATCHING_EVENTS,
    READ_NEXT_TIME,
    READ_PART,
    READ_PART_EVENTS,
    LogEntry,
)
from payments.snapshot import Reader, Rows, Source

T = TypeVar("T")

NAME = "payments replay"
LAST = 2**63 - 1
# Linux holds 170 KB for a Unix socket that nobody reads from, and more for TCP.
PART_BYTES = 140_000
ROW_BYTES = 120  # besides what is stored of an event
# So many are looked at by a statement that searches, in some 20 ms.
SEARCHED_EVENTS = 20_000
# Not LISTEN: what a listener does not read the server must keep, and in time it can keep no more.
POLL_S = 0.2
RETRY_MIN_S, RETRY_MAX_S = 0.1, 5.0
RETRY_FOR_S = 60.0  # a failover, a restart

Moment = int | datetime  # a position, or a time


class Sealed(NamedTuple):
    """An event of the log and its seal; None: it was not sealed yet."""

    event: LogEntry
    hash: bytes | None


class Wanted(NamedTuple):
    """Which events; None: all. A time is that of recording. `first` is included, so is `last` if
    it is a position; if it is a time, it is not."""

    payment_id: UUID | None = None
    order_id: UUID | None = None
    types: Sequence[str] | None = None
    first: Moment = 1
    last: Moment = LAST
    limit: int | None = None

    @property
    def all(self) -> bool:
        """Whether every event is wanted that stands between `first` and `last`."""
        return self.payment_id is None and self.order_id is None and self.types is None


class _MerchantOrder(msgspec.Struct):
    merchant_order_id: UUID


class Replay:
    """One reading of the log: what was there when it began, and then what comes.

    A lost connection is opened again; nothing comes twice, and nothing is left out.
    """

    def __init__(self, address: DatabaseAddress, wanted: Wanted) -> None:
        """StartError."""
        self._address = address
        self._wanted = wanted
        self._left = wanted.limit
        self._rows = READ_PART_EVENTS
        self._reader: Reader | None = Reader(address, NAME)
        self._head = 0
        self._head = self._ask(head_of)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, _: TracebackType | None
    ) -> None:
        self._close()

    def parts(self) -> Iterator[list[Sealed]]:
        """The events that are wanted, up to where the log ended when this began.

        StartError if the database is away for RETRY_FOR_S, or lacks what it had.
        """
        first, last = self._position(self._wanted.first), self._position(self._wanted.last)
        if isinstance(self._wanted.last, datetime):
            last -= 1
        yield from self._between(first - 1, min(last, self._head))

    def follow(self) -> Iterator[list[Sealed]]:
        """Those behind it as they come, for ever, however long the database is away."""
        after = max(self._head, self._position(self._wanted.first) - 1)
        while self._left != 0:
            head = self._ask(head_of, for_ever=True)
            yield from self._between(after, head, for_ever=True)
            after = max(after, head)
            time.sleep(POLL_S)

    def asked_for(self, payment_ids: Sequence[UUID]) -> Rows:
        """What began the charges and refunds of these payments, as READ_ASKED_FOR has it."""
        params = {"payment_ids": list(payment_ids)}
        return self._ask(lambda reader: reader.fetch(READ_ASKED_FOR, params))

    def _between(self, after: int, last: int, *, for_ever: bool = False) -> Iterator[list[Sealed]]:
        """Behind one position and up to another, as many as are left."""
        while after < last and self._left != 0:
            found, after = self._ask(
                lambda reader, after=after: self._part(reader, after, last),  # type: ignore[misc]
                for_ever=for_ever,
            )
            if self._left is not None:
                found = found[: self._left]
                self._left -= len(found)
            if found:
                yield found

    def _part(self, reader: Reader, after: int, last: int) -> tuple[list[Sealed], int]:
        """What is wanted of the next events, and up to which position was looked."""
        wanted = self._wanted
        if wanted.all:
            most, until = READ_PART_EVENTS, min(last, after + self._rows)
            rows = reader.fetch(READ_PART, {"after": after, "last": until}, prepare=True)
            largest = max((len(row[4]) for row in rows), default=0)
            self._rows = max(1, min(most, PART_BYTES // (largest + ROW_BYTES)))
        else:
            most = READ_MATCHING_EVENTS
            # A payment's events have an index, and are few.
            until = last if wanted.payment_id is not None else min(last, after + SEARCHED_EVENTS)
            rows = reader.fetch(READ_MATCHING, _params(wanted, after, until))
        if len(rows) >= most:
            until = int(rows[-1][0])
        elif not rows:
            until = max(until, _next_position(reader, until + 1, last) - 1)
        found = (Sealed(LogEntry(*row[:6]), row[6]) for row in rows)
        if wanted.order_id is None:
            return list(found), until
        return [each for each in found if _is_of(wanted.order_id, each.event)], until

    def _position(self, moment: Moment) -> int:
        if isinstance(moment, int):
            return moment
        return self._ask(lambda source: position_at(source, moment, self._head))

    def _ask(self, read: Callable[[Reader], T], *, for_ever: bool = False) -> T:
        """What `read` makes of the database, as soon as that answers."""
        backoff = Backoff(RETRY_MIN_S, RETRY_MAX_S)
        give_up_at = time.monotonic() + RETRY_FOR_S
        while True:
            try:
                return read(self._connected(for_ever))
            except (psycopg.OperationalError, StartError) as error:
                self._close()
                if not for_ever and time.monotonic() > give_up_at:
                    if isinstance(error, StartError):
                        raise
                    raise StartError(f"the database: {reason_of(error)}") from error
            time.sleep(backoff.next_s())

    def _connected(self, for_ever: bool) -> Reader:
        if self._reader is None:
            reader = Reader(self._address, NAME)
            # It may be another server than before.
            if not for_ever and (head := head_of(reader)) < self._head:
                reader.close()
                raise StartError(
                    f"the log ends at position {head} now; when this began, at {self._head}"
                )
            self._reader = reader
        return self._reader

    def _close(self) -> None:
        if self._reader is not None:
            self._reader.close()
            self._reader = None


def head_of(source: Source) -> int:
    """The last position, 0 for an empty log."""
    ((head,),) = source.fetch(HEAD_POSITION)
    return int(head)


def position_at(source: Source, moment: datetime, head: int) -> int:
    """The first position up to `head` that was recorded then or later; the one behind it if there
    is none.

    Times never decrease along the log, so a few dozen rows are looked at, however many there are.
    """
    low, high = 1, head + 1
    while low < high:
        middle = (low + high) // 2
        rows = source.fetch(READ_NEXT_TIME, {"position": middle})
        if not rows or rows[0][1] >= moment:
            high = middle
        else:
            low = int(rows[0][0]) + 1
    return low


def _next_position(source: Source, first: int, last: int) -> int:
    """The first one that is taken, or the one behind `last`: damage may leave wide gaps."""
    rows = source.fetch(READ_NEXT_TIME, {"position": first}) if first <= last else []
    return min(int(rows[0][0]), last + 1) if rows else last + 1


def _params(wanted: Wanted, after: int, last: int) -> dict[str, object]:
    return {
        "after": after,
        "last": last,
        "payment_id": wanted.payment_id,
        "types": None if wanted.types is None else list(wanted.types),
        "holding": None if wanted.order_id is None else str(wanted.order_id).encode(),
    }


def _is_of(order_id: UUID, event: LogEntry) -> bool:
    """Whether an event that holds the order's id is the order's; one that cannot be read may be."""
    try:
        read = msgspec.json.decode(event.state, type=_MerchantOrder)
    except (msgspec.MsgspecError, UnicodeDecodeError, RecursionError):
        return True
    return read.merchant_order_id == order_id
