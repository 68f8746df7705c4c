"""The log as the eventsourcing library's classes see it: how other teams follow it.

A program of theirs gives PaymentLog to the library's ProjectionRunner and gets each fact once, in
the order of the log: docs/following-the-log.md. Reading is all that it can do. The service itself
does not import this module: it writes with the Appender and reads with followers of its own.
"""

from collections.abc import Sequence
from typing import Any, ClassVar, Never
from uuid import UUID

from eventsourcing.application import Application
from eventsourcing.domain import DomainEventProtocol
from eventsourcing.persistence import (
    JSONTranscoder,
    ListenNotifySubscription,
    Mapper,
    Notification,
    NotSupportedError,
    StoredEvent,
    Subscription,
)
from eventsourcing.postgres import (
    PostgresApplicationRecorder,
    PostgresDatastore,
    PostgresFactory,
)

from payments.events.facts import Fact
from payments.events.store import to_fact

# So few that they fit into the buffers of the connection: the server then ends the query also if
# the reader is stopped meanwhile (docs/decisions/exports.md).
READ_EVENTS = 200
POLL_S = 0.2


class LogWentBack(Exception):
    """The log ends before the position that was asked for: events that were followed are gone."""


class FactMapper(Mapper[UUID]):
    """Facts of the library's StoredEvent; UndecodableEvent if this version cannot read them."""

    def __init__(self) -> None:
        super().__init__(JSONTranscoder())  # required by the base class, not used

    def to_domain_event(self, stored_event: StoredEvent) -> Fact:
        return to_fact(stored_event)

    def to_stored_event(self, domain_event: DomainEventProtocol[UUID]) -> Never:
        raise NotSupportedError(_READ_ONLY)


class LogSubscription(ListenNotifySubscription["LogRecorder"]):
    """Looks at the log every POLL_S, and selects topics itself.

    The library's own waits for NOTIFY, which is a hint here and not repeated; and a listener that
    is stopped keeps the server from forgetting any notification. It also selects topics with SQL,
    which reads the whole log in one query if few events have them.
    """

    def __init__(
        self, recorder: "LogRecorder", gt: int | None = None, topics: Sequence[str] = ()
    ) -> None:
        self._selected = frozenset(topics)
        super().__init__(recorder, gt)

    def __next__(self) -> Notification:
        while True:
            notification = super().__next__()
            if not self._selected or notification.topic in self._selected:
                return notification

    def _loop_on_pull(self) -> None:
        self._select_limit = READ_EVENTS
        try:
            while not self._has_been_stopped:
                self._pull()
                self._has_been_notified.wait(POLL_S)  # set by stop()
        except BaseException as error:  # noqa: BLE001 - raised again in the thread that iterates
            self._thread_error = error
            self.stop()


class LogRecorder(PostgresApplicationRecorder):
    """The library's recorder on payment_events, for reading; SELECT on that table is enough."""

    def __init__(self, datastore: PostgresDatastore) -> None:
        super().__init__(datastore, events_table_name="payment_events")
        self.sql_create_statements.clear()  # the table comes from our migrations

    def insert_events(self, stored_events: Sequence[StoredEvent], **kwargs: Any) -> Sequence[int]:
        raise NotSupportedError(_READ_ONLY)

    def subscribe(
        self, gt: int | None = None, topics: Sequence[str] = ()
    ) -> Subscription[PostgresApplicationRecorder]:
        """Events behind position `gt`, as they come; LogWentBack if the log ends before it."""
        last = self.max_notification_id() or 0
        if gt is not None and gt > last:
            raise LogWentBack(
                f"the log ends at position {last}, before position {gt}: events were lost; "
                "rebuild the read model from an empty one"
            )
        return LogSubscription(self, gt, topics)


class PaymentLog(Application[UUID]):
    """The library's Application on the log; what it is connected with stands in PAYMENTS_POSTGRES_*
    (or POSTGRES_*), and followers remember their position under its name."""

    name = "payments"
    env: ClassVar[dict[str, str]] = {
        "PAYMENTS_PERSISTENCE_MODULE": "eventsourcing.postgres",
        "PAYMENTS_POSTGRES_POOL_SIZE": "1",
        "PAYMENTS_POSTGRES_MAX_OVERFLOW": "1",
        "PAYMENTS_POSTGRES_CONNECT_TIMEOUT": "5",
    }

    def construct_recorder(self) -> LogRecorder:
        assert isinstance(self.factory, PostgresFactory)
        return LogRecorder(self.factory.datastore)

    def construct_mapper(self) -> FactMapper:
        return FactMapper()


_READ_ONLY = "only the Payment Service appends to its log"
