"""Work that a request begins and the service finishes.

A run is a task of the service, not of the request: a client that goes away, or a deadline that
passes, cancels neither an append nor a provider call. Requests only wait for its answer, and get
one by the deadline in any case.
"""

import asyncio
import math
import time
import uuid
from collections.abc import Awaitable, Callable, Hashable
from datetime import UTC, datetime
from typing import Any, Generic, Protocol, TypeVar

from loguru import logger

from payments.admission import Admission, Client
from payments.deciding import Cause, OutcomeMismatch
from payments.errors import DatabaseUnavailable, PaymentsError, TooBusy
from payments.gateways import OutcomeUnknown
from payments.tasks import end

# How often it is looked whether a request's time is up.
WATCH_S = 0.05
# How often a request looks whether another process has finished its run.
OTHER_RUN_POLL_S = 0.1
# How long an answer waits for its outcome to be stored, after which it is PENDING: design, "with
# Postgres down or frozen each request is answered in under 3 s".
OUTCOME_STORE_PATIENCE_S = 2.0
# How long a request may take, reads and appends together, until its intent is durable: the same.
INTENT_PATIENCE_S = 2.5

A = TypeVar("A")


class Request(Hashable, Protocol):
    """What makes two requests equal, and who sent it."""

    @property
    def client(self) -> str: ...


class Run(Generic[A]):
    """A request's work in this process, and everyone who waits for its answer."""

    def __init__(self, deadline: float, client: Client) -> None:
        self.deadline = deadline
        # When whoever waits gets an answer in any case: the deadline, or sooner.
        self.answer_by = deadline
        # The same, until the intent is durable.
        self.begin_by = 0.0
        self.store_has_answered()
        self.has_begun = False
        self.answer: A | Exception | None = None
        # Set once the provider may have been asked: from then on the answer is never an error.
        self.fallback: A | None = None
        # The provider has answered; the event store has not yet.
        self.storing = False
        self.task: asyncio.Task[None] | None = None
        self._client = client
        self._has_slot = False
        self._waiters: list[asyncio.Future[A]] = []
        self._without_place = 0  # how many of them

    async def wait(self, *, joined: bool = False) -> A:
        """The answer. Each request waits on a future of its own, so one that goes away takes
        nobody with it."""
        waiter: asyncio.Future[A] = asyncio.get_running_loop().create_future()
        self._waiters.append(waiter)
        if joined or self.has_begun:
            self._leave_places(1)
        self._tell()
        return await waiter

    def store_has_answered(self) -> None:
        """Before the intent is durable: it may take as long again as at the start."""
        self.begin_by = min(self.deadline, time.monotonic() + INTENT_PATIENCE_S)

    def begun(self) -> None:
        """The intent is durable, or an earlier request's is: now somebody else is waited for.

        Saying it again does nothing.
        """
        self.has_begun = True
        self._leave_places(len(self._waiters) - self._without_place)

    def _leave_places(self, waiters: int) -> None:
        self._without_place += waiters
        self._client.leave(waiters)

    def take_slot(self) -> None:
        """Before the intent is written, and before each call of the provider; raises TooBusy."""
        if not self._has_slot:
            self._client.take_slot()
            self._has_slot = True

    def release_slot(self) -> None:
        """At the latest when the run ends."""
        if self._has_slot:
            self._client.release_slot()
            self._has_slot = False

    def finish(self, answer: A) -> None:
        if self.answer is None:
            self.answer = answer
            self._tell()

    def fail(self, error: Exception) -> None:
        """Tells waiting requests of an error, or gives them the fallback."""
        if self.answer is None:
            self.answer = error if self.fallback is None else self.fallback
            self._tell()

    def _tell(self) -> None:
        if self.answer is None:
            return
        for waiter in self._waiters:
            if waiter.done():
                continue
            if isinstance(self.answer, Exception):
                waiter.set_exception(self.answer)
            else:
                waiter.set_result(self.answer)
        self._waiters.clear()
        self._leave_places(-self._without_place)

    def may_ask(self) -> bool:
        """Looked at immediately before each provider call: a process that was frozen must not send
        late, and nothing may be sent for a request that was told 503."""
        return self.answer is None and time.monotonic() < self.deadline

    def check_may_ask(self) -> None:
        if not self.may_ask():
            raise TooBusy("The request did not get its turn in time.")

    def left_s(self, most_s: float) -> float:
        return min(most_s, self.deadline - time.monotonic())

    def wait_for_storing_only_a_while(self) -> None:
        self.storing = True
        self.answer_by = min(self.answer_by, time.monotonic() + OUTCOME_STORE_PATIENCE_S)


class Runs:
    """All runs of one process: they are bounded, and stopped together."""

    def __init__(self, admission: Admission) -> None:
        self._admission = admission
        # By the whole request: another request with the same key is another run, and the store's
        # version check decides between them.
        self._runs: dict[Request, Run[Any]] = {}
        self._stop_by = math.inf
        self._tasks: set[asyncio.Task[None]] = set()
        self._watching: asyncio.TimerHandle | None = None

    async def answer(
        self, request: Request, deadline_s: float, work: Callable[[Run[A]], Awaitable[None]]
    ) -> tuple[A, bool]:
        """The answer of `work`, or of the run of an equal request; and whether it was joined.

        Raises what the work failed with, or TooBusy.
        """
        deadline = time.monotonic() + deadline_s
        run, client = self._runs.get(request), self._admission.client(request.client)
        while run is not None and run.answer is not None and run.task is not None:
            # Its requests were told PENDING, but it still goes on: this one waits for its end.
            left_s = min(deadline, self._stop_by) - time.monotonic()
            if run.storing:
                left_s = min(left_s, OUTCOME_STORE_PATIENCE_S)
            client.leave()
            try:
                done, _ = await asyncio.wait({run.task}, timeout=max(0, left_s))
            finally:
                client.enter()
            if not done:
                break
            run = self._runs.get(request)
        if run is not None:
            return await run.wait(joined=True), True
        if not client.runs.take():
            raise TooBusy("Too many requests are under way.")
        run = self._runs[request] = Run(deadline, client)
        run.answer_by = min(run.answer_by, self._stop_by)
        run.task = asyncio.create_task(self._run(request, run, work), name="run")
        self._tasks.add(run.task)
        run.task.add_done_callback(self._tasks.discard)
        if self._watching is None:
            self._watch()
        return await run.wait(), False

    async def _run(
        self, request: Request, run: Run[A], work: Callable[[Run[A]], Awaitable[None]]
    ) -> None:
        try:
            await work(run)
        except (PaymentsError, OutcomeUnknown, OutcomeMismatch) as error:
            run.fail(error)
        except asyncio.CancelledError:
            run.fail(DatabaseUnavailable("The service is stopping."))
            raise
        except Exception as error:  # noqa: BLE001 - whoever waits must hear of it, whatever it is
            logger.bind(kind=type(request).__name__).exception("a run failed")
            run.fail(error)
        finally:
            # Whatever way the run ended, nobody waits for ever.
            run.fail(TooBusy("The request did not get its turn in time."))
            run.release_slot()
            self._admission.client(request.client).runs.add(-1)
            del self._runs[request]

    def hurry(self, within_s: float) -> None:
        """Every request, of now or to come, is answered by then: the service is stopping."""
        self._stop_by = time.monotonic() + within_s
        for run in self._runs.values():
            run.answer_by = min(run.answer_by, self._stop_by)

    async def drain(self, timeout_s: float) -> None:
        """Waits for the runs that go on although their requests were answered."""
        if self._tasks:
            await asyncio.wait(self._tasks, timeout=timeout_s)
        if self._tasks:
            logger.bind(runs=len(self._tasks)).warning("stopping with unfinished requests")
            await end(self._tasks, 0.5)

    def _watch(self) -> None:
        """Answers the requests whose time is up; one timer for all runs."""
        now = time.monotonic()
        for run in self._runs.values():
            if now >= run.answer_by:
                run.fail(TooBusy("The request did not get its turn in time."))
            elif now >= run.begin_by and not run.has_begun:
                run.fail(DatabaseUnavailable("The database does not answer in time."))
        loop = asyncio.get_running_loop()
        self._watching = loop.call_later(WATCH_S, self._watch) if self._runs else None


def cause(client: str, request_id: str | None = None, traceparent: str | None = None) -> Cause:
    """What goes into an event that is decided now."""
    return Cause(uuid.uuid4(), datetime.now(UTC), client, request_id, traceparent)
