"""A ledger of an earlier version, lines of JSON, is read in once and kept."""

import fcntl
import json
import subprocess
import sys
import uuid
from collections.abc import AsyncIterator, Callable
from contextlib import AsyncExitStack
from pathlib import Path
from uuid import UUID

import pytest

from payments.errors import StartError
from payments.gateways import ProviderRefund
from payments.gateways.simulated import SimulatedGateway
from payments.payment.state import Approved, Declined
from tests.doubles.gateway import asking
from tests.support import LedgerRow, ledger_rows

pytestmark = pytest.mark.anyio

ID = UUID("058c9593-e150-402f-ab5b-37dd4c9816f0")
OTHER_ID = UUID("11111111-1111-4111-8111-111111111111")
REFUND_ID = UUID("22222222-2222-4222-8222-222222222222")
LINES = (
    f'["{ID}",1500,"INR","approved"]\n'
    f'["{OTHER_ID}",17,"INR","declined_by_simulation"]\n'
    f'["{REFUND_ID}",500,"INR","approved","refund","{ID}"]\n'
    f'["{ID}",9900,"INR","approved"]\n'
)
ROWS = [
    LedgerRow(ID, 1500, "INR", "approved", None),
    LedgerRow(OTHER_ID, 17, "INR", "declined_by_simulation", None),
    LedgerRow(REFUND_ID, 500, "INR", "approved", ID),
]

# Opens the ledger; with an action of its own before it goes on, if it comes to one of the steps.
OPENER = """
import os, pathlib, signal, sys
from payments.gateways import earlier_ledger
from payments.gateways.simulated import SimulatedGateway
path, earlier, step = pathlib.Path(sys.argv[1]), pathlib.Path(sys.argv[2]), sys.argv[3]
steps = []
def before(step_name, action):
    def run(*given, **named):
        steps.append(step_name)
        if f"{step_name} {steps.count(step_name)}" == step:
            os.kill(os.getpid(), signal.SIGKILL)
        return action(*given, **named)
    return run
pathlib.Path.rename = before("rename", pathlib.Path.rename)
earlier_ledger.Decision = before("decision", earlier_ledger.Decision)
earlier_ledger.LedgerFile = before("open", earlier_ledger.LedgerFile)
gateway = SimulatedGateway(path, earlier=earlier if earlier != path else None)
print(gateway._ledger.file.id)
sys.stdin.readline()
"""


@pytest.fixture(params=["beside", "in its place"])
def earlier(request: pytest.FixtureRequest, tmp_path: Path) -> Path:
    """Where the file of the earlier version is: where it was by default, or at SIMULATED_LEDGER."""
    return tmp_path / ("simulated-ledger.jsonl" if request.param == "beside" else "ledger")


@pytest.fixture
def path(earlier: Path) -> Path:
    return earlier if earlier.name == "ledger" else earlier.with_name("simulated-ledger.sqlite")


@pytest.fixture
def kept(earlier: Path) -> Path:
    return earlier.with_name(f"{earlier.name}.imported")


Open = Callable[[], SimulatedGateway]


@pytest.fixture
async def open_gateway(path: Path, earlier: Path) -> AsyncIterator[Open]:
    async with AsyncExitStack() as stack:

        def start() -> SimulatedGateway:
            gateway = SimulatedGateway(path, earlier=earlier if earlier != path else None)
            stack.push_async_callback(gateway.close)
            return gateway

        yield start


def opener(path: Path, earlier: Path, step: str = "") -> subprocess.Popen[str]:
    """Another process that opens the ledger; a kill -9 comes before it takes the step."""
    return subprocess.Popen(
        [sys.executable, "-c", OPENER, path, earlier, step],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    )


async def test_it_is_read_in_and_kept(
    open_gateway: Open, path: Path, earlier: Path, kept: Path
) -> None:
    earlier.write_text(LINES)
    gateway = open_gateway()
    assert ledger_rows(path) == ROWS
    assert kept.read_text() == LINES
    assert await gateway.find_charge(asking(ID), 1) == Approved(
        id=ID, amount_cents=1500, currency="INR", provider_txn_id=f"sim_{ID.hex}"
    )
    txn_id = f"sim_{ID.hex}"
    more = ProviderRefund(
        refund_id=uuid.uuid4(),
        payment_id=ID,
        provider_txn_id=txn_id,
        amount_cents=1001,
        currency="INR",
    )
    assert await gateway.refund(more, 1) == Declined("refund_exceeds_capture")
    rest = ProviderRefund(
        refund_id=uuid.uuid4(),
        payment_id=ID,
        provider_txn_id=txn_id,
        amount_cents=1000,
        currency="INR",
    )
    assert isinstance(await gateway.refund(rest, 1), Approved)


async def test_afterwards_there_is_nothing_to_read_in(
    open_gateway: Open, path: Path, earlier: Path, kept: Path
) -> None:
    earlier.write_text(LINES)
    first, again = open_gateway(), open_gateway()
    assert await first.account(1) == await again.account(1)
    assert ledger_rows(path) == ROWS
    assert [file.name for file in path.parent.glob("*.imported*")] == [kept.name]


@pytest.mark.parametrize("half", ['["', f'["{REFUND_ID}"', LINES.splitlines()[0]])
@pytest.mark.parametrize("whole", [LINES, ""])
async def test_half_a_line_is_nobodys_decision(
    open_gateway: Open, path: Path, earlier: Path, whole: str, half: str
) -> None:
    earlier.write_text(whole + half)
    open_gateway()
    assert ledger_rows(path) == (ROWS if whole else [])


@pytest.mark.parametrize("damage", ["no ledger\n", '["x",1,"INR","approved"]\n', "[]\n", "\n"])
async def test_a_damaged_line_stops_the_start_and_nothing_is_moved_for_good(
    open_gateway: Open, path: Path, earlier: Path, damage: str
) -> None:
    earlier.write_text(LINES + damage + LINES)
    for _ in range(2):
        with pytest.raises(StartError, match="SIMULATED_LEDGER: line 5") as caught:
            open_gateway()
        assert len(str(caught.value).splitlines()) == 1
    (left,) = [
        each
        for each in path.parent.iterdir()
        if each.name.startswith(earlier.name) and each.suffix in (".jsonl", ".earlier")
    ]
    assert ledger_rows(path) == []
    left.write_text(LINES)
    open_gateway()
    assert ledger_rows(path) == ROWS


async def test_a_file_that_is_in_the_way_is_not_replaced(tmp_path: Path) -> None:
    path, other = tmp_path / "ledger", tmp_path / "ledger.earlier"
    path.write_text(LINES)
    other.write_text(LINES[:100])
    with pytest.raises(StartError, match="exists already"):
        SimulatedGateway(path)
    assert (path.read_text(), other.read_text()) == (LINES, LINES[:100])


async def test_what_is_no_ledger_is_not_moved(tmp_path: Path) -> None:
    for text in ("no ledger\n" * 100, "[1, 2]\n", '["theirs"]\n'):
        file = tmp_path / "theirs"
        file.write_text(text)
        with pytest.raises(StartError, match="file is not a database"):
            SimulatedGateway(file)
        assert [each.read_text() for each in tmp_path.iterdir()] == [text]


@pytest.mark.parametrize(
    ("earlier", "step"),
    [
        *(("beside", step) for step in ("open 1", "decision 2", "rename 1")),
        *(("in its place", step) for step in ("rename 1", "open 2", "decision 2", "rename 2")),
    ],
    indirect=["earlier"],
)
def test_a_kill_in_the_middle_loses_nothing(
    path: Path, earlier: Path, kept: Path, step: str
) -> None:
    earlier.write_text(LINES)
    killed = opener(path, earlier, step)
    killed.communicate("\n", timeout=30)
    assert killed.returncode == -9
    after = opener(path, earlier)
    assert UUID(after.communicate("\n", timeout=30)[0].strip())
    assert ledger_rows(path) == ROWS
    assert kept.read_text() == LINES


def test_processes_that_start_at_once_read_it_in_once(
    path: Path, earlier: Path, kept: Path
) -> None:
    lines = [[str(uuid.uuid4()), 1500, "INR", "approved"] for _ in range(3000)]
    earlier.write_text("".join(json.dumps(line) + "\n" for line in lines))
    started = [opener(path, earlier) for _ in range(3)]
    ids = set()
    for each in started:
        assert each.stdout is not None
        ids.add(each.stdout.readline())
        assert len(ledger_rows(path)) == 3000
    for each in started:
        each.communicate("\n", timeout=30)
    assert len(ids) == 1
    assert ids.pop().strip()
    assert [file.name for file in path.parent.glob("*.imported*")] == [kept.name]


async def test_who_still_writes_to_it_can_decide_nothing(open_gateway: Open, earlier: Path) -> None:
    earlier.write_text(LINES)
    with earlier.open("ab") as theirs:  # a process of the earlier version
        gateway = open_gateway()
        with pytest.raises(BlockingIOError):
            fcntl.flock(theirs, fcntl.LOCK_EX | fcntl.LOCK_NB)
        await gateway.close()
        fcntl.flock(theirs, fcntl.LOCK_EX | fcntl.LOCK_NB)


async def test_what_was_decided_after_a_rollback_is_read_in_as_well(
    open_gateway: Open, tmp_path: Path
) -> None:
    """The earlier version began another file; what was decided first stands."""
    earlier, later = tmp_path / "simulated-ledger.jsonl", uuid.uuid4()
    path = tmp_path / "simulated-ledger.sqlite"
    for text in (LINES, f'["{later}",800,"INR","approved"]\n["{ID}",7,"INR","declined"]\n'):
        earlier.write_text(text)
        gateway = SimulatedGateway(path, earlier=earlier)
        await gateway.close()
    charges = {row.id: row.amount_cents for row in ledger_rows(path) if row.payment_id is None}
    assert charges == {ID: 1500, OTHER_ID: 17, later: 800}
    kept = {file.name for file in tmp_path.glob("*.imported*")}
    assert kept == {f"{earlier.name}.imported", f"{earlier.name}.imported-2"}
