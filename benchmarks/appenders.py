"""One process that appends to a log, and two, where each commit takes 3 ms longer.

Run as a module this is one of them: it says when it is ready, and begins when it is told to.
"""

import subprocess
import sys

import msgspec
import psycopg
import uvloop

from benchmarks.child import ROOT, ChildError
from benchmarks.load import Figures
from benchmarks.parts import Part, append_for
from payments.database.connections import DatabaseAddress

# However few commit at the time: what a slow disk, or a standby that is waited for, would take.
SLOW_COMMITS = ("commit_delay = 3000", "commit_siblings = 0")
END_S = 10.0  # beyond the time that a process is to append


class Order(msgspec.Struct):
    """What a process is to do."""

    address: DatabaseAddress
    seconds: float


class AppendSlowCommit(Part):
    """One process with 32 callers, one event per append."""

    name = "append_slow_commit"
    processes = 1

    def prepare(self) -> None:
        super().prepare()
        with psycopg.connect(self.address.conninfo("benchmarks"), autocommit=True) as connection:
            for setting in SLOW_COMMITS:
                connection.execute(f"ALTER DATABASE {self.address.dbname} SET {setting}".encode())

    def run(self, seconds: float) -> Figures:
        order = msgspec.json.encode(Order(self.address, seconds)).decode()
        children = [_child(order) for _ in range(self.processes)]
        try:
            for child in children:
                assert child.stdout is not None
                child.stdout.readline()  # it is ready, or it is gone, which the end tells
            for child in children:
                assert child.stdin is not None
                child.stdin.write("begin\n")
                child.stdin.flush()
            done = [_figures(child, seconds) for child in children]
        finally:
            for child in children:
                child.kill()
                child.wait()
        return Figures(
            sum(each.per_s for each in done),
            max(each.p50_ms for each in done),
            max(each.p99_ms for each in done),
            sum(each.answers for each in done),
        )


class AppendTwoSlowCommit(AppendSlowCommit):
    """Two of these processes on one log; the latencies are the slower one's."""

    name = "append_two_slow_commit"
    processes = 2


def _child(order: str) -> subprocess.Popen[str]:
    return subprocess.Popen(
        [sys.executable, "-m", "benchmarks.appenders", order],
        cwd=ROOT,
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


def _figures(child: subprocess.Popen[str], seconds: float) -> Figures:
    told, said = child.communicate(timeout=seconds + END_S)
    if child.returncode:
        raise ChildError(f"a process that appends ended with {child.returncode}", said)
    return msgspec.json.decode(told, type=Figures)


def main(order: Order) -> None:
    sys.stdout.write("ready\n")
    sys.stdout.flush()
    sys.stdin.readline()
    figures = uvloop.run(append_for(order.address, order.seconds))
    sys.stdout.write(msgspec.json.encode(figures).decode())


if __name__ == "__main__":
    main(msgspec.json.decode(sys.argv[1], type=Order))
