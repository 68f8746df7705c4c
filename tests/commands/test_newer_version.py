"""A newer version of the service runs beside this one, and wrote what this one cannot read."""

from typing import Any

import psycopg
import pytest

from payments.events.store import APPEND, append_params
from payments.payment.identity import payment_id_for
from payments.payment.state import Status
from tests.commands.conftest import Make
from tests.commands.looking import begin, gateway_of
from tests.commands.refunding import FAST
from tests.commands.settling import age
from tests.doubles.gateway import ScriptedGateway, approve, decline, no_answer
from tests.support import charge_of, stored_event

pytestmark = pytest.mark.anyio

PAYMENT = payment_id_for("k")


def append_newer(connection: psycopg.Connection[Any], version: int) -> None:
    event = stored_event(PAYMENT, version, topic="SomethingNew")
    connection.execute(APPEND, append_params([[event]]))


@pytest.mark.parametrize(("step", "becomes"), [(approve, "SUCCESS"), (decline, "FAILED")])
async def test_the_first_outcome_of_a_charge_is_still_the_answer(
    make: Make, connection: psycopg.Connection[Any], step: Any, becomes: str
) -> None:
    service = await make(ScriptedGateway(step))
    await begin(service)
    append_newer(connection, 3)
    again = await service.charging.charge(charge_of("k"))
    assert (again.payment.status, again.replayed) == (Status(becomes), True)


async def test_before_there_is_an_outcome_it_is_pending(
    make: Make, connection: psycopg.Connection[Any]
) -> None:
    service = await make(ScriptedGateway(no_answer), **FAST)
    await begin(service)
    append_newer(connection, 2)
    await age(connection, 10)  # the first run is over
    again = await service.charging.charge(charge_of("k"))
    assert again.payment.status is Status.PENDING
    gateway = gateway_of(service)
    assert (len(gateway.charges), gateway.questions) == (1, [])
