"""Postgres misbehaves while requests of every kind come: each is answered, and in time.

`--outages N` for more of them than three; the seed is fixed, so that a run can be repeated.
"""

import asyncio
import math
import random
import socket
import sys
import threading
import time
from collections import Counter, defaultdict
from collections.abc import AsyncIterator, Iterable, Iterator, Sequence
from contextlib import asynccontextmanager
from itertools import takewhile, zip_longest
from pathlib import Path
from typing import Any, NamedTuple

import msgspec
import psycopg
import pytest

from payments.commands.refund import RefundPayment
from payments.database.connections import Database, DatabaseAddress
from payments.errors import DatabaseUnavailable
from payments.payment.identity import RefundRequest, payment_id_for
from payments.service import Service
from tests.crash.mixed_load import PROBE, MixedLoad, Sample
from tests.crash.money import records, settings, settled
from tests.doubles.provider import ProviderProcess
from tests.invariants.checker import check
from tests.machine import within
from tests.outside_postgres import OutsidePostgres
from tests.process import ServiceProcess
from tests.silent_network import SilentNetwork
from tests.support import PATIENCE_S, charge_of

pytestmark = pytest.mark.anyio

SEED = 16
ANSWER_S = 3.0
# Shorter than by default, so that it is settled sooner, and longer than ANSWER_S, so that waiting
# until it is over is seen. If a request was told 503 and its intent was stored after all, a
# repetition waits until then, as the README says.
CHARGE_DEADLINE_S = 3.5
TIMES = {
    "CHARGE_DEADLINE_S": CHARGE_DEADLINE_S,
    "GATEWAY_TIMEOUT_S": 3,
    "PENDING_ABANDON_AFTER_S": 5,
}
PROBE_MAX_S = 1.0  # the service's loop must never be held up by the database
NORMAL_AFTER_S = 5.0
WINDOW_S = 0.5
CALM_S = 1.0  # between two outages

STALL_S = 0.3  # of a request: then the machine, not the service, may be what was slow

KINDS = ("frozen", "stopped", "restarted", "backend killed", "connections terminated")
BACKENDS = ("payments appender", "payments follower payments", "payments")


class Cause(NamedTuple):
    """`away`: while no query can have got a response, of an outage that lasts."""

    what: str
    away: tuple[float, float] | None = None


class Outage(NamedTuple):
    what: str
    began_at: float
    ended_at: float
    normal_at: float
    away: tuple[float, float] | None = None


@pytest.fixture
def outside(data_dir: Path) -> Iterator[OutsidePostgres]:
    with OutsidePostgres(data_dir / "outside") as running:
        yield running


def test_every_request_is_answered_in_time_whatever_postgres_does(
    outside: OutsidePostgres, tmp_path: Path, request: pytest.FixtureRequest
) -> None:
    """Under 3 s each, with 2xx or a 503 that says when to come back; 5 s after an outage all is
    well, and in the end nothing is lost, doubled or open."""
    dice = random.Random(SEED)
    kinds = [*KINDS[:2], dice.choice(KINDS[2:])]
    kinds += [dice.choice(KINDS) for _ in range(request.config.getoption("--outages") - 3)]
    with ProviderProcess(tmp_path / "provider.jsonl") as provider:
        more = settings(outside.address, provider, **outside.settings, **TIMES)
        with ServiceProcess(tmp_path, **more) as service:
            load = MixedLoad(service.port, random.Random(SEED))
            asyncio.run(go_through(load, outside, kinds, dice))
            with outside.connect() as connection:
                settled(connection)
                assert service.terminate() == 0
                check(connection, records(provider), load.charges, load.refunds, settled=True)
        assert "unhandled error" not in service.log.read_text()


test_every_request_is_answered_in_time_whatever_postgres_does = pytest.mark.timeout(900)(
    test_every_request_is_answered_in_time_whatever_postgres_does
)


async def go_through(
    load: MixedLoad, server: OutsidePostgres, kinds: Iterable[str], dice: random.Random
) -> None:
    outages: list[Outage] = []
    async with load.running():
        await asyncio.sleep(CALM_S)
        for kind in kinds:
            began_at = time.monotonic()
            rate = sum(each.is_normal for each in since(load, began_at - CALM_S)) / CALM_S
            what, away = await asyncio.to_thread(cause, server, kind, dice)
            ended_at = time.monotonic()
            await until_normal(load, ended_at, rate, what)
            outages.append(Outage(what, began_at, ended_at, time.monotonic(), away))
            await asyncio.sleep(CALM_S)
    table = figures(load, outages)
    sys.stdout.write(table)
    faults = [
        *unfit(load, outages),
        *late(load, outages),
        *relapsed(load, outages),
        *healthy_without_a_database(load, outages),
    ]
    assert not faults, "\n".join([f"{len(faults)} faults", *faults[:30], table])


async def test_the_network_falls_silent(outside: OutsidePostgres, tmp_path: Path) -> None:
    """No connection that was open ever answers again, and none is closed."""
    async with SilentNetwork(outside.address) as network:
        address = {**outside.settings, "DATABASE_PORT": network.address.port}
        service = ServiceProcess(tmp_path, **address, **TIMES)
        await asyncio.to_thread(service.start)
        try:
            load = MixedLoad(service.port, random.Random(SEED))
            async with load.running():
                await asyncio.sleep(CALM_S)
                began_at = time.monotonic()
                rate = sum(each.is_normal for each in since(load, began_at - CALM_S)) / CALM_S
                network.fall_silent()
                await asyncio.sleep(3)
                network.speak()
                ended_at = time.monotonic()
                await until_normal(load, ended_at, rate, "silent")
                outage = Outage("silent", began_at, ended_at, time.monotonic())
                with outside.connect() as connection:
                    position = "SELECT position FROM followers WHERE name = 'payments'"
                    before = connection.execute(position).fetchone()
                    while connection.execute(position).fetchone() == before:
                        now = time.monotonic()
                        waited_s = now - ended_at - load.stalled_s(ended_at, now)
                        assert waited_s < NORMAL_AFTER_S, "the follower stands still"
                        await asyncio.sleep(0.05)
                await asyncio.sleep(CALM_S)
            table = figures(load, [outage])
            sys.stdout.write(table)
            faults = [*unfit(load, [outage]), *late(load, [outage]), *relapsed(load, [outage])]
            assert not faults, "\n".join([f"{len(faults)} faults", *faults[:30], table])
        finally:
            assert await asyncio.to_thread(service.terminate) == 0


async def test_of_pooled_connections_that_died_in_silence_one_is_noticed_and_all_go(
    outside: OutsidePostgres,
) -> None:
    """Otherwise each of them is another request's 503, for as long as there are few requests."""
    async with (
        SilentNetwork(outside.address) as network,
        Database(network.address, pool_max=4) as database,
    ):
        await all_in_use(database)
        network.fall_silent()
        network.speak()
        refused = 0
        for _ in range(4):
            try:
                with within(ANSWER_S):
                    await database.fetch("SELECT 1")
            except DatabaseUnavailable:
                refused += 1
        assert refused == 1


async def all_in_use(database: Database) -> None:
    """Opens all connections of the pool, however long a busy machine takes for that."""
    deadline = time.monotonic() + PATIENCE_S
    while True:
        queries = (database.fetch("SELECT pg_sleep(0.1)") for _ in range(20))
        outcomes = await asyncio.gather(*queries, return_exceptions=True)
        if not any(isinstance(each, DatabaseUnavailable) for each in outcomes):
            return
        assert time.monotonic() < deadline


async def test_a_name_that_cannot_be_resolved_in_time_does_not_hold_up_the_next_attempt(
    address: DatabaseAddress, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The C library looks for 10 s and more; meanwhile the name server may be back."""
    let_go = threading.Event()
    answers = [let_go.wait] * 5  # more than an event loop has threads for it

    def look_up(host: str, *_: object, **__: object) -> list[Any]:
        if answers:
            answers.pop()(30)
        return [(socket.AF_INET, socket.SOCK_STREAM, 6, "", ("127.0.0.1", 0))]

    monkeypatch.setattr(socket, "getaddrinfo", look_up)
    database = Database(msgspec.structs.replace(address, host="db.test", port=1), pool_max=1)
    try:
        with within(ANSWER_S):
            late = await asyncio.gather(
                *(database.connect("tests") for _ in range(5)), return_exceptions=True
            )
            assert {type(error) for error in late} == {psycopg.errors.ConnectionTimeout}
            with pytest.raises(psycopg.OperationalError, match="refused"):  # it got to 127.0.0.1
                await database.connect("tests")
    finally:
        let_go.set()


async def test_the_waits_of_a_refund_do_not_add_up(
    service: Service, address: DatabaseAddress
) -> None:
    """The payment can be read only after a while, and then the refund cannot be stored."""
    await service.charging.charge(charge_of("k"))
    request = RefundRequest(
        payment_id=payment_id_for("k"), amount_cents=100, idempotency_key="r", client="default"
    )
    async with blocked(address, ("ACCESS EXCLUSIVE", 1.15), ("EXCLUSIVE", 3)):
        started = time.monotonic()
        with pytest.raises(DatabaseUnavailable), within(ANSWER_S):
            await service.refunding.refund(RefundPayment(request=request))
        took_s = time.monotonic() - started
    assert took_s > 2


async def test_the_waits_of_a_repeated_charge_do_not_add_up(
    service: Service, address: DatabaseAddress
) -> None:
    """That its key is known turns out only after a while, and then the payment cannot be read."""
    await service.charging.charge(charge_of("k"))
    async with blocked(address, ("EXCLUSIVE", 1.9), ("ACCESS EXCLUSIVE", 3)):
        started = time.monotonic()
        with within(ANSWER_S):
            again = await service.charging.charge(charge_of("k"))
        took_s = time.monotonic() - started
    assert took_s > 2
    assert again.replayed  # as PENDING: what came of it could not be looked up


@asynccontextmanager
async def blocked(
    address: DatabaseAddress, first: tuple[str, float], then: tuple[str, float]
) -> AsyncIterator[None]:
    """The events locked in one mode for some seconds, and at once in the other: for some more, or
    until the end of the block."""
    held, over = threading.Event(), threading.Event()

    def hold() -> None:
        with blocker(address) as one, blocker(address) as other:
            one.execute(f"LOCK TABLE payment_events IN {first[0]} MODE".encode())
            held.set()
            threading.Timer(first[1], one.commit).start()
            time.sleep(first[1] - 0.2)
            # It queues behind what waits already and before what comes, so it is granted between.
            other.execute(f"LOCK TABLE payment_events IN {then[0]} MODE".encode())
            over.wait(then[1])

    holding = threading.Thread(target=hold)
    holding.start()
    await asyncio.to_thread(held.wait)
    yield
    over.set()
    await asyncio.to_thread(holding.join)


def blocker(address: DatabaseAddress) -> "psycopg.Connection[Any]":
    connection = psycopg.connect(address.conninfo("blocker"))
    connection.execute("SET lock_timeout = 0; SET statement_timeout = 0")
    connection.commit()
    return connection


def cause(server: OutsidePostgres, kind: str, dice: random.Random) -> Cause:
    """Brings an outage about and ends it; what it was."""
    if kind == "frozen":
        seconds = dice.uniform(1, 6)
        server.freeze()
        try:
            away = rest(seconds)
        finally:
            server.thaw()
        return Cause(f"frozen for {seconds:.1f} s", away)
    if kind == "stopped":
        seconds = dice.uniform(1, 4)
        server.stop("immediate")
        away = rest(seconds)
        server.start()
        return Cause(f"stopped for {seconds:.1f} s", away)
    if kind == "restarted":
        server.stop("fast")
        server.start()
    elif kind == "backend killed":
        backend = dice.choice(BACKENDS)
        server.kill_backend(backend)
        return Cause(f"{kind}: {backend}")
    else:
        server.terminate_backends()
    return Cause(kind)


def rest(seconds: float) -> tuple[float, float]:
    began_at = time.monotonic()
    time.sleep(seconds)
    return began_at, time.monotonic()


def since(load: MixedLoad, moment: float) -> list[Sample]:
    """What was answered after that, but for the probe."""
    answered = takewhile(lambda each: each.answered_at > moment, reversed(load.samples))
    return [each for each in answered if each.label != PROBE]


async def until_normal(load: MixedLoad, ended_at: float, rate: float, what: str) -> None:
    """Until for a while all new requests were answered as without an outage, and at least half as
    many a second as before it."""
    while True:
        await asyncio.sleep(0.05)
        now = time.monotonic()
        lately = [each for each in since(load, now - WINDOW_S) if each.sent_at > ended_at]
        normal = sum(each.is_normal for each in lately)
        if normal == len(lately) and normal / WINDOW_S >= rate / 2:
            return
        assert now - load.stalled_s(ended_at, now) < ended_at + NORMAL_AFTER_S + WINDOW_S, (
            f"not normal {now - ended_at:.1f} s after: {what}. Of the last {WINDOW_S} s: "
            f"{Counter(f'{each.label}: {each.outcome}' for each in lately).most_common()}; "
            f"before it there were {rate:.0f} normal answers a second"
        )


def unfit(load: MixedLoad, outages: Sequence[Outage]) -> Iterator[str]:
    """Answers that may be given at no time."""
    for each in load.samples:
        if each.fault:
            yield f"{each.label} {told(load, outages, each)}: {each.fault}"


def late(load: MixedLoad, outages: Sequence[Outage]) -> Iterator[str]:
    for each in load.samples:
        took_s = each.took_s - load.stalled_s(each.sent_at, each.answered_at)
        if each.label == PROBE:
            took_s, limit_s = each.took_s, PROBE_MAX_S
        elif each.label.endswith("after 503"):
            limit_s = CHARGE_DEADLINE_S + 0.5
        else:
            limit_s = ANSWER_S
        if took_s >= limit_s:
            yield f"{each.label} {told(load, outages, each)}"


def relapsed(load: MixedLoad, outages: Sequence[Outage]) -> Iterator[str]:
    """Once all is well after an outage it stays so."""
    calm = [
        (outage.normal_at, following.began_at if following else math.inf)
        for outage, following in zip_longest(outages, outages[1:])
    ]
    for each in load.samples:
        stalled = load.stalled_s(each.sent_at, each.answered_at) > STALL_S
        if each.is_normal or stalled:
            continue
        if any(begin < each.sent_at and each.answered_at < end for begin, end in calm):
            yield f"{each.label} {told(load, outages, each)}, although all was well again"


def healthy_without_a_database(load: MixedLoad, outages: Sequence[Outage]) -> Iterator[str]:
    for outage in outages:
        if outage.away is None:
            continue
        # A response that came just before may be read a little later.
        away = (outage.away[0] + 0.2, outage.away[1])
        for each in load.samples:
            within = away[0] < each.sent_at and each.answered_at < away[1]
            if each.label == "GET /health" and within and each.is_normal:
                yield f"GET /health {told(load, outages, each)}"


def told(load: MixedLoad, outages: Sequence[Outage], sample: Sample) -> str:
    """How long it took, what else was going on, and whether the machine was busy."""
    before = [outage for outage in outages if outage.began_at < sample.answered_at]
    text = f"answered {sample.outcome!r} after {sample.took_s:.2f} s"
    stalled_s = load.stalled_s(sample.sent_at, sample.answered_at)
    if stalled_s:
        text += f" ({stalled_s:.2f} s of it this test or the whole service stood still)"
    if not before:
        return f"{text}, before the first outage"
    last = before[-1]
    return (
        f"{text}; sent {sample.sent_at - last.began_at:.2f} s after the begin of: {last.what}, and "
        f"answered {sample.answered_at - last.ended_at:+.2f} s from its end"
    )


def figures(load: MixedLoad, outages: Sequence[Outage]) -> str:
    by_label = defaultdict(list)
    for each in load.samples:
        by_label[each.label].append(each)
    lines = ["", f"{'request':24} {'sent':>6} {'longest':>8}  answers"]
    for label, samples in sorted(by_label.items()):
        outcomes = Counter(each.outcome for each in samples).most_common()
        longest_s = max(each.took_s for each in samples)
        answers = ", ".join(f"{count} x {outcome}" for outcome, count in outcomes)
        lines.append(f"{label:24} {len(samples):6} {longest_s:6.2f} s  {answers}")
    lines.append(f"{'outage':44} {'normal after':>12}  refused")
    for outage, following in zip_longest(outages, outages[1:]):
        until = following.began_at if following else math.inf
        bad = [
            each
            for each in load.samples
            if not each.is_normal and outage.began_at < each.answered_at < until
        ]
        last = max((each.answered_at for each in bad), default=outage.ended_at)
        after_s = max(0.0, last - outage.ended_at)
        lines.append(f"{outage.what:44} {after_s:10.2f} s  {len(bad)}")
    stalled = {whose: sum(b - a for a, b in stalls) for whose, stalls in load.stalls.items()}
    lines.append("stalls: " + ", ".join(f"{who} {s:.2f} s" for who, s in stalled.items()) + "\n")
    return "\n".join(lines)
