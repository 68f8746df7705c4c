"""ORDER_STATUS_URL as badly answered as callbacks are: the status is not known, and why."""

import uuid
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

import pytest
from loguru import logger

from payments.errors import StartError
from payments.fulfilment.status import OrderStatus
from payments.order_service.endpoint import Endpoint
from payments.order_service.responses import Reading
from payments.order_service.target import Target, check_target
from payments.service import check_status_target
from payments.setting_values import parse_order_status_url
from payments.settings import Settings
from tests.callbacks.raw_server import serving
from tests.doubles.order_faults import FaultKind
from tests.doubles.order_seats import Seating
from tests.doubles.order_service import Fault, Options, OrderService

pytestmark = pytest.mark.anyio

ORDER = uuid.UUID("f50d9fa2-5d3e-4e49-9a02-218ad32ef4a9")
TOKEN = "canary-in-the-query"


@asynccontextmanager
async def asking(template: str, timeout_s: float = 5.0) -> AsyncIterator[OrderStatus]:
    target = Target(url=parse_order_status_url(template))
    status = OrderStatus(target, Endpoint(target, timeout_s=timeout_s))
    await status.open()
    try:
        yield status
    finally:
        await status.close()


def not_known(problem: str) -> Reading:
    return Reading(verdict="unknown", order_status=None, problem=problem)


async def test_an_order_as_order_service_shows_it() -> None:
    async with OrderService(Options(seating=Seating())) as orders:
        template = orders.url.replace("payments/callback", "orders/{order_id}")
        orders.bookings.place(str(ORDER), ["A1"])
        async with asking(template) as status:
            assert await status.ask(ORDER) == Reading(
                verdict="unknown", order_status="PENDING", problem=None
            )
            orders.bookings.fail(str(ORDER))
            assert await status.ask(ORDER) == Reading(
                verdict="failed", order_status="FAILED", problem=None
            )
            assert await status.ask(uuid.uuid4()) == not_known("404")
        assert orders.lookups[:2] == [str(ORDER)] * 2
        assert orders.requests == []


@pytest.mark.parametrize(
    ("kind", "problem"),
    [
        ("404", "404"),
        ("410", "410"),
        ("500", "500"),
        ("503", "503"),
        ("redirect", "307"),
        ("hang", "timeout"),
        ("drip", "timeout"),
        ("drip_body", "timeout"),
        ("continues", "no HTTP response"),
        ("big_head", "no HTTP response"),
        ("garbage", "no HTTP response"),
        ("endless", "no JSON object"),
        ("bomb", "no JSON object"),
        ("closed", "unreachable"),
        ("reset", "unreachable"),
        ("answer_lost", "unreachable"),
    ],
)
async def test_what_goes_wrong_is_not_known(kind: FaultKind, problem: str) -> None:
    async with OrderService(Options(seating=Seating())) as orders:
        template = orders.url.replace("payments/callback", "orders/{order_id}")
        orders.bookings.place(str(ORDER), ["A1"])
        orders.bookings.fail(str(ORDER))
        location = template.replace("{order_id}", str(ORDER))
        times = 2 if problem == "unreachable" else 1  # aiohttp repeats a GET at once
        orders.script(Fault(kind, times, of="lookups", seconds=0.2, location=location))
        slow = kind in ("hang", "drip", "drip_body")
        async with asking(template, timeout_s=0.5 if slow else 5.0) as status:
            assert await status.ask(ORDER) == not_known(problem)
            assert await status.ask(ORDER) == Reading(
                verdict="failed", order_status="FAILED", problem=None
            )


def response(body: bytes, content_type: bytes = b"application/json") -> bytes:
    head = b"HTTP/1.1 200 OK\r\nContent-Type: %b\r\nContent-Length: %d\r\n\r\n"
    return head % (content_type, len(body)) + body


LARGE = b'{"items":"%b","order_id":"%b","status":"FAILED"}' % (b"x" * 50_000, str(ORDER).encode())


@pytest.mark.parametrize(
    ("answer", "reading"),
    [
        (response(b'{"status":"FAILED"}', b"text/html"), not_known("not JSON")),
        (response(b"<html>FAILED</html>"), not_known("no JSON object")),
        (
            response(b'{"order_id":"%b","status":"FAILED"}' % str(uuid.UUID(int=1)).encode()),
            not_known("another order"),
        ),
        (
            response(LARGE),
            Reading(verdict="failed", order_status="FAILED", problem=None),
        ),  # longer than what callbacks keep
        (response(LARGE).replace(b"x", b"xxx"), not_known("no JSON object")),
        (b"HTTP/1.1 200 OK\r\nContent-Type: application/json\r\n\r\n", not_known("timeout")),
    ],
)
async def test_what_is_answered_with_200(answer: bytes, reading: Reading) -> None:
    async with serving(answer) as server, asking(f"{server.url}/{{order_id}}", 1.0) as status:
        assert await status.ask(ORDER) == reading


async def test_the_request() -> None:
    """It is not signed, and the order's id stands in the place that the setting says."""
    async with serving(response(b"{}")) as server:
        template = f"{server.url}/a%2Fb/../{{order_id}}?x=%2F&token={TOKEN}"
        async with asking(template) as status:
            await status.ask(ORDER)
            assert TOKEN not in repr(status._endpoint)
        head = server.requests[0].decode().lower()
    first, *lines = head.split("\r\n")
    assert first == f"get /a%2fb/../{ORDER}?x=%2f&token={TOKEN} http/1.1"
    names = {line.partition(":")[0] for line in lines if line}
    assert names == {"host", "user-agent", "accept-encoding", "accept"}


async def test_nobody_listens() -> None:
    async with serving(None) as server:
        template = f"{server.url}/{{order_id}}"
    async with asking(template) as status:
        assert await status.ask(ORDER) == not_known("unreachable")


async def test_plain_http_goes_to_near_addresses_only() -> None:
    async with asking("http://203.0.113.7/{order_id}") as status:
        assert await status.ask(ORDER) == not_known("forbidden address")


def of(template: str) -> Target:
    settings = Settings(order_status_url=parse_order_status_url(template))
    target = Target.of_order_status(settings)
    assert target is not None
    return target


async def test_a_url_that_can_never_work_refuses_the_start() -> None:
    with pytest.raises(StartError) as refused:
        await check_status_target(of(f"http://203.0.113.7/{TOKEN}/{{order_id}}"))
    assert str(refused.value).startswith("ORDER_STATUS_URL: http://203.0.113.7 has no loopback")
    assert TOKEN not in str(refused.value)
    lines: list[str] = []
    handler = logger.add(lines.append)
    await check_status_target(of(f"http://127.0.0.1/{TOKEN}/{{order_id}}"))
    logger.remove(handler)
    assert "order statuses are read from http://127.0.0.1" in lines[0]
    assert TOKEN not in lines[0]
    assert Target.of_order_status(Settings()) is None
    assert await check_target(of("http://orders.invalid/{order_id}")) == (
        "orders.invalid cannot be resolved yet: order status queries will wait until it can be"
    )
