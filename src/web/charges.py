"""POST /v1/charge."""

from uuid import UUID

import msgspec
from litestar import post
from litestar.enums import MediaType

from payments.commands.charge import Charged, ChargePayment
from payments.payment.identity import ChargeRequest
from payments.payment.state import Status
from web.answer import JsonAnswer
from web.charge_fields import check_payment_method, check_return_url, read_hold_until
from web.requests import AnyRequest, command_answer, log_with, read_command, service_of
from web.schema.description import described
from web.schema.operations.charges import CHARGE, ChargeAnswer, ChargeBody


@post("/charge", status_code=201, media_type=MediaType.JSON, opt=described(CHARGE))
async def charge(request: AnyRequest) -> JsonAnswer:
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
    service = service_of(request)
    check_payment_method(body.payment_method)
    check_return_url(body.return_url, service.settings.return_url_prefixes)
    charged = await service.charging.charge(
        ChargePayment(
            request=ChargeRequest(
                idempotency_key=sent.key,
                merchant_order_id=msgspec.convert(body.merchant_order_id, UUID),
                amount_cents=body.amount_cents,
                currency=body.currency.value,
                client=sent.client,
                payment_method=body.payment_method,
            ),
            request_id=sent.request_id,
            traceparent=sent.traceparent,
            hold_until=read_hold_until(body.hold_until),
            return_url=body.return_url,
        ),
        sent.caller,
    )
    return _answer(request, charged)


def _answer(request: AnyRequest, charged: Charged) -> JsonAnswer:
    payment, action = charged.payment, charged.next_action
    answer = ChargeAnswer(
        id=payment.id,
        merchant_order_id=payment.merchant_order_id,
        provider_txn_id=payment.provider_txn_id,
        # Not the payment's status: a replay after a refund has the body of the first response.
        status=payment.outcome,
        amount_cents=payment.amount_cents,
        currency=payment.currency,
        next_action=msgspec.UNSET if action is None else {"type": action.type, **action.fields},
    )
    pending = answer.status is Status.PENDING
    return command_answer(request, answer, payment.id, pending=pending, replayed=charged.replayed)
