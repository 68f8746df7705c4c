"""The log as the eventsourcing library's classes see it, held to the library's own test cases."""

import time
from collections.abc import Iterator, Sequence
from typing import Any

import psycopg
import pytest
from eventsourcing.persistence import (
    IntegrityError,
    NotSupportedError,
    OperationalError,
    StoredEvent,
)
from eventsourcing.postgres import PostgresDatastore
from eventsourcing.tests.persistence import (
    ApplicationRecorderTestCase,
    NonInterleavingNotificationIDsBaseCase,
)

from payments.database.connections import DatabaseAddress, connect
from payments.events.facts import UndecodableEvent
from payments.events.library import READ_EVENTS, LogRecorder, LogWentBack, PaymentLog
from payments.events.store import APPEND, append_params
from payments.payment.state import Status, fold
from tests.following import log_at
from tests.support import History, append, append_stored, stored_event


class Writing(LogRecorder):
    """Appends by way of the service's own function, which is what the cases then look at."""

    address: DatabaseAddress

    def insert_events(self, stored_events: Sequence[StoredEvent], **_: Any) -> Sequence[int]:
        appends = [[event] for event in stored_events]
        with connect(self.address, "tests") as opened, opened.transaction():
            # The cases write with many threads at once, and the machine may be busy.
            opened.execute("SET LOCAL lock_timeout = 0; SET LOCAL statement_timeout = 0")
            rows = opened.execute(APPEND, append_params(appends)).fetchall()
            if {outcome for outcome, _, _ in rows} - {"appended"}:
                raise IntegrityError("a version is taken")
        return [position for _, position, _ in rows]


@pytest.fixture
def datastore(address: DatabaseAddress) -> Iterator[PostgresDatastore]:
    at = (address.dbname, address.host, address.port, address.user, "")
    with PostgresDatastore(*at, pool_size=1, max_overflow=20) as opened:
        yield opened


@pytest.fixture
def recorder(datastore: PostgresDatastore) -> LogRecorder:
    return LogRecorder(datastore)


@pytest.fixture
def for_unittest(
    request: pytest.FixtureRequest, datastore: PostgresDatastore, address: DatabaseAddress
) -> None:
    """Hands a recorder that writes to the library's unittest classes."""
    request.instance.recorder = Writing(datastore)
    request.instance.recorder.address = address


@pytest.mark.usefixtures("for_unittest")
class TestApplicationRecorder(ApplicationRecorderTestCase[LogRecorder]):
    recorder: LogRecorder

    def create_recorder(self) -> LogRecorder:
        return self.recorder

    def test_insert_subscribe(self) -> None:
        self.optional_test_insert_subscribe()

    def test_performance(self) -> None:
        self.skipTest("it prints how fast inserting is, which only these tests do")


@pytest.mark.usefixtures("for_unittest")
class TestNonInterleaving(NonInterleavingNotificationIDsBaseCase):
    recorder: LogRecorder

    def create_recorder(self) -> LogRecorder:
        return self.recorder


@pytest.fixture
def log(address: DatabaseAddress) -> Iterator[PaymentLog]:
    with PaymentLog(log_at(address)) as opened:
        yield opened


def test_a_payments_facts_and_what_it_was_after_some_of_them(
    log: PaymentLog, connection: psycopg.Connection[Any]
) -> None:
    history = History("k").charged().refunded()
    append(connection, history.facts)
    payment_id = history.payment.id
    assert list(log.events.get(payment_id)) == history.facts
    for version, status in ((2, Status.SUCCESS), (4, Status.REFUNDED)):
        payment = fold(log.events.get(payment_id, lte=version))  # type: ignore[arg-type]
        assert payment is not None
        assert payment.status is status


def test_nothing_is_written(log: PaymentLog, connection: psycopg.Connection[Any]) -> None:
    with pytest.raises(NotSupportedError, match="only the Payment Service"):
        log.save(History("k").facts[0])
    with pytest.raises(NotSupportedError, match="only the Payment Service"):
        log.recorder.insert_events([stored_event()])
    assert connection.execute("SELECT count(*) FROM payment_events").fetchall() == [(0,)]


def test_what_is_there_and_what_comes_without_a_notice(
    recorder: LogRecorder, connection: psycopg.Connection[Any]
) -> None:
    """In more than one query; appending by itself notifies nobody."""
    append_stored(connection, (stored_event() for _ in range(READ_EVENTS + 1)))
    with recorder.subscribe(gt=3) as subscription:
        assert [next(subscription).id for _ in range(READ_EVENTS - 2)] == [
            *range(4, READ_EVENTS + 2)
        ]
        for position in (READ_EVENTS + 2, READ_EVENTS + 3):
            append_stored(connection, [stored_event()])
            assert next(subscription).id == position


def test_topics_are_selected_without_asking_the_database(
    recorder: LogRecorder, connection: psycopg.Connection[Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    """One that is rare would make the database read the whole log for an answer."""
    append(connection, [*History("a").charged().facts, *History("b").charged().facts])
    asked = []
    select = recorder.select_notifications

    def selecting(start: int | None, limit: int, **kwargs: Any) -> Any:
        asked.append((limit, kwargs.get("topics", ())))
        return select(start, limit, **kwargs)

    monkeypatch.setattr(recorder, "select_notifications", selecting)
    with recorder.subscribe(topics=["PaymentCharged"]) as subscription:
        assert [next(subscription).id for _ in range(2)] == [2, 4]
    assert set(asked) == {(READ_EVENTS, ())}


def test_a_type_that_is_not_known(log: PaymentLog, connection: psycopg.Connection[Any]) -> None:
    append_stored(connection, [stored_event(topic="OfALaterRelease")])
    (found,) = log.recorder.select_notifications(1, 10)
    with pytest.raises(UndecodableEvent, match="unknown topic 'OfALaterRelease'"):
        log.mapper.to_domain_event(found)


def test_a_log_that_ends_before_the_position(
    recorder: LogRecorder, connection: psycopg.Connection[Any]
) -> None:
    append_stored(connection, [stored_event()])
    with recorder.subscribe(gt=1):
        pass
    with pytest.raises(LogWentBack, match="ends at position 1, before position 2"):
        recorder.subscribe(gt=2)


def test_a_query_that_keeps_failing_ends_the_subscription(
    recorder: LogRecorder, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fails(*_: object, **__: object) -> None:
        raise OperationalError("away")

    with recorder.subscribe() as subscription:
        time.sleep(0.05)
        monkeypatch.setattr(recorder, "select_notifications", fails)
        with pytest.raises(OperationalError, match="away"):
            next(subscription)
