"""A bound that is missed fails a test, unless the machine did other things."""

import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from tests import conftest, machine
from tests.conftest import TESTS
from tests.machine import PAUSE_S, Machine, Pace, Pauses, within

# Its parent ends at once.
STRANGER = """
import os, time
if pid := os.fork():
    print(pid)
else:
    os.close(1)
    while time.process_time() < 20:
        pass
"""

WORKER = """
import sys, time
while time.process_time() < 0.5:
    pass
print(flush=True)
sys.stdin.read()
"""

STOPPED = """
import os, signal, subprocess, sys, time
import pytest
from tests.invariants.checker import InvariantBroken

STOP = "import os, signal, sys, time; at = int(sys.argv[1]); os.kill(at, signal.SIGSTOP); "
STOP += "time.sleep(0.5); os.kill(at, signal.SIGCONT)"
runs = []

def stand_still():
    subprocess.run([sys.executable, "-c", STOP, str(os.getpid())], check=True, timeout=20)

def test_for_that_reason():
    runs.append(None)
    if len(runs) == 1:
        stand_still()
        pytest.fail()

def test_for_another_reason():
    stand_still()
    pytest.fail()

@pytest.mark.timeout(1)
def test_its_time_is_up():
    stand_still()
    time.sleep(20)

def test_an_invariant():
    stand_still()
    raise InvariantBroken("captured twice")
"""


@pytest.fixture
def cores(monkeypatch: pytest.MonkeyPatch) -> list[float]:
    """What others use."""
    used = [0.0]
    monkeypatch.delenv("PYTEST_XDIST_WORKER", raising=False)
    monkeypatch.setattr(Machine, "others_cores", lambda _: used[0])
    return used


def test_what_is_in_time_is_in_time(cores: list[float]) -> None:
    cores[0] = 2
    with within(10):
        pass
    assert machine.late == []


def test_what_is_late_fails(cores: list[float]) -> None:
    with (
        pytest.raises(AssertionError, match=r"not less than 0\.01 s, and others used 0\.0 cores"),
        within(0.01),
    ):
        time.sleep(0.02)


def test_beside_another_worker_only_what_is_very_late_fails(
    cores: list[float], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("PYTEST_XDIST_WORKER", "gw0")
    with within(0.1):
        time.sleep(0.11)
    assert "another worker ran" in machine.late.pop()
    with pytest.raises(AssertionError), within(0.001):
        time.sleep(0.02)


def test_what_is_late_on_a_busy_machine_makes_it_skipped(
    cores: list[float], request: pytest.FixtureRequest
) -> None:
    cores[0] = 1.5
    running = conftest.pytest_runtest_call(request.node)
    next(running)
    with within(0.01):
        time.sleep(0.02)
    told = r"it took 0\.\d+ s, not less than 0\.01 s, while others used 1\.5 cores"
    with pytest.raises(pytest.skip.Exception, match=re.compile(told)):
        next(running)
    machine.late.clear()


def test_what_fails_while_it_is_kept_from_running_runs_again_once(tmp_path: Path) -> None:
    (tmp_path / "test_stopped.py").write_text(STOPPED)
    options = f"-p tests.conftest --rootdir {tmp_path} -c {TESTS.parent / 'pyproject.toml'}"
    ran = subprocess.run(
        [sys.executable, "-m", "pytest", *options.split(), str(tmp_path)],
        cwd=TESTS.parent,
        stdout=subprocess.PIPE,
        text=True,
        check=False,
        timeout=60,
    )
    again = r"^RAN AGAIN \S+::(\w+): it failed, and was kept from running for \d+\.\d+ s$"
    assert sorted(re.findall(again, ran.stdout, re.MULTILINE)) == [
        "test_for_another_reason",
        "test_for_that_reason",
        "test_its_time_is_up",
    ]
    assert "3 failed, 1 passed" in ran.stdout
    assert "FAILED test_stopped.py::test_for_that_reason" not in ran.stdout


def test_what_this_process_does_itself_is_no_pause() -> None:
    pauses, began, did = Pauses(), time.monotonic(), time.process_time()
    while (worked_s := time.process_time() - did) < 2 * PAUSE_S:
        sum(range(20_000_000))  # no other thread runs meanwhile
    others_s = time.monotonic() - began - worked_s
    assert pauses.longest_s() < others_s + PAUSE_S


@pytest.mark.parametrize(("slow_looks", "times"), [(0, 1.0), (5, 1.0), (6, 2.0), (30, 2.0)])
def test_a_processor_that_others_slow_down(
    monkeypatch: pytest.MonkeyPatch, slow_looks: int, times: float
) -> None:
    """Even if it was so from the start on."""
    looks_s = [0.004] * slow_looks + [0.002] * (60 - slow_looks)
    monkeypatch.setattr(machine, "_work_s", lambda: looks_s.pop(0))
    pace = Pace()
    assert pace.slower_times([pace.look(), pace.look()]) == times


def test_others_are_whom_we_have_not_started() -> None:
    started = subprocess.run(
        [sys.executable, "-c", STRANGER], stdout=subprocess.PIPE, text=True, check=True, timeout=20
    )
    stranger = int(started.stdout)
    try:
        watched = Machine()
        time.sleep(0.5)
        # It shares the processors with whoever else is there, who are others too.
        assert watched.others_cores() > 0.3
    finally:
        os.kill(stranger, signal.SIGKILL)


def test_what_one_of_ours_did_before_is_not_counted_when_it_ends() -> None:
    with subprocess.Popen(
        [sys.executable, "-c", WORKER], stdin=subprocess.PIPE, stdout=subprocess.PIPE
    ) as child:
        assert child.stdout is not None
        child.stdout.readline()
        watched = Machine()
        child.communicate(timeout=20)
    assert watched.others_cores() > -0.5
