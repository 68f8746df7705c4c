"""Verifies the log against its seals: recomputes the hash chain, from the database or an export.
Also checks that it is the expected log, and that no two payments name the same capture.

Each event is checked against its own seal and the previous one, so every altered position is named,
and the events after it are judged on their own.
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

PART_POSITIONS = 2000  # read by one statement
CAPTURES_POSITIONS = 10_000


class Head(NamedTuple):
    """The seal of a position. Kept elsewhere, it reveals whether the log up to it was altered."""

    position: int
    hash: bytes

    def __str__(self) -> str:
        return f"{self.position}:{self.hash.hex()}"


class LogPlace(NamedTuple):
    """A position of the log: its event, its seal, or both."""

    position: int
    event: LogEntry | None
    hash: bytes | None


class Finding(NamedTuple):
    """A difference from the seals; it begins at `position`."""

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
    """None if nothing is sealed yet."""
    rows = await database.fetch(HEAD)
    return Head(*rows[0]) if rows else None


class Verification:
    """One pass over the log. Use `findings` once; the attributes are complete when it is exhausted.

    `events` is the number of events, `sealed` of those with a seal; `head` is the last seal. `last`
    is the last position of an event.
    """

    def __init__(self, heads: Mapping[int, bytes], losses: Sequence[AcceptedLoss] = ()) -> None:
        """`heads`: the hashes that were kept elsewhere, by position; `losses`: events that were
        lost in a failover or restore. A head of lost events is not a finding, and goes to
        `lost_heads`."""
        self._heads = heads
        self._losses = losses
        self.lost_heads: list[str] = []
        self.events = self.sealed = self.last = 0
        self.head: Head | None = None
        self._expected = 1
        # The chain computed from the events; None if it is unknown, after missing events.
        self._own: bytes | None = GENESIS
        # The previous seal as stored; the computed one if it is missing.
        self._before: bytes | None = GENESIS
        self._unsealed_from: int | None = None
        # The position of an event that does not match its seal, and the seal that would match.
        self._suspect: tuple[int, bytes | None] | None = None
        self._agreed = 0  # the last position of a head that matches
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
        """The fast path for nearly every place: its event is the next one and matches its seal,
        and no earlier finding is pending."""
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
            yield Finding(position, "is recorded twice, or out of order")
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
        """Reports the suspect, now that the event after it is known."""
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
            text = "its seal was altered; the event matches the seals around it"
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
        text = f"the log up to here is not the log of the head {position}:…"
        if not self._found and self._suspect is None:
            text += (
                ", though it matches its seals: both were altered, in the positions "
                f"{self._agreed + 1} to {position}"
            )
        yield Finding(position, text)

    def _is_lost(self, position: int) -> bool:
        """Whether the head is of events in an accepted loss."""
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
                text = f"a head was kept of this position, but the log ends at position {self.last}"
                yield Finding(self.last + 1, f"{text}: its end was cut off (head {position}:…)")


def _seal(before: bytes | None, event: LogEntry) -> bytes | None:
    """The seal of the event; None if the previous one is unknown, or if the row has impossible
    values, which no seal can match."""
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
    """The last position of the log and of its seals, 0 for none, and the position of the sealing
    follower; None: there is no such follower."""

    log: int
    seals: int
    sealed: int | None


def ends_of(source: Source) -> Ends:
    """Reads all three in one statement."""
    ((log, seals, sealed),) = source.fetch(READ_ENDS)
    return Ends(log=log or 0, seals=seals or 0, sealed=sealed)


def places_of(reader: Reader, ends: Ends) -> Iterator[LogPlace]:
    """The log and its seals side by side, up to `ends`.

    Read in parts, since neither changes; events and seals after `ends` are left out.
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
    """The losses of the log that an operator has accepted, oldest first."""
    return [AcceptedLoss(*row) for row in source.fetch(ACCEPTED_LOSSES)]


def open_losses(source: Source) -> Iterator[Finding]:
    """The losses of the log that are not accepted."""
    for loss in map(OpenLoss._make, source.fetch(OPEN_LOSS)):
        yield Finding(
            loss.kept_position + 1,
            f"acknowledged events are missing up to position {loss.lost_position} (found by "
            f"{loss.found_by}): `payments log accept-loss`",
        )


def missing_seals(ends: Ends, head: Head | None) -> Iterator[Finding]:
    """The seals that are missing, by the position of the sealing follower."""
    last = head.position if head is not None else 0
    if ends.sealed is None or ends.sealed == last:
        return
    if ends.sealed > last:
        text = f"the seals end here, but were written up to position {ends.sealed}"
        yield Finding(last + 1, text)
    else:
        text = f"was sealed, but not by the follower, which is at position {ends.sealed}"
        yield Finding(ends.sealed + 1, text)


def log_id_in(source: Source) -> UUID | None:
    """The id of the log in a source, as `log_id`."""
    rows = source.fetch(LOG_ID)
    return rows[0][0] if rows else None


def another_log(id: UUID | None, wanted: UUID | None, events: int) -> Iterator[str]:
    """Reasons why this is not the expected log; `wanted` is the expected id, if given."""
    if id is None:
        yield "log: its id is missing"
    elif wanted not in (None, id):
        yield f"log: its id is {id}, not {wanted}: is this the right database?"
    if not events:
        yield str(Finding(1, "the log is empty: is this the right database?"))


def shared_captures(source: Source, ends: Ends) -> Iterator[SharedCapture]:
    """Read in parts. Damaged events without a transaction are skipped."""
    for first, last in windows(source, ends.log, CAPTURES_POSITIONS):
        for row in source.fetch(SHARED_CAPTURES, {"first": first, "last": last}):
            yield SharedCapture(*row)


class NoExport(StartError):
    """The file is not an export: its first line is not one of `payments replay`."""


def places_in(lines: BinaryIO, damaged: list[Finding]) -> Iterator[LogPlace]:
    """The events of an export and their seals. Lines that are not of an export go to `damaged`;
    raises NoExport if the first one is not."""
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
                raise NoExport(f"line 1 is not an event of an export: {error}") from None
            damaged.append(Finding(position + 1, f"line {number} is not an event of an export"))
            continue
        position = place.position
        yield place
