"""The composition root: Settings in, Service out. Nothing is built when a module is imported."""

import asyncio
import importlib
import signal
import sys
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager, suppress
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Literal, NamedTuple

from loguru import logger

from payments import brake
from payments.admission import Admission
from payments.callbacks.dispatcher import CONCURRENCY_MAX, Dispatcher
from payments.commands.charge import Charging
from payments.commands.giving_back import GivingBack
from payments.commands.refund import Refunding
from payments.commands.runs import Runs
from payments.commands.settle import Settler
from payments.commands.settling_loop import Settling
from payments.commands.unfulfilled import Unfulfilled
from payments.database.connections import Database, DatabaseAddress
from payments.errors import DatabaseUnavailable, StartError
from payments.event_store import EventStore
from payments.events.appender import Appender
from payments.events.notifier import Notifier
from payments.events.watch import LogWatch
from payments.fulfilment.checking import CONCURRENCY_MAX as CHECKS_MAX
from payments.fulfilment.checking import Checking, GiveBack
from payments.fulfilment.status import TIMEOUT_S as STATUS_TIMEOUT_S
from payments.fulfilment.status import OrderStatus, sample
from payments.gateways import Gateway
from payments.gateways.counted import CountedGateway
from payments.gateways.ledger_identity import check_ledger
from payments.gateways.simulated import SimulatedGateway
from payments.gateways.simulated_ledger import LOCK_WAIT_S
from payments.observability.metrics import BREAKER_STATES, UNSETTLED_KINDS, Telemetry
from payments.opening import data_dir
from payments.projections.callbacks import CallbacksProjection, begin_at_the_end
from payments.projections.follower import Follower
from payments.projections.payments import PaymentsProjection
from payments.projections.seals import BATCH_MAX as SEALS_MAX
from payments.projections.seals import SealsProjection
from payments.queries.callbacks import Backlog, backlog, oldest_age_s
from payments.queries.followers import (
    FollowerState,
    UnsettledPayments,
    follower_states,
    unsettled_payments,
)
from payments.queries.fulfilments import Count, counts
from payments.queries.lookups import PaymentLookups
from payments.queries.server import (
    UNSAFE_MEANS,
    HorizonAge,
    Server,
    horizon,
    server_state,
    unread_notifications,
    unsafe_settings,
)
from payments.settings import Settings
from payments.single_flight import Recent, Shared

if TYPE_CHECKING:
    from payments.order_service.endpoint import Endpoint

SWITCH_S = sys.getswitchinterval()
RENDERING_SWITCH_S = 0.0002
OBSERVE_TIMEOUT_S = 2.0  # a scrape is answered in under 3 s
HEALTH_TIMEOUT_S = 2.0  # probes often give up after 3 s
LEDGER_NAME = "simulated-ledger.sqlite"  # in PAYMENTS_DATA_DIR
EARLIER_LEDGER_NAME = "simulated-ledger.jsonl"
CALLBACKS_LATE_S = 60.0  # callbacks that are due for so long show that their endpoint is in trouble


class Reached(NamedTuple):
    """What /health says of a database that answers: how callbacks are (ok, degraded, or off without
    an address for them), whether it refuses to write, and whether the log went back."""

    callbacks: str
    read_only: bool
    rewound: bool


class Service:
    """Everything that runs in one process, wired together.

    Build it inside the event loop, `start` it, and `stop` it when the last request is answered.
    """

    def __init__(
        self,
        settings: Settings,
        address: DatabaseAddress,
        *,
        gateway: Gateway | None = None,
        telemetry: Telemetry | None = None,
        data_dir: Path | None = None,
    ) -> None:
        """In `data_dir` the newest seal is kept, so that a restart notices a log that went back."""
        self.settings = settings
        self.telemetry = telemetry or Telemetry()
        self.database = Database(address, settings.database_pool_max)
        # Health and metrics never wait behind requests for a connection, nor behind one another:
        # however many ask, the database is asked one thing of each kind at a time.
        self._operations_database = Database(address, 2)
        self._horizon_age = HorizonAge()
        self.reach_database = Shared(self._reach_database)
        self.observe = Shared(self._observe)
        self.exposition = Recent(partial(self._rendered, self.telemetry.exposition))
        self.openmetrics = Recent(partial(self._rendered, self.telemetry.openmetrics))
        gateway = gateway or build_gateway(settings)
        self._ledger = gateway.ledger if isinstance(gateway, SimulatedGateway) else None
        self.gateway = CountedGateway(gateway, self.telemetry)
        self.watch = LogWatch(self.database, self.telemetry, data_dir)
        self.notifier = Notifier(self.database.connect, self.telemetry, self._wake_followers)
        self.appender = Appender(
            self.database.connect,
            self.telemetry,
            settings.intent_queue_max,
            self.watch,
            self.notifier.appended,
        )
        clients = len({key.client for key in settings.payments_api_keys})
        self.admission = Admission(
            settings.intent_queue_max, settings.gateway_concurrency_max, clients
        )
        self.runs = Runs(self.admission)
        giving_back = GivingBack(self.gateway, self.database, self.watch)
        shared = (EventStore(self.database, self.appender), self.gateway)
        self.charging = Charging(self.runs, *shared, self.telemetry, settings)
        self.refunding = Refunding(self.runs, *shared, giving_back, self.telemetry, settings)
        # Gives back what its order did not fulfil, if that is wanted.
        self.unfulfilled = (
            Unfulfilled(self.refunding, giving_back, self.database, self.admission)
            if settings.unfulfilled == "refund"
            else None
        )
        self.lookups = PaymentLookups(self.database)
        settler = Settler(*shared, giving_back, self.telemetry, settings)
        self.settling = Settling(settler, self.database, settings)
        self._build_callbacks()

    def _build_callbacks(self) -> None:
        """What follows the log and tells Order Service of it."""
        settings = self.settings
        give_back = self.unfulfilled.give_back if self.unfulfilled else None
        self.checking = build_checking(settings, self.database, give_back)
        suspected = self.checking.wake if self.checking else None
        self.dispatcher = build_dispatcher(settings, self.database, self.telemetry, suspected)
        applied = self.dispatcher.wake if self.dispatcher else None
        self.followers = build_followers(
            settings, self.database, self.telemetry, applied, self.gateway.declines_may_turn_s
        )

    async def start(self, *, work: bool = True) -> None:
        """Without `work` it only answers requests: another process follows, settles and calls back.

        Raises StartError; whatever else it raises, `stop` ends what was begun.
        """
        url = self.settings.order_callback_url
        if url is None:
            logger.info("nobody is called back: ORDER_CALLBACK_URL is not set")
        else:
            from payments.order_service.endpoint import check_target, origin

            networks = self.settings.http_callback_networks
            if (warning := await check_target(url, networks)) is not None:
                logger.warning(warning)
            signed = "signed" if self.settings.order_callback_secret else "not signed"
            logger.info("callbacks go to {}, {}", origin(url), signed)
        await check_status_url(self.settings)
        await self.database.open()
        await self._operations_database.open()
        try:
            if self._ledger is not None:
                await check_ledger(self.database, *self._ledger)
            if url is not None:
                # Before the first request: its outcome is to be called back.
                await begin_at_the_end(self.database)
        except (StartError, DatabaseUnavailable) as error:
            await self.stop(1.0)
            raise StartError(str(error)) from None
        await self._warn_of_unsafe_settings()
        await self.watch.start()
        self.notifier.start()
        self.appender.start()
        if work:
            self.telemetry.role.labels("work").set(1)
            for follower in self.followers:
                follower.start()
            self.settling.start()
            if self.dispatcher is not None:
                await self.dispatcher.start()
                self.telemetry.dispatches()
            if self.checking is not None:
                await self.checking.start()

    def _wake_followers(self) -> None:
        for follower in self.followers:
            follower.wake()

    def finish(self) -> None:
        """Begins nothing of its own any more. Requests are still answered."""
        if self.dispatcher is not None:
            self.dispatcher.finish()

    async def _warn_of_unsafe_settings(self) -> None:
        with suppress(DatabaseUnavailable):
            for name in await unsafe_settings(self.database):
                logger.bind(setting=name).warning(f"a setting is off: {UNSAFE_MEANS}")

    async def _reach_database(self) -> Reached:
        """Within HEALTH_TIMEOUT_S, or DatabaseUnavailable."""
        database = self._operations_database
        late_s = await oldest_age_s(database, HEALTH_TIMEOUT_S / 2)
        await self.watch.look(database, HEALTH_TIMEOUT_S / 2)
        cut_off = self.dispatcher is not None and self.dispatcher.state != "closed"
        callbacks = "degraded" if cut_off or late_s > CALLBACKS_LATE_S else "ok"
        if self.settings.order_callback_url is None:
            callbacks = "off"
        return Reached(callbacks, self.watch.read_only, self.watch.lost)

    async def _observe(self) -> None:
        """Brings the gauges that are set by looking up to date, within OBSERVE_TIMEOUT_S. Raises
        DatabaseUnavailable; then those that only the database knows are left out."""
        breaker = self.dispatcher.state if self.dispatcher else "closed"
        for state in BREAKER_STATES:
            self.telemetry.callback_breaker[state].set(state == breaker)
        for state, connections in self.database.pool_connections().items():
            self.telemetry.database_pool[state].set(connections)
        try:
            async with asyncio.timeout(OBSERVE_TIMEOUT_S):
                followers = await follower_states(self._operations_database)
                unsettled = await unsettled_payments(self._operations_database)
                callbacks = await backlog(self._operations_database)
                unfulfilled = await counts(self._operations_database)
                server = await server_state(self._operations_database)
                held = await horizon(self._operations_database)
                unread = await unread_notifications(self._operations_database)
                stop = await brake.stopped(self._operations_database)
        except TimeoutError:
            self.telemetry.observed(up=False)
            raise DatabaseUnavailable("The database does not answer.") from None
        except Exception:
            self.telemetry.observed(up=False)
            raise
        self._show_server(server, self._horizon_age.seconds(held, time.monotonic()), unread)
        self._show_work(followers, callbacks, unsettled)
        self.telemetry.giving_back_stopped.set(self.unfulfilled is not None and stop is not None)
        self._show_unfulfilled(unfulfilled)
        self.telemetry.observed(up=True)

    def _show_server(self, server: Server, held_s: float, unread: float) -> None:
        self.telemetry.read_only.set(server.read_only)
        self.telemetry.standbys["synchronous"].set(server.synchronous)
        self.telemetry.standbys["asynchronous"].set(server.asynchronous)
        self.telemetry.clock_skew.set(server.skew_s)
        self.telemetry.log_ahead.set(server.log_ahead_s)
        self.telemetry.horizon_age.set(held_s)
        self.telemetry.notification_queue.set(unread)

    def _show_work(
        self,
        followers: Iterable[FollowerState],
        callbacks: Backlog,
        unsettled: Iterable[UnsettledPayments],
    ) -> None:
        # Callbacks that were switched off are not behind.
        followed = {follower.name for follower in self.followers}
        for follower in followers:
            if follower.name in followed:
                self.telemetry.follower_lag[follower.name].set(follower.lag_events)
                self.telemetry.follower_lag_seconds[follower.name].set(follower.lag_s)
                self.telemetry.parked_streams[follower.name].set(follower.parked_streams)
        self.telemetry.callbacks_due.set(callbacks.due)
        self.telemetry.callbacks_dead.set(callbacks.dead)
        self.telemetry.callbacks_oldest_age.set(callbacks.oldest_age_s)
        found = {row.kind: row for row in unsettled}
        for kind in UNSETTLED_KINDS:
            row = found.get(kind)
            self.telemetry.unsettled[kind].set(row.payments if row else 0)
            self.telemetry.unsettled_age[kind].set(row.oldest_age_s if row else 0)
        pending = found.get("charge")
        self.telemetry.pending.set(pending.payments if pending else 0)
        self.telemetry.pending_age.set(pending.oldest_age_s if pending else 0)

    def _show_unfulfilled(self, found: Mapping[str, Count]) -> None:
        for state, count in found.items():
            self.telemetry.unfulfilled[state].set(count.payments)
            self.telemetry.unfulfilled_age[state].set(count.oldest_age_s)

    async def _rendered(self, render: Callable[[], bytes]) -> bytes:
        """All metrics as of now, without a database but for those that only it knows."""
        with suppress(DatabaseUnavailable):
            await self.observe()
        # In a thread: it takes tens of milliseconds, in which the loop would answer nobody. By
        # default the loop would wait for 5 ms whenever it has something to do meanwhile.
        sys.setswitchinterval(RENDERING_SWITCH_S)
        try:
            return await asyncio.to_thread(render)
        finally:
            sys.setswitchinterval(SWITCH_S)

    async def stop(self, timeout_s: float) -> None:
        """Finishes what was begun, within about `timeout_s` seconds. No request may be open."""
        await asyncio.gather(
            self.runs.drain(timeout_s * 0.4),
            self.settling.stop(timeout_s * 0.4),
            *(follower.stop(timeout_s * 0.4) for follower in self.followers),
            *([self.dispatcher.stop(timeout_s * 0.65)] if self.dispatcher else []),
            *([self.checking.stop(timeout_s * 0.4)] if self.checking else []),
        )
        await self.appender.stop(timeout_s * 0.3)
        await self.notifier.stop()
        await self.watch.stop()
        with suppress(TimeoutError):
            async with asyncio.timeout(timeout_s * 0.3):
                await self.gateway.close()
                await self.database.close()
                await self._operations_database.close()


@contextmanager
def starting() -> Iterator[None]:
    """Around what must succeed before a process is of any use: if it fails, StartError says why."""
    try:
        yield
    except StartError:
        raise
    except Exception as error:
        raise StartError(f"the service cannot start: {_told(error)}") from error


def stop_signals() -> list[signal.Signals]:
    """Upon these a process stops in order. SIGHUP comes when the terminal is closed, and is none if
    it was to be ignored (nohup)."""
    is_ignored = signal.getsignal(signal.SIGHUP) is signal.SIG_IGN
    return [signal.SIGTERM, signal.SIGINT, *([] if is_ignored else [signal.SIGHUP])]


GATEWAY_MEMBERS = (
    *("name", "safe_retry_s", "late_capture_s"),
    *("charge", "find_charge", "refund", "find_refund", "close"),
)


def build_followers(
    settings: Settings,
    database: Database,
    telemetry: Telemetry,
    outbox_applied: Callable[[], None] | None = None,
    declines_may_turn_s: float = 0.0,
) -> list[Follower]:
    """The followers that this process may run, not started: one for each projection.

    Without ORDER_CALLBACK_URL there is none for callbacks. `declines_may_turn_s` is the gateway's;
    `outbox_applied` is called when it has
    written something.
    """
    payments = PaymentsProjection(settings.charge_deadline_s, declines_may_turn_s)
    followers = [
        Follower(database.connect, payments, telemetry),
        Follower(database.connect, SealsProjection(), telemetry, SEALS_MAX, listens=False),
    ]
    if settings.order_callback_url is not None:
        callbacks = CallbacksProjection(settings.order_callback_statuses)
        followers.append(Follower(database.connect, callbacks, telemetry, applied=outbox_applied))
    return followers


def build_dispatcher(
    settings: Settings,
    database: Database,
    telemetry: Telemetry,
    suspected: Callable[[], None] | None = None,
) -> Dispatcher | None:
    """What sends callbacks, not started; None without ORDER_CALLBACK_URL. `suspected` as of
    Dispatcher. Raises StartError."""
    if settings.order_callback_url is None:
        return None
    endpoint, days = build_endpoint(settings), settings.callback_retention_days
    return Dispatcher(database.connect, endpoint, telemetry, days, suspected=suspected)


def build_endpoint(settings: Settings) -> "Endpoint":
    """Where callbacks go, not opened; StartError if ORDER_CALLBACK_URL is not set or unusable."""
    from payments.order_service.endpoint import Endpoint

    if settings.order_callback_url is None:
        raise StartError("ORDER_CALLBACK_URL is not set: nobody is called back")
    try:
        return Endpoint(
            settings.order_callback_url,
            settings.order_callback_secret,
            timeout_s=settings.callback_timeout_s,
            networks=settings.http_callback_networks,
            connections_max=CONCURRENCY_MAX,
        )
    except ValueError as error:
        raise StartError(f"ORDER_CALLBACK_URL: {error}") from None


def build_checking(
    settings: Settings, database: Database, give_back: GiveBack | None = None
) -> Checking | None:
    """What finds out whether orders were fulfilled, not started; None if nobody is called back and
    nobody can be asked. Raises StartError."""
    if settings.order_callback_url is None and settings.order_status_url is None:
        return None
    status = build_order_status(settings) if settings.order_status_url is not None else None
    return Checking(database, status, settings.callback_retention_days, give_back=give_back)


def build_order_status(settings: Settings) -> OrderStatus:
    """What is asked about orders, not opened; StartError if ORDER_STATUS_URL is not set or
    unusable."""
    from payments.order_service.endpoint import Endpoint

    url = settings.order_status_url
    if url is None:
        raise StartError("ORDER_STATUS_URL is not set: nobody can be asked about orders")
    try:
        endpoint = Endpoint(
            sample(url),
            timeout_s=STATUS_TIMEOUT_S,
            networks=settings.http_callback_networks,
            connections_max=CHECKS_MAX,
        )
    except ValueError as error:
        raise StartError(f"ORDER_STATUS_URL: {error}") from None
    return OrderStatus(url, endpoint)


async def check_status_url(settings: Settings) -> None:
    """Looks at ORDER_STATUS_URL before it is used, if it is set; StartError."""
    if settings.order_status_url is None:
        return
    from payments.order_service.endpoint import check_target, origin

    url, networks = sample(settings.order_status_url), settings.http_callback_networks
    setting, waiting = "ORDER_STATUS_URL", "questions about orders"
    if (warning := await check_target(url, networks, setting=setting, waiting=waiting)) is not None:
        logger.warning(warning)
    logger.info("{} is asked about orders", origin(url))


def build_gateway(settings: Settings, *, to: Literal["call", "look"] = "call") -> Gateway:
    """The provider that GATEWAY names; StartError if it or its settings do not fit.

    To "look" at what it says of itself the simulated one does without its ledger.
    """
    if ":" in settings.gateway:
        return _plugged_in_gateway(settings)
    if settings.simulated_ledger == "" or to == "look":
        return SimulatedGateway(None, settings.simulated_faults)
    # It must not wait for its ledger for longer than it is waited for: behind what waits already.
    lock_wait_s = min(LOCK_WAIT_S, settings.gateway_timeout_s / 2)
    if settings.simulated_ledger is not None:
        ledger, earlier = Path(settings.simulated_ledger), None
    else:
        directory = data_dir(settings)
        ledger, earlier = directory / LEDGER_NAME, directory / EARLIER_LEDGER_NAME
    return SimulatedGateway(
        ledger, settings.simulated_faults, earlier=earlier, lock_wait_s=lock_wait_s
    )


def _plugged_in_gateway(settings: Settings) -> Gateway:
    """Whatever is wrong with somebody else's module is told in one line."""
    module, _, factory = settings.gateway.partition(":")
    named = f"GATEWAY: {settings.gateway!r}"
    try:
        build = getattr(importlib.import_module(module), factory)
    except Exception as error:
        raise StartError(f"{named} cannot be imported: {_told(error)}") from error
    try:
        gateway: Gateway = build(settings)
    except StartError:
        raise
    except Exception as error:
        raise StartError(f"{named} failed: {_told(error)}") from error
    missing = [name for name in GATEWAY_MEMBERS if not hasattr(gateway, name)]
    if missing:
        raise StartError(f"{named} returned no gateway: it lacks {', '.join(missing)}")
    return gateway


def _told(error: Exception) -> str:
    lines = str(error).splitlines() or [""]
    return f"{type(error).__name__}: {lines[0]}"
