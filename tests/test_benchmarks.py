"""`python -m benchmarks`: what fails is shown, and the rest is measured."""

import os
import subprocess
import sys
from contextlib import suppress
from pathlib import Path

import httpx
import msgspec
import psutil
import pytest

from benchmarks.load import BODY
from benchmarks.process import ServerProcess
from payments.database.connections import DatabaseAddress
from tests.process import ROOT

SERVE = """
import sys
from benchmarks.process import ServerProcess
from payments.database.connections import DatabaseAddress
address = DatabaseAddress(host="", port=0, user="", password=None, dbname="")
ServerProcess("floor_post", address, {}).start()
print("started", flush=True)
sys.stdin.read()
"""


@pytest.fixture(scope="module")
def done() -> subprocess.CompletedProcess[str]:
    """A benchmark most of whose parts fail."""
    command = [sys.executable, "-m", "tests.failing_parts", "--json"]
    command += ["--rounds", "2", "--patience", "3"]  # in which a Python starts
    return subprocess.run(
        command, cwd=ROOT, capture_output=True, text=True, timeout=60, check=False
    )


def test_parts_that_fail_are_named_and_the_others_are_measured(
    done: subprocess.CompletedProcess[str],
) -> None:
    table = msgspec.json.decode(done.stdout)
    assert table["sound"] == {"per_s": 2.0, "p50_ms": 1.0, "p99_ms": 1.0}
    failed = {
        "cannot_start": "the start",
        "hangs": "the start",
        "child_fails": "round 1",
        "does_nothing": "warm-up",
        "lost_something": "the last look",
        "ends_badly": "the end",
    }
    assert set(table) == {"sound", "ratios", "details", "failed"}
    assert set(table["failed"]) == set(failed)
    for name, step in failed.items():
        assert f"  {name} FAILED in {step}:\n" in done.stderr
    assert done.stderr.splitlines()[-1] == f"failed: {', '.join(table['failed'])}"
    assert done.returncode == 1


def test_what_went_wrong_is_shown(done: subprocess.CompletedProcess[str]) -> None:
    for words in (
        "no room for a database",
        "took more than 3 s",
        "ended with 1; on stderr: too many clients",
        "the last line of its server",
        "0 answers and 7 errors",
        "a charge is not stored",
        "ended with 139",
    ):
        assert words in done.stderr


def test_a_part_that_failed_takes_no_further_turn(done: subprocess.CompletedProcess[str]) -> None:
    turns = [line.strip() for line in done.stderr.splitlines() if ": child_fails" in line]
    assert turns == ["warm-up: child_fails", "round 1: child_fails"]


def test_the_part_without_a_store_answers_a_charge() -> None:
    """What the load sends, and once: at full speed they would take both processors."""
    address = DatabaseAddress(host="", port=0, user="", password=None, dbname="")
    server = ServerProcess("floor_post", address, {})
    server.start()
    try:
        response = httpx.post(
            f"http://127.0.0.1:{server.port}/v1/charge",
            content=BODY,
            headers={"Idempotency-Key": "k1", "Content-Type": "application/json"},
            timeout=30,
        )
        assert (response.status_code, response.json()["status"]) == (201, "SUCCESS")
    finally:
        server.stop()


def test_a_server_does_not_outlive_the_benchmark(tmp_path: Path) -> None:
    """However that ended."""
    with subprocess.Popen(
        [sys.executable, "-c", SERVE],
        cwd=ROOT,
        env=os.environ | {"TMPDIR": str(tmp_path)},
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
    ) as benchmark:
        assert benchmark.stdout is not None
        assert benchmark.stdout.readline() == b"started\n"
        (served,) = psutil.Process(benchmark.pid).children()
        benchmark.kill()
    try:
        served.wait(timeout=30)
    finally:
        with suppress(psutil.NoSuchProcess):
            served.kill()
