"""The access log: what a line says, what may be left out, and what never is."""

import asyncio
import json
import uuid
from collections.abc import AsyncIterator, Callable, Iterator
from contextvars import Context
from typing import Any

import httpx
import msgspec
import pytest
from loguru import logger

from payments.service import Service
from tests.support import until
from web.app import application, guarded
from web.serving import access_log
from web.serving.access_log import AccessLog, Tally

pytestmark = pytest.mark.anyio

TRACE = "4bf92f3577b34da6a3ce929d0e0e4736"
TRACEPARENT = f"00-{TRACE}-00f067aa0ba902b7-01"
ORDER = "f50d9fa2-5d3e-4e49-9a02-218ad32ef4a9"


@pytest.fixture
def lines(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[dict[str, Any]]]:
    """What is logged, as records: level, message and fields."""
    found: list[dict[str, Any]] = []

    def take(message: Any) -> None:
        record = message.record
        found.append(
            {"level": record["level"].name, "message": record["message"]} | record["extra"]
        )

    monkeypatch.setattr("payments.observability.logs._json_stderr", None)
    number = logger.add(take, level="DEBUG", format="{message}")
    yield found
    logger.remove(number)


def charge(client: httpx.AsyncClient, **headers: str) -> Any:
    body = {"merchant_order_id": ORDER, "amount_cents": 1500}
    headers = {"Idempotency-Key": uuid.uuid4().hex} | headers
    return client.post("/v1/charge", json=body, headers=headers)


def of(lines: list[dict[str, Any]], message: str) -> list[dict[str, Any]]:
    return [line for line in lines if line["message"] == message]


class TestLines:
    async def test_a_charge(self, client: httpx.AsyncClient, lines: list[dict[str, Any]]) -> None:
        answer = await charge(client, **{"X-Request-ID": "r-1", "traceparent": TRACEPARENT})
        (line,) = of(lines, "POST /v1/charge 201")
        assert 0 < line.pop("duration_ms") < 5000
        assert line == {
            "level": "INFO",
            "message": "POST /v1/charge 201",
            "request_id": "r-1",
            "trace_id": TRACE,
            "method": "POST",
            "route": "/v1/charge",
            "status": 201,
            "client": "default",
            "payment_id": uuid.UUID(answer.json()["id"]),
            "order_id": ORDER,
        }

    async def test_money_has_a_line_of_its_own(
        self, client: httpx.AsyncClient, lines: list[dict[str, Any]]
    ) -> None:
        answer = await charge(client, **{"X-Request-ID": "r-1", "traceparent": TRACEPARENT})
        payment_id = answer.json()["id"]
        (line,) = of(lines, "PaymentCharged")
        events = (await client.get(f"/v1/payments/{payment_id}/events")).json()["events"]
        assert line == {
            "level": "INFO",
            "message": "PaymentCharged",
            "request_id": "r-1",
            "trace_id": TRACE,
            "payment_id": uuid.UUID(payment_id),
            "order_id": uuid.UUID(ORDER),
            "event_id": uuid.UUID(events[1]["data"]["event_id"]),
            "amount_cents": 1500,
            "currency": "INR",
        }
        body = {"payment_id": payment_id, "amount_cents": 500}
        await client.post("/v1/refund", json=body, headers={"Idempotency-Key": "part"})
        (line,) = of(lines, "PaymentRefunded")
        assert (line["amount_cents"], line["payment_id"]) == (500, uuid.UUID(payment_id))

    async def test_a_repetition_moves_no_money(
        self, client: httpx.AsyncClient, lines: list[dict[str, Any]]
    ) -> None:
        for _ in range(3):
            await charge(client, **{"Idempotency-Key": "once"})
        assert len(of(lines, "PaymentCharged")) == 1
        assert len(of(lines, "POST /v1/charge 201")) == 3

    async def test_a_request_without_a_trace_has_none(
        self, client: httpx.AsyncClient, lines: list[dict[str, Any]]
    ) -> None:
        await charge(client)
        assert "trace_id" not in of(lines, "PaymentCharged")[0]

    @pytest.mark.parametrize(
        "header",
        [
            "00-00000000000000000000000000000000-00f067aa0ba902b7-01",
            f"00-{TRACE}-0000000000000000-01",
            f"ff-{TRACE}-00f067aa0ba902b7-01",
            f"00-{TRACE.upper()}-00f067aa0ba902b7-01",
            "x\ty",
            f"00-{TRACE}-00f067aa0ba902b7-01-00",
        ],
    )
    async def test_an_invalid_traceparent_is_none(
        self, client: httpx.AsyncClient, lines: list[dict[str, Any]], header: str
    ) -> None:
        answer = await charge(client, traceparent=header)
        assert "trace_id" not in of(lines, "PaymentCharged")[0]
        events = await client.get(f"/v1/payments/{answer.json()['id']}/events")
        assert events.json()["events"][0]["data"]["traceparent"] is None

    async def test_a_problem_is_named(
        self, client: httpx.AsyncClient, lines: list[dict[str, Any]]
    ) -> None:
        await client.post("/v1/charge", json={})
        await client.get(f"/v1/payments/{uuid.uuid4()}")
        await client.get("/nowhere/secret?key=secret")
        await client.post("/v1/charge", content=b"x" * 20_000)
        answers = [line for line in lines if "route" in line]  # not what the pool has to say
        assert [(line["route"], line["status"], line["problem"]) for line in answers] == [
            ("/v1/charge", 400, "invalid_idempotency_key"),
            ("/v1/payments/{payment_id}", 404, "payment_not_found"),
            ("unmatched", 404, "not_found"),
            ("unmatched", 413, "body_too_large"),
        ]
        assert "secret" not in json.dumps(lines, default=str)

    async def test_probes_are_debug(
        self, client: httpx.AsyncClient, lines: list[dict[str, Any]]
    ) -> None:
        for path in ("/health", "/health/live", "/metrics"):
            await client.get(path)
        assert {line["level"] for line in lines if "route" in line} == {"DEBUG"}

    async def test_hostile_text_is_only_a_value(
        self, client: httpx.AsyncClient, lines: list[dict[str, Any]]
    ) -> None:
        text = '{x}"}\\n{"level":"CRITICAL"}'
        await client.request("GET", f"/v1/payments/{text}", headers={"X-Request-ID": text})
        await client.request("BREW<red>", "/v1/charge")
        assert [line["message"] for line in lines if "route" in line] == [
            "GET /v1/payments/{payment_id} 400",
            "other unmatched 405",
        ]
        assert all(text not in str(line) for line in lines)


class TestThinning:
    @pytest.fixture
    async def client(self, service: Service) -> AsyncIterator[httpx.AsyncClient]:
        service.settings = msgspec.structs.replace(service.settings, access_log_per_s=0)
        transport = httpx.ASGITransport(guarded(application(service), service))  # type: ignore[arg-type]
        async with httpx.AsyncClient(transport=transport, base_url="http://payments") as opened:
            yield opened

    async def test_money_and_refusals_are_never_left_out(
        self,
        client: httpx.AsyncClient,
        lines: list[dict[str, Any]],
        monkeypatch: pytest.MonkeyPatch,
    ) -> None:
        monkeypatch.setattr(access_log, "TALLY_S", 0.2)
        for _ in range(5):
            assert (await charge(client)).status_code == 201
            await client.post("/v1/charge", json={})
        assert len(of(lines, "PaymentCharged")) == 5
        assert len(of(lines, "POST /v1/charge 400")) == 5
        assert not of(lines, "POST /v1/charge 201")

        def told() -> list[dict[str, Any]]:
            return of(lines, "requests left out of the access log")

        await until(lambda: sum(line["requests"] for line in told()) >= 5)
        assert {"level", "message", "requests"} == set().union(*told())
        assert sum(line["requests"] for line in told()) == 5

    @pytest.mark.parametrize(
        ("status", "level"), [(200, None), (400, "INFO"), (500, "ERROR"), (503, "WARNING")]
    )
    async def test_what_fails_is_written_whatever_the_rate(
        self, lines: list[dict[str, Any]], status: int, level: str | None
    ) -> None:
        AccessLog(0).write("GET", "/v1/payments", status, 0.01, {})
        assert [line["level"] for line in lines] == ([level] if level else [])

    async def test_so_many_in_a_second(
        self, lines: list[dict[str, Any]], monkeypatch: pytest.MonkeyPatch
    ) -> None:
        log = AccessLog(3)
        clock = FakeClock(monkeypatch)
        for second, requests in ((10.0, 5), (11.0, 2), (12.5, 4)):
            clock.now = second
            for _ in range(requests):
                log.write("GET", "/v1/payments", 200, 0.01, {})
        assert len(lines) == 3 + 2 + 3
        clock.tell()
        assert lines[-1]["requests"] == 2 + 1

    async def test_a_tally_begins_anew(
        self, lines: list[dict[str, Any]], monkeypatch: pytest.MonkeyPatch
    ) -> None:
        clock = FakeClock(monkeypatch)
        tally = Tally("WARNING", "refused")
        for requests in (3, 1):
            for _ in range(requests):
                tally.add()
            clock.tell()
        assert [(line["level"], line["requests"]) for line in lines] == [
            ("WARNING", 3),
            ("WARNING", 1),
        ]
        assert not clock.timers


class FakeClock:
    """A loop's clock and timers, in the hands of a test."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.now = 0.0
        self.timers: list[Callable[[], None]] = []
        monkeypatch.setattr(asyncio, "get_running_loop", lambda: self)

    def time(self) -> float:
        return self.now

    def call_later(self, _: float, callback: Callable[[], None], *, context: Context) -> None:
        self.timers.append(callback)

    def tell(self) -> None:
        timers, self.timers = self.timers, []
        for timer in timers:
            timer()
