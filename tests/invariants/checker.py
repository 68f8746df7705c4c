"""What must always hold, checked from outside: the database, the provider's records, the answers.

One checker for every scenario: a property test, a crash test and a load test all end in
`check(...)`.
"""

from collections import Counter, defaultdict
from collections.abc import Iterable, Iterator, Mapping, Sequence
from datetime import datetime
from typing import Any, Literal, NamedTuple
from uuid import UUID

import psycopg
from eventsourcing.persistence import StoredEvent

from payments.events.facts import (
    Fact,
    LateCaptureFound,
    LateCaptureReturned,
    PaymentCharged,
    PaymentRefunded,
    RefundFailed,
    RefundInitiated,
    UndecodableEvent,
)
from payments.events.store import to_fact
from payments.payment.state import Payment, Status, UnexpectedEvent, fold

FINDINGS_SHOWN = 30
OUTCOME_TOPICS = {"PaymentCharged": "SUCCESS", "PaymentFailed": "FAILED"}

Row = tuple[Any, ...]
Rows = dict[UUID, Row]

LOG = """
SELECT notification_id, originator_id, originator_version, topic, state
  FROM payment_events ORDER BY notification_id
"""

PARKED = "SELECT payment_id, reason FROM parked_streams WHERE follower = 'payments'"

POSITION = "SELECT position FROM followers WHERE name = 'payments'"

# Every column of the read model, the key first, but for due_at and attempts, which settling moves.
# Whether what is declined is listed, to be asked about once more, depends on its provider.
TABLES = {
    "payments": """
        SELECT id, merchant_order_id, idempotency_key, amount_cents, currency, status,
               provider_txn_id, created_at, updated_at
          FROM payments""",
    "refunds": """
        SELECT id, payment_id, idempotency_key, amount_cents, currency, status,
               provider_refund_id, decline_code, created_at, updated_at
          FROM refunds""",
    "payment_clients": """
        SELECT payment_id, client, status, currency, created_at FROM payment_clients""",
    "unsettled_payments": """
        SELECT payment_id, kind, since FROM unsettled_payments WHERE kind <> 'declined'""",
}


class InvariantBroken(AssertionError):
    """No pause of the machine is an excuse: the test that raises it does not run again."""


class ProviderRecord(NamedTuple):
    """Money that the provider moved. `our_id` is what we call it: the payment's, or the refund's,
    which is the provider's idempotency key."""

    kind: Literal["capture", "refund"]
    our_id: UUID
    payment_id: UUID
    amount_cents: int
    currency: str
    txn_id: str


class ChargeAnswer(NamedTuple):
    """What a client was told of a charge; `status` is that of the body."""

    payment_id: UUID
    status_code: int
    status: str


class RefundAnswer(NamedTuple):
    """What a client was told of a refund."""

    payment_id: UUID
    refund_id: UUID
    status_code: int
    amount_cents: int


class Report(NamedTuple):
    """What was looked at. `parked` streams, by reason, were left out of the read model's check."""

    events: int
    payments: int
    parked: dict[UUID, str]


class _Stored(NamedTuple):
    """The database as of one moment."""

    log: list[tuple[int, UUID, int, str, bytes]]
    position: int
    parked: dict[UUID, str]
    tables: dict[str, Rows]


class _Streams(NamedTuple):
    """The log's streams: what can be decoded of each, and what each amounts to.

    A stream that cannot be folded is in `unreadable`, and not in `payments`.
    """

    facts: dict[UUID, list[Fact]]
    topics: dict[UUID, list[str]]
    payments: dict[UUID, Payment]
    unreadable: dict[UUID, str]


def check(
    connection: psycopg.Connection[Any],
    provider: Iterable[ProviderRecord] | None = None,
    charges: Iterable[ChargeAnswer] = (),
    refunds: Iterable[RefundAnswer] = (),
    *,
    caught_up: bool = True,
    settled: bool = False,
) -> Report:
    """Raises InvariantBroken with all findings.

    Without `provider` nothing is compared with it. `caught_up`: the follower has to stand at the
    log's end; else the read model is compared as of its position. `settled`: nothing may be open,
    and the provider knows nothing that the events do not say; else it may be ahead of what is open.
    """
    stored = _read(connection)
    streams = _streams_of(stored.log)
    findings = [
        *_positions(stored, caught_up),
        *_unreadable(stored, streams),
        *_read_model(stored),
        *_charge_answers(streams, charges),
        *_refund_answers(streams, refunds),
        *_refunds_within_capture(streams),
        *(_open(streams) if settled else ()),
    ]
    if provider is not None:
        findings += _provider(streams, list(provider), settled)
    expect_none(findings)
    return Report(len(stored.log), len(streams.facts), stored.parked)


def expect_none(findings: Sequence[str]) -> None:
    """Raises InvariantBroken with all findings, if there are any."""
    if findings:
        more = len(findings) - FINDINGS_SHOWN
        lines = [f"{len(findings)} findings", *findings[:FINDINGS_SHOWN]]
        raise InvariantBroken("\n- ".join([*lines, f"and {more} more"] if more > 0 else lines))


def _read(connection: psycopg.Connection[Any]) -> _Stored:
    with connection.transaction():
        connection.execute("SET TRANSACTION ISOLATION LEVEL REPEATABLE READ, READ ONLY")
        connection.execute("SET LOCAL statement_timeout = '30s'")
        position = connection.execute(POSITION).fetchone()
        assert position is not None, "the follower has no row"
        return _Stored(
            connection.execute(LOG).fetchall(),
            position[0],
            dict(connection.execute(PARKED).fetchall()),
            {
                table: {row[0]: row for row in connection.execute(query.encode())}
                for table, query in TABLES.items()
            },
        )


def _streams_of(log: Iterable[tuple[int, UUID, int, str, bytes]]) -> _Streams:
    streams = _Streams(defaultdict(list), defaultdict(list), {}, {})
    for _, stream, version, topic, state in log:
        streams.topics[stream].append(topic)
        facts = streams.facts[stream]
        try:
            facts.append(to_fact(StoredEvent(stream, version, topic, state)))
        except UndecodableEvent as error:
            streams.unreadable[stream] = str(error)
    for stream, facts in streams.facts.items():
        if stream not in streams.unreadable:
            try:
                payment = fold(facts)
            except UnexpectedEvent as error:
                streams.unreadable[stream] = str(error)
            else:
                assert payment is not None
                streams.payments[stream] = payment
    return streams


def _positions(stored: _Stored, caught_up: bool) -> Iterator[str]:
    """Positions are 1, 2, 3 …, and the follower stands at one of them."""
    for expected, (position, *_) in enumerate(stored.log, 1):
        if position != expected:
            yield f"the log has a gap: position {position} stands where {expected} should"
            break
    head = stored.log[-1][0] if stored.log else 0
    if stored.position > head:
        yield f"the follower is at {stored.position}, past the end of the log at {head}"
    if caught_up and stored.position < head:
        yield f"the follower is at {stored.position}, the log goes on to {head}"


def _unreadable(stored: _Stored, streams: _Streams) -> Iterator[str]:
    """What cannot be folded has to be parked, unless the follower has not come to it yet."""
    followed = {stream for position, stream, *_ in stored.log if position <= stored.position}
    for stream, reason in streams.unreadable.items():
        if stream in followed and stream not in stored.parked:
            yield f"payment {stream} cannot be folded and is not parked: {reason}"


def _read_model(stored: _Stored) -> Iterator[str]:
    """The tables are what a fold of the log up to the follower's position gives."""
    streams = _streams_of(row for row in stored.log if row[0] <= stored.position)
    left_out = stored.parked.keys() | streams.unreadable.keys()
    payments = [payment for id, payment in streams.payments.items() if id not in left_out]
    expected = _expected_tables(payments)
    for table, rows in stored.tables.items():
        payment_of = 1 if table == "refunds" else 0
        shown = {key: row for key, row in rows.items() if row[payment_of] not in left_out}
        yield from _differences(table, expected[table], shown)


def _differences(table: str, expected: Rows, rows: Rows) -> Iterator[str]:
    for key, row in expected.items():
        forgotten = key not in rows and table == "unsettled_payments" and row[1] == "abandoned"
        if rows.get(key) != row and not forgotten:
            yield f"{table} {key} is {rows.get(key)}, the events say {row}"
    for key in rows.keys() - expected.keys():
        yield f"{table} {key} is {rows[key]}, the events say that there is no such row"


def _expected_tables(payments: Iterable[Payment]) -> dict[str, Rows]:
    tables: dict[str, Rows] = {table: {} for table in TABLES}
    for payment in payments:
        tables["payments"][payment.id] = _payment_row(payment)
        for refund in payment.refunds:
            tables["refunds"][refund.id] = (
                refund.id,
                payment.id,
                refund.idempotency_key,
                refund.amount_cents,
                payment.currency,
                refund.status,
                refund.provider_refund_id,
                refund.decline_code,
                _utc(refund.created_at),
                _utc(refund.updated_at),
            )
        if payment.client != "default":
            tables["payment_clients"][payment.id] = (
                payment.id,
                payment.client,
                payment.status,
                payment.currency,
                _utc(payment.created_at),
            )
        if (reason := payment.unsettled) is not None:
            tables["unsettled_payments"][payment.id] = (payment.id, reason.kind, reason.since)
    return tables


def _payment_row(payment: Payment) -> Row:
    return (
        payment.id,
        payment.merchant_order_id,
        payment.idempotency_key,
        payment.amount_cents,
        payment.currency,
        payment.status,
        payment.provider_txn_id,
        _utc(payment.created_at),
        _utc(payment.updated_at),
    )


def _utc(time: datetime) -> datetime:
    """As a column without time zone holds it."""
    assert time.utcoffset() is not None
    return (time - time.utcoffset()).replace(tzinfo=None)  # type: ignore[operator]


def _charge_answers(streams: _Streams, answers: Iterable[ChargeAnswer]) -> Iterator[str]:
    """Whoever was answered 201 or 202 finds that in the log."""
    for answer in answers:
        if answer.status_code not in (201, 202):
            continue
        topics = streams.topics.get(answer.payment_id, [])
        outcomes = [OUTCOME_TOPICS[topic] for topic in topics if topic in OUTCOME_TOPICS]
        if "PaymentInitiated" not in topics:
            yield f"answered, but not in the log: {answer}"
        elif answer.status_code == 202 and answer.status != "PENDING":
            yield f"a 202 that is not PENDING: {answer}"
        elif answer.status_code == 201 and answer.status not in outcomes[:1]:
            yield f"the first outcome in the log is {outcomes[:1]}: {answer}"


def _refund_answers(streams: _Streams, answers: Iterable[RefundAnswer]) -> Iterator[str]:
    """The same for refunds; a 201 says that the money went back."""
    for answer in answers:
        if answer.status_code not in (201, 202):
            continue
        wanted = RefundInitiated if answer.status_code == 202 else PaymentRefunded
        found = [
            fact.amount_cents
            for fact in streams.facts.get(answer.payment_id, ())
            if isinstance(fact, wanted) and fact.refund_id == answer.refund_id
        ]
        if not found:
            yield f"answered, but {wanted.TOPIC} is not in the log: {answer}"
        elif found[0] != answer.amount_cents:
            yield f"the log has an amount of {found[0]}: {answer}"


def _refunds_within_capture(streams: _Streams) -> Iterator[str]:
    """By the events: what was given back or is reserved for it never exceeds the capture.

    Looks at the amounts alone, so it also sees what a fold would refuse.
    """
    for stream, facts in streams.facts.items():
        captured = reserved = 0
        for fact in facts:
            if isinstance(fact, PaymentCharged):
                captured += fact.amount_cents
            elif isinstance(fact, RefundInitiated):
                reserved += fact.amount_cents
            elif isinstance(fact, RefundFailed):
                reserved -= fact.amount_cents
            if reserved > captured:
                yield f"payment {stream}: {reserved} refunded of {captured} captured, by the events"
                break


def _open(streams: _Streams) -> Iterator[str]:
    """Nothing is left to be settled; what was abandoned is only watched."""
    for payment in streams.payments.values():
        reason = payment.unsettled
        if reason is not None and reason.kind != "abandoned":
            yield f"payment {payment.id} is not settled: {reason.kind} since {reason.since}"


def _provider(streams: _Streams, records: list[ProviderRecord], settled: bool) -> Iterator[str]:
    """What the provider did is what the events say, once each."""
    yield from _captured_once(records)
    yield from _refunded_within_capture(records)
    said = Counter(_said(streams))
    made = Counter(records)
    for record in said - made:
        yield f"the events say it, the provider has no such record: {record}"
    said_ids = {record.our_id for record in said}
    for record in made - said:
        readable = record.payment_id not in streams.unreadable
        ahead = not settled and record.our_id not in said_ids and _may_be_ahead(streams, record)
        if readable and not ahead:
            yield f"the provider did it, the events do not say so: {record}"


def _said(streams: _Streams) -> Iterator[ProviderRecord]:
    """The records that a provider must have for these events."""
    for fact in (fact for facts in streams.facts.values() for fact in facts):
        if isinstance(fact, PaymentCharged | LateCaptureFound):
            yield ProviderRecord(
                "capture",
                fact.payment_id,
                fact.payment_id,
                fact.amount_cents,
                fact.currency,
                fact.provider_txn_id,
            )
        elif isinstance(fact, PaymentRefunded | LateCaptureReturned):
            yield ProviderRecord(
                "refund",
                fact.refund_id,
                fact.payment_id,
                fact.amount_cents,
                fact.currency,
                fact.provider_refund_id,
            )


def _may_be_ahead(streams: _Streams, record: ProviderRecord) -> bool:
    """Whether the record is of something that is open, so that settling will find it."""
    payment = streams.payments.get(record.payment_id)
    if payment is None or record.currency != payment.currency:
        return False
    if record.kind == "capture":
        reason = payment.unsettled
        charging = reason is not None and reason.kind in ("charge", "abandoned")
        return charging and record.amount_cents == payment.amount_cents
    return _open_refunds(payment).get(record.our_id) == record.amount_cents


def _open_refunds(payment: Payment) -> Mapping[UUID, int]:
    """The amounts that are on their way back, by refund id."""
    amounts = {
        refund.id: refund.amount_cents
        for refund in payment.refunds
        if refund.status is Status.PENDING
    }
    late = payment.late_capture
    if late is not None and late.provider_refund_id is None:
        amounts[late.refund_id] = payment.amount_cents
    return amounts


def _captured_once(records: Iterable[ProviderRecord]) -> Iterator[str]:
    for kind, name in (("capture", "captured"), ("refund", "given back")):
        counts = Counter(record.our_id for record in records if record.kind == kind)
        for our_id, count in counts.items():
            if count > 1:
                yield f"{our_id} was {name} {count} times at the provider"


def _refunded_within_capture(records: Iterable[ProviderRecord]) -> Iterator[str]:
    left: Counter[UUID] = Counter()
    for record in records:
        sign = 1 if record.kind == "capture" else -1
        left[record.payment_id] += sign * record.amount_cents
    for payment_id, cents in left.items():
        if cents < 0:
            yield f"payment {payment_id}: {-cents} more refunded than captured, at the provider"
