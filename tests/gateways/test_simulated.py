"""The simulated provider: what it decides, what it remembers, and how it fails when told to."""

import asyncio
import random
import re
import subprocess
import sys
import uuid
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import AsyncExitStack
from pathlib import Path
from typing import Any
from uuid import UUID

import pytest

from payments.errors import StartError
from payments.gateways import (
    Gateway,
    NeverSent,
    OutcomeUnknown,
    ProviderCharge,
    ProviderRefund,
    ledger_file,
)
from payments.gateways import Open as OpenCharge
from payments.gateways.simulated import Fault, SimulatedGateway, parse_faults
from payments.payment.state import Approved, Declined
from tests.doubles.gateway import asking
from tests.support import PATIENCE_S, ledger_rows

pytestmark = pytest.mark.anyio

ID = UUID("058c9593-e150-402f-ab5b-37dd4c9816f0")
OTHER_ID = UUID("11111111-1111-4111-8111-111111111111")
REFUND_ID = UUID("22222222-2222-4222-8222-222222222222")
APPROVED = Approved(id=ID, amount_cents=1500, currency="INR", provider_txn_id=f"sim_{ID.hex}")
GIVEN_BACK = Approved(
    id=REFUND_ID, amount_cents=500, currency="INR", provider_txn_id=f"simre_{REFUND_ID.hex}"
)
EXCEEDS = Declined("refund_exceeds_capture")
NOT_CAPTURED = Declined("not_captured")


def charge_of(
    payment_id: UUID = ID, amount_cents: int = 1500, currency: str = "INR"
) -> ProviderCharge:
    return ProviderCharge(payment_id=payment_id, amount_cents=amount_cents, currency=currency)


async def charge(
    gateway: Gateway, payment_id: UUID = ID
) -> Approved | Declined | OpenCharge | type[Exception]:
    """What a caller learns, the two kinds of not learning it included; no fault waits here."""
    try:
        return await gateway.charge(charge_of(payment_id), timeout_s=0)
    except (OutcomeUnknown, NeverSent) as error:
        return type(error)


async def find(
    gateway: Gateway, payment_id: UUID = ID
) -> Approved | Declined | OpenCharge | type[Exception] | None:
    try:
        return await gateway.find_charge(asking(payment_id), timeout_s=0)
    except (OutcomeUnknown, NeverSent) as error:
        return type(error)


def refund_of(
    amount_cents: int = 500,
    refund_id: UUID | None = None,
    payment_id: UUID = ID,
    currency: str = "INR",
    txn_id: str | None = None,
) -> ProviderRefund:
    """A new refund, unless it is given an id."""
    txn_id = txn_id or f"sim_{payment_id.hex}"
    return ProviderRefund(
        refund_id=refund_id or uuid.uuid4(),
        payment_id=payment_id,
        provider_txn_id=txn_id,
        amount_cents=amount_cents,
        currency=currency,
    )


REFUND = refund_of(refund_id=REFUND_ID)


async def refund(
    gateway: Gateway, asked: ProviderRefund = REFUND
) -> Approved | Declined | OpenCharge | type[Exception]:
    try:
        return await gateway.refund(asked, timeout_s=0)
    except (OutcomeUnknown, NeverSent) as error:
        return type(error)


async def find_refund(
    gateway: Gateway, asked: ProviderRefund = REFUND
) -> Approved | Declined | OpenCharge | type[Exception] | None:
    try:
        return await gateway.find_refund(asked, timeout_s=0)
    except (OutcomeUnknown, NeverSent) as error:
        return type(error)


def rows(ledger: Path) -> int:
    return len(ledger_rows(ledger))


def given_back(ledger: Path) -> dict[UUID, int]:
    """Cents by payment id."""
    sums: dict[UUID, int] = {}
    for row in ledger_rows(ledger):
        if row.payment_id is not None and row.outcome == "approved":
            sums[row.payment_id] = sums.get(row.payment_id, 0) + row.amount_cents
    return sums


@pytest.fixture
def ledger(tmp_path: Path) -> Path:
    return tmp_path / "ledger.sqlite"


Open = Callable[..., SimulatedGateway]


@pytest.fixture
async def open_gateway() -> AsyncIterator[Open]:
    """Several on one file stand for several processes: each has its own memory and its own lock."""
    async with AsyncExitStack() as stack:

        def start(ledger: Path | None, faults: str = "") -> SimulatedGateway:
            gateway = SimulatedGateway(ledger, faults)
            stack.push_async_callback(gateway.close)
            return gateway

        yield start


@pytest.fixture
def small_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ledger_file, "RECENT_MAX", 3)


async def forget(gateway: Gateway) -> None:
    """With a small memory: nothing that was decided before is in it afterwards."""
    for _ in range(4):
        other = uuid.uuid4()
        await charge(gateway, other)
        await refund(gateway, refund_of(payment_id=other))


class TestDecisions:
    @pytest.mark.parametrize("amount_cents", [1, 6, 8, 10, 70, 1500, 7_000, 2_147_483_646])
    async def test_most_amounts_are_captured(self, amount_cents: int) -> None:
        gateway = SimulatedGateway(None)
        assert await gateway.charge(charge_of(amount_cents=amount_cents), 1) == Approved(
            id=ID, amount_cents=amount_cents, currency="INR", provider_txn_id=f"sim_{ID.hex}"
        )
        await gateway.close()

    @pytest.mark.parametrize("amount_cents", [7, 17, 1507, 777, 2_147_483_647])
    async def test_a_last_digit_of_7_is_declined(self, amount_cents: int) -> None:
        gateway = SimulatedGateway(None)
        declined = Declined("declined_by_simulation")
        assert await gateway.charge(charge_of(amount_cents=amount_cents), 1) == declined
        assert await gateway.find_charge(asking(ID), 1) == declined
        await gateway.close()

    async def test_it_finds_what_it_captured_and_nothing_else(self) -> None:
        gateway = SimulatedGateway(None)
        assert await gateway.find_charge(asking(ID), 1) is None
        await gateway.charge(charge_of(), 1)
        assert await gateway.find_charge(asking(ID), 1) == APPROVED
        assert await gateway.find_charge(asking(OTHER_ID), 1) is None
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
        assert await gateway.find_charge(asking(ID), 1) == answer
        await gateway.close()
        assert rows(ledger) == 1

    async def test_it_declares_a_day_of_safe_retries(self) -> None:
        gateway = SimulatedGateway(None)
        assert gateway.name == "simulated"
        assert gateway.charge_retry_s == 24 * 3600
        assert gateway.late_capture_s == 24 * 3600
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
from payments.gateways import Open, ProviderCharge
from payments.gateways.simulated import SimulatedGateway
async def main():
    gateway = SimulatedGateway(pathlib.Path(sys.argv[1]))
    await gateway.charge(ProviderCharge(
        payment_id=uuid.UUID(sys.argv[2]), amount_cents=1500, currency="INR"), 1)
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
        monkeypatch.setattr(ledger_file, "RECENT_MAX", 3)
        gateway = SimulatedGateway(None)
        ids = [uuid.uuid4() for _ in range(5)]
        for payment_id in ids:
            await charge(gateway, payment_id)
        known = [await find(gateway, payment_id) is not None for payment_id in ids]
        assert known == [False, False, True, True, True]
        await gateway.close()

    async def test_missing_directories_are_made(self, tmp_path: Path) -> None:
        ledger = tmp_path / "not" / "yet" / "ledger.sqlite"
        gateway = SimulatedGateway(ledger)
        await charge(gateway)
        await gateway.close()
        assert rows(ledger) == 1

    async def test_an_unusable_file_stops_the_start(self, tmp_path: Path) -> None:
        text = tmp_path / "text"
        text.write_text("no ledger\n" * 100)
        for path in (tmp_path, text, text / "ledger.sqlite", tmp_path / ("x" * 300)):
            with pytest.raises(StartError) as caught:
                SimulatedGateway(path)
            message = str(caught.value)
            assert message.startswith("SIMULATED_LEDGER: ")
            assert len(message.splitlines()) == 1

    async def test_a_closed_one_leaves_the_outcome_unknown(self) -> None:
        gateway = SimulatedGateway(None)
        await charge(gateway)
        await gateway.close()
        async with asyncio.timeout(PATIENCE_S):  # a caller never hangs
            assert await charge(gateway, OTHER_ID) is OutcomeUnknown
            assert await find(gateway) is OutcomeUnknown


class TestRefunds:
    async def test_what_was_captured_is_given_back(self, open_gateway: Open) -> None:
        gateway = open_gateway(None)
        await charge(gateway)
        assert await find_refund(gateway) is None
        assert await refund(gateway) == GIVEN_BACK
        assert await find_refund(gateway) == GIVEN_BACK
        assert await find(gateway) == APPROVED

    @pytest.mark.parametrize("with_file", [True, False])
    async def test_partial_refunds_add_up_to_the_capture_and_no_further(
        self, open_gateway: Open, ledger: Path, with_file: bool
    ) -> None:
        gateway = open_gateway(ledger if with_file else None)
        await charge(gateway)
        amounts = [1000, 501, 400, 101, 100, 1]
        answers = [await refund(gateway, refund_of(amount)) for amount in amounts]
        assert [type(answer) for answer in answers] == [Approved, Declined] * 3
        assert answers[1::2] == [EXCEEDS] * 3

    @pytest.mark.parametrize("amount_cents", [1, 9, 1500, 1509, 2_147_483_639])
    async def test_a_whole_refund_always_works(self, open_gateway: Open, amount_cents: int) -> None:
        gateway = open_gateway(None)
        await gateway.charge(charge_of(amount_cents=amount_cents), 1)
        assert isinstance(await refund(gateway, refund_of(amount_cents)), Approved)
        assert await refund(gateway, refund_of(1)) == EXCEEDS

    @pytest.mark.parametrize("amount_cents", [9, 509, 1499])
    async def test_a_partial_refund_with_a_last_digit_of_9_is_declined(
        self, open_gateway: Open, amount_cents: int
    ) -> None:
        gateway = open_gateway(None)
        await charge(gateway)
        asked = refund_of(amount_cents)
        declined = Declined("refund_declined_by_simulation")
        assert await refund(gateway, asked) == declined
        assert await refund(gateway, asked) == declined
        assert await find_refund(gateway, asked) == declined
        assert isinstance(await refund(gateway, refund_of(1500)), Approved)

    async def test_the_rest_after_a_partial_refund_is_partial_too(self, open_gateway: Open) -> None:
        gateway = open_gateway(None)
        await gateway.charge(charge_of(amount_cents=1509), 1)
        await refund(gateway, refund_of(1500))
        assert await refund(gateway, refund_of(9)) == Declined("refund_declined_by_simulation")

    @pytest.mark.parametrize("amount_cents", [0, -1, -500, 1501, 1509, 2_147_483_647])
    async def test_an_impossible_amount_is_declined(
        self, open_gateway: Open, amount_cents: int
    ) -> None:
        gateway = open_gateway(None)
        await charge(gateway)
        assert await refund(gateway, refund_of(amount_cents)) == EXCEEDS
        assert isinstance(await refund(gateway, refund_of(1500)), Approved)

    async def test_what_was_not_captured_is_not_given_back(self, open_gateway: Open) -> None:
        gateway = open_gateway(None)
        assert await refund(gateway) == NOT_CAPTURED
        await gateway.charge(charge_of(OTHER_ID, 1507), 1)
        assert await refund(gateway, refund_of(payment_id=OTHER_ID)) == NOT_CAPTURED
        await charge(gateway)
        assert await refund(gateway) == NOT_CAPTURED  # decided before, once and for all
        assert await refund(gateway, refund_of(currency="USD")) == NOT_CAPTURED
        assert await refund(gateway, refund_of(txn_id=f"sim_{OTHER_ID.hex}")) == NOT_CAPTURED

    @pytest.mark.parametrize(
        "again",
        [
            REFUND,
            refund_of(1500, REFUND_ID),
            refund_of(9, REFUND_ID),
            refund_of(9_999, REFUND_ID),
            refund_of(500, REFUND_ID, OTHER_ID),
            refund_of(500, REFUND_ID, currency="USD"),
        ],
    )
    async def test_the_same_refund_id_twice_is_one_refund(
        self, open_gateway: Open, ledger: Path, again: ProviderRefund
    ) -> None:
        gateway = open_gateway(ledger)
        await charge(gateway)
        assert await refund(gateway) == GIVEN_BACK
        assert await refund(gateway, again) == GIVEN_BACK
        assert await find_refund(gateway, again) == GIVEN_BACK
        assert given_back(ledger) == {ID: 500}

    async def test_a_refund_may_have_the_id_of_its_payment(
        self, open_gateway: Open, ledger: Path
    ) -> None:
        gateway = open_gateway(ledger)
        await charge(gateway)
        asked = refund_of(500, ID)
        assert await find_refund(gateway, asked) is None
        answer = Approved(
            id=ID, amount_cents=500, currency="INR", provider_txn_id=f"simre_{ID.hex}"
        )
        assert await refund(gateway, asked) == answer
        for _ in range(2):
            assert await refund(gateway, asked) == answer
            assert await find_refund(gateway, asked) == answer
            assert await charge(gateway) == await find(gateway) == APPROVED
        assert await find(gateway) == APPROVED

    async def test_a_refund_with_a_payment_id_that_is_charged_later(
        self, open_gateway: Open, ledger: Path
    ) -> None:
        gateway = open_gateway(ledger)
        await charge(gateway, OTHER_ID)
        await refund(gateway, refund_of(500, ID, OTHER_ID))
        assert await find(gateway) is None
        assert await charge(gateway) == APPROVED


class TestRefundsInTheLedger:
    async def test_it_survives_being_opened_again(self, ledger: Path) -> None:
        for _ in range(3):
            gateway = SimulatedGateway(ledger)
            await charge(gateway)
            assert await refund(gateway) == GIVEN_BACK
            assert await refund(gateway, refund_of(1001)) == EXCEEDS
            await gateway.close()
            again = SimulatedGateway(ledger)
            assert await find_refund(again) == GIVEN_BACK
            await again.close()
        assert given_back(ledger) == {ID: 500}

    async def test_it_survives_a_kill(self, open_gateway: Open, ledger: Path) -> None:
        await charge(open_gateway(ledger))
        program = """
import asyncio, os, pathlib, signal, sys, uuid
from payments.gateways import ProviderRefund
from payments.gateways.simulated import SimulatedGateway
async def main():
    gateway = SimulatedGateway(pathlib.Path(sys.argv[1]))
    refund_id, payment_id = map(uuid.UUID, sys.argv[2:])
    await gateway.refund(
        ProviderRefund(refund_id=refund_id, payment_id=payment_id,
            provider_txn_id=f"sim_{payment_id.hex}", amount_cents=500, currency="INR"), 1
    )
    os.kill(os.getpid(), signal.SIGKILL)
asyncio.run(main())
"""
        killed = subprocess.run(
            [sys.executable, "-c", program, ledger, str(REFUND_ID), str(ID)], check=False
        )
        assert killed.returncode == -9
        gateway = open_gateway(ledger)
        assert await find_refund(gateway) == GIVEN_BACK
        assert await refund(gateway) == GIVEN_BACK
        assert await refund(gateway, refund_of(1001)) == EXCEEDS

    async def test_what_another_process_gave_back_counts(
        self, open_gateway: Open, ledger: Path
    ) -> None:
        one, other = open_gateway(ledger), open_gateway(ledger)
        await charge(one)
        assert await refund(other) == GIVEN_BACK
        assert await refund(one) == await find_refund(one) == GIVEN_BACK
        assert await refund(one, refund_of(1001)) == EXCEEDS
        assert isinstance(await refund(one, refund_of(600)), Approved)
        assert await refund(other, refund_of(401)) == EXCEEDS
        assert isinstance(await refund(other, refund_of(400)), Approved)
        assert await refund(one, refund_of(1)) == EXCEEDS
        assert given_back(ledger) == {ID: 1500}

    async def test_without_a_file_memory_is_bounded_and_still_exact(
        self, open_gateway: Open, small_memory: None
    ) -> None:
        """A charge and what was given back of it are forgotten together."""
        gateway = open_gateway(None)
        await charge(gateway, OTHER_ID)
        await charge(gateway)
        asked = refund_of(1500)
        assert isinstance(await refund(gateway, asked), Approved)
        for _ in range(5):
            assert isinstance(await refund(gateway, refund_of(10, payment_id=OTHER_ID)), Approved)
        assert await refund(gateway, refund_of(1)) == EXCEEDS
        await forget(gateway)
        assert await refund(gateway, refund_of(1)) == NOT_CAPTURED
        assert await find_refund(gateway, asked) is None

    async def test_a_closed_one_leaves_the_outcome_unknown(self) -> None:
        gateway = SimulatedGateway(None)
        await gateway.close()
        async with asyncio.timeout(PATIENCE_S):
            assert await refund(gateway) is OutcomeUnknown
            assert await find_refund(gateway) is OutcomeUnknown

    async def test_any_mixture_is_decided_as_in_memory(
        self, open_gateway: Open, ledger: Path
    ) -> None:
        """Three processes, one restarted now and then, against a ledger in memory."""
        chance = random.Random(1)
        ids = [uuid.uuid4() for _ in range(6)]
        refunds = [
            refund_of(chance.choice([100, 109, 300, 700, 1000]), payment_id=chance.choice(ids))
            for _ in range(80)
        ]
        in_memory = open_gateway(None)
        several = [open_gateway(ledger) for _ in range(3)]
        for _ in range(600):
            if chance.random() < 0.05:
                several[chance.randrange(3)] = open_gateway(ledger)
            which, payment_id = chance.choice(several), chance.choice(ids)
            asked = chance.choice(refunds)
            expected = [await charge(in_memory, payment_id), await refund(in_memory, asked)]
            assert [await charge(which, payment_id), await refund(which, asked)] == expected
            assert await find_refund(chance.choice(several), asked) == expected[1]
        sums = given_back(ledger)
        assert max(sums.values()) <= 1500
        assert len(sums) == len(ids)


class TestManyAtOnce:
    async def test_two_processes_race_with_32_refunds(
        self, open_gateway: Open, ledger: Path
    ) -> None:
        """Of each of 30 payments, 1500 in all; three refunds of 500 fit, 29 do not."""
        gateways = [open_gateway(ledger), open_gateway(ledger)]
        for _ in range(30):
            payment_id = uuid.uuid4()
            await charge(gateways[0], payment_id)
            asked = [refund_of(500, payment_id=payment_id) for _ in range(32)]
            answers = await asyncio.gather(
                *(refund(gateways[place % 2], each) for place, each in enumerate(asked))
            )
            assert sum(isinstance(answer, Approved) for answer in answers) == 3
            assert answers.count(EXCEEDS) == 29
            assert [await find_refund(gateways[0], each) for each in asked] == answers
        assert set(given_back(ledger).values()) == {1500}

    async def test_two_processes_race_with_one_refund_id(
        self, open_gateway: Open, ledger: Path
    ) -> None:
        gateways = [open_gateway(ledger), open_gateway(ledger)]
        await charge(gateways[0])
        for _ in range(30):
            asked = refund_of(50)
            answers = await asyncio.gather(*(refund(gateways[n % 2], asked) for n in range(32)))
            assert len(set(answers)) == 1
        assert rows(ledger) == 31
        assert given_back(ledger) == {ID: 1500}

    async def test_two_programs_race(self, open_gateway: Open, ledger: Path) -> None:
        program = """
import asyncio, pathlib, sys, uuid
from payments.gateways import ProviderRefund
from payments.gateways.simulated import SimulatedGateway
async def main():
    gateway = SimulatedGateway(pathlib.Path(sys.argv[1]))
    payment_id = uuid.UUID(sys.argv[2])
    for _ in range(200):
        await gateway.refund(
            ProviderRefund(refund_id=uuid.uuid4(), payment_id=payment_id,
                provider_txn_id=f"sim_{payment_id.hex}", amount_cents=10, currency="INR"), 1
        )
asyncio.run(main())
"""
        await charge(open_gateway(ledger))
        command = [sys.executable, "-c", program, str(ledger), str(ID)]
        programs = [await asyncio.create_subprocess_exec(*command) for _ in range(2)]
        assert [await each.wait() for each in programs] == [0, 0]
        assert rows(ledger) == 401
        assert given_back(ledger) == {ID: 1500}

    async def test_refunds_and_charges_together(self, open_gateway: Open, ledger: Path) -> None:
        gateway = open_gateway(ledger)
        ids = [uuid.uuid4() for _ in range(100)]
        await asyncio.gather(*(charge(gateway, payment_id) for payment_id in ids))
        answers = await asyncio.gather(
            *(refund(gateway, refund_of(1500, payment_id=payment_id)) for payment_id in ids),
            *(charge(gateway, uuid.uuid4()) for _ in range(100)),
        )
        assert all(isinstance(answer, Approved) for answer in answers)
        assert rows(ledger) == 300

    async def test_200_charges(self, ledger: Path) -> None:
        gateway = SimulatedGateway(ledger)
        ids = [uuid.uuid4() for _ in range(200)]
        answers = await asyncio.gather(*(charge(gateway, payment_id) for payment_id in ids))
        assert answers == [
            Approved(id=i, amount_cents=1500, currency="INR", provider_txn_id=f"sim_{i.hex}")
            for i in ids
        ]
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

    async def test_a_refund_that_times_out_gives_nothing_back(
        self, open_gateway: Open, ledger: Path
    ) -> None:
        gateway = open_gateway(ledger, "refund:timeout*1")
        await charge(gateway)
        assert await refund(gateway) is OutcomeUnknown
        assert await find_refund(gateway) is None
        assert given_back(ledger) == {}
        assert await refund(gateway) == GIVEN_BACK

    async def test_a_refund_whose_answer_is_lost_gives_back_once(
        self, open_gateway: Open, ledger: Path
    ) -> None:
        gateway = open_gateway(ledger, "refund:answer_lost*1")
        await charge(gateway)
        assert await refund(gateway) is OutcomeUnknown
        assert await find_refund(gateway) == GIVEN_BACK
        assert await refund(gateway) == GIVEN_BACK
        assert given_back(ledger) == {ID: 500}

    async def test_down_is_never_sent_for_refunds_and_their_questions(
        self, open_gateway: Open, ledger: Path
    ) -> None:
        await charge(open_gateway(ledger))
        gateway = open_gateway(ledger, "down*2")
        assert await refund(gateway) is NeverSent
        assert await find_refund(gateway) is NeverSent
        assert await find_refund(gateway) is None
        assert await refund(gateway) == GIVEN_BACK

    async def test_a_delay_of_refunds(self, open_gateway: Open) -> None:
        gateway = open_gateway(None, "refund:delay=60*1,refund:delay=0.001")
        await charge(gateway)
        assert await refund(gateway) is OutcomeUnknown
        assert await find_refund(gateway) is None
        assert await gateway.refund(REFUND, timeout_s=5) == GIVEN_BACK

    @pytest.mark.parametrize(
        ("faults", "learned"),
        [
            # what is called: charge, find_charge, refund, find_refund, twice over
            ("down", [NeverSent] * 8),
            ("down*1", [NeverSent, None, NOT_CAPTURED, NOT_CAPTURED, APPROVED, APPROVED]),
            ("charge:down", [NeverSent, NeverSent, NOT_CAPTURED, NOT_CAPTURED] * 2),
            ("refund:down", [APPROVED, APPROVED, NeverSent, NeverSent] * 2),
            ("refund:down*2", [APPROVED, APPROVED, NeverSent, NeverSent, APPROVED, APPROVED]),
            ("refund:timeout", [APPROVED, APPROVED, OutcomeUnknown, None] * 2),
            ("charge:timeout", [OutcomeUnknown, None, NOT_CAPTURED, NOT_CAPTURED] * 2),
            ("refund:answer_lost", [APPROVED, APPROVED, OutcomeUnknown, GIVEN_BACK] * 2),
            ("charge:answer_lost", [OutcomeUnknown, APPROVED, GIVEN_BACK, GIVEN_BACK] * 2),
            (
                "timeout*1,refund:answer_lost*1",
                [OutcomeUnknown, None, OutcomeUnknown, NOT_CAPTURED, APPROVED, APPROVED],
            ),
            ("charge:delay=60,refund:down*1", [OutcomeUnknown, None, NeverSent, None]),
        ],
    )
    async def test_faults_of_one_operation(
        self, open_gateway: Open, faults: str, learned: list[Any]
    ) -> None:
        gateway = open_gateway(None, faults)
        calls: list[Callable[[Gateway], Awaitable[Any]]] = [charge, find, refund, find_refund] * 2
        assert [await call(gateway) for call in calls][: len(learned)] == learned

    @pytest.mark.parametrize("fault", ["timeout*1", "answer_lost*1", "delay=60*1"])
    async def test_whichever_call_comes_first_uses_up_a_fault(
        self, open_gateway: Open, ledger: Path, fault: str
    ) -> None:
        await charge(open_gateway(ledger))
        gateway = open_gateway(ledger, fault)
        assert await find_refund(gateway) is None
        assert await refund(gateway) is OutcomeUnknown
        assert await charge(gateway) == APPROVED

    @pytest.mark.parametrize(
        ("text", "faults"),
        [
            ("", []),
            (
                "refund:answer_lost*1",
                [Fault(kind="answer_lost", seconds=0, left=1, operation="refund")],
            ),
            (
                "charge:delay=0.5,down",
                [
                    Fault(kind="delay", seconds=0.5, left=None, operation="charge"),
                    Fault(kind="down", seconds=0, left=None),
                ],
            ),
            (" , ", []),
            ("down", [Fault(kind="down", seconds=0, left=None)]),
            ("timeout*3", [Fault(kind="timeout", seconds=0, left=3)]),
            ("delay=0.5", [Fault(kind="delay", seconds=0.5, left=None)]),
            (
                " delay=2*10 ,answer_lost*1 ",
                [
                    Fault(kind="delay", seconds=2, left=10),
                    Fault(kind="answer_lost", seconds=0, left=1),
                ],
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
            *("refund:", "refund:late", "refund", "refunds:down", "find:down", ":down"),
            *("refund: down", "refund :down", "Refund:down", "charge:refund:down", "down:refund"),
        ],
    )
    async def test_bad_faults_stop_the_start(self, text: str) -> None:
        with pytest.raises(StartError) as caught:
            SimulatedGateway(None, text)
        message = str(caught.value)
        assert message.startswith("SIMULATED_FAULTS: ")
        assert len(message.splitlines()) == 1

    @pytest.mark.parametrize("entry", ["late", "delay", "refund:late", "refunds:down", "down*x"])
    async def test_the_error_names_the_entry(self, entry: str) -> None:
        with pytest.raises(StartError, match=re.escape(repr(entry))):
            parse_faults(f"down*1,{entry},refund:timeout")
