"""How long a client may take, with the time handed in."""

from typing import Any

import pytest

from tests.web.timers import Loop
from web.serving.slow_clients import (
    HEAD_TIMEOUT_S,
    WRITE_MIN,
    WRITE_TIMEOUT_S,
    HeadWatch,
    WriteWatch,
)


class Connection:
    """It counts how often it was cut."""

    def __init__(self) -> None:
        self.cut = 0
        self.unwritten = 0  # bytes

    def get_write_buffer_size(self) -> int:
        return self.unwritten

    def abort(self) -> None:
        self.cut += 1


@pytest.fixture
def loop() -> Any:
    return Loop()


@pytest.fixture
def connection() -> Any:
    return Connection()


@pytest.fixture
def head(loop: Any, connection: Connection) -> HeadWatch:
    """Of a connection that has just come."""
    watch = HeadWatch(loop, connection.abort)
    watch.set_timer()
    return watch


@pytest.fixture
def writing(loop: Any, connection: Any) -> WriteWatch:
    return WriteWatch(loop, connection)


def read(head: HeadWatch, size: int, *, heads: int = 0, is_complete: bool = False) -> None:
    """Data of so many bytes, in which so many heads begin, and in which the last may end."""
    head.read_more()
    for _ in range(heads):
        head.begin()
    if is_complete:
        head.is_open = False
    else:
        head.add(size)
    head.set_timer()


def test_who_sends_nothing_is_cut(head: HeadWatch, loop: Loop, connection: Connection) -> None:
    loop.run(HEAD_TIMEOUT_S - 0.01)
    assert (connection.cut, head.is_open, head.size) == (0, True, 0)
    loop.run(0.01)
    assert connection.cut == 1
    loop.run(10 * HEAD_TIMEOUT_S)
    assert connection.cut == 1


def test_a_head_in_parts_has_no_longer_than_one_that_does_not_come(
    head: HeadWatch, loop: Loop, connection: Connection
) -> None:
    loop.run(HEAD_TIMEOUT_S - 1)
    read(head, 10, heads=1)
    loop.run(0.9)
    read(head, 10)
    assert connection.cut == 0
    loop.run(0.1)
    assert connection.cut == 1


def test_a_head_that_is_complete_is_not_timed(
    head: HeadWatch, loop: Loop, connection: Connection
) -> None:
    read(head, 10, heads=1)
    read(head, 10, is_complete=True)
    assert loop.is_quiet
    assert not head.is_open
    read(head, 10, is_complete=True)  # of its body
    loop.run(10 * HEAD_TIMEOUT_S)
    assert connection.cut == 0


def test_each_head_has_its_own_time(head: HeadWatch, loop: Loop, connection: Connection) -> None:
    loop.run(HEAD_TIMEOUT_S - 1)
    read(head, 10, heads=1, is_complete=True)
    loop.run(60)
    read(head, 10, heads=1)
    loop.run(HEAD_TIMEOUT_S - 0.01)
    assert connection.cut == 0
    loop.run(0.01)
    assert connection.cut == 1


def test_what_is_waited_for_by_the_flow_is_timed_as_well(
    head: HeadWatch, loop: Loop, connection: Connection
) -> None:
    """Empty lines between requests begin no head."""
    read(head, 10, heads=1, is_complete=True)
    head.read_more()
    head.is_open = True
    head.set_timer()
    loop.run(HEAD_TIMEOUT_S)
    assert connection.cut == 1


def test_bytes_are_counted_until_the_head_is_complete(head: HeadWatch) -> None:
    read(head, 100, heads=1)
    read(head, 20)
    assert head.size == 120
    read(head, 500, is_complete=True)
    read(head, 7, heads=1)
    assert head.size == 1  # it began somewhere in data that began as something else
    read(head, 20)
    assert head.size == 21


def test_of_a_head_behind_others_one_byte_is_known(head: HeadWatch) -> None:
    read(head, 5000, heads=3)
    assert head.size == 1
    read(head, 20)
    assert head.size == 21


def test_a_head_that_is_read_twice_is_one_head(head: HeadWatch) -> None:
    head.read_more()
    head.begin()
    head.begin_again()
    head.begin()
    head.add(100)
    assert head.size == 100


def test_when_nothing_more_is_read_no_time_runs(
    head: HeadWatch, loop: Loop, connection: Connection
) -> None:
    read(head, 10, heads=1)
    head.stop()
    assert (head.is_open, loop.is_quiet) == (False, True)
    read(head, 10, heads=1)  # in what the parser had got already
    assert loop.is_quiet
    head.stop()
    assert connection.cut == 0


def test_who_takes_nothing_is_cut(writing: WriteWatch, loop: Loop, connection: Connection) -> None:
    connection.unwritten = 10 * WRITE_MIN
    writing.start()
    loop.run(WRITE_TIMEOUT_S - 0.01)
    assert connection.cut == 0
    loop.run(0.01)
    assert connection.cut == 1
    assert loop.is_quiet


def test_who_takes_enough_goes_on_until_too_little_is_taken(
    writing: WriteWatch, loop: Loop, connection: Connection
) -> None:
    connection.unwritten = 10 * WRITE_MIN
    writing.start()
    for _ in range(3):
        connection.unwritten -= WRITE_MIN
        loop.run(WRITE_TIMEOUT_S)
    assert connection.cut == 0
    connection.unwritten -= WRITE_MIN - 1
    loop.run(WRITE_TIMEOUT_S)
    assert connection.cut == 1


def test_what_is_less_than_that_is_to_be_taken_in_that_time(
    writing: WriteWatch, loop: Loop, connection: Connection
) -> None:
    """Or it may be the connection's end that does not come."""
    writing.start()
    loop.run(WRITE_TIMEOUT_S)
    assert connection.cut == 1


def test_a_new_start_has_the_whole_time(
    writing: WriteWatch, loop: Loop, connection: Connection
) -> None:
    writing.start()
    loop.run(WRITE_TIMEOUT_S - 1)
    writing.start()
    loop.run(WRITE_TIMEOUT_S - 1)
    assert connection.cut == 0
    loop.run(1)
    assert connection.cut == 1


def test_who_has_taken_everything_is_watched_no_more(
    writing: WriteWatch, loop: Loop, connection: Connection
) -> None:
    writing.stop()
    writing.start()
    writing.stop()
    assert loop.is_quiet
    loop.run(10 * WRITE_TIMEOUT_S)
    assert connection.cut == 0
    writing.start()
    loop.run(WRITE_TIMEOUT_S)
    assert connection.cut == 1
