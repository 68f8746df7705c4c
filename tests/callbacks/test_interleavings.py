"""The dispatcher when things come at the wrong moment, and what it says of it."""

import asyncio
import uuid
from typing import Any

import psycopg
import pytest

from payments.callbacks import dispatcher as dispatching
from payments.callbacks import endpoint_health
from payments.callbacks import outbox as statements
from tests.callbacks.conftest import (
    Line,
    PlayedEndpoint,
    answered,
    dispatching_to,
)
from tests.callbacks.outbox import Outbox, of
from tests.machine import within
from tests.support import until

pytestmark = [pytest.mark.anyio, pytest.mark.usefixtures("looks_often")]

A, B = uuid.uuid4(), uuid.uuid4()


async def test_a_result_that_comes_while_others_are_recorded_is_not_lost(
    outbox: Outbox, endpoint: PlayedEndpoint, monkeypatch: pytest.MonkeyPatch
) -> None:
    real = statements.record

    async def slowly(connection: Any, results: Any) -> set[int]:
        held = await real(connection, results)
        assert endpoint.held is not None
        endpoint.held.set()  # the other one is answered now
        await asyncio.sleep(0.05)
        return held

    monkeypatch.setattr(statements, "record", slowly)
    endpoint.held = asyncio.Event()
    first = endpoint.post

    async def post(message_id: str, body: bytes, *rest: Any) -> Any:
        if str(A).encode() in body:
            return answered(200)
        return await first(message_id, body, *rest)

    monkeypatch.setattr(endpoint, "post", post)
    await outbox.log(*of(A, "a").charged().facts, *of(B, "b").charged().facts)
    async with dispatching_to(endpoint, outbox):
        await until(lambda: set(outbox.states()) == {"delivered"})


async def test_results_outlive_the_loss_of_the_database(
    outbox: Outbox, endpoint: PlayedEndpoint, monkeypatch: pytest.MonkeyPatch
) -> None:
    real = statements.record
    lost: list[bool] = []

    async def losing(connection: Any, results: Any) -> set[int]:
        if not lost:
            lost.append(True)
            raise psycopg.OperationalError("lost")
        return await real(connection, results)

    monkeypatch.setattr(statements, "record", losing)
    await outbox.log(*of(A, "a").charged().facts)
    async with dispatching_to(endpoint, outbox):
        await until(lambda: outbox.states() == ["delivered"])
    assert len(endpoint.bodies) == 1


async def test_a_result_that_cannot_be_recorded_does_not_stop_the_others(
    outbox: Outbox, endpoint: PlayedEndpoint, monkeypatch: pytest.MonkeyPatch
) -> None:
    real = statements.record

    async def refusing(connection: Any, results: Any) -> set[int]:
        if any(result.claimed.order_id == A for result in results):
            raise ValueError("no")
        return await real(connection, results)

    monkeypatch.setattr(statements, "record", refusing)
    async with dispatching_to(endpoint, outbox):
        await outbox.log(*of(A, "a").charged().facts)
        await until(lambda: endpoint.told(A))
        await outbox.log(*of(B, "b").charged().facts)
        await until(lambda: outbox.states() == ["due", "delivered"])


async def test_a_database_that_does_not_answer_is_given_up(
    outbox: Outbox, endpoint: PlayedEndpoint, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(dispatching, "DATABASE_TIMEOUT_S", 0.3)
    real = statements.claim
    asked: list[bool] = []

    async def frozen_once(connection: Any, **options: Any) -> Any:
        asked.append(True)
        if len(asked) == 1:
            await connection.execute("SELECT pg_sleep(1.9)")
        return await real(connection, **options)

    monkeypatch.setattr(statements, "claim", frozen_once)
    await outbox.log(*of(A, "a").charged().facts)
    async with dispatching_to(endpoint, outbox):
        with within(1.2):
            await until(lambda: outbox.states() == ["delivered"])


async def test_an_endpoint_that_refuses_all_is_told_once(
    outbox: Outbox, endpoint: PlayedEndpoint, lines: list[Line], monkeypatch: pytest.MonkeyPatch
) -> None:
    """As with a wrong secret: it is alive, so the circuit breaker says nothing."""
    monkeypatch.setattr(endpoint_health, "TOLD_AFTER_S", 0.1)
    endpoint.answer = lambda _: answered(401)
    await outbox.log(*of(A, "a").charged().facts)
    async with dispatching_to(endpoint, outbox):
        await until(lambda: lines and len(endpoint.bodies) >= 4 * endpoint_health.REFUSED_MAX)
        assert lines == [("WARNING", "Order Service rejects callbacks", {"reason": "401"})]
        endpoint.answer = lambda _: answered(200)
        await until(lambda: outbox.states() == ["delivered"])
    assert lines[1:] == [("INFO", "Order Service accepts callbacks again", {})]


async def test_a_callback_that_dies_is_told(
    outbox: Outbox, endpoint: PlayedEndpoint, lines: list[Line]
) -> None:
    endpoint.answer = lambda _: answered(410)
    await outbox.log(*of(A, "a").charged().facts)
    async with dispatching_to(endpoint, outbox):
        await until(lambda: outbox.states() == ["dead"])
    ((level, message, fields),) = lines
    assert (level, message.split(":")[0]) == ("ERROR", "a callback is dead")
    ((event_id, payment_id),) = outbox.rows("event_id", "payment_id")
    assert fields == {
        "event_id": event_id,
        "payment_id": payment_id,
        "order_id": A,
        "attempts": 1,
        "reason": "410",
    }
