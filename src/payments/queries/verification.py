"""Whether the log is what was sealed: the hash chain recomputed, from the database or an export.
And whether it is the log that was meant, and names no capture twice.

Each event is checked against its own seal and the one before, so every position that was tampered
with is named, and what follows it is judged on its own.
"""

from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import BinaryIO, NamedTuple
from uuid import UUID

import msgspec

from payments.database.connections import Database
from payments.errors import StartError
from payments.events.chain import GENESIS, read_line, seal
from payments.events.losses import ACCEPTED_LOSSES, LOG_ID, OPEN_LOSS, AcceptedLoss, OpenLoss
from payments.events.store import (
    READ_ENDS,
    READ_PLACELESS,
    READ_PLACES,
    SHARED_CAPTURES,
    LogEntry,
)
from payments.snapshot import Reader, Rows, Source, windows

HEAD = """
SELECT position, hash FROM log_seals ORDER BY position DESC LIMIT 1
"""

PART_POSITIONS = 2000  # looked at by one statement
CAPTURES_POSITIONS = 10_000


class Head(NamedTuple):
    """The seal of a position: whoever keeps it elsewhere can tell whether what came before it was
    altered since."""

    position: int
    hash: bytes

    def __str__(self) -> str:
        return f"{self.position}:{self.hash.hex()}"


class LogPlace(NamedTuple):
    """What stands at a position: the event, its seal, or both."""

    position: int
    event: LogEntry | None
    hash: bytes | None


class Finding(NamedTuple):
    """Something that is not as it was sealed; it begins at `position`."""

    position: int
    text: str

    def __str__(self) -> str:
        return f"position {self.position}: {self.text}"


class SharedCapture(NamedTuple):
    """Two payments that name the same transaction of the same provider."""

    payment_id: UUID
    other_id: UUID
    gateway: str
    transaction: str

    def __str__(self) -> str:
        return (
            f"payment {self.payment_id}: names the provider's transaction {self.transaction}, "
            f"as payment {self.other_id} does"
        )


async def newest_head(database: Database) -> Head | None:
    """None: nothing is sealed yet."""
    rows = await database.fetch(HEAD)
    return Head(*rows[0]) if rows else None


class Verification:
    """One pass over the log. Use `findings` once; the rest is complete when it is exhausted.

    `events` were looked at, `sealed` of them had a seal; `head` is the last of these. `last` is the
    last position of an event.
    """

    def __init__(self, heads: Mapping[int, bytes], losses: Sequence[AcceptedLoss] = ()) -> None:
        """`heads`: what was kept elsewhere, by position; `losses`: what a failover or a restore
        took back. A head of what was lost is no finding, and goes to `lost_heads`."""
        self._heads = heads
        self._losses = losses
        self.lost_heads: list[str] = []
        self.events = self.sealed = self.last = 0
        self.head: Head | None = None
        self._expected = 1
        # The chain as the events make it; None if it is not known, behind what is missing.
        self._own: bytes | None = GENESIS
        # The seal before, as it is stored; or what it should be, if it is missing.
        self._before: bytes | None = GENESIS
        self._unsealed_from: int | None = None
        # An event that does not fit its seal, and the seal that would fit it.
        self._suspect: tuple[int, bytes | None] | None = None
        self._agreed = 0  # the last position of a head that fits
        self._found = False

    def findings(self, places: Iterable[LogPlace]) -> Iterator[Finding]:
        for place in places:
            if self._is_as_sealed(place):
                continue
            for finding in self._look_at(place):
                self._found = True
                yield finding
        for finding in self._finish():
            self._found = True
            yield finding

    def _is_as_sealed(self, place: LogPlace) -> bool:
        """Nearly every place: its event is the next one and fits its seal, and nothing is open."""
        position, event, hash = place
        if (
            event is None
            or hash is None
            or position != self._expected
            or position in self._heads
            or self._before is None
            or self._own != self._before
            or self._suspect is not None
            or self._unsealed_from is not None
            or _seal(self._before, event) != hash
        ):
            return False
        self._expected += 1
        self.events += 1
        self.sealed += 1
        self.last = position
        self._own = self._before = hash
        self.head = Head(position, hash)
        return True

    def _look_at(self, place: LogPlace) -> Iterator[Finding]:
        position, event, hash = place
        if position < self._expected:
            yield from self._clear(None, None)
            yield Finding(position, "stands in the log twice, or out of order")
            return
        if position > self._expected:
            yield from self._clear(None, None)
            yield _missing(self._expected, position - 1, "neither the log nor the seals have")
            self._own = self._before = None
        self._expected = position + 1
        if hash is not None:
            if self._unsealed_from is not None:
                yield _unsealed(self._unsealed_from, position - 1)
                self._unsealed_from = None
            self.sealed += event is not None
            self.head = Head(position, hash)
        if event is None:
            yield from self._clear(None, None)
            yield Finding(position, "was sealed, and is missing from the log")
            self._own, self._before = None, hash
            return
        self.events += 1
        self.last = position
        yield from self._clear(event, hash)
        fitting = _seal(self._before, event)
        if hash is None:
            if self._unsealed_from is None:
                self._unsealed_from = position
        elif fitting != hash and self._before is not None:
            self._suspect = position, fitting
        self._own = fitting if self._own == self._before else _seal(self._own, event)
        self._before = hash if hash is not None else fitting
        yield from self._compare_head(position)

    def _clear(self, event: LogEntry | None, hash: bytes | None) -> Iterator[Finding]:
        """Says what is wrong with the suspect, now that it is known what comes after it."""
        if self._suspect is None:
            return
        (position, fitting), self._suspect = self._suspect, None
        text = "the event is not the one that was sealed"
        if (
            event is not None
            and hash is not None
            and _seal(self._before, event) != hash
            and _seal(fitting, event) == hash
        ):
            text = "its seal was altered; the event fits the seals around it"
            self._before = fitting
        yield Finding(position, text)

    def _compare_head(self, position: int) -> Iterator[Finding]:
        kept = self._heads.get(position)
        if kept is None:
            return
        if kept == self._own:
            self._agreed = position
            return
        if self._is_lost(position):
            return
        text = f"the log up to here is not the one that the head {position}:… was taken of"
        if not self._found and self._suspect is None:
            text += (
                ", though it fits its seals: both were altered, somewhere in the positions "
                f"{self._agreed + 1} to {position}"
            )
        yield Finding(position, text)

    def _is_lost(self, position: int) -> bool:
        """Whether the head was taken of what the log has lost, and somebody has accepted that."""
        for loss in self._losses:
            if loss.covers(position):
                self.lost_heads.append(
                    f"head {position}:…: was lost by a failover or a restore, as {loss.by} accepted"
                )
                return True
        return False

    def _finish(self) -> Iterator[Finding]:
        yield from self._clear(None, None)
        for position in sorted(self._heads):
            if position > self.last and not self._is_lost(position):
                text = f"a head was taken here, but the log ends at position {self.last}"
                yield Finding(self.last + 1, f"{text}: its end was cut off (head {position}:…)")


def _seal(before: bytes | None, event: LogEntry) -> bytes | None:
    """None if it cannot be known; a row with impossible values has no seal that could fit."""
    if before is None:
        return None
    try:
        return seal(before, event)
    except (AttributeError, TypeError, ValueError, OverflowError):
        return b""


def _missing(first: int, last: int, who: str) -> Finding:
    if first == last:
        return Finding(first, f"is missing: {who} it")
    return Finding(first, f"positions {first} to {last} are missing: {who} them")


def _unsealed(first: int, last: int) -> Finding:
    if first == last:
        return Finding(first, "its seal is missing, though later events are sealed")
    return Finding(first, f"the seals up to position {last} are missing, though later ones are not")


class Ends(NamedTuple):
    """The last position of the log and of its seals, 0 for none, and up to where the sealing
    follower says that it sealed; None: there is no such follower."""

    log: int
    seals: int
    sealed: int | None


def ends_of(source: Source) -> Ends:
    """All as of one moment."""
    ((log, seals, sealed),) = source.fetch(READ_ENDS)
    return Ends(log=log or 0, seals=seals or 0, sealed=sealed)


def places_of(reader: Reader, ends: Ends) -> Iterator[LogPlace]:
    """The log and its seals side by side, as they were when they ended there.

    Read in parts, since neither changes: what is appended and sealed meanwhile is left out.
    """
    for part in reader.ahead(_parts(reader, ends)):
        for position, there, *event, hash in part:
            yield LogPlace(position, LogEntry(position, *event) if there else None, hash)
    for row in reader.fetch(READ_PLACELESS):
        yield LogPlace(0, LogEntry(*row), None)


def _parts(reader: Reader, ends: Ends) -> Iterator[Rows]:
    for first, last in windows(reader, max(ends.log, ends.seals), PART_POSITIONS):
        bounds = {
            "first": first,
            "last_event": min(last, ends.log),
            "last_seal": min(last, ends.seals),
        }
        yield reader.fetch(READ_PLACES, bounds)


def accepted_losses(source: Source) -> list[AcceptedLoss]:
    """What the log lost, and somebody has accepted, oldest first."""
    return [AcceptedLoss(*row) for row in source.fetch(ACCEPTED_LOSSES)]


def open_losses(source: Source) -> Iterator[Finding]:
    """What the log lost, and nobody has accepted."""
    for loss in map(OpenLoss._make, source.fetch(OPEN_LOSS)):
        yield Finding(
            loss.kept_position + 1,
            f"the log lacks what it had acknowledged, up to position {loss.lost_position} "
            f"(found by {loss.found_by}): `payments log accept-loss`",
        )


def missing_seals(ends: Ends, head: Head | None) -> Iterator[Finding]:
    """What the sealing follower says that it sealed, and is not there."""
    last = head.position if head is not None else 0
    if ends.sealed is None or ends.sealed == last:
        return
    if ends.sealed > last:
        text = f"the seals end here, but were written up to position {ends.sealed}"
        yield Finding(last + 1, text)
    else:
        text = f"was sealed, but not by the follower, which stands at position {ends.sealed}"
        yield Finding(ends.sealed + 1, text)


def log_id_in(source: Source) -> UUID | None:
    """As `log_id`."""
    rows = source.fetch(LOG_ID)
    return rows[0][0] if rows else None


def another_log(id: UUID | None, wanted: UUID | None, events: int) -> Iterator[str]:
    """What says that this is not the log that was meant; `wanted` is the id of that, if given."""
    if id is None:
        yield "log: its id is missing"
    elif wanted not in (None, id):
        yield f"log: its id is {id}, not {wanted}: is this the right database?"
    if not events:
        yield str(Finding(1, "the log is empty: is this the right database?"))


def shared_captures(source: Source, ends: Ends) -> Iterator[SharedCapture]:
    """Read in parts. Damaged events that name none share nothing."""
    for first, last in windows(source, ends.log, CAPTURES_POSITIONS):
        for row in source.fetch(SHARED_CAPTURES, {"first": first, "last": last}):
            yield SharedCapture(*row)


class NoExport(StartError):
    """The file is no export of a log: its first line is none of `payments replay`."""


def places_in(lines: BinaryIO, damaged: list[Finding]) -> Iterator[LogPlace]:
    """The events of an export and their seals. What is no line of an export goes to `damaged`;
    NoExport if it is the first one."""
    position = 0
    for number, line in enumerate(lines, 1):
        if not line.strip():
            continue
        try:
            read = read_line(line)
            hash = None if read.hash is None else bytes.fromhex(read.hash)
            place = LogPlace(read.position, read.entry, hash)
        except (msgspec.MsgspecError, ValueError, RecursionError) as error:
            if number == 1:
                raise NoExport(f"line 1 is no event of an export: {error}") from None
            damaged.append(Finding(position + 1, f"line {number} is no event of an export"))
            continue
        position = place.position
        yield place
