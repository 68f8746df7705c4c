"""Work that a request begins and the service finishes.

A run is a task of the service, not of the request: a client that goes away, or a deadline that
passes, cancels neither an append nor a provider call. Requests only wait for its answer, and each
gets one by its deadline in any case. But a charge is not begun once nobody waits for it any more.
"""

import asyncio
import math
import time
import uuid
from collections.abc import Awaitable, Callable, Hashable, Iterator
from contextlib import contextmanager
from datetime import UTC, datetime
from typing import Any, Generic, Protocol, TypeVar

from loguru import logger

from payments.admission import Admission, Client
from payments.errors import DatabaseUnavailable, PaymentsError, TooBusy
from payments.gateways import OutcomeUnknown
from payments.payment.decisions import Cause, OutcomeMismatch
from payments.settings import INTENT_PATIENCE_S
from payments.tasks import finish

# How often it is looked whether a request's time is up.
WATCH_S = 0.05
# How often a request looks whether another process has finished its run.
OTHER_RUN_POLL_S = 0.1
# How long an intent may take after a conflict, if that is longer than INTENT_PATIENCE_S allows.
CONFLICT_PATIENCE_S = 1.0
# How long an answer waits for its outcome to be stored, after which it is PENDING: with Postgres
# down or frozen each request is answered in under 3 s.
OUTCOME_STORE_PATIENCE_S = 2.0
# How long a request that was read late may take at least, to look what an earlier one came to.
LATE_PATIENCE_S = 1.0

A = TypeVar("A")


class Request(Hashable, Protocol):
    """What makes two requests equal, and who sent it."""

    @property
    def client(self) -> str: ...


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


class Run(Generic[A]):
    """A request's work in this process: its clock, its provider call, and its answer."""

    def __init__(self, client: Client, answer_by: float) -> None:
        # Until then the provider may be asked: the latest deadline of the requests that came before
        # the intent was durable.
        self.deadline = -math.inf
        # When everyone who waits gets an answer in any case, if not by a deadline of its own.
        self.answer_by = answer_by
        # The same, while something is being stored.
        self.store_by = math.inf
        # The same, until the intent is durable.
        self.begin_by = time.monotonic() + INTENT_PATIENCE_S
        self.has_begun = False
        self.answer: A | Exception | None = None
        # Set once the provider may have captured: from then on the answer is never an error.
        self.pending_answer: A | None = None
        # The provider has answered; the event store has not yet.
        self.storing = False
        self.task: asyncio.Task[None] | None = None
        self._client = client
        self._has_provider_call = False
        self._waiters: Waiters[A] = Waiters(client)

    async def wait(self, caller: Caller, deadline_s: float, *, joined: bool = False) -> A:
        """The answer, for one request."""
        waiter = self._waiters.join(caller, deadline_s)
        if not self.has_begun:
            self.deadline = max(self.deadline, waiter.deadline)
        if joined or self.has_begun:
            self._waiters.leave(waiter)
        if self.answer is not None:
            self._waiters.tell(self.answer)
        return await waiter.future

    def is_awaited(self) -> bool:
        """Whether the client of any request still waits: what nobody waits for is not begun."""
        return self.answer is None and self._waiters.any_to_serve()

    def intent_conflicted(self) -> None:
        """The event store responds, so the run goes on, however many conflicts there are. Only if
        the store falls silent does the time limit of the intent apply."""
        self.begin_by = max(self.begin_by, time.monotonic() + CONFLICT_PATIENCE_S)

    def intent_is_durable(self) -> None:
        """The intent is durable, or an earlier request's is: now somebody else is waited for.

        Saying it again does nothing.
        """
        self.has_begun = True
        self._waiters.leave_all()

    def take_provider_call(self) -> None:
        """Before the intent is written, and before each call of the provider; raises TooBusy."""
        if not self._has_provider_call:
            self._client.take_provider_call()
            self._has_provider_call = True

    def release_provider_call(self) -> None:
        """At the latest when the run ends."""
        if self._has_provider_call:
            self._client.release_provider_call()
            self._has_provider_call = False

    def finish(self, answer: A) -> None:
        self._end_with(answer)

    def fail(self, error: Exception) -> None:
        """Tells waiting requests of an error, or gives them the pending answer."""
        self._end_with(error if self.pending_answer is None else self.pending_answer)

    def _end_with(self, answer: A | Exception) -> None:
        """The first answer stays."""
        if self.answer is None:
            self.answer = answer
            self._waiters.tell(answer)

    def tell_overdue(self, now: float) -> None:
        """Answers the requests whose own time is up; when none is left the run has its answer."""
        overdue = self._waiters.overdue(now)
        if not overdue:
            return
        if self._waiters.are_all(overdue):
            self.fail(_late())
            return
        answer = _late() if self.pending_answer is None else self.pending_answer
        self._waiters.tell_some(overdue, answer)

    def may_call_provider(self) -> bool:
        """Looked at immediately before each provider call: a process that was frozen must not send
        late, and nothing may be sent for a request that was told 503."""
        return self.answer is None and time.monotonic() < self.deadline

    def check_may_call_provider(self) -> None:
        if not self.may_call_provider():
            raise _late()

    def left_s(self, most_s: float) -> float:
        return min(most_s, self.deadline - time.monotonic())

    def limit_storing(self) -> None:
        self.storing = True
        self.store_by = time.monotonic() + OUTCOME_STORE_PATIENCE_S

    @contextmanager
    def limited_storing(self) -> Iterator[None]:
        """The same, of what is stored before the provider is called once more."""
        self.limit_storing()
        yield
        self.storing, self.store_by = False, math.inf


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

    def has(self, request: Request) -> bool:
        """Whether an equal request is under way in this process."""
        return request in self._runs

    async def answer(
        self,
        request: Request,
        deadline_s: float,
        work: Callable[[Run[A]], Awaitable[None]],
        caller: Caller | None = None,
    ) -> tuple[A, bool]:
        """The answer of `work`, or of the run of an equal request; and whether it was joined.

        The deadline counts from when the caller began to wait, else from now. Raises what the work
        failed with, or TooBusy.
        """
        caller = caller or Caller()
        deadline = caller.since + deadline_s
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
            return await run.wait(caller, deadline_s, joined=True), True
        if not client.runs.take():
            raise TooBusy("The limit of concurrent requests is reached.")
        run = self._runs[request] = Run(client, self._stop_by)
        run.task = asyncio.create_task(self._run(request, run, client, work), name="run")
        self._tasks.add(run.task)
        run.task.add_done_callback(self._tasks.discard)
        if self._watching is None:
            self._watch()
        return await run.wait(caller, deadline_s), False

    async def _run(
        self,
        request: Request,
        run: Run[A],
        client: Client,
        work: Callable[[Run[A]], Awaitable[None]],
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
            run.fail(_late())
            run.release_provider_call()
            client.runs.add(-1)
            del self._runs[request]

    def answer_all_within(self, within_s: float) -> None:
        """Every request, of now or to come, is answered by then: the service is stopping."""
        self._stop_by = time.monotonic() + within_s
        for run in self._runs.values():
            run.answer_by = min(run.answer_by, self._stop_by)

    async def drain(self, timeout_s: float) -> None:
        """Waits for the runs that go on although their requests were answered."""
        if left := await finish(self._tasks, timeout_s):
            logger.bind(runs=left).warning("stopping with unfinished requests")

    def _watch(self) -> None:
        """Answers the requests whose time is up; one timer for all runs."""
        now = time.monotonic()
        for run in self._runs.values():
            run.tell_overdue(now)
            if now >= min(run.answer_by, run.store_by):
                run.fail(_late())
            elif now >= run.begin_by and not run.has_begun:
                run.fail(DatabaseUnavailable("The database did not respond in time."))
        loop = asyncio.get_running_loop()
        self._watching = loop.call_later(WATCH_S, self._watch) if self._runs else None


def _late() -> TooBusy:
    return TooBusy("The request was not processed before its deadline.")


def cause(client: str, request_id: str | None = None, traceparent: str | None = None) -> Cause:
    """What goes into an event that is decided now."""
    return Cause(
        event_id=uuid.uuid4(),
        occurred_at=datetime.now(UTC),
        client=client,
        request_id=request_id,
        traceparent=traceparent,
    )
