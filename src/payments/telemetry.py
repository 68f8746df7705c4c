"""What the service tells its operators in figures: every metric.

Metric names and labels are an interface: dashboards and alerts name them. Labels never hold ids,
keys, paths or anything else that grows with the number of payments.
"""

import time
from collections.abc import Callable, Iterable
from itertools import product
from typing import TypeVar

import psutil
from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, generate_latest
from prometheus_client.exposition import CONTENT_TYPE_PLAIN_0_0_4
from prometheus_client.openmetrics import exposition as openmetrics

from payments.money import DECIMALS

Metric = TypeVar("Metric", Counter, Gauge, Histogram)
Value = TypeVar("Value", str, tuple[str, str])

_SECONDS = (0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 7.5)

CHARGE_OUTCOMES = ("success", "failed", "pending", "replayed", "refused", "unavailable")
REFUND_OUTCOMES = ("success", "failed", "pending", "replayed", "refused", "unavailable")
UNSETTLED_KINDS = ("charge", "abandoned", "late_capture", "refund")
SETTLING_OUTCOMES = ("settled", "open", "unknown", "mismatch", "other_gateway")
FOLLOWERS = ("payments", "callbacks", "seals")
GATEWAY_OPERATIONS = ("charge", "find_charge", "refund", "find_refund")
GATEWAY_OUTCOMES = ("approved", "declined", "not_found", "unknown", "never_sent")
CALLBACK_OUTCOMES = ("delivered", "gone", "http_error", "unreachable", "timeout")
BREAKER_STATES = ("closed", "open", "half_open")
APPEND_FAILURES = ("retried", "refused")
AMOUNTS = ("captured", "refunded")
POOL_STATES = ("used", "idle", "waited_for")


class Telemetry:
    """The metrics of one service, in a registry of their own.

    A metric with fixed label values is a dict from these to its children: all series exist from
    the first scrape, and counting looks nothing up.
    """

    content_type = CONTENT_TYPE_PLAIN_0_0_4
    openmetrics_content_type = openmetrics.CONTENT_TYPE_LATEST

    def __init__(self) -> None:
        self.registry = registry = CollectorRegistry()
        self.requests = Counter(
            "http_requests",
            "Requests answered",
            ["method", "route", "status"],
            registry=registry,
        )
        self.request_seconds = Histogram(
            "http_request_duration_seconds",
            "From the first byte of a request to the end of its answer",
            ["method", "route"],
            buckets=_SECONDS,
            registry=registry,
        )
        self.refusals = Counter(
            "http_requests_refused",
            "Requests refused with 503 before they were read, since too many were under way",
            registry=registry,
        )
        charges = Counter(
            "payments_charges", "Charge requests by their answer", ["outcome"], registry=registry
        )
        self.charges = _by_label(charges, CHARGE_OUTCOMES)
        refunds = Counter(
            "payments_refunds", "Refund requests by their answer", ["outcome"], registry=registry
        )
        self.refunds = _by_label(refunds, REFUND_OUTCOMES)
        amounts = Counter(
            "payments_amount_minor_units",
            "Money that the provider captured or gave back, as this process recorded it",
            ["kind", "currency"],
            registry=registry,
        )
        self.amounts = _by_label(amounts, product(AMOUNTS, DECIMALS))
        settling = Counter(
            "payments_settling_attempts",
            "Attempts to settle an open payment by what was open and what came of it",
            ["kind", "outcome"],
            registry=registry,
        )
        self.settling = _by_label(settling, product(UNSETTLED_KINDS, SETTLING_OUTCOMES))
        mismatches = Counter(
            "payments_provider_mismatches",
            "Answers of the provider that do not fit what was asked, or contradict the events",
            ["operation"],
            registry=registry,
        )
        self.mismatches = _by_label(mismatches, ("charge", "refund"))
        self._add_follower_metrics(registry)
        gateway_calls = Counter(
            "payments_gateway_calls",
            "Calls of the payment provider by what came of them",
            ["operation", "outcome"],
            registry=registry,
        )
        self.gateway_calls = _by_label(gateway_calls, product(GATEWAY_OPERATIONS, GATEWAY_OUTCOMES))
        gateway_seconds = Histogram(
            "payments_gateway_call_duration_seconds",
            "Duration of answered provider calls",
            ["operation"],
            buckets=_SECONDS,
            registry=registry,
        )
        self.gateway_seconds = _by_label(gateway_seconds, GATEWAY_OPERATIONS)
        self.append_batch_size = Histogram(
            "payments_append_batch_size",
            "Appends written together in one transaction",
            buckets=(1, 2, 4, 8, 16, 32, 64, 128, 256),
            registry=registry,
        )
        self.append_seconds = Histogram(
            "payments_append_duration_seconds",
            "Round trip of one batch to the event store",
            buckets=_SECONDS,
            registry=registry,
        )
        append_failures = Counter(
            "payments_append_failures",
            "Batches that had to be sent again, or single appends that were refused",
            ["kind"],
            registry=registry,
        )
        self.append_failures = _by_label(append_failures, APPEND_FAILURES)
        self.append_backlog = Gauge(
            "payments_append_backlog",
            "Appends that wait for the event store, or are being written",
            registry=registry,
        )
        self.append_oldest_age = Gauge(
            "payments_append_oldest_age_seconds",
            "How long the oldest of them has",
            registry=registry,
        )
        pool = Gauge(
            "payments_database_pool_connections",
            "Connections for reading that are in use, idle, or waited for",
            ["state"],
            registry=registry,
        )
        self.database_pool = _by_label(pool, POOL_STATES)
        self._add_callback_metrics(registry)
        self._add_process_gauges(psutil.Process())

    def _add_callback_metrics(self, registry: CollectorRegistry) -> None:
        attempts = Counter(
            "payments_callback_attempts",
            "Attempts to call Order Service back by what came of them",
            ["outcome"],
            registry=registry,
        )
        self.callback_attempts = _by_label(attempts, CALLBACK_OUTCOMES)
        self.callback_seconds = Histogram(
            "payments_callback_duration_seconds",
            "Duration of one attempt",
            buckets=_SECONDS,
            registry=registry,
        )
        # What the database says, as of the scrape: queries/callbacks.py.
        self.callbacks_due = Gauge(
            "payments_callbacks_due", "Callbacks owed and not delivered yet", registry=registry
        )
        self.callbacks_dead = Gauge(
            "payments_callbacks_dead", "Callbacks given up until redriven", registry=registry
        )
        self.callbacks_oldest_age = Gauge(
            "payments_callbacks_oldest_age_seconds",
            "How long the oldest callback that is due has been",
            registry=registry,
        )
        breaker = Gauge(
            "payments_callback_breaker_state",
            "1 for the state that this process's circuit breaker is in, 0 for the others",
            ["state"],
            registry=registry,
        )
        self.callback_breaker = _by_label(breaker, BREAKER_STATES)

    def _add_follower_metrics(self, registry: CollectorRegistry) -> None:
        def gauges(name: str, text: str, label: str, values: tuple[str, ...]) -> dict[str, Gauge]:
            return _by_label(Gauge(name, text, [label], registry=registry), values)

        applied = Counter(
            "payments_follower_applied_events",
            "Events that this process wrote to a read model",
            ["follower"],
            registry=registry,
        )
        self.follower_applied = _by_label(applied, FOLLOWERS)
        batches = Histogram(
            "payments_follower_batch_duration_seconds",
            "Reading, applying and committing one batch",
            ["follower"],
            buckets=_SECONDS,
            registry=registry,
        )
        self.follower_seconds = _by_label(batches, FOLLOWERS)
        # What the database says, as of the scrape: queries/followers.py.
        self.follower_lag = gauges(
            "payments_follower_lag_events",
            "Events that a read model does not show yet",
            "follower",
            FOLLOWERS,
        )
        self.follower_lag_seconds = gauges(
            "payments_follower_lag_seconds",
            "How long ago the oldest event was recorded that a read model does not show yet",
            "follower",
            FOLLOWERS,
        )
        self.parked_streams = gauges(
            "payments_parked_streams",
            "Streams that a follower could not apply",
            "follower",
            FOLLOWERS,
        )
        self.unsettled = gauges(
            "payments_unsettled", "Payments left open at the provider", "kind", UNSETTLED_KINDS
        )
        self.unsettled_age = gauges(
            "payments_unsettled_oldest_age_seconds",
            "How long the oldest of them has been open",
            "kind",
            UNSETTLED_KINDS,
        )

    def _add_process_gauges(self, process: psutil.Process) -> None:
        """CPU, memory, uptime and timestamp, as documented for /metrics."""
        started = process.create_time()
        self._documented: dict[str, Callable[[], float]] = {
            "cpu_load": _cpu_load,
            "memory": lambda: process.memory_info().rss,
            "heap": _heap_bytes,
            "uptime": lambda: time.time() - started,
            "timestamp": time.time,
        }
        for documented, name, text in (
            ("cpu_load", "process_cpu_load_ratio", "CPU load average of a minute per core"),
            ("memory", "process_resident_memory_bytes", "Resident memory"),
            ("heap", "process_heap_bytes", "What the C library's heap holds; 0 if it does not say"),
            ("uptime", "process_uptime_seconds", "Since the process began"),
            ("timestamp", "process_timestamp_seconds", "Now, as Unix time"),
        ):
            Gauge(name, text, registry=self.registry).set_function(self._documented[documented])

    def documented(self) -> dict[str, float]:
        """The five values that were documented before there was anything else: a load per core,
        bytes, bytes, seconds, and Unix time."""
        return {name: value() for name, value in self._documented.items()}

    def exposition(self) -> bytes:
        """All metrics in the Prometheus text format 0.0.4."""
        return generate_latest(self.registry)

    def openmetrics(self) -> bytes:
        """The same as OpenMetrics 1.0."""
        text: bytes = openmetrics.generate_latest(self.registry)  # type: ignore[no-untyped-call]
        return text


def _by_label(metric: Metric, values: Iterable[Value]) -> dict[Value, Metric]:
    """The child of each label value, or of each tuple of them."""
    return {
        value: metric.labels(*(value if isinstance(value, tuple) else (value,))) for value in values
    }


def _cpu_load() -> float:
    return float(psutil.getloadavg()[0] / (psutil.cpu_count() or 1))


def _heap_bytes() -> float:
    try:
        heap = psutil.heap_info()
    except (AttributeError, OSError):  # not with every C library
        return 0.0
    return float(heap.heap_used + heap.mmap_used)
