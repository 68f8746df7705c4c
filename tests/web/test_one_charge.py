"""What a reader is told to open for one charge is what one charge runs through."""

import asyncio
import re
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import FrameType
from typing import Any

import httpx
import pytest

from tests.web.requests import charge
from web import charges

ROOT = Path(__file__).parents[2]
FILES_MAX = 14
# Logs, metrics and traces; the followers, which are woken; and the provider.
BESIDE = (
    "payments/observability/",
    "payments/projections/",
    "payments/gateways/simulated",
    "payments/gateways/ledger_",
)
BEFORE = ("web/serving/", "web/auth.py")  # what gives the endpoint its request

pytestmark = pytest.mark.anyio


@contextmanager
def files_of_tasks() -> Iterator[set[str]]:
    """Files of src/ that run in this task and in those of the run and the appender, from the
    endpoint to its response."""
    files: set[str] = set()
    this = asyncio.current_task()
    began = False

    def called(frame: FrameType, event: str, _: Any) -> None:
        nonlocal began
        path = Path(frame.f_code.co_filename)
        if event != "call" or not path.is_relative_to(ROOT / "src"):
            return
        began = began or frame.f_code is charges.charge.fn.__code__
        task = asyncio.current_task()
        if began and task and (task is this or task.get_name() in ("run", "appender")):
            files.add(str(path.relative_to(ROOT / "src")))

    before = sys.getprofile()
    sys.setprofile(called)
    try:
        yield files
    finally:
        sys.setprofile(before)


async def test_the_tour_lists_the_files_of_a_charge(client: httpx.AsyncClient) -> None:
    page = (ROOT / "docs/tour.md").read_text()
    _, _, rest = page.partition("## Every file on the way")
    section, _, _ = rest.partition("\n## ")
    read, later = section.split("They call one or two functions", 1)
    to_read = set(re.findall(r"^\| `(\S+\.py)` \|", read, re.M))
    folder = "payments/gateways/"
    listed = {
        name if "/" in name else f"{folder}{name}" for name in re.findall(r"`(\S+\.py)`", later)
    }
    await charge(client, "the first one connects")
    with files_of_tasks() as files:
        response = await charge(client)
    assert response.status_code == 201
    assert len(to_read) <= FILES_MAX
    ran = {name for name in files if not name.startswith(BESIDE + BEFORE)}
    assert to_read <= ran
    assert to_read | listed == ran
