"""The seats that Order Service sells: held for an order, allocated once it is paid, or released.

Releasing a seat does not ask whose it is by now, and a second allocation is refused also to the
order that has the seat: so does the real one.
"""

import asyncio
import time
from collections.abc import Iterable, Sequence
from typing import Literal

import msgspec


class Seating(msgspec.Struct, frozen=True, omit_defaults=True, forbid_unknown_fields=True):
    """How seats are sold, and how Order Service waits for its charges."""

    takes_s: float = 0.0  # an allocation; one callback waits for it as long as it takes
    # "last": seats are allocated, or refused, after that time. "first": at once, and only the
    # response to an allocation takes that long; a refusal comes at once.
    allocates: Literal["last", "first"] = "last"
    refuses: int = 0  # so many allocations, the next ones, whoever has the seats
    hold_s: float = 900.0  # then seats that are not allocated are sold to others
    charge_timeout_s: float = 8.0
    unanswered: Literal["PENDING", "FAILED"] = "PENDING"  # an order whose charge had no response


class SeatsTaken(Exception):
    """The seats are allocated, or another order's: 409."""


class Seat(msgspec.Struct):
    order_id: str = ""  # "": nobody's
    is_allocated: bool = False
    held_until: float = 0.0  # of CLOCK_MONOTONIC

    @property
    def is_for_sale(self) -> bool:
        return not self.order_id or (not self.is_allocated and time.monotonic() >= self.held_until)


class Seats:
    """All seats, by their names."""

    def __init__(self, seating: Seating) -> None:
        self.seating = seating
        self._seats: dict[str, Seat] = {}

    def hold(self, order_id: str, names: Sequence[str]) -> None:
        """All of them or none: SeatsTaken."""
        if not all(self._seat(name).is_for_sale for name in names):
            raise SeatsTaken
        held_until = time.monotonic() + self.seating.hold_s
        for name in names:
            self._seats[name] = Seat(order_id, held_until=held_until)

    async def allocate(self, order_id: str, names: Sequence[str]) -> None:
        """SeatsTaken."""
        seating = self.seating
        if seating.allocates == "first":
            self._allocate(order_id, names)
        await asyncio.sleep(seating.takes_s)
        if seating.allocates == "last":
            self._allocate(order_id, names)

    def _allocate(self, order_id: str, names: Sequence[str]) -> None:
        if self.seating.refuses:
            self.seating = msgspec.structs.replace(self.seating, refuses=self.seating.refuses - 1)
            raise SeatsTaken
        for name in names:
            seat = self._seat(name)
            if seat.is_allocated or not (seat.is_for_sale or seat.order_id == order_id):
                raise SeatsTaken
        for name in names:
            self._seats[name] = Seat(order_id, is_allocated=True)

    def release(self, names: Iterable[str]) -> None:
        """Whoever has them now."""
        for name in names:
            self._seats[name] = Seat()

    def lost(self, order_id: str, names: Iterable[str]) -> tuple[str, ...]:
        """Those of them that can be sold again, or are another order's."""
        return tuple(
            name
            for name in names
            for seat in [self._seat(name)]
            if not seat.is_allocated or seat.order_id != order_id
        )

    def _seat(self, name: str) -> Seat:
        return self._seats.get(name, Seat())
