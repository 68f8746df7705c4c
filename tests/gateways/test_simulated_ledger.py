"""The simulated provider's ledger among processes that die, and beside somebody who locks it."""

import asyncio
import random
import signal
import sqlite3
import subprocess
import sys
import time
import uuid
from collections.abc import AsyncIterator
from contextlib import AsyncExitStack, closing
from pathlib import Path
from uuid import UUID

import pytest

from payments.errors import StartError
from payments.gateways import (
    OutcomeUnknown,
    ProviderCharge,
    ProviderRefund,
    ledger_tables,
    simulated_ledger,
)
from payments.gateways.building import build_gateways
from payments.gateways.ledger_file import ROWS_MAX
from payments.gateways.simulated import SimulatedGateway
from payments.payment.state import Approved
from payments.settings import Settings
from tests.doubles.gateway import asking
from tests.machine import within
from tests.support import ledger_rows

pytestmark = pytest.mark.anyio

ID = UUID("058c9593-e150-402f-ab5b-37dd4c9816f0")
CHARGE = ProviderCharge(payment_id=ID, amount_cents=1500, currency="INR")
REFUND = ProviderRefund(
    refund_id=uuid.uuid4(),
    payment_id=ID,
    provider_txn_id=f"sim_{ID.hex}",
    amount_cents=500,
    currency="INR",
)

# Charges the ids of a seed, all with an amount of its own, and gives back 400 three times; prints
# what it learns.
CUSTOMER = """
import asyncio, pathlib, random, sys, uuid
from payments.gateways import ProviderCharge, ProviderRefund
from payments.gateways.simulated import SimulatedGateway
async def main():
    gateway = SimulatedGateway(pathlib.Path(sys.argv[1]), lock_wait_s=60)
    ids, own = random.Random(int(sys.argv[2])), int(sys.argv[3])
    async def one(id):
        charge = ProviderCharge(payment_id=id, amount_cents=1000 + own, currency="INR")
        charged = await gateway.charge(charge, 1)
        print(id, charged.amount_cents, flush=True)
        for _ in range(3):
            await gateway.refund(
                ProviderRefund(refund_id=uuid.uuid4(), payment_id=id,
                    provider_txn_id=f"sim_{id.hex}", amount_cents=400, currency="INR"), 1)
    while True:
        await asyncio.gather(*(one(uuid.UUID(int=ids.getrandbits(128))) for _ in range(5)))
asyncio.run(main())
"""


@pytest.fixture
def ledger(tmp_path: Path) -> Path:
    return tmp_path / "ledger.sqlite"


@pytest.fixture
async def gateway(ledger: Path) -> AsyncIterator[SimulatedGateway]:
    """It waits for a lock for a tenth of a second."""
    opened = SimulatedGateway(ledger, lock_wait_s=0.1)
    yield opened
    await opened.close()


def locked(ledger: Path) -> closing[sqlite3.Connection]:
    connection = sqlite3.connect(ledger)
    connection.execute("BEGIN IMMEDIATE")
    return closing(connection)


def check(ledger: Path) -> None:
    """No refund is forgotten in the sums, and none is beyond its capture."""
    with closing(sqlite3.connect(ledger)) as connection:
        assert connection.execute("PRAGMA integrity_check").fetchall() == [("ok",)]
        sums = dict(connection.execute("SELECT id, refunded_cents FROM charges").fetchall())
    captured, found = dict[str, int](), dict.fromkeys(sums, 0)
    for row in ledger_rows(ledger):
        if row.payment_id is None:
            captured[str(row.id)] = row.amount_cents
        elif row.outcome == "approved":
            found[str(row.payment_id)] += row.amount_cents
    assert found == sums
    assert all(sums[id] <= captured[id] for id in sums)


def test_two_processes_that_are_killed_again_and_again_decide_once(
    ledger: Path, long_run: bool
) -> None:
    chance, told = random.Random(1), dict[str, set[str]]()
    for seed in range(40 if long_run else 4):
        customers = [
            subprocess.Popen(
                [sys.executable, "-c", CUSTOMER, ledger, str(seed), str(own)],
                stdout=subprocess.PIPE,
                text=True,
            )
            for own in (1, 2)
        ]
        for customer in chance.sample(customers, 2):
            assert customer.stdout is not None
            read = [customer.stdout.readline() for _ in range(chance.randrange(20, 60))]
            customer.send_signal(signal.SIGKILL)
            for line in [*read, *customer.stdout]:
                if not line.endswith("\n"):  # it was killed in the middle
                    continue
                payment_id, amount_cents = line.split()
                told.setdefault(payment_id, set()).add(amount_cents)
            customer.wait(timeout=30)
            customer.stdout.close()
    stored = {str(row.id): row for row in ledger_rows(ledger)}
    assert len(told) > 80
    assert {len(amounts) for amounts in told.values()} == {1}, "an id was captured twice"
    for payment_id, (amount_cents,) in told.items():
        assert stored[payment_id].amount_cents == int(amount_cents), "what was told is lost"
    check(ledger)


async def test_processes_that_start_at_once_share_a_ledger(ledger: Path) -> None:
    program = """
import pathlib, sys
from payments.gateways.simulated import SimulatedGateway
sys.stdin.readline()
print(SimulatedGateway(pathlib.Path(sys.argv[1]))._ledger.file.id)
"""
    started = [
        subprocess.Popen(
            [sys.executable, "-c", program, ledger],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )
        for _ in range(4)
    ]
    for each in started:
        assert each.stdin is not None
        each.stdin.write("\n")
        each.stdin.flush()
    ids = {(await asyncio.to_thread(each.communicate, timeout=30))[0] for each in started}
    assert len(ids) == 1
    assert UUID(ids.pop().strip())


async def test_a_lock_that_is_held_for_longer_than_is_waited_leaves_the_outcome_unknown(
    gateway: SimulatedGateway, ledger: Path
) -> None:
    """And nothing of what was asked is decided afterwards."""
    with locked(ledger):
        asked = [
            *(
                gateway.charge(
                    ProviderCharge(payment_id=uuid.uuid4(), amount_cents=1500, currency="INR"), 6
                )
                for _ in range(5)
            ),
            *(gateway.refund(REFUND, 6) for _ in range(5)),
        ]
        with within(2):
            told = await asyncio.gather(*asked, return_exceptions=True)
        assert {type(each) for each in told} == {OutcomeUnknown}
        assert await gateway.find_charge(asking(ID), 6) is None  # a question waits for no lock
    assert ledger_rows(ledger) == []
    assert isinstance(await gateway.charge(CHARGE, 6), Approved)


async def test_a_lock_is_waited_for_less_long_than_the_provider_is(ledger: Path) -> None:
    settings = Settings(simulated_ledger=str(ledger), gateway_timeout_s=0.2)
    async with AsyncExitStack() as stack:
        (gateway,) = build_gateways(settings)
        stack.push_async_callback(gateway.close)
        with locked(ledger), within(0.8), pytest.raises(OutcomeUnknown, match="locked"):
            await gateway.charge(CHARGE, 0.2)


async def test_a_process_starts_while_another_one_has_the_lock(
    gateway: SimulatedGateway, ledger: Path
) -> None:
    with locked(ledger), within(5):
        other = SimulatedGateway(ledger)
        assert await other.account(1) == await gateway.account(1)
        await other.close()


async def test_no_name_of_a_file_stands_for_memory(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    gateway = SimulatedGateway(Path(":memory:"))
    await gateway.charge(CHARGE, 6)
    await gateway.close()
    assert len(ledger_rows(tmp_path / ":memory:")) == 1


async def test_what_cannot_be_stored_harms_nothing_that_comes_after(
    gateway: SimulatedGateway, ledger: Path
) -> None:
    with pytest.raises(OutcomeUnknown):
        await gateway.refund(
            ProviderRefund(
                refund_id=uuid.uuid4(),
                payment_id=ID,
                provider_txn_id="sim_x",
                amount_cents=2**70,
                currency="INR",
            ),
            6,
        )
    assert isinstance(await gateway.charge(CHARGE, 6), Approved)
    assert [row.id for row in ledger_rows(ledger)] == [ID]


async def test_a_short_lock_is_waited_for(ledger: Path) -> None:
    """But not by the event loop."""
    async with AsyncExitStack() as stack:
        gateway = SimulatedGateway(ledger, lock_wait_s=30)
        stack.push_async_callback(gateway.close)
        with locked(ledger):
            asked_at = time.monotonic()
            charging = asyncio.create_task(gateway.charge(CHARGE, 6))
            await asyncio.sleep(0.1)
            assert time.monotonic() - asked_at < 20
            assert not charging.done()
        assert isinstance(await charging, Approved)


async def test_what_is_asked_together_is_answered_together(
    gateway: SimulatedGateway, ledger: Path
) -> None:
    """Charges, the same ones again, refunds and questions, in one turn of the loop."""
    await gateway.charge(CHARGE, 6)
    other = ProviderCharge(payment_id=uuid.uuid4(), amount_cents=1507, currency="INR")
    told = await asyncio.gather(
        gateway.charge(other, 6),
        gateway.charge(other, 6),
        gateway.charge(ProviderCharge(payment_id=ID, amount_cents=9900, currency="INR"), 6),
        gateway.refund(REFUND, 6),
        gateway.refund(REFUND, 6),
        gateway.find_charge(asking(ID), 6),
    )
    assert told[0] == told[1] == await gateway.find_charge(other, 6)
    assert (
        told[2]
        == told[5]
        == Approved(id=ID, amount_cents=1500, currency="INR", provider_txn_id=f"sim_{ID.hex}")
    )
    assert told[3] == told[4] == await gateway.find_refund(REFUND, 6)
    assert len(ledger_rows(ledger)) == 3
    check(ledger)


async def test_more_than_one_statement_takes_are_decided_together(
    gateway: SimulatedGateway, ledger: Path
) -> None:
    """Each id twice in one turn of the loop: its first charge stands."""
    ids = [uuid.uuid4() for _ in range(3 * ROWS_MAX)]
    told = await asyncio.gather(
        *(
            gateway.charge(ProviderCharge(payment_id=id, amount_cents=cents, currency="INR"), 6)
            for cents in (1500, 9900)
            for id in ids
        )
    )
    assert [each.id for each in told if isinstance(each, Approved)] == ids * 2
    assert {each.amount_cents for each in told if isinstance(each, Approved)} == {1500}
    assert {row.id for row in ledger_rows(ledger)} == set(ids)


async def test_a_ledger_whose_charges_have_a_rowid_is_gone_on_with(
    ledger: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As the version before makes it."""
    tables = ledger_tables.TABLES.replace("WITHOUT ROWID", "")
    assert tables != ledger_tables.TABLES
    with monkeypatch.context() as patch:
        patch.setattr(ledger_tables, "TABLES", tables)
        before = SimulatedGateway(ledger)
    charged, identity = await before.charge(CHARGE, 6), await before.account(1)
    await before.close()
    after = SimulatedGateway(ledger)
    assert await after.account(1) == identity
    assert await after.charge(CHARGE, 6) == charged
    assert isinstance(await after.refund(REFUND, 6), Approved)
    await after.close()
    check(ledger)


async def test_the_log_before_the_file_stays_short(
    gateway: SimulatedGateway, ledger: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It is moved into the file now and then, in the thread, since that waits for the disk."""
    monkeypatch.setattr(simulated_ledger, "CHECKPOINT_EVERY", 50)
    for _ in range(500):
        charge = ProviderCharge(payment_id=uuid.uuid4(), amount_cents=1500, currency="INR")
        await asyncio.wait_for(gateway.charge(charge, 6), 30)
    assert ledger.with_name(f"{ledger.name}-wal").stat().st_size < 150 * 4096
    assert len(ledger_rows(ledger)) == 500


async def test_what_is_asked_after_the_close_is_told_so(gateway: SimulatedGateway) -> None:
    closing = asyncio.create_task(gateway.close())
    await asyncio.sleep(0)
    for _ in range(2):
        with pytest.raises(OutcomeUnknown, match="closed"):
            await asyncio.wait_for(gateway.charge(CHARGE, 6), 30)
        await closing


def test_a_full_disk_leaves_the_outcome_unknown(ledger: Path) -> None:
    """And the ledger goes on when there is room again."""
    program = """
import asyncio, pathlib, resource, sys, uuid
from payments.gateways import OutcomeUnknown, ProviderCharge
from payments.gateways.simulated import SimulatedGateway
async def main():
    gateway = SimulatedGateway(pathlib.Path(sys.argv[1]))
    _, most = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, most))
    while True:
        charge = ProviderCharge(payment_id=uuid.uuid4(), amount_cents=1500, currency="INR")
        try:
            await gateway.charge(charge, 1)
        except OutcomeUnknown as error:
            print(error)
            break
    assert await gateway.find_charge(charge, 1) is None
    resource.setrlimit(resource.RLIMIT_FSIZE, (most, most))
    await gateway.charge(charge, 1)
    await gateway.close()
asyncio.run(main())
"""
    done = subprocess.run(
        [sys.executable, "-c", program, ledger], capture_output=True, text=True, check=False
    )
    assert (done.returncode, done.stderr) == (0, "")
    assert done.stdout.startswith("simulated: ledger: ")
    check(ledger)


async def test_only_its_owner_may_read_it(gateway: SimulatedGateway, ledger: Path) -> None:
    await gateway.charge(CHARGE, 6)
    files = list(ledger.parent.glob(f"{ledger.name}*"))
    assert len(files) == 3
    assert {file.stat().st_mode & 0o777 for file in files} == {0o600}


def test_the_database_of_another_program_is_left_alone(ledger: Path) -> None:
    with closing(sqlite3.connect(ledger)) as connection:
        connection.execute("CREATE TABLE theirs (id)")
    before = ledger.read_bytes()
    with pytest.raises(StartError, match="another program"):
        SimulatedGateway(ledger)
    assert ledger.read_bytes() == before


def test_a_file_system_that_shares_no_memory_stops_the_start(
    ledger: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(ledger_tables, "_journal_mode", lambda _: "delete")
    with pytest.raises(StartError, match="shared memory"):
        SimulatedGateway(ledger)
