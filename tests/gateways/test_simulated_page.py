"""The page on the simulated provider: its curl lines and its table of payment methods are true."""

import re
import shlex
import subprocess
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, NamedTuple

import msgspec

from payments.database.connections import DatabaseAddress
from payments.gateways.simulated_methods import ACTION_S, METHODS
from tests.process import ROOT, ServiceProcess, at

PAGE = (ROOT / "docs/simulated-gateway.md").read_text()
SECTION = PAGE[PAGE.index("## Payment methods for tests") : PAGE.index("## Its ledger")]
SECONDS = "1"  # for N


class Promised(NamedTuple):
    """The first response: `word` is the payment's status, or a problem's code."""

    payment_method: str
    status: int
    word: str
    has_action: bool


def promised() -> list[Promised]:
    rows = re.findall(
        r"^\| `(sim_\w+)` \| `(\d+)` `(\w+)`( with `next_action`)?", SECTION, re.MULTILINE
    )
    return [Promised(each[0], int(each[1]), each[2], bool(each[3])) for each in rows]


def curl(words: list[str]) -> tuple[int, Any]:
    """The status and body, as the command prints them."""
    done = subprocess.run(
        [*words, "-s", "-w", "\n%{http_code}"], capture_output=True, timeout=30, check=True
    )
    body, _, status = done.stdout.rpartition(b"\n")
    return int(status), msgspec.json.decode(body)


def test_the_page_lists_every_payment_method_once() -> None:
    known = re.findall(r"sim_\w+", METHODS)
    assert sorted(each.payment_method for each in promised()) == sorted(known)
    assert f"after {ACTION_S:g} s" in SECTION


def test_each_payment_method_does_what_the_page_says(
    address: DatabaseAddress, tmp_path: Path
) -> None:
    """The curl line as it stands, and with each other payment method and a new key."""
    (line,) = re.findall(r"^curl (?:.*\\\n)*.*$", SECTION, re.MULTILINE)
    line = line.replace("\\\n", "")
    with ServiceProcess(tmp_path, **at(address), GATEWAY_TIMEOUT_S=3) as service:

        def send(payment_method: str) -> tuple[int, Any]:
            played = re.sub("_N$", f"_{SECONDS}", payment_method)
            key = "action-1" if played == "sim_action" else played
            sent = line.replace("action-1", key).replace("sim_action", played)
            return curl(shlex.split(sent.replace("http://localhost:4004", service.url)))

        rows = promised()
        began = time.monotonic()
        with ThreadPoolExecutor(len(rows)) as pool:
            responses = list(pool.map(send, [each.payment_method for each in rows]))
        for row, (status, body) in zip(rows, responses, strict=True):
            word = body.get("code", body["status"])
            assert Promised(row[0], status, word, "next_action" in body) == row, body
        time.sleep(max(0.0, began + ACTION_S + 0.5 - time.monotonic()))
        assert send("sim_action")[1]["status"] == "SUCCESS"
        assert send("sim_action_declined")[1]["status"] == "FAILED"
        assert send("sim_action_never")[1]["next_action"]["type"] == "redirect"
