"""The Dockerfile and the Compose file: what they promise, without building anything."""

import re
from typing import Any

import pytest
import yaml  # type: ignore[import-untyped]

from payments.settings import VARIABLES, Settings
from tests.process import ROOT

DOCKERFILE = (ROOT / "Dockerfile").read_text().replace("\\\n", " ")
BUILD, FINAL = re.split(r"^FROM .*$", DOCKERFILE, flags=re.MULTILINE)[1:]
COMPOSE: dict[str, Any] = yaml.safe_load((ROOT / "docker-compose.yml").read_text())
SECRETS = {name for name, variable in VARIABLES.items() if variable.secret}
KNOWN = {*VARIABLES, *(f"{name}_FILE" for name in SECRETS)}
# Other programs' own.
NOT_OURS = {"PATH", "PYTHONDONTWRITEBYTECODE"}
OURS = ("payment-service", "api", "worker")


def environment(stage: str) -> dict[str, str]:
    (line,) = re.findall(r"^ENV (.*)$", stage, re.MULTILINE)
    return dict(pair.split("=", 1) for pair in line.split())


def test_the_image_holds_what_was_installed_and_no_source() -> None:
    copied = re.findall(r"^COPY (.*)$", FINAL, re.MULTILINE)
    assert copied == ["--from=build /opt/payments /opt/payments"]
    assert "--require-hashes -r requirements/${REQUIREMENTS}.txt" in BUILD
    assert "ARG REQUIREMENTS=runtime\n" in BUILD
    assert "pip" not in FINAL


def test_it_does_not_run_as_root() -> None:
    users = re.findall(r"^USER (.*)$", FINAL, re.MULTILINE)
    assert users == ["10001:10001"]
    assert FINAL.index("USER 10001") < FINAL.index("VOLUME")


def test_a_user_of_openshifts_choice_may_write_where_data_is() -> None:
    """It is of group 0, whatever its number."""
    assert "chown 10001:0 /var/lib/payments && chmod 770 /var/lib/payments" in re.sub(
        r"\s+", " ", FINAL
    )
    assert environment(FINAL)["PAYMENTS_DATA_DIR"] == "/var/lib/payments"


def test_nothing_is_published_to_the_network_unasked() -> None:
    for name, service in COMPOSE["services"].items():
        for port in service.get("ports", []):
            assert re.match(r"127\.0\.0\.1:|\$\{PUBLISH:-127\.0\.0\.1\}:", port), name


def test_signals_reach_the_service() -> None:
    """The exec form: no shell in between."""
    assert re.search(r'^ENTRYPOINT \["payments"\]$', FINAL, re.MULTILINE)
    assert re.search(r'^CMD \["serve"\]$', FINAL, re.MULTILINE)
    for name in OURS:
        assert int(COMPOSE["services"][name]["stop_grace_period"].removesuffix("s")) > 9


def test_variables_are_settings() -> None:
    given = environment(FINAL)
    assert set(given) <= KNOWN | NOT_OURS
    assert (given["HOST"], given["PORT"]) == ("0.0.0.0", str(Settings().port))
    assert f"EXPOSE {Settings().port}" in FINAL
    for name in OURS:
        assert set(COMPOSE["services"][name]["environment"]) <= KNOWN


def test_the_health_check_asks_what_there_is() -> None:
    assert 'CMD ["python", "-m", "payments.probe"]' in FINAL
    worker = COMPOSE["services"]["worker"]
    assert worker["environment"]["METRICS_PORT"]
    command = ["CMD", "python", "-m", "payments.probe", "METRICS_PORT", "/metrics"]
    assert worker["healthcheck"]["test"] == command


def test_the_documented_service_is_there_with_its_database() -> None:
    service = COMPOSE["services"]["payment-service"]
    assert service["ports"] == ["${PUBLISH:-127.0.0.1}:4004:4004"]
    assert "profiles" not in service
    assert service["depends_on"] == {"postgres": {"condition": "service_healthy"}}
    assert "profiles" not in COMPOSE["services"]["postgres"]
    assert service["read_only"]


@pytest.mark.parametrize("name", OURS)
def test_no_secret_is_written_down(name: str) -> None:
    """But for the password that is for trying it out."""
    given = COMPOSE["services"][name]["environment"]
    for secret in SECRETS & given.keys():
        assert re.fullmatch(r"\$\{[A-Z_]+:-(postgres)?\}", given[secret]), secret


def test_what_prometheus_scrapes_is_there() -> None:
    config = yaml.safe_load((ROOT / "deploy/prometheus/prometheus.yml").read_text())
    scraped = {
        (name, found["port"])
        for job in config["scrape_configs"]
        for found in job["dns_sd_configs"]
        for name in found["names"]
    }
    assert scraped == {("payment-service", 4004), ("api", 4004), ("worker", 4005)}
    for rules in config["rule_files"]:
        assert (ROOT / "deploy/prometheus" / rules).exists()


def test_what_is_mounted_is_there() -> None:
    for service in COMPOSE["services"].values():
        for volume in service.get("volumes", []):
            source = volume.split(":")[0]
            if source.startswith("."):
                assert (ROOT / source).is_dir()
            else:
                assert source in COMPOSE["volumes"]


def test_the_build_sees_only_what_it_needs() -> None:
    ignored = (ROOT / ".dockerignore").read_text().splitlines()
    assert "*" in ignored
    sent = {line[1:] for line in ignored if line.startswith("!")}
    assert sent == {"pyproject.toml", "README.md", "requirements", "src"}
