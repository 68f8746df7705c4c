"""Health and metrics: responses."""

from typing import Annotated

import msgspec

from web.schema.description import Answer, Operation


class Health(msgspec.Struct, frozen=True, kw_only=True):
    """`ok`: the service can process charges.

    `database` is ok, unavailable (for reads), or read_only (a standby, or a server that refuses
    writes). `event_store` is ok, or stalled: an append has waited longer than an intent may. `log`
    is rewound while events that the database had acknowledged are missing: charges continue, and
    refunds are stopped until an operator accepts the loss. `callbacks` is degraded while Order
    Service does not accept callbacks: charges continue, and callbacks are retried; it is off
    without ORDER_CALLBACK_URL. Both are null while the database is unavailable.
    `gateways_down` names the providers that are down: this process begins no charges there.
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
    gateways_down: list[str]


class Alive(msgspec.Struct, frozen=True):
    """Always `ok`; a dead process sends no response."""

    ok: bool
    service: str


_HEALTHY = {
    "ok": True,
    "service": "payment-service",
    "database": "ok",
    "event_store": "ok",
    "log": "ok",
    "callbacks": "ok",
    "gateways_down": [],
}
HEALTH = Operation(
    id="health",
    tag="operations",
    description=(
        "For load balancers. A client that exceeds the rate limit receives the result of the "
        "last check, up to a second old."
    ),
    answers={
        200: Answer(description="The service can process charges.", body=Health, example=_HEALTHY),
        503: Answer(
            description="The database is unavailable, or accepts no events.",
            body=Health,
            example=_HEALTHY
            | {"ok": False, "database": "unavailable", "log": None, "callbacks": None},
        ),
    },
)
LIVE = Operation(
    id="live",
    tag="operations",
    description="Liveness probe: checks the process only, not the database. Never rejected.",
    answers={
        200: Answer(
            description="The process responds.",
            body=Alive,
            example={"ok": True, "service": "payment-service"},
        )
    },
)
METRICS = Operation(
    id="metrics",
    tag="operations",
    description="In the Prometheus text format; `docs/operations.md` lists those to watch. "
    "With `Accept: application/openmetrics-text` in the OpenMetrics format; with "
    "`Accept: application/json` only the load, memory, heap, uptime and time of "
    "the process. The values are at most a second old.",
    answers={
        200: Answer(
            description="All metrics.",
            body=None,
            example='payments_follower_lag_events{follower="payments"} 0.0\n',
            media_type="text/plain",
        )
    },
)
