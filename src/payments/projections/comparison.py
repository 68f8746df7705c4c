"""Compares the payments read model with the log, row by row.

Within one snapshot the rows match the follower's position, so no lock is needed. Each snapshot
reads a slice of the payments, in the order of their ids, and ends before they are compared: memory
is constant, and vacuum is blocked for milliseconds only. So each slice is compared as of its own
moment.
"""

from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any, NamedTuple, TypeVar
from uuid import UUID

from payments.clients import DEFAULT_CLIENT
from payments.events.facts import UndecodableEvent
from payments.events.store import CHANGED_STREAMS, READ_STREAMS_UNTIL, SLICE_END, fact_at
from payments.payment.state import ABANDONED, DECLINED, Payment, UnexpectedEvent, evolve
from payments.projections.payments import (
    CLIENT_COLUMNS,
    PAYMENT_COLUMNS,
    REFUND_COLUMNS,
    client_row,
    payment_row,
    refund_row,
)
from payments.snapshot import Reader, Rows, Snapshot, Source

PROGRESS_EVERY = 5000  # payments
CHANGED_PAYMENTS = 5000  # that are compared again in one slice
END = 1 << 128  # after every id
FIRST_ID, LAST_ID = UUID(int=0), UUID(int=END - 1)
LAST = 2**63 - 1  # position
NO_ROWS: Rows = []
Row = tuple[Any, ...]
T = TypeVar("T")

# As in events/store.py: of the payments with ids in a range, or of the given ones, in the order of
# their ids. A time outside Python's range (infinity, a year of five digits) is read as NULL.
PAYMENTS = """
SELECT id, merchant_order_id, idempotency_key, amount_cents, currency, status, provider_txn_id,
       readable_time(created_at), readable_time(updated_at)
  FROM payments
 WHERE id >= %(first_id)s AND id <= %(last_id)s
   AND (%(ids)s::uuid[] IS NULL OR id = ANY (%(ids)s::uuid[]))
 ORDER BY id
"""

REFUNDS = """
SELECT id, payment_id, idempotency_key, amount_cents, currency, status, provider_refund_id,
       decline_code, readable_time(created_at), readable_time(updated_at)
  FROM refunds
 WHERE payment_id >= %(first_id)s AND payment_id <= %(last_id)s
   AND (%(ids)s::uuid[] IS NULL OR payment_id = ANY (%(ids)s::uuid[]))
 ORDER BY payment_id, id
"""

CLIENTS = """
SELECT payment_id, client, status, currency, readable_time(created_at)
  FROM payment_clients
 WHERE payment_id >= %(first_id)s AND payment_id <= %(last_id)s
   AND (%(ids)s::uuid[] IS NULL OR payment_id = ANY (%(ids)s::uuid[]))
 ORDER BY payment_id
"""

UNSETTLED = """
SELECT payment_id, kind, readable_time(since)
  FROM unsettled_payments
 WHERE payment_id >= %(first_id)s AND payment_id <= %(last_id)s
   AND (%(ids)s::uuid[] IS NULL OR payment_id = ANY (%(ids)s::uuid[]))
 ORDER BY payment_id
"""

POSITION = """
SELECT position FROM followers WHERE name = 'payments'
"""

PARKED = """
SELECT payment_id, position FROM parked_streams
 WHERE follower = 'payments' AND payment_id >= %(first_id)s AND payment_id <= %(last_id)s
   AND (%(ids)s::uuid[] IS NULL OR payment_id = ANY (%(ids)s::uuid[]))
"""

ALL_PARKED = """
SELECT payment_id FROM parked_streams WHERE follower = 'payments'
"""

# The number and sum of payments and refunds of each status and currency.
TOTALS = """
SELECT 'payments', status, currency, count(*), sum(amount_cents)::bigint
  FROM payments GROUP BY status, currency
 UNION ALL
SELECT 'refunds', status, currency, count(*), sum(amount_cents)::bigint
  FROM refunds GROUP BY status, currency
"""


class Table(NamedTuple):
    """A table of the read model. `rows` computes a payment's expected rows, by id; `or_rows` an
    alternative that is also correct, if the log does not determine which."""

    name: str
    columns: tuple[str, ...]
    select: str
    payment: int  # which column holds the payment's id; the first holds the row's own
    rows: Callable[[Payment], list[Row]]
    or_rows: Callable[[Payment], list[Row]] | None = None


def _refund_rows(payment: Payment) -> list[Row]:
    if not payment.refunds:
        return NO_ROWS
    return sorted(refund_row(payment, refund) for refund in payment.refunds)


def _client_rows(payment: Payment) -> list[Row]:
    return NO_ROWS if payment.client == DEFAULT_CLIENT else [client_row(payment)]


def _unsettled_rows(payment: Payment) -> list[Row]:
    open_for = payment.unsettled
    return NO_ROWS if open_for is None else [(payment.id, open_for.kind, open_for.since)]


def _watched_rows(payment: Payment) -> list[Row]:
    """A declined payment is watched until settling has asked once more, if the gateway may reverse
    declines."""
    watched = payment.declined and payment.late_capture is None
    return [(payment.id, DECLINED, payment.updated_at)] if watched else NO_ROWS


TABLES = (
    Table(
        name="payments",
        columns=tuple(PAYMENT_COLUMNS),
        select=PAYMENTS,
        payment=0,
        rows=lambda payment: [payment_row(payment)],
    ),
    Table(
        name="refunds",
        columns=tuple(REFUND_COLUMNS),
        select=REFUNDS,
        payment=1,
        rows=_refund_rows,
    ),
    Table(
        name="payment_clients",
        columns=tuple(CLIENT_COLUMNS),
        select=CLIENTS,
        payment=0,
        rows=_client_rows,
    ),
    Table(
        name="unsettled_payments",
        columns=("payment_id", "kind", "since"),
        select=UNSETTLED,
        payment=0,
        rows=_unsettled_rows,
        or_rows=_watched_rows,
    ),
)


class Difference(NamedTuple):
    """A row that differs from the log. `expected` None: the row is surplus; `found` None: it is
    missing."""

    table: Table
    payment_id: UUID
    expected: Row | None
    found: Row | None

    @property
    def id(self) -> UUID:
        row = self.expected or self.found
        assert row is not None
        return UUID(str(row[0]))

    @property
    def may_be(self) -> bool:
        """Whether the row may be missing: settling deletes an abandoned payment once it cannot be
        captured any more, which the log does not record."""
        row = self.expected
        return self.found is None and row is not None and row[1] == ABANDONED

    def __str__(self) -> str:
        where = f"{self.table.name} {self.id}"
        if self.found is None:
            return f"{where}: missing from the table"
        if self.expected is None:
            return f"{where}: not in the log"
        values = zip(self.table.columns, self.found, self.expected, strict=True)
        return f"{where}: " + ", ".join(
            f"{column} is {_text(found)}, the log says {_text(expected)}"
            for column, found, expected in values
            if found != expected
        )


class Unreadable(NamedTuple):
    """A payment with unreadable events; its rows are not compared."""

    payment_id: UUID
    reason: str

    def __str__(self) -> str:
        return f"payment {self.payment_id}: its events cannot be read: {self.reason}"


class Totals(dict[tuple[str, str, str], tuple[int, int]]):
    """(table, status, currency): the number of payments or refunds, and the sum in minor units."""

    def add(self, payment: Payment) -> None:
        """Counts a payment and its refunds."""
        self._add(("payments", payment.status._value_, payment.currency), 1, payment.amount_cents)
        for refund in payment.refunds:
            kind = ("refunds", refund.status._value_, payment.currency)
            self._add(kind, 1, refund.amount_cents)

    def replace(self, before: "Totals", after: "Totals") -> None:
        """Replaces the totals `before` of some payments by `after`."""
        for kind, (count, cents) in before.items():
            self._add(kind, -count, -cents)
        for kind, (count, cents) in after.items():
            self._add(kind, count, cents)

    def _add(self, kind: tuple[str, str, str], count: int, cents: int) -> None:
        counted, summed = self.get(kind, (0, 0))
        if counted + count:
            self[kind] = counted + count, summed + cents
        else:
            self.pop(kind, None)


class Slice(NamedTuple):
    """Log and tables of some payments, with the follower at `position`.

    `ids` names them; None if they are a range. `events` are READ_STREAMS_UNTIL's rows, `tables` the
    rows of each of TABLES, and `parked` the positions at which their streams were parked.
    """

    ids: list[UUID] | None
    position: int
    parked: dict[UUID, int]
    events: Rows
    tables: list[Rows]


def slices(reader: Reader) -> Iterator[Slice]:
    """Slices of all payments, each as of its own moment."""
    first_id: UUID | None = FIRST_ID
    while first_id is not None:
        part, first_id = reader.at_one_moment(
            lambda snapshot, first=first_id: _next_slice(snapshot, first)  # type: ignore[misc]
        )
        yield part


def slice_of(snapshot: Snapshot, payment_ids: list[UUID]) -> Slice:
    """The slice of these payments."""
    return _slice(snapshot, {"ids": payment_ids, "first_id": FIRST_ID, "last_id": LAST_ID})


def _next_slice(snapshot: Snapshot, first_id: UUID) -> tuple[Slice, UUID | None]:
    """The slice of payments from an id on, and the first id of the next one; None at the end."""
    ((last_id,),) = snapshot.fetch(SLICE_END, {"first_id": first_id})
    params = {"ids": None, "first_id": first_id, "last_id": last_id or LAST_ID}
    part = _slice(snapshot, params)
    return part, UUID(int=last_id.int + 1) if last_id not in (None, LAST_ID) else None


def _slice(snapshot: Snapshot, params: dict[str, Any]) -> Slice:
    position = position_of(snapshot)
    return Slice(
        params["ids"],
        position,
        dict(snapshot.fetch(PARKED, params)),
        snapshot.fetch(READ_STREAMS_UNTIL, {"until": position, **params}),
        [snapshot.fetch(table.select, params) for table in TABLES],
    )


def position_of(source: Source) -> int:
    """The follower's position."""
    rows = source.fetch(POSITION)
    return rows[0][0] if rows else 0


Take = Callable[[Slice, Iterator[Difference | Unreadable]], None]


class Comparison:
    """Compares log and tables. `totals` are those of the log at `position`, though payments may be
    compared as of later; parked payments count as of when they were parked.

    Iterators of differences must be exhausted.
    """

    def __init__(self, reader: Reader) -> None:
        self._reader = reader
        # Called from time to time with the number of events read.
        self.progress: Callable[[int], None] = lambda _: None
        self.position = position_of(reader)
        self.parked: dict[UUID, int] = {}
        self.events = self.payments = 0
        self.totals = Totals()

    def of_all(self) -> Iterator[Difference | Unreadable]:
        """The differences of all payments. To be called once."""
        for part in self._reader.ahead(slices(self._reader)):
            yield from self._of(part)

    def catch_up(self, take: Take) -> None:
        """Compares the payments that have changed since, slice by slice; `take` receives the
        differences of each. `position` then is the follower's position at the start of this
        call."""
        until = position_of(self._reader)
        ids = self._changed(self._reader, until)
        parts = (
            self._reader.at_one_moment(lambda snapshot, some=some: slice_of(snapshot, some))  # type: ignore[misc]
            for some in (
                ids[start : start + CHANGED_PAYMENTS]
                for start in range(0, len(ids), CHANGED_PAYMENTS)
            )
        )
        self._again(parts, until, take)

    def end(self, take: Take, read: Callable[[Snapshot], T]) -> T:
        """Compares the last changed payments in one snapshot; returns what `read` reads in it."""

        def read_all(snapshot: Snapshot) -> tuple[Slice, T]:
            ids = self._changed(snapshot, position_of(snapshot))
            return slice_of(snapshot, ids), read(snapshot)

        part, found = self._reader.at_one_moment(read_all)
        self._again([part], part.position, take)
        return found

    def _changed(self, source: Source, until: int) -> list[UUID]:
        bounds = {"after": self.position, "until": until}
        ids = {row[0] for row in source.fetch(CHANGED_STREAMS, bounds)}
        # Parked streams may have been unparked, or parked again at another position.
        ids |= self.parked.keys() | {row[0] for row in source.fetch(ALL_PARKED)}
        return sorted(ids)

    def _again(self, parts: Iterable[Slice], until: int, take: Take) -> None:
        counted, since, parked = (self.events, self.payments), self.position, self.parked
        self.position, self.parked = until, {}
        for part in parts:
            self.totals.replace(totals_of(part.events, parked, since), Totals())
            take(part, self._of(part))
        self.events, self.payments = counted

    def _of(self, part: Slice) -> Iterator[Difference | Unreadable]:
        self.parked |= part.parked
        sides = [_Side(table, iter(rows)) for table, rows in zip(TABLES, part.tables, strict=True)]
        for payment_id, payment, before in payments_of(part.events, part.parked, self.position):
            if isinstance(payment, Exception):
                yield Unreadable(payment_id, str(payment))
            elif payment is not None:
                self.payments += 1
                self.events += payment.version
                if self.payments % PROGRESS_EVERY == 0:
                    self.progress(self.events)
            if isinstance(before, Payment):
                self.totals.add(before)
            place = payment_id.int  # in the order of ids
            for side in sides:
                if side.upcoming < place:
                    yield from side.before(place)
                found = side.take(place) if side.upcoming == place else NO_ROWS
                if isinstance(payment, Exception):
                    continue
                expected = side.table.rows(payment) if payment is not None else NO_ROWS
                if found != expected and not (payment and _may_stand(side.table, payment, found)):
                    yield from _differences(side.table, payment_id, expected, found)
        for side in sides:
            yield from side.before(END)


Folded = Payment | Exception | None


def payments_of(
    rows: Iterable[Row], parked: Mapping[UUID, int], then: int = LAST
) -> Iterator[tuple[UUID, Folded, Folded]]:
    """Folds READ_STREAMS_UNTIL's rows: yields each id with its payment or error, and the same as of
    the position `then`.

    A parked stream is folded up to where it was parked; None: it was parked at its first event.
    """
    current: UUID | None = None
    payment: Payment | None = None
    failed: Exception | None = None
    before: Folded = None
    is_later = False
    until: int | None = None
    place = END
    for position, stream, version, topic, state in rows:
        if stream.int != place:
            place = stream.int
            if current is not None:
                yield current, failed or payment, before if is_later else failed or payment
            current, payment, failed, is_later = stream, None, None, False
            until = parked.get(stream)
        if failed is None and (until is None or position < until):
            if position > then and not is_later:
                before, is_later = payment, True
            try:
                payment = evolve(payment, fact_at(stream, version, topic, state))
            except (UndecodableEvent, UnexpectedEvent) as error:
                failed = error
    if current is not None:
        yield current, failed or payment, before if is_later else failed or payment


def totals_of(rows: Iterable[Row], parked: Mapping[UUID, int], then: int) -> Totals:
    """The totals of READ_STREAMS_UNTIL's rows as of the position `then`."""
    totals = Totals()
    for _, _, payment in payments_of(rows, parked, then):
        if isinstance(payment, Payment):
            totals.add(payment)
    return totals


def table_totals(source: Source) -> Totals:
    """The totals of the tables."""
    return Totals(
        ((table, str(status), str(currency)), (count, cents or 0))
        for table, status, currency, count, cents in source.fetch(TOTALS)
    )


class _Side:
    """A table's rows, read in step with the log's payments.

    `upcoming` is the payment id of the next row, as an integer; END: no rows are left.
    """

    def __init__(self, table: Table, rows: Iterator[Row]) -> None:
        self.table = table
        self._rows = rows
        self._advance()

    def before(self, place: int) -> Iterator[Difference]:
        """Rows of payments before this one, which are not in the log."""
        while self.upcoming < place:
            yield Difference(
                table=self.table,
                payment_id=self._next[self.table.payment],
                expected=None,
                found=self._next,
            )
            self._advance()

    def take(self, place: int) -> list[Row]:
        """The rows of this payment."""
        taken = []
        while self.upcoming == place:
            taken.append(self._next)
            self._advance()
        return taken

    def _advance(self) -> None:
        row = next(self._rows, None)
        self._next: Row = row or ()
        self.upcoming: int = row[self.table.payment].int if row is not None else END


def _may_stand(table: Table, payment: Payment, found: list[Row]) -> bool:
    return bool(found) and table.or_rows is not None and found == table.or_rows(payment)


def _differences(
    table: Table, payment_id: UUID, expected: Iterable[Row], found: Iterable[Row]
) -> Iterator[Difference]:
    wanted = {row[0]: row for row in expected}
    there = {row[0]: row for row in found}
    for id in sorted(wanted.keys() | there.keys()):
        if wanted.get(id) != there.get(id):
            yield Difference(
                table=table, payment_id=payment_id, expected=wanted.get(id), found=there.get(id)
            )


def _text(value: Any) -> str:
    return "nothing" if value is None else str(value)
