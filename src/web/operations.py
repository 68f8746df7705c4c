"""Endpoints for operators: health and metrics. They need no API key and have their own limits."""

import msgspec
from litestar import Response, get
from litestar.enums import MediaType

from payments.errors import DatabaseUnavailable
from payments.events.appender import INTENT_TIMEOUT_S
from payments.service import Service
from web.accept import preferred
from web.requests import AnyRequest
from web.schema.description import described
from web.schema.operations.operators import HEALTH, LIVE, METRICS, Alive, Health
from web.serving import answers

HEALTH_AGE_S = 1.0  # requests beyond the limit of /health get a result of about this age
METRICS_AGE_S = 1.0  # each format is rendered once in this time, for all clients
STALLED_S = INTENT_TIMEOUT_S - 0.5  # just before waiting intents time out

JSON = MediaType.JSON.value
TEXT, OPENMETRICS = "text/plain", "application/openmetrics-text"
ALIVE = answers.PreparedAnswer(
    200, msgspec.json.encode(Alive(ok=True, service="payment-service")), JSON
)


async def health_of(service: Service) -> answers.PreparedAnswer:
    """The response of /health, checked now."""
    database, log, callbacks = "ok", None, None
    try:
        reached = await service.health.reach_database()
    except DatabaseUnavailable:
        database = "unavailable"
    else:
        database = "read_only" if reached.read_only else "ok"
        log = "rewound" if reached.rewound else "ok"
        callbacks = reached.callbacks
    stalled = service.appender.oldest_wait_s() >= STALLED_S
    state = Health(
        ok=database == "ok" and not stalled,
        service="payment-service",
        database=database,
        event_store="stalled" if stalled else "ok",
        log=log,
        callbacks=callbacks,
        gateways_down=service.gateways_down(),
    )
    return answers.PreparedAnswer(200 if state.ok else 503, msgspec.json.encode(state), JSON)


@get("/health", media_type=MediaType.JSON, opt=described(HEALTH))
async def health(request: AnyRequest) -> Response[bytes]:
    """Readiness: whether the service can process charges.

    200, or 503 while the database is away or read-only. A provider that is down makes no 503: the
    others, and everything that needs none, go on.
    """
    answer = await request.app.state.health()
    return _response(answer)


@get("/health/live", media_type=MediaType.JSON, opt=described(LIVE))
async def live() -> Response[bytes]:
    """Liveness: whether the process responds.

    For restarts, so it looks at nothing else.
    """
    return _response(ALIVE)


def _response(answer: answers.PreparedAnswer) -> Response[bytes]:
    return Response(answer.body, status_code=answer.status, media_type=MediaType.JSON)


@get("/metrics", opt=described(METRICS))
async def metrics(request: AnyRequest) -> Response[bytes]:
    """Metrics.

    In the Prometheus text format, or as OpenMetrics if that is asked for; as JSON the five values
    of the process. Without a database those that only it knows are left
    out.
    """
    service: Service = request.app.state.service
    wanted = preferred(",".join(request.headers.getall("accept", [])), (TEXT, OPENMETRICS, JSON))
    if wanted == JSON:
        return Response(
            msgspec.json.encode(service.telemetry.documented()), media_type=MediaType.JSON
        )
    # As a header: the framework would add a second charset to a text media type.
    if wanted == OPENMETRICS:
        headers = {"Content-Type": service.telemetry.openmetrics_content_type}
        return Response(await service.health.openmetrics.recent(METRICS_AGE_S), headers=headers)
    headers = {"Content-Type": service.telemetry.content_type}
    return Response(await service.health.exposition.recent(METRICS_AGE_S), headers=headers)
