"""Logs: one JSON object per line, whatever is logged. Metrics: all there from the first scrape."""

import json
import logging
import sys
from collections.abc import Iterator
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any, Literal
from uuid import UUID

import pytest
from loguru import logger
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
    set_up_logs,
)

CANARY = "canary7391"
HOSTILE = [
    "a\nb",
    "a\r\nb",
    "\n",
    '{"level":"CRITICAL"}\n{}',
    "a\u2028b",
    "\x00",
    "\x1b[31m",
    '"\\',
]


class Logs:
    """What was written to stderr since it was last asked for."""

    def __init__(self, capsys: pytest.CaptureFixture[str]) -> None:
        self._capsys = capsys

    def text(self) -> str:
        captured = self._capsys.readouterr()
        assert captured.out == ""
        return captured.err

    def lines(self) -> list[dict[str, Any]]:
        *lines, rest = self.text().split("\n")
        assert rest == ""
        return [json.loads(line) for line in lines]

    def line(self) -> dict[str, Any]:
        (only,) = self.lines()
        return only


def to_stderr(message: str) -> None:
    sys.stderr.write(message)


@pytest.fixture
def logs(capsys: pytest.CaptureFixture[str]) -> Iterator[Logs]:
    root = logging.getLogger()
    handlers, level = root.handlers[:], root.level
    yield Logs(capsys)
    logger.remove()
    logger.add(to_stderr)
    root.handlers[:] = handlers
    root.setLevel(level)


@pytest.fixture
def json_logs(logs: Logs) -> Logs:
    set_up_logs("json", "INFO")
    return logs


class TestJsonLines:
    def test_a_record(self, json_logs: Logs) -> None:
        logger.bind(payment_id="p-1", amount_cents=1500).warning("charged")
        line = json_logs.line()
        time = datetime.fromisoformat(line.pop("time"))
        assert time.utcoffset() == timedelta(0)
        assert abs(datetime.now(UTC) - time) < timedelta(minutes=1)
        assert line == {
            "level": "WARNING",
            "message": "charged",
            "payment_id": "p-1",
            "amount_cents": 1500,
        }

    @pytest.mark.parametrize("text", HOSTILE)
    def test_a_message_is_one_line(self, json_logs: Logs, text: str) -> None:
        logger.info(text)
        assert json_logs.line()["message"] == text

    @pytest.mark.parametrize("text", HOSTILE)
    def test_a_field_is_on_that_line(self, json_logs: Logs, text: str) -> None:
        logger.bind(given=text, more={text: [text]}).info("refused")
        line = json_logs.line()
        assert (line["given"], line["more"]) == (text, {text: [text]})

    @pytest.mark.parametrize(
        "text", ["{}", "{0}", "{given}", "{", "}", "{{}}", "{record[level]}", "%s", "<red>x</red>"]
    )
    def test_braces_of_users_are_not_expanded(self, json_logs: Logs, text: str) -> None:
        logger.info(text)
        logger.bind(given=text).info("refused")
        logger.info("refused: {}", text)
        logging.getLogger("library").warning(text)
        first, second, third, fourth = json_logs.lines()
        assert first["message"] == text
        assert second["given"] == text
        assert third["message"] == f"refused: {text}"
        assert fourth["message"] == text

    @pytest.mark.parametrize(
        ("value", "shown"),
        [
            (UUID(int=1), "00000000-0000-0000-0000-000000000001"),
            (datetime(2026, 1, 2, tzinfo=UTC), "2026-01-02T00:00:00Z"),
            (Path("/srv"), "/srv"),
            (ValueError("wrong"), "wrong"),
            (10**40, 10**40),
            (float("nan"), None),
            (None, None),
        ],
    )
    def test_fields_of_any_type(self, json_logs: Logs, value: object, shown: object) -> None:
        logger.bind(given=value).info("refused")
        assert json_logs.line()["given"] == shown

    @pytest.mark.parametrize("text", ["\ud800", "a\udcffb"])
    def test_half_a_surrogate_pair_does_not_lose_the_record(
        self, json_logs: Logs, text: str
    ) -> None:
        logger.bind(given=text).info("refused")
        logger.info(text)
        first, second = json_logs.lines()
        assert first["message"] == "refused"
        assert second["level"] == "INFO"

    @pytest.mark.parametrize("name", ["time", "level", "message", "exception"])
    def test_a_field_cannot_pose_as_the_record(self, json_logs: Logs, name: str) -> None:
        logger.bind(**{name: "forged"}).info("refused")
        line = json_logs.line()
        assert line["level"] == "INFO"
        assert line["message"] == "refused"
        assert datetime.fromisoformat(line["time"])

    def test_the_level_is_a_threshold(self, json_logs: Logs) -> None:
        logger.debug("quiet")
        logger.info("loud")
        assert json_logs.line()["message"] == "loud"
        set_up_logs("json", "ERROR")
        logger.warning("quiet now")
        logger.error("loud")
        assert json_logs.line()["level"] == "ERROR"

    def test_setting_up_twice_writes_once(self, json_logs: Logs) -> None:
        set_up_logs("json", "INFO")
        logger.info("once")
        logging.getLogger("library").warning("once")
        assert len(json_logs.lines()) == 2


def fail(secret: str) -> None:
    held = {"password": secret}
    raise RuntimeError(f"failed with {len(held)} secret")


class TestExceptions:
    @pytest.mark.parametrize("format", ["json", "text"])
    def test_no_value_of_a_variable_is_shown(
        self, logs: Logs, format: Literal["json", "text"]
    ) -> None:
        set_up_logs(format, "DEBUG")
        secret = CANARY
        try:
            fail(secret)
        except RuntimeError as error:
            logger.exception("charge failed")
            logger.opt(exception=error).error("charge failed")
            logging.getLogger("library").exception("charge failed")
        text = logs.text()
        assert text.count("RuntimeError: failed with 1 secret") == 3
        assert CANARY not in text

    def test_a_traceback_is_part_of_its_line(self, json_logs: Logs) -> None:
        try:
            fail(CANARY)
        except RuntimeError:
            logger.bind(request_id="r-1").exception("a\nb {}")
        line = json_logs.line()
        assert line["message"] == "a\nb {}"
        assert line["request_id"] == "r-1"
        assert line["exception"].startswith("Traceback (most recent call last):\n")
        assert line["exception"].endswith("RuntimeError: failed with 1 secret")

    def test_without_an_exception_there_is_no_such_field(self, json_logs: Logs) -> None:
        logger.error("wrong")
        logging.getLogger("library").error("wrong", exc_info=True)
        first, second = json_logs.lines()
        assert "exception" not in first
        assert second["message"] == "wrong"


class TestLibraries:
    def test_their_warnings_come_to_the_same_place(self, json_logs: Logs) -> None:
        logging.getLogger("library.pool").warning("lost %s\n", "a connection")
        line = json_logs.line()
        assert line["logger"] == "library.pool"
        assert line["level"] == "WARNING"
        assert line["message"] == "lost a connection\n"

    def test_their_chatter_does_not(self, json_logs: Logs) -> None:
        logging.getLogger("library").info("GET /")
        assert json_logs.lines() == []

    def test_levels_of_their_own_are_no_trouble(self, json_logs: Logs) -> None:
        logging.getLogger("library").log(logging.WARNING + 5, "unusual")
        assert json_logs.line()["message"] == "unusual"

    def test_a_broken_log_call_does_not_break_its_caller(
        self, logs: Logs, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setattr(logging, "raiseExceptions", False)  # as in production, and quiet
        set_up_logs("json", "INFO")
        logging.getLogger("library").warning("%d connections", "no number")
        logger.info("still there")
        assert logs.lines()[-1]["message"] == "still there"


class TestFormats:
    def test_text(self, logs: Logs) -> None:
        set_up_logs("text", "INFO")
        logger.bind(given="a\nb", markup="<red>").info("refused")
        (line,) = logs.text().splitlines()
        assert "INFO" in line
        assert "refused" in line
        assert repr("a\nb") in line
        assert "<red>" in line

    @pytest.mark.parametrize("terminal", [True, False])
    def test_auto_is_text_on_a_terminal_only(
        self, logs: Logs, monkeypatch: pytest.MonkeyPatch, terminal: bool
    ) -> None:
        monkeypatch.setattr(sys.stderr, "isatty", lambda: terminal)
        set_up_logs("auto", "INFO")
        logger.info("here")
        assert logs.text().startswith("{") is not terminal


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
