"""POST /v1/charge."""

from datetime import datetime
from uuid import UUID

from litestar import Response, post
from litestar.enums import MediaType

from payments.commands.charge import Charged, ChargePayment
from payments.errors import FieldError
from payments.payment.identity import ChargeRequest
from payments.payment.state import Status
from payments.times import read_time
from web.bodies import invalid_fields
from web.requests import TIME_TEXT, AnyRequest, command_answer, log_with, read_command, service_of
from web.schema.description import described
from web.schema.operations.charges import CHARGE, ChargeAnswer, ChargeBody


@post("/charge", status_code=201, media_type=MediaType.JSON, opt=described(CHARGE))
async def charge(request: AnyRequest) -> Response[bytes]:
    """Charge a payment, exactly once per Idempotency-Key."""
    sent = read_command(
        request,
        ChargeBody,
        why_a_key="Send an Idempotency-Key header: a new value for each charge, and the same "
        "value for its retries.",
    )
    body = sent.body
    assert sent.key is not None
    log_with(request, order_id=body.merchant_order_id)
    charged = await service_of(request).charging.charge(
        ChargePayment(
            request=ChargeRequest(
                idempotency_key=sent.key,
                merchant_order_id=UUID(body.merchant_order_id),
                amount_cents=body.amount_cents,
                currency=body.currency.value,
                client=sent.client,
                payment_method=body.payment_method,
            ),
            request_id=sent.request_id,
            traceparent=sent.traceparent,
            hold_until=_hold_until(body),
        ),
        sent.caller,
    )
    return _answer(request, charged)


def _hold_until(body: ChargeBody) -> datetime | None:
    if body.hold_until is None:
        return None
    try:
        return read_time(body.hold_until)
    except ValueError:  # 31 February
        raise invalid_fields(FieldError("hold_until", f"must be {TIME_TEXT}")) from None


def _answer(request: AnyRequest, charged: Charged) -> Response[bytes]:
    payment = charged.payment
    answer = ChargeAnswer(
        id=payment.id,
        merchant_order_id=payment.merchant_order_id,
        provider_txn_id=payment.provider_txn_id,
        # Not the payment's status: a replay after a refund has the body of the first response.
        status=payment.outcome,
        amount_cents=payment.amount_cents,
        currency=payment.currency,
    )
    pending = answer.status is Status.PENDING
    return command_answer(request, answer, payment.id, pending=pending, replayed=charged.replayed)
