"""Dashboard and alerts name metrics that a service has; every alert is explained."""

import json
import os
import re
import shutil
import subprocess
from collections.abc import Iterator
from typing import Any

import httpx
import pytest
import yaml  # type: ignore[import-untyped]
from prometheus_client.openmetrics.parser import (
    text_string_to_metric_families as openmetrics_families,
)
from prometheus_client.parser import text_string_to_metric_families

from payments.database.connections import DatabaseAddress
from payments.errors import DatabaseUnavailable, PaymentsError
from payments.observability.metrics import Telemetry
from payments.service import Service
from tests.alerts import ALERTS
from tests.process import PAYMENTS, ROOT, ServiceProcess, at, environment, free_port
from tests.support import charge_of, until

DASHBOARD = json.loads((ROOT / "deploy/grafana/dashboards/payments.json").read_text())
RULES_TEST = "tests/alerts_test.yml"
WATCHDOG = "PaymentsWatchdog"  # it always fires
NOT_OURS = {"up"}  # and ALERTS
PROCESS = ("process_cpu_seconds_total", "process_start_time_seconds", "process_open_fds")
# What PromQL itself has, and label names.
WORDS = {
    *("sum", "max", "abs", "by", "rate", "increase", "histogram_quantile", "le", "and", "or"),
    *(
        "kind",
        "outcome",
        "gateway",
        "operation",
        "state",
        "follower",
        "status",
        "route",
        "currency",
        "job",
    ),
    *(
        "min",
        "count",
        "unless",
        "on",
        "absent",
        "last_over_time",
        "vector",
        "role",
        "instance",
        "code",
        "result",
    ),
}


def panels() -> Iterator[tuple[str, str]]:
    for panel in DASHBOARD["panels"]:
        for target in panel.get("targets", []):
            yield panel["title"], target["expr"]


def metrics_in(expression: str) -> set[str]:
    bare = re.sub(r"\{[^}]*\}|\[[^]]*\]|\"[^\"]*\"", "", expression)
    return set(re.findall(r"[a-z_]{2,}", bare)) - WORDS - NOT_OURS


def exposed(text: str) -> set[str]:
    return {
        sample.name for family in text_string_to_metric_families(text) for sample in family.samples
    }


EXPRESSIONS = [
    *panels(),
    *((rule["alert"], rule["expr"]) for rule in ALERTS),
]


@pytest.mark.anyio
async def test_every_metric_that_is_named_exists(service: Service) -> None:
    telemetry = service.telemetry
    telemetry.requests.labels("POST", "/v1/charge", "201").inc()
    telemetry.request_seconds.labels("POST", "/v1/charge").observe(0.01)
    telemetry.problems.labels("too_busy")
    telemetry.dispatches()
    telemetry.unconfigured.labels("acme").set(1)
    telemetry.hints_of_gateway("acme")
    await service.health.observe()
    there = exposed(telemetry.exposition().decode())
    assert len(EXPRESSIONS) > 35
    for name, expression in EXPRESSIONS:
        used = metrics_in(expression)
        assert used or "up" in expression or "vector" in expression, name
        assert used <= there, name


def test_every_label_value_that_is_named_exists() -> None:
    telemetry = Telemetry()
    telemetry.observed(up=True)
    telemetry.dispatches()
    telemetry.of_gateway("simulated", lambda: False)
    telemetry.hints_of_gateway("acme")
    for role in ("api", "work"):
        telemetry.role.labels(role)
    telemetry.problems.labels(PaymentsError.code)
    values: dict[str, set[str]] = {}
    text = telemetry.exposition().decode()
    for family in text_string_to_metric_families(text):
        for sample in family.samples:
            for label, value in sample.labels.items():
                values.setdefault(f"{sample.name} {label}", set()).add(value)
    for name, expression in EXPRESSIONS:
        for causes in re.findall(r'ALERTS\{alertname=~?"([^"]*)"', expression):
            assert set(causes.split("|")) < {rule["alert"] for rule in ALERTS}, name
        for metric, selector in re.findall(r"([a-z_]+)\{([^}]*)\}", expression):
            for label, operator, value in re.findall(r"([a-z_]+)(=~|=)\"([^\"]*)\"", selector):
                if label in ("status", "job"):
                    continue
                known = values[f"{metric} {label}"]
                assert set(value.split("|") if operator == "=~" else [value]) <= known, name


def test_every_alert_is_explained() -> None:
    page = (ROOT / "docs/operations.md").read_text()
    headings = re.findall(r"^### (Payments\w+)$", page, re.MULTILINE)
    assert headings == [rule["alert"] for rule in ALERTS]
    for rule in ALERTS:
        assert rule["annotations"]["runbook"] == f"docs/operations.md#{rule['alert'].lower()}"
        assert rule["annotations"]["summary"]
        section = page.split(f"\n### {rule['alert']}\n")[1].split("\n### ")[0]
        assert re.search(r"^First: .*[`\]]", section, re.MULTILINE), rule["alert"]
        assert re.search(r"^Remedy: ", section, re.MULTILINE), rule["alert"]
        severities = ("page", "ticket") if rule["alert"] != WATCHDOG else ("none",)
        assert rule["labels"]["severity"] in severities


def test_every_alert_has_a_case_in_which_it_fires_and_one_in_which_it_does_not() -> None:
    cases = [
        case
        for test in yaml.safe_load((ROOT / RULES_TEST).read_text())["tests"]
        for case in test.get("alert_rule_test", [])
    ]
    alerts = {rule["alert"] for rule in ALERTS}
    assert {case["alertname"] for case in cases if case["exp_alerts"]} == alerts
    assert {case["alertname"] for case in cases if not case["exp_alerts"]} == alerts - {WATCHDOG}


def test_what_an_alert_follows_from_is_looked_at_first() -> None:
    """Rules are evaluated in their order."""
    before: set[str] = set()
    for rule in ALERTS:
        for causes in re.findall(r'ALERTS\{alertname=~?"([^"]*)"', rule["expr"]):
            assert set(causes.split("|")) <= before, rule["alert"]
        before.add(rule["alert"])


@pytest.mark.skipif(shutil.which("promtool") is None, reason="promtool is not on PATH")
@pytest.mark.parametrize(
    "command", [("check", "rules", "deploy/prometheus/alerts.yml"), ("test", "rules", RULES_TEST)]
)
def test_alerts_fire_when_they_should(command: tuple[str, ...]) -> None:
    done = subprocess.run(
        ["promtool", *command],
        cwd=ROOT,
        env=os.environ | {"GOGC": "800"},  # a third of its time goes into collecting garbage
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )
    assert done.returncode == 0, done.stdout + done.stderr


@pytest.mark.anyio
async def test_amounts_are_counted_by_currency(service: Service) -> None:
    def value(kind: str, currency: str) -> float | None:
        labels = {"kind": kind, "currency": currency}
        name = "payments_amount_minor_units_total"
        return service.telemetry.registry.get_sample_value(name, labels)

    assert (value("captured", "INR"), value("captured", "EUR")) == (0, None)
    await service.charging.charge(charge_of("k1", 1500))
    await service.charging.charge(charge_of("k1", 1500))
    await service.charging.charge(charge_of("k2", 300, currency="EUR"))
    await service.charging.charge(charge_of("k3", 1507))  # declined
    assert value("captured", "INR") == 1500
    assert value("captured", "EUR") == 300


@pytest.mark.anyio
async def test_how_far_a_follower_is_behind_is_told_in_seconds(
    service: Service, connection: Any
) -> None:
    """Also while nobody follows."""
    for follower in service.followers:
        await follower.stop()
    await service.charging.charge(charge_of("k1"))
    await service.health.observe()
    lag = service.telemetry.follower_lag_seconds["payments"]._value.get()
    assert 0 < lag < 5
    await service.followers[0].run_once()
    await service.health.observe()
    assert service.telemetry.follower_lag_seconds["payments"]._value.get() == 0


@pytest.mark.anyio
async def test_gauges_of_a_database_that_is_away_are_not_shown(
    service: Service, address: DatabaseAddress, connection: Any
) -> None:
    def shown() -> dict[str, float]:
        text = service.telemetry.exposition().decode()
        families = text_string_to_metric_families(text)
        return {each.name: each.value for family in families for each in family.samples}

    await service.health.observe()
    there = shown()
    assert there["payments_database_up"] == 1
    assert there["payments_database_refresh_age_seconds"] < 5
    assert "payments_pending_oldest_age_seconds" in there
    await service.health._database.close()
    with pytest.raises(DatabaseUnavailable):
        await service.health.observe()
    away = shown()
    assert away["payments_database_up"] == 0
    left_out = set(there) - set(away)
    assert "payments_pending_oldest_age_seconds" in left_out
    assert not [name for name in left_out if not name.startswith("payments_")]
    before = away["payments_database_refresh_age_seconds"]
    assert shown()["payments_database_refresh_age_seconds"] > before


@pytest.mark.anyio
async def test_a_payment_that_contradicts_the_provider_is_no_old_one(
    service: Service, connection: Any
) -> None:
    """It is an alert of its own, and may stay open for days."""

    async def oldest_s() -> float:
        await service.health.observe()
        return float(service.telemetry.pending_age._value.get())

    for age, level in (("2 hours", 50), ("1 minute", None), ("30 s", 30)):
        connection.execute(
            "INSERT INTO unsettled_payments (payment_id, kind, since, due_at, told_level, told_at)"
            " VALUES (gen_random_uuid(), 'charge', now() - %s::interval,"
            " now() + interval '1 hour', %s, now())",
            [age, level],
        )
    assert 60 <= await oldest_s() < 120
    assert service.telemetry.pending._value.get() == 3
    assert service.telemetry.unsettled["charge"]._value.get() == 3
    connection.execute("DELETE FROM unsettled_payments WHERE coalesce(told_level, 0) < 50")
    assert await oldest_s() == 0


@pytest.mark.anyio
async def test_connections_are_counted(service: Service) -> None:
    async def counted() -> dict[str, float]:
        await service.health.observe()
        pool = service.telemetry.database_pool
        return {state: gauge._value.get() for state, gauge in pool.items()}

    async def quiet() -> bool:
        now = await counted()
        return now["used"] == now["waited_for"] == 0 and now["idle"] >= 1

    await until(quiet)


def test_formats_and_a_port_of_their_own(address: DatabaseAddress, tmp_path: Any) -> None:
    port = free_port()
    with (
        ServiceProcess(tmp_path, METRICS_PORT=port, **at(address)) as service,
        httpx.Client(timeout=5) as client,
    ):
        service.charge(client, "k1")
        for url in (service.url, f"http://127.0.0.1:{port}"):
            plain = client.get(f"{url}/metrics")
            assert plain.headers["content-type"].startswith("text/plain; version=0.0.4")
            assert 'payments_charges_total{outcome="success"} 1.0' in plain.text
            assert 'payments_process_role{role="work"} 1.0' in plain.text
            assert 'payments_process_role{role="api"} 1.0' in plain.text
            assert "payments_database_up 1.0" in plain.text
            exposed(plain.text)
            accept = {"Accept": "application/openmetrics-text;version=1.0.0,text/plain;q=0.5"}
            more = client.get(f"{url}/metrics", headers=accept)
            assert more.headers["content-type"].startswith("application/openmetrics-text")
            families = openmetrics_families(more.text)  # type: ignore[no-untyped-call]
            names = {sample.name for family in families for sample in family.samples}
            assert {"payments_charges_total", *PROCESS} <= names
            values = client.get(f"{url}/metrics", headers={"Accept": "application/json"})
            assert values.headers["content-type"] == "application/json"
            assert set(values.json()) == {"cpu_load", "memory", "heap", "uptime", "timestamp"}
            assert all(value >= 0 for value in values.json().values())
            assert values.json()["memory"] > 10_000_000
            assert client.get(f"{url}/health").status_code == 200
        assert client.get(f"http://127.0.0.1:{port}/v1/payments").status_code == 404
        assert service.terminate() == 0


def test_what_only_takes_requests_shows_what_the_database_says_of_others(
    address: DatabaseAddress, tmp_path: Any
) -> None:
    """And nothing of a dispatcher that it does not run."""
    url = "http://127.0.0.1:1/"
    with (
        ServiceProcess(tmp_path, "--api-only", ORDER_CALLBACK_URL=url, **at(address)) as service,
        httpx.Client(timeout=5) as client,
    ):
        service.charge(client, "k1")
        text = client.get(f"{service.url}/metrics").text
        assert 'payments_process_role{role="api"} 1.0' in text
        assert 'role="work"' not in text
        assert 'payments_follower_lag_events{follower="payments"} 2.0' in text
        assert "payments_callback_breaker_state{" not in text


@pytest.mark.anyio
async def test_what_only_works_has_metrics_as_well(address: DatabaseAddress, tmp_path: Any) -> None:
    port = free_port()
    process = subprocess.Popen(
        [*PAYMENTS, "work"],
        cwd=ROOT,
        env=environment(
            **at(address),
            METRICS_PORT=port,
            PAYMENTS_DATA_DIR=tmp_path,
            ORDER_CALLBACK_URL="http://127.0.0.1:1/",
        ),
        stderr=subprocess.DEVNULL,
    )
    try:
        async with httpx.AsyncClient(timeout=5) as client:

            async def answers() -> httpx.Response | None:
                try:
                    return await client.get(f"http://127.0.0.1:{port}/metrics")
                except httpx.TransportError:
                    return None

            found = await until(answers)
            assert "payments_follower_lag_seconds" in found.text
            assert all(f"\n{name} " in found.text for name in PROCESS)
            assert 'payments_process_role{role="work"}' in found.text
            assert 'payments_process_role{role="api"}' not in found.text
            assert 'payments_callback_breaker_state{state="closed"} 1.0' in found.text
        process.terminate()
        assert process.wait(timeout=10) == 0
    finally:
        if process.poll() is None:
            process.kill()
            process.wait(timeout=10)
