"""Orders with seats: each thing that the real Order Service was seen to do with them."""

import asyncio
import time
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Any
from uuid import uuid4

import msgspec
import pytest

from tests.callbacks.raw_server import serving
from tests.doubles.order_bookings import Booking, Purchase
from tests.doubles.order_client import Client, event, message, post
from tests.doubles.order_requests import ORDERS_PATH, repeated_early
from tests.doubles.order_seats import Seating
from tests.doubles.order_service import Options, OrderService, OrderServiceProcess
from tests.support import until

pytestmark = pytest.mark.anyio

DECIDED = b'{"message":"already processed"}'


@asynccontextmanager
async def selling(**seating: Any) -> AsyncIterator[OrderService]:
    async with OrderService(Options(seating=Seating(**seating))) as orders:
        yield orders


def booked(orders: OrderService, content: dict[str, Any]) -> Booking:
    return orders.book[content["order_id"]]


async def send(orders: OrderService, content: dict[str, Any]) -> tuple[int, bytes]:
    async with Client(orders.url) as client:
        status, _, body = await client.post(message(content))
        return status, body


class TestCallbacks:
    async def test_success_allocates_the_seats_and_issues_a_ticket(self) -> None:
        content = event()
        async with selling() as orders:
            status, body = await send(orders, content)
            assert (status, msgspec.json.decode(body)["status"]) == (200, "CONFIRMED")
            order = booked(orders, content)
            assert (order.state, order.tickets) == ("CONFIRMED", [content["payment_id"]])
            assert order.lost == ()

    @pytest.mark.parametrize("allocates", ["first", "last"])
    async def test_an_allocation_lasts_as_long_as_it_takes_also_without_its_client(
        self, allocates: str
    ) -> None:
        content = event()
        async with selling(takes_s=0.2, allocates=allocates) as orders:
            async with Client(orders.url) as client:
                client.writer.write(message(content))
                await until(lambda: orders.book)
                assert len(booked(orders, content).lost) == (allocates == "last")
            await orders.wait_for(1)
            assert booked(orders, content).state == "PENDING"
            await until(lambda: booked(orders, content).state == "CONFIRMED")
            (request,) = orders.requests
            assert request.done - request.arrived >= 0.2
            assert not request.accepted

    async def test_repeated_while_it_allocates_last_the_order_fails_after_its_ticket(self) -> None:
        """The second allocation is refused, which releases the seats."""
        content = event()
        async with selling(takes_s=0.3, allocates="last") as orders:
            first = asyncio.create_task(send(orders, content))
            await orders.wait_for(1, "arrived")
            status, body = await send(orders, content)
            assert status == 502
            assert msgspec.json.decode(body)["order_id"] == content["order_id"]
            assert (await first)[0] == 200
            order = booked(orders, content)
            assert (order.state, len(order.tickets), len(order.lost)) == ("FAILED", 1, 1)
            assert [request.effect for request in orders.requests] == ["issued", "unseated"]
            assert repeated_early(orders.requests) == [
                f"order {content['order_id']}: request 1 came before its time"
            ]

    async def test_repeated_while_it_answers_late_the_order_has_a_seat_for_sale(self) -> None:
        content = event()
        async with selling(takes_s=0.3, allocates="first") as orders:
            first = asyncio.create_task(send(orders, content))
            await orders.wait_for(1, "arrived")
            began = time.monotonic()
            assert (await send(orders, content))[0] == 502
            assert orders.requests[1].done - began < 0.3
            assert (await first)[0] == 200
            order = booked(orders, content)
            assert (order.state, len(order.tickets), len(order.lost)) == ("CONFIRMED", 1, 1)

    async def test_repeated_afterwards_nothing_happens(self) -> None:
        content = event()
        async with selling() as orders:
            await send(orders, content)
            assert await send(orders, content) == (200, DECIDED)
            assert booked(orders, content).lost == ()
            assert repeated_early(orders.requests) == []

    async def test_refused_allocations_fail_their_orders_and_no_others(self) -> None:
        contents = [event() for _ in range(3)]
        async with selling(refuses=2) as orders:
            assert [(await send(orders, each))[0] for each in contents] == [502, 502, 200]
            states = [booked(orders, each).state for each in contents]
            assert states == ["FAILED", "FAILED", "CONFIRMED"]
            assert await send(orders, contents[0]) == (200, DECIDED)

    @pytest.mark.parametrize("outcome", ["FAILED", "REFUNDED"])
    async def test_failed_and_refunded_undo_a_confirmed_order(self, outcome: str) -> None:
        content = event()
        async with selling() as orders:
            told = content | {"status": outcome}
            _, undone, after = await post(orders, content, told, told)
            assert (undone.effect, after.effect) == ("broken", "ignored")
            order = booked(orders, content)
            assert (order.state, len(order.lost)) == ("FAILED", 1)
            assert await send(orders, content) == (200, DECIDED)


class TestHolds:
    def buy(self, orders: OrderService, seat: str, url: str = "http://127.0.0.1:1") -> str | None:
        """The order's id; None if the seat is not for sale."""
        order_id = str(uuid4())
        return order_id if orders.sell(Purchase(url, order_id, order_id, (seat,))) else None

    @pytest.mark.parametrize("outcome", ["FAILED", "SUCCESS"])
    async def test_what_comes_after_the_hold_frees_the_next_buyers_seat(self, outcome: str) -> None:
        async with selling(hold_s=0.5) as orders:
            late = self.buy(orders, "A1")
            assert self.buy(orders, "A1") is None
            await until(lambda: orders.bookings.seats.lost("", ["A1"]) and self.buy(orders, "A1"))
            next_buyer = list(orders.book)[-1]
            assert late != next_buyer
            await post(orders, event(order_id=next_buyer))
            assert orders.book[next_buyer].lost == ()
            (request,) = await post(orders, event(outcome, order_id=late))
            assert request.effect == ("unseated" if outcome == "SUCCESS" else "failed")
            assert orders.book[next_buyer].state == "CONFIRMED"
            assert orders.book[next_buyer].lost == ("A1",)

    async def test_a_seat_that_is_allocated_is_held_for_good(self) -> None:
        async with selling(hold_s=0.0) as orders:
            await post(orders, event(order_id=self.buy(orders, "A1")))
            assert self.buy(orders, "A1") is None

    async def test_seats_are_sold_as_it_is_told(self) -> None:
        async with selling() as orders:
            self.buy(orders, "A1")
            orders.seat(Seating(hold_s=0.0))
            self.buy(orders, "A2")
            assert (self.buy(orders, "A1"), self.buy(orders, "A2") is None) == (None, False)


def response(status: int, told: dict[str, Any]) -> bytes:
    body = msgspec.json.encode(told)
    return b"HTTP/1.1 %d Any\r\nContent-Length: %d\r\n\r\n%b" % (status, len(body), body)


PAYMENT = {"id": "0edc8f11-3cc9-463e-aa49-c689ddf4184b"}


class TestCharges:
    @pytest.mark.parametrize(
        ("answer", "charge", "state"),
        [
            (response(201, PAYMENT | {"status": "SUCCESS"}), "SUCCESS", "PENDING"),
            (response(202, PAYMENT | {"status": "PENDING"}), "PENDING", "PENDING"),
            (response(201, PAYMENT | {"status": "FAILED"}), "FAILED", "FAILED"),
            (response(503, {}), "503", "FAILED"),
            (None, "none", "PENDING"),
        ],
    )
    async def test_each_response(self, answer: bytes | None, charge: str, state: str) -> None:
        async with serving(answer) as payments, selling(charge_timeout_s=0.5) as orders:
            assert orders.sell(Purchase(payments.url, "an order", "a key", ("A1", "A2")))
            await until(lambda: not orders.sales.under_way)
            order = orders.book["an order"]
            assert (order.charges, order.state) == ([charge], state)
            assert order.payments == ([PAYMENT["id"]] if answer and charge != "503" else [])
            (request,) = payments.requests
            assert b"Idempotency-Key: a key\r\n" in request
            assert msgspec.json.decode(request.partition(b"\r\n\r\n")[2]) == {
                "merchant_order_id": "an order",
                "amount_cents": 1500,
            }

    @pytest.mark.parametrize("unanswered", ["PENDING", "FAILED"])
    async def test_without_a_response_in_time_the_callback_decides_unless_it_failed(
        self, unanswered: str
    ) -> None:
        order_id = str(uuid4())
        options = {"charge_timeout_s": 0.1, "unanswered": unanswered}
        async with serving(None) as payments, selling(**options) as orders:
            orders.sell(Purchase(payments.url, order_id, "a key", ("A1",)))
            await until(lambda: not orders.sales.under_way)
            assert orders.book[order_id].state == unanswered
            await post(orders, event(order_id=order_id))
            order = orders.book[order_id]
            assert order.state == ("CONFIRMED" if unanswered == "PENDING" else "FAILED")
            assert len(order.tickets) == (unanswered == "PENDING")

    async def test_a_connection_that_is_refused_is_no_response(self) -> None:
        async with selling() as orders:
            orders.sell(Purchase("http://127.0.0.1:1", "an order", "a key", ("A1",)))
            await until(lambda: orders.book["an order"].charges == ["none"])

    async def test_the_refund_of_its_payment_ends_an_order_and_of_another_does_not(self) -> None:
        content = event()
        order_id, payment_id = content["order_id"], content["payment_id"]
        async with (
            serving(response(201, {"status": "REFUNDED"})) as payments,
            selling() as orders,
        ):
            await post(orders, content)
            await orders.sales.refund(payments.url, order_id, "another payment")
            assert orders.book[order_id].state == "CONFIRMED"
            assert await orders.sales.refund(payments.url, order_id, payment_id) == "REFUNDED"
            order = orders.book[order_id]
            assert (order.state, len(order.lost)) == ("REFUNDED", 1)
            (request,) = await post(orders, content | {"status": "REFUNDED", "sequence": 4})
            assert (request.effect, orders.orders[order_id]) == ("ignored", "REFUNDED")


class TestLookups:
    async def test_an_order_is_shown_and_is_no_request(self) -> None:
        content = event()
        lookup = message(b"", method="GET", path=ORDERS_PATH + content["order_id"].upper())
        async with selling() as orders, Client(orders.url) as client:
            assert (await client.post(lookup)).status == 404
            await client.post(message(content))
            status, _, body = await client.post(lookup)
            assert (status, msgspec.json.decode(body)) == (
                200,
                {
                    "order_id": content["order_id"],
                    "status": "CONFIRMED",
                    "seats": [content["order_id"]],
                    "tickets": [content["payment_id"]],
                },
            )
            assert orders.lookups == [content["order_id"]] * 2
            assert orders.counts["arrived"] == len(orders.requests) == 1

    async def test_without_seats_as_well(self, client: Client, orders: OrderService) -> None:
        content = event("FAILED")
        await client.post(message(content))
        path = ORDERS_PATH + content["order_id"]
        _, _, body = await client.post(message(b"", method="GET", path=path))
        assert msgspec.json.decode(body) == {"order_id": content["order_id"], "status": "FAILED"}


class TestProcess:
    async def test_it_sells_as_within_a_loop(self) -> None:
        content = event()
        order_id = content["order_id"]
        answer = response(201, PAYMENT | {"status": "SUCCESS"})
        with OrderServiceProcess(Options(seating=Seating(refuses=1))) as orders:
            orders.seat(Seating(hold_s=60))
            async with serving(answer) as payments, Client(orders.url) as client:
                assert orders.sell(Purchase(payments.url, order_id, "a key", ("A1",)))
                assert not orders.sell(Purchase(payments.url, "another", "its key", ("A1",)))
                await until(lambda: not orders.selling)
                await client.post(message(content))
                path = ORDERS_PATH + order_id
                await client.post(message(b"", method="GET", path=path))
            assert orders.book == {
                order_id: Booking(
                    order_id,
                    ("A1",),
                    "CONFIRMED",
                    [content["payment_id"]],
                    ["SUCCESS"],
                    [PAYMENT["id"]],
                )
            }
            assert orders.orders == {order_id: "CONFIRMED"}
            assert orders.lookups == [order_id]
            assert orders.orders_url.format(order_id=7).endswith(f":{orders.port}/v1/orders/7")

    def test_seats_are_not_remembered(self, tmp_path: Any) -> None:
        with pytest.raises(ValueError, match="not remembered"):
            OrderService(Options(seating=Seating(), log=tmp_path / "requests.jsonl"))
