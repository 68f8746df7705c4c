"""The composition root: Settings in, Service out. Nothing is built when a module is imported."""

import asyncio
import signal
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import TYPE_CHECKING

from loguru import logger

from payments.admission import Admission
from payments.callbacks.dispatcher import CONCURRENCY_MAX, Dispatcher
from payments.commands.charge import Charging
from payments.commands.giving_back import GivingBack
from payments.commands.hints import Hints
from payments.commands.refund import Refunding
from payments.commands.runs import Runs
from payments.commands.settle import Settler
from payments.commands.settling_loop import SettlingLoop
from payments.commands.unfulfilled import UnfulfilledRefunding
from payments.database.connections import Database, DatabaseAddress
from payments.errors import DatabaseUnavailable, StartError, told
from payments.event_store import EventStore
from payments.events.appender import Appender
from payments.events.notifier import Notifier
from payments.events.watch import LogWatch
from payments.fulfilment.checking import CONCURRENCY_MAX as CHECKS_MAX
from payments.fulfilment.checking import Checking, GiveBack
from payments.fulfilment.status import TIMEOUT_S as STATUS_TIMEOUT_S
from payments.fulfilment.status import OrderStatus
from payments.gateways import Gateway
from payments.gateways.accounts import Accounts
from payments.gateways.building import build_gateways
from payments.gateways.chosen import Gateways
from payments.gateways.counted import CountedGateway
from payments.health import HealthChecks
from payments.observability.metrics import Telemetry
from payments.order_service.target import Target, check_target
from payments.projections.callbacks import CallbacksProjection, begin_at_the_end
from payments.projections.follower import Follower
from payments.projections.payments import PaymentsProjection
from payments.projections.seals import BATCH_MAX as SEALS_MAX
from payments.projections.seals import SealsProjection
from payments.queries.lookups import PaymentLookups
from payments.queries.server import (
    UNSAFE_MEANS,
    unsafe_settings,
)
from payments.settings import Settings

if TYPE_CHECKING:
    from payments.order_service.endpoint import Endpoint


class Service:
    """Everything that runs in one process, wired together.

    Build it inside the event loop, `start` it, and `stop` it when the last request is answered.
    """

    def __init__(
        self,
        settings: Settings,
        address: DatabaseAddress,
        *,
        gateways: Sequence[Gateway] | None = None,
        telemetry: Telemetry | None = None,
        data_dir: Path | None = None,
    ) -> None:
        """`gateways` are those that the settings name, if they were built already. In `data_dir`
        the newest seal is kept, so that a restart notices a log that went back."""
        self.settings = settings
        self.telemetry = telemetry or Telemetry()
        self.database = Database(address, settings.database_pool_max)
        built = gateways or build_gateways(settings)
        self.gateways = Gateways(
            [CountedGateway(each, self.telemetry) for each in built],
            dict(settings.gateway_by_currency),
        )
        self.accounts = Accounts(self.gateways, self.database)
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
        giving_back = GivingBack(self.database, self.watch)
        store = EventStore(self.database, self.appender)
        shared = (store, self.gateways)
        self.charging = Charging(self.runs, *shared, self.telemetry, settings)
        self.refunding = Refunding(self.runs, *shared, giving_back, self.telemetry, settings)
        # Gives back what its order did not fulfil, if that is wanted.
        self.unfulfilled = (
            UnfulfilledRefunding(self.refunding, giving_back, self.database, self.admission)
            if settings.unfulfilled == "refund"
            else None
        )
        self.lookups = PaymentLookups(self.database)
        self.hints = Hints(self.gateways, address, self.telemetry, settings)
        settler = Settler(*shared, giving_back, self.telemetry, settings)
        self.settling = SettlingLoop(settler, store, self.database, settings)
        self._build_followers()

    def _build_followers(self) -> None:
        """What follows the log and tells Order Service of it, and what looks how that is."""
        settings = self.settings
        give_back = self.unfulfilled.give_back if self.unfulfilled else None
        self.callback_target = Target.of_callbacks(settings)
        self.status_target = Target.of_order_status(settings)
        self.checking = build_checking(settings, self.status_target, self.database, give_back)
        suspected = self.checking.wake if self.checking else None
        self.dispatcher = build_dispatcher(
            settings, self.callback_target, self.database, self.telemetry, suspected
        )
        applied = self.dispatcher.wake if self.dispatcher else None
        self.followers = build_followers(
            settings, self.database, self.telemetry, applied, self.gateways.declines_may_turn_s()
        )
        self.health = HealthChecks(
            settings,
            self.database,
            self.telemetry,
            self.watch,
            breaker_state=self._breaker_state,
            followed=[follower.name for follower in self.followers],
            gateways=[gateway.name for gateway in self.gateways],
        )

    def _breaker_state(self) -> str:
        return self.dispatcher.state if self.dispatcher else "closed"

    def gateways_down(self) -> list[str]:
        """The names of the providers at which this process begins nothing new."""
        return [gateway.name for gateway in self.gateways if gateway.is_known_down]

    async def start(self, *, work: bool = True) -> None:
        """Without `work` it only answers requests: another process follows, settles and calls back.

        Raises StartError; whatever else it raises, `stop` ends what was begun.
        """
        await self._look_at_targets()
        await self.database.open()
        await self.health.open()
        try:
            await self.accounts.start()
            if self.callback_target is not None:
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

    async def _look_at_targets(self) -> None:
        """Says where requests to Order Service go; StartError if they can never get there."""
        if self.callback_target is None:
            logger.info("no callbacks are sent: ORDER_CALLBACK_URL is not set")
        else:
            if (warning := await check_target(self.callback_target)) is not None:
                logger.warning(warning)
            origin, signed = self.callback_target.url.origin, self.callback_target.signed
            logger.info("callbacks are sent to {}, {}", origin, signed)
        if self.status_target is not None:
            await check_status_target(self.status_target)

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
        await self.accounts.stop()
        with suppress(TimeoutError):
            async with asyncio.timeout(timeout_s * 0.3):
                await self.gateways.close()
                await self.hints.close()
                await self.database.close()
                await self.health.close()


@contextmanager
def starting() -> Iterator[None]:
    """Around what must succeed before a process is of any use: if it fails, StartError says why."""
    try:
        yield
    except StartError:
        raise
    except Exception as error:
        raise StartError(f"the service cannot start: {told(error)}") from error


def stop_signals() -> list[signal.Signals]:
    """Upon these a process stops in order. SIGHUP comes when the terminal is closed, and is none if
    it was to be ignored (nohup)."""
    is_ignored = signal.getsignal(signal.SIGHUP) is signal.SIG_IGN
    return [signal.SIGTERM, signal.SIGINT, *([] if is_ignored else [signal.SIGHUP])]


def build_followers(
    settings: Settings,
    database: Database,
    telemetry: Telemetry,
    outbox_applied: Callable[[], None] | None = None,
    declines_may_turn_s: Mapping[str, float] | None = None,
) -> list[Follower]:
    """The followers that this process may run, not started: one for each projection.

    Without ORDER_CALLBACK_URL there is none for callbacks. `declines_may_turn_s` is the
    providers'; `outbox_applied` is called when it has written something.
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
    target: Target | None,
    database: Database,
    telemetry: Telemetry,
    suspected: Callable[[], None] | None = None,
) -> Dispatcher | None:
    """What sends callbacks to the target, not started; None without one. `suspected` as of
    Dispatcher."""
    if target is None:
        return None
    endpoint, days = build_endpoint(settings, target), settings.callback_retention_days
    return Dispatcher(database.connect, endpoint, telemetry, days, suspected=suspected)


def build_endpoint(settings: Settings, target: Target) -> "Endpoint":
    """What callbacks are sent with, not opened."""
    from payments.order_service.endpoint import Endpoint

    return Endpoint(target, timeout_s=settings.callback_timeout_s, connections_max=CONCURRENCY_MAX)


def build_checking(
    settings: Settings,
    status_target: Target | None,
    database: Database,
    give_back: GiveBack | None = None,
) -> Checking | None:
    """What finds out whether orders were fulfilled, not started; None if nobody is called back and
    nobody can be asked."""
    if settings.order_callback_url is None and status_target is None:
        return None
    status = build_order_status(status_target) if status_target is not None else None
    return Checking(database, status, settings.callback_retention_days, give_back=give_back)


def build_order_status(target: Target) -> OrderStatus:
    """What is asked about orders, not opened."""
    from payments.order_service.endpoint import Endpoint

    return OrderStatus(
        target, Endpoint(target, timeout_s=STATUS_TIMEOUT_S, connections_max=CHECKS_MAX)
    )


async def check_status_target(target: Target) -> None:
    """Looks at that of ORDER_STATUS_URL before it is used; StartError."""
    if (warning := await check_target(target)) is not None:
        logger.warning(warning)
    logger.info("order statuses are read from {}", target.url.origin)
