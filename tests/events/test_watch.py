"""A log that went back is noticed: by what was acknowledged, by a seal, and after a restart."""

import asyncio
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import AsyncExitStack
from pathlib import Path
from typing import Any
from uuid import UUID

import psycopg
import pytest

from payments.database.connections import Database, DatabaseAddress
from payments.errors import LogRewound
from payments.events.appender import Appender
from payments.events.losses import DATABASE_ID, log_id, open_loss
from payments.events.store import to_stored_event
from payments.events.watch import KeptHead, LogWatch, read_head, write_head
from payments.observability.metrics import Telemetry
from tests.lost_log import accept_loss, lose_after
from tests.support import History, append, seal_log, stored_event

pytestmark = pytest.mark.anyio

Connection = psycopg.Connection[Any]
Process = Callable[..., Awaitable["Running"]]


class Running:
    """A process's appender and watch; it looks when it is told to, and with each connection."""

    def __init__(self, database: Database, data_dir: Path | None) -> None:
        self.telemetry = Telemetry()
        self.watch = LogWatch(database, self.telemetry, data_dir)
        self.appender = Appender(database.connect, self.telemetry, 100, self.watch)

    async def append(self, count: int = 1) -> None:
        for _ in range(count):
            await self.appender.append([stored_event()])

    async def reconnect(self) -> None:
        await self.appender._writer.disconnect()

    def gauge(self) -> float:
        return float(self.telemetry.log_rewound._value.get())


@pytest.fixture
async def process(database: Database) -> AsyncIterator[Process]:
    async with AsyncExitStack() as stack:

        async def start(data_dir: Path | None = None) -> Running:
            running = Running(database, data_dir)
            await running.watch.start()
            running.appender.start()
            stack.push_async_callback(running.watch.stop)
            stack.push_async_callback(running.appender.stop, 1)
            return running

        yield start


async def test_a_log_that_only_grows_is_not_lost(process: Process, connection: Connection) -> None:
    running = await process()
    await running.append(3)
    append(connection, [History("another process").facts[0]])
    await running.reconnect()
    await running.append()
    await running.watch.look()
    assert not running.watch.lost
    assert connection.execute("SELECT FROM log_losses").fetchall() == []


async def test_an_event_that_is_gone_is_noticed_with_the_next_look(
    process: Process, database: Database, connection: Connection
) -> None:
    running = await process()
    await running.append(3)
    lose_after(connection, 1)
    with pytest.raises(LogRewound, match="payments log accept-loss"):
        await running.watch.refuse_if_lost()
    assert running.gauge() == 1
    loss = await open_loss(database)
    assert loss is not None
    assert (loss.kept_position, loss.lost_position) == (0, 3)


async def test_another_event_at_its_position_is_noticed_when_the_appender_connects_again(
    process: Process, connection: Connection
) -> None:
    """The log has grown beyond it by then, and what comes next is acknowledged as ever."""
    running = await process()
    await running.append(3)
    lose_after(connection, 1)
    append(connection, [History(f"k{number}").facts[0] for number in range(9)])
    await running.reconnect()
    assert not running.watch.lost
    await running.append()
    assert running.watch.lost
    assert connection.execute("SELECT max(notification_id) FROM payment_events").fetchone() == (11,)


async def test_appends_go_on_and_the_loss_is_put_on_record_once(
    process: Process, connection: Connection
) -> None:
    running = await process()
    await running.append(3)
    lose_after(connection, 1)
    for _ in range(3):
        await running.reconnect()
        await running.append()
        await running.watch.look()
    assert running.watch.lost
    assert len(connection.execute("SELECT FROM log_losses").fetchall()) == 1


async def test_a_log_that_got_shorter_is_noticed_by_who_appended_nothing(
    process: Process, database: Database, connection: Connection
) -> None:
    """Whoever did may have died with the server."""
    reader = await process()
    append(connection, [History(f"k{number}").facts[0] for number in range(3)])
    await reader.watch.look()
    lose_after(connection, 2)
    await reader.watch.look()
    assert reader.watch.lost
    loss = await open_loss(database)
    assert loss is not None
    assert loss.lost_position == 3


async def test_looks_that_come_back_in_another_order_are_no_loss(
    process: Process, database: Database, monkeypatch: pytest.MonkeyPatch
) -> None:
    running = await process()
    await running.append()
    fetch, go_on = database.fetch, asyncio.Event()

    async def held_up(*arguments: Any, **options: Any) -> Any:
        rows = await fetch(*arguments, **options)
        await go_on.wait()
        return rows

    with monkeypatch.context() as slow:
        slow.setattr(database, "fetch", held_up)
        late = asyncio.create_task(running.watch.look())
        await asyncio.sleep(0.1)
    await running.append(3)
    await seal_log(database)
    await running.watch.look()
    go_on.set()
    await late
    assert not running.watch.lost
    await running.watch.look()
    assert not running.watch.lost


async def test_every_process_knows_what_one_has_found_and_a_person_has_accepted(
    process: Process, connection: Connection
) -> None:
    first, second = await process(), await process()
    await first.append(3)
    lose_after(connection, 1)
    await first.watch.look()
    await second.watch.look()
    assert first.watch.lost
    assert second.watch.lost
    accept_loss(connection)
    for running in (first, second):
        await running.watch.refuse_if_lost()
        assert running.gauge() == 0


async def test_who_finds_it_after_it_was_accepted_does_not_begin_again(
    process: Process, connection: Connection
) -> None:
    """A process that was frozen meanwhile; but what is lost after that is another loss."""
    first, frozen = await process(), await process()
    await first.append(2)
    await frozen.append()
    await first.append()
    lose_after(connection, 1)
    await first.watch.look()
    accept_loss(connection)
    await frozen.watch.look()
    assert not frozen.watch.lost
    await frozen.append(5)
    await frozen.watch.look()
    lose_after(connection, 2)
    await frozen.watch.look()
    assert frozen.watch.lost


async def test_seals_tell_from_where_on_it_is_lost(
    process: Process, database: Database, connection: Connection
) -> None:
    running = await process()
    for _ in range(4):
        await running.append(2)
        await seal_log(database)
        await running.watch.look()
    seals = dict(connection.execute("SELECT position, hash FROM log_seals").fetchall())
    lose_after(connection, 5)
    await running.watch.look()
    loss = await open_loss(database)
    assert loss is not None
    assert (loss.kept_position, loss.lost_position, loss.lost_hash) == (4, 8, seals[8])


async def test_a_seal_that_only_is_not_written_again_yet_is_no_loss(
    process: Process, database: Database, connection: Connection
) -> None:
    """Seals do not wait for the disk: a crash of the server may undo the last ones."""
    running = await process()
    await running.append(3)
    await seal_log(database)
    await running.watch.look()
    connection.execute("ALTER TABLE log_seals DISABLE TRIGGER ALL")
    connection.execute("DELETE FROM log_seals WHERE position > 1")
    connection.execute("UPDATE followers SET position = 1 WHERE name = 'seals'")
    await running.watch.look()
    assert not running.watch.lost
    await seal_log(database)
    await running.watch.look()
    assert not running.watch.lost


class TestRestart:
    async def test_a_restart_remembers_the_newest_seal(
        self, process: Process, database: Database, connection: Connection, tmp_path: Path
    ) -> None:
        await self._run(await process(tmp_path), database)
        lose_after(connection, 1)
        append(connection, [History(f"k{number}").facts[0] for number in range(5)])
        await seal_log(database)
        again = await process(tmp_path)
        assert again.watch.lost
        loss = await open_loss(database)
        assert loss is not None
        assert (loss.kept_position, loss.lost_position) == (0, 3)

    async def test_one_that_sealed_nothing_since_is_no_loss(
        self, process: Process, database: Database, tmp_path: Path
    ) -> None:
        await self._run(await process(tmp_path), database)
        again = await process(tmp_path)
        await again.watch.look()
        assert not again.watch.lost

    async def test_it_is_not_found_again_after_it_was_accepted(
        self, process: Process, database: Database, connection: Connection, tmp_path: Path
    ) -> None:
        await self._run(await process(tmp_path), database)
        lose_after(connection, 1)
        await process(tmp_path)
        accept_loss(connection)
        again = await process(tmp_path)
        await again.watch.look()
        assert not again.watch.lost

    async def test_another_loss_after_an_accepted_one_is_another(
        self, process: Process, database: Database, connection: Connection, tmp_path: Path
    ) -> None:
        """At the same positions: the acceptance was of what stood there before."""
        await self._run(await process(tmp_path), database)
        lose_after(connection, 1)
        # It would take the log that comes below for its own, if that came between two of its looks.
        await (await process(tmp_path)).watch.stop()
        accept_loss(connection)
        await self._run(await process(tmp_path), database, events=2)
        lose_after(connection, 1)
        append(connection, [History(f"k{number}").facts[0] for number in range(5)])
        await seal_log(database)
        again = await process(tmp_path)
        assert again.watch.lost

    async def test_another_log_has_another_file(
        self, process: Process, database: Database, tmp_path: Path
    ) -> None:
        """The same directory may be used with one database today and with another tomorrow."""
        other = KeptHead(log=UUID(int=1), database=1, position=99, hash="00" * 32)
        await asyncio.to_thread(write_head, tmp_path, other)
        running = await process(tmp_path)
        await self._run(running, database)
        assert not running.watch.lost
        assert await asyncio.to_thread(read_head, tmp_path, other.log, 1) == other

    @pytest.mark.parametrize("content", [b"", b"{", b'{"log": "x"}', b"\xff"])
    async def test_a_damaged_file_is_none(
        self, process: Process, database: Database, tmp_path: Path, content: bytes
    ) -> None:
        log = await log_id(database)
        ((oid,),) = await database.fetch(DATABASE_ID)
        (tmp_path / f"log-head-{log}-{oid}.json").write_bytes(content)
        running = await process(tmp_path)
        await self._run(running, database)
        assert not running.watch.lost

    async def test_a_restored_copy_leaves_the_file_alone(
        self, process: Process, database: Database, tmp_path: Path
    ) -> None:
        """It has the log's id, and is another database."""
        log = await log_id(database)
        assert log is not None
        ((oid,),) = await database.fetch(DATABASE_ID)
        copied = KeptHead(log=log, database=oid + 1, position=99, hash="00" * 32)
        await asyncio.to_thread(write_head, tmp_path, copied)
        running = await process(tmp_path)
        await self._run(running, database)
        assert not running.watch.lost
        assert await asyncio.to_thread(read_head, tmp_path, log, oid + 1) == copied
        assert await asyncio.to_thread(read_head, tmp_path, log, oid) is not None

    async def test_the_file_is_compared_although_others_have_looked_first(
        self, process: Process, database: Database, connection: Connection, tmp_path: Path
    ) -> None:
        """The database was away at the start, and a newer seal is known by now."""
        await self._run(await process(tmp_path), database)
        lose_after(connection, 1)
        append(connection, [History(f"k{number}").facts[0] for number in range(5)])
        await seal_log(database)
        late = LogWatch(database, Telemetry(), tmp_path)
        await late.look()
        assert not late.lost
        await late.take_up()
        assert late.lost

    async def test_a_directory_that_cannot_be_written_stops_nobody(
        self, process: Process, database: Database, tmp_path: Path
    ) -> None:
        (tmp_path / "file").touch()
        running = await process(tmp_path / "file" / "data")
        await self._run(running, database)
        assert not running.watch.lost

    async def _run(self, running: Running, database: Database, events: int = 3) -> None:
        await running.append(events)
        await seal_log(database)
        await running.watch.look()
        await running.watch.stop()


@pytest.mark.parametrize("setting", ["default_transaction_read_only"])
async def test_a_server_that_refuses_to_write_is_not_compared(
    process: Process, connection: Connection, address: DatabaseAddress, setting: str
) -> None:
    """It may be a standby, which is behind and has lost nothing."""
    running = await process()
    await running.append(3)
    lose_after(connection, 1)
    connection.execute(f'ALTER DATABASE "{address.dbname}" SET {setting} = on'.encode())
    async with Database(address, 1) as database:
        await running.watch.look(database)
    assert running.watch.read_only
    assert not running.watch.lost
    connection.execute(f'ALTER DATABASE "{address.dbname}" RESET {setting}'.encode())
    await running.watch.look()
    assert running.watch.lost


async def test_without_the_right_to_say_so_the_process_knows_alone(
    process: Process, connection: Connection, monkeypatch: pytest.MonkeyPatch
) -> None:
    running = await process()
    await running.append(3)
    lose_after(connection, 1)

    def refuse(*_: Any, **__: Any) -> Any:
        raise psycopg.errors.InsufficientPrivilege("permission denied for table log_losses")

    with monkeypatch.context() as refusing:
        refusing.setattr("payments.events.losses.add", refuse)
        for _ in range(2):
            await running.reconnect()
            await running.append()
            assert running.watch.lost
    await running.watch.look()
    accept_loss(connection)
    await running.watch.look()
    assert not running.watch.lost


async def test_what_goes_wrong_with_the_look_does_not_stop_the_appends(
    process: Process, connection: Connection
) -> None:
    running = await process()
    await running.append()
    connection.execute("ALTER TABLE log_losses RENAME TO hidden")
    await running.reconnect()
    await running.append()
    connection.execute("ALTER TABLE hidden RENAME TO log_losses")
    await running.watch.look()
    assert not running.watch.lost


async def test_losses_are_append_only(process: Process, connection: Connection) -> None:
    running = await process()
    await running.append(2)
    lose_after(connection, 1)
    await running.watch.look()
    for statement in (
        "DELETE FROM log_losses",
        "UPDATE log_losses SET kind = 'accepted'",
        "TRUNCATE log_losses",
        "UPDATE log_identity SET id = gen_random_uuid()",
    ):
        with pytest.raises(psycopg.errors.InsufficientPrivilege, match="append-only"):
            connection.execute(statement.encode())


async def test_a_repeated_append_counts_as_acknowledged(
    process: Process, connection: Connection
) -> None:
    """Its first acknowledgement was lost with the connection."""
    running = await process()
    event = to_stored_event(History("k").facts[0])
    append(connection, [*History("before").facts, *History("k").facts[:0]])
    await running.appender.append([event])
    await running.appender.append([event])
    lose_after(connection, 1)
    await running.watch.look()
    assert running.watch.lost
