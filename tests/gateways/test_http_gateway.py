"""The HTTP gateway against the provider in its own process: the conformance suite, and what only
HTTP has."""

import asyncio
import inspect
import re
import signal
import socket
import subprocess
import sys
import time
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager, suppress
from pathlib import Path
from typing import get_args
from uuid import UUID, uuid4

import msgspec
import psutil
import pytest

from payments.errors import StartError
from payments.gateways import Gateway, NeverSent, OutcomeUnknown, ProviderCharge, Step
from payments.gateways.building import build_gateways
from payments.gateways.http import ProviderHttp
from payments.payment.state import Approved, Declined
from payments.settings import Settings
from tests.doubles.controlled import ROOT
from tests.doubles.gateway import asking
from tests.doubles.http_gateway import DAY_S, HttpGateway, PreparingGateway, build, signed
from tests.doubles.provider import ProviderProcess
from tests.doubles.stand_in import NOTHING_DONE, Fault, FaultKind
from tests.gateways.conformance import (
    FAILURES,
    MISMATCHES,
    OPERATIONS,
    SECONDS,
    TIMEOUT_S,
    WAIT_S,
    GatewayConformance,
    ask,
    begun,
    charge_of,
    refund_of,
    timeout_for,
)
from tests.machine import within

pytestmark = pytest.mark.anyio

WEBHOOK_SECRETS = ("the one before", "the one now")

# The payment method that brings a charge there.
METHODS: dict[Step, str | None] = {
    "ready": None,
    "action": "pm_action",
    "authorized": "pm_authorized",
    "processing": "pm_processing",
}


class HttpHarness:
    declined_cents = 1507
    method: str | None = None
    declined_method: str | None = None
    amounts: tuple[tuple[int, str], ...] = ((1, "INR"), (500, "JPY"), (2_147_483_640, "USD"))
    prepares = False
    method_to_prepare: str | None = None
    refused_method: str | None = None
    steps: frozenset[Step] = frozenset()
    cancels: frozenset[Step] = frozenset()
    sends_webhooks = dates_webhooks = True

    def __init__(self, gateway: Gateway, provider: ProviderProcess, elsewhere: str) -> None:
        self.gateway = gateway
        self._provider = provider
        self._elsewhere = elsewhere

    def can(self, fault: str, operation: str) -> bool:
        return fault in (*FAILURES, *MISMATCHES) and operation in OPERATIONS

    async def script(self, fault: str, operation: str) -> None:
        if fault == "refused":
            self._provider.refuse()
        else:
            self._provider.script(fault_of(fault, operation, self._elsewhere))

    async def recover(self) -> None:
        self._provider.listen()

    async def captured(self, payment_id: UUID) -> list[int]:
        return [line.amount_cents for line in self._provider.captures(payment_id)]

    async def given_back(self, refund_id: UUID) -> list[int]:
        return [line.amount_cents for line in self._provider.refunds(refund_id)]

    async def open(self, step: Step) -> ProviderCharge:
        raise NotImplementedError

    async def customer_acts(self, charge: ProviderCharge) -> None:
        self._provider.customer_acts(charge.payment_id)

    async def finish(self, charge: ProviderCharge) -> None:
        self._provider.finish(charge.payment_id)

    async def made_by_customer(self, amount_cents: int) -> str | None:
        return None

    def webhook(
        self, charge: ProviderCharge | None, *, age_s: float = 0, secret: str | None = None
    ) -> tuple[dict[str, str], bytes]:
        event = {"id": "evt_1", "kind": "captured"} | self._about(charge)
        body = msgspec.json.encode(event)
        return signed(secret or WEBHOOK_SECRETS[1], time.time() - age_s, body), body

    def redated(self, old: tuple[dict[str, str], bytes], headers: dict[str, str]) -> dict[str, str]:
        return {
            name: headers[name].split(",")[0] + "," + value.split(",")[1]
            for name, value in old[0].items()
        }

    def _about(self, charge: ProviderCharge | None) -> dict[str, object]:
        return {} if charge is None else {"payment_id": charge.payment_id}


class PreparingHarness(HttpHarness):
    prepares = True
    refused_method = "pm_refused"
    steps = frozenset(METHODS)
    cancels = frozenset({"ready", "action", "authorized"})

    def can(self, fault: str, operation: str) -> bool:
        return fault in (*FAILURES, *MISMATCHES)

    async def open(self, step: Step) -> ProviderCharge:
        charge = await begun(self.gateway, charge_of(payment_method=METHODS[step]))
        if step != "ready":
            await self.gateway.charge(charge, WAIT_S)
        if step == "authorized":
            await self.customer_acts(charge)
        return charge

    async def made_by_customer(self, amount_cents: int) -> str | None:
        return self._provider.made_by_customer(amount_cents, "INR")

    def _about(self, charge: ProviderCharge | None) -> dict[str, object]:
        return {} if charge is None else {"reference": charge.reference}


def fault_of(kind: str, operation: str, location: str = "") -> Fault:
    return Fault(
        kind,  # type: ignore[arg-type]
        operation,
        seconds=SECONDS.get(kind, 0),
        location=location,
    )


class Recorder:
    """Somewhere else: whoever connects is counted, and gets no answer."""

    def __init__(self) -> None:
        self.connections = 0
        self.url = ""

    @asynccontextmanager
    async def running(self) -> AsyncIterator["Recorder"]:
        async def count(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
            self.connections += 1
            writer.close()

        server = await asyncio.start_server(count, "127.0.0.1", 0)
        self.url = f"http://127.0.0.1:{server.sockets[0].getsockname()[1]}"
        async with server:
            yield self


@pytest.fixture(scope="module")
def running_provider(tmp_path_factory: pytest.TempPathFactory) -> Iterator[ProviderProcess]:
    ledger = tmp_path_factory.mktemp("provider") / "ledger.jsonl"
    with ProviderProcess(ledger) as provider:
        yield provider


@pytest.fixture
def provider(running_provider: ProviderProcess) -> Iterator[ProviderProcess]:
    """Shared, as every test has its own ids; its faults are this test's alone."""
    yield running_provider
    running_provider.script()
    running_provider.listen()


@pytest.fixture
async def recorder() -> AsyncIterator[Recorder]:
    async with Recorder().running() as running:
        yield running


@pytest.fixture
async def gateway(provider: ProviderProcess) -> AsyncIterator[HttpGateway]:
    opened = HttpGateway(ProviderHttp(provider.url), webhook_secrets=WEBHOOK_SECRETS)
    yield opened
    await opened.close()


@pytest.fixture
async def harness(
    gateway: HttpGateway, provider: ProviderProcess, recorder: Recorder
) -> AsyncIterator[HttpHarness]:
    kind = PreparingHarness if isinstance(gateway, PreparingGateway) else HttpHarness
    yield kind(gateway, provider, recorder.url)
    assert recorder.connections == 0


class TestHttpGatewayConforms(GatewayConformance):
    pass


class TestPreparingGatewayConforms(GatewayConformance):
    @pytest.fixture
    async def gateway(self, provider: ProviderProcess) -> AsyncIterator[PreparingGateway]:
        opened = PreparingGateway(ProviderHttp(provider.url), webhook_secrets=WEBHOOK_SECRETS)
        yield opened
        await opened.close()


class PageHarness(HttpHarness):
    sends_webhooks = False


class TestTheGatewayOfThePage:
    """docs/gateways.md prints one: it is built as the page says, and run as it is printed."""

    @pytest.fixture
    async def gateway(
        self, provider: ProviderProcess, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> AsyncIterator[Gateway]:
        page = (ROOT / "docs/gateways.md").read_text()
        (code,) = re.findall(r"```python\n(.*?)```", page, re.DOTALL)
        (tmp_path / "acme_of_the_page.py").write_text(code)
        monkeypatch.syspath_prepend(tmp_path)
        monkeypatch.setenv("ACME_URL", provider.url)
        monkeypatch.setenv("ACME_API_KEY", "secret")
        (built,) = build_gateways(Settings(gateways=("acme_of_the_page:build",)))
        yield built
        await built.close()
        sys.modules.pop("acme_of_the_page")

    async def test_it_conforms(
        self, gateway: Gateway, provider: ProviderProcess, recorder: Recorder
    ) -> None:
        harness, ran = PageHarness(gateway, provider, recorder.url), 0
        for _, case in inspect.getmembers(GatewayConformance(), inspect.iscoroutinefunction):
            if set(inspect.signature(case).parameters) == {"harness"}:
                with suppress(pytest.skip.Exception):
                    await case(harness)
                    ran += 1
        assert ran >= 15

    @pytest.mark.parametrize("fault", ["refused", "500", "answer_lost", "not_found_page"])
    async def test_it_fails_as_it_must(
        self, gateway: Gateway, provider: ProviderProcess, recorder: Recorder, fault: str
    ) -> None:
        harness, suite = PageHarness(gateway, provider, recorder.url), GatewayConformance()
        await suite.test_a_charge_that_fails(harness, fault)
        await suite.test_a_refund_that_fails(harness, fault)
        for operation in ("find_charge", "find_refund"):
            await suite.test_a_question_that_fails_is_not_answered_no(harness, operation, fault)

    async def test_what_it_declines_is_what_was_asked(
        self, gateway: Gateway, provider: ProviderProcess, recorder: Recorder
    ) -> None:
        suite, harness = GatewayConformance(), PageHarness(gateway, provider, recorder.url)
        for mismatch in MISMATCHES:
            for operation in OPERATIONS:
                await suite.test_what_the_provider_states_is_passed_on_unchanged(
                    harness, operation, mismatch
                )
        provider.script(Fault("decline"), Fault("wrong_id"))
        charge = charge_of()
        assert await gateway.charge(charge, WAIT_S) == Declined("declined_on_request")
        with pytest.raises(OutcomeUnknown):
            await gateway.find_charge(charge, WAIT_S)

    @pytest.mark.parametrize("name", ["ACME_URL", "ACME_API_KEY"])
    async def test_it_needs_both(
        self, monkeypatch: pytest.MonkeyPatch, gateway: Gateway, name: str
    ) -> None:
        monkeypatch.delenv(name)
        with pytest.raises(StartError, match=name):
            build_gateways(Settings(gateways=("acme_of_the_page:build",)))


class TestConnecting:
    async def test_a_connect_that_hangs_was_never_sent(self) -> None:
        with socket.socket() as full:
            full.bind(("127.0.0.1", 0))
            full.listen(0)
            waiting = [socket.socket() for _ in range(4)]
            for each in waiting:  # the kernel answers no more connects once its queue is full
                each.setblocking(False)
                each.connect_ex(full.getsockname())
            gateway = HttpGateway(ProviderHttp(f"http://127.0.0.1:{full.getsockname()[1]}"))
            with within(TIMEOUT_S), pytest.raises(NeverSent):
                await gateway.charge(charge_of(), TIMEOUT_S)
            await gateway.close()
            for each in waiting:
                each.close()

    async def test_a_proxy_in_the_environment_is_not_used(
        self, provider: ProviderProcess, recorder: Recorder, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        for name in ("HTTP_PROXY", "http_proxy", "ALL_PROXY", "HTTPS_PROXY"):
            monkeypatch.setenv(name, recorder.url)
        for name in ("NO_PROXY", "no_proxy"):
            monkeypatch.delenv(name, raising=False)
        gateway = HttpGateway(ProviderHttp(provider.url))
        assert isinstance(await gateway.charge(charge_of(), WAIT_S), Approved)
        assert recorder.connections == 0
        await gateway.close()

    @pytest.mark.parametrize("operation", OPERATIONS)
    async def test_a_redirect_is_not_followed(
        self, gateway: HttpGateway, provider: ProviderProcess, recorder: Recorder, operation: str
    ) -> None:
        capture = await gateway.charge(charge_of(), WAIT_S)
        assert isinstance(capture, Approved)
        provider.script(fault_of("redirect", operation, recorder.url))
        with pytest.raises(OutcomeUnknown):
            await ask(gateway, operation, refund_of(capture, 600), WAIT_S)
        await asyncio.sleep(0)
        assert recorder.connections == 0

    async def test_a_kept_connection_that_the_server_closed_is_not_used_again(
        self, gateway: HttpGateway, provider: ProviderProcess
    ) -> None:
        for _ in range(3):
            assert isinstance(await gateway.charge(charge_of(), WAIT_S), Approved)
            provider.close_idle()

    async def test_a_kept_connection_closed_as_it_is_used_leaves_the_outcome_unknown(
        self, gateway: HttpGateway, provider: ProviderProcess
    ) -> None:
        await gateway.charge(charge_of(), WAIT_S)
        before = provider.counts()["charge"]
        provider.script(Fault("closed"))
        with pytest.raises(OutcomeUnknown):
            await gateway.charge(charge_of(), WAIT_S)
        assert provider.counts()["charge"] == before + 1


class TestAnswers:
    @pytest.mark.parametrize("operation", OPERATIONS)
    async def test_a_decline_of_something_else_leaves_the_outcome_unknown(
        self, gateway: HttpGateway, provider: ProviderProcess, operation: str
    ) -> None:
        """Declined has no id, so the caller could not see it."""
        declined = Approved(
            id=uuid4(), amount_cents=1500, currency="INR", provider_txn_id="txn_none"
        )
        refund = refund_of(declined, 600)
        provider.script(Fault("decline"))
        asked = "refund" if "refund" in operation else "charge"
        assert await ask(gateway, asked, refund, WAIT_S) == Declined("declined_on_request")
        provider.script(Fault("wrong_id"))
        with pytest.raises(OutcomeUnknown):
            await ask(gateway, operation, refund, WAIT_S)
        assert provider.captures(declined.id) == []

    async def test_another_body_under_the_same_key_leaves_the_outcome_unknown(
        self, gateway: HttpGateway, provider: ProviderProcess
    ) -> None:
        capture = await gateway.charge(charge_of(), WAIT_S)
        assert isinstance(capture, Approved)
        with pytest.raises(OutcomeUnknown, match="422"):
            await gateway.charge(
                ProviderCharge(payment_id=capture.id, amount_cents=1600, currency="INR"), WAIT_S
            )
        assert len(provider.ledger(capture.id)) == 1


class TestTheProvider:
    """The double itself: what the tests of the service rely on."""

    @pytest.mark.parametrize("kind", get_args(FaultKind))
    async def test_each_fault_does_or_leaves_what_it_says(
        self, gateway: HttpGateway, provider: ProviderProcess, kind: str
    ) -> None:
        charge = charge_of()
        provider.script(fault_of(kind, "charge"))
        try:
            await gateway.charge(charge, timeout_for(kind))
        except OutcomeUnknown:
            assert kind not in ("decline", "forgets_keys", *MISMATCHES)
        done = kind not in NOTHING_DONE and kind != "decline"
        assert len(provider.captures(charge.payment_id)) == done
        provider.script()
        charged = await gateway.charge(charge, WAIT_S)
        assert isinstance(charged, Declined if kind == "decline" else Approved)

    async def test_a_fault_meets_only_its_operation_and_only_so_often(
        self, gateway: HttpGateway, provider: ProviderProcess
    ) -> None:
        provider.script(Fault("500", "find_charge", count=2), Fault("decline", "charge"))
        charge = charge_of()
        assert await gateway.charge(charge, WAIT_S) == Declined("declined_on_request")
        assert isinstance(await gateway.charge(charge_of(), WAIT_S), Approved)
        for _ in range(2):
            with pytest.raises(OutcomeUnknown):
                await gateway.find_charge(charge, WAIT_S)
        assert await gateway.find_charge(charge, WAIT_S)

    async def test_a_probability_repeats_with_its_seed(
        self, gateway: HttpGateway, provider: ProviderProcess
    ) -> None:
        async def failing() -> list[bool]:
            provider.script(Fault("500", count=None, probability=0.5, seed=7))
            return [await fails(gateway) for _ in range(20)]

        async def fails(gateway: HttpGateway) -> bool:
            try:
                await gateway.find_charge(asking(uuid4()), WAIT_S)
            except OutcomeUnknown:
                return True
            return False

        first = await failing()
        assert set(first) == {True, False}
        assert await failing() == first

    async def test_forgotten_keys_charge_and_refund_a_second_time(
        self, gateway: HttpGateway, provider: ProviderProcess
    ) -> None:
        provider.script(Fault("forgets_keys", count=None))
        charge = charge_of()
        first, second = [await gateway.charge(charge, WAIT_S) for _ in range(2)]
        assert isinstance(first, Approved)
        assert isinstance(second, Approved)
        assert first.provider_txn_id != second.provider_txn_id
        assert len(provider.captures(charge.payment_id)) == 2
        refund = refund_of(second, 600)
        await gateway.refund(refund, WAIT_S)
        await gateway.refund(refund, WAIT_S)
        assert len(provider.refunds(refund.refund_id)) == 2

    async def test_a_slow_answer_can_meet_another_fault(
        self, gateway: HttpGateway, provider: ProviderProcess
    ) -> None:
        provider.script(Fault("slow", seconds=0.1), Fault("answer_lost"))
        started = time.monotonic()
        with pytest.raises(OutcomeUnknown):
            await gateway.charge(charge_of(), WAIT_S)
        assert time.monotonic() - started >= 0.1

    @pytest.mark.parametrize("method", METHODS.values())
    async def test_it_remembers_an_open_charge_after_a_kill(
        self, tmp_path: Path, method: str | None
    ) -> None:
        with ProviderProcess(tmp_path / "ledger.jsonl") as provider:
            gateway = PreparingGateway(ProviderHttp(provider.url))
            charge = await begun(gateway, charge_of(payment_method=method))
            if method is not None:
                await gateway.charge(charge, WAIT_S)
            stands = await gateway.find_charge(charge, WAIT_S)
            account = await gateway.account(WAIT_S)
            provider.restart()
            assert await gateway.find_charge(charge, WAIT_S) == stands
            assert await gateway.prepare(charge, WAIT_S) == charge.reference
            assert await gateway.account(WAIT_S) == account
            if method == "pm_processing":
                provider.finish(charge.payment_id, declined=True)
            elif method is not None:
                provider.customer_acts(charge.payment_id, declined=True)
            ended = await gateway.charge(charge, WAIT_S)
            assert isinstance(ended, Approved if method is None else Declined)
            provider.restart()
            assert await gateway.find_charge(charge, WAIT_S) == ended
            assert len(provider.captures()) == (method is None)
            await gateway.close()

    async def test_forgotten_keys_prepare_a_second_time(self, provider: ProviderProcess) -> None:
        gateway = PreparingGateway(ProviderHttp(provider.url))
        charge = await begun(gateway, charge_of())
        provider.script(Fault("forgets_keys"))
        again = charge_of(payment_id=charge.payment_id)
        assert await gateway.prepare(again, WAIT_S) != charge.reference
        await gateway.close()

    async def test_it_remembers_after_a_kill(self, tmp_path: Path) -> None:
        with ProviderProcess(tmp_path / "ledger.jsonl") as provider:
            gateway = HttpGateway(ProviderHttp(provider.url))
            charge = charge_of()
            provider.script(Fault("answer_lost"))
            with pytest.raises(OutcomeUnknown):
                await gateway.charge(charge, WAIT_S)
            provider.kill()
            with pytest.raises(NeverSent):
                await gateway.find_charge(charge, WAIT_S)
            provider.start()
            found = await gateway.find_charge(charge, WAIT_S)
            assert isinstance(found, Approved)
            assert await gateway.charge(charge, WAIT_S) == found
            refund = refund_of(found, 900)
            given_back = await gateway.refund(refund, WAIT_S)
            provider.restart()
            assert await gateway.refund(refund, WAIT_S) == given_back
            assert isinstance(await gateway.refund(refund_of(found, 900), WAIT_S), Declined)
            assert (len(provider.captures()), len(provider.refunds())) == (1, 1)
            await gateway.close()

    def test_it_ends_on_sigterm(self, tmp_path: Path) -> None:
        assert ProviderProcess(tmp_path / "ledger.jsonl").start().stop() == 0

    def test_it_ends_with_its_parent(self, tmp_path: Path) -> None:
        program = (
            "import pathlib, sys, time; from tests.doubles.provider import ProviderProcess;"
            "started = ProviderProcess(pathlib.Path(sys.argv[1])).start();"
            "print(started.pid, flush=True); time.sleep(60)"
        )
        parent = subprocess.Popen(
            [sys.executable, "-c", program, str(tmp_path / "ledger.jsonl")],
            cwd=ROOT,
            stdout=subprocess.PIPE,
        )
        assert parent.stdout is not None
        provider = psutil.Process(int(parent.stdout.readline()))
        parent.send_signal(signal.SIGKILL)
        parent.wait(timeout=5)
        parent.stdout.close()
        try:
            provider.wait(timeout=5)
        finally:
            with suppress(psutil.NoSuchProcess):
                provider.kill()


class TestBuild:
    async def test_from_the_environment(
        self, provider: ProviderProcess, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setenv("TEST_PROVIDER_URL", provider.url)
        gateway = build(Settings())
        assert (gateway.charge_retry_s, gateway.late_capture_s) == (DAY_S, DAY_S)
        assert isinstance(await gateway.charge(charge_of(), WAIT_S), Approved)
        await gateway.close()
        monkeypatch.setenv("TEST_PROVIDER_RETRY_S", "2.5")
        assert build(Settings()).charge_retry_s == 2.5

    async def test_one_that_prepares(
        self, provider: ProviderProcess, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setenv("TEST_PROVIDER_URL", provider.url)
        monkeypatch.setenv("TEST_PROVIDER_PREPARES", "1")
        gateway = build(Settings())
        charge = await begun(gateway, charge_of())
        assert charge.reference is not None
        assert isinstance(await gateway.charge(charge, WAIT_S), Approved)
        await gateway.close()

    @pytest.mark.parametrize("url", [None, "", "no address"])
    def test_needs_an_address(self, url: str | None, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.delenv("TEST_PROVIDER_URL", raising=False)
        if url is not None:
            monkeypatch.setenv("TEST_PROVIDER_URL", url)
        with pytest.raises(StartError, match="TEST_PROVIDER_URL"):
            build(Settings())


def test_the_suite_knows_every_fault_of_the_provider() -> None:
    kinds = set(get_args(FaultKind))
    assert kinds - {"decline", "forgets_keys"} == {*FAILURES, *MISMATCHES} - {"refused"}
