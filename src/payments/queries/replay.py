"""Reading the log in order, as a whole or in part, without holding more than a little of it."""

import time
from collections.abc import Iterator, Sequence
from datetime import datetime
from itertools import islice
from typing import Any, NamedTuple
from uuid import UUID

import msgspec
import psycopg

from payments.database import DatabaseAddress
from payments.errors import StartError
from payments.events.chain import LogEntry
from payments.events.store import HEAD_POSITION, READ_NEXT_TIME, READ_PART
from payments.snapshot import Snapshot, unhurried

NAME = "payments replay"
LAST = 2**63 - 1
FOLLOW_EVENTS = 1000  # read at once
POLL_S = 1.0  # a NOTIFY is a hint that may be lost
RETRY_MIN_S, RETRY_MAX_S = 0.1, 5.0

Moment = int | datetime  # a position, or a time


class Sealed(NamedTuple):
    """An event of the log and its seal; None: it is not sealed yet."""

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


class _MerchantOrder(msgspec.Struct):
    merchant_order_id: UUID


def replay(snapshot: Snapshot, wanted: Wanted) -> Iterator[Sealed]:
    """The events that are wanted, in order."""
    first = wanted.first
    last = wanted.last
    if isinstance(first, datetime):
        first = position_at(snapshot, first)
    if isinstance(last, datetime):
        last = position_at(snapshot, last) - 1
    # What the order's id stands in is looked at once more here: then the limit counts.
    limit = wanted.limit if wanted.order_id is None else None
    rows = snapshot.stream(READ_PART, _params(wanted, first, last, limit))
    found = (Sealed(LogEntry(*row[:6]), row[6]) for row in rows)
    yield from islice((each for each in found if _fits(each.event, wanted)), wanted.limit)


def head_of(snapshot: Snapshot) -> int:
    """The last position, 0 for an empty log."""
    ((head,),) = snapshot.fetch(HEAD_POSITION)
    return int(head)


def position_at(snapshot: Snapshot, moment: datetime) -> int:
    """The first position that was recorded then or later; one behind the end if there is none.

    Times never decrease along the log, so a few dozen rows are looked at, however many there are.
    """
    low, high = 1, head_of(snapshot) + 1
    while low < high:
        middle = (low + high) // 2
        rows = snapshot.fetch(READ_NEXT_TIME, {"position": middle})
        if not rows or rows[0][1] >= moment:
            high = middle
        else:
            low = int(rows[0][0]) + 1
    return low


def follow(address: DatabaseAddress, wanted: Wanted, after: int) -> Iterator[Sealed | None]:
    """The events behind a position as they come, for ever; None whenever there is none for now.

    Goes on after a lost connection, with nothing twice and nothing left out.
    """
    pause_s = RETRY_MIN_S
    while True:
        try:
            with unhurried(address, NAME) as connection:
                connection.execute("LISTEN payment_events")
                while True:
                    for last in _parts(connection, after):
                        for found in _part(connection, wanted, after + 1, last):
                            if _fits(found.event, wanted):
                                yield found
                        after, pause_s = last, RETRY_MIN_S
                    yield None
                    for _ in connection.notifies(timeout=POLL_S, stop_after=1):
                        pass
        except (psycopg.OperationalError, StartError):
            time.sleep(pause_s)
            pause_s = min(pause_s * 2, RETRY_MAX_S)


def _parts(connection: psycopg.Connection[Any], after: int) -> Iterator[int]:
    """The last position of each part of what there is by now behind a position."""
    row = connection.execute(HEAD_POSITION).fetchone()
    head = row[0] if row else 0
    yield from range(after + FOLLOW_EVENTS, head, FOLLOW_EVENTS)
    if head > after:
        yield head


def _part(
    connection: psycopg.Connection[Any], wanted: Wanted, first: int, last: int
) -> list[Sealed]:
    with connection.cursor(binary=True) as cursor:
        cursor.execute(READ_PART.encode(), _params(wanted, first, last, None))
        return [Sealed(LogEntry(*row[:6]), row[6]) for row in cursor.fetchall()]


def _params(wanted: Wanted, first: int, last: int, limit: int | None) -> dict[str, object]:
    holding = None if wanted.order_id is None else str(wanted.order_id).encode()
    return {
        "first": first,
        "last": last,
        "payment_id": wanted.payment_id,
        "types": None if wanted.types is None else list(wanted.types),
        "holding": holding,
        "limit": limit,
    }


def _fits(event: LogEntry, wanted: Wanted) -> bool:
    """Whether an event that holds the order's id is the order's; one that cannot be read may be."""
    if wanted.order_id is None:
        return True
    try:
        read = msgspec.json.decode(event.state, type=_MerchantOrder)
    except (msgspec.MsgspecError, UnicodeDecodeError, RecursionError):
        return True
    return read.merchant_order_id == wanted.order_id
