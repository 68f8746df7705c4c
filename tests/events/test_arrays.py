"""Arrays are sent as psycopg sends its own, and as Postgres sends them back."""

import struct
import uuid
from collections.abc import Callable, Sequence
from datetime import UTC, datetime, timedelta, timezone
from typing import Any
from uuid import UUID

import psycopg
import pytest
from psycopg.adapt import PyFormat, Transformer
from psycopg.types.numeric import Int4, Int8

from payments.database.arrays import (
    BinaryArray,
    bigints,
    byteas,
    doubles,
    integers,
    texts,
    timestamps,
    utc_times,
    uuids,
    words,
)

LONG_AGO = datetime(1969, 7, 20, 20, 17, 40, 123456, tzinfo=UTC)
LAST_BEFORE_2000 = datetime(1999, 12, 31, 23, 59, 59, 999999, tzinfo=UTC)
TIMES = [
    datetime(2026, 1, 2, 3, 4, 5, 6, tzinfo=UTC),
    datetime(2026, 1, 2, 3, 4, 5, 999999, tzinfo=UTC),
    datetime(2000, 1, 1, tzinfo=UTC),
    datetime(2000, 1, 1, 0, 0, 0, 1, tzinfo=UTC),
    LAST_BEFORE_2000,
    LONG_AGO,
    datetime(1, 1, 1, tzinfo=UTC),
    datetime(9999, 12, 31, 23, 59, 59, 999999, tzinfo=UTC),
]
IDS = [UUID(int=0), UUID(int=2**128 - 1), UUID("f50d9fa2-5d3e-4e49-9a02-218ad32ef4a9")]

Make = Callable[[Any], BinaryArray]
# How each is made, its type in Postgres, and how psycopg is told the same type.
KINDS: dict[str, tuple[Make, str, Callable[[Any], Any]]] = {
    "integers": (integers, "integer[]", Int4),
    "bigints": (bigints, "bigint[]", Int8),
    "doubles": (doubles, "double precision[]", lambda item: item),
    "timestamps": (timestamps, "timestamp with time zone[]", lambda item: item),
    "utc_times": (
        utc_times,
        "timestamp without time zone[]",
        lambda item: item.replace(tzinfo=None),
    ),
    "texts": (texts, "text[]", lambda item: item),
    "words": (words, "text[]", lambda item: item),
    "byteas": (byteas, "bytea[]", lambda item: item),
    "uuids": (uuids, "uuid[]", lambda item: item),
}
ITEMS: list[tuple[str, list[Any]]] = [
    ("integers", [0]),
    ("integers", [1, -1, 2**31 - 1, -(2**31)]),
    ("bigints", [0]),
    ("bigints", [1, -1, 2**63 - 1, -(2**63)]),
    ("doubles", [0.25]),
    ("doubles", [0.1, -1e300, 5e-324, float("inf")]),
    ("timestamps", TIMES[:1]),
    ("timestamps", TIMES),
    ("utc_times", TIMES),
    ("texts", ["one"]),
    ("words", ["one", "", "é☃", "one", "NULL"]),
    ("words", [str(n) for n in range(1000)]),
    ("texts", ["", " ", "NULL", "null", "{}", 'a,"b"\\', "é☃ \N{GRINNING FACE}", "x" * 70_000]),
    ("texts", ["one", None]),
    ("texts", [None, "one", None, ""]),
    ("byteas", [b""]),
    ("byteas", [b"\x00", b"\xff\\x00", bytes(range(256)), b'{"n":1}']),
    ("uuids", IDS),
    ("integers", list(range(10_000))),
    ("texts", [str(n) if n % 3 else None for n in range(10_000)]),
]
every_array = pytest.mark.parametrize(("kind", "items"), ITEMS)


def sent_and_returned(
    connection: psycopg.Connection[Any], array: BinaryArray, type_: str
) -> tuple[str, list[Any], bytes]:
    """The type as which Postgres takes it, what psycopg reads back, and the bytes of that."""
    query = "SELECT pg_typeof(%(array)s)::text, %(array)s"
    with connection.cursor(binary=True) as cursor:
        row = cursor.execute(query, {"array": array}).fetchone()
        assert row is not None
        assert cursor.pgresult is not None
        returned = cursor.pgresult.get_value(0, 1)
        assert returned is not None
        assert row[0] == type_
        return row[0], row[1], bytes(returned)


@every_array
def test_they_are_the_bytes_that_psycopg_sends(kind: str, items: Sequence[Any]) -> None:
    make, _, typed = KINDS[kind]
    typed_items = [None if item is None else typed(item) for item in items]
    dumper = Transformer().get_dumper(typed_items, PyFormat.BINARY)
    sent = dumper.dump(typed_items)
    assert sent is not None
    assert bytes(make(items)) == bytes(sent)


@every_array
def test_they_are_the_bytes_that_postgres_returns(
    connection: psycopg.Connection[Any], kind: str, items: Sequence[Any]
) -> None:
    make, type_, typed = KINDS[kind]
    array = make(items)
    _, read, returned = sent_and_returned(connection, array, type_)
    assert read == [None if item is None else typed(item) for item in items]
    assert returned == bytes(array)


@pytest.mark.parametrize("kind", KINDS)
def test_an_empty_array_is_empty_and_not_null(
    connection: psycopg.Connection[Any], kind: str
) -> None:
    make, type_, _ = KINDS[kind]
    array = make([])
    assert sent_and_returned(connection, array, type_)[1] == []
    assert connection.execute("SELECT cardinality(%s)", [array]).fetchone() == (0,)
    assert connection.execute("SELECT * FROM unnest(%s)", [array]).fetchall() == []


def test_nothing_is_not_an_empty_text(connection: psycopg.Connection[Any]) -> None:
    rows = connection.execute(
        "SELECT item IS NULL, item = '' FROM unnest(%s) AS item", [texts([None, "", "NULL"])]
    ).fetchall()
    assert rows == [(True, None), (False, True), (False, False)]


def test_rows_of_several_arrays_stay_together(connection: psycopg.Connection[Any]) -> None:
    """As statements that write many rows use them."""
    columns = [
        uuids(IDS),
        texts(["one", None, ""]),
        timestamps([LAST_BEFORE_2000, LONG_AGO, TIMES[0]]),
        integers([1, 2, 3]),
        bigints([2**40, -(2**40), 0]),
        byteas([b"a", b"", b"\x00"]),
    ]
    rows = connection.execute("SELECT * FROM unnest(%s, %s, %s, %s, %s, %s)", columns).fetchall()
    assert rows == [
        (IDS[0], "one", LAST_BEFORE_2000, 1, 2**40, b"a"),
        (IDS[1], None, LONG_AGO, 2, -(2**40), b""),
        (IDS[2], "", TIMES[0], 3, 0, b"\x00"),
    ]


class TestTimestamps:
    @pytest.mark.parametrize("item", TIMES, ids=str)
    def test_postgres_reads_the_same_moment(
        self, connection: psycopg.Connection[Any], item: datetime
    ) -> None:
        """Told apart by Postgres itself, which is given the time in words."""
        row = connection.execute(
            "SELECT (%s)[1] = %s::text::timestamptz", [timestamps([item]), item.isoformat()]
        ).fetchone()
        assert row == (True,)

    @pytest.mark.parametrize("make", [timestamps, utc_times])
    @pytest.mark.parametrize("hours", [-12, 2, 14])
    def test_a_moment_of_another_zone_is_the_same_moment(self, make: Make, hours: int) -> None:
        elsewhere = [item.astimezone(timezone(timedelta(hours=hours))) for item in TIMES[:6]]
        assert make(elsewhere) == make(TIMES[:6])

    @pytest.mark.parametrize("make", [timestamps, utc_times])
    def test_a_time_without_a_zone_is_no_moment(self, make: Make) -> None:
        with pytest.raises(TypeError):
            make([TIMES[0].replace(tzinfo=None)])


class TestUuids:
    @pytest.mark.parametrize("item", IDS, ids=str)
    def test_text_is_taken_too(self, item: UUID) -> None:
        expected = uuids([item])
        for spelling in (str(item), str(item).upper(), item.hex, f"{{{item}}}"):
            assert uuids([spelling]) == expected

    def test_any_other_text_is_refused(self) -> None:
        with pytest.raises(ValueError):
            uuids([str(uuid.uuid4())[:-1]])


@pytest.mark.parametrize(("make", "beyond"), [(integers, 2**31), (bigints, 2**63)])
def test_a_number_that_does_not_fit_is_refused(make: Make, beyond: int) -> None:
    for item in (beyond, -beyond - 1):
        with pytest.raises(struct.error):
            make([item])
