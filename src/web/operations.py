"""Endpoints for operators: health and metrics. Open to everyone, and never refused for load."""

from contextlib import suppress
from typing import Any

import msgspec
from litestar import Request, Response, get
from litestar.datastructures import State
from litestar.enums import MediaType

from payments.errors import DatabaseUnavailable
from payments.events.appender import INTENT_TIMEOUT_S
from payments.service import Service

HEALTH_TIMEOUT_S = 2.0  # probes often give up after 3 s
STALLED_S = INTENT_TIMEOUT_S - 0.5  # just before waiting intents are given up

Anyone = Request[Any, Any, State]


class Health(msgspec.Struct, frozen=True):
    """`ok` is whether charges can be taken.

    `database` is ok or unavailable (for reading); `event_store` is ok or stalled: an append has
    waited longer than an intent would.
    """

    ok: bool
    service: str
    database: str
    event_store: str


@get("/health", media_type=MediaType.JSON)
async def health(request: Anyone) -> Response[bytes]:
    """Whether the service can take charges: 200, or 503 while the database is away."""
    service: Service = request.app.state.service
    database = "ok"
    try:
        await service.operations_database.fetch("SELECT 1", timeout_s=HEALTH_TIMEOUT_S)
    except DatabaseUnavailable:
        database = "unavailable"
    stalled = service.appender.oldest_wait_s() >= STALLED_S
    state = Health(
        ok=database == "ok" and not stalled,
        service="payment-service",
        database=database,
        event_store="stalled" if stalled else "ok",
    )
    return Response(
        msgspec.json.encode(state),
        status_code=200 if state.ok else 503,
        media_type=MediaType.JSON,
    )


@get("/health/live", media_type=MediaType.JSON, sync_to_thread=False)
def live() -> dict[str, Any]:
    """Whether the process answers at all; for restarts, so it looks at nothing else."""
    return {"ok": True, "service": "payment-service"}


@get("/metrics")
async def metrics(request: Anyone) -> Response[bytes]:
    """All metrics, in the Prometheus text format.

    Without a database the gauges that only it knows keep their last values.
    """
    service: Service = request.app.state.service
    with suppress(DatabaseUnavailable):
        await service.observe()
    # As a header: for a text media type the framework would add a second charset.
    headers = {"Content-Type": service.telemetry.content_type}
    return Response(service.telemetry.exposition(), headers=headers)
