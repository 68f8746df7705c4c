"""Traces: one from the caller's traceparent to the callback, and nothing of it unless wanted."""

import subprocess
import sys
from collections import Counter
from collections.abc import AsyncIterator, Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from threading import Thread
from typing import Any

import httpx
import pytest
from loguru import logger
from opentelemetry.proto.collector.trace.v1.trace_service_pb2 import ExportTraceServiceRequest
from opentelemetry.sdk.trace import ReadableSpan, TracerProvider
from opentelemetry.sdk.trace.export import SimpleSpanProcessor
from opentelemetry.sdk.trace.export.in_memory_span_exporter import InMemorySpanExporter

from payments.database.connections import DatabaseAddress
from payments.observability import tracing
from payments.service import Service
from tests.machine import within
from tests.process import ServiceProcess, at, free_port
from tests.support import eventually
from web.app import application, guarded

TRACE = "4bf92f3577b34da6a3ce929d0e0e4736"
CALLER = "00f067aa0ba902b7"
TRACEPARENT = f"00-{TRACE}-{CALLER}-01"
ENDPOINT = "OTEL_EXPORTER_OTLP_ENDPOINT"


class Listener:
    """Plays the collector (POST /v1/traces) and Order Service (POST anywhere else)."""

    def __init__(self) -> None:
        self.spans: list[Any] = []
        self.services: set[str] = set()
        self.callbacks: list[dict[str, str]] = []
        listener = self

        class Handler(BaseHTTPRequestHandler):
            def do_POST(self) -> None:
                body = self.rfile.read(int(self.headers["Content-Length"]))
                if self.path == "/v1/traces":
                    listener.take(body)
                else:
                    listener.callbacks.append(dict(self.headers.items()))
                self.send_response(200)
                self.send_header("Content-Length", "0")
                self.end_headers()

            def log_message(self, *_: object) -> None:
                pass

        self._server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.url = f"http://127.0.0.1:{self._server.server_port}"
        Thread(target=self._server.serve_forever, args=(0.02,), daemon=True).start()

    def take(self, body: bytes) -> None:
        for resource in ExportTraceServiceRequest.FromString(body).resource_spans:
            named = {each.key: each.value.string_value for each in resource.resource.attributes}
            self.services.add(named["service.name"])
            for scope in resource.scope_spans:
                self.spans += scope.spans

    def wait_for(self, callbacks: int) -> None:
        eventually(lambda: len(self.callbacks) >= callbacks)

    def close(self) -> None:
        self._server.shutdown()
        self._server.server_close()


@pytest.fixture
def listener() -> Iterator[Listener]:
    opened = Listener()
    yield opened
    opened.close()


def charge(service: ServiceProcess, key: str, **headers: str) -> httpx.Response:
    body = {"merchant_order_id": "f50d9fa2-5d3e-4e49-9a02-218ad32ef4a9", "amount_cents": 1500}
    headers = {"Idempotency-Key": key} | headers
    return httpx.post(f"{service.url}/v1/charge", json=body, headers=headers)


def test_one_trace_from_the_request_to_the_callback(
    tmp_path: Path, address: DatabaseAddress, listener: Listener
) -> None:
    settings = {
        **at(address),
        "ORDER_CALLBACK_URL": f"{listener.url}/callbacks",
        ENDPOINT: listener.url,
        "SIMULATED_LEDGER": "",
    }
    with ServiceProcess(tmp_path, **settings) as service:
        answer = charge(service, "traced", traceparent=TRACEPARENT)
        payment_id = answer.json()["id"]
        listener.wait_for(callbacks=1)
        events = httpx.get(f"{service.url}/v1/payments/{payment_id}/events").json()["events"]
        httpx.get(f"{service.url}/health")
        assert service.terminate() == 0  # and what waits is sent
    assert listener.services == {"payment-service"}
    of_trace = [each for each in listener.spans if each.trace_id.hex() == TRACE]
    names = Counter(each.name for each in of_trace)
    names.pop("project seals", None)  # within a second
    assert names == {
        "POST /v1/charge": 1,
        "charge": 1,
        "append": 2,
        "gateway charge": 1,
        "project payments": 2,
        "project callbacks": 2,
        "callback": 1,
    }
    by_name = {each.name: each for each in of_trace}
    request = by_name["POST /v1/charge"]
    assert request.parent_span_id.hex() == CALLER
    assert by_name["charge"].parent_span_id == request.span_id
    assert by_name["gateway charge"].parent_span_id == by_name["charge"].span_id
    assert by_name["append"].parent_span_id == by_name["charge"].span_id
    # These know the event alone.
    ours = f"00-{TRACE}-{request.span_id.hex()}-01"
    assert {event["data"]["traceparent"] for event in events} == {ours}
    for name in ("project payments", "project callbacks", "callback"):
        assert by_name[name].parent_span_id == request.span_id
    attributes = {each.key: each.value for each in request.attributes}
    assert attributes["http.response.status_code"].int_value == 201
    assert attributes["payment.id"].string_value == payment_id
    sent = listener.callbacks[0]["traceparent"]
    assert sent == f"00-{TRACE}-{by_name['callback'].span_id.hex()}-01"
    assert not [each for each in listener.spans if "health" in each.name or each.name == "HTTP"]


def test_without_traces_the_traceparent_goes_through(
    tmp_path: Path, address: DatabaseAddress, listener: Listener
) -> None:
    url = f"{listener.url}/callbacks"
    with ServiceProcess(tmp_path, **at(address), ORDER_CALLBACK_URL=url) as service:
        charge(service, "through", traceparent=TRACEPARENT)
        charge(service, "none")
        listener.wait_for(callbacks=2)
    found = {headers.get("traceparent") for headers in listener.callbacks}
    assert found == {TRACEPARENT, None}
    assert not listener.spans


def test_a_settled_payment_is_of_the_trace_that_began_it(
    tmp_path: Path, address: DatabaseAddress, listener: Listener
) -> None:
    settings = {
        **at(address),
        "ORDER_CALLBACK_URL": f"{listener.url}/callbacks",
        "CHARGE_DEADLINE_S": "0.5",
        "GATEWAY_TIMEOUT_S": "0.3",
    }
    lost = {"SIMULATED_FAULTS": "answer_lost*1"}
    with ServiceProcess(tmp_path, **settings, **lost) as service:
        assert charge(service, "lost", traceparent=TRACEPARENT).status_code == 202
        listener.wait_for(callbacks=1)
    assert listener.callbacks[0]["traceparent"] == TRACEPARENT


def test_a_collector_that_is_away_holds_nothing_up(
    tmp_path: Path, address: DatabaseAddress
) -> None:
    away = f"http://127.0.0.1:{free_port()}"
    with ServiceProcess(tmp_path, **at(address), **{ENDPOINT: away}) as service:
        assert charge(service, "k").status_code == 201
        with within(4):
            assert service.terminate() == 0


@pytest.fixture
def spans() -> Iterator[InMemorySpanExporter]:
    exporter = InMemorySpanExporter()
    provider = TracerProvider(shutdown_on_exit=False)
    provider.add_span_processor(SimpleSpanProcessor(exporter))
    tracing._use(provider)
    yield exporter
    tracing._use(None)


@pytest.fixture
async def client(service: Service) -> AsyncIterator[httpx.AsyncClient]:
    transport = httpx.ASGITransport(guarded(application(service), service))  # type: ignore[arg-type]
    async with httpx.AsyncClient(transport=transport, base_url="http://payments") as opened:
        yield opened


class TestSpans:
    @pytest.mark.anyio
    async def test_a_request_without_a_trace_begins_one(
        self, client: httpx.AsyncClient, spans: InMemorySpanExporter
    ) -> None:
        await client.get("/v1/payments")
        await client.get("/nowhere/canary7391?key=canary7391")
        await client.get("/metrics")
        first, second = finished(spans)
        assert (first.name, second.name) == ("GET /v1/payments", "GET unmatched")
        assert first.parent is None
        assert "canary7391" not in first.to_json() + second.to_json()

    @pytest.mark.anyio
    async def test_what_the_caller_does_not_sample_is_not(
        self, client: httpx.AsyncClient, spans: InMemorySpanExporter
    ) -> None:
        await client.get("/v1/payments", headers={"traceparent": f"00-{TRACE}-{CALLER}-00"})
        assert finished(spans) == []

    @pytest.mark.parametrize("flags", ["00", "02", "fe"])
    def test_nor_what_hangs_below_it(self, spans: InMemorySpanExporter, flags: str) -> None:
        given = f"00-{TRACE}-{CALLER}-{flags}"
        with tracing.span("callback", kind="client", parent=given):
            assert tracing.current_traceparent(given) == given  # goes on as it came
        tracing.spans_since("project payments", 0.1, [given])
        with tracing.span("POST", kind="server", parent=given):
            ours = tracing.current_traceparent(None)
            with tracing.span("charge") as opened:
                assert opened is None
                assert tracing.current_traceparent(None) == ours
        assert ours is not None
        assert ours.startswith(f"00-{TRACE}-")
        assert finished(spans) == []

    def test_a_failure_is_told_by_its_type_alone(self, spans: InMemorySpanExporter) -> None:
        with pytest.raises(ValueError), tracing.span("work"):
            raise ValueError("canary7391")
        (only,) = finished(spans)
        assert not only.status.is_ok
        assert only.status.description == "ValueError"
        assert "canary7391" not in only.to_json()

    def test_spans_of_a_batch(self, spans: InMemorySpanExporter) -> None:
        other = f"00-{'a' * 32}-{CALLER}-01"
        tracing.spans_since("project payments", 0.25, [TRACEPARENT, None, other])
        first, second = finished(spans)
        assert {first.context.trace_id, second.context.trace_id} == {
            int(TRACE, 16),
            int("a" * 32, 16),
        }
        assert first.end_time is not None
        assert first.start_time is not None
        assert first.end_time - first.start_time == 250_000_000

    @pytest.mark.parametrize("traceparent", ["", "x", "00-x-y-z", "00-11", TRACEPARENT[:-3]])
    def test_what_is_no_traceparent_begins_a_trace(
        self, spans: InMemorySpanExporter, traceparent: str
    ) -> None:
        with tracing.span("callback", parent=traceparent):
            pass
        tracing.spans_since("project payments", 0.1, [traceparent])
        assert [span.parent for span in finished(spans)] == [None, None]


def finished(spans: InMemorySpanExporter) -> list[ReadableSpan]:
    return list(spans.get_finished_spans())


class TestSettingUp:
    @pytest.mark.parametrize(
        "environ",
        [
            {},
            {"OTEL_SERVICE_NAME": "payments"},
            {"OTEL_TRACES_EXPORTER": "none", ENDPOINT: "http://127.0.0.1:1"},
            {"OTEL_SDK_DISABLED": "TRUE", ENDPOINT: "http://127.0.0.1:1"},
            {ENDPOINT: ""},
        ],
    )
    def test_nothing_is_traced_unasked(self, environ: dict[str, str]) -> None:
        with tracing.traces(environ), tracing.span("work") as opened:
            assert opened is None

    @pytest.mark.parametrize(
        "environ",
        [
            {ENDPOINT: "http://127.0.0.1:1"},
            {"OTEL_EXPORTER_OTLP_TRACES_ENDPOINT": "http://127.0.0.1:1"},
            {"OTEL_TRACES_EXPORTER": "console"},
        ],
    )
    def test_asked_for(self, environ: dict[str, str]) -> None:
        with tracing.traces(environ):  # without a span: nobody is there to take it
            assert tracing._provider is not None
        assert tracing._provider is None

    @pytest.mark.parametrize(
        ("environ", "told", "is_traced"),
        [
            ({"OTEL_TRACES_EXPORTER": "zipkin"}, "OTEL_TRACES_EXPORTER: only otlp", False),
            ({"OTEL_TRACES_EXPORTER": "zipkin,console"}, "OTEL_TRACES_EXPORTER: only otlp", True),
            (
                {ENDPOINT: "http://x", "OTEL_EXPORTER_OTLP_PROTOCOL": "grpc"},
                "OTEL_EXPORTER_OTLP_PROTOCOL: only http/protobuf is supported",
                False,
            ),
            (
                {
                    "OTEL_TRACES_EXPORTER": "otlp,console",
                    "OTEL_EXPORTER_OTLP_PROTOCOL": "http/protobuf",
                    "OTEL_EXPORTER_OTLP_TRACES_PROTOCOL": "grpc",
                },
                "OTEL_EXPORTER_OTLP_TRACES_PROTOCOL: only",
                True,
            ),
            (
                {"OTEL_TRACES_EXPORTER": "console", "OTEL_BSP_MAX_QUEUE_SIZE": "-1"},
                "tracing is off: an OTEL_* variable is invalid",
                False,
            ),
        ],
    )
    def test_what_it_cannot_do_is_a_warning(
        self,
        monkeypatch: pytest.MonkeyPatch,
        environ: dict[str, str],
        told: str,
        is_traced: bool,
    ) -> None:
        """Operators set these in every container."""
        for name, value in environ.items():
            monkeypatch.setenv(name, value)  # where the SDK reads them
        lines: list[str] = []
        sink = logger.add(lines.append, level="WARNING", format="{message}")
        with tracing.traces(environ):
            assert (tracing._provider is not None) is is_traced
        logger.remove(sink)
        (line,) = lines
        assert told in line

    def test_several_exporters(self) -> None:
        both = {"OTEL_TRACES_EXPORTER": "otlp, console", ENDPOINT: "http://127.0.0.1:1"}
        with tracing.traces(both):
            assert tracing._provider is not None
            assert len(tracing._provider._active_span_processor._span_processors) == 2

    def test_credentials_in_a_header_that_cannot_be_read_are_not_told(
        self, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
    ) -> None:
        """The SDK repeats it."""
        monkeypatch.setenv("OTEL_EXPORTER_OTLP_HEADERS", "Authorization: Bearer canary7391")
        with tracing.traces({ENDPOINT: "http://127.0.0.1:1"}):
            pass
        assert "Header format invalid" in caplog.text
        assert "canary7391" not in caplog.text

    def test_without_the_extra_it_is_a_warning(self) -> None:
        program = (
            "import sys; sys.modules['opentelemetry'] = None\n"
            "from payments.observability import tracing\n"
            f"with tracing.traces({{{ENDPOINT!r}: 'http://127.0.0.1:1'}}):\n"
            "    with tracing.span('work') as opened: assert opened is None\n"
            "import web.serving.server, payments.cli\n"
        )
        done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True)
        assert done.returncode == 0, done.stderr
        assert "pip install payment-service[otel]" in done.stderr
