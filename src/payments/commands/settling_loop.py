"""Which open payments are asked about, when, and how many at once.

The projector lists them (unsettled.py). Every process that works takes what is due, each payment by
one process at a time, and makes it due again after a pause that grows.
"""

import asyncio
import time
from contextlib import suppress
from datetime import UTC, datetime
from functools import partial

from loguru import logger

from payments.commands.settle import SettleAttempt, Settler
from payments.commands.telling import tell
from payments.database.connections import Database
from payments.errors import DatabaseUnavailable, PaymentUnreadable
from payments.event_store import EventStore, LoadedPayment
from payments.hints import purge
from payments.observability.logs import Repeats
from payments.payment.state import Payment, Status
from payments.settings import Settings
from payments.tasks import end, finish
from payments.unsettled import Claim, claim, forget, postpone

CONCURRENCY_MAX = 32  # payments asked about at once, by one process
ABANDONED_MAX = 8  # of them abandoned ones: those may be many, and nobody waits for them
LEASE_MARGIN_S = 2.0  # for reading and appending; after a crash another process waits for the lease
POLL_S = 0.5
# Between two attempts: 1 s, doubling. A customer waits for a PENDING payment.
CHARGE_PAUSE_MAX_S = 60.0
PAUSE_MAX_S = 900.0
PURGE_EVERY_S = 60.0  # hints that are too old; as long as there are many, at each look for work


def pause_s(attempts: int, kind: str) -> float:
    """How long to wait after so many attempts."""
    most = CHARGE_PAUSE_MAX_S if kind == "charge" else PAUSE_MAX_S
    return min(2.0 ** min(attempts - 1, 20), most)


class SettlingLoop:
    """Settles what is due. One instance per process."""

    def __init__(
        self, settler: Settler, store: EventStore, database: Database, settings: Settings
    ) -> None:
        """`database` is where the list of unsettled payments is."""
        self._settler = settler
        self._store = store
        self._database = database
        self._abandon_after_s = settings.pending_abandon_after_s
        self._lease_s = settler.attempt_s + LEASE_MARGIN_S
        self._tasks: set[asyncio.Task[None]] = set()
        self._abandoned: set[asyncio.Task[None]] = set()
        self._loop: asyncio.Task[None] | None = None
        self._repeats = Repeats()
        self._looks = True  # whether the last look for work succeeded
        self._purge_at = time.monotonic() + PURGE_EVERY_S

    def start(self) -> None:
        self._loop = asyncio.create_task(self._run(), name="settling")

    async def stop(self, timeout_s: float) -> None:
        """Claims nothing more and waits a while for what is under way. What is cut off then is
        asked about again once its lease is over."""
        if self._loop is not None:
            await end({self._loop}, 1)
        await finish(self._tasks, timeout_s)

    async def run_once(self) -> int:
        """Settles what is due; returns how many payments it tried."""
        tasks = await self._begin_due()
        await asyncio.gather(*tasks)
        return len(tasks)

    async def _run(self) -> None:
        while True:
            try:
                begun = await self._begin_due()
                self._looks = True
                await self._purge_hints()
            except Exception as error:  # noqa: BLE001 - payments must not stay open for it
                begun = []
                if self._looks:
                    logger.bind(reason=str(error)).error("unsettled payments cannot be read")
                self._looks = False
            if begun:  # there may be more as soon as one of these is done
                await asyncio.wait(begun, timeout=POLL_S, return_when=asyncio.FIRST_COMPLETED)
            else:
                await asyncio.sleep(POLL_S)

    async def _purge_hints(self) -> None:
        if time.monotonic() >= self._purge_at:
            self._purge_at = time.monotonic() + PURGE_EVERY_S
            try:
                if await purge(self._database):
                    self._purge_at = 0.0
            except Exception as error:  # noqa: BLE001 - they only take room
                message = "old webhooks of providers cannot be removed"
                self._repeats.tell("WARNING", message, reason=type(error).__name__)

    async def _begin_due(self) -> list[asyncio.Task[None]]:
        begun = await self._begin(CONCURRENCY_MAX - len(self._tasks), abandoned=False)
        free = CONCURRENCY_MAX - len(self._tasks)
        watched = await self._begin(min(free, ABANDONED_MAX - len(self._abandoned)), abandoned=True)
        for task in watched:
            self._abandoned.add(task)
            task.add_done_callback(self._abandoned.discard)
        return begun + watched

    async def _begin(self, most: int, *, abandoned: bool) -> list[asyncio.Task[None]]:
        if most <= 0:
            return []
        claims = await claim(
            self._database,
            most,
            self._lease_s,
            abandoned=abandoned,
            declines_may_turn_s=max(self._settler.declines_may_turn_s.values(), default=0.0),
        )
        tasks = [asyncio.create_task(self._settle(each), name="settle") for each in claims]
        for task in tasks:
            self._tasks.add(task)
            task.add_done_callback(self._tasks.discard)
        return tasks

    async def _settle(self, claimed: Claim) -> None:
        """One attempt; afterwards the row is due again, or gone if nothing can come any more."""
        say = partial(tell, self._store, claimed.payment_id, attempts=claimed.attempts)
        wait_s: float | None = PAUSE_MAX_S
        answered = False
        try:
            wait_s, answered = await self._attempt(claimed)
        except DatabaseUnavailable as error:
            wait_s = pause_s(claimed.attempts, "refund")
            self._repeats.tell(
                "WARNING",
                "cannot be settled now",
                payment_id=claimed.payment_id,
                attempts=claimed.attempts,
                reason=error.code,
            )
        except PaymentUnreadable as error:
            wait_s = pause_s(claimed.attempts, "refund")
            await say("WARNING", "cannot be settled now", reason=error.code)
        except Exception as error:  # noqa: BLE001 - other payments are settled all the same
            await say("ERROR", "cannot be settled now", exception=error)
        with suppress(DatabaseUnavailable):  # then it is due when its lease is over
            if wait_s is None and await forget(self._database, claimed):
                return
            pause = PAUSE_MAX_S if wait_s is None else wait_s
            await postpone(self._database, claimed, pause, answered=answered)

    async def _attempt(self, claimed: Claim) -> tuple[float | None, bool]:
        """How long to wait for the next attempt, None if it was watched to its end; and whether the
        provider answered.

        What an event has settled is the projector's to remove, when it comes there: until then the
        log, up to where the projector stands, says that the row is to be there.
        """
        loaded = await self._store.load(claimed.payment_id)
        if loaded is None:
            message = "unsettled, but not in the log: `payments audit verify`"
            await tell(self._store, claimed.payment_id, "ERROR", message)
            return PAUSE_MAX_S, False
        attempt = await self._settler.settle(loaded, claimed.attempts, hinted=claimed.hinted)
        return self._wait_s(loaded, attempt, claimed.attempts), attempt.answered

    def _wait_s(self, loaded: LoadedPayment, attempt: SettleAttempt, attempts: int) -> float | None:
        """After this attempt; None if the payment was watched to its end."""
        if attempt.finished:
            return None
        if attempt.due_in_s is not None:
            return attempt.due_in_s
        unsettled = attempt.payment.unsettled
        if unsettled is None:
            return pause_s(attempts, "settled")
        wait_s = pause_s(attempts, unsettled.kind)
        if attempt.payment.status is Status.PENDING:
            for left_s in (self._abandon_after_s - loaded.age_s(), _held_for_s(attempt.payment)):
                if left_s > 0:
                    wait_s = min(wait_s, max(1.0, left_s))
        return wait_s


def _held_for_s(payment: Payment) -> float:
    """For how long its seats are still held; 0 also if that is not known."""
    if payment.hold_until is None:
        return 0.0
    return (payment.hold_until - datetime.now(UTC)).total_seconds()
