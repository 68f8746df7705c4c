"""The double itself: what the tests of callbacks rely on."""

import asyncio
import base64
import json
import ssl
import subprocess
import sys
import time
from pathlib import Path
from uuid import uuid4

import psutil
import pytest

from tests.doubles.controlled import ROOT
from tests.doubles.order_client import KEY, SECRET, Client, event, message, post, signed
from tests.doubles.order_faults import FaultKind
from tests.doubles.order_receiver import CERTIFICATE
from tests.doubles.order_requests import CALLBACK_PATH, findings
from tests.doubles.order_service import Fault, Options, OrderService, OrderServiceProcess

pytestmark = pytest.mark.anyio

OTHER_SECRET = "whsec_" + base64.b64encode(KEY[::-1]).decode()
CAREFUL = Options(naive=False)
VERSION_1 = "68597b24-eb01-11f1-adab-02fc00000001"
VERSION_4 = "9b2b996d-2725-450b-88ee-b6ba36bea168"


class TestOrders:
    @pytest.mark.parametrize(
        ("outcomes", "effects", "state"),
        [
            ("SUCCESS", "issued", "CONFIRMED"),
            ("FAILED", "failed", "FAILED"),
            ("SUCCESS SUCCESS", "issued repeated", "CONFIRMED"),
            ("FAILED SUCCESS", "failed swallowed", "FAILED"),
            ("SUCCESS FAILED", "issued broken", "FAILED"),
            ("SUCCESS REFUNDED SUCCESS", "issued broken swallowed", "FAILED"),
        ],
    )
    @pytest.mark.parametrize("naive", [True, False])
    async def test_an_order_is_confirmed_or_failed(
        self, naive: bool, outcomes: str, effects: str, state: str
    ) -> None:
        order_id = str(uuid4())
        events = [
            event(outcome, order_id=order_id, sequence=number)
            for number, outcome in enumerate(outcomes.split())
        ]
        async with OrderService(Options(naive=naive)) as orders:
            requests = await post(orders, *events)
            assert [request.effect for request in requests] == effects.split()
            assert [request.status for request in requests] == [200] * len(requests)
            assert orders.orders == {order_id: state}

    @pytest.mark.parametrize(("naive", "effects"), [(True, 2), (False, 1)])
    async def test_only_who_is_naive_issues_for_each_success_of_the_same_moment(
        self, naive: bool, effects: int
    ) -> None:
        first = event()
        second = event(order_id=first["order_id"])
        async with OrderService(Options(naive=naive)) as orders:
            await asyncio.gather(post(orders, first), post(orders, second))
            assert [request.effect for request in orders.requests].count("issued") == effects

    @pytest.mark.parametrize("name", ["order_id", "payment_id"])
    @pytest.mark.parametrize("value", [VERSION_1, VERSION_4.replace("-", ""), 4, None])
    async def test_ids_are_uuids_of_version_4(
        self, client: Client, orders: OrderService, name: str, value: object
    ) -> None:
        answer = await client.post(message(event() | {name: value}))
        assert (answer.status, name in answer.body.decode()) == (400, True)
        assert orders.requests[0].effect == "rejected"
        assert orders.orders == {}

    @pytest.mark.parametrize("body", [b"", b"[]", b"{", b'"\xff"', b"{}"])
    async def test_a_body_that_is_no_callback_is_rejected(
        self, client: Client, body: bytes
    ) -> None:
        assert (await client.post(message(body))).status == 400

    async def test_who_is_careful_does_an_event_once_and_ignores_older_ones(self) -> None:
        later = event(sequence=3)
        earlier = event("FAILED", order_id=later["order_id"], payment_id=later["payment_id"])
        async with OrderService(CAREFUL) as orders:
            requests = await post(orders, later, later, earlier)
            assert [request.effect for request in requests] == ["issued", "duplicate", "older"]
            assert [request.status for request in requests] == [200, 200, 200]

    async def test_who_is_careful_accepts_what_is_signed_with_any_secret(self) -> None:
        options = Options(naive=False, secrets=(OTHER_SECRET, SECRET))
        async with OrderService(options) as orders, Client(orders.url) as client:
            old = str(int(time.time()) - 600)
            for request, status in [
                (signed(event()), 200),
                (signed(event(), key=KEY[::-1]), 200),
                (signed(event(), key=KEY[1:]), 401),
                (signed(event(), {"webhook-timestamp": old}), 401),
                (signed(event(), {"webhook-signature": "v1"}), 401),
                (message(event()), 401),
            ]:
                assert (await client.post(request)).status == status
            assert orders.counts["accepted"] == 2

    async def test_another_route_is_not_found(self, client: Client, orders: OrderService) -> None:
        assert (await client.post(message(event(), path="/v1/payments"))).status == 404
        assert (await client.post(message(event(), method="PUT"))).status == 404
        assert orders.findings() == [
            "request 0: POST /v1/payments",
            f"request 1: PUT {CALLBACK_PATH}",
        ]


class TestRecords:
    async def test_a_request_is_recorded_as_it_came_and_went(
        self, client: Client, orders: OrderService
    ) -> None:
        before, content = time.monotonic(), event()
        await client.post(
            message(content, path=f"{CALLBACK_PATH}?a=b", headers={"X-One": "1", "x-one": "2"})
        )
        (request,) = orders.requests
        assert request.finished is not None
        assert before < request.arrived < request.done <= request.finished < time.monotonic()
        assert (request.method, request.path) == ("POST", f"{CALLBACK_PATH}?a=b")
        assert request.headers["x-one"] == "1, 2"
        assert (request.body, request.content) == (json.dumps(content).encode(), content)
        assert (request.status, request.accepted, request.effect) == (200, True, "issued")
        assert orders.findings() == []

    async def test_requests_share_a_connection_and_can_come_in_any_pieces(
        self, client: Client, orders: OrderService
    ) -> None:
        sent = message(event())
        for piece in (sent[:30], sent[30:-5], sent[-5:] + sent + message(event())):
            client.writer.write(piece)
            await asyncio.sleep(0.01)
        for _ in range(3):
            assert (await client.answer()).status == 200
        assert [request.connection for request in orders.requests] == [0, 0, 0]
        assert orders.connections == 1

    async def test_a_connection_has_one_request_under_way(
        self, client: Client, orders: OrderService
    ) -> None:
        orders.script(Fault("slow", seconds=0.1))
        client.writer.write(message(event()))
        await orders.wait_for(1, "arrived")
        client.writer.write(message(event(), {"connection": "close"}))
        assert [(await client.answer()).status for _ in range(2)] == [200, 200]
        assert await client.reader.read() == b""
        first, second = orders.requests
        assert first.finished is not None
        assert first.finished <= second.arrived

    async def test_who_waits_is_told(self, client: Client, orders: OrderService) -> None:
        orders.script(Fault("hang"))
        client.writer.write(message(event()))
        await orders.wait_for(1, "arrived")
        assert orders.counts == {"arrived": 1, "finished": 0, "accepted": 0}
        with pytest.raises(TimeoutError):
            await orders.wait_for(1, timeout_s=0.01)
        client.writer.close()
        await orders.wait_for(1)
        await asyncio.gather(orders.wait_for(1, "accepted"), post(orders, event()))


class TestFindings:
    async def test_tickets_issued_twice_and_two_under_way_at_once(
        self, orders: OrderService
    ) -> None:
        content = event()
        await asyncio.gather(post(orders, content), post(orders, content))
        assert orders.findings() == [
            f"order {content['order_id']}: tickets issued 2 times, by requests 0, 1",
            f"order {content['order_id']}: request 1 came while 0 was under way",
        ]

    async def test_a_confirmed_order_that_is_broken(self, orders: OrderService) -> None:
        content = event()
        orders.script(Fault("answer_lost"))
        async with Client(orders.url) as client:
            client.writer.write(message(content))
            assert await client.reader.read() == b""
        await post(orders, event("FAILED", order_id=content["order_id"]))
        assert orders.findings() == [
            f"order {content['order_id']}: it was confirmed, and request 1 (FAILED) broke it"
        ]

    async def test_failed_after_an_accepted_success(self) -> None:
        """Also if it changes nothing."""
        content = event(sequence=3)
        later = content | {"status": "FAILED", "sequence": 3}
        async with OrderService(CAREFUL) as orders:
            await post(orders, content, later)
            assert orders.findings() == [
                f"order {content['order_id']}: request 1 is FAILED after 0 (SUCCESS) was accepted"
            ]

    async def test_a_refund_of_a_confirmed_order_is_no_finding(self, orders: OrderService) -> None:
        content = event()
        await post(orders, content, content | {"status": "REFUNDED", "sequence": 4})
        assert orders.findings() == []

    async def test_a_failed_for_an_order_whose_money_went_back_is_no_finding(
        self, orders: OrderService
    ) -> None:
        first = event()
        second = event(order_id=first["order_id"])
        await post(orders, first, event("FAILED", order_id=first["order_id"]))
        assert len(findings(orders.requests)) == 2
        assert findings(orders.requests, {second["payment_id"]}) == findings(orders.requests)
        assert findings(orders.requests, {first["payment_id"]}) == []
        await post(orders, second, event("FAILED", order_id=first["order_id"]))
        assert findings(orders.requests, {first["payment_id"]}) == [
            f"order {first['order_id']}: request 3 is FAILED after 2 (SUCCESS) was accepted"
        ]

    @pytest.mark.parametrize("kind", ["hang", "slow"])
    @pytest.mark.parametrize("leaves", [True, False])
    async def test_a_request_is_under_way_until_its_client_leaves(
        self, client: Client, orders: OrderService, leaves: bool, kind: FaultKind
    ) -> None:
        content = event("FAILED")
        orders.script(Fault(kind, seconds=60))
        client.writer.write(message(content))
        await orders.wait_for(1, "arrived")
        if leaves:
            client.writer.close()
            await orders.wait_for(1)
        await post(orders, content)
        assert len(orders.findings()) == (not leaves)

    async def test_a_sequence_that_is_out_of_order(self, orders: OrderService) -> None:
        first = event(sequence=2)
        second = event("REFUNDED", **{n: first[n] for n in ("order_id", "payment_id")}, sequence=5)
        await post(orders, second, first, second)
        assert orders.findings() == [
            f"payment {first['payment_id']}: sequence 2 first came (request 1) after 5"
        ]
        orders.requests.clear()
        await post(orders, first, second, first)  # the last one is a repetition
        assert orders.findings() == []

    @pytest.mark.parametrize(
        ("changed", "finding"),
        [
            ({"content-type": "text/plain"}, "Content-Type is text/plain"),
            ({"content-type": None}, "Content-Type is None"),
            ({"accept-encoding": "gzip, deflate"}, "Accept-Encoding is gzip, deflate"),
            ({"accept-encoding": None}, "Accept-Encoding is None"),
            ({"cookie": "seen=1"}, "a cookie was sent"),
            ({"webhook-signature": None}, "the signature is missing"),
            ({"webhook-timestamp": "1700000000"}, "the signature is invalid"),
            ({}, None),
        ],
    )
    async def test_a_header_that_is_wrong(
        self, changed: dict[str, str | None], finding: str | None
    ) -> None:
        async with (
            OrderService(Options(secrets=(SECRET,))) as orders,
            Client(orders.url) as client,
        ):
            answer = await client.post(signed(event(), changed))
            assert answer.status == 200  # who is naive does not look
            assert "set-cookie" in answer.headers
            assert orders.findings() == ([f"request 0: {finding}"] if finding else [])

    async def test_a_webhook_id_that_is_not_the_event_id(self) -> None:
        async with (
            OrderService(Options(secrets=(SECRET,))) as orders,
            Client(orders.url) as client,
        ):
            content = event()
            await client.post(signed(content, message_id="msg_1"))
            assert orders.findings() == [
                f"request 0: webhook-id is msg_1, event_id is {content['event_id']}"
            ]


class TestTls:
    async def test_nobody_trusts_the_certificate(self, tmp_path: Path) -> None:
        async with OrderService(Options(tls=tmp_path)) as orders:
            assert orders.url.startswith("https://127.0.0.1:")
            with pytest.raises(ssl.SSLCertVerificationError):
                async with Client(orders.url, ssl.create_default_context()):
                    pass
            trusting = ssl.create_default_context(cafile=tmp_path / CERTIFICATE)
            async with Client(orders.url, trusting) as client:
                assert (await client.post(message(event()))).status == 200
                orders.script(Fault("reset"))
                client.writer.write(message(event()))
                with pytest.raises(ConnectionResetError):
                    await client.reader.read()


class TestProcess:
    async def test_it_remembers_after_a_kill(self, tmp_path: Path) -> None:
        content, other = event(), event("FAILED")
        with OrderServiceProcess(Options(log=tmp_path / "requests.jsonl")) as orders:
            async with Client(orders.url) as client:
                await client.post(message(content))
                orders.script(Fault("slow", seconds=60))
                client.writer.write(message(other))
                orders.wait_for(2, "arrived")
                url, states = orders.url, orders.orders
                orders.restart()
            assert (orders.url, orders.orders) == (url, states)
            assert orders.counts == {"arrived": 2, "finished": 2, "accepted": 1}
            async with Client(orders.url) as client:
                await client.post(message(content))
                await client.post(message(other))
            assert [request.effect for request in orders.requests] == [
                *("issued", "failed", "repeated", "failed"),
            ]
            assert orders.findings() == []

    async def test_it_remembers_in_which_order_things_were_done(self, tmp_path: Path) -> None:
        options = Options(issue_takes_s=0.05, log=tmp_path / "requests.jsonl")
        success = event()
        async with OrderService(options) as orders, Client(orders.url) as client:
            client.writer.write(message(success))
            await orders.wait_for(1, "arrived")
            await post(orders, event("FAILED", order_id=success["order_id"]))
            await orders.wait_for(2)
            states = orders.orders
            assert states == {success["order_id"]: "CONFIRMED"}
        assert OrderService(options).orders == states

    async def test_it_takes_the_same_orders_as_within_a_loop(self, tmp_path: Path) -> None:
        options = Options(naive=False, secrets=(SECRET,), issue_takes_s=0.1, tls=tmp_path)
        with OrderServiceProcess(options) as orders:
            trusting = ssl.create_default_context(cafile=tmp_path / CERTIFICATE)
            async with Client(orders.url, trusting) as client:
                assert (await client.post(message(event()))).status == 401
                assert (await client.post(signed(event()))).status == 200
                orders.wait_for(1, "accepted")
                with pytest.raises(TimeoutError, match=r"of 3 requests 2 are arrived"):
                    orders.wait_for(3, "arrived", 0.01)
                orders.script(Fault("503", retry_after="1"))
                assert (await client.post(signed(event()))).headers["retry-after"] == "1"
                orders.close_idle()
                assert await client.reader.read() == b""
                orders.refuse()
                with pytest.raises(ConnectionRefusedError):
                    await asyncio.open_connection("127.0.0.1", orders.port)
                orders.listen()
            assert orders.connections == 1
            assert orders.findings() == ["request 0: the signature is missing"]
            issued = orders.requests[1]
            assert issued.done - issued.arrived >= 0.1
            with pytest.raises(ValueError, match="by itself"):
                orders.script(Fault(("refused", "500")))

    async def test_it_can_be_a_sink(self) -> None:
        with OrderServiceProcess(Options(bare=True)) as orders:
            async with Client(orders.url) as client:
                sent = message(event())
                client.writer.write(sent + sent[:50])
                assert (await client.answer()).status == 200
                assert (await client.post(sent[50:])).status == 200
            assert orders.counts["arrived"] == 2
            assert orders.requests == []

    def test_it_ends_on_sigterm(self) -> None:
        assert OrderServiceProcess().start().stop() == 0

    def test_it_ends_with_its_parent(self) -> None:
        program = (
            "import time; from tests.doubles.order_service import OrderServiceProcess;"
            "started = OrderServiceProcess().start(); print(started.pid, flush=True);"
            "time.sleep(60)"
        )
        parent = subprocess.Popen(
            [sys.executable, "-c", program], cwd=ROOT, stdout=subprocess.PIPE, text=True
        )
        assert parent.stdout is not None
        child = psutil.Process(int(parent.stdout.readline()))
        parent.kill()
        parent.wait(timeout=10)
        parent.stdout.close()
        child.wait(timeout=10)
