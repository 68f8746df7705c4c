"""Captured payments whose order may not be fulfilled: reads the table `fulfilments`.

A row counts while its payment is SUCCESS in `payments`, since it may just have been refunded. Rows
that the service gave back count as given_back.

A suspect is silent if the response said nothing of its order and no check was made yet: with a
receiver that never states it, every payment would be a suspect. Silent ones are not listed, and
counted separately.
"""

from collections.abc import Sequence
from datetime import datetime
from typing import Annotated, Any, Literal, NamedTuple
from uuid import UUID

import msgspec

from payments.database.connections import Database
from payments.queries.cursor import ListPlace, read_cursor, write_cursor

State = Literal["suspect", "unfulfilled", "paid_twice", "given_back"]
Said = Literal["nothing", "already_processed", "repeated", "failed", "not_asked"]
OPEN_STATES: tuple[State, ...] = ("suspect", "unfulfilled", "paid_twice")
LIST = "unfulfilled"  # the name of the list in its cursors
COUNTED_MAX = 10_000

# Rows in these states, oldest first. Each state is read separately from the index, so that a page
# reads no more rows of each than it may list. The condition for silent rows is that of the index.
PAGE = """
SELECT listed.*
  FROM unnest(%(states)s::text[]) AS wanted (state)
 CROSS JOIN LATERAL (
       SELECT f.payment_id, f.order_id, p.amount_cents, p.currency, f.state, f.said, f.order_status,
              f.problem, f.found_at, f.checked_at, f.next_at, f.given_back_at
         FROM fulfilments f JOIN payments p ON p.id = f.payment_id
        WHERE f.state = wanted.state
          AND NOT (f.state = 'suspect' AND f.said IN ('nothing', 'repeated')
                   AND f.checked_at IS NULL)
          AND (f.state = 'given_back' OR p.status = 'SUCCESS')
          AND (%(order_id)s::uuid IS NULL OR p.merchant_order_id = %(order_id)s)
          AND (%(client)s::text IS NULL
               OR EXISTS (SELECT FROM payment_clients c
                           WHERE c.payment_id = f.payment_id AND c.client = %(client)s))
          AND (%(after)s::timestamptz IS NULL
               OR (f.found_at, f.payment_id) > (%(after)s, %(after_id)s::uuid))
        ORDER BY f.found_at, f.payment_id LIMIT %(limit)s) AS listed
 ORDER BY listed.found_at, listed.payment_id LIMIT %(limit)s
"""

OF_PAYMENT = """
SELECT f.payment_id, f.order_id, p.amount_cents, p.currency, f.state, f.said, f.order_status,
       f.problem, f.found_at, f.checked_at, f.next_at, f.given_back_at
  FROM fulfilments f JOIN payments p ON p.id = f.payment_id
 WHERE f.payment_id = %(payment_id)s AND (f.state = 'given_back' OR p.status = 'SUCCESS')
"""

# By state, and of silent rows: counts the oldest COUNTED_MAX of each.
COUNTS = """
SELECT wanted.state, counted.*
  FROM unnest(%(states)s::text[]) AS wanted (state)
 CROSS JOIN LATERAL (
       SELECT count(*),
              greatest(0, extract(epoch FROM clock_timestamp() - min(found_at)))::float8
         FROM (SELECT f.found_at FROM fulfilments f JOIN payments p ON p.id = f.payment_id
                WHERE f.state = wanted.state AND p.status = 'SUCCESS'
                  AND NOT (f.state = 'suspect' AND f.said IN ('nothing', 'repeated')
                           AND f.checked_at IS NULL)
                ORDER BY f.found_at LIMIT %(most)s) AS oldest) AS counted
 UNION ALL
SELECT 'silent', count(*),
       greatest(0, extract(epoch FROM clock_timestamp() - min(found_at)))::float8
  FROM (SELECT f.found_at FROM fulfilments f JOIN payments p ON p.id = f.payment_id
         WHERE f.state = 'suspect' AND f.said IN ('nothing', 'repeated')
           AND f.checked_at IS NULL AND p.status = 'SUCCESS'
         ORDER BY f.found_at LIMIT %(most)s) AS oldest
"""

Time = Annotated[datetime, msgspec.Meta(tz=True)]


class Unfulfilled(msgspec.Struct, frozen=True, kw_only=True):
    """A captured payment whose order may not have been fulfilled.

    `state`: suspect (the order's status was not requested yet, or is not known), unfulfilled (the
    order failed), paid_twice (another payment confirmed the order), or given_back. `said` is what
    the response to its SUCCESS said of the order: nothing, already_processed, repeated (the same,
    to a later attempt), failed, or not_asked if there was no response. `order_status` is the last
    status of the order, in Order Service's own word; `problem` says why it is not known. `next_at`
    is the time of the next request for the status, or the end of a lease.
    """

    payment_id: UUID
    order_id: UUID
    amount_cents: int
    currency: str
    state: State
    said: Said
    order_status: str | None
    problem: str | None
    found_at: Time
    checked_at: Time | None
    next_at: Time
    given_back_at: Time | None


class FulfilmentView(msgspec.Struct, frozen=True, kw_only=True):
    """What is known of the fulfilment of a captured payment's order: see Unfulfilled."""

    state: State
    said: Said
    order_status: str | None
    problem: str | None
    found_at: Time
    checked_at: Time | None
    given_back_at: Time | None


class UnfulfilledPage(msgspec.Struct, frozen=True):
    """Payments, in the order in which they were found. `next_cursor` requests the next page; null
    on the last page.

    `order_status_asked`: the service requests the status of orders from Order Service. If not,
    payments whose response did not contain the order's status are not listed, and may be
    unfulfilled as well.
    """

    payments: list[Unfulfilled]
    next_cursor: str | None
    order_status_asked: bool


class UnfulfilledFilter(msgspec.Struct, frozen=True):
    """Which rows are listed; `state` None: all except given_back."""

    state: State | None = None
    merchant_order_id: UUID | None = None


class Count(NamedTuple):
    """`payments` is at most COUNTED_MAX. `oldest_age_s` counts from when it was found; 0 if there
    is none."""

    payments: int
    oldest_age_s: float


async def unfulfilled(
    database: Database, states: Sequence[State], limit: int, order_id: UUID | None = None
) -> list[Unfulfilled]:
    """Rows in these states, oldest first; with `order_id`, only of that order."""
    return await _page(database, states, limit, order_id)


async def list_unfulfilled(
    database: Database,
    wanted: UnfulfilledFilter,
    client: str | None,
    limit: int,
    cursor: str | None,
    *,
    asked: bool,
) -> UnfulfilledPage:
    """A page of the wanted rows. `client` restricts it to that API client's payments; None reads
    all. `asked` is whether ORDER_STATUS_URL is set. Raises InvalidRequest for a cursor of another
    list."""
    states = OPEN_STATES if wanted.state is None else (wanted.state,)
    after = read_cursor(cursor, LIST) if cursor is not None else None
    found = await _page(
        database, states, limit + 1, wanted.merchant_order_id, client=client, after=after
    )
    last = found[limit - 1] if len(found) > limit else None
    next_cursor = write_cursor(ListPlace(last.found_at, last.payment_id), LIST) if last else None
    return UnfulfilledPage(found[:limit], next_cursor, asked)


async def fulfilment_of(database: Database, payment_id: UUID) -> FulfilmentView | None:
    """None if the order is known to be fulfilled, if the payment was refunded, or if it has no
    row."""
    for row in await database.fetch(OF_PAYMENT, {"payment_id": payment_id}):
        found = _unfulfilled(row)
        return FulfilmentView(
            state=found.state,
            said=found.said,
            order_status=found.order_status,
            problem=found.problem,
            found_at=found.found_at,
            checked_at=found.checked_at,
            given_back_at=found.given_back_at,
        )
    return None


async def counts(database: Database) -> dict[str, Count]:
    """By state, except given_back; and of `silent` rows."""
    params = {"states": list(OPEN_STATES), "most": COUNTED_MAX}
    rows = await database.fetch(COUNTS, params, prepare=False)
    return {state: Count(payments, oldest_age_s) for state, payments, oldest_age_s in rows}


async def _page(
    database: Database,
    states: Sequence[State],
    limit: int,
    order_id: UUID | None,
    *,
    client: str | None = None,
    after: ListPlace | None = None,
) -> list[Unfulfilled]:
    params: dict[str, Any] = {
        "states": list(states),
        "order_id": order_id,
        "client": client,
        "after": after and after.created_at,
        "after_id": after and after.id,
        "limit": limit,
    }
    rows = await database.fetch(PAGE, params, prepare=False)
    return [_unfulfilled(row) for row in rows]


def _unfulfilled(row: Sequence[Any]) -> Unfulfilled:
    """The columns are selected in the order of the fields."""
    return Unfulfilled(**dict(zip(Unfulfilled.__struct_fields__, row, strict=True)))
