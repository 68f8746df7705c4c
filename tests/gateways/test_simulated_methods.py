"""What each payment method has the simulated provider play, alone and through the service."""

import asyncio
import signal
import subprocess
import sys
import time
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import AsyncExitStack, asynccontextmanager
from pathlib import Path
from typing import Any
from uuid import UUID

import httpx
import psycopg
import pytest

from payments.database.connections import DatabaseAddress
from payments.gateways import (
    NeverSent,
    NextAction,
    Open,
    OutcomeUnknown,
    ProviderCharge,
    Refusal,
    simulated_methods,
)
from payments.gateways.simulated import SimulatedGateway
from payments.gateways.simulated_methods import (
    ACTION_S,
    METHODS,
    Method,
    Stage,
    UnknownMethod,
    parse_method,
    stage,
)
from payments.payment.state import Approved, Declined
from payments.service import Service
from payments.settings import Settings
from tests.support import until
from tests.web.requests import BODY, problem
from web.app import application, guarded

pytestmark = pytest.mark.anyio

ID = UUID("058c9593-e150-402f-ab5b-37dd4c9816f0")
APPROVED = Approved(id=ID, amount_cents=1500, currency="INR", provider_txn_id=f"sim_{ID.hex}")
DECLINED = Declined("declined_by_simulation")


def asked(payment_method: str | None, amount_cents: int = 1500, **more: Any) -> ProviderCharge:
    return ProviderCharge(
        payment_id=ID,
        amount_cents=amount_cents,
        currency="INR",
        payment_method=payment_method,
        **more,
    )


@pytest.mark.parametrize(
    ("payment_method", "method"),
    [
        (None, None),
        ("pm_card_visa", None),
        ("sim", None),
        ("SIM_decline", None),
        *((f"sim_{kind}", Method(kind)) for kind in ("decline", "refuse", "down", "timeout")),
        *((f"sim_{kind}", Method(kind)) for kind in ("answer_lost", "action", "action_declined")),
        *((f"sim_{kind}", Method(kind)) for kind in ("action_never", "authorized", "prepare")),
        ("sim_delay_0", Method("delay", 0)),
        ("sim_pending_3", Method("pending", 3)),
        ("sim_pending_declined_03", Method("pending_declined", 3)),
        ("sim_late_capture_99999", Method("late_capture", 99_999)),
        ("sim_ref_pay_29QQoUBi66xm2f-", Method("ref", reference="pay_29QQoUBi66xm2f-")),
    ],
)
def test_a_payment_method_is_parsed(payment_method: str | None, method: Method | None) -> None:
    assert parse_method(payment_method) == method


@pytest.mark.parametrize(
    "rest",
    [
        *("", "declined", "Decline", "delay", "delay_", "delay_1.5", "delay_100000", "delay_-1"),
        *("pending_declined", "pending_x", "ref_", f"ref_{'x' * 65}", "ref_a.b", "action_1"),
        "decline ",
    ],
)
async def test_what_only_begins_like_one_is_refused_with_the_list(rest: str) -> None:
    with pytest.raises(UnknownMethod):
        parse_method(f"sim_{rest}")
    async with opened(None) as gateway:
        refusal = gateway.refuses(asked(f"sim_{rest}"))
    assert refusal == Refusal("payment_method", f"begins with sim_: must be one of {METHODS}")


@pytest.mark.parametrize(
    ("method", "stages"),
    [
        (Method("prepare"), {0: "ready", 1e6: "ready"}),
        (Method("action"), {0: "action", ACTION_S - 0.1: "action", ACTION_S: "ready"}),
        (Method("action_declined"), {0: "action", ACTION_S - 0.1: "action", ACTION_S: "declined"}),
        (Method("action_never"), {0: "action", 1e6: "action"}),
        (Method("authorized"), {0: "action", ACTION_S - 0.1: "action", ACTION_S: "authorized"}),
        (Method("pending", 3), {0: "processing", 2.9: "processing", 3: "approved"}),
        (Method("pending_declined", 3), {0: "processing", 2.9: "processing", 3: "declined"}),
        (Method("late_capture", 3), {0: "unknown", 2.9: "unknown", 3: "approved"}),
        (Method("pending", 0), {-1: "processing", 0: "approved"}),  # the clock was set back
    ],
    ids=str,
)
def test_where_a_charge_in_steps_stands(method: Method, stages: dict[float, Stage]) -> None:
    assert {age_s: stage(method, age_s) for age_s in stages} == stages


@asynccontextmanager
async def opened(ledger: Path | None) -> AsyncIterator[SimulatedGateway]:
    gateway = SimulatedGateway(ledger)
    yield gateway
    await gateway.close()


@pytest.fixture
def later(monkeypatch: pytest.MonkeyPatch) -> Callable[[float], None]:
    """Sets the simulated provider's clock ahead."""
    began = time.time()

    def set_ahead(seconds: float) -> None:
        monkeypatch.setattr("payments.gateways.simulated.time.time", lambda: began + seconds)

    set_ahead(0)
    return set_ahead


async def play(
    gateway: SimulatedGateway, charge: ProviderCharge, later: Callable[[float], None]
) -> list[Any]:
    """What `charge` and `find_charge` say at first, and an hour later."""
    if gateway.needs_preparing(charge):
        assert await gateway.prepare(charge, 0.1) == await gateway.prepare(charge, 0.1)
    said = []
    for age_s in (0, 3600):
        later(age_s)
        said += [await result_of(ask(charge, 0.1)) for ask in (gateway.charge, gateway.find_charge)]
    return said


async def result_of(asking: Awaitable[Approved | Declined | Open | None]) -> Any:
    """The step of an open charge, the type of what was raised."""
    try:
        found = await asking
    except (OutcomeUnknown, NeverSent) as error:
        return f"{type(error).__name__}{', an outage' if error.is_outage else ''}"
    return found.step if isinstance(found, Open) else found


_DECIDED = [APPROVED] * 4
_REFUSED = [DECLINED] * 4


@pytest.mark.parametrize(
    ("payment_method", "said"),
    [
        ("sim_decline", _REFUSED),
        ("sim_refuse", _DECIDED),  # `charge` is never called with it
        ("sim_delay_0", _DECIDED),
        ("sim_ref_X", _DECIDED),
        ("sim_prepare", _DECIDED),
        ("sim_down", ["NeverSent", None] * 2),
        ("sim_timeout", ["OutcomeUnknown", None] * 2),
        ("sim_delay_1", ["OutcomeUnknown", None] * 2),
        ("sim_answer_lost", ["OutcomeUnknown", APPROVED] * 2),
        ("sim_action", ["action", "action", APPROVED, APPROVED]),
        ("sim_action_declined", ["action", "action", DECLINED, DECLINED]),
        ("sim_action_never", ["action"] * 4),
        ("sim_authorized", ["action", "action", APPROVED, APPROVED]),
        ("sim_pending_9", ["processing", "processing", APPROVED, APPROVED]),
        ("sim_pending_declined_9", ["processing", "processing", DECLINED, DECLINED]),
        ("sim_late_capture_9", ["OutcomeUnknown", None, APPROVED, APPROVED]),
    ],
)
async def test_a_payment_method_plays_its_course(
    payment_method: str, said: list[Any], later: Callable[[float], None], tmp_path: Path
) -> None:
    async with opened(tmp_path / "ledger") as gateway:
        assert await play(gateway, asked(payment_method), later) == said


async def test_an_amount_that_ends_in_7_is_declined_by_every_method(
    later: Callable[[float], None],
) -> None:
    methods = ["sim_action", "sim_authorized", "sim_pending_9", "sim_late_capture_9", "sim_prepare"]
    for method in [*methods, "sim_answer_lost", "sim_ref_X"]:
        later(0)
        async with opened(None) as gateway:
            said = await play(gateway, asked(method, 1507), later)
        assert said[-1] == DECLINED, method


@pytest.mark.parametrize(
    ("payment_method", "ends"),
    [
        ("sim_action", Declined("cancelled")),
        ("sim_action_never", Declined("cancelled")),
        ("sim_prepare", Declined("cancelled")),
        ("sim_pending_9", "processing"),
        ("sim_late_capture_9", None),
    ],
)
async def test_cancelling(
    payment_method: str, ends: Any, later: Callable[[float], None], tmp_path: Path
) -> None:
    """What was cancelled is never captured; what is under way at the provider cannot be."""
    charge = asked(payment_method)
    async with opened(tmp_path / "ledger") as gateway:
        if gateway.needs_preparing(charge):
            await gateway.prepare(charge, 0.1)
        if payment_method != "sim_prepare":
            await result_of(gateway.charge(charge, 0.1))
        assert await result_of(gateway.cancel(asked(None), 0.1)) == ends
        later(3600)
        found = await gateway.find_charge(asked(None), 0.1)
        assert found == (ends if isinstance(ends, Declined) else APPROVED)


async def test_the_action_leads_back_to_where_the_request_says() -> None:
    charge = asked("sim_action", return_url="https://shop.example/back?order=1&x=%20")
    async with opened(None) as gateway:
        await gateway.prepare(charge, 0.1)
        charged = await gateway.charge(charge, 0.1)
    assert isinstance(charged, Open)
    assert charged.action == NextAction(
        type="redirect",
        fields={
            "url": f"https://simulated.invalid/customer/{ID}"
            "?return_url=https%3A%2F%2Fshop.example%2Fback%3Forder%3D1%26x%3D%2520",
            "client_secret": f"simsecret_{ID.hex}",
        },
    )


BEGINNING = """
import asyncio, os, pathlib, signal, sys
from uuid import UUID
from payments.gateways import ProviderCharge
from payments.gateways.simulated import SimulatedGateway
async def main():
    gateway = SimulatedGateway(pathlib.Path(sys.argv[1]))
    charge = ProviderCharge(
        payment_id=UUID(sys.argv[2]), amount_cents=1500, currency="INR", payment_method=sys.argv[3]
    )
    await gateway.prepare(charge, 1)
    os.kill(os.getpid(), signal.SIGKILL)
asyncio.run(main())
"""


async def test_what_was_begun_survives_a_kill_and_is_seen_by_all_processes(
    later: Callable[[float], None], tmp_path: Path
) -> None:
    """The time counts from when the killed process began it."""
    ledger = tmp_path / "ledger"
    arguments = [sys.executable, "-c", BEGINNING, str(ledger), str(ID), "sim_authorized"]
    killed = await asyncio.to_thread(subprocess.run, arguments, timeout=30, check=False)
    assert killed.returncode == -signal.SIGKILL
    reference = f"simref_{ID.hex}"
    async with opened(ledger) as one, opened(ledger) as another:
        # The charge of a settling process, which knows no payment method.
        settling = asked(None, reference=reference)
        for gateway in (one, another):
            assert await result_of(gateway.find_charge(settling, 1)) == "action"
            assert await result_of(gateway.charge(settling, 1)) == "action"  # nothing is captured
        later(3600)
        found = await one.find_charge(settling, 1)
        assert isinstance(found, Open)
        assert found.step == "authorized"
        assert await another.charge(settling, 1) == APPROVED
        assert await one.find_charge(settling, 1) == APPROVED


FAST = Settings(
    simulated_ledger="", charge_deadline_s=0.6, gateway_timeout_s=0.4, pending_abandon_after_s=3
)
SendCharge = Callable[..., Awaitable[httpx.Response]]


@pytest.fixture
async def send(
    address: DatabaseAddress, monkeypatch: pytest.MonkeyPatch
) -> AsyncIterator[SendCharge]:
    """Charges at a service that follows and settles, where a customer acts after a second."""
    monkeypatch.setattr(simulated_methods, "ACTION_S", 1.0)
    async with AsyncExitStack() as stack:
        service = Service(FAST, address)
        await service.start()
        stack.push_async_callback(service.stop, 2)
        app = guarded(application(service), service)
        client = await stack.enter_async_context(
            httpx.AsyncClient(transport=httpx.ASGITransport(app), base_url="http://payments")  # type: ignore[arg-type]
        )

        async def charge(payment_method: str, key: str | None = None) -> httpx.Response:
            headers = {"Idempotency-Key": key or payment_method}
            body = BODY | {"payment_method": payment_method}
            return await client.post("/v1/charge", json=body, headers=headers)

        yield charge


def topics(connection: psycopg.Connection[Any], key: str) -> list[str]:
    rows = connection.execute(
        "SELECT type FROM payment_event_log WHERE payment_id ="
        " (SELECT payment_id FROM payment_event_log WHERE data ->> 'idempotency_key' = %s)"
        " ORDER BY version",
        [key],
    ).fetchall()
    return [topic for (topic,) in rows]


# The first response, with what is there to be done; and the events, once all is over without
# another request.
COURSES: dict[str, tuple[int, str, str, list[str]]] = {
    "sim_decline": (201, "FAILED", "", ["PaymentFailed"]),
    "sim_delay_0": (201, "SUCCESS", "", ["PaymentCharged"]),
    "sim_prepare": (201, "SUCCESS", "", ["PaymentReferenced", "PaymentCharged"]),
    "sim_ref_X": (201, "SUCCESS", "", ["PaymentCharged"]),
    "sim_answer_lost": (202, "PENDING", "", ["PaymentCharged"]),
    "sim_delay_1": (202, "PENDING", "", ["PaymentFailed"]),
    "sim_timeout": (202, "PENDING", "", ["PaymentFailed"]),
    "sim_pending_1": (202, "PENDING", "", ["PaymentCharged"]),
    "sim_pending_declined_1": (202, "PENDING", "", ["PaymentFailed"]),
    "sim_action_declined": (
        *(202, "PENDING", "redirect"),
        ["PaymentReferenced", "PaymentActionRequired", "PaymentFailed"],
    ),
    "sim_action": (
        *(202, "PENDING", "redirect"),
        ["PaymentReferenced", "PaymentActionRequired", "PaymentFailed"],
    ),
    "sim_action_never": (
        *(202, "PENDING", "redirect"),
        ["PaymentReferenced", "PaymentActionRequired", "PaymentFailed"],
    ),
    "sim_authorized": (
        *(202, "PENDING", "redirect"),
        ["PaymentReferenced", "PaymentActionRequired", "PaymentCharged"],
    ),
    "sim_late_capture_4": (
        *(202, "PENDING", ""),
        ["PaymentFailed", "LateCaptureFound", "LateCaptureReturned"],
    ),
}


async def test_each_course_through_the_service(
    send: SendCharge, connection: psycopg.Connection[Any]
) -> None:
    """Nobody asks a second time: settling alone brings each to its end."""
    responses = await asyncio.gather(*(send(method) for method in COURSES))
    for (method, (status, outcome, action, _)), response in zip(
        COURSES.items(), responses, strict=True
    ):
        body = response.json()
        said = (response.status_code, body["status"], body.get("next_action", {}).get("type", ""))
        assert said == (status, outcome, action), method
        assert ("retry-after" in response.headers) == (status == 202)
    for method, (*_, events) in COURSES.items():
        expected = ["PaymentInitiated", *events]
        await until(lambda: topics(connection, method) == expected)  # noqa: B023


async def test_the_courses_that_end_with_the_first_request(
    send: SendCharge, connection: psycopg.Connection[Any]
) -> None:
    refused = await send("sim_refuse")
    assert problem(refused) == (400, "invalid_request")
    assert [error["field"] for error in refused.json()["errors"]] == ["payment_method"]
    assert topics(connection, "sim_refuse") == []
    assert problem(await send("sim_down")) == (503, "gateway_unavailable")
    assert (await send("sim_ref_X")).status_code == 201
    assert problem(await send("sim_ref_X", "another key")) == (422, "payment_method_reused")
    assert topics(connection, "another key") == []
    assert (await send("sim_ref_X")).headers["idempotent-replayed"] == "true"
