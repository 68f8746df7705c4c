"""Health of the process and its database: for /health, and for the metrics of a scrape."""

import asyncio
import sys
import time
from collections.abc import Callable, Collection, Iterable, Mapping
from contextlib import suppress
from functools import partial
from typing import NamedTuple

from payments import brake
from payments.database.connections import Database
from payments.errors import DatabaseUnavailable
from payments.events.watch import LogWatch
from payments.observability.metrics import BREAKER_STATES, UNSETTLED_KINDS, Telemetry
from payments.queries.callbacks import Backlog, backlog, oldest_age_s
from payments.queries.followers import (
    FollowerState,
    UnsettledPayments,
    follower_states,
    told_gateways,
    unsettled_payments,
)
from payments.queries.fulfilments import Count, counts
from payments.queries.server import (
    HorizonAge,
    ServerState,
    horizon,
    server_state,
    unread_notifications,
)
from payments.settings import Settings
from payments.single_flight import Recent, SingleFlight

SWITCH_S = sys.getswitchinterval()
RENDERING_SWITCH_S = 0.0002
OBSERVE_TIMEOUT_S = 2.0  # a scrape gets its response in under 3 s
HEALTH_TIMEOUT_S = 2.0  # probes often time out after 3 s
CALLBACKS_LATE_S = 60.0  # a callback that is due for longer shows a problem of the endpoint


class Reached(NamedTuple):
    """The result of /health with a database that responds: the state of callbacks (ok, degraded, or
    off without ORDER_CALLBACK_URL), whether it is read-only, and whether the log has lost
    events."""

    callbacks: str
    read_only: bool
    rewound: bool


class HealthChecks:
    """Checks the database on its own connections: health and metrics never wait for those of
    requests, nor for each other. Of each kind only one check runs at a time, for all callers."""

    def __init__(
        self,
        settings: Settings,
        pool: Database,
        telemetry: Telemetry,
        watch: LogWatch,
        *,
        breaker_state: Callable[[], str],
        followed: Collection[str],
        gateways: Collection[str],
    ) -> None:
        """`pool` is the one of requests; `breaker_state` that of callbacks; `followed` are the
        followers that this service may run, `gateways` the names of its providers."""
        self._pool = pool
        self._database = Database(pool.address, 2)
        self._telemetry = telemetry
        self._watch = watch
        self._breaker_state = breaker_state
        self._followed = frozenset(followed)
        self._gateways = frozenset(gateways)
        self._unconfigured = set[str]()  # all that were found since the start
        self._calls_back = settings.order_callback_url is not None
        self._gives_back = settings.unfulfilled == "refund"
        self._horizon_age = HorizonAge()
        self.reach_database = SingleFlight(self._reach_database)
        self.observe = SingleFlight(self._observe)
        self.exposition = Recent(partial(self._rendered, telemetry.exposition))
        self.openmetrics = Recent(partial(self._rendered, telemetry.openmetrics))

    async def open(self) -> None:
        await self._database.open()

    async def close(self) -> None:
        await self._database.close()

    async def _reach_database(self) -> Reached:
        """Raises DatabaseUnavailable after HEALTH_TIMEOUT_S."""
        database = self._database
        late_s = await oldest_age_s(database, HEALTH_TIMEOUT_S / 2)
        await self._watch.look(database, HEALTH_TIMEOUT_S / 2)
        cut_off = self._breaker_state() != "closed"
        callbacks = "degraded" if cut_off or late_s > CALLBACKS_LATE_S else "ok"
        if not self._calls_back:
            callbacks = "off"
        return Reached(
            callbacks=callbacks, read_only=self._watch.read_only, rewound=self._watch.lost
        )

    async def _observe(self) -> None:
        """Updates the gauges that are read at a scrape, within OBSERVE_TIMEOUT_S. Raises
        DatabaseUnavailable; then those from the database are omitted."""
        breaker = self._breaker_state()
        for state in BREAKER_STATES:
            self._telemetry.callback_breaker[state].set(state == breaker)
        for state, connections in self._pool.pool_connections().items():
            self._telemetry.database_pool[state].set(connections)
        try:
            async with asyncio.timeout(OBSERVE_TIMEOUT_S):
                followers = await follower_states(self._database)
                unsettled = await unsettled_payments(self._database)
                told = await told_gateways(self._database)
                callbacks = await backlog(self._database)
                unfulfilled = await counts(self._database)
                server = await server_state(self._database)
                held = await horizon(self._database)
                unread = await unread_notifications(self._database)
                stop = await brake.stopped(self._database)
        except TimeoutError:
            self._telemetry.observed(up=False)
            raise DatabaseUnavailable("The database does not respond.") from None
        except Exception:
            self._telemetry.observed(up=False)
            raise
        self._show_server(server, self._horizon_age.seconds(held, time.monotonic()), unread)
        self._show_work(followers, callbacks, unsettled)
        self._show_unconfigured(told)
        self._telemetry.giving_back_stopped.set(self._gives_back and stop is not None)
        self._show_unfulfilled(unfulfilled)
        self._telemetry.observed(up=True)

    def _show_server(self, server: ServerState, held_s: float, unread: float) -> None:
        self._telemetry.read_only.set(server.read_only)
        self._telemetry.standbys["synchronous"].set(server.synchronous)
        self._telemetry.standbys["asynchronous"].set(server.asynchronous)
        self._telemetry.clock_skew.set(server.skew_s)
        self._telemetry.log_ahead.set(server.log_ahead_s)
        self._telemetry.horizon_age.set(held_s)
        self._telemetry.notification_queue.set(unread)

    def _show_work(
        self,
        followers: Iterable[FollowerState],
        callbacks: Backlog,
        unsettled: Iterable[UnsettledPayments],
    ) -> None:
        # The follower of callbacks has no lag while they are switched off.
        for follower in followers:
            if follower.name in self._followed:
                self._telemetry.follower_lag[follower.name].set(follower.lag_events)
                self._telemetry.follower_lag_seconds[follower.name].set(follower.lag_s)
                self._telemetry.parked_streams[follower.name].set(follower.parked_streams)
        self._telemetry.callbacks_due.set(callbacks.due)
        self._telemetry.callbacks_dead.set(callbacks.dead)
        self._telemetry.callbacks_oldest_age.set(callbacks.oldest_age_s)
        found = {row.kind: row for row in unsettled}
        for kind in UNSETTLED_KINDS:
            row = found.get(kind)
            self._telemetry.unsettled[kind].set(row.payments if row else 0)
            self._telemetry.unsettled_age[kind].set(row.oldest_age_s if row else 0)
        pending = found.get("charge")
        self._telemetry.pending.set(pending.payments if pending else 0)
        self._telemetry.pending_age.set(pending.oldest_age_s if pending else 0)

    def _show_unconfigured(self, found: Mapping[str, int]) -> None:
        """Those that are gone show 0: a series that ends looks like one that nobody asked for."""
        self._unconfigured |= found.keys() - self._gateways
        for name in self._unconfigured:
            self._telemetry.unconfigured.labels(name).set(found.get(name, 0))

    def _show_unfulfilled(self, found: Mapping[str, Count]) -> None:
        for state, count in found.items():
            self._telemetry.unfulfilled[state].set(count.payments)
            self._telemetry.unfulfilled_age[state].set(count.oldest_age_s)

    async def _rendered(self, render: Callable[[], bytes]) -> bytes:
        """All metrics as of now; while the database is unavailable, without those from it."""
        with suppress(DatabaseUnavailable):
            await self.observe()
        # In a thread: it takes tens of milliseconds, which would block the event loop. With the
        # default switch interval the loop would wait 5 ms for the GIL each time.
        sys.setswitchinterval(RENDERING_SWITCH_S)
        try:
            return await asyncio.to_thread(render)
        finally:
            sys.setswitchinterval(SWITCH_S)
