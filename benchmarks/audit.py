"""Reading the log as a whole: rebuild and verify, on 1,000,000 events and 490,000 payments.

Each round is a process of its own, `python -m benchmarks.audit PART`, which tells what it took and
its largest resident memory.
"""

import asyncio
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import ClassVar

import msgspec
import psycopg

from benchmarks.child import output_of
from benchmarks.load import Figures
from benchmarks.log import fill_log, project, seal_log
from benchmarks.parts import Part
from payments.database.connections import DatabaseAddress
from payments.projections.comparison import slices
from payments.projections.rebuild import check, rebuild
from payments.queries.verification import Verification, ends_of, missing_seals, places_of
from payments.snapshot import Reader

PAYMENTS = 490_200
NAME = "payments benchmarks"


class Took(msgspec.Struct):
    """What one run did. `held_s`: for how long the follower had to wait."""

    events: int
    seconds: float
    held_s: float = 0.0
    resident_mb: float = 0.0


def raw_read_events(address: DatabaseAddress) -> Took:
    """The log in order, by the same driver; nothing is done."""
    with Reader(address, NAME) as reader:
        started = time.perf_counter()
        count = sum(1 for _ in places_of(reader, ends_of(reader)))
        return Took(count, time.perf_counter() - started)


def raw_read(address: DatabaseAddress) -> Took:
    """The events and rows that a rebuild compares, in the same order by the same driver."""
    with Reader(address, NAME) as reader:
        started = time.perf_counter()
        count = sum(len(part.events) for part in slices(reader))
        return Took(count, time.perf_counter() - started)


def run_rebuild(address: DatabaseAddress) -> Took:
    started = time.perf_counter()
    done = rebuild(address, settle_after_s=7.0)
    assert done.log == done.tables
    return Took(done.events, time.perf_counter() - started, done.held_s)


def run_verify(address: DatabaseAddress) -> Took:
    """All that `payments audit verify` does."""
    started = time.perf_counter()
    verification = Verification({})
    with Reader(address, NAME) as reader:
        ends = ends_of(reader)
        assert not list(verification.findings(places_of(reader, ends)))
        assert not list(missing_seals(ends, verification.head))
    assert verification.sealed == verification.events
    compared = check(address)
    assert not any(compared.differing.values())
    return Took(verification.events, time.perf_counter() - started)


class _WholeLog(Part):
    """All on one database, which the first of them fills."""

    work: ClassVar[Callable[[DatabaseAddress], Took]]

    def __init__(self, server: DatabaseAddress) -> None:
        self.address = msgspec.structs.replace(server, dbname="bench_audit")

    def prepare(self) -> None:
        super().prepare()
        self._took: list[Took] = []
        if self.count("SELECT count(*) FROM payment_events") == 0:
            with psycopg.connect(self.address.conninfo("benchmarks")) as connection:
                fill_log(connection, PAYMENTS)
            asyncio.run(project(self.address))
            asyncio.run(seal_log(self.address))

    def run(self, seconds: float) -> Figures:
        told = output_of(
            [sys.executable, "-m", "benchmarks.audit", self.name],
            stdin=msgspec.json.encode(self.address).decode(),
            timeout_s=300,
        )
        took = msgspec.json.decode(told, type=Took)
        self._took.append(took)
        figures = Figures.of([took.seconds] * 2, took.seconds)
        return msgspec.structs.replace(
            figures, per_s=took.events / took.seconds, answers=took.events
        )

    def remarks(self) -> list[str]:
        took = self._took
        return [
            f"{took[-1].events:,} events, "
            f"the follower waited for at most {max(each.held_s for each in took):.2f} s, "
            f"resident memory at most {max(each.resident_mb for each in took):.0f} MB"
        ]


class RawRead(_WholeLog):
    """Reading all rows that a rebuild reads, and discarding them."""

    name = "raw_read"
    work = raw_read


class RawReadEvents(_WholeLog):
    """Reading the events alone."""

    name = "raw_read_events"
    work = raw_read_events


class Rebuild(_WholeLog):
    """`payments rebuild` where nothing differs: fold all events and compare all rows."""

    name = "rebuild"
    work = run_rebuild


class RebuildEmptied(_WholeLog):
    """`payments rebuild` after all tables of the read model were emptied."""

    name = "rebuild_emptied"
    work = run_rebuild

    def run(self, seconds: float) -> Figures:
        with psycopg.connect(self.address.conninfo("benchmarks")) as connection:
            connection.execute("TRUNCATE payments, refunds, payment_clients, unsettled_payments")
        return super().run(seconds)


class Verify(_WholeLog):
    """`payments audit verify`: recompute all seals, fold all events and compare all rows."""

    name = "verify"
    work = run_verify


AUDIT_PARTS: tuple[type[_WholeLog], ...] = (RawRead, RawReadEvents, Rebuild, RebuildEmptied, Verify)


def main() -> None:
    (part,) = (part for part in AUDIT_PARTS if part.name == sys.argv[1])
    address = msgspec.json.decode(sys.stdin.buffer.read(), type=DatabaseAddress)
    took = part.work(address)
    status = Path("/proc/self/status").read_text()
    took.resident_mb = int(status.partition("VmHWM:")[2].split()[0]) / 1024
    sys.stdout.buffer.write(msgspec.json.encode(took))


if __name__ == "__main__":
    main()
