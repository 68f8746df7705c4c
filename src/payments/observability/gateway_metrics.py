"""The metrics of the payment providers, each of which has series of its own."""

from collections.abc import Callable, Sequence
from typing import NamedTuple

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram

# What a provider may answer to each call, and what may become of any.
GATEWAY_OUTCOMES = {
    "account": ("named", "not_found"),
    "prepare": ("named", "declined"),
    "charge": ("approved", "declined", "open"),
    "find_charge": ("approved", "declined", "open", "not_found"),
    "cancel": ("approved", "declined", "open", "not_found"),
    "refund": ("approved", "declined"),
    "find_refund": ("approved", "declined", "not_found"),
}
GATEWAY_NOT_ANSWERED = ("unknown", "never_sent", "not_called")
HINT_RESULTS = (*("accepted", "duplicate", "unknown", "ignored", "bad_signature", "unavailable"),)
GATEWAY_TIMED = tuple(operation for operation in GATEWAY_OUTCOMES if operation != "account")


class GatewayMetrics(NamedTuple):
    """Of one provider: by operation and outcome, and by operation."""

    calls: dict[tuple[str, str], Counter]
    seconds: dict[str, Histogram]


class GatewayFamilies:
    """Of all of them."""

    def __init__(self, registry: CollectorRegistry, buckets: Sequence[float]) -> None:
        self._calls = Counter(
            "payments_gateway_calls",
            "Calls of a payment provider by what came of them",
            ["gateway", "operation", "outcome"],
            registry=registry,
        )
        self._seconds = Histogram(
            "payments_gateway_call_duration_seconds",
            "Duration of provider calls that had an outcome",
            ["gateway", "operation"],
            buckets=buckets,
            registry=registry,
        )
        self._breakers = Gauge(
            "payments_gateway_breaker_open",
            "1 while this process begins nothing new at the provider, since it is down",
            ["gateway"],
            registry=registry,
        )
        self._hints = Counter(
            "payments_provider_hints",
            "Webhooks of a payment provider by what they came to",
            ["gateway", "result"],
            registry=registry,
        )

    def hints_of(self, name: str) -> dict[str, Counter]:
        """The series of one provider that sends webhooks, from now on, by result."""
        return {result: self._hints.labels(name, result) for result in HINT_RESULTS}

    def of(self, name: str, is_down: Callable[[], bool]) -> GatewayMetrics:
        """The series of one provider, from now on; `is_down` is asked at each scrape."""
        self._breakers.labels(name).set_function(is_down)
        return GatewayMetrics(
            calls={
                (operation, outcome): self._calls.labels(name, operation, outcome)
                for operation, outcomes in GATEWAY_OUTCOMES.items()
                for outcome in (*outcomes, *GATEWAY_NOT_ANSWERED)
            },
            seconds={
                operation: self._seconds.labels(name, operation) for operation in GATEWAY_TIMED
            },
        )
