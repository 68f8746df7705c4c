"""What the pages say is what the code does."""

import base64
import json
import re
import sqlite3
import threading
import time
import uuid
from collections.abc import Callable, Iterator
from contextlib import closing
from datetime import UTC, datetime, timedelta
from http.server import ThreadingHTTPServer
from pathlib import Path
from typing import Any, get_args

import click
import httpx
import pytest
from standardwebhooks import Webhook

import web.app  # noqa: F401 - defines every error of the API
from payments.callbacks.dispatcher import CallbackBody
from payments.callbacks.retry import WAIT_MAX_S, schedule
from payments.cli import main
from payments.database import DatabaseAddress
from payments.errors import PaymentsError
from payments.queries.callbacks import CallbackView
from payments.settings import VARIABLES
from payments.telemetry import CALLBACK_OUTCOMES, Telemetry
from tests.process import ROOT, ServiceProcess, at, run
from tests.support import ORDER_ID
from web.heads import PROTOCOL_PROBLEMS
from web.problems import FRAMEWORK_PROBLEMS

PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").rglob("*.md"))]


def subclasses(kind: type[PaymentsError]) -> Iterator[type[PaymentsError]]:
    for subclass in kind.__subclasses__():
        yield subclass
        yield from subclasses(subclass)


def test_the_page_on_errors_lists_every_code_with_its_status() -> None:
    page = (ROOT / "docs/errors.md").read_text()
    listed = {(int(status), code) for status, code in re.findall(r"\| (\d+) \| `(\w+)` \|", page)}
    errors: list[type[PaymentsError]] = [PaymentsError, *subclasses(PaymentsError)]
    answered = {(error.status, error.code) for error in errors if "code" in vars(error)}
    answered |= {(status, code) for status, (code, _) in FRAMEWORK_PROBLEMS.items()}
    assert listed == answered | set(PROTOCOL_PROBLEMS)


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_what_a_page_names_is_there(page: Path) -> None:
    """Links within the repository, metrics, settings, commands."""
    text = page.read_text()
    for target, anchor in re.findall(r"\]\(([^():#]*)(#[^()]*)?\)", text):
        linked = page.parent / target if target else page
        assert linked.exists(), target
        if anchor:
            headings = re.findall(r"^#+ (.*)$", linked.read_text(), re.MULTILINE)
            assert anchor[1:] in {slug(heading) for heading in headings}, target + anchor
    exposed = Telemetry().exposition().decode()
    for metric in re.findall(r"`(payments_\w+)", text):
        assert re.search(rf"^{metric}(_count)?[ {{]", exposed, re.MULTILINE), metric
    for name in re.findall(r"(?:ORDER|CALLBACK)_[A-Z_]*[A-Z]", text):
        assert name.removesuffix("_FILE") in {variable.name for variable in VARIABLES}, name
    callbacks = main.commands["callbacks"]
    assert isinstance(callbacks, click.Group)
    for name, rest in re.findall(r"payments callbacks (\w+)([^`\n#]*)", text):
        options = {option for parameter in callbacks.commands[name].params for option in parameter.opts}
        assert set(re.findall(r"--\w+", rest)) <= options, name


def slug(heading: str) -> str:
    """The anchor that GitHub makes of it."""
    return re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-")


CALLBACKS = ROOT / "docs/callbacks.md"


def first_cells(page: Path, heading: str) -> list[str]:
    """Of the table with this first cell; the names in it."""
    (table,) = re.findall(rf"^\| {heading} \|.*\n\|---.*\n((?:\|.*\n)*)", page.read_text(), re.M)
    return [name for line in table.splitlines() for name in re.findall(r"`(\w+)`", line.split("|")[1])]


def test_the_page_on_callbacks_has_every_field_state_and_outcome() -> None:
    assert first_cells(CALLBACKS, "field") == list(CallbackBody.__struct_fields__)
    states = get_args(CallbackView.__annotations__["state"])
    assert first_cells(CALLBACKS, "state") == list(states)
    assert first_cells(CALLBACKS, "`outcome`") == [*CALLBACK_OUTCOMES, "interrupted"]


def test_every_callback_that_a_page_shows_has_the_fields_of_one() -> None:
    shown = [body for page in PAGES for body in re.findall(r'^\{"order_id":.*\}$', page.read_text(), re.M)]
    assert len(shown) >= 3
    for body in shown:
        assert list(json.loads(body)) == list(CallbackBody.__struct_fields__)


def rounded(seconds: float) -> str:
    if seconds < 120:
        return f"{seconds:g} s"
    return f"{seconds / 60:.0f} min" if seconds < 2 * 3600 else f"{seconds / 3600:.0f} h"


def test_the_page_on_callbacks_has_the_schedule_of_retries() -> None:
    steps = schedule()
    growing = [step for step in steps if step.wait_max_s < WAIT_MAX_S]
    first, last = steps[len(growing)], steps[-1]
    rows = [
        f"| {attempt} | {rounded(wait_max_s)} | {rounded(expected_s)} |"
        for attempt, wait_max_s, expected_s in growing
    ]
    rows.append(
        f"| {first.attempt} to {last.attempt} | {rounded(WAIT_MAX_S)} each"
        f" | {rounded(first.expected_s)} to {rounded(last.expected_s)} |"
    )
    (table,) = re.findall(r"^\| attempt \|.*\n\|---.*\n((?:\|.*\n)*)", CALLBACKS.read_text(), re.M)
    assert table.splitlines() == rows
    stated = f"{last.attempt} times in about {last.expected_s / 86400:.0f} days"
    assert stated.replace("3", "three", 1) in (ROOT / "README.md").read_text()
