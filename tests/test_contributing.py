"""What contributors are told to call and to change is there."""

import re
from typing import Any

import yaml  # type: ignore[import-untyped]

from tests.conftest import SLOW, TESTS
from tests.process import ROOT

CONTRIBUTING = (ROOT / "CONTRIBUTING.md").read_text()
WORKFLOW: dict[str, Any] = yaml.safe_load((ROOT / ".github/workflows/tests.yml").read_text())
HOOKS: dict[str, Any] = yaml.safe_load((ROOT / ".pre-commit-config.yaml").read_text())


def test_the_files_that_the_page_names_are_there() -> None:
    named = set(re.findall(r"`((?:src|tests|docs|scripts|deploy)/[\w./-]*)`", CONTRIBUTING))
    assert {"src/payments/settings.py", "tests/conftest.py", "scripts/check"} <= named
    assert [name for name in sorted(named) if not (ROOT / name).exists()] == []


def test_what_the_quick_tests_leave_out_is_there() -> None:
    for name in SLOW:
        path, _, test = name.partition("::")
        assert (TESTS / path).exists(), name
        assert not test or f"def {test}" in (TESTS / path).read_text(), name


def test_hooks_and_workflow_call_our_scripts() -> None:
    steps = WORKFLOW["jobs"]["tests"]["steps"]
    called = [step["run"] for step in steps if "run" in step]
    called += [hook["entry"] for repo in HOOKS["repos"] for hook in repo["hooks"]]
    assert len(called) == 4
    for command in called:
        script, *selection = command.split()
        text = (ROOT / script).read_text()
        assert all(re.search(rf"^{word} \|$|\b{word}\b", text, re.M) for word in selection), command


def test_hooks_fetch_nothing() -> None:
    assert [repo["repo"] for repo in HOOKS["repos"]] == ["local"]
