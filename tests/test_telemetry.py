"""Metrics: all there from the first scrape."""

import importlib.metadata
import os
from datetime import UTC, datetime

import psutil
import pytest
from prometheus_client import ProcessCollector
from prometheus_client.metrics_core import Metric
from prometheus_client.openmetrics.parser import (
    text_string_to_metric_families as parse_openmetrics,
)
from prometheus_client.parser import text_string_to_metric_families

from payments.observability.gateway_metrics import (
    GATEWAY_NOT_ANSWERED,
    GATEWAY_OUTCOMES,
    GATEWAY_TIMED,
    HINT_RESULTS,
)
from payments.observability.metrics import (
    BREAKER_STATES,
    CALLBACK_OUTCOMES,
    CHARGE_OUTCOMES,
    FOLLOWERS,
    REFUND_OUTCOMES,
    SETTLING_OUTCOMES,
    UNSETTLED_KINDS,
    Telemetry,
)


@pytest.fixture
def telemetry() -> Telemetry:
    """Of a process that sees the database, follows and calls back."""
    telemetry = Telemetry()
    telemetry.observed(up=True)
    telemetry.dispatches()
    telemetry.role.labels("work").set(1)
    telemetry.of_gateway("simulated", lambda: False)
    telemetry.hints_of_gateway("acme")
    telemetry.unconfigured.labels("acme").set(1)
    return telemetry


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

    def test_all_label_sets_are_there_from_the_first_scrape(self, telemetry: Telemetry) -> None:
        found = families(telemetry)
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
            ("simulated", operation, outcome)
            for operation, outcomes in GATEWAY_OUTCOMES.items()
            for outcome in (*outcomes, *GATEWAY_NOT_ANSWERED)
        }
        seconds = found["payments_gateway_call_duration_seconds"]
        assert label_sets(seconds, "_count") == {
            ("simulated", operation) for operation in GATEWAY_TIMED
        }
        assert label_sets(found["payments_gateway_breaker_open"], "") == {("simulated",)}
        hints = label_sets(found["payments_provider_hints"], "_total")
        assert hints == {("acme", result) for result in HINT_RESULTS}
        failures = found["payments_append_failures"]
        assert label_sets(failures, "_total") == {("retried",), ("refused",)}

    def test_no_payment_metric_is_without_samples(self, telemetry: Telemetry) -> None:
        for name, family in families(telemetry).items():
            if name.startswith("payments_"):
                assert family.samples, name

    def test_counters_begin_at_zero(self) -> None:
        for family in families(Telemetry()).values():
            if family.type == "counter" and not family.name.startswith("process_"):
                assert all(s.value == 0 for s in family.samples if s.name.endswith("_total"))

    def test_labels_are_few_and_never_ids(self, telemetry: Telemetry) -> None:
        telemetry.problems.labels("too_busy")
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
            "gateway",
            "result",
            "kind",
            "currency",
            "follower",
            "state",
            "le",
            "code",
            "role",
            "version",
            "python",
        }
        assert used == names

    def test_a_scrape_is_short(self, telemetry: Telemetry) -> None:
        """Of 160 currencies only those have series that were used."""
        lines = telemetry.exposition().decode().splitlines()
        assert len(lines) < 500
        amounts = families(telemetry)["payments_amount_minor_units"]
        assert {sample.labels["currency"] for sample in amounts.samples} == {"INR"}

    def test_what_runs_is_told(self, telemetry: Telemetry) -> None:
        (sample,) = families(telemetry)["payments_build_info"].samples
        assert sample.labels["version"] == importlib.metadata.version("payment-service")
        assert sample.value == 1

    def test_what_is_not_known_is_left_out(self, telemetry: Telemetry) -> None:
        """It would stand still and look fresh."""
        of_database = set(families(telemetry))
        telemetry.observed(up=False)
        left_out = of_database - set(families(telemetry))
        assert {"payments_pending", "payments_follower_lag_seconds"} < left_out
        assert {"payments_callbacks_dead", "payments_clock_skew_seconds"} < left_out
        assert {"payments_log_rewound", "payments_callback_breaker_state"} < of_database - left_out
        telemetry.observed(up=True)
        assert set(families(telemetry)) == of_database
        assert left_out.isdisjoint(families(Telemetry()))  # nor before the first answer

    @pytest.mark.parametrize("route", ['a"b', "a\nb", "a\\b", "{payment_id}", "é"])
    def test_label_values_survive_the_format(self, route: str) -> None:
        telemetry = Telemetry()
        telemetry.requests.labels("GET", route, "200").inc()
        assert label_sets(families(telemetry)["http_requests"], "_total") == {("GET", route, "200")}

    def test_the_process_is_described(self, telemetry: Telemetry) -> None:
        found = families(telemetry)
        values = {name: f.samples[0].value for name, f in found.items() if f.type == "gauge"}
        assert values["process_resident_memory_bytes"] > 1_000_000
        assert 0 < values["process_uptime_seconds"] < 86_400
        now = datetime.now(UTC).timestamp()
        assert values["process_timestamp_seconds"] == pytest.approx(now, abs=60)
        assert values["process_cpu_load_ratio"] >= 0

    @pytest.mark.parametrize("openmetrics", [False, True])
    def test_the_standard_process_metrics_are_those_of_this_process(
        self, telemetry: Telemetry, openmetrics: bool
    ) -> None:
        text = (telemetry.openmetrics() if openmetrics else telemetry.exposition()).decode()
        parse = parse_openmetrics if openmetrics else text_string_to_metric_families
        samples = [sample for family in parse(text) for sample in family.samples]
        values = {sample.name: sample.value for sample in samples if "process" in sample.name}
        names = [sample.name for sample in samples if not sample.labels]
        assert len(names) == len(set(names))
        process, took = psutil.Process(), os.times()
        assert 0 < values["process_cpu_seconds_total"] <= took.user + took.system + 0.1
        started = values["process_start_time_seconds"]
        assert started == pytest.approx(process.create_time(), abs=2)
        assert values["process_open_fds"] == pytest.approx(process.num_fds(), abs=20)
        assert values["process_max_fds"] == process.rlimit(psutil.RLIMIT_NOFILE)[0]
        memory = process.memory_info()
        assert values["process_resident_memory_bytes"] == pytest.approx(memory.rss, rel=0.5)
        assert values["process_virtual_memory_bytes"] == pytest.approx(memory.vms, rel=0.5)

    def test_without_proc_resident_memory_is_told_all_the_same(
        self, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setattr(ProcessCollector, "collect", lambda _: [])
        found = families(Telemetry())
        assert found["process_resident_memory_bytes"].samples[0].value > 1_000_000
        assert "process_open_fds" not in found

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
