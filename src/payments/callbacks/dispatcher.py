"""The dispatcher: sends due callbacks to Order Service, at least once and in order.

Each delivery takes three steps: `_prepare` encodes the request body, `_send` makes one exchange
with the endpoint, `_record` writes the result. One task claims and records in batches, on its own
connection; the exchanges run concurrently and do not use the database.

Any number of processes share the work. The process that claimed an order's lane owns it until the
result is recorded or the lease expires. An exchange without a known end may still be running at
Order Service, so its order waits for another exchange timeout.
"""

import asyncio
import random
import time
from collections.abc import Awaitable, Callable
from contextlib import suppress
from datetime import UTC, datetime
from typing import TYPE_CHECKING, Annotated, Any, Literal
from uuid import UUID

import msgspec
import psycopg
from loguru import logger

from payments.backoff import Backoff
from payments.callbacks import BEGIN_WITHIN_S, lease_s, outbox
from payments.callbacks.breaker import Breaker, Permit
from payments.callbacks.endpoint_health import EndpointHealth
from payments.callbacks.outbox import ClaimedDelivery, Result
from payments.callbacks.retry import jittered, judge
from payments.database.connections import cut_after
from payments.observability.logs import Repeats, trace_field
from payments.observability.metrics import Telemetry
from payments.observability.tracing import current_traceparent, span
from payments.order_service.responses import Said, said_of
from payments.tasks import finish

if TYPE_CHECKING:
    from payments.order_service.endpoint import Endpoint, Exchange

CONCURRENCY_MAX = 64  # concurrent exchanges of one process
# The share for orders whose last exchange failed, so that they do not delay the others. It shrinks
# while few places are free: an order that hangs keeps its place for the whole timeout.
FAILING_MAX = CONCURRENCY_MAX // 4
FAILING_MIN = CONCURRENCY_MAX // 16
CLAIM_MAX = CONCURRENCY_MAX // 2  # in one claim: some are sent while others are claimed
POLL_S = 1.0  # for callbacks that other processes enqueued, and for retries that became due
DATABASE_TIMEOUT_S = 4.0
RECONNECT_MIN_S, RECONNECT_MAX_S = 0.1, 2.0
PRUNE_EVERY_S, PRUNE_ROWS = 60.0, 1000
REOPEN_LANES = 1000  # at a time, after an outage
CUT_OFF_S = 0.8  # of the stop's timeout, to record the exchanges that were cancelled


class CallbackBody(msgspec.Struct, frozen=True, kw_only=True):
    """The body of a callback. `sequence` grows from one callback of a payment to its next;
    `event_id` stays the same when a callback is retried."""

    order_id: UUID
    payment_id: UUID
    status: str
    event_id: UUID
    sequence: int
    occurred_at: Annotated[datetime, msgspec.Meta(tz=True)]
    amount_cents: int
    currency: str


class Dispatcher:
    """One per process. `connect` opens a connection, as Database.connect does. `suspected` is
    called when a SUCCESS was recorded as delivered whose response does not say "confirmed"."""

    def __init__(
        self,
        connect: Callable[[str], Awaitable[psycopg.AsyncConnection[Any]]],
        endpoint: "Endpoint",
        telemetry: Telemetry,
        retention_days: int,
        *,
        suspected: Callable[[], None] | None = None,
        breaker: Breaker | None = None,
        rng: Callable[[], float] = random.random,
    ) -> None:
        self._connect = connect
        self._endpoint = endpoint
        self._telemetry = telemetry
        self._retention_days = retention_days
        self._suspected = suspected
        self._breaker = breaker or Breaker()
        self._health = EndpointHealth(self._breaker)
        self._random = rng
        self._repeats = Repeats()
        self._opened: psycopg.AsyncConnection[Any] | None = None
        self._loop: asyncio.Task[None] | None = None
        self._sending: dict[asyncio.Task[None], ClaimedDelivery] = {}
        self._results: list[Result] = []
        self._wake = asyncio.Event()
        self._prune_at = 0.0
        self._stopping = False

    @property
    def state(self) -> str:
        """The circuit breaker's: closed, open or half_open."""
        return self._breaker.state(time.monotonic())

    async def start(self) -> None:
        await self._endpoint.open()
        self._prune_at = time.monotonic() + random.uniform(0, PRUNE_EVERY_S)  # noqa: S311
        self._loop = asyncio.create_task(self._run(), name="callbacks")

    def wake(self) -> None:
        """Callbacks may be due."""
        self._wake.set()

    def finish(self) -> None:
        """Claims no more; running exchanges continue."""
        self._stopping = True
        self._wake.set()

    async def stop(self, timeout_s: float) -> None:
        """Finishes and records the running exchanges within `timeout_s`, and cancels the rest. A
        cancelled one is recorded as such; its order waits as long as Order Service may work on
        it."""
        self.finish()
        if self._loop is not None:
            await asyncio.wait({self._loop}, timeout=max(0.0, timeout_s - CUT_OFF_S))
            for task in self._sending:
                task.cancel()
            await finish({self._loop}, CUT_OFF_S, 0.2)
        await self._close()
        await self._endpoint.close()

    async def _run(self) -> None:
        backoff = Backoff(RECONNECT_MIN_S, RECONNECT_MAX_S)
        while not (self._stopping and not self._sending and not self._results):
            try:
                await self._turn()
            except (psycopg.OperationalError, psycopg.InterfaceError, OSError) as error:
                reason, message = (
                    type(error).__name__,
                    "callbacks lost the database connection, retrying",
                )
                self._repeats.tell("WARNING", message, of=reason, reason=reason)
            except Exception as error:  # noqa: BLE001 - a bug must not stop the other callbacks
                message = "callbacks cannot be claimed or recorded, retrying"
                self._repeats.tell("ERROR", message, of=type(error), exception=error)
                # Their leases expire, and they are sent again, rather than never.
                self._results.clear()
            else:
                backoff.reset()
                await self._sleep()
                continue
            await self._close()
            await asyncio.sleep(backoff.next_s())

    async def _turn(self) -> None:
        """Records finished exchanges and begins new ones."""
        self._wake.clear()
        if self._opened is None:
            self._opened = await self._connect("payments callbacks")
        with cut_after(self._opened, DATABASE_TIMEOUT_S):
            await self._record(self._opened)
            await self._make_due(self._opened)
            self._health.tell_of_an_outage(time.monotonic())
            if not self._stopping:
                await self._begin(self._opened)
                await self._prune(self._opened)

    async def _make_due(self, connection: psycopg.AsyncConnection[Any]) -> None:
        """Makes due what failed in an outage that is over; of many, some in each turn."""
        over_since, self._health.over_since = self._health.over_since, None
        if over_since is None:
            return
        made_due = REOPEN_LANES
        try:
            while self._results:  # a lane does not change before its failure is recorded
                await self._record(connection)
            outage_s = time.monotonic() - over_since
            made_due = await outbox.make_due(
                connection, outage_s, REOPEN_LANES, late_s=DATABASE_TIMEOUT_S
            )
        finally:
            if made_due == REOPEN_LANES:  # or it failed; one that ended meanwhile began later
                self._health.over_since = over_since

    async def _sleep(self) -> None:
        """Waits until an exchange ends or `wake` is called, at most POLL_S."""
        until_probe_s = self._breaker.admits_in(time.monotonic())
        wait_s = min(POLL_S, until_probe_s or POLL_S)
        with suppress(TimeoutError):
            async with asyncio.timeout(wait_s):
                await self._wake.wait()

    async def _begin(self, connection: psycopg.AsyncConnection[Any]) -> None:
        """Claims deliveries up to the limits, and starts sending them."""
        now = time.monotonic()
        free = CONCURRENCY_MAX - len(self._sending)
        allowed = self._breaker.allowance(now, min(free, CLAIM_MAX))
        if allowed == 0:
            return
        failing_max = max(FAILING_MIN, min(FAILING_MAX, free - FAILING_MAX))
        failing = sum(claimed.failing for claimed in self._sending.values())
        claims = await outbox.claim(
            connection,
            most=allowed,
            failing_max=max(0, min(allowed, failing_max - failing)),
            lease_s=lease_s(self._endpoint.timeout_s),
            probing=self._breaker.state(now) != "closed",
        )
        permit = self._breaker.begin(now) if claims else None
        for claimed in claims:
            if permit is None:  # the breaker has opened since
                self._results.append(_released(claimed, self._rest_s(claimed)))
                continue
            task = asyncio.create_task(self._deliver(claimed, permit, now), name="callback")
            self._sending[task] = claimed
            task.add_done_callback(self._sent)
        if len(claims) == CLAIM_MAX:
            self._wake.set()

    def _sent(self, task: asyncio.Task[None]) -> None:
        del self._sending[task]
        self._wake.set()
        if not task.cancelled() and (error := task.exception()) is not None:
            message = "a callback could not be sent"
            self._repeats.tell("ERROR", message, of=type(error), exception=error)

    async def _deliver(self, claimed: ClaimedDelivery, permit: Permit, claimed_at: float) -> None:
        """Makes one exchange, and judges it for the delivery and for the breaker."""
        began = time.monotonic()
        if began > claimed_at + BEGIN_WITHIN_S:
            self._results.append(_released(claimed, self._rest_s(claimed)))
            return
        try:
            exchange = await self._send(claimed, _prepare(claimed))
        except asyncio.CancelledError:
            self._results.append(self._cut_off(claimed, time.monotonic() - began))
            raise
        self._results.append(self._judged(claimed, exchange, permit))

    async def _send(self, claimed: ClaimedDelivery, body: bytes) -> "Exchange":
        with span(
            "callback",
            kind="client",
            parent=claimed.traceparent,
            payment_id=claimed.payment_id,
            order_id=claimed.order_id,
        ):
            traceparent = current_traceparent(claimed.traceparent)
            return await self._endpoint.post(
                str(claimed.event_id), body, int(time.time()), traceparent
            )

    def _judged(self, claimed: ClaimedDelivery, exchange: "Exchange", permit: Permit) -> Result:
        # Attempts that a probe or the end of an outage made early do not use up the delivery's
        # attempts.
        counts = claimed.due_in_s <= 0 and not claimed.excused
        attempt = claimed.attempt if counts else max(1, claimed.attempt - 1)
        verdict = judge(
            *(exchange, attempt, claimed.due_for_s, self._endpoint.timeout_s, datetime.now(UTC))
        )
        self._health.note(
            verdict,
            permit,
            claimed.order_id,
            claimed.attempt,
            _reason(exchange),
            time.monotonic(),
        )
        self._telemetry.callback_attempts[verdict.outcome].inc()
        self._telemetry.callback_seconds.observe(exchange.seconds)
        state: Literal["due", "delivered", "dead"] = verdict.final or "due"
        delay_s = 0.0
        if state == "due" and claimed.due_in_s <= 0:
            delay_s = jittered(verdict, self._random())
        elif state == "due":  # an early attempt; one that fails by itself keeps its pause
            delay_s = self._rest_s(claimed) if verdict.endpoint_down else claimed.due_in_s
        if state == "dead":
            logger.bind(
                event_id=claimed.event_id,
                payment_id=claimed.payment_id,
                order_id=claimed.order_id,
                attempts=claimed.attempt,
                reason=_reason(exchange),
                **trace_field(claimed.traceparent),
            ).error("a callback is dead: `payments callbacks list --dead`")
        return Result(
            claimed=claimed,
            state=state,
            delay_s=delay_s,
            counts=counts,
            seconds=round(exchange.seconds, 4),
            outcome=verdict.outcome,
            status=exchange.status,
            reason=exchange.reason,
            answer=exchange.answer,
            busy_s=verdict.busy_s,
            asked_s=verdict.asked_s,
            away=verdict.endpoint_down,
            said=_said(claimed, exchange) if state == "delivered" else None,
        )

    def _cut_off(self, claimed: ClaimedDelivery, seconds: float) -> Result:
        """The result of an exchange that was cancelled by the stop of the service."""
        self._telemetry.callback_attempts["end_unknown"].inc()
        busy_s, delay_s = self._endpoint.timeout_s, self._rest_s(claimed)
        return Result(
            *(claimed, "due", delay_s, False, round(seconds, 4), "end_unknown", None),
            *("the service was stopped", b"", busy_s),
        )

    def _rest_s(self, claimed: ClaimedDelivery) -> float:
        """The rest of the pause of a delivery that was claimed early, as a probe. None is left if
        the outage has ended since: that ended the pauses of all others, but did not change a lane
        with a running exchange."""
        is_over = self._health.is_over(time.monotonic())
        return 0.0 if is_over else max(0.0, claimed.due_in_s)

    async def _record(self, connection: psycopg.AsyncConnection[Any]) -> None:
        """Records the results of finished exchanges, and keeps them for the next turn if that
        fails."""
        results = list(self._results)
        if not results:
            return
        held = await outbox.record(connection, results)
        del self._results[: len(results)]
        for result in results:
            if result.claimed.claim not in held:
                logger.bind(event_id=result.claimed.event_id).warning(
                    "a callback's result came after its lease had expired"
                )
        if self._suspected and any(r.said not in (None, "confirmed") for r in results):
            self._suspected()

    async def _prune(self, connection: psycopg.AsyncConnection[Any]) -> None:
        """Deletes old rows, few at a time, so that sending does not wait."""
        if time.monotonic() >= self._prune_at:
            pruned = await outbox.prune(connection, self._retention_days, PRUNE_ROWS)
            if pruned < PRUNE_ROWS:
                self._prune_at = time.monotonic() + PRUNE_EVERY_S

    async def _close(self) -> None:
        if self._opened is not None:
            connection, self._opened = self._opened, None
            await connection.close()


def _prepare(claimed: ClaimedDelivery) -> bytes:
    """Encodes the request body."""
    return msgspec.json.encode(
        CallbackBody(
            order_id=claimed.order_id,
            payment_id=claimed.payment_id,
            status=claimed.status,
            event_id=claimed.event_id,
            sequence=claimed.sequence,
            occurred_at=claimed.occurred_at,
            amount_cents=claimed.amount_cents,
            currency=claimed.currency,
        )
    )


def _said(claimed: ClaimedDelivery, exchange: "Exchange") -> Said | None:
    if claimed.status != "SUCCESS":
        return None
    return said_of(exchange.answer, claimed.order_id)


def _reason(exchange: "Exchange") -> str:
    return exchange.reason or str(exchange.status)


def _released(claimed: ClaimedDelivery, delay_s: float) -> Result:
    """The result for a claimed delivery that was not sent."""
    return Result(
        claimed=claimed,
        state="due",
        delay_s=delay_s,
        counts=False,
        seconds=0.0,
        outcome=outbox.RELEASED,
        status=None,
        reason="",
        answer=b"",
    )
