"""Single payments are read as they are, many at once, and nobody waits for ever."""

import asyncio
import time
import uuid
from typing import Any

import msgspec
import psycopg
import pytest

from payments.database.connections import READ_TIMEOUT_S, Database, DatabaseAddress
from payments.errors import DatabaseUnavailable, PaymentNotFound, PaymentUnreadable
from payments.events.appender import Appender
from payments.events.store import to_stored_event
from payments.observability.metrics import Telemetry
from payments.payment.state import Payment
from payments.queries.lookups import BATCH_MAX, PaymentLookups
from payments.queries.payments import get_payment
from tests.machine import Machine, bound, within
from tests.queries.conftest import FreezingProxy, WatchedDatabase
from tests.support import History, append, append_stored, histories, stored_event, until

pytestmark = pytest.mark.anyio

Connection = psycopg.Connection[Any]

ANSWER_S = 3.0  # README: without a database every request is answered in less


def charged(connection: Connection, count: int) -> list[History]:
    begun = [History(f"key {number}").charged() for number in range(count)]
    append(connection, [fact for history in begun for fact in history.facts])
    return begun


async def all_of(lookups: PaymentLookups, ids: list[uuid.UUID]) -> list[Any]:
    """What each of these lookups, begun at once, returns or raises."""
    return await asyncio.gather(*(lookups.find(id) for id in ids), return_exceptions=True)


async def test_every_state_is_read_although_nothing_is_projected(
    watched: WatchedDatabase, lookups: PaymentLookups, connection: Connection
) -> None:
    for history in histories().values():
        append(connection, history.facts)
        assert await lookups.find(history.id) == history.payment
        view = await get_payment(watched, lookups, history.id, None)
        assert view.status == history.payment.status
        assert view.refunded_cents == history.payment.refunded_cents
    assert connection.execute("SELECT count(*) FROM payments").fetchone() == (0,)


async def test_unknown(lookups: PaymentLookups, connection: Connection) -> None:
    (known,) = charged(connection, 1)
    assert await all_of(lookups, [uuid.uuid4(), known.id]) == [None, known.payment]


async def test_a_damaged_stream_is_its_own_lookups_trouble(
    watched: WatchedDatabase, lookups: PaymentLookups, connection: Connection
) -> None:
    good = charged(connection, 2)
    damaged = [
        stored_event(state=b"\xff"),
        stored_event(topic="NeverHeardOf"),
        to_stored_event(History("no beginning").charged().facts[1]),
    ]
    append_stored(connection, damaged[:2])
    # As only someone with the table could do it: a stream whose beginning is missing.
    connection.execute(
        "INSERT INTO payment_events VALUES (999, %s, 2, %s, %s, now())",
        [damaged[2].originator_id, damaged[2].topic, damaged[2].state],
    )
    ids = [uuid.UUID(str(event.originator_id)) for event in damaged]
    found = await all_of(lookups, [good[0].id, *ids, good[1].id])
    assert len(watched.statements) == 1
    assert (found[0], found[-1]) == (good[0].payment, good[1].payment)
    for error in found[1:-1]:
        assert isinstance(error, PaymentUnreadable)


async def test_200_lookups_share_a_statement(
    watched: WatchedDatabase, lookups: PaymentLookups, connection: Connection
) -> None:
    begun = charged(connection, 200)
    found = await all_of(lookups, [history.id for history in begun])
    assert found == [history.payment for history in begun]
    assert len(watched.statements) == 1


async def test_what_comes_while_a_statement_is_under_way_shares_the_next(
    watched: WatchedDatabase, lookups: PaymentLookups, connection: Connection
) -> None:
    begun = charged(connection, 50)
    watched.hold()
    first = asyncio.create_task(lookups.find(begun[0].id))
    await watched.read.wait()
    rest = [asyncio.create_task(lookups.find(history.id)) for history in begun]
    await asyncio.sleep(0.05)
    assert len(watched.statements) == 1
    watched.let_go()
    assert await first == begun[0].payment
    assert await asyncio.gather(*rest) == [history.payment for history in begun]
    assert [statement.ids for statement in watched.statements] == [1, 50]


async def test_a_statement_has_a_limit_and_may_hold_an_id_twice(
    watched: WatchedDatabase, lookups: PaymentLookups, connection: Connection
) -> None:
    history = charged(connection, 1)[0]
    ids = [uuid.uuid4() for _ in range(2 * BATCH_MAX - 1)]
    found = await all_of(lookups, [history.id, history.id, *ids])
    assert found == [history.payment, history.payment, *[None] * len(ids)]
    assert [statement.ids for statement in watched.statements] == [BATCH_MAX, BATCH_MAX, 1]


async def test_a_lasting_backlog_costs_nobody_an_answer(
    watched: WatchedDatabase,
    lookups: PaymentLookups,
    monkeypatch: pytest.MonkeyPatch,
    machine: Machine,
) -> None:
    """There is always somebody waiting, for longer than one lookup may wait."""
    patience_s = 0.6
    monkeypatch.setattr("payments.queries.lookups.BATCH_MAX", 2)
    monkeypatch.setattr("payments.queries.lookups.READ_TIMEOUT_S", patience_s)
    ends_at = time.monotonic() + 1.5

    async def reader() -> int:
        found = 0
        while time.monotonic() < ends_at:
            try:
                assert await lookups.find(uuid.uuid4()) is None
            except DatabaseUnavailable:
                bound(patience_s, patience_s, machine)  # it took longer
            found += 1
        return found

    assert min(await asyncio.gather(*(reader() for _ in range(12)))) > 3
    # Every statement has what is left of the time of its own lookups.
    least_s = min(statement.timeout_s for statement in watched.statements)
    bound(patience_s - least_s, patience_s - 0.1, machine)


async def test_a_lookup_is_never_answered_by_a_statement_that_began_before_it(
    watched: WatchedDatabase, lookups: PaymentLookups, connection: Connection
) -> None:
    history = History("k")
    append(connection, history.facts)
    watched.hold()
    early = asyncio.create_task(lookups.find(history.id))
    await watched.read.wait()  # the statement has seen a PENDING payment
    append(connection, history.charged().facts[1:])
    late = asyncio.create_task(lookups.find(history.id))
    await asyncio.sleep(0)
    watched.let_go()
    before, after = await early, await late
    assert before is not None
    assert after is not None
    assert (before.version, after.version) == (1, 2)


async def test_what_was_appended_is_read_under_concurrency(
    watched: WatchedDatabase, lookups: PaymentLookups
) -> None:
    """16 payments grow by one refund after another, and each step is looked for at once."""
    appender = Appender(watched.connect, Telemetry(), intent_queue_max=16)
    appender.start()

    async def grow(history: History) -> None:
        stored = 0
        for number in range(20):
            await appender.append([to_stored_event(fact) for fact in history.facts[stored:]])
            assert await lookups.find(history.id) == history.payment
            stored = len(history.facts)
            history.refunded(f"r{number}", 10)

    await asyncio.gather(*(grow(History(f"k{number}").charged()) for number in range(16)))
    await appender.stop(1)
    assert len(watched.statements) < 16 * 20


async def test_lookups_one_after_another_wait_for_nobody(
    watched: WatchedDatabase, lookups: PaymentLookups, connection: Connection
) -> None:
    (history,) = charged(connection, 1)
    for _ in range(5):
        assert await lookups.find(history.id) == history.payment
    assert len(watched.statements) == 5


@pytest.mark.parametrize("leaving", [[0], [0, 1, 2, 3], [4], [0, 1, 2, 3, 4]])
async def test_a_request_that_goes_away_takes_nobody_with_it(
    watched: WatchedDatabase, lookups: PaymentLookups, connection: Connection, leaving: list[int]
) -> None:
    (history,) = charged(connection, 1)
    watched.hold()
    waiting = [asyncio.create_task(lookups.find(history.id)) for _ in range(5)]
    await watched.read.wait()
    for number in leaving:
        waiting[number].cancel()
    await asyncio.sleep(0)
    watched.let_go()
    found = await asyncio.gather(*waiting, return_exceptions=True)
    for number, result in enumerate(found):
        if number in leaving:
            assert isinstance(result, asyncio.CancelledError)
        else:
            assert result == history.payment
    assert await lookups.find(history.id) == history.payment


@pytest.mark.parametrize("error", [DatabaseUnavailable("gone"), RuntimeError("a bug")])
async def test_a_statement_fails_only_those_who_waited_for_it(
    watched: WatchedDatabase, lookups: PaymentLookups, connection: Connection, error: Exception
) -> None:
    (history,) = charged(connection, 1)
    watched.failures.append(error)
    watched.hold()
    early = [asyncio.create_task(lookups.find(history.id)) for _ in range(3)]
    await watched.read.wait()
    late = asyncio.create_task(lookups.find(history.id))
    await asyncio.sleep(0)
    watched.let_go()
    assert await asyncio.gather(*early, return_exceptions=True) == [error] * 3
    assert await late == history.payment


async def test_a_later_statement_has_what_is_left_of_its_oldest_lookup(
    watched: WatchedDatabase, lookups: PaymentLookups
) -> None:
    watched.hold()
    first = asyncio.create_task(lookups.find(uuid.uuid4()))
    await watched.read.wait()
    oldest = asyncio.create_task(lookups.find(uuid.uuid4()))
    await asyncio.sleep(0.3)
    youngest = asyncio.create_task(lookups.find(uuid.uuid4()))
    await asyncio.sleep(0)
    watched.let_go()
    await asyncio.gather(first, oldest, youngest)
    assert [statement.ids for statement in watched.statements] == [1, 2]
    assert watched.statements[0].timeout_s == pytest.approx(READ_TIMEOUT_S, abs=0.1)
    assert watched.statements[1].timeout_s <= READ_TIMEOUT_S - 0.3


async def timed(lookups: PaymentLookups, id: uuid.UUID, delay_s: float) -> tuple[float, Any]:
    """How long a lookup took that began after `delay_s`, and what came of it."""
    await asyncio.sleep(delay_s)
    began = time.monotonic()
    try:
        found: Payment | DatabaseUnavailable | None = await lookups.find(id)
    except DatabaseUnavailable as error:
        found = error
    return time.monotonic() - began, found


async def test_a_database_that_freezes(address: DatabaseAddress, connection: Connection) -> None:
    """Lookups of three seconds, each answered in time; and all is well when it goes on."""
    begun = charged(connection, 300)
    machine = Machine()
    await asyncio.gather(*(_freeze(address, pool_max, begun, machine) for pool_max in (1, 4)))


async def _freeze(
    address: DatabaseAddress, pool_max: int, begun: list[History], machine: Machine
) -> None:
    async with (
        FreezingProxy(address) as proxy,
        Database(proxy.address, pool_max) as database,
    ):
        lookups = PaymentLookups(database)
        assert await lookups.find(begun[0].id) == begun[0].payment
        proxy.running.clear()
        answers = await asyncio.gather(
            *(timed(lookups, history.id, number / 100) for number, history in enumerate(begun))
        )
        assert {type(found) for _, found in answers} == {DatabaseUnavailable}
        bound(max(took for took, _ in answers), ANSWER_S, machine)
        proxy.running.set()

        async def goes_on() -> bool:
            _, found = await timed(lookups, begun[0].id, 0.05)
            return bool(found == begun[0].payment)

        with within(5):
            await until(goes_on)


async def test_a_database_that_is_not_there(address: DatabaseAddress, machine: Machine) -> None:
    async with Database(msgspec.structs.replace(address, host="/nowhere"), 2) as database:
        lookups = PaymentLookups(database)
        answers = await asyncio.gather(*(timed(lookups, uuid.uuid4(), n / 100) for n in range(90)))
    assert {type(found) for _, found in answers} == {DatabaseUnavailable}
    bound(max(took for took, _ in answers), ANSWER_S, machine)


async def test_connections_that_died_unnoticed_are_passed_over(
    watched: WatchedDatabase, lookups: PaymentLookups, connection: Connection
) -> None:
    (history,) = charged(connection, 1)
    assert await lookups.find(history.id) == history.payment
    connection.execute(
        "SELECT pg_terminate_backend(pid, 5000) FROM pg_stat_activity"
        " WHERE pid <> pg_backend_pid() AND datname = current_database()"
    )
    assert await lookups.find(history.id) == history.payment


async def test_stopping_tells_those_who_wait(
    watched: WatchedDatabase, lookups: PaymentLookups
) -> None:
    watched.hold()
    waiting = [asyncio.create_task(lookups.find(uuid.uuid4())) for _ in range(2)]
    await watched.read.wait()
    waiting.append(asyncio.create_task(lookups.find(uuid.uuid4())))
    await asyncio.sleep(0)
    for task in asyncio.all_tasks():
        if task.get_name() == "lookups":
            task.cancel()
    for error in await asyncio.gather(*waiting, return_exceptions=True):
        assert isinstance(error, DatabaseUnavailable)
    watched.let_go()
    assert await lookups.find(uuid.uuid4()) is None


async def test_a_client_reads_its_own_payments_only(
    watched: WatchedDatabase, lookups: PaymentLookups, connection: Connection
) -> None:
    history = History("k", client="shop").charged()
    append(connection, history.facts)
    for client in (None, "shop"):
        assert (await get_payment(watched, lookups, history.id, client)).id == history.id
    with pytest.raises(PaymentNotFound):
        await get_payment(watched, lookups, history.id, "other")


async def test_clients_that_ask_at_once_share_a_statement_and_nothing_else(
    watched: WatchedDatabase, lookups: PaymentLookups, connection: Connection
) -> None:
    history = History("k", client="shop").charged()
    damaged = History("damaged", client="shop")
    append(connection, [*history.facts, *damaged.facts])
    append_stored(connection, [stored_event(damaged.id, 2, b"\xff")])
    clients = ("shop", "other", None, "", "sho", "shop2")
    asked = [lookups.find(each.id, client) for each in (history, damaged) for client in clients]
    found = await asyncio.gather(*asked, return_exceptions=True)
    assert len(watched.statements) == 1
    assert found[:6] == [history.payment, None, history.payment, None, None, None]
    unreadable = [isinstance(each, PaymentUnreadable) for each in found[6:]]
    assert unreadable == [True, False, True, False, False, False]
    assert [each for each in found[6:] if not isinstance(each, Exception)] == [None] * 4
