"""The alerting rules that are delivered."""

import yaml  # type: ignore[import-untyped]

from tests.process import ROOT

ALERTS = [
    rule
    for group in yaml.safe_load((ROOT / "deploy/prometheus/alerts.yml").read_text())["groups"]
    for rule in group["rules"]
]
