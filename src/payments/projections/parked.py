"""Finds streams that are parked without a reason. Parking a payment manually would hide changes of
its rows, since these are compared as of when it was parked."""

from collections import defaultdict
from collections.abc import Iterator
from typing import NamedTuple
from uuid import UUID

from payments.events.store import READ_STREAMS_UNTIL
from payments.projections.comparison import Folded, payments_of
from payments.projections.seals import SealsProjection
from payments.snapshot import Source

PART_PAYMENTS = 500  # read by one statement

# With the follower's position: later events cannot have parked the stream.
PARKED = """
SELECT p.follower, f.position, p.payment_id
  FROM parked_streams p JOIN followers f ON f.name = p.follower ORDER BY p.payment_id
"""


class NeedlesslyParked(NamedTuple):
    follower: str
    payment_id: UUID
    why: str

    def __str__(self) -> str:
        return f"payment {self.payment_id}: parked by {self.follower} {self.why}"


def needlessly_parked(source: Source) -> Iterator[NeedlesslyParked]:
    """Parked streams that this version can fold up to the follower's position."""
    parked: dict[tuple[str, int], set[UUID]] = defaultdict(set)
    for follower, position, payment_id in source.fetch(PARKED):
        parked[follower, position].add(payment_id)
    for (follower, position), ids in sorted(parked.items()):
        if follower == SealsProjection.name:
            for payment_id in sorted(ids):
                yield NeedlesslyParked(
                    follower=follower,
                    payment_id=payment_id,
                    why="although this read model parks nothing",
                )
            continue
        for payment_id, payment in _read(source, position, sorted(ids)):
            ids.discard(payment_id)
            if not isinstance(payment, Exception):
                why = f"although its events can be read: `payments parked retry {payment_id}`"
                yield NeedlesslyParked(follower=follower, payment_id=payment_id, why=why)
        for payment_id in sorted(ids):
            why = f"although it has no events: `payments parked retry {payment_id}`"
            yield NeedlesslyParked(follower=follower, payment_id=payment_id, why=why)


def _read(source: Source, until: int, ids: list[UUID]) -> Iterator[tuple[UUID, Folded]]:
    for start in range(0, len(ids), PART_PAYMENTS):
        part = ids[start : start + PART_PAYMENTS]
        params = {"until": until, "ids": part, "first_id": part[0], "last_id": part[-1]}
        for payment_id, payment, _ in payments_of(source.fetch(READ_STREAMS_UNTIL, params), {}):
            yield payment_id, payment
