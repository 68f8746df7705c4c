"""All metrics of the service.

Metric names and labels are an interface for dashboards and alerts. Labels never contain ids, keys,
paths or anything else that grows with the number of payments.
"""

import importlib.metadata
import platform
import time
from collections.abc import Callable, Iterable
from itertools import product
from typing import Any, TypeVar

import prometheus_client
import psutil
from prometheus_client import (
    CollectorRegistry,
    Counter,
    Gauge,
    Histogram,
    Info,
    ProcessCollector,
    generate_latest,
)
from prometheus_client.exposition import CONTENT_TYPE_PLAIN_0_0_4
from prometheus_client.openmetrics import exposition as openmetrics

from payments.money import DEFAULT_CURRENCY
from payments.observability.gateway_metrics import GatewayFamilies

Metric = TypeVar("Metric", Counter, Gauge, Histogram)
Value = TypeVar("Value", str, tuple[str, str])

_SECONDS = (0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 7.5)

CHARGE_OUTCOMES = (
    *("success", "failed", "pending", "replayed", "refused", "unavailable", "client_gone"),
)
REFUND_OUTCOMES = ("success", "failed", "pending", "replayed", "refused", "unavailable")
UNSETTLED_KINDS = ("charge", "abandoned", "declined", "late_capture", "refund")
STANDBYS = ("synchronous", "asynchronous")
SETTLING_OUTCOMES = ("settled", "open", "unknown", "mismatch", "other_gateway")
FOLLOWERS = ("payments", "callbacks", "seals")
CALLBACK_OUTCOMES = (*("delivered", "gone", "http_error", "unreachable", "timeout", "end_unknown"),)
UNFULFILLED_STATES = ("suspect", "silent", "unfulfilled", "paid_twice")
BREAKER_STATES = ("closed", "open", "half_open")
APPEND_FAILURES = ("retried", "refused")
AMOUNTS = ("captured", "refunded")
NOTIFICATIONS = ("sent", "failed")
POOL_STATES = ("used", "idle", "waited_for")


class _WhileKnown(CollectorRegistry):
    """Metrics that are omitted while this process does not know them: an old value would look
    healthy."""

    known = False

    def collect(self) -> Iterable[prometheus_client.Metric]:
        return super().collect() if self.known else ()


class Telemetry:
    """The metrics of one service, in their own registry.

    A metric with fixed label values is a dict from these to its children: all series exist from
    the first scrape, and counting needs no lookup. Metrics from the database are present while it
    responds: see `observed`.
    """

    content_type = CONTENT_TYPE_PLAIN_0_0_4
    openmetrics_content_type = openmetrics.CONTENT_TYPE_LATEST

    def __init__(self) -> None:
        prometheus_client.disable_created_metrics()  # type: ignore[no-untyped-call]
        self.registry = registry = CollectorRegistry()
        self._of_database = _WhileKnown()
        self._of_dispatcher = _WhileKnown()
        self._observed_at = time.monotonic()
        registry.register(self._of_database)
        registry.register(self._of_dispatcher)
        Info("payments_build", "Versions of the service and of Python", registry=registry).info(
            {
                "version": importlib.metadata.version("payment-service"),
                "python": platform.python_version(),
            }
        )
        self.role = Gauge(
            "payments_process_role",
            "api: serves requests; work: follows the log, settles payments and sends callbacks",
            ["role"],
            registry=registry,
        )
        self._add_request_metrics(registry)
        self._add_command_metrics(registry)
        self._add_follower_metrics()
        self._add_open_payment_metrics()
        gateways = GatewayFamilies(registry, _SECONDS)
        self.of_gateway, self.hints_of_gateway = gateways.of, gateways.hints_of
        self._add_append_metrics(registry)
        self._add_database_metrics(registry)
        self._add_callback_metrics(registry)
        self._add_process_gauges(psutil.Process())

    def _add_request_metrics(self, registry: CollectorRegistry) -> None:
        self.requests = Counter(
            "http_requests",
            "HTTP responses by method, route and status",
            ["method", "route", "status"],
            registry=registry,
        )
        self.request_seconds = Histogram(
            "http_request_duration_seconds",
            "Time from the first byte of a request to the end of its response",
            ["method", "route"],
            buckets=_SECONDS,
            registry=registry,
        )
        self.problems = Counter(
            "http_problems",
            "Responses with a status of 400 or above, by problem code",
            ["code"],
            registry=registry,
        )
        self.refusals = Counter(
            "http_requests_refused",
            "Requests rejected early with 503, since too many were in progress",
            registry=registry,
        )
        self.open_refusals = Counter(
            "http_requests_refused_open",
            "Requests to paths without an API key that were rejected early with 503",
            registry=registry,
        )

    def _add_command_metrics(self, registry: CollectorRegistry) -> None:
        self.charges = self._labelled(
            Counter,
            "payments_charges",
            "Charge requests by outcome",
            ["outcome"],
            CHARGE_OUTCOMES,
        )
        self.refunds = self._labelled(
            Counter,
            "payments_refunds",
            "Refund requests by outcome",
            ["outcome"],
            REFUND_OUTCOMES,
        )
        # Of 160 currencies most services need one, so each gets its series at its first use.
        self.amounts = Counter(
            "payments_amount_minor_units",
            "Captured and refunded amounts, as recorded by this process",
            ["kind", "currency"],
            registry=registry,
        )
        for kind in AMOUNTS:
            self.amounts.labels(kind, DEFAULT_CURRENCY)
        self.settling = self._labelled(
            Counter,
            "payments_settling_attempts",
            "Attempts to settle a payment, by what is unsettled and by outcome",
            ["kind", "outcome"],
            product(UNSETTLED_KINDS, SETTLING_OUTCOMES),
        )
        self.mismatches = self._labelled(
            Counter,
            "payments_provider_mismatches",
            "Provider responses that contradict the request or the recorded events",
            ["operation"],
            ("charge", "refund"),
        )

    def _add_append_metrics(self, registry: CollectorRegistry) -> None:
        self.append_batch_size = Histogram(
            "payments_append_batch_size",
            "Appends per transaction",
            buckets=(1, 2, 4, 8, 16, 32, 64, 128, 256),
            registry=registry,
        )
        self.append_seconds = Histogram(
            "payments_append_duration_seconds",
            "Time to write one batch of appends to the event store",
            buckets=_SECONDS,
            registry=registry,
        )
        self.append_failures = self._labelled(
            Counter,
            "payments_append_failures",
            "Batches of appends that were retried, and single appends that were rejected",
            ["kind"],
            APPEND_FAILURES,
        )
        self.append_backlog = Gauge(
            "payments_append_backlog",
            "Appends that are waiting or being written",
            registry=registry,
        )
        self.append_oldest_age = Gauge(
            "payments_append_oldest_age_seconds",
            "Age of the oldest append that is waiting or being written",
            registry=registry,
        )
        self.notifications = self._labelled(
            Counter,
            "payments_notifications",
            "NOTIFY statements that inform other processes of new events",
            ["outcome"],
            NOTIFICATIONS,
        )
        self.database_pool = self._labelled(
            Gauge,
            "payments_database_pool_connections",
            "Read connections in use and idle, and requests that wait for one",
            ["state"],
            POOL_STATES,
        )

    def _labelled(
        self,
        kind: type[Metric],
        name: str,
        text: str,
        labels: list[str],
        values: Iterable[Value],
        *,
        registry: CollectorRegistry | None = None,
        **options: Any,
    ) -> dict[Value, Metric]:
        """A metric's children, by the value of its label, or by the tuple of its labels' values."""
        metric = kind(name, text, labels, registry=registry or self.registry, **options)
        return {
            value: metric.labels(*(value if isinstance(value, tuple) else (value,)))
            for value in values
        }

    def _add_database_metrics(self, registry: CollectorRegistry) -> None:
        self._database_up = Gauge(
            "payments_database_up",
            "1 if the database responded to this scrape; if 0, metrics read from it are omitted",
            registry=registry,
        )
        Gauge(
            "payments_database_refresh_age_seconds",
            "Time since the database last responded to a scrape, or since the start",
            registry=registry,
        ).set_function(lambda: time.monotonic() - self._observed_at)
        # The state that this process acts upon, even without a database.
        self.log_rewound = Gauge(
            "payments_log_rewound",
            "1 while the log lacks acknowledged events and no operator has accepted the loss",
            registry=registry,
        )
        self._add_server_metrics(self._of_database)

    def _add_server_metrics(self, registry: CollectorRegistry) -> None:
        """Read from the database at each scrape: queries/server.py."""
        self.read_only = Gauge(
            "payments_database_read_only",
            "1 while the database rejects writes or is a standby",
            registry=registry,
        )
        self.standbys = self._labelled(
            Gauge,
            "payments_database_standbys",
            "Standbys of the database; a failover to an asynchronous one may lose events",
            ["kind"],
            STANDBYS,
            registry=registry,
        )
        self.clock_skew = Gauge(
            "payments_clock_skew_seconds",
            "Clock of the database minus clock of this process",
            registry=registry,
        )
        self.log_ahead = Gauge(
            "payments_log_ahead_seconds",
            "Time of the log's last event minus clock of the database, 0 if negative",
            registry=registry,
        )
        self.horizon_age = Gauge(
            "payments_database_horizon_age_seconds",
            "For at least how long a session or slot has kept vacuum from removing dead rows",
            registry=registry,
        )
        self.notification_queue = Gauge(
            "payments_database_notification_queue_ratio",
            "Fill level of the server's queue of unread notifications, 0 to 1",
            registry=registry,
        )

    def _add_callback_metrics(self, registry: CollectorRegistry) -> None:
        self.callback_attempts = self._labelled(
            Counter,
            "payments_callback_attempts",
            "Attempts to send a callback to Order Service, by outcome",
            ["outcome"],
            CALLBACK_OUTCOMES,
        )
        self.callback_seconds = Histogram(
            "payments_callback_duration_seconds",
            "Duration of one callback attempt",
            buckets=(*_SECONDS, 15, 30),
            registry=registry,
        )
        # Read from the database at each scrape: queries/callbacks.py.
        self.callbacks_due = Gauge(
            "payments_callbacks_due",
            "Callbacks that are due and not delivered yet",
            registry=self._of_database,
        )
        self.callbacks_dead = Gauge(
            "payments_callbacks_dead",
            "Dead callbacks, which are not sent until an operator redrives them",
            registry=self._of_database,
        )
        self.callbacks_oldest_age = Gauge(
            "payments_callbacks_oldest_age_seconds",
            "Time since the oldest due callback became due",
            registry=self._of_database,
        )
        self.callback_breaker = self._labelled(
            Gauge,
            "payments_callback_breaker_state",
            "1 for the current state of this process's circuit breaker, 0 for the others",
            ["state"],
            BREAKER_STATES,
            registry=self._of_dispatcher,
        )
        self._add_fulfilment_metrics()

    def _add_fulfilment_metrics(self) -> None:
        """Read from the database at each scrape: queries/fulfilments.py, up to its COUNTED_MAX."""
        self.unfulfilled = self._labelled(
            Gauge,
            "payments_unfulfilled",
            "Captured payments whose order may not be fulfilled, up to 10,000 per state",
            ["state"],
            UNFULFILLED_STATES,
            registry=self._of_database,
        )
        self.unfulfilled_age = self._labelled(
            Gauge,
            "payments_unfulfilled_oldest_age_seconds",
            "Time since the oldest payment in payments_unfulfilled was found",
            ["state"],
            UNFULFILLED_STATES,
            registry=self._of_database,
        )

    def _add_follower_metrics(self) -> None:
        self.follower_applied = self._labelled(
            Counter,
            "payments_follower_applied_events",
            "Events that a follower of this process applied",
            ["follower"],
            FOLLOWERS,
        )
        self.follower_seconds = self._labelled(
            Histogram,
            "payments_follower_batch_duration_seconds",
            "Time to read, apply and commit one batch of events",
            ["follower"],
            FOLLOWERS,
            buckets=_SECONDS,
        )
        # Read from the database at each scrape: queries/followers.py.
        known = self._of_database
        self.follower_lag = self._labelled(
            Gauge,
            "payments_follower_lag_events",
            "Events that a follower has not applied yet",
            ["follower"],
            FOLLOWERS,
            registry=known,
        )
        self.follower_lag_seconds = self._labelled(
            Gauge,
            "payments_follower_lag_seconds",
            "Age of the oldest event that a follower has not applied yet",
            ["follower"],
            FOLLOWERS,
            registry=known,
        )
        self.parked_streams = self._labelled(
            Gauge,
            "payments_parked_streams",
            "Parked payments: a follower cannot apply an event of theirs and skips them",
            ["follower"],
            FOLLOWERS,
            registry=known,
        )

    def _add_open_payment_metrics(self) -> None:
        known = self._of_database
        self.unsettled = self._labelled(
            Gauge,
            "payments_unsettled",
            "Payments whose charge, refund or late capture is unsettled",
            ["kind"],
            UNSETTLED_KINDS,
            registry=known,
        )
        self.unsettled_age = self._labelled(
            Gauge,
            "payments_unsettled_oldest_age_seconds",
            "Age of the oldest unsettled payment, mismatches excluded",
            ["kind"],
            UNSETTLED_KINDS,
            registry=known,
        )
        # Only the log knows which providers there were: each has a series once one is found.
        self.unconfigured = Gauge(
            "payments_unsettled_unconfigured",
            "Unsettled payments of providers that are not configured, as settling found them",
            ["gateway"],
            registry=known,
        )
        self.pending = Gauge("payments_pending", "Payments with status PENDING", registry=known)
        self.pending_age = Gauge(
            "payments_pending_oldest_age_seconds",
            "Age of the oldest payment with status PENDING, mismatches excluded",
            registry=known,
        )

        self.giving_back_stopped = Gauge(
            "payments_giving_back_stopped",
            "1 while automatic refunds (UNFULFILLED=refund) are stopped: there were too many",
            registry=known,
        )

    def observed(self, *, up: bool) -> None:
        """Sets whether the metrics from the database are up to date now, and so are exposed."""
        self._database_up.set(up)
        self._of_database.known = up
        if up:
            self._observed_at = time.monotonic()

    def dispatches(self) -> None:
        """Exposes the metrics of the dispatcher, since this process has one."""
        self._of_dispatcher.known = True

    def _add_process_gauges(self, process: psutil.Process) -> None:
        """The standard process metrics, and CPU, memory, uptime and timestamp as documented for
        /metrics."""
        standard = ProcessCollector(registry=self.registry)
        known = {metric.name for metric in standard.collect()}  # none without /proc
        started = process.create_time()
        self._documented: dict[str, Callable[[], float]] = {
            "cpu_load": _cpu_load,
            "memory": lambda: process.memory_info().rss,
            "heap": _heap_bytes,
            "uptime": lambda: time.time() - started,
            "timestamp": time.time,
        }
        for documented, name, text in (
            ("cpu_load", "process_cpu_load_ratio", "CPU load per core, averaged over one minute"),
            ("memory", "process_resident_memory_bytes", "Resident memory in bytes"),
            ("heap", "process_heap_bytes", "Heap of the C library in bytes; 0 if unknown"),
            ("uptime", "process_uptime_seconds", "Time since the process started"),
            ("timestamp", "process_timestamp_seconds", "Current Unix time"),
        ):
            if name not in known:
                gauge = Gauge(name, text, registry=self.registry)
                gauge.set_function(self._documented[documented])

    def documented(self) -> dict[str, float]:
        """The five values of the JSON form of /metrics: a load per core, bytes, bytes, seconds, and
        Unix time."""
        return {name: value() for name, value in self._documented.items()}

    def exposition(self) -> bytes:
        """All metrics in the Prometheus text format 0.0.4."""
        return generate_latest(self.registry)

    def openmetrics(self) -> bytes:
        """The same as OpenMetrics 1.0."""
        text: bytes = openmetrics.generate_latest(self.registry)  # type: ignore[no-untyped-call]
        return text


def _cpu_load() -> float:
    return float(psutil.getloadavg()[0] / (psutil.cpu_count() or 1))


def _heap_bytes() -> float:
    try:
        heap = psutil.heap_info()
    except (AttributeError, OSError):  # not available in every C library
        return 0.0
    return float(heap.heap_used + heap.mmap_used)
