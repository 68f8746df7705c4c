"""Traces by OpenTelemetry, if the extra `otel` is installed and OTEL_* variables ask for them.

Otherwise every function here does nothing, and a request's traceparent goes through the service as
it came: into the metadata of its events, and from there to the callback. With traces that is our
own span's, so that projection and callback, which know only the event, are of the same trace.

A traceparent is the text of that header (W3C Trace Context, section 3.2).
"""

import threading
import time
from collections.abc import Iterable, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import TYPE_CHECKING, Any, Literal

from loguru import logger

from payments.errors import StartError

if TYPE_CHECKING:
    from opentelemetry.sdk.trace import TracerProvider
    from opentelemetry.trace import Span, Tracer

Kind = Literal["internal", "server", "client"]

SHUTDOWN_S = 1.0  # for the last spans; a collector that is away must not hold up the end

_EXPORTERS = ("otlp", "console", "none")
_PROTOCOL = "http/protobuf"

_tracer: "Tracer | None" = None
_provider: "TracerProvider | None" = None
_api: Any = None  # the module opentelemetry.trace, which is not everywhere
_NO_SPAN: AbstractContextManager[None] = nullcontext()


@contextmanager
def traces(environ: Mapping[str, str]) -> Iterator[None]:
    """Traces meanwhile, if OTEL_TRACES_EXPORTER, or an endpoint for OTLP, asks for it.

    The SDK reads the other OTEL_* variables itself. Raises StartError for values that this service
    does not know. At the end the spans that wait are sent, for SHUTDOWN_S at most.
    """
    _begin(environ)
    try:
        yield
    finally:
        _end()


def _begin(environ: Mapping[str, str]) -> None:
    exporter = _exporter_named(environ)
    if exporter == "none":
        return
    try:
        provider = _build(exporter, environ)
    except ImportError:
        logger.warning("nothing is traced: OTEL_* variables need pip install payment-service[otel]")
        return
    _use(provider)
    logger.bind(exporter=exporter).info("requests are traced")


def _exporter_named(environ: Mapping[str, str]) -> str:
    if environ.get("OTEL_SDK_DISABLED", "").strip().lower() == "true":
        return "none"
    endpoints = ("OTEL_EXPORTER_OTLP_TRACES_ENDPOINT", "OTEL_EXPORTER_OTLP_ENDPOINT")
    default = "otlp" if any(environ.get(name) for name in endpoints) else "none"
    named = environ.get("OTEL_TRACES_EXPORTER", "").strip() or default
    if named not in _EXPORTERS:
        raise StartError(f"OTEL_TRACES_EXPORTER: {named!r} must be one of {', '.join(_EXPORTERS)}")
    if named == "otlp":
        for name in ("OTEL_EXPORTER_OTLP_TRACES_PROTOCOL", "OTEL_EXPORTER_OTLP_PROTOCOL"):
            if (protocol := environ.get(name) or _PROTOCOL) != _PROTOCOL:
                raise StartError(f"{name}: {protocol!r} must be {_PROTOCOL}")
    return named


def _build(exporter: str, environ: Mapping[str, str]) -> "TracerProvider":
    from opentelemetry.exporter.otlp.proto.http.trace_exporter import OTLPSpanExporter
    from opentelemetry.sdk.resources import Resource
    from opentelemetry.sdk.trace import TracerProvider
    from opentelemetry.sdk.trace.export import BatchSpanProcessor, ConsoleSpanExporter

    named = "OTEL_SERVICE_NAME" in environ or "service.name=" in environ.get(
        "OTEL_RESOURCE_ATTRIBUTES", ""
    )
    resource = Resource.create({} if named else {"service.name": "payment-service"})
    provider = TracerProvider(resource=resource, shutdown_on_exit=False)
    to = OTLPSpanExporter() if exporter == "otlp" else ConsoleSpanExporter()
    provider.add_span_processor(BatchSpanProcessor(to))
    return provider


def _use(provider: "TracerProvider | None") -> None:
    global _api, _provider, _tracer  # one per process, as the logs are
    if _api is None:
        from opentelemetry import trace

        _api = trace
    _provider = provider
    _tracer = provider.get_tracer("payments") if provider else None


def _end() -> None:
    if _provider is None:
        return
    sending = threading.Thread(target=_provider.shutdown, name="last spans", daemon=True)
    _use(None)
    sending.start()
    sending.join(SHUTDOWN_S)


def span(
    name: str,
    *,
    kind: Kind = "internal",
    parent: str | None = None,
    **attributes: Any,
) -> "AbstractContextManager[Span | None]":
    """The span of a block, below the present one or that of a traceparent.

    Names in `attributes` have underscores for dots. An exception that leaves the block marks it as
    failed, with the exception's type and not its text, in which there may be secrets.
    """
    if _tracer is None or _is_left_out(kind, parent):
        return _NO_SPAN
    return _span(_tracer, name, kind, parent, attributes)


def _is_left_out(kind: Kind, parent: str | None) -> bool:
    """Whether its trace is not kept: what is below a request then need not be made."""
    if kind == "server":
        return False  # the sampler decides
    if parent is not None:
        return not _is_sampled(parent)
    above = _api.get_current_span()
    return above.get_span_context().is_valid and not above.is_recording()


def _is_sampled(traceparent: str) -> bool:
    """The lowest bit of the last field. What is no traceparent begins a trace, and may be kept."""
    return not traceparent or traceparent[-1] not in "02468ace"


@contextmanager
def _span(
    tracer: "Tracer", name: str, kind: Kind, parent: str | None, attributes: dict[str, Any]
) -> "Iterator[Span]":
    with tracer.start_as_current_span(
        name,
        context=_context_of(parent) if parent else None,
        kind=_api.SpanKind[kind.upper()],
        attributes=_dotted(attributes),
        record_exception=False,
        set_status_on_exception=False,
    ) as opened:
        try:
            yield opened
        except BaseException as error:
            mark_failed(opened, type(error).__name__)
            raise


def mark_failed(opened: "Span", reason: str) -> None:
    opened.set_status(_api.Status(_api.StatusCode.ERROR, reason))


def spans_since(name: str, seconds: float, parents: Iterable[str | None]) -> None:
    """One span below each traceparent, for work on all of them that has just ended.

    `parents` is not even read without traces.
    """
    if _tracer is None:
        return
    ended = time.time_ns()
    began = ended - int(seconds * 1e9)
    for parent in parents:
        if parent is not None and _is_sampled(parent):
            _tracer.start_span(name, _context_of(parent), start_time=began).end(ended)


def current_traceparent(default: str | None) -> str | None:
    """The present span's; `default` without traces."""
    if _tracer is None:
        return default
    context = _api.get_current_span().get_span_context()
    if not context.is_valid:
        return default
    flags = int(context.trace_flags) & 0xFF
    return f"00-{context.trace_id:032x}-{context.span_id:016x}-{flags:02x}"


def _context_of(traceparent: str) -> Any:
    try:
        trace_id, span_id, flags = (int(part, 16) for part in traceparent.split("-")[1:4])
    except ValueError:  # in an event that another version wrote: a trace of its own
        return None
    context = _api.SpanContext(
        trace_id, span_id, is_remote=True, trace_flags=_api.TraceFlags(flags)
    )
    return _api.set_span_in_context(_api.NonRecordingSpan(context))


def _dotted(attributes: dict[str, Any]) -> dict[str, Any]:
    return {
        name.replace("_", "."): value if isinstance(value, int) else str(value)
        for name, value in attributes.items()
        if value is not None
    }
