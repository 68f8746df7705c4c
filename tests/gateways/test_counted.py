"""What a gateway that errs may and may not do to the service, and when its breaker opens."""

import asyncio
from collections.abc import Callable
from typing import Any

import pytest
from loguru import logger

from payments.gateways import (
    BadSignature,
    Hint,
    NeverSent,
    Open,
    OutcomeUnknown,
    ProviderCharge,
)
from payments.gateways import counted as module
from payments.gateways.breaker import FAILURES_MIN, PAUSE_MIN_S
from payments.gateways.counted import CountedGateway
from payments.observability.metrics import Telemetry
from payments.payment.state import Approved, Declined
from tests.commands.hinting import HintingGateway
from tests.doubles.gateway import ScriptedGateway, after, decline, never_sent, no_answer
from tests.support import ORDER_ID

pytestmark = pytest.mark.anyio

CHARGE = ProviderCharge(payment_id=ORDER_ID, amount_cents=1500, currency="INR")


def counted(telemetry: Telemetry) -> dict[str, float]:
    (family,) = [
        each for each in telemetry.registry.collect() if each.name == "payments_gateway_calls"
    ]
    return {
        sample.labels["outcome"]: sample.value
        for sample in family.samples
        if sample.labels["operation"] == "charge" and sample.value
    }


def breaker_open(telemetry: Telemetry) -> float | None:
    return telemetry.registry.get_sample_value(
        "payments_gateway_breaker_open", {"gateway": "scripted"}
    )


def answers(answer: Any) -> Any:
    return lambda gateway, charge: answer


@pytest.mark.parametrize(
    ("step", "raised", "label"),
    [
        (decline, None, "declined"),
        (never_sent, NeverSent, "never_sent"),
        (no_answer, OutcomeUnknown, "unknown"),
        (lambda gateway, charge: 1 / 0, OutcomeUnknown, "unknown"),
        (
            answers(
                Approved(id=ORDER_ID, amount_cents=1500, currency="INR", provider_txn_id="txn\x00")
            ),
            OutcomeUnknown,
            "unknown",
        ),
        (
            answers(Approved(id=ORDER_ID, amount_cents=1500, currency="INR", provider_txn_id="")),
            OutcomeUnknown,
            "unknown",
        ),
        (
            answers(
                Approved(id=ORDER_ID, amount_cents=1500, currency="INR", provider_txn_id="x" * 256)
            ),
            OutcomeUnknown,
            "unknown",
        ),
        (answers(Declined("\ud800")), OutcomeUnknown, "unknown"),
        (answers(None), OutcomeUnknown, "unknown"),
        (answers("txn"), OutcomeUnknown, "unknown"),
    ],
)
async def test_every_call_is_counted_by_what_came_of_it(step: Any, raised: Any, label: str) -> None:
    telemetry = Telemetry()
    gateway = CountedGateway(ScriptedGateway(step), telemetry)
    if raised is None:
        assert await gateway.charge(CHARGE, 1) == Declined("insufficient_funds")
    else:
        with pytest.raises(raised):
            await gateway.charge(CHARGE, 1)
    assert counted(telemetry) == {label: 1}


async def test_one_that_hangs_is_given_up(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "GRACE_S", 0.05)
    telemetry = Telemetry()
    gateway = CountedGateway(ScriptedGateway(after(asyncio.Event())), telemetry)
    with pytest.raises(OutcomeUnknown, match="exceeded its timeout"):
        await gateway.charge(CHARGE, 0.05)
    assert counted(telemetry) == {"unknown": 1}


def raises(error: Exception) -> Callable[..., Any]:
    def step(*_: object) -> Any:
        raise error

    return step


DOWN = raises(NeverSent("refused"))
OVERLOADED = raises(OutcomeUnknown("503", is_outage=True))
OPEN_CHARGE = Open(id=ORDER_ID, step="processing")


async def call(gateway: CountedGateway) -> object:
    """What came of a charge, or the type of what it raised."""
    try:
        return await gateway.charge(CHARGE, 1)
    except (NeverSent, OutcomeUnknown) as error:
        return type(error)


class Clock:
    """The breaker's."""

    now = 1000.0

    def __call__(self) -> float:
        return self.now


@pytest.fixture
def told(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    lines: list[str] = []

    class Log:
        def bind(self, **fields: Any) -> "Log":
            return self

        def _tell(self, message: str) -> None:
            lines.append(message)

        info = error = _tell

    monkeypatch.setattr(module, "logger", Log())
    return lines


@pytest.mark.parametrize("step", [DOWN, OVERLOADED])
async def test_outages_open_the_breaker(step: Any, told: list[str]) -> None:
    """Then nothing is sent, operators see it, and the log has one line."""
    telemetry = Telemetry()
    scripted = ScriptedGateway(*[step] * 100)
    gateway = CountedGateway(scripted, telemetry)
    assert (breaker_open(telemetry), gateway.unavailable_for_s()) == (0, 0)
    for _ in range(FAILURES_MIN):
        await call(gateway)
    assert gateway.is_known_down
    assert 0 < gateway.unavailable_for_s() <= PAUSE_MIN_S
    assert breaker_open(telemetry) == 1
    assert [line for line in told if "is down" in line] == [told[-1]]
    with pytest.raises(NeverSent, match="scripted is down") as stopped:
        await gateway.charge(CHARGE, 1)
    assert not stopped.value.is_outage
    assert len(scripted.charges) == FAILURES_MIN
    assert counted(telemetry)["not_called"] == 1


@pytest.mark.parametrize(
    "step",
    [
        answers(Declined("insufficient_funds")),
        answers(OPEN_CHARGE),
        raises(NeverSent("no time left", is_outage=False)),
        raises(OutcomeUnknown("400")),
        raises(KeyError("a defect of the gateway")),
        answers(Declined("\ud800")),
    ],
)
async def test_what_is_no_outage_never_opens_it(step: Any) -> None:
    telemetry = Telemetry()
    gateway = CountedGateway(ScriptedGateway(*[step] * 30), telemetry)
    for _ in range(30):
        await call(gateway)
    assert (gateway.is_known_down, breaker_open(telemetry)) == (False, 0)
    assert "not_called" not in counted(telemetry)


@pytest.mark.parametrize("step", [decline, answers(OPEN_CHARGE)])
async def test_a_probe_that_is_answered_closes_it(step: Any, told: list[str]) -> None:
    clock = Clock()
    gateway = CountedGateway(ScriptedGateway(*[DOWN] * FAILURES_MIN, step), Telemetry(), clock)
    for _ in range(FAILURES_MIN):
        await call(gateway)
    clock.now += PAUSE_MIN_S
    assert gateway.unavailable_for_s() == 0
    await call(gateway)
    assert not gateway.is_known_down
    assert told[-1] == "the provider is back"


async def test_one_probe_at_a_time_and_one_that_hangs_ends(monkeypatch: pytest.MonkeyPatch) -> None:
    clock = Clock()
    monkeypatch.setattr(module, "GRACE_S", 0.05)
    hangs = after(asyncio.Event())
    scripted = ScriptedGateway(*[DOWN] * FAILURES_MIN, hangs, decline)
    gateway = CountedGateway(scripted, Telemetry(), clock)
    for _ in range(FAILURES_MIN):
        await call(gateway)
    clock.now += PAUSE_MIN_S
    probe = asyncio.create_task(gateway.charge(CHARGE, 0.05))
    await asyncio.sleep(0)
    for _ in range(3):
        assert await call(gateway) is NeverSent
    assert gateway.unavailable_for_s() > 0
    with pytest.raises(OutcomeUnknown, match="exceeded its timeout"):
        await probe
    assert len(scripted.charges) == FAILURES_MIN + 1
    # It failed: the next pause is longer.
    clock.now += PAUSE_MIN_S
    assert gateway.unavailable_for_s() == PAUSE_MIN_S
    clock.now += PAUSE_MIN_S
    assert await call(gateway) == Declined("insufficient_funds")


async def test_a_probe_that_is_cancelled_lets_the_next_one_begin() -> None:
    clock, hangs = Clock(), after(asyncio.Event())
    scripted = ScriptedGateway(*[DOWN] * FAILURES_MIN, hangs, decline)
    gateway = CountedGateway(scripted, Telemetry(), clock)
    for _ in range(FAILURES_MIN):
        await call(gateway)
    clock.now += PAUSE_MIN_S
    probe = asyncio.create_task(gateway.charge(CHARGE, 1))
    await asyncio.sleep(0)
    assert await call(gateway) is NeverSent
    probe.cancel()
    await asyncio.wait({probe})
    assert gateway.is_known_down  # it says neither that it is back nor that it is not
    assert await call(gateway) == Declined("insufficient_funds")
    assert not gateway.is_known_down


async def test_each_provider_has_its_own() -> None:
    telemetry = Telemetry()
    down, well = ScriptedGateway(*[DOWN] * FAILURES_MIN), ScriptedGateway(decline)
    well.name = "well"
    gateways = [CountedGateway(each, telemetry) for each in (down, well)]
    for _ in range(FAILURES_MIN):
        await call(gateways[0])
    assert [each.is_known_down for each in gateways] == [True, False]
    assert await call(gateways[1]) == Declined("insufficient_funds")


class TestHints:
    """Webhooks: what the gateway says of them is passed on, and nothing else."""

    CANARY = "canary_7391"

    def hinting(self, step: Any) -> CountedGateway:
        return CountedGateway(HintingGateway(hint_script=[step]), Telemetry())

    async def test_a_provider_without_webhooks_has_none(self) -> None:
        assert CountedGateway(ScriptedGateway(), Telemetry()).hint is None

    @pytest.mark.parametrize("passed", [Hint(event_id="e", reference="pay_1"), None])
    async def test_what_it_says_is_passed_on(self, passed: Hint | None) -> None:
        gateway = self.hinting(answers(passed))
        assert gateway.hint is not None
        assert await gateway.hint({}, b"", 1) == passed

    @pytest.mark.parametrize("error", [BadSignature, OutcomeUnknown, NeverSent])
    async def test_so_are_its_exceptions(self, error: type[Exception]) -> None:
        def fail(*_: Any) -> None:
            raise error("scripted")

        gateway = self.hinting(fail)
        assert gateway.hint is not None
        with pytest.raises(error, match="scripted"):
            await gateway.hint({}, b"", 1)

    @pytest.mark.parametrize(
        "said",
        [
            "evt_1",
            Hint(event_id="e"),
            Hint(event_id="", reference="r"),
            Hint(event_id="e\x00", reference="r"),
            Hint(event_id="e", reference="r" * 256),
            Hint(event_id="e", payment_id="no UUID"),  # type: ignore[arg-type]
        ],
    )
    async def test_what_cannot_be_stored_is_a_defect(self, said: Any) -> None:
        gateway = self.hinting(answers(said))
        assert gateway.hint is not None
        with pytest.raises(OutcomeUnknown):
            await gateway.hint({}, b"", 1)

    async def test_a_defect_is_logged_without_what_was_sent(
        self,
    ) -> None:
        def fail(*_: Any) -> None:
            raise ValueError(self.CANARY)

        gateway = self.hinting(fail)
        assert gateway.hint is not None
        lines: list[str] = []
        sink = logger.add(lines.append, format="{message} {extra}")
        with pytest.raises(OutcomeUnknown, match="the gateway failed") as raised:
            await gateway.hint({}, self.CANARY.encode(), 1)
        logger.remove(sink)
        assert "ValueError in " in "".join(lines)
        assert self.CANARY not in "".join(lines) + str(raised.value)

    async def test_one_that_hangs_is_cut_off(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(module, "GRACE_S", 0.0)
        gateway = self.hinting(after(asyncio.Event()))
        assert gateway.hint is not None
        with pytest.raises(OutcomeUnknown, match="exceeded its timeout"):
            await gateway.hint({}, b"", 0.05)

    async def test_it_tells_nothing_of_the_provider(self) -> None:
        """So it goes on while the breaker is open, and does not close it."""
        telemetry = Telemetry()
        hint = Hint(event_id="e", reference="r")
        gateway = CountedGateway(
            HintingGateway(
                *[lambda *_: raise_outage()] * FAILURES_MIN, hint_script=[answers(hint)] * 2
            ),
            telemetry,
        )
        for _ in range(FAILURES_MIN):
            with pytest.raises(OutcomeUnknown):
                await gateway.charge(CHARGE, 1)
        assert gateway.is_known_down
        assert gateway.hint is not None
        assert await gateway.hint({}, b"", 1) == hint
        assert gateway.is_known_down


def raise_outage() -> None:
    raise OutcomeUnknown("scripted", is_outage=True)
