"""Whether something was done in time, on a machine that may have had other things to do.

    with within(3):
        ...

A bound that is missed fails the test, unless others had the processors meanwhile: then the rest of
the test is looked at, and it ends as skipped, with the reason.

The service has bounds of its own, such as 0.4 s for the database to respond. So any test may fail
when the machine stands still; Pauses notices that, and tests/conftest.py runs the test again.
"""

import math
import os
import threading
import time
from collections.abc import Iterable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, suppress
from pathlib import Path

import psutil

OTHERS_CORES = 0.5  # so many cores' work of others, and what takes how long says little of us
# Another worker of the same run shares the processors, and its servers cannot be told from ours: up
# to so many times as long says as little.
WORKERS_TIMES = 4
# Less than the service ever gives its database. Beside nothing but the tests, on two processors, a
# process that sleeps is late by 0.13 s at the most.
PAUSE_S = 0.25
LOOK_S = 0.05
# A virtual machine may share its processors with others: one is up to twice as slow then, although
# nobody else seems to use it.
SLOWER_TIMES = 1.3

_thread = ThreadPoolExecutor(1, thread_name_prefix="machine")

late: list[str] = []  # what the running test missed for that reason


class Machine:
    """What others have done since this was made."""

    def __init__(self) -> None:
        self._began, self._everyone, self._ours = time.perf_counter(), _busy_s(), _ours_s()

    def others_cores(self) -> float:
        """CPU seconds per second of all but this process, what it started, and any Postgres."""
        took = time.perf_counter() - self._began
        # Of a process that has ended meanwhile the parent's count holds all that it ever did.
        ours = _ours_s() - self._ours
        return (_busy_s() - self._everyone - ours) / took


class Pauses:
    """How long this process was kept from running: by others, or since the machine stood still.

    What it used of a processor meanwhile is subtracted.
    """

    def __init__(self) -> None:
        self._longest_s = 0.0
        threading.Thread(target=self._watch, name="pauses", daemon=True).start()

    def longest_s(self) -> float:
        """Seconds: the longest since this was asked last, or `forget` called. Takes 0.1 s."""
        time.sleep(2 * LOOK_S)  # one that has just ended is noticed then
        return self.forget()

    def forget(self) -> float:
        """The same as far as it was noticed, at once."""
        longest_s, self._longest_s = self._longest_s, 0.0
        return longest_s

    def _watch(self) -> None:
        while True:
            began, worked = time.monotonic(), time.process_time()
            time.sleep(LOOK_S)
            late_s = time.monotonic() - began - LOOK_S
            self._longest_s = max(self._longest_s, late_s - (time.process_time() - worked))


class Pace:
    """How fast a processor is, compared with itself. To be looked at while the tests do nothing."""

    def __init__(self) -> None:
        self._best_s = math.inf

    def look(self) -> float:
        """Processor seconds for a piece of work; of 30 times a fifth takes at least as long."""
        took_s = sorted(_work_s() for _ in range(30))
        self._best_s = min(self._best_s, took_s[0])
        return took_s[24]

    def slower_times(self, looks_s: Iterable[float]) -> float:
        """By how many times the slowest of these looks took longer than the best time ever seen."""
        return max(looks_s) / self._best_s


def _work_s() -> float:
    began = time.thread_time()
    sum(number for number in range(100_000))
    return time.thread_time() - began


@contextmanager
def within(seconds: float) -> Iterator[None]:
    """What is inside takes less than so long, also if it raises."""
    machine, began = Machine(), time.monotonic()
    try:
        yield
    finally:
        bound(time.monotonic() - began, seconds, machine)


def bound(took_s: float, seconds: float, machine: Machine) -> None:
    """The same for what was timed otherwise, since the machine was looked at."""
    if took_s < seconds:
        return
    cores = machine.others_cores()
    what = f"it took {took_s:.2f} s, not less than {seconds:g} s"
    if "PYTEST_XDIST_WORKER" in os.environ and took_s < WORKERS_TIMES * seconds:
        late.append(f"{what}, while another worker ran")
        return
    assert cores > OTHERS_CORES, f"{what}, and others used {cores:.1f} cores"
    late.append(f"{what}, while others used {cores:.1f} cores")


def _busy_s() -> float:
    """What all processors have done for anyone."""
    times = psutil.cpu_times()
    return float(sum(times) - times.idle - getattr(times, "iowait", 0))


def _ours_s() -> float:
    """What all processes have done that are ours, with their children that have ended.

    In a thread: within an event loop blockbuster looks at the whole stack for each file, which
    takes 80 ms, and this stands in many a short test.
    """
    return _thread.submit(_read_ours_s).result()


def _read_ours_s() -> float:
    parents, names, ticks = {}, {}, {}
    for process in Path("/proc").iterdir():
        if not (pid := process.name).isdigit():
            continue
        with suppress(OSError):  # it has ended
            name, _, rest = (process / "stat").read_text().partition("(")[2].rpartition(")")
            fields = rest.split()
            names[pid], parents[pid] = name, fields[1]
            ticks[pid] = sum(map(int, fields[11:15]))
    ours = (
        took for pid, took in ticks.items() if names[pid] == "postgres" or _is_ours(pid, parents)
    )
    return sum(ours) / os.sysconf("SC_CLK_TCK")


def _is_ours(pid: str, parents: Mapping[str, str]) -> bool:
    us = str(os.getpid())
    while pid in parents and pid != us:
        pid = parents[pid]
    return pid == us
