"""The recorder passes the test cases that the eventsourcing library ships for recorders."""

import uuid
from collections.abc import Iterator
from typing import Any

import psycopg
import pytest
from eventsourcing.persistence import IntegrityError, OperationalError, StoredEvent
from eventsourcing.tests.persistence import (
    ApplicationRecorderTestCase,
    NonInterleavingNotificationIDsBaseCase,
)

from payments.database import DatabaseAddress
from payments.events import store
from payments.events.store import PaymentsDatastore, PaymentsRecorder
from tests.events.test_appender import commits, let_commits_not_wait


@pytest.fixture
def recorder(address: DatabaseAddress) -> Iterator[PaymentsRecorder]:
    with PaymentsDatastore(address) as datastore:
        yield PaymentsRecorder(datastore)


@pytest.fixture
def for_unittest(request: pytest.FixtureRequest, recorder: PaymentsRecorder) -> None:
    """Hands the recorder to the library's unittest classes."""
    request.instance.recorder = recorder


@pytest.mark.usefixtures("for_unittest")
class TestApplicationRecorder(ApplicationRecorderTestCase[PaymentsRecorder]):
    recorder: PaymentsRecorder

    def create_recorder(self) -> PaymentsRecorder:
        return self.recorder

    def test_insert_subscribe(self) -> None:
        self.optional_test_insert_subscribe()


@pytest.mark.usefixtures("for_unittest")
class TestNonInterleaving(NonInterleavingNotificationIDsBaseCase):
    recorder: PaymentsRecorder

    def create_recorder(self) -> PaymentsRecorder:
        return self.recorder


def _event(stream: uuid.UUID, version: int, state: bytes = b"{}") -> StoredEvent:
    return StoredEvent(stream, version, "PaymentInitiated", state)


def test_followers_are_notified(
    recorder: PaymentsRecorder, connection: psycopg.Connection[Any]
) -> None:
    connection.execute("LISTEN payment_events")
    recorder.insert_events([_event(uuid.uuid4(), 1)])
    assert next(connection.notifies(timeout=5)).channel == "payment_events"


def test_a_notice_that_fails_takes_nothing_with_it(
    recorder: PaymentsRecorder, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(store, "NOTIFY", "NOTIFY that fails")
    assert recorder.insert_events([_event(uuid.uuid4(), 1)]) == [1]


def test_several_streams_are_inserted_together_or_not_at_all(recorder: PaymentsRecorder) -> None:
    a, b = uuid.uuid4(), uuid.uuid4()
    assert recorder.insert_events([_event(a, 1), _event(b, 1), _event(a, 2)]) == [1, 2, 3]
    with pytest.raises(IntegrityError):
        recorder.insert_events([_event(a, 3), _event(b, 1, b'{"other": 1}')])
    assert [event.originator_version for event in recorder.select_events(a)] == [1, 2]
    assert recorder.insert_events([_event(b, 2)]) == [4]


def test_events_are_on_disk_when_they_are_inserted(
    address: DatabaseAddress, connection: psycopg.Connection[Any]
) -> None:
    let_commits_not_wait(connection, address)
    with PaymentsDatastore(address) as datastore:
        PaymentsRecorder(datastore).insert_events([_event(uuid.uuid4(), 1)])
    assert commits(connection) == [("payments recorder", "on")]


def test_a_gap_in_the_versions_is_refused(recorder: PaymentsRecorder) -> None:
    stream = uuid.uuid4()
    with pytest.raises(IntegrityError):
        recorder.insert_events([_event(stream, 2)])
    with pytest.raises(IntegrityError):
        recorder.insert_events([_event(stream, 1), _event(stream, 3)])
    assert recorder.max_notification_id() is None


def test_a_lost_commit_reply_is_not_an_error(recorder: PaymentsRecorder) -> None:
    """The connection dies after the commit: sent again, the same events count as inserted."""
    stream = uuid.uuid4()
    insert_once, calls = recorder._insert_once, 0

    def lose_the_first_reply(events: list[StoredEvent], *, accept_repeated: bool) -> list[int]:
        nonlocal calls
        calls += 1
        positions = insert_once(events, accept_repeated=accept_repeated)
        if calls == 1:
            raise OperationalError("the reply was lost")
        return positions

    recorder._insert_once = lose_the_first_reply  # type: ignore[method-assign,assignment]
    assert recorder.insert_events([_event(stream, 1)]) == [1]
    assert calls == 2
