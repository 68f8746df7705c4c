"""Health and metrics: responses."""

from typing import Annotated

import msgspec

from web.schema.description import Answer, Operation


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
