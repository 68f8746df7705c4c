"""What the dispatcher notes of a delivered SUCCESS, in the statement that records it."""

import asyncio
from typing import Any
from uuid import UUID, uuid4

import pytest

from payments.callbacks.outbox import claim, record
from tests.callbacks.conftest import PlayedEndpoint, answered, dispatching_to, failed
from tests.callbacks.conftest import outbox as outbox
from tests.callbacks.outbox import ALL, Outbox, claim_some, of, result_of
from tests.support import until

pytestmark = pytest.mark.anyio

CONFIRMED = answered(200, answer=b'{"status":"CONFIRMED"}')
ALREADY = answered(201, answer=b'{"ok":true,"note":"already processed"}')
FAILED = answered(200, answer=b'{"status":"FAILED"}')


def suspects(outbox: Outbox) -> list[tuple[Any, ...]]:
    query = "SELECT payment_id, order_id, state, said FROM fulfilments"
    return outbox.connection.execute(query).fetchall()


async def told(outbox: Outbox, *answers: Any) -> tuple[UUID, UUID, PlayedEndpoint]:
    """An order whose SUCCESS is answered so, one attempt after another; until it is delivered."""
    order_id = uuid4()
    charged = of(order_id, str(order_id)).charged()
    await outbox.log(*charged.facts)
    endpoint, left = PlayedEndpoint(), list(answers)
    endpoint.answer = lambda body: left.pop(0)
    async with dispatching_to(endpoint, outbox):
        await until(lambda: outbox.states()[-1] == "delivered")
    assert left == []
    return charged.id, order_id, endpoint


@pytest.mark.parametrize(
    ("answers", "said"),
    [
        ([CONFIRMED], None),
        ([answered(500), CONFIRMED], None),
        ([ALREADY], "already_processed"),
        ([failed(), ALREADY], "already_processed"),  # nothing was sent before
        ([answered(500), ALREADY], "repeated"),
        ([FAILED], "failed"),
        ([answered(200)], "nothing"),
        ([answered(200, answer=b'{"ok":true}')], "nothing"),
    ],
)
async def test_a_success_whose_response_does_not_say_confirmed(
    outbox: Outbox, answers: list[Any], said: str | None
) -> None:
    payment_id, order_id, _ = await told(outbox, *answers)
    found = [] if said is None else [(payment_id, order_id, "suspect", said)]
    assert suspects(outbox) == found


async def test_a_failed_or_refunded_is_no_suspect(outbox: Outbox) -> None:
    await outbox.log(*of(uuid4(), "declined").declined().facts, statuses=ALL)
    async with dispatching_to(PlayedEndpoint(), outbox):
        await until(lambda: outbox.states() == ["delivered"])
    await outbox.log(*of(uuid4(), "refunded").charged().refunded().facts, statuses=("REFUNDED",))
    async with dispatching_to(PlayedEndpoint(), outbox):
        await until(lambda: outbox.states() == ["delivered", "excluded", "delivered"])
    assert suspects(outbox) == []


async def test_who_finds_a_suspect_is_told(outbox: Outbox) -> None:
    found = asyncio.Event()
    endpoint = PlayedEndpoint()
    endpoint.answer = lambda body: CONFIRMED
    async with dispatching_to(endpoint, outbox, suspected=found.set):
        await outbox.log(*of(uuid4(), "confirmed").charged().facts)
        await until(lambda: outbox.states() == ["delivered"])
        assert not found.is_set()
        endpoint.answer = lambda body: ALREADY
        await outbox.log(*of(uuid4(), "not").charged().facts)
        async with asyncio.timeout(30):
            await found.wait()
    assert len(suspects(outbox)) == 1


async def test_an_interrupted_attempt_may_have_arrived(outbox: Outbox) -> None:
    """A process was killed between the response and its record."""
    await outbox.log(*of(uuid4(), "a").charged().facts)
    connection = await outbox.database.connect("killed")
    assert len(await claim_some(connection, lease_s=0.0)) == 1
    (again,) = await claim_some(connection)
    said = result_of(again, "delivered")._replace(said="already_processed")
    assert await record(connection, [said]) == {again.claim}
    await connection.close()
    assert [said for *_, said in suspects(outbox)] == ["repeated"]


async def test_whose_lease_is_over_notes_nothing(outbox: Outbox) -> None:
    await outbox.log(*of(uuid4(), "a").charged().facts)
    connection = await outbox.database.connect("frozen")
    (late,) = await claim_some(connection, lease_s=0.0)
    (held,) = await claim_some(connection)
    result = result_of(late, "delivered")._replace(said="failed")
    assert await record(connection, [result]) == set()
    assert suspects(outbox) == []
    assert await record(connection, [result_of(held, "delivered")._replace(said="confirmed")])
    assert suspects(outbox) == []
    await connection.close()


async def test_delivery_and_suspicion_are_recorded_together_or_not_at_all(outbox: Outbox) -> None:
    await outbox.log(*of(uuid4(), "a").charged().facts)
    outbox.connection.execute("ALTER TABLE fulfilments RENAME TO elsewhere")
    connection = await outbox.database.connect("a")
    (claimed,) = await claim(connection, most=1, failing_max=1, lease_s=60)
    result = result_of(claimed, "delivered")._replace(said="failed")
    with pytest.raises(Exception, match="fulfilments"):
        await record(connection, [result])
    assert outbox.states() == ["due"]
    assert outbox.attempts() == []
    outbox.connection.execute("ALTER TABLE elsewhere RENAME TO fulfilments")
    assert await record(connection, [result]) == {claimed.claim}
    assert outbox.states() == ["delivered"]
    assert len(suspects(outbox)) == 1
    await connection.close()


@pytest.mark.parametrize(
    ("state", "left"),
    [("suspect", []), ("unfulfilled", ["unfulfilled"]), ("paid_twice", ["paid_twice"])],
)
async def test_who_is_told_again_and_confirms_is_no_suspect(
    outbox: Outbox, state: str, left: list[str]
) -> None:
    """What ORDER_STATUS_URL told is for ORDER_STATUS_URL to take back."""
    payment_id, _, endpoint = await told(outbox, FAILED)
    outbox.connection.execute("UPDATE fulfilments SET state = %s", [state])
    endpoint.answer = lambda body: CONFIRMED
    outbox.connection.execute(
        "UPDATE callback_deliveries SET state = 'due', finished_at = NULL;"
        "INSERT INTO callback_lanes (order_id) SELECT order_id FROM callback_deliveries"
    )
    async with dispatching_to(endpoint, outbox):
        await until(lambda: outbox.states() == ["delivered"])
    assert [(id, state) for id, _, state, _ in suspects(outbox)] == [
        (payment_id, each) for each in left
    ]
