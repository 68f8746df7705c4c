"""Endpoints for operators: health and metrics. Open to everyone, and never refused for load."""

from typing import Any

import msgspec
from litestar import Request, Response, get
from litestar.datastructures import State
from litestar.enums import MediaType

from payments.errors import DatabaseUnavailable
from payments.service import Service

Anyone = Request[Any, Any, State]


class Health(msgspec.Struct, frozen=True):
    """`database` is ok or unavailable; `ok` is whether charges can be taken."""

    ok: bool
    service: str
    database: str


@get("/health", media_type=MediaType.JSON)
async def health(request: Anyone) -> Response[bytes]:
    """Whether the service can take charges: 200, or 503 while the database is away."""
    service: Service = request.app.state.service
    try:
        await service.database.fetch("SELECT 1")
    except DatabaseUnavailable:
        state = Health(False, "payment-service", "unavailable")
    else:
        state = Health(True, "payment-service", "ok")
    return Response(
        msgspec.json.encode(state),
        status_code=200 if state.ok else 503,
        media_type=MediaType.JSON,
    )


@get("/health/live", media_type=MediaType.JSON, sync_to_thread=False)
def live() -> dict[str, Any]:
    """Whether the process answers at all; for restarts, so it looks at nothing else."""
    return {"ok": True, "service": "payment-service"}


@get("/metrics", sync_to_thread=False)
def metrics(request: Anyone) -> Response[bytes]:
    """All metrics, in the Prometheus text format."""
    service: Service = request.app.state.service
    return Response(service.telemetry.exposition(), media_type=service.telemetry.content_type)
