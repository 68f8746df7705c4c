"""The seals: computed as documented, and never otherwise, or every head that was kept is void."""

import hashlib
import struct
import uuid
from datetime import UTC, datetime, timedelta, timezone

import pytest
from hypothesis import given
from hypothesis import strategies as st

from payments.events.chain import GENESIS, read_line, seal, write_line
from payments.events.store import LogEntry

FIRST = LogEntry(
    position=1,
    payment_id=uuid.UUID("058c9593-e150-402f-ab5b-37dd4c9816f0"),
    version=1,
    topic="PaymentInitiated",
    state=b'{"amount_cents":1500}',
    recorded_at=datetime(2026, 1, 31, 18, 30, 0, 125, tzinfo=UTC),
)
SECOND = LogEntry(
    position=2,
    payment_id=uuid.UUID("f50d9fa2-5d3e-4e49-9a02-218ad32ef4a9"),
    version=7,
    topic="Größe",
    state=b"\x00\xff\n",
    recorded_at=datetime(1969, 12, 31, 23, 59, 59, 999999, tzinfo=UTC),
)


def documented(before: bytes, event: LogEntry) -> bytes:
    """From the page on audits alone."""
    micros = (event.recorded_at - datetime(1970, 1, 1, tzinfo=UTC)) // timedelta(microseconds=1)
    kind = event.topic.encode("utf-8")
    canonical = (
        struct.pack(">q", event.position)
        + event.payment_id.bytes
        + struct.pack(">q", event.version)
        + struct.pack(">q", micros)
        + struct.pack(">i", len(kind))
        + kind
        + event.state
    )
    return hashlib.sha256(before + canonical).digest()


def test_the_form_never_changes() -> None:
    first = seal(GENESIS, FIRST)
    assert first.hex() == GOLDEN_FIRST
    assert seal(first, SECOND).hex() == GOLDEN_SECOND


GOLDEN_FIRST = "48263d2afb7291c640161e4febc893e60671952e9b9c31fdd74ee4ad634bff01"
GOLDEN_SECOND = "0573769b8553b2ba188788f5975949e3340b406b462d67d1cbba922185333f26"


entries = st.builds(
    LogEntry,
    st.integers(1, 2**63 - 1),
    st.uuids(),
    st.integers(0, 2**63 - 1),
    st.text(st.characters(codec="utf-8"), max_size=30),
    st.binary(max_size=80) | st.just(b'{"a":1}') | st.text(max_size=30).map(str.encode),
    st.datetimes(timezones=st.just(UTC)),
)


@given(st.binary(min_size=32, max_size=32), entries)
def test_as_documented(before: bytes, event: LogEntry) -> None:
    assert seal(before, event) == documented(before, event)


@given(entries, entries)
def test_another_event_has_another_seal(one: LogEntry, other: LogEntry) -> None:
    assert (seal(GENESIS, one) == seal(GENESIS, other)) is (one == other)


def test_what_is_shifted_between_fields_shows() -> None:
    """Without the length, the type's end could become the data's beginning."""
    shifted = FIRST._replace(topic="PaymentInitiate", state=b"d" + FIRST.state)
    assert seal(GENESIS, shifted) != seal(GENESIS, FIRST)


def test_the_zone_of_a_time_does_not_matter() -> None:
    elsewhere = FIRST.recorded_at.astimezone(timezone(timedelta(hours=5, minutes=30)))
    assert seal(GENESIS, FIRST._replace(recorded_at=elsewhere)) == seal(GENESIS, FIRST)


@given(entries, st.none() | st.binary(min_size=32, max_size=32))
def test_a_line_of_an_export_holds_all_of_it(event: LogEntry, hash: bytes | None) -> None:
    line = write_line(event, hash)
    assert b"\n" not in line
    assert b"\r" not in line
    read = read_line(line)
    assert read.entry == event
    assert read.hash == (None if hash is None else hash.hex())


@pytest.mark.parametrize(
    "line",
    [
        b"",
        b"{}",
        b"[1]",
        b"null",
        b'{"position":"1"}',
        write_line(FIRST, None)[:-1],
        write_line(FIRST, None).replace(b'"version":1', b'"version":1.5'),
        write_line(FIRST, None).replace(b"2026-01-31T", b"2026-02-31T"),
        write_line(FIRST, None).replace(b'"data":{', b'"data":{{'),
    ],
)
def test_what_is_no_line(line: bytes) -> None:
    with pytest.raises(ValueError):
        _ = read_line(line).entry


@pytest.mark.parametrize(
    ("old", "new"),
    [(b'00.000125Z"', b'00.000125"'), (b'"AP8K"', b'"A"'), (b'"AP8K"', b'"\xc3\xa9"')],
)
def test_a_line_that_does_not_make_an_event(old: bytes, new: bytes) -> None:
    whole = write_line(SECOND._replace(recorded_at=FIRST.recorded_at), None)
    assert old in whole
    with pytest.raises(ValueError):
        _ = read_line(whole.replace(old, new)).entry
