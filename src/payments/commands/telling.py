"""What a person should know of an open payment is logged at once, and then rarely.

An attempt that finds the same as the one before must not be a line each time, or nobody reads them.
When it was told last is kept with the payment, for all processes and over restarts.
"""

import math
from typing import Any, Literal
from uuid import UUID

from loguru import logger

from payments.errors import DatabaseUnavailable
from payments.event_store import EventStore
from payments.gateways import ReferenceNotFound
from payments.observability.metrics import Telemetry
from payments.payment.decisions import OutcomeMismatch
from payments.payment.state import Payment

DAY_S = 86_400.0
# When a payment is open for too long, the same as deploy/prometheus/alerts.yml; and after how long
# that is told again: a customer waits for a charge.
TOO_LONG_S = {"charge": 120.0, "refund": 3600.0, "late_capture": 3600.0}
CHARGE_AGAIN_S = 3600.0

Level = Literal["WARNING", "ERROR", "CRITICAL"]

# The provider's response contradicts the log.
MISMATCHES = (OutcomeMismatch, ReferenceNotFound)


async def tell(
    store: EventStore,
    payment_id: UUID,
    level: Level,
    message: str,
    *,
    again_s: float = DAY_S,
    exception: Exception | None = None,
    **fields: Any,
) -> None:
    """Logs it, unless that much was told of this payment less than `again_s` ago.

    A line of a higher level comes at once, and so does everything of a payment that is not listed
    yet, or while the database is away.
    """
    try:
        due = await store.may_tell(payment_id, logger.level(level).no, again_s)
    except DatabaseUnavailable:
        due = True
    if due:
        log = logger.bind(payment_id=payment_id, **fields)
        log.opt(exception=exception).log(level, message)


async def tell_mismatch(
    store: EventStore, payment_id: UUID, kind: str, error: OutcomeMismatch | ReferenceNotFound
) -> None:
    """`kind` is that of what was asked about: a charge, refund, late capture or abandoned one."""
    message = "provider response contradicts the recorded events"
    await tell(store, payment_id, "CRITICAL", message, kind=kind, reason=str(error))


async def count_mismatch(
    store: EventStore,
    telemetry: Telemetry,
    payment_id: UUID,
    kind: Literal["charge", "refund"],
    error: OutcomeMismatch | ReferenceNotFound,
) -> None:
    """Counts and tells what the provider said to a request that is being served."""
    telemetry.mismatches[kind].inc()
    await tell_mismatch(store, payment_id, kind, error)


async def tell_other_gateway(store: EventStore, payment: Payment, kind: str) -> None:
    message = "begun with another provider"
    await tell(store, payment.id, "CRITICAL", message, kind=kind, gateway=payment.gateway)


async def tell_if_open_too_long(
    store: EventStore, payment_id: UUID, kind: str, open_s: float, reason: str
) -> None:
    """A warning, when it has become so, and each hour for a charge, each day for anything else.

    `kind` is that of what is open, `open_s` for how long it has been at the most.
    """
    if open_s > TOO_LONG_S.get(kind, math.inf):
        await tell(
            store,
            payment_id,
            "WARNING",
            "open for too long",
            again_s=CHARGE_AGAIN_S if kind == "charge" else DAY_S,
            kind=kind,
            open_s=round(open_s, 0),
            reason=reason,
        )
