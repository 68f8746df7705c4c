"""Tampering, done as a superuser with the triggers off: each is found, at the right position."""

import asyncio
import itertools
from collections.abc import Callable, Iterator
from datetime import UTC, datetime
from io import BytesIO
from typing import Any

import psycopg
import pytest

from payments.database.connections import Database, DatabaseAddress
from payments.events.chain import GENESIS, read_line, seal, write_line
from payments.events.store import LogEntry
from payments.projections.comparison import Comparison
from payments.queries import verification as module
from payments.queries.verification import (
    Finding,
    LogPlace,
    NoExport,
    Verification,
    ends_of,
    missing_seals,
    places_in,
    places_of,
)
from payments.snapshot import Reader
from tests.support import History, append, catch_up, seal_log

Connection = psycopg.Connection[Any]
EVENTS = 40


def fill(address: DatabaseAddress, connection: Connection) -> None:
    """20 payments of two events each, with all first events before the second ones; sealed."""
    known = [History(f"k{n}").charged() for n in range(EVENTS // 2)]
    append(connection, [*(each.facts[0] for each in known), *(each.facts[1] for each in known)])

    catch_up(address)


@pytest.fixture
def tampered(address: DatabaseAddress, connection: Connection) -> Connection:
    """A database with sealed events, whose triggers are off, and which takes any values."""
    fill(address, connection)
    connection.execute("ALTER TABLE payment_events DROP CONSTRAINT payment_events_sane")
    for table in ("payment_events", "log_seals"):
        connection.execute(f"ALTER TABLE {table} DISABLE TRIGGER ALL".encode())
    return connection


def heads_of(connection: Connection, *positions: int) -> dict[int, bytes]:
    query = "SELECT position, hash FROM log_seals WHERE position = ANY (%s)"
    return dict(connection.execute(query, [list(positions)]).fetchall())


def findings(address: DatabaseAddress, heads: dict[int, bytes] | None = None) -> list[Finding]:
    verification = Verification(heads or {})
    with Reader(address, "tests") as reader:
        ends = ends_of(reader)
        found = list(verification.findings(places_of(reader, ends)))
        return found + list(missing_seals(ends, verification.head))


def at(found: list[Finding]) -> list[int]:
    return [finding.position for finding in found]


# Statements, the positions that are named, and words of what is said of the first.
NOT_AS_SEALED = "is not the one that was sealed"
TAMPERINGS: dict[str, tuple[list[str], list[int], str]] = {
    "a byte of the contents": (
        ["UPDATE payment_events SET state = set_byte(state, 40, 65) WHERE notification_id = 7"],
        [7],
        NOT_AS_SEALED,
    ),
    "an amount": (
        [
            "UPDATE payment_events SET state = convert_to(replace(convert_from(state, 'UTF8'),"
            " '1500', '15'), 'UTF8') WHERE notification_id = 27"
        ],
        [27],
        NOT_AS_SEALED,
    ),
    "the first event": (
        ["UPDATE payment_events SET state = state || ' ' WHERE notification_id = 1"],
        [1],
        NOT_AS_SEALED,
    ),
    "the last event": (
        [f"UPDATE payment_events SET state = '' WHERE notification_id = {EVENTS}"],
        [EVENTS],
        NOT_AS_SEALED,
    ),
    "two events": (
        ["UPDATE payment_events SET state = '' WHERE notification_id IN (7, 8)"],
        [7, 8],
        NOT_AS_SEALED,
    ),
    "the type": (
        ["UPDATE payment_events SET topic = 'PaymentFailed' WHERE notification_id = 27"],
        [27],
        NOT_AS_SEALED,
    ),
    "the time": (
        [
            "UPDATE payment_events SET recorded_at = recorded_at - interval '1 microsecond'"
            " WHERE notification_id = 7"
        ],
        [7],
        NOT_AS_SEALED,
    ),
    "a time that never comes": (
        ["UPDATE payment_events SET recorded_at = 'infinity' WHERE notification_id = 7"],
        [7],
        NOT_AS_SEALED,
    ),
    "the version": (
        ["UPDATE payment_events SET originator_version = 9 WHERE notification_id = 27"],
        [27],
        NOT_AS_SEALED,
    ),
    "the payment": (
        ["UPDATE payment_events SET originator_id = gen_random_uuid() WHERE notification_id = 27"],
        [27],
        NOT_AS_SEALED,
    ),
    "nothing in it": (
        [
            "ALTER TABLE payment_events ALTER state DROP NOT NULL, ALTER topic DROP NOT NULL,"
            " ALTER recorded_at DROP NOT NULL",
            "UPDATE payment_events SET state = NULL, topic = NULL, recorded_at = NULL"
            " WHERE notification_id = 7",
        ],
        [7],
        NOT_AS_SEALED,
    ),
    "no position": (
        [
            "ALTER TABLE payment_events ALTER notification_id DROP NOT NULL",
            "UPDATE payment_events SET notification_id = NULL WHERE notification_id = 7",
        ],
        [7, 0],
        "was sealed, and is missing",
    ),
    "removed": (
        ["DELETE FROM payment_events WHERE notification_id = 7"],
        [7],
        "was sealed, and is missing from the log",
    ),
    "the first removed": (
        ["DELETE FROM payment_events WHERE notification_id = 1"],
        [1],
        "was sealed, and is missing from the log",
    ),
    "removed with its seal": (
        [
            "DELETE FROM payment_events WHERE notification_id BETWEEN 7 AND 9",
            "DELETE FROM log_seals WHERE position BETWEEN 7 AND 9",
        ],
        [7],
        "positions 7 to 9 are missing",
    ),
    "the first removed with its seal": (
        [
            "DELETE FROM payment_events WHERE notification_id = 1",
            "DELETE FROM log_seals WHERE position = 1",
        ],
        [1],
        "is missing: neither the log nor the seals have it",
    ),
    "one payment removed": (
        [
            "DELETE FROM payment_events WHERE originator_id ="
            " (SELECT originator_id FROM payment_events WHERE notification_id = 7)"
        ],
        [7, 27],
        "was sealed, and is missing from the log",
    ),
    "inserted, and all behind it moved": (
        [
            "ALTER TABLE payment_events DROP CONSTRAINT payment_events_position",
            "UPDATE payment_events SET notification_id = notification_id + 1"
            " WHERE notification_id >= 7",
            "INSERT INTO payment_events SELECT 7, gen_random_uuid(), 1, topic, state, recorded_at"
            "  FROM payment_events WHERE notification_id = 8",
        ],
        list(range(7, EVENTS + 1)),
        NOT_AS_SEALED,
    ),
    "inserted at a position that is taken": (
        [
            "ALTER TABLE payment_events DROP CONSTRAINT payment_events_position",
            "INSERT INTO payment_events SELECT 7, gen_random_uuid(), 1, topic, state, now()"
            "  FROM payment_events WHERE notification_id = 8",
        ],
        [7],
        "",
    ),
    "in another order": (
        [
            "UPDATE payment_events SET notification_id = -1 WHERE notification_id = 7",
            "UPDATE payment_events SET notification_id = 7 WHERE notification_id = 30",
            "UPDATE payment_events SET notification_id = 30 WHERE notification_id = -1",
        ],
        [7, 30],
        NOT_AS_SEALED,
    ),
    "the end cut off": (
        ["DELETE FROM payment_events WHERE notification_id > 35"],
        [36, 37, 38, 39, 40],
        "was sealed, and is missing from the log",
    ),
    "the end cut off with its seals": (
        [
            "DELETE FROM payment_events WHERE notification_id > 35",
            "DELETE FROM log_seals WHERE position > 35",
        ],
        [36],
        f"the seals end here, but were written up to position {EVENTS}",
    ),
    "a seal": (
        ["UPDATE log_seals SET hash = sha256('') WHERE position = 7"],
        [7],
        "its seal was altered; the event matches the seals around it",
    ),
    "the last byte of a seal": (
        [
            "UPDATE log_seals SET hash = set_byte(hash, 31, get_byte(hash, 31) # 1)"
            " WHERE position = 7"
        ],
        [7],
        "its seal was altered; the event matches the seals around it",
    ),
    "the last seal": (
        [f"UPDATE log_seals SET hash = sha256('') WHERE position = {EVENTS}"],
        [EVENTS],
        NOT_AS_SEALED,  # one of the two; nothing behind it tells which
    ),
    "a seal removed": (
        ["DELETE FROM log_seals WHERE position = 7"],
        [7],
        "its seal is missing, though later events are sealed",
    ),
    "seals removed": (
        ["DELETE FROM log_seals WHERE position BETWEEN 7 AND 11"],
        [7],
        "the seals up to position 11 are missing",
    ),
    "the last seals removed": (
        ["DELETE FROM log_seals WHERE position > 20"],
        [21],
        "the seals end here",
    ),
    "all seals removed": (["DELETE FROM log_seals"], [1], "the seals end here"),
    "a seal without an event": (
        [f"INSERT INTO log_seals VALUES ({EVENTS + 1}, sha256(''))"],
        [EVENTS + 1, EVENTS + 1],
        "was sealed, and is missing from the log",
    ),
}


def test_nothing_is_found_where_nothing_was_done(
    tampered: Connection, address: DatabaseAddress
) -> None:
    assert findings(address) == []
    assert findings(address, heads_of(tampered, 1, 7, EVENTS)) == []


@pytest.mark.parametrize("name", TAMPERINGS)
def test_it_is_found(tampered: Connection, address: DatabaseAddress, name: str) -> None:
    statements, positions, words = TAMPERINGS[name]
    for statement in statements:
        tampered.execute(statement.encode())
    found = findings(address)
    if name == "inserted at a position that is taken":
        # Which of the two comes first is chance; the other one is out of order.
        assert set(at(found)) == set(positions)
        assert "is recorded twice" in found[-1].text
        return
    assert at(found) == positions
    assert words in found[0].text


def reseal(connection: Connection, first: int) -> None:
    """What somebody does who knows how seals are made."""
    rows = connection.execute(
        "SELECT notification_id, originator_id, originator_version, topic, state, recorded_at"
        "  FROM payment_events ORDER BY notification_id"
    ).fetchall()
    before = GENESIS
    for row in rows:
        before = seal(before, LogEntry(*row))
        if row[0] >= first:
            query = "UPDATE log_seals SET hash = %s WHERE position = %s"
            connection.execute(query, [before, row[0]])


def test_seals_that_were_written_again_need_a_head(
    tampered: Connection, address: DatabaseAddress
) -> None:
    heads = heads_of(tampered, 5, 20, EVENTS)
    tampered.execute("UPDATE payment_events SET state = '{}' WHERE notification_id = 7")
    reseal(tampered, 7)
    assert findings(address) == []
    assert findings(address, {5: heads[5]}) == []
    first, second = findings(address, heads)
    assert (first.position, second.position) == (20, EVENTS)
    assert "both were altered, in the positions 6 to 20" in first.text


def test_an_end_that_was_cut_off_for_good_needs_a_head(
    tampered: Connection, address: DatabaseAddress
) -> None:
    heads = heads_of(tampered, 30, EVENTS)
    tampered.execute("DELETE FROM payment_events WHERE notification_id > 35")
    tampered.execute("DELETE FROM log_seals WHERE position > 35")
    tampered.execute("UPDATE followers SET position = 35")
    assert findings(address) == []
    (finding,) = findings(address, heads)
    assert finding.position == 36
    assert "the log ends at position 35: its end was cut off" in finding.text


def test_a_head_of_another_log(tampered: Connection, address: DatabaseAddress) -> None:
    (finding,) = findings(address, {20: bytes(32)})
    assert "in the positions 1 to 20" in finding.text


@pytest.mark.parametrize("place", [0, 4, 31])
def test_every_byte_of_a_head_counts(
    tampered: Connection, address: DatabaseAddress, place: int
) -> None:
    head = bytearray(heads_of(tampered, 20)[20])
    assert findings(address, {20: bytes(head)}) == []
    head[place] ^= 1
    (finding,) = findings(address, {20: bytes(head)})
    assert "in the positions 1 to 20" in finding.text


def test_what_is_no_finding(
    tampered: Connection, address: DatabaseAddress, connection: Connection
) -> None:
    """Events that are not sealed yet, and tables that are behind."""
    heads = heads_of(tampered, EVENTS)
    append(connection, History("late").charged().refunded().facts)
    assert findings(address, heads) == []
    with Reader(address, "tests") as reader:
        comparison = Comparison(reader)
        assert list(comparison.of_all()) == []
        assert (comparison.position, comparison.payments) == (EVENTS, EVENTS // 2)


@pytest.mark.parametrize("sealed", [True, False])
def test_what_comes_while_it_is_read_is_no_finding(
    tampered: Connection,
    address: DatabaseAddress,
    connection: Connection,
    monkeypatch: pytest.MonkeyPatch,
    sealed: bool,
) -> None:
    """Events, and the seals of those that were not sealed when it began; some are read as they were
    before, some as they were after that."""
    monkeypatch.setattr(module, "PART_POSITIONS", 6)
    last = append(connection, [fact for n in range(5) for fact in History(f"l{n}").charged().facts])

    def seal() -> None:
        async def run() -> None:
            database = Database(address, 1)
            await seal_log(database)

        asyncio.run(run())

    if sealed:
        seal()

    def disturbed(places: Iterator[LogPlace]) -> Iterator[LogPlace]:
        for number, place in enumerate(places):
            if number == EVENTS:
                append(connection, History("later").charged().refunded().facts)
                seal()
            yield place

    verification = Verification({})
    with Reader(address, "tests") as reader:
        ends = ends_of(reader)
        assert list(verification.findings(disturbed(places_of(reader, ends)))) == []
        assert list(missing_seals(ends, verification.head)) == []
    assert (verification.events, verification.last) == (last, last)
    assert verification.sealed == (last if sealed else EVENTS)


def test_events_that_stand_far_away(tampered: Connection, address: DatabaseAddress) -> None:
    """A gap is one finding, and nobody looks for each position in it."""
    tampered.execute("DELETE FROM log_seals WHERE position IN (1, 40)")
    for position, place in ((1, -(2**63)), (40, 2**63 - 1)):
        tampered.execute(
            "UPDATE payment_events SET notification_id = %s WHERE notification_id = %s",
            [place, position],
        )
    assert at(findings(address)) == [-(2**63), 1, 40, 40]


def test_a_tail_that_is_not_sealed_must_be_whole(
    tampered: Connection, address: DatabaseAddress, connection: Connection
) -> None:
    append(connection, History("late").charged().refunded().facts)
    tampered.execute(f"DELETE FROM payment_events WHERE notification_id = {EVENTS + 2}".encode())
    assert at(findings(address)) == [EVENTS + 2]


def test_an_empty_log(address: DatabaseAddress) -> None:
    assert findings(address) == []
    assert at(findings(address, {5: bytes(32)})) == [1]


# An export: the same, line by line.

MOMENT = datetime(2026, 1, 2, tzinfo=UTC)


def exported(count: int = 10, sealed: int = 10) -> list[bytes]:
    lines, before = [], GENESIS
    for position in range(1, count + 1):
        facts = History(f"k{position}").facts
        state = b'{"n":%d,"amount_cents":1500}' % position
        event = LogEntry(
            position=position,
            payment_id=facts[0].payment_id,
            version=1,
            topic="PaymentInitiated",
            state=state,
            recorded_at=MOMENT,
        )
        before = seal(before, event)
        lines.append(write_line(event, before if position <= sealed else None))
    return lines


def head_of(lines: list[bytes], position: int) -> dict[int, bytes]:
    hash = read_line(lines[position - 1]).hash
    assert hash is not None
    return {position: bytes.fromhex(hash)}


def of_export(text: bytes, heads: dict[int, bytes] | None = None) -> list[int]:
    damaged: list[Finding] = []
    verification = Verification(heads or {})
    return [
        *at(list(verification.findings(places_in(BytesIO(text), damaged)))),
        *at(damaged),
    ]


def join(lines: list[bytes]) -> bytes:
    return b"".join(line + b"\n" for line in lines)


def swapped(lines: list[bytes]) -> list[bytes]:
    lines[3], lines[6] = lines[6], lines[3]
    return lines


CHANGES: dict[str, tuple[Callable[[list[bytes]], list[bytes]], set[int]]] = {
    "nothing": (lambda lines: lines, set()),
    "an amount": (
        lambda lines: [*lines[:3], lines[3].replace(b"1500", b"15"), *lines[4:]],
        {4},
    ),
    "a blank in the data": (
        lambda lines: [*lines[:3], lines[3].replace(b'"n":', b'"n": '), *lines[4:]],
        {4},
    ),
    "a time": (
        lambda lines: [*lines[:3], lines[3].replace(b"2026-01-02", b"2026-01-03"), *lines[4:]],
        {4},
    ),
    "removed": (lambda lines: [*lines[:3], *lines[4:]], {4}),
    "the first removed": (lambda lines: lines[1:], {1}),
    "twice": (lambda lines: [*lines[:4], lines[3], *lines[4:]], {4}),
    "swapped": (swapped, {4, 5, 6}),
    "a hash": (
        lambda lines: [*lines[:3], lines[3][:-10] + b'00000000"}', *lines[4:]],
        {4},
    ),
    "a line that is none": (lambda lines: [*lines[:3], b"gone", *lines[4:]], {4}),
    "blank lines": (lambda lines: [*lines[:3], b"", b"  ", *lines[3:]], set()),
    "line ends of another system": (lambda lines: [line + b"\r" for line in lines], set()),
}


@pytest.mark.parametrize("name", CHANGES)
def test_an_export(name: str) -> None:
    change, positions = CHANGES[name]
    text = join(change(exported()))
    assert set(of_export(text)) == positions
    assert set(of_export(text.rstrip(b"\n"))) == positions


def test_an_exports_end_needs_a_head() -> None:
    lines = exported()
    cut = join(lines[:8])
    assert of_export(cut) == []
    assert of_export(cut, head_of(lines, 8)) == []
    assert of_export(cut, head_of(lines, 10)) == [9]


def test_an_export_with_its_hashes_made_again_needs_a_head() -> None:
    lines = exported()
    head = head_of(lines, 10)
    before, forged = GENESIS, []
    for line in lines:
        event = read_line(
            line.replace(b'"n":4,"amount_cents":1500', b'"n":4,"amount_cents":15')
        ).entry
        before = seal(before, event)
        forged.append(write_line(event, before))
    assert of_export(join(forged)) == []
    assert of_export(join(forged), head) == [10]


def test_an_export_that_is_not_sealed_is_checked_by_a_head() -> None:
    sealed, bare = exported(), exported(sealed=0)
    assert of_export(join(bare), head_of(sealed, 10)) == []
    bare[3] = bare[3].replace(b"1500", b"15")
    assert of_export(join(bare), head_of(sealed, 10)) == [10]


@pytest.mark.parametrize("text", [b"position,payment_id\n1,2\n", b"\x00\n", b"{}\n", b"[" * 10**6])
def test_what_is_no_export(text: bytes) -> None:
    with pytest.raises(NoExport):
        of_export(text)


def test_every_removal_and_every_swap_is_found() -> None:
    """All of them, for a log of seven events."""
    lines = exported(7, 7)
    head = head_of(lines, 7)
    for kept in itertools.product([True, False], repeat=7):
        left = [line for line, keep in zip(lines, kept, strict=True) if keep]
        if left:
            found = of_export(join(left), head)
            missing = [position for position, keep in enumerate(kept, 1) if not keep]
            assert (found[0] if found else None) == (missing[0] if missing else None)
    for one, other in itertools.combinations(range(7), 2):
        mixed = list(lines)
        mixed[one], mixed[other] = mixed[other], mixed[one]
        assert of_export(join(mixed), head)[0] == one + 1


def places(*steps: tuple[int, bool, bool]) -> Iterator[LogPlace]:
    for position, event, hash in steps:
        read = read_line(exported(position)[position - 1])
        assert read.hash is not None
        yield LogPlace(
            position, read.entry if event else None, bytes.fromhex(read.hash) if hash else None
        )


def test_counts() -> None:
    verification = Verification({})
    steps = places(
        (1, True, True), (2, True, True), (3, False, True), (4, True, True), (5, True, False)
    )
    assert at(list(verification.findings(steps))) == [3]
    assert (verification.events, verification.sealed, verification.last) == (4, 3, 5)
    assert verification.head is not None
    assert verification.head.position == 4
    assert str(verification.head) == f"4:{verification.head.hash.hex()}"
