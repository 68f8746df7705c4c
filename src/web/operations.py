"""Endpoints for operators: health and metrics. Open to everyone, within bounds of their own."""

from typing import Annotated

import msgspec
from litestar import Response, get
from litestar.enums import MediaType

from payments.errors import DatabaseUnavailable
from payments.events.appender import INTENT_TIMEOUT_S
from payments.service import Service
from web.accept import preferred
from web.requests import AnyRequest
from web.schema.description import Answer, Operation, described
from web.serving import answers

HEALTH_AGE_S = 1.0  # those that are beyond its bound get what was found no longer ago, or nearly
METRICS_AGE_S = 1.0  # one rendering of each format in so many seconds, for whoever asks
STALLED_S = INTENT_TIMEOUT_S - 0.5  # just before waiting intents are given up


class Health(msgspec.Struct, frozen=True, kw_only=True):
    """`ok` is whether charges can be taken.

    `database` is ok, unavailable (for reading), or read_only: a standby, or one that refuses to
    write. `event_store` is ok or stalled: an append has waited longer than an intent would. `log`
    is rewound while it lacks events that it had acknowledged: charges go on, and nothing is given
    back until an operator has accepted that. `callbacks` is degraded while Order Service does not
    take them: charges go on, and they are sent again; it is off without ORDER_CALLBACK_URL. Both
    are null while the database is away.
    """

    ok: bool
    service: str
    database: Annotated[
        str, msgspec.Meta(extra_json_schema={"enum": ["ok", "unavailable", "read_only"]})
    ]
    event_store: Annotated[str, msgspec.Meta(extra_json_schema={"enum": ["ok", "stalled"]})]
    log: Annotated[str | None, msgspec.Meta(extra_json_schema={"enum": ["ok", "rewound", None]})]
    callbacks: Annotated[
        str | None, msgspec.Meta(extra_json_schema={"enum": ["ok", "degraded", "off", None]})
    ]


class Alive(msgspec.Struct, frozen=True):
    """Always the same; no answer at all is the other one."""

    ok: bool
    service: str


_HEALTHY = {
    "ok": True,
    "service": "payment-service",
    "database": "ok",
    "event_store": "ok",
    "log": "ok",
    "callbacks": "ok",
}
HEALTH = Operation(
    id="health",
    tag="operations",
    summary="Whether charges can be taken",
    description="For load balancers. Whoever asks too often gets what was found a second ago.",
    answers={
        200: Answer(description="They can.", body=Health, example=_HEALTHY),
        503: Answer(
            description="The database is away, or takes no events.",
            body=Health,
            example=_HEALTHY
            | {"ok": False, "database": "unavailable", "log": None, "callbacks": None},
        ),
    },
)
LIVE = Operation(
    id="live",
    tag="operations",
    summary="Whether the process answers at all",
    description="For restarts: it looks at nothing else, the database neither. Never refused.",
    answers={
        200: Answer(
            description="It does.", body=Alive, example={"ok": True, "service": "payment-service"}
        )
    },
)
METRICS = Operation(
    id="metrics",
    tag="operations",
    summary="Metrics",
    description="In the Prometheus text format; `docs/operations.md` says which to watch. With "
    "`Accept: application/openmetrics-text` as OpenMetrics; with `Accept: application/json` the "
    "load, memory, heap, uptime and time of the process alone. As of at most a second ago.",
    answers={
        200: Answer(
            description="All metrics.",
            body=None,
            example='payments_follower_lag_events{follower="payments"} 0.0\n',
            media_type="text/plain",
        )
    },
)


JSON = MediaType.JSON.value
TEXT, OPENMETRICS = "text/plain", "application/openmetrics-text"
ALIVE = answers.Answer(200, msgspec.json.encode(Alive(ok=True, service="payment-service")), JSON)


async def health_of(service: Service) -> answers.Answer:
    """Looked at now."""
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
    )
    return answers.Answer(200 if state.ok else 503, msgspec.json.encode(state), JSON)


@get("/health", media_type=MediaType.JSON, opt=described(HEALTH))
async def health(request: AnyRequest) -> Response[bytes]:
    """Whether the service can take charges: 200, or 503 while the database is away or read-only."""
    answer = await request.app.state.health()
    return _response(answer)


@get("/health/live", media_type=MediaType.JSON, opt=described(LIVE))
async def live() -> Response[bytes]:
    """Whether the process answers at all; for restarts, so it looks at nothing else."""
    return _response(ALIVE)


def _response(answer: answers.Answer) -> Response[bytes]:
    return Response(answer.body, status_code=answer.status, media_type=MediaType.JSON)


@get("/metrics", opt=described(METRICS))
async def metrics(request: AnyRequest) -> Response[bytes]:
    """All metrics, in the Prometheus text format, or as OpenMetrics if that is asked for; as JSON
    the five values of the process.

    Without a database those that only it knows are left out.
    """
    service: Service = request.app.state.service
    wanted = preferred(",".join(request.headers.getall("accept", [])), (TEXT, OPENMETRICS, JSON))
    if wanted == JSON:
        return Response(
            msgspec.json.encode(service.telemetry.documented()), media_type=MediaType.JSON
        )
    # As a header: for a text media type the framework would add a second charset.
    if wanted == OPENMETRICS:
        headers = {"Content-Type": service.telemetry.openmetrics_content_type}
        return Response(await service.health.openmetrics.recent(METRICS_AGE_S), headers=headers)
    headers = {"Content-Type": service.telemetry.content_type}
    return Response(await service.health.exposition.recent(METRICS_AGE_S), headers=headers)
