"""Giving back by itself what its order did not fulfil: once per payment, whatever happens."""

import asyncio
from collections.abc import Iterator
from typing import Any
from uuid import UUID

import psycopg
import pytest
from loguru import logger

from payments import brake
from payments.commands.unfulfilled import UnfulfilledRefunding
from payments.errors import PaymentAlreadyRefunded, RefundExceedsCapture
from payments.events.facts import RefundInitiated
from payments.events.store import fact_at
from payments.http_url import parse_http_url
from payments.payment.identity import is_of_unfulfilled, payment_id_for, unfulfilled_refund_id
from payments.payment.state import Status
from payments.service import Service
from tests.commands.conftest import Make
from tests.commands.looking import capture, gateway_of, topics
from tests.commands.refunding import refund_of
from tests.commands.settling import FAST, age, settle
from tests.doubles.gateway import (
    ScriptedGateway,
    after,
    answer_lost,
    decline,
    never_sent,
    no_answer,
)
from tests.lost_log import lose_after
from tests.support import charge_of, until

pytestmark = pytest.mark.anyio

PAYMENT = payment_id_for("k")
REFUND: dict[str, Any] = {
    "unfulfilled": "refund",
    "order_status_url": parse_http_url("http://127.0.0.1:1/{order_id}"),
}
NOTHING_LEFT = RefundExceedsCapture | PaymentAlreadyRefunded
Connection = psycopg.Connection[Any]


@pytest.fixture
def errors() -> Iterator[list[str]]:
    """What is logged of level ERROR and above."""
    told: list[str] = []
    added = logger.add(lambda message: told.append(message.record["message"]), level="ERROR")
    yield told
    logger.remove(added)


async def giving(make: Make, *script: Any, **changed: Any) -> Service:
    """A service that may give back; `script` is for its refunds."""
    return await make(ScriptedGateway(refund_script=script), **REFUND, **changed)


def of(service: Service) -> UnfulfilledRefunding:
    assert service.unfulfilled is not None
    return service.unfulfilled


def begun(connection: Connection) -> list[UUID]:
    """What counts towards the brake."""
    return [id for (id,) in connection.execute("SELECT payment_id FROM giving_back_begun")]


async def test_only_where_it_is_switched_on(make: Make) -> None:
    assert (await make(ScriptedGateway())).unfulfilled is None


async def test_what_is_left_goes_back_once(make: Make, connection: Connection) -> None:
    service = await giving(make)
    await capture(service)
    await service.refunding.refund(refund_of(400, "part"))
    assert await of(service).give_back(PAYMENT)
    assert await of(service).give_back(PAYMENT)
    assert [refund.amount_cents for refund in gateway_of(service).refunds] == [400, 1100]
    assert gateway_of(service).given_back[1] == unfulfilled_refund_id(PAYMENT)
    assert begun(connection) == [PAYMENT]
    (row,) = connection.execute(
        "SELECT originator_version, topic, state FROM payment_events"
        " WHERE topic = 'RefundInitiated' ORDER BY notification_id DESC LIMIT 1"
    ).fetchall()
    fact = fact_at(PAYMENT, *row)
    assert isinstance(fact, RefundInitiated)
    assert (fact.client, fact.idempotency_key, fact.whole) == ("fulfilment", None, True)
    assert is_of_unfulfilled(PAYMENT, fact.refund_id)


async def test_at_once_in_two_processes(make: Make, connection: Connection) -> None:
    first, second = await giving(make), await giving(make)
    await capture(first)
    go_on = asyncio.Event()
    for service in (first, second):
        gateway_of(service).refund_script = [after(go_on)]
    tasks = [
        asyncio.create_task(of(service).give_back(PAYMENT))
        for service in (first, first, second, second)
    ]
    await until(lambda: gateway_of(first).refunds or gateway_of(second).refunds)
    await asyncio.sleep(0.1)
    go_on.set()
    assert await asyncio.gather(*tasks) == [True] * 4
    assert len(gateway_of(first).given_back + gateway_of(second).given_back) == 1
    assert topics(connection, PAYMENT)[2:] == ["RefundInitiated", "PaymentRefunded"]


@pytest.mark.parametrize("key", [None, "a"])
async def test_at_the_moment_in_which_a_client_refunds_it(make: Make, key: str | None) -> None:
    """Whoever comes second finds nothing left; a client without a key joins."""
    service, other = await giving(make), await giving(make)
    await capture(service)
    ours, theirs = await asyncio.gather(
        of(service).give_back(PAYMENT),
        other.refunding.refund(refund_of(key=key)),
        return_exceptions=True,
    )
    given_back = gateway_of(service).given_back + gateway_of(other).given_back
    assert len(given_back) == 1
    if given_back == [unfulfilled_refund_id(PAYMENT)]:
        assert ours is True
        assert key is None or isinstance(theirs, NOTHING_LEFT)
    else:
        assert ours is False


@pytest.mark.parametrize("step", [no_answer, answer_lost, never_sent], ids=lambda s: s.__name__)
async def test_settling_goes_on_with_what_the_provider_did_not_answer(
    make: Make, connection: Connection, step: Any
) -> None:
    service = await giving(make, step, **FAST)
    await capture(service)
    assert await of(service).give_back(PAYMENT)  # under way
    assert topics(connection, PAYMENT)[2:] == ["RefundInitiated"]
    assert await of(service).give_back(PAYMENT)
    await age(connection, 1)
    await settle(service, connection)
    assert await of(service).give_back(PAYMENT)
    assert topics(connection, PAYMENT)[2:] == ["RefundInitiated", "PaymentRefunded"]
    assert gateway_of(service).given_back == [unfulfilled_refund_id(PAYMENT)]


async def test_a_refusal_is_told_and_not_tried_again(
    make: Make, connection: Connection, errors: list[str]
) -> None:
    service = await giving(make, decline)
    await capture(service)
    for _ in range(3):
        assert not await of(service).give_back(PAYMENT)
    assert len(gateway_of(service).refunds) == 1
    (told,) = errors
    assert "declined an automatic refund" in told
    refunded = await service.refunding.refund(refund_of(key="by hand"))
    assert refunded.payment.status is Status.REFUNDED


async def test_a_refusal_that_settling_finds_is_told_as_well(
    make: Make, connection: Connection, errors: list[str]
) -> None:
    def refused_silently(gateway: ScriptedGateway, refund: Any) -> None:
        decline(gateway, refund)
        no_answer(gateway, refund)

    service = await giving(make, refused_silently, **FAST)
    await capture(service)
    assert await of(service).give_back(PAYMENT)
    await age(connection, 1)
    await settle(service, connection)
    assert not await of(service).give_back(PAYMENT)
    assert topics(connection, PAYMENT)[2:] == ["RefundInitiated", "RefundFailed"]
    assert len(errors) == 1


async def test_a_refusal_of_a_clients_refund_is_none_of_it(make: Make, errors: list[str]) -> None:
    service = await giving(make, decline)
    await capture(service)
    with pytest.raises(Exception, match="refused"):
        await service.refunding.refund(refund_of())
    assert errors == []
    assert await of(service).give_back(PAYMENT)


async def test_nothing_is_left_or_was_captured(make: Make, connection: Connection) -> None:
    service = await giving(make, **FAST)
    await capture(service)
    await service.refunding.refund(refund_of())
    gateway_of(service).script = [decline, no_answer]
    await service.charging.charge(charge_of("declined"))
    await service.charging.charge(charge_of("pending"))
    for key in ("k", "declined", "pending", "unknown"):
        assert not await of(service).give_back(payment_id_for(key))
    assert len(gateway_of(service).refunds) == 1
    assert begun(connection) == []


async def test_a_clients_refund_that_is_under_way_comes_first(
    make: Make, connection: Connection
) -> None:
    """If the provider refuses it, asking again gives the payment back."""
    go_on = asyncio.Event()
    service = await giving(make, after(go_on, decline))
    await capture(service)
    theirs = asyncio.create_task(service.refunding.refund(refund_of(key="a")))
    await until(lambda: gateway_of(service).refunds)
    assert not await of(service).give_back(PAYMENT)
    assert begun(connection) == []
    go_on.set()
    await asyncio.wait({theirs})
    assert theirs.exception() is not None
    assert await of(service).give_back(PAYMENT)


async def test_what_another_provider_captured_is_held_back(
    make: Make, connection: Connection
) -> None:
    await capture(await giving(make))
    gateway = ScriptedGateway()
    gateway.name = "other"
    service = await make(gateway, **REFUND)
    assert not await of(service).give_back(PAYMENT)
    assert gateway.refunds == []
    assert begun(connection) == []


async def test_nothing_goes_back_while_a_loss_of_the_log_is_open(
    make: Make, connection: Connection
) -> None:
    service = await giving(make)
    await capture(service)
    connection.execute(
        "INSERT INTO log_losses (kind, by, reason, kept_position, lost_position, head_position)"
        " VALUES ('found', 'api-1:7', 'lacks', 2, 9, 4)"
    )
    assert not await of(service).give_back(PAYMENT)
    assert gateway_of(service).refunds == []
    assert begun(connection) == []


async def test_the_same_refund_if_the_log_lost_it(make: Make, connection: Connection) -> None:
    """The provider has made it already, and recognises it."""
    service = await giving(make)
    await capture(service)
    assert await of(service).give_back(PAYMENT)
    lose_after(connection, 2)
    after_it = await make(gateway_of(service), **REFUND)
    assert await of(after_it).give_back(PAYMENT)
    assert len(gateway_of(service).given_back) == 1
    assert topics(connection, PAYMENT)[2:] == ["RefundInitiated", "PaymentRefunded"]


async def test_the_brake_stops_every_process_until_a_person_lifts_it(
    make: Make, connection: Connection, errors: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(brake, "FEWEST", 2)
    first, second = await giving(make), await giving(make)
    for key in ("a", "b", "c", "d"):
        await first.charging.charge(charge_of(key))
    given_back = [await of(first).give_back(payment_id_for(key)) for key in ("a", "b", "c", "a")]
    assert given_back == [True, True, False, True]  # what was begun goes on
    assert not await of(second).give_back(payment_id_for("d"))
    assert not await of(second).give_back(payment_id_for("d"))
    assert len(gateway_of(first).refunds + gateway_of(second).refunds) == 2
    assert len(errors) == 2  # each process tells it once
    stop = await brake.lift(first.database, "ana", "looked")
    assert stop is not None
    assert "2 were given back within an hour" in stop.reason
    assert await of(second).give_back(payment_id_for("d"))
    assert await of(first).give_back(payment_id_for("c"))


async def test_no_place_of_another_request_is_taken(make: Make) -> None:
    service = await giving(make)
    await capture(service)
    taken = service.admission.requests.taken
    assert await of(service).give_back(PAYMENT)
    assert service.admission.requests.taken == taken
