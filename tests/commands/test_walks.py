"""Walks at random through everything that may happen to two charges of one order at a provider with
references: in the end what was captured is paid, or went back."""

import random
from typing import Any, NamedTuple
from uuid import UUID

import pytest

from payments.errors import PaymentsError
from payments.gateways import NeverSent, NextAction, Open, OutcomeUnknown, ProviderCharge
from payments.payment.identity import payment_id_for
from payments.payment.state import Approved, Declined, Status
from payments.service import Service
from tests.commands.conftest import Make
from tests.commands.looking import Connection, as_stored, topics
from tests.commands.preparing import charge
from tests.commands.settling import age, hold_ends_in, settle, unsettled
from tests.doubles.gateway import PreparingGateway, ScriptedGateway

pytestmark = pytest.mark.anyio

KEYS = ("k1", "k2")
STEPS = 14
METHODS = (None, "declined", "act", "authorize", "by itself", "slowly", "pay_")
WHAT = (
    *("charge", "charge", "charge", "acts", "acts", "goes on", "turns", "hold ends"),
    *("settle", "settle", "settle elsewhere", "age", "long"),
)
DAY_S = 86_400.0


class At(NamedTuple):
    """Where a charge stands at the provider; `method` is what it was first charged with."""

    step: str
    method: str | None = None


class Provider(PreparingGateway):
    """It goes through steps as a real one, and fails as one, before and behind what it does."""

    def __init__(self) -> None:
        super().__init__(declines_may_turn_s=3 * DAY_S)
        self.begin(random.Random())
        self.at: dict[UUID, At] = {}
        self.orders: dict[UUID, ProviderCharge] = {}

    def begin(self, dice: random.Random) -> None:
        self.dice, self.failing = dice, True

    def prepared(self, charge: ProviderCharge) -> str:
        self.at.setdefault(charge.payment_id, At("ready"))
        self.orders[charge.payment_id] = charge
        return f"pi_{charge.payment_id.hex}"

    async def prepare(self, charge: ProviderCharge, timeout_s: float) -> str:
        with Faulty(self):
            return self.prepared(charge)

    async def charge(self, charge: ProviderCharge, timeout_s: float) -> Approved | Declined | Open:
        with Faulty(self):
            self.prepared(charge)
            self._confirm(charge.payment_id, charge.payment_method)
            return self._state(charge.payment_id)  # type: ignore[no-any-return]

    async def find_charge(
        self, charge: ProviderCharge, timeout_s: float
    ) -> Approved | Declined | Open | None:
        with Faulty(self):
            assert charge.reference is not None
            self.prepared(charge)  # one that the customer made
            return self._state(charge.payment_id)  # type: ignore[no-any-return]

    async def cancel(
        self, charge: ProviderCharge, timeout_s: float
    ) -> Approved | Declined | Open | None:
        with Faulty(self):
            at = self.at[charge.payment_id]
            if at.step in ("ready", "action", "authorized"):
                self._end(charge.payment_id, captured=False)
            return self._state(charge.payment_id)  # type: ignore[no-any-return]

    def customer_acts(self, payment_id: UUID) -> None:
        at = self.at.get(payment_id, At(""))
        if at.step == "action" and at.method == "by itself":
            self._end(payment_id, captured=True)
        elif at.step == "action":
            step = "authorized" if at.method == "authorize" else "ready"
            self.at[payment_id] = At(step, "acted")

    def goes_on(self, payment_id: UUID) -> None:
        """What it processes is captured, declined, or asks for the customer once more."""
        if self.at.get(payment_id, At("")).step == "processing":
            if self.dice.random() < 0.3:
                self.at[payment_id] = At("action", "by itself")
            else:
                self._end(payment_id, captured=self.dice.random() < 0.6)

    def turns(self, payment_id: UUID) -> None:
        """A decline of a bank that is none after all."""
        if self.at.get(payment_id) == At("declined", "declined"):
            del self.outcomes[payment_id]
            self._end(payment_id, captured=True)

    def _confirm(self, payment_id: UUID, method: str | None) -> None:
        at = self.at[payment_id]
        if at.step not in ("ready", "authorized"):
            return
        match method if at.method is None else "acted":
            case "act" | "authorize" | "by itself":
                self.at[payment_id] = At("action", method)
            case "slowly":
                self.at[payment_id] = At("processing", method)
            case "declined":
                self._end(payment_id, captured=False)
                self.at[payment_id] = At("declined", "declined")
            case _:
                self._end(payment_id, captured=True)

    def _end(self, payment_id: UUID, *, captured: bool) -> None:
        self.at[payment_id] = At("captured" if captured else "declined")
        if captured:
            self.capture(self.orders[payment_id])
        else:
            self.outcomes[payment_id] = Declined("declined")

    def _state(self, payment_id: UUID) -> Any:
        if payment_id in self.outcomes:
            return self.outcomes[payment_id]
        action = NextAction(type="redirect", fields={"url": "https://x/"})
        step: Any = self.at[payment_id].step
        return Open(id=payment_id, step=step, action=action if step == "action" else None)


class Faulty:
    """One call in four fails: it is not sent, or its outcome is lost before or behind the act."""

    def __init__(self, provider: Provider) -> None:
        self._fate = provider.dice.random() if provider.failing else 1.0

    def __enter__(self) -> None:
        if self._fate < 0.08:
            raise NeverSent("walk", is_outage=False)
        if self._fate < 0.16:
            raise OutcomeUnknown("walk")

    def __exit__(self, *_: object) -> None:
        if self._fate < 0.25:
            raise OutcomeUnknown("walk")


class Walk:
    def __init__(
        self, provider: Provider, services: list[Service], connection: Connection, key: str
    ) -> None:
        self.provider = provider
        self.own, self.other = services
        self.connection = connection
        self.dice = provider.dice
        self.keys = [f"{key} {each}" for each in KEYS]
        self.methods = {each: self.dice.choice(METHODS) for each in self.keys}

    async def step(self) -> str:
        key = self.dice.choice(self.keys)
        payment_id = payment_id_for(key)
        what = self.dice.choice(WHAT)
        match what:
            case "charge":
                await age(self.connection, 10)  # so that no earlier request is waited for
                method = self.methods[key]
                if method == "pay_":
                    method = f"pay_{key.replace(' ', '_')}"
                try:
                    await charge(self.own, key, method)
                except PaymentsError as error:
                    what = f"charge: {error.code}"
            case "acts":
                self.provider.customer_acts(payment_id)
            case "goes on":
                self.provider.goes_on(payment_id)
            case "turns":
                self.provider.turns(payment_id)
            case "settle":
                await settle(self.own, self.connection)
            case "settle elsewhere":
                await settle(self.other, self.connection)
            case "age":
                await age(self.connection, 300)
            case "long":
                await age(self.connection, self.dice.choice((700, DAY_S, 3 * DAY_S)))
            case "hold ends" if not self._ends_with_an_intent():
                hold_ends_in(self.connection, 0)
        return f"{what} {key[-2:]} {self.provider.at.get(payment_id)}"

    def _ends_with_an_intent(self) -> bool:
        """Whoever changes the log's last event alarms the process that appended it."""
        row = self.connection.execute(
            "SELECT topic FROM payment_events ORDER BY notification_id DESC LIMIT 1"
        ).fetchone()
        return row == ("PaymentInitiated",)

    async def end(self) -> None:
        """The provider responds again, and time passes; what is still open there may go on."""
        self.provider.failing = False
        for seconds in (10, 700, DAY_S, 3 * DAY_S, 3 * DAY_S, 0, 0):
            await age(self.connection, seconds)
            await settle(self.own, self.connection)
            for key in self.keys:
                if not seconds or self.dice.random() < 0.4:
                    self.provider.goes_on(payment_id_for(key))
                if not seconds or self.dice.random() < 0.4:
                    self.provider.customer_acts(payment_id_for(key))
        await settle(self.own, self.connection)

    def findings(self) -> list[str]:
        found = [f"open: {row}" for row in unsettled(self.connection)]
        if len(set(self.provider.captures)) < len(self.provider.captures):
            found.append("captured twice")
        for key in self.keys:
            payment_id = payment_id_for(key)
            captured = payment_id in self.provider.captures
            if not topics(self.connection, payment_id):
                found += ["captured, and not in the log"] if captured else []
                continue
            payment = as_stored(self.connection, payment_id)
            late = payment.late_capture
            back = late is not None and late.refund_id in self.provider.given_back
            paid = payment.outcome is Status.SUCCESS
            if payment.outcome is Status.PENDING or captured != (paid or back):
                found.append(f"{key}: {payment.outcome}, captured {captured}, back {back}")
        return found


@pytest.mark.timeout(1200)
@pytest.mark.parametrize("second_charge", ["allow", "refuse"])
async def test_what_was_captured_is_paid_or_went_back(
    make: Make, connection: Connection, long_run: bool, second_charge: str
) -> None:
    provider = Provider()
    more = {"second_charge": second_charge, "seat_hold_s": 900}
    services = [await make(provider, **more), await make(ScriptedGateway(), **more)]
    for seed in range(200 if long_run else 4):
        provider.begin(random.Random(seed))
        walk = Walk(provider, services, connection, f"walk {seed}")
        steps = [await walk.step() for _ in range(STEPS)]
        await walk.end()
        assert walk.findings() == [], (seed, steps)
