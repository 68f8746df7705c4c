"""Each fault of Order Service as it looks to a client."""

import asyncio
import json
import subprocess
import sys
import time
import zlib
from typing import get_args
from uuid import UUID

import httpx
import msgspec
import pytest

from tests.doubles.controlled import ROOT
from tests.doubles.order_client import Client, event, message, post
from tests.doubles.order_faults import BOMB_MB, DONE, FILLER, FaultKind
from tests.doubles.order_requests import CALLBACK_PATH, ORDERS_PATH
from tests.doubles.order_service import Fault, OrderService

pytestmark = pytest.mark.anyio


@pytest.mark.parametrize("kind", [kind for kind in get_args(FaultKind) if kind != "refused"])
async def test_each_does_or_leaves_what_it_says(
    client: Client, orders: OrderService, kind: FaultKind
) -> None:
    """And is over when its client has left, and met once."""
    content = event()
    orders.script(Fault(kind, seconds=0.01))
    client.writer.write(message(content))
    await orders.wait_for(1, "arrived")
    if kind in DONE:
        while orders.orders != {content["order_id"]: "CONFIRMED"}:
            await asyncio.sleep(0.001)
    client.writer.close()
    await orders.wait_for(1)
    (request,) = orders.requests
    assert (request.fault, request.effect) == (kind, "issued" if kind in DONE else None)
    assert not request.accepted or kind in DONE
    (again,) = await post(orders, event())
    assert (again.fault, again.accepted) == (None, True)


async def test_refused(client: Client, orders: OrderService) -> None:
    orders.script(Fault("refused"))
    assert await client.reader.read() == b""
    with pytest.raises(ConnectionRefusedError):
        await post(orders, event())
    await orders.listen()
    assert len(await post(orders, event())) == 1


async def test_refused_while_a_request_is_under_way(client: Client, orders: OrderService) -> None:
    orders.script(Fault("slow", seconds=0.1))
    client.writer.write(message(event()))
    await orders.wait_for(1, "arrived")
    orders.refuse()
    assert (await client.answer()).status == 200
    assert await client.reader.read() == b""


async def test_idle_connections_are_closed(client: Client, orders: OrderService) -> None:
    await client.post(message(event()))
    orders.close_idle()
    assert await client.reader.read() == b""
    assert len(await post(orders, event())) == 1


async def test_reset(client: Client, orders: OrderService) -> None:
    orders.script(Fault("reset"))
    client.writer.write(message(event()))
    with pytest.raises(ConnectionResetError):
        await client.reader.read()


@pytest.mark.parametrize("kind", ["closed", "answer_lost"])
async def test_closed(client: Client, orders: OrderService, kind: FaultKind) -> None:
    orders.script(Fault(kind))
    client.writer.write(message(event()))
    assert await client.reader.read() == b""


async def test_late(client: Client, orders: OrderService) -> None:
    orders.script(Fault("slow", seconds=0.1))
    started = time.monotonic()
    assert (await client.post(message(event()))).status == 200
    assert time.monotonic() - started >= 0.1
    (request,) = orders.requests
    assert request.finished is not None
    assert request.done + 0.1 <= request.finished


async def test_never(client: Client, orders: OrderService) -> None:
    orders.script(Fault("hang"))
    client.writer.write(message(event()))
    with pytest.raises(TimeoutError):
        await asyncio.wait_for(client.reader.read(1), 0.1)


@pytest.mark.parametrize(
    ("kind", "status", "header"),
    [
        ("500", 500, None),
        ("502", 502, ("content-type", "application/json")),
        ("503", 503, ("retry-after", "7")),
        ("429", 429, ("retry-after", "7")),
        ("404", 404, ("content-type", "text/html")),
        ("410", 410, None),
        ("redirect", 307, ("location", "http://127.0.0.1/elsewhere")),
    ],
)
async def test_another_status(
    client: Client,
    orders: OrderService,
    kind: FaultKind,
    status: int,
    header: tuple[str, str] | None,
) -> None:
    orders.script(Fault(kind, retry_after="7", location="http://127.0.0.1/elsewhere"))
    answer = await client.post(message(event()))
    assert answer.status == status
    assert header is None or header in answer.headers.items()
    assert (orders.requests[0].status, orders.requests[0].accepted) == (status, False)
    assert (await client.post(message(event()))).status == 200


async def test_a_drip(client: Client, orders: OrderService) -> None:
    orders.script(Fault("drip", seconds=0.001))
    client.writer.write(message(event()))
    pieces = [await client.reader.read(1000) for _ in range(20)]
    assert max(map(len, pieces)) < 5
    assert b"".join(pieces).startswith(b"HTTP/1.1 200 OK")
    await orders.wait_for(1, "accepted")


async def test_a_drip_that_nobody_waits_for_is_not_accepted(
    client: Client, orders: OrderService
) -> None:
    orders.script(Fault("drip", seconds=0.01))
    client.writer.write(message(event()))
    await client.reader.read(1)
    client.writer.close()
    await orders.wait_for(1)
    assert (orders.requests[0].effect, orders.requests[0].accepted) == ("issued", False)


async def test_a_body_that_drips(client: Client, orders: OrderService) -> None:
    orders.script(Fault("drip_body", seconds=0.01))
    client.writer.write(message(event()))
    head = await client.reader.readuntil(b"\r\n\r\n")
    assert b"Content-Length: 1000\r\n" in head
    with pytest.raises(TimeoutError):
        await asyncio.wait_for(client.reader.readexactly(1000), 0.1)


async def test_a_bomb(client: Client, orders: OrderService) -> None:
    orders.script(Fault("bomb"))
    status, headers, body = await client.post(message(event()))
    assert (status, headers["content-encoding"]) == (200, "gzip")
    assert len(body) < 210_000
    unpacking = zlib.decompressobj(wbits=31)
    size = len(unpacking.decompress(body, 1 << 24))
    while unpacking.unconsumed_tail:
        size += len(unpacking.decompress(unpacking.unconsumed_tail, 1 << 24))
    assert size == BOMB_MB << 20
    assert unpacking.eof


@pytest.mark.parametrize(
    ("kind", "unit"),
    [
        ("endless", b"1000\r\n%b\r\n" % FILLER),
        ("continues", b"HTTP/1.1 100 Continue\r\n\r\n"),
        ("big_head", b"X-Filler: %b\r\n" % FILLER[:1000]),
    ],
)
async def test_without_end(
    client: Client, orders: OrderService, kind: FaultKind, unit: bytes
) -> None:
    orders.script(Fault(kind))
    client.writer.write(message(event()))
    flood = await client.reader.readexactly(300_000)
    assert flood.startswith(b"HTTP/1.1 %d" % (100 if kind == "continues" else 200))
    assert flood.count(unit) >= 300_000 // len(unit) - 1
    client.writer.close()
    await orders.wait_for(1)
    assert orders.requests[0].accepted == (kind == "endless")


async def test_garbage(client: Client, orders: OrderService) -> None:
    orders.script(Fault("garbage"))
    client.writer.write(message(event()))
    assert not (await client.reader.read()).startswith(b"HTTP")


async def test_faults_meet_their_order_and_only_so_often(orders: OrderService) -> None:
    content = event()
    orders.script(Fault("503", count=2, order_id=content["order_id"].upper()), Fault("404"))
    sent = await post(orders, event(), content, content, content, event())
    assert [request.status for request in sent] == [404, 503, 503, 200, 200]
    orders.script(Fault("500", count=None))
    assert {request.status for request in await post(orders, *[event()] * 5)} == {500}
    orders.script()
    assert (await post(orders, event()))[0].status == 200


async def test_a_share_repeats_with_its_seed(orders: OrderService) -> None:
    async def statuses(seed: int) -> list[int | None]:
        orders.script(Fault(("500", "503"), count=None, share=0.5, seed=seed))
        return [request.status for request in await post(orders, *[event()] * 40)]

    first = await statuses(7)
    assert set(first) == {200, 500, 503}
    assert 10 <= first.count(200) <= 30
    assert await statuses(7) == first
    assert await statuses(8) != first


async def test_an_error_of_the_application_is_about_its_order_and_a_proxys_is_a_page(
    client: Client, orders: OrderService
) -> None:
    content = event()
    orders.script(Fault("502"), Fault("502", proxy=True), Fault("503", proxy=True, retry_after="9"))
    told = json.loads((await client.post(message(content))).body)
    assert (told["statusCode"], told["order_id"]) == (502, content["order_id"])
    for status, retry_after in ((502, None), (503, "9")):
        answer = await client.post(message(content))
        assert (answer.status, answer.headers["content-type"]) == (status, "text/html")
        assert answer.headers.get("retry-after") == retry_after


async def test_a_dead_shard_has_the_orders_with_its_ids(orders: OrderService) -> None:
    orders.script(Fault("503", count=None, shards=3, shard=1))
    sent = await post(orders, *[event() for _ in range(60)])
    dead = [UUID(request.order_id).int % 3 == 1 for request in sent]
    assert {True, False} == set(dead)
    assert [request.status == 503 for request in sent] == dead
    assert [request.accepted for request in sent] == [not each for each in dead]


async def test_lookups_have_faults_of_their_own(client: Client, orders: OrderService) -> None:
    content = event()
    lookup = message(b"", method="GET", path=ORDERS_PATH + content["order_id"])
    orders.script(Fault("500", of="lookups"), Fault("hang", of="lookups"))
    assert (await client.post(message(content))).status == 200
    assert (await client.post(lookup)).status == 500
    client.writer.write(lookup)
    with pytest.raises(TimeoutError):
        await asyncio.wait_for(client.reader.read(1), 0.1)


def test_faults_may_be_given_on_the_command_line() -> None:
    fault = Fault("503", count=None, shards=2, shard=1)
    command = [sys.executable, "-m", "tests.doubles.order_service"]
    command += ["--fault", msgspec.json.encode(fault).decode()]
    with subprocess.Popen(
        command, cwd=ROOT, stdin=subprocess.PIPE, stdout=subprocess.PIPE
    ) as process:
        assert process.stdout is not None
        url = f"http://127.0.0.1:{int(process.stdout.readline())}{CALLBACK_PATH}"
        for number in range(2):
            content = event(order_id=str(UUID(int=number, version=4)))
            assert httpx.post(url, json=content).status_code == (503 if number else 200)
        process.terminate()


@pytest.mark.parametrize("fault", [Fault("refused", share=0.5), Fault(("refused", "500"))])
async def test_refused_stands_by_itself(orders: OrderService, fault: Fault) -> None:
    with pytest.raises(ValueError, match="by itself"):
        orders.script(fault)
