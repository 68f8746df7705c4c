"""The requests that wait for one run: each has a deadline of its own, and may go away."""

import asyncio
import time
from typing import Generic, TypeVar

from payments.admission import Client

# How long a request that was read late may take at least, to look what an earlier one came to.
LATE_PATIENCE_S = 1.0

A = TypeVar("A")


class Caller:
    """Who sent a request: since when it waits (time.monotonic), and whether its connection was
    lost."""

    __slots__ = ("is_gone", "since")

    def __init__(self, since: float | None = None) -> None:
        self.since = time.monotonic() if since is None else since
        self.is_gone = False


class Waiter(Generic[A]):
    """One request that waits for a run's answer, on a future of its own: when it goes away it takes
    nobody with it."""

    __slots__ = ("answer_by", "caller", "counts", "deadline", "future")

    def __init__(self, caller: Caller, deadline_s: float) -> None:
        self.caller = caller
        self.deadline = caller.since + deadline_s
        patience_s = min(deadline_s, LATE_PATIENCE_S)
        self.answer_by = max(self.deadline, time.monotonic() + patience_s)
        self.future: asyncio.Future[A] = asyncio.get_running_loop().create_future()
        self.counts = True  # against the bound of its client

    def may_be_served(self, now: float) -> bool:
        """Whether its client still waits, as far as the service can know."""
        return not self.future.done() and not self.caller.is_gone and now < self.deadline

    def tell(self, answer: A | Exception) -> None:
        if self.future.done():
            return
        if isinstance(answer, Exception):
            self.future.set_exception(answer)
        else:
            self.future.set_result(answer)


class Waiters(Generic[A]):
    """The requests that wait for one run. While they wait for the provider, or for another
    request, they do not count against their client's bound."""

    def __init__(self, client: Client) -> None:
        self._client = client
        self._waiting: list[Waiter[A]] = []

    def join(self, caller: Caller, deadline_s: float) -> Waiter[A]:
        waiter: Waiter[A] = Waiter(caller, deadline_s)
        self._waiting.append(waiter)
        return waiter

    def any_to_serve(self) -> bool:
        now = time.monotonic()
        return any(each.may_be_served(now) for each in self._waiting)

    def tell(self, answer: A | Exception) -> None:
        """Answers all."""
        waiting, self._waiting = self._waiting, []
        self._tell(waiting, answer)

    def overdue(self, now: float) -> list[Waiter[A]]:
        """Those whose own time is up."""
        return [waiter for waiter in self._waiting if now >= waiter.answer_by]

    def are_all(self, waiters: list[Waiter[A]]) -> bool:
        """Whether nobody else waits."""
        return len(waiters) == len(self._waiting)

    def tell_some(self, waiters: list[Waiter[A]], answer: A | Exception) -> None:
        for waiter in waiters:
            self._waiting.remove(waiter)
        self._tell(waiters, answer)

    def _tell(self, waiters: list[Waiter[A]], answer: A | Exception) -> None:
        """Each counts again, until its request leaves by itself."""
        for waiter in waiters:
            waiter.tell(answer)
            if not waiter.counts:
                self._client.enter()

    def leave(self, waiter: Waiter[A]) -> None:
        """It counts no more, but still waits."""
        if waiter.counts:
            waiter.counts = False
            self._client.leave()

    def leave_all(self) -> None:
        for waiter in self._waiting:
            self.leave(waiter)
