"""Traces by OpenTelemetry, if the extra `otel` is installed and OTEL_* variables enable them.

Otherwise every function here does nothing, and a request's traceparent is passed on unchanged: into
its events, and from there to the callback. With traces the event has the traceparent of our own
span, so that projection and callback, which know only the event, belong to the same trace.

A traceparent is the text of that header (W3C Trace Context, section 3.2).
"""

import logging
import threading
import time
from collections.abc import Iterable, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import TYPE_CHECKING, Any, Literal

from loguru import logger

if TYPE_CHECKING:
    from opentelemetry.sdk.trace import TracerProvider
    from opentelemetry.trace import Span, Tracer

Kind = Literal["internal", "server", "client"]

SHUTDOWN_S = 1.0  # for the last spans; an unavailable collector must not delay the exit

_EXPORTERS = {"otlp", "console"}
_PROTOCOL = "http/protobuf"

_tracer: "Tracer | None" = None
_provider: "TracerProvider | None" = None
_api: Any = None  # the module opentelemetry.trace, if it is installed
_NO_SPAN: AbstractContextManager[None] = nullcontext()


@contextmanager
def traces(environ: Mapping[str, str]) -> Iterator[None]:
    """Traces within the block, if OTEL_TRACES_EXPORTER or an endpoint for OTLP is set.

    The SDK reads the other OTEL_* variables itself. Operators of clusters set them in every
    container, so values that this service does not support only cause a warning. At the end the
    remaining spans are sent, within SHUTDOWN_S.
    """
    _begin(environ)
    try:
        yield
    finally:
        _end()


def _begin(environ: Mapping[str, str]) -> None:
    exporters = _exporters_named(environ)
    if not exporters:
        return
    try:
        provider = _build(exporters, environ)
    except ImportError:
        logger.warning("tracing is off: OTEL_* variables need pip install payment-service[otel]")
        return
    except Exception as error:  # noqa: BLE001 - each variable raises its own error type
        reason = f"{type(error).__name__}: {error}"
        logger.bind(reason=reason).warning("tracing is off: an OTEL_* variable is invalid")
        return
    _use(provider)
    logger.bind(exporter=",".join(exporters)).info("tracing is on")


def _exporters_named(environ: Mapping[str, str]) -> list[str]:
    """The supported exporters among those named, in alphabetical order."""
    if environ.get("OTEL_SDK_DISABLED", "").strip().lower() == "true":
        return []
    endpoints = ("OTEL_EXPORTER_OTLP_TRACES_ENDPOINT", "OTEL_EXPORTER_OTLP_ENDPOINT")
    default = "otlp" if any(environ.get(name) for name in endpoints) else "none"
    text = environ.get("OTEL_TRACES_EXPORTER", "").strip() or default
    named = {name.strip() for name in text.split(",")} - {"", "none"}
    if named - _EXPORTERS:
        logger.warning("OTEL_TRACES_EXPORTER: only otlp and console are supported")
    named &= _EXPORTERS
    protocols = ("OTEL_EXPORTER_OTLP_TRACES_PROTOCOL", "OTEL_EXPORTER_OTLP_PROTOCOL")
    given = [name for name in protocols if environ.get(name)][:1]  # the first is only for traces
    if "otlp" in named and given and environ[given[0]].strip() != _PROTOCOL:
        logger.warning(f"{given[0]}: only {_PROTOCOL} is supported, so no spans are sent")
        named -= {"otlp"}
    return sorted(named)


def _build(exporters: Iterable[str], environ: Mapping[str, str]) -> "TracerProvider":
    from opentelemetry.exporter.otlp.proto.http.trace_exporter import OTLPSpanExporter
    from opentelemetry.sdk.resources import Resource
    from opentelemetry.sdk.trace import TracerProvider
    from opentelemetry.sdk.trace.export import BatchSpanProcessor, ConsoleSpanExporter

    # It logs headers that it cannot parse, including credentials.
    logging.getLogger("opentelemetry.util.re").addFilter(_hide_values)
    named = "OTEL_SERVICE_NAME" in environ or "service.name=" in environ.get(
        "OTEL_RESOURCE_ATTRIBUTES", ""
    )
    resource = Resource.create({} if named else {"service.name": "payment-service"})
    provider = TracerProvider(resource=resource, shutdown_on_exit=False)
    for name in exporters:
        to = OTLPSpanExporter() if name == "otlp" else ConsoleSpanExporter()
        provider.add_span_processor(BatchSpanProcessor(to))
    return provider


def _hide_values(record: logging.LogRecord) -> bool:
    record.args = tuple("(hidden)" for _ in record.args or ())
    return True


def _use(provider: "TracerProvider | None") -> None:
    global _api, _provider, _tracer  # one per process, like the logs
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
    """The span of a block, a child of the current one or of a traceparent.

    Names in `attributes` have underscores for dots. An exception that leaves the block marks the
    span as failed, with the exception's type; its text may contain secrets.
    """
    if _tracer is None or _is_left_out(kind, parent):
        return _NO_SPAN
    return _span(_tracer, name, kind, parent, attributes)


def _is_left_out(kind: Kind, parent: str | None) -> bool:
    """Whether its trace is not sampled, so that child spans of a request are not needed."""
    if kind == "server":
        return False  # the sampler decides
    if parent is not None:
        return not _is_sampled(parent)
    above = _api.get_current_span()
    return above.get_span_context().is_valid and not above.is_recording()


def _is_sampled(traceparent: str) -> bool:
    """The lowest bit of the flags. An invalid traceparent begins a trace, which may be sampled."""
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
    """One child span of each traceparent, for shared work that has just ended.

    Without traces `parents` is not read.
    """
    if _tracer is None:
        return
    ended = time.time_ns()
    began = ended - int(seconds * 1e9)
    for parent in parents:
        if parent is not None and _is_sampled(parent):
            _tracer.start_span(name, _context_of(parent), start_time=began).end(ended)


def current_traceparent(default: str | None) -> str | None:
    """The traceparent of the current span; `default` without traces."""
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
    except ValueError:  # from an event of another version: begins a new trace
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
