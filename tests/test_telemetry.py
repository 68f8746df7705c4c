"""Metrics: all there from the first scrape."""

from datetime import UTC, datetime

import pytest
from prometheus_client.metrics_core import Metric
from prometheus_client.parser import text_string_to_metric_families

from payments.telemetry import (
    BREAKER_STATES,
    CALLBACK_OUTCOMES,
    CHARGE_OUTCOMES,
    FOLLOWERS,
    GATEWAY_OPERATIONS,
    GATEWAY_OUTCOMES,
    REFUND_OUTCOMES,
    SETTLING_OUTCOMES,
    UNSETTLED_KINDS,
    Telemetry,
)


def families(telemetry: Telemetry) -> dict[str, Metric]:
    text = telemetry.exposition().decode("utf-8")
    return {family.name: family for family in text_string_to_metric_families(text)}


def label_sets(family: Metric, suffix: str = "") -> set[tuple[str, ...]]:
    name = family.name + suffix
    return {tuple(s.labels.values()) for s in family.samples if s.name == name}


class TestMetrics:
    def test_the_exposition_parses(self) -> None:
        found = families(Telemetry())
        assert {
            "http_requests": "counter",
            "http_request_duration_seconds": "histogram",
            "payments_charges": "counter",
            "payments_gateway_calls": "counter",
            "payments_gateway_call_duration_seconds": "histogram",
            "payments_append_batch_size": "histogram",
            "payments_append_duration_seconds": "histogram",
            "payments_append_failures": "counter",
            "payments_append_backlog": "gauge",
            "payments_append_oldest_age_seconds": "gauge",
            "process_cpu_load_ratio": "gauge",
            "process_resident_memory_bytes": "gauge",
            "process_uptime_seconds": "gauge",
            "process_timestamp_seconds": "gauge",
        }.items() <= {name: family.type for name, family in found.items()}.items()
        assert all(family.documentation for family in found.values())

    def test_the_content_type_is_that_of_the_format(self) -> None:
        assert Telemetry.content_type.startswith("text/plain; version=0.0.4")

    def test_all_label_sets_are_there_from_the_first_scrape(self) -> None:
        found = families(Telemetry())
        operations = GATEWAY_OPERATIONS
        assert label_sets(found["payments_charges"], "_total") == {(o,) for o in CHARGE_OUTCOMES}
        assert label_sets(found["payments_refunds"], "_total") == {(o,) for o in REFUND_OUTCOMES}
        assert label_sets(found["payments_settling_attempts"], "_total") == {
            (kind, outcome) for kind in UNSETTLED_KINDS for outcome in SETTLING_OUTCOMES
        }
        for name in ("payments_unsettled", "payments_unsettled_oldest_age_seconds"):
            assert label_sets(found[name], "") == {(kind,) for kind in UNSETTLED_KINDS}
        attempts = label_sets(found["payments_callback_attempts"], "_total")
        assert attempts == {(outcome,) for outcome in CALLBACK_OUTCOMES}
        breaker = label_sets(found["payments_callback_breaker_state"], "")
        assert breaker == {(state,) for state in BREAKER_STATES}
        for name in ("payments_callbacks_due", "payments_callbacks_dead"):
            assert label_sets(found[name], "") == {()}
        for name in ("payments_follower_lag_events", "payments_parked_streams"):
            assert label_sets(found[name], "") == {(follower,) for follower in FOLLOWERS}
        mismatches = found["payments_provider_mismatches"]
        assert label_sets(mismatches, "_total") == {("charge",), ("refund",)}
        assert label_sets(found["payments_gateway_calls"], "_total") == {
            (operation, outcome) for operation in operations for outcome in GATEWAY_OUTCOMES
        }
        seconds = found["payments_gateway_call_duration_seconds"]
        assert label_sets(seconds, "_count") == {(operation,) for operation in operations}
        failures = found["payments_append_failures"]
        assert label_sets(failures, "_total") == {("retried",), ("refused",)}

    def test_no_payment_metric_is_without_samples(self) -> None:
        for name, family in families(Telemetry()).items():
            if name.startswith("payments_"):
                assert family.samples, name

    def test_counters_begin_at_zero(self) -> None:
        for family in families(Telemetry()).values():
            if family.type == "counter":
                assert all(s.value == 0 for s in family.samples if s.name.endswith("_total"))

    def test_labels_are_few_and_never_ids(self) -> None:
        telemetry = Telemetry()
        telemetry.requests.labels("POST", "/v1/charge", "201").inc()
        telemetry.request_seconds.labels("POST", "/v1/charge").observe(0.01)
        used = {
            label
            for family in families(telemetry).values()
            for sample in family.samples
            for label in sample.labels
        }
        names = {
            "method",
            "route",
            "status",
            "outcome",
            "operation",
            "kind",
            "currency",
            "follower",
            "state",
            "le",
        }
        assert used == names

    @pytest.mark.parametrize("route", ['a"b', "a\nb", "a\\b", "{payment_id}", "é"])
    def test_label_values_survive_the_format(self, route: str) -> None:
        telemetry = Telemetry()
        telemetry.requests.labels("GET", route, "200").inc()
        assert label_sets(families(telemetry)["http_requests"], "_total") == {("GET", route, "200")}

    def test_the_process_is_described(self) -> None:
        found = families(Telemetry())
        values = {name: f.samples[0].value for name, f in found.items() if f.type == "gauge"}
        assert values["process_resident_memory_bytes"] > 1_000_000
        assert 0 < values["process_uptime_seconds"] < 86_400
        now = datetime.now(UTC).timestamp()
        assert values["process_timestamp_seconds"] == pytest.approx(now, abs=60)
        assert values["process_cpu_load_ratio"] >= 0

    def test_every_service_counts_for_itself(self) -> None:
        one, other = Telemetry(), Telemetry()
        one.charges["success"].inc()
        (counted,) = [
            s.value
            for s in families(one)["payments_charges"].samples
            if s.name.endswith("_total") and s.labels == {"outcome": "success"}
        ]
        assert counted == 1
        assert all(
            s.value == 0
            for s in families(other)["payments_charges"].samples
            if s.name.endswith("_total")
        )
