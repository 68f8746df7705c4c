"""Refunds of one captured payment."""

import uuid
from typing import Any

from payments.commands.refund import RefundPayment
from payments.payment.identity import RefundRequest
from payments.service import Service
from tests.commands.conftest import Make
from tests.commands.looking import PAYMENT, capture
from tests.doubles.gateway import ScriptedGateway

FAST: dict[str, Any] = {"charge_deadline_s": 0.4, "gateway_timeout_s": 0.2}


def refund_of(
    amount_cents: int | None = None,
    key: str | None = None,
    *,
    client: str = "default",
    may_read: str | None = None,
    payment_id: uuid.UUID = PAYMENT,
) -> RefundPayment:
    return RefundPayment(
        request=RefundRequest(
            payment_id=payment_id, amount_cents=amount_cents, idempotency_key=key, client=client
        ),
        may_read=may_read,
        request_id="test",
    )


async def charged(make: Make, *script: Any, amount_cents: int = 1000, **changed: Any) -> Service:
    """A service whose payment `k` is captured; `script` is for its refunds."""
    service = await make(ScriptedGateway(refund_script=script), **changed)
    await capture(service, amount_cents)
    return service
