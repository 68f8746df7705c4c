"""The simulated provider: what it decides, what it remembers, and how it fails when told to."""

import asyncio
import subprocess
import sys
import uuid
from pathlib import Path
from uuid import UUID

import pytest

from payments.errors import StartError
from payments.gateways import Gateway, NeverSent, OutcomeUnknown, ProviderCharge, simulated_ledger
from payments.gateways.simulated import Fault, SimulatedGateway, parse_faults
from payments.payment import Approved, Declined

pytestmark = pytest.mark.anyio

ID = UUID("058c9593-e150-402f-ab5b-37dd4c9816f0")
OTHER_ID = UUID("11111111-1111-4111-8111-111111111111")
APPROVED = Approved(ID, 1500, "INR", f"sim_{ID.hex}")


def charge_of(
    payment_id: UUID = ID, amount_cents: int = 1500, currency: str = "INR"
) -> ProviderCharge:
    return ProviderCharge(payment_id, amount_cents, currency)


async def charge(gateway: Gateway, payment_id: UUID = ID) -> Approved | Declined | type[Exception]:
    """What a caller learns, the two kinds of not learning it included; no fault waits here."""
    try:
        return await gateway.charge(charge_of(payment_id), timeout_s=0)
    except (OutcomeUnknown, NeverSent) as error:
        return type(error)


async def find(
    gateway: Gateway, payment_id: UUID = ID
) -> Approved | Declined | type[Exception] | None:
    try:
        return await gateway.find_charge(payment_id, timeout_s=0)
    except (OutcomeUnknown, NeverSent) as error:
        return type(error)


def rows(ledger: Path) -> int:
    return len(ledger.read_text().splitlines())


@pytest.fixture
def ledger(tmp_path: Path) -> Path:
    return tmp_path / "ledger.jsonl"


class TestDecisions:
    @pytest.mark.parametrize("amount_cents", [1, 6, 8, 10, 70, 1500, 7_000, 2_147_483_646])
    async def test_most_amounts_are_captured(self, amount_cents: int) -> None:
        gateway = SimulatedGateway(None)
        assert await gateway.charge(charge_of(amount_cents=amount_cents), 1) == Approved(
            ID, amount_cents, "INR", f"sim_{ID.hex}"
        )
        await gateway.close()

    @pytest.mark.parametrize("amount_cents", [7, 17, 1507, 777, 2_147_483_647])
    async def test_a_last_digit_of_7_is_declined(self, amount_cents: int) -> None:
        gateway = SimulatedGateway(None)
        declined = Declined("declined_by_simulation")
        assert await gateway.charge(charge_of(amount_cents=amount_cents), 1) == declined
        assert await gateway.find_charge(ID, 1) == declined
        await gateway.close()

    async def test_it_finds_what_it_captured_and_nothing_else(self) -> None:
        gateway = SimulatedGateway(None)
        assert await gateway.find_charge(ID, 1) is None
        await gateway.charge(charge_of(), 1)
        assert await gateway.find_charge(ID, 1) == APPROVED
        assert await gateway.find_charge(OTHER_ID, 1) is None
        await gateway.close()

    @pytest.mark.parametrize(
        ("first", "again"),
        [
            (charge_of(), charge_of()),
            (charge_of(), charge_of(amount_cents=9_999)),
            (charge_of(), charge_of(amount_cents=1507)),
            (charge_of(), charge_of(currency="USD")),
            (charge_of(amount_cents=1507), charge_of(amount_cents=1500)),
        ],
    )
    async def test_the_same_id_twice_is_one_charge(
        self, ledger: Path, first: ProviderCharge, again: ProviderCharge
    ) -> None:
        gateway = SimulatedGateway(ledger)
        answer = await gateway.charge(first, 1)
        assert await gateway.charge(again, 1) == answer
        assert await gateway.find_charge(ID, 1) == answer
        await gateway.close()
        assert rows(ledger) == 1

    async def test_it_declares_a_day_of_safe_retries(self) -> None:
        gateway = SimulatedGateway(None)
        assert gateway.name == "simulated"
        assert gateway.safe_retry_s == 24 * 3600
        await gateway.close()


class TestLedger:
    async def test_two_gateways_share_one_file(self, ledger: Path) -> None:
        one, other = SimulatedGateway(ledger), SimulatedGateway(ledger)
        assert await charge(one) == APPROVED
        assert await find(other) == APPROVED
        assert await charge(other) == APPROVED
        assert await charge(other, OTHER_ID) == await find(one, OTHER_ID)
        await one.close()
        await other.close()
        assert rows(ledger) == 2

    async def test_it_survives_being_opened_again(self, ledger: Path) -> None:
        first = SimulatedGateway(ledger)
        await charge(first)
        await first.close()
        again = SimulatedGateway(ledger)
        assert await find(again) == APPROVED
        await again.close()

    async def test_it_survives_a_kill(self, ledger: Path) -> None:
        program = """
import asyncio, os, pathlib, signal, sys, uuid
from payments.gateways import ProviderCharge
from payments.gateways.simulated import SimulatedGateway
async def main():
    gateway = SimulatedGateway(pathlib.Path(sys.argv[1]))
    await gateway.charge(ProviderCharge(uuid.UUID(sys.argv[2]), 1500, "INR"), 1)
    os.kill(os.getpid(), signal.SIGKILL)
asyncio.run(main())
"""
        killed = subprocess.run([sys.executable, "-c", program, ledger, str(ID)], check=False)
        assert killed.returncode == -9
        gateway = SimulatedGateway(ledger)
        assert await find(gateway) == APPROVED
        await gateway.close()

    async def test_without_a_file_two_gateways_share_nothing(self) -> None:
        one, other = SimulatedGateway(None), SimulatedGateway(None)
        await charge(one)
        assert await find(other) is None
        await one.close()
        await other.close()

    async def test_memory_is_bounded(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(simulated_ledger, "RECENT_MAX", 3)
        gateway = SimulatedGateway(None)
        ids = [uuid.uuid4() for _ in range(5)]
        for payment_id in ids:
            await charge(gateway, payment_id)
        known = [await find(gateway, payment_id) is not None for payment_id in ids]
        assert known == [False, False, True, True, True]
        await gateway.close()

    async def test_a_file_forgets_nothing(
        self, ledger: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setattr(simulated_ledger, "RECENT_MAX", 3)
        gateway = SimulatedGateway(ledger)
        ids = [uuid.uuid4() for _ in range(30)]
        for payment_id in ids:
            await charge(gateway, payment_id)
        again = SimulatedGateway(ledger)
        for each in (gateway, again):
            assert all([isinstance(await find(each, payment_id), Approved) for payment_id in ids])
            assert await find(each) is None
            await each.close()
        assert rows(ledger) == 30

    async def test_the_first_line_of_an_id_is_its_outcome(self, ledger: Path) -> None:
        ledger.write_text(f'["{ID}",1500,"INR","approved"]\n["{ID}",7,"INR","declined"]\n')
        gateway = SimulatedGateway(ledger)
        assert await find(gateway) == APPROVED
        await gateway.close()

    async def test_half_a_line_is_nobodys_decision(self, ledger: Path) -> None:
        gateway = SimulatedGateway(ledger)
        await charge(gateway, OTHER_ID)
        with ledger.open("a") as file:
            file.write(f'["{ID}",1500,"IN')
        assert await find(gateway) is None
        assert await charge(gateway) == APPROVED
        await gateway.close()
        assert rows(ledger) == 2

    async def test_missing_directories_are_made(self, tmp_path: Path) -> None:
        ledger = tmp_path / "not" / "yet" / "ledger.jsonl"
        gateway = SimulatedGateway(ledger)
        await charge(gateway)
        await gateway.close()
        assert rows(ledger) == 1

    async def test_an_unusable_file_stops_the_start(self, tmp_path: Path) -> None:
        text = tmp_path / "text"
        text.write_text("no ledger\n" * 100)
        for path in (tmp_path, text, text / "ledger.jsonl", tmp_path / ("x" * 300)):
            with pytest.raises(StartError) as caught:
                SimulatedGateway(path)
            message = str(caught.value)
            assert message.startswith("SIMULATED_LEDGER: ")
            assert len(message.splitlines()) == 1

    async def test_a_full_disk_leaves_the_outcome_unknown(self) -> None:
        gateway = SimulatedGateway(Path("/dev/full"))
        assert await charge(gateway) is OutcomeUnknown
        assert await find(gateway) is None
        await gateway.close()

    async def test_a_closed_one_leaves_the_outcome_unknown(self) -> None:
        gateway = SimulatedGateway(None)
        await charge(gateway)
        await gateway.close()
        async with asyncio.timeout(2):  # a caller never hangs
            assert await charge(gateway, OTHER_ID) is OutcomeUnknown
            assert await find(gateway) is OutcomeUnknown


class TestManyAtOnce:
    async def test_200_charges(self, ledger: Path) -> None:
        gateway = SimulatedGateway(ledger)
        ids = [uuid.uuid4() for _ in range(200)]
        answers = await asyncio.gather(*(charge(gateway, payment_id) for payment_id in ids))
        assert answers == [Approved(i, 1500, "INR", f"sim_{i.hex}") for i in ids]
        assert await asyncio.gather(*(find(gateway, i) for i in ids)) == answers
        await gateway.close()
        assert rows(ledger) == 200

    async def test_200_times_one_charge(self, ledger: Path) -> None:
        gateway = SimulatedGateway(ledger)
        answers = await asyncio.gather(*(charge(gateway) for _ in range(200)))
        assert answers == [APPROVED] * 200
        await gateway.close()
        assert rows(ledger) == 1

    async def test_two_gateways_race_for_100_ids(self, ledger: Path) -> None:
        one, other = SimulatedGateway(ledger), SimulatedGateway(ledger)
        ids = [uuid.uuid4() for _ in range(100)]
        ours, theirs = await asyncio.gather(
            asyncio.gather(*(charge(one, payment_id) for payment_id in ids)),
            asyncio.gather(*(charge(other, payment_id) for payment_id in reversed(ids))),
        )
        assert ours == theirs[::-1]
        await one.close()
        await other.close()
        assert rows(ledger) == 100

    async def test_a_caller_that_goes_away_harms_nobody(self, ledger: Path) -> None:
        gateway = SimulatedGateway(ledger)
        tasks = [asyncio.create_task(charge(gateway, uuid.uuid4())) for _ in range(10)]
        await asyncio.sleep(0)  # all of them wait now
        tasks[0].cancel()
        answers = await asyncio.gather(*tasks, return_exceptions=True)
        assert isinstance(answers[0], asyncio.CancelledError)
        assert all(isinstance(answer, Approved) for answer in answers[1:])
        await gateway.close()


class TestFaults:
    async def test_timeout_captures_nothing(self) -> None:
        gateway = SimulatedGateway(None, "timeout*1")
        assert await charge(gateway) is OutcomeUnknown
        assert await find(gateway) is None
        assert await charge(gateway) == APPROVED
        await gateway.close()

    async def test_answer_lost_captures(self, ledger: Path) -> None:
        gateway = SimulatedGateway(ledger, "answer_lost*1")
        assert await charge(gateway) is OutcomeUnknown
        assert await find(gateway) == APPROVED
        assert await charge(gateway) == APPROVED
        await gateway.close()
        assert rows(ledger) == 1

    async def test_an_answer_that_is_lost_may_be_a_decline(self) -> None:
        gateway = SimulatedGateway(None, "answer_lost")
        with pytest.raises(OutcomeUnknown):
            await gateway.charge(charge_of(amount_cents=7), 1)
        assert await find(gateway) == Declined("declined_by_simulation")
        await gateway.close()

    async def test_down_is_never_sent_for_charges_and_questions(self, ledger: Path) -> None:
        gateway = SimulatedGateway(ledger, "down*3")
        assert await charge(gateway) is NeverSent
        assert await find(gateway) is NeverSent
        assert await charge(gateway) is NeverSent
        assert rows(ledger) == 0
        assert await find(gateway) is None
        assert await charge(gateway) == APPROVED
        await gateway.close()

    async def test_a_delay_within_the_timeout_is_only_slow(self) -> None:
        gateway = SimulatedGateway(None, "delay=0.001")
        assert await gateway.charge(charge_of(), timeout_s=5) == APPROVED
        await gateway.close()

    async def test_a_delay_beyond_the_timeout_leaves_the_outcome_unknown(self) -> None:
        gateway = SimulatedGateway(None, "delay=60*2")
        assert await charge(gateway) is OutcomeUnknown
        assert await charge(gateway) is OutcomeUnknown
        assert await charge(gateway) == APPROVED
        await gateway.close()

    @pytest.mark.parametrize(
        ("faults", "learned"),
        [
            ("", [APPROVED, APPROVED]),
            ("down*0", [APPROVED]),
            ("timeout", [OutcomeUnknown] * 5),
            ("answer_lost", [OutcomeUnknown] * 5),
            ("down", [NeverSent] * 5),
            ("down*2", [NeverSent, NeverSent, APPROVED]),
            (
                "down*1,timeout*1,answer_lost*1",
                [NeverSent, OutcomeUnknown, OutcomeUnknown, APPROVED],
            ),
            ("timeout*1,down*1", [OutcomeUnknown, NeverSent, APPROVED]),
            ("delay=0,down*1", [NeverSent, APPROVED]),
            ("delay=60*1,down*1", [OutcomeUnknown, NeverSent, APPROVED]),
        ],
    )
    async def test_counts_and_order(
        self, faults: str, learned: list[Approved | type[Exception]]
    ) -> None:
        gateway = SimulatedGateway(None, faults)
        assert [await charge(gateway) for _ in learned] == learned
        await gateway.close()

    @pytest.mark.parametrize("faults", ["timeout*1", "answer_lost*1", "delay=60*1"])
    async def test_a_question_uses_up_no_fault_of_charges(self, faults: str) -> None:
        gateway = SimulatedGateway(None, faults)
        assert await find(gateway) is None
        assert await charge(gateway) is OutcomeUnknown
        await gateway.close()

    @pytest.mark.parametrize(
        ("text", "faults"),
        [
            ("", []),
            (" , ", []),
            ("down", [Fault("down", 0, None)]),
            ("timeout*3", [Fault("timeout", 0, 3)]),
            ("delay=0.5", [Fault("delay", 0.5, None)]),
            (
                " delay=2*10 ,answer_lost*1 ",
                [Fault("delay", 2, 10), Fault("answer_lost", 0, 1)],
            ),
        ],
    )
    async def test_faults_are_read(self, text: str, faults: list[Fault]) -> None:
        assert parse_faults(text) == faults

    @pytest.mark.parametrize(
        "text",
        [
            *("delay", "delay=", "delay=x", "delay=-1", "delay=1s", "delay=1e3", "delay=.5"),
            *("delay=nan", "delay=99999", "delay*3", "down=1", "down*", "down*-1", "down*x"),
            *("down*9999999", "down*1*2", "down timeout", "down;timeout", "DOWN", "late", "*1"),
            *("down,late", "down\nlate", "down*١", "delay=٥"),
        ],
    )
    async def test_bad_faults_stop_the_start(self, text: str) -> None:
        with pytest.raises(StartError) as caught:
            SimulatedGateway(None, text)
        message = str(caught.value)
        assert message.startswith("SIMULATED_FAULTS: ")
        assert len(message.splitlines()) == 1
