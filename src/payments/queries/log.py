"""Reads the log in order, whole or filtered, and follows it.

It reads by position, in parts of one short statement each: the log is append-only and positions are
assigned in commit order, so the events up to a position never change. No transaction is held
between two parts. A part fits into the socket buffers, so the server finishes it even if the reader
is stopped at that moment.
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
# Linux buffers 170 KB for a Unix socket that is not read, and more for TCP.
PART_BYTES = 140_000
ROW_BYTES = 120  # overhead of a row, besides the stored event
# Events that one statement with a filter reads, in about 20 ms.
SEARCHED_EVENTS = 20_000
# Not LISTEN: the server must keep all notifications that a listener has not read, until its queue
# is full.
POLL_S = 0.2
RETRY_MIN_S, RETRY_MAX_S = 0.1, 5.0
RETRY_FOR_S = 60.0  # a failover, a restart

Moment = int | datetime  # a position, or a time


class Sealed(NamedTuple):
    """An event of the log and its seal; None: not sealed yet."""

    event: LogEntry
    hash: bytes | None


class Wanted(NamedTuple):
    """Filters of events; None: no filter. Times are those of recording. `first` is inclusive;
    `last` is inclusive as a position and exclusive as a time."""

    payment_id: UUID | None = None
    order_id: UUID | None = None
    types: Sequence[str] | None = None
    first: Moment = 1
    last: Moment = LAST
    limit: int | None = None

    @property
    def all(self) -> bool:
        """Whether every event from `first` to `last` is wanted."""
        return self.payment_id is None and self.order_id is None and self.types is None


class _MerchantOrder(msgspec.Struct):
    merchant_order_id: UUID


class Replay:
    """One pass over the log: first the events up to its end at the start, then new ones.

    It reconnects after a lost connection; no event is repeated or skipped.
    """

    def __init__(self, address: DatabaseAddress, wanted: Wanted) -> None:
        """Raises StartError."""
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
        """The wanted events, up to the end of the log when this was created.

        Raises StartError if the database is unavailable for RETRY_FOR_S, or has lost events.
        """
        first, last = self._position(self._wanted.first), self._position(self._wanted.last)
        if isinstance(self._wanted.last, datetime):
            last -= 1
        yield from self._between(first - 1, min(last, self._head))

    def follow(self) -> Iterator[list[Sealed]]:
        """The wanted events after that end as they are appended, for ever, however long the
        database is unavailable."""
        after = max(self._head, self._position(self._wanted.first) - 1)
        while self._left != 0:
            head = self._ask(head_of, for_ever=True)
            yield from self._between(after, head, for_ever=True)
            after = max(after, head)
            time.sleep(POLL_S)

    def asked_for(self, payment_ids: Sequence[UUID]) -> Rows:
        """The intents of the charges and refunds of these payments, as rows of READ_ASKED_FOR."""
        params = {"payment_ids": list(payment_ids)}
        return self._ask(lambda reader: reader.fetch(READ_ASKED_FOR, params))

    def _between(self, after: int, last: int, *, for_ever: bool = False) -> Iterator[list[Sealed]]:
        """After one position and up to another, within the limit."""
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
        """The wanted ones of the next events, and the last position that was read."""
        wanted = self._wanted
        if wanted.all:
            most, until = READ_PART_EVENTS, min(last, after + self._rows)
            rows = reader.fetch(READ_PART, {"after": after, "last": until}, prepare=True)
            largest = max((len(row[4]) for row in rows), default=0)
            self._rows = max(1, min(most, PART_BYTES // (largest + ROW_BYTES)))
        else:
            most = READ_MATCHING_EVENTS
            # The events of one payment are few and have an index.
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
        """The result of `read`, retried while the database is unavailable."""
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
            # It may be another server, which lacks events.
            if not for_ever and (head := head_of(reader)) < self._head:
                reader.close()
                raise StartError(
                    f"the log ends at position {head}; before, it ended at {self._head}"
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
    """The first position up to `head` that was recorded then or later; `head` + 1 if there is none.

    Times never decrease along the log, so a binary search reads a few dozen rows.
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
    """The first position with an event, or `last` + 1: damage may leave wide gaps."""
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
    """Whether an event that contains the order's id belongs to the order; an unreadable one may."""
    try:
        read = msgspec.json.decode(event.state, type=_MerchantOrder)
    except (msgspec.MsgspecError, UnicodeDecodeError, RecursionError):
        return True
    return read.merchant_order_id == order_id
